"""Groups as one flat sequence: each prompt once, then its responses, every token at the position it has in its own row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_pl.policy.attention import causal, no_mask


@dataclass(frozen=True)
class Group:
    """Lengths of a prompt and of the responses that follow it."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the packed group."""
        return self.prompt + sum(self.responses)


class PackedGroups:
    """The flat sequence of some rows, and the attention of each row over its own tokens (a :class:`Layout`).

    Rows that follow each other and have the same prompt become one group.

    Args:
        prompts: token ids of the prompt of each row, at least one token.
        responses: token ids of the response of each row, at least one token.
        device: of the tensors.

    Attributes:
        ids, position_ids: int64 (1, T).
        before_T: int64 positions of the tokens in front of the response tokens, where their logits are, row by row.
        inside_T: int64 positions of the response tokens, row by row.
        last_B: int64 positions of the last response tokens.
        attention_mask: a placeholder; the attention is this object's own.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        ids: list[int] = []
        positions: list[Tensor] = []
        before: list[Tensor] = []
        inside: list[Tensor] = []
        self.groups = group_rows(prompts, [len(response) for response in responses])
        row = 0
        for group in self.groups:
            ids.extend(prompts[row])
            positions.append(torch.arange(group.prompt))
            end_of_prompt = len(ids) - 1
            for length in group.responses:
                begin = len(ids)
                ids.extend(responses[row])
                positions.append(torch.arange(group.prompt, group.prompt + length))
                before += [torch.tensor([end_of_prompt]), torch.arange(begin, begin + length - 1)]
                inside.append(torch.arange(begin, begin + length))
                row += 1
        self.ids = torch.tensor([ids], device=device)
        self.position_ids = torch.cat(positions).unsqueeze(0).to(device)
        self.before_T = torch.cat(before).to(device)
        self.inside_T = torch.cat(inside).to(device)
        self.last_B = torch.stack([span[-1] for span in inside]).to(device)
        self.attention_mask = no_mask(device)
        self._segments = [size for group in self.groups for size in (group.prompt, sum(group.responses))]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """See :class:`maestro_pl.policy.attention.Layout`."""
        parts = [torch.split(states[0], self._segments, dim=1) for states in (query, key, value)]
        outs: list[Tensor] = []
        for index, group in enumerate(self.groups):
            (q, k, v), (q_r, k_r, v_r) = ([part[2 * index + side] for part in parts] for side in (0, 1))
            outs.append(causal(q[None], k[None], v[None], scale, dropout)[0])
            rows = len(group.responses)
            whole_k, whole_v = (
                torch.cat([shared.expand(rows, -1, -1, -1), _rows(own, group.responses)], dim=2)
                for shared, own in ((k, k_r), (v, v_r))
            )
            out = causal(_rows(q_r, group.responses), whole_k, whole_v, scale, dropout)
            outs.append(_flat(out, group.responses))
        return torch.cat(outs, dim=1).transpose(0, 1).contiguous().unsqueeze(0)


def group_rows(prompts: Sequence[Sequence[int]], response_lengths: Sequence[int]) -> list[Group]:
    """Runs of rows with the same prompt."""
    runs: list[tuple[Sequence[int], list[int]]] = []
    for prompt, length in zip(prompts, response_lengths, strict=True):
        if not runs or (prompt is not runs[-1][0] and list(prompt) != list(runs[-1][0])):
            runs.append((prompt, []))
        runs[-1][1].append(length)
    return [Group(len(prompt), tuple(lengths)) for prompt, lengths in runs]


def _rows(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Responses laid end to end (heads, sum of lengths, D) as a rectangle (rows, heads, longest, D), filled up with zeros.

    What is filled in lies behind every token of its row, so causal attention never sees it.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return states.view(states.shape[0], len(lengths), longest, -1).transpose(0, 1)
    return torch.stack(
        [F.pad(row, (0, 0, 0, longest - row.shape[1])) for row in torch.split(states, list(lengths), dim=1)]
    )


def _flat(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The inverse of :func:`_rows`."""
    if min(lengths) == rows.shape[2]:
        return rows.transpose(0, 1).flatten(1, 2)
    return torch.cat([row[:, :length] for row, length in zip(rows, lengths, strict=True)], dim=1)
