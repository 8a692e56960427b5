"""The rollouts of all ranks as one, for those who watch a run: logs, tables, files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maestro_pl.rollout import Choice, RewardScores, Rollout
from maestro_pl.run.ranks import count_of, gathered

Place = tuple[int, int]  # a row, and the rank that has it


def gathered_rollout(rollout: Rollout, positions: Sequence[int] | None = None) -> Rollout | None:
    """The groups of every rank in the order of the global batch; None where there is one rank. Collective.

    Log-probabilities and hidden states stay where they are: nobody who watches reads them.

    Args:
        rollout: of this rank.
        positions: of its prompts in an evaluation: ranks fill the last batch up with prompts that others have.
    """
    if count_of() == 1:
        return None
    lighter = replace(rollout, logps_T=None, sampling_logps_T=None, hidden_BD=None, everywhere=None)
    parts = gathered((lighter, positions))
    places = [list(place) for _, place in parts if place is not None]
    return joined([part for part, _ in parts], places if len(places) == len(parts) else None)


def joined(parts: Sequence[Rollout], positions: Sequence[Sequence[int]] | None = None) -> Rollout:
    """One rollout of the groups of several: the first group of each, the second of each, and so on.

    Args:
        parts: with the same group size, rewards and weights; rank r of R holds every R-th prompt of the global batch.
        positions: of the prompts of each; one that came before is left out.
    """
    size, longest = parts[0].group_size, max(len(part.prompts) for part in parts)
    groups = [(i, r) for i in range(longest) for r, part in enumerate(parts) if i < len(part.prompts)]
    if positions is not None:
        first = {positions[rank][place]: (place, rank) for place, rank in reversed(groups)}
        groups = [(place, rank) for place, rank in groups if first[positions[rank][place]] == (place, rank)]
    rows = [(place * size + g, rank) for place, rank in groups for g in range(size)]

    def of(name: str) -> list[Any]:
        return [getattr(part, name) for part in parts]

    def stacked(name: str, places: list[Place]) -> Tensor | None:
        tensors = of(name)
        if any(tensor is None for tensor in tensors):
            return None
        return torch.stack([tensors[rank][place] for place, rank in places])

    def tokens(name: str) -> Tensor | None:
        tensors = of(name)
        if any(tensor is None for tensor in tensors):
            return None
        pieces = [t.split(part.lengths_B.tolist()) for t, part in zip(tensors, parts, strict=True)]
        return torch.cat([pieces[rank][place] for place, rank in rows])

    def column(name: str) -> list[Any]:
        return _listed([part.columns.get(name, [None] * len(part.prompts)) for part in parts], groups)

    def perplexity(name: str) -> Tensor:
        return _filled([part.perplexities.get(name) for part in parts], [len(part) for part in parts], rows)

    return Rollout(
        prompts=_listed(of("prompts"), groups),
        prompt_texts=_listed(of("prompt_texts"), groups),
        prompt_ids=_listed(of("prompt_ids"), groups),
        response_ids=_listed(of("response_ids"), rows),
        responses=_listed(of("responses"), rows),
        finish_reasons=_listed(of("finish_reasons"), rows),
        group_size=size,
        columns={name: column(name) for name in _names(part.columns for part in parts)},
        temperature=parts[0].temperature,
        sampling_logps_T=tokens("sampling_logps_T"),
        engine=dict(parts[0].engine),
        entropies_T=tokens("entropies_T"),
        labelled_N=stacked("labelled_N", groups),
        shown_B=stacked("shown_B", rows),
        rewards={name: _scores([part.rewards[name] for part in parts], rows) for name in parts[0].rewards},
        scalar_B=stacked("scalar_B", rows),
        kl_B=stacked("kl_B", rows),
        gain_B=stacked("gain_B", rows),
        normalized_BK=stacked("normalized_BK", rows),
        advantages_B=stacked("advantages_B", rows),
        weights_BK=stacked("weights_BK", rows),
        weight_names=parts[0].weight_names,
        probabilities_BK=stacked("probabilities_BK", rows),
        perplexities={name: perplexity(name) for name in _names(part.perplexities for part in parts)},
    )


def _scores(parts: Sequence[RewardScores], rows: list[Place]) -> RewardScores:
    counts = [len(part.values_B) for part in parts]

    def noted(name: str) -> list[Any]:
        return _listed([part.texts.get(name, [None] * n) for part, n in zip(parts, counts, strict=True)], rows)

    row_of = {place: row for row, place in enumerate(rows)}
    choices = [
        Choice(tuple(row_of[row, rank] for row in choice.rows), choice.ranks)
        for rank, part in enumerate(parts)
        for choice in part.choices
        if (choice.rows[0], rank) in row_of
    ]
    return RewardScores(
        parts[0].spec,
        torch.stack([parts[rank].values_B[place] for place, rank in rows]),
        torch.stack([parts[rank].mask_B[place] for place, rank in rows]),
        {
            name: _filled([p.metrics.get(name) for p in parts], counts, rows)
            for name in _names(p.metrics for p in parts)
        },
        {name: noted(name) for name in _names(part.texts for part in parts)},
        choices,
    )


def _listed(values: Sequence[Sequence[Any]], places: list[Place]) -> list[Any]:
    return [values[rank][place] for place, rank in places]


def _filled(tensors: Sequence[Tensor | None], counts: Sequence[int], rows: list[Place]) -> Tensor:
    whole = [torch.full((n,), torch.nan) if t is None else t for t, n in zip(tensors, counts, strict=True)]
    return torch.stack([whole[rank][place] for place, rank in rows])


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))
