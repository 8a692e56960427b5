"""Groups of earlier batches, whose labels may still come: what the Conductor read and decided on, until they are old."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from maestro_pl.conductor.buffer import Decisions
from maestro_pl.conductor.labels import task_id
from maestro_pl.rollout import Later, Rollout
from maestro_pl.run.ranks import gathered

#: Names of some responses of one group, and their ranks.
Named: TypeAlias = tuple[tuple[str, ...], tuple[int, ...]]


@dataclass
class EarlierGroup:
    """A group of which more may be said.

    Attributes:
        task: of its prompt.
        names: anchor to the G names of its responses.
        used: anchor to the choices that were counted.
        asked: whether the anchors were asked about it.
        answered: whether they said something that tells its responses apart.
        version: how often the Conductor had been updated when it decided.
        h_GD: float32 on the CPU, as in :class:`Decisions`; one row where all are the same.
        mask_GK, z_GK: on the CPU, as in :class:`Decisions`.
    """

    task: str
    names: dict[str, list[str]]
    used: dict[str, list[Named]]
    asked: bool
    answered: bool
    version: int
    h_GD: Tensor
    mask_GK: Tensor
    z_GK: Tensor

    def new(self, anchor: str, choices: Sequence[Named]) -> list[Named]:
        """Of all choices of an anchor, those about responses of this group that were not counted; they are from now on."""
        known, used = set(self.names.get(anchor, ())) - {""}, Counter(self.used.get(anchor, ()))
        found = []
        for choice in choices:
            if not known.issuperset(choice[0]):
                continue
            if used[choice]:  # two people who say the same are two choices
                used[choice] -= 1
            else:
                found.append(choice)
        self.used.setdefault(anchor, []).extend(found)
        return found

    def ranks(self, anchor: str, choice: Named) -> Tensor:
        """int64 (G,): -1 where a response was not shown; of equal texts the first one was."""
        rank_G = torch.full((len(self.z_GK),), -1)
        for name, rank in zip(*choice, strict=True):
            rank_G[self.names[anchor].index(name)] = rank
        return rank_G


@dataclass(frozen=True)
class Said:
    """What was said of one group of an earlier batch.

    Attributes:
        group: that it is about, as it was before.
        columns: int64 ranks of its G responses, one tensor a choice.
    """

    group: EarlierGroup
    columns: list[Tensor]

    @property
    def telling(self) -> bool:
        """Whether a choice tells responses apart."""
        return any(len(set(rank_G[rank_G >= 0].tolist())) > 1 for rank_G in self.columns)


class EarlierGroups:
    """The newest groups of a run, the same on every rank, for anchors that are answered late (:class:`Later`).

    Attributes:
        groups: the oldest first.
        choices: that came for groups of earlier batches so far.
    """

    def __init__(self) -> None:
        self.groups: list[EarlierGroup] = []
        self.choices = 0

    def said(self, later: Mapping[str, Later]) -> list[Said]:
        """What is new about these groups. Collective: what rank 0 has read counts."""
        choices = gathered({anchor: each.choices for anchor, each in later.items()})[0]
        by_name = {anchor: _by_first_name(all_) for anchor, all_ in choices.items()}
        found = []
        for group in self.groups if any(choices.values()) else ():
            columns = []
            for anchor, places in by_name.items():
                own = sorted({place for name in set(group.names.get(anchor, ())) for place in places.get(name, ())})
                about = group.new(anchor, [choices[anchor][place] for place in own])
                columns += [group.ranks(anchor, choice) for choice in about]
            if columns:
                found.append(Said(group, columns))
        self.choices += sum(len(said.columns) for said in found)
        return found

    def add(
        self, decisions: Decisions, rollout: Rollout, later: Mapping[str, Later], asked_N: Tensor, answered_N: Tensor
    ) -> None:
        """Remember the groups of a batch, and forget the oldest. Collective.

        Args:
            decisions: on every response of the rollout.
            rollout: with the anchors' choices, which are counted already.
            later: of the anchors that have it.
            asked_N: bool, the groups that the anchors were asked about.
            answered_N: bool, those of which they said something.
        """
        size, own = rollout.group_size, []
        tasks = [str(task) for task in rollout.columns.get("task", ["all"] * len(rollout.prompts))]
        for n, task in enumerate(tasks):
            rows = slice(n * size, (n + 1) * size)
            h_GD = decisions.h_BD[rows].cpu()
            used = {
                anchor: [
                    (tuple(each.names[row] for row in choice.rows), choice.ranks)
                    for choice in rollout.rewards[anchor].choices
                    if choice.rows[0] // size == n
                ]
                for anchor, each in later.items()
            }
            own.append(
                EarlierGroup(
                    task,
                    {anchor: each.names[rows] for anchor, each in later.items()},
                    used,
                    bool(asked_N[n]),
                    bool(answered_N[n]),
                    decisions.version,
                    # a copy: a slice would keep, and save, the whole batch
                    h_GD[:1].clone() if bool((h_GD == h_GD[:1]).all()) else h_GD.clone(),
                    decisions.mask_BK[rows].cpu().clone(),
                    decisions.z_BK[rows].cpu().clone(),
                )
            )
        parts = gathered(own)
        # rank r has every R-th group of the global batch
        self.groups += [part[n] for n in range(max(map(len, parts))) for part in parts if n < len(part)]
        left = max(each.keep for each in later.values())
        for place in range(len(self.groups) - 1, -1, -1):
            left -= len(self.groups[place].z_GK)
            if left < 0:
                del self.groups[: place + 1]
                break

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        fields = [{name: getattr(group, name) for name in EarlierGroup.__dataclass_fields__} for group in self.groups]
        return {"groups": fields, "choices": self.choices}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.groups = [EarlierGroup(**fields) for fields in state.get("groups", ())]
        self.choices = state.get("choices", 0)


def _by_first_name(choices: Sequence[Named]) -> dict[str, list[int]]:
    """Where the choices stand that name this response first: a group is compared with those about it, not with all."""
    places: dict[str, list[int]] = {}
    for place, (names, _) in enumerate(choices):
        places.setdefault(names[0], []).append(place)
    return places


def decisions_of(said: Sequence[Said], device: torch.device) -> Decisions:
    """What was decided on these groups, with the ranks that came for them and nothing else."""
    most = max(len(each.columns) for each in said)
    h, masks, zs, ranks, tasks, versions, groups = [], [], [], [], [], [], []
    for number, each in enumerate(said):
        group, size = each.group, len(each.group.z_GK)
        h.append(group.h_GD.expand(size, -1))
        masks.append(group.mask_GK)
        zs.append(group.z_GK)
        missing = [torch.full((size,), -1)] * (most - len(each.columns))
        ranks.append(torch.stack([*each.columns, *missing], dim=1))
        tasks += [task_id(group.task)] * size
        versions += [group.version] * size
        groups += [number] * size
    count = len(tasks)
    return Decisions(
        torch.cat(h).to(device),
        torch.cat(masks).to(device),
        torch.full((count,), -1, device=device),
        torch.zeros(count, device=device),
        torch.tensor(groups, device=device),
        min(versions),
        version_B=torch.tensor(versions, device=device),
        z_BK=torch.cat(zs).to(device),
        rank_BJ=torch.cat(ranks).to(device),
        task_B=torch.tensor(tasks, device=device),
    )
