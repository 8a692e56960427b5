"""What the rewards of a run are worth: how each spreads, and which go along with each other and with the anchor.

Everything is a sum over groups, so that a run of any length is kept in a few numbers. Correlations are inside groups, the
only place where a reward moves the policy; their intervals are over groups, whose responses are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from maestro_pl.algorithm.advantages import normalize_rewards
from maestro_pl.algorithm.scalar_reward import anchor_scores, anchor_values
from maestro_pl.rollout import Rollout

Verdict: TypeAlias = Literal["helps", "hurts", "silent"]

ANCHOR = ""  # what all anchors say together, among the names of rewards, none of which is empty
ALL_TASKS = "all"
CONFIDENCE = 0.95


class Agreement(NamedTuple):
    """A correlation inside groups, the mean over the groups in which both sides differ.

    Attributes:
        r: the mean of the groups' Pearson correlations; NaN where there is no such group.
        low, high: 95 % interval over groups; NaN with fewer than two.
        groups: how many.
    """

    r: float
    low: float
    high: float
    groups: int


@dataclass
class AgreementSums:
    """Sums over the groups in which two rewards both differ.

    Attributes:
        groups: how many.
        total, squares: of their correlations and of the squares.
        chance: of the variance that a correlation of m responses in random order has, 1 / (m - 1).
    """

    groups: int = 0
    total: float = 0.0
    squares: float = 0.0
    chance: float = 0.0

    def agreement(self) -> Agreement:
        """The mean with its t interval over groups.

        The standard error is at least that of responses in random order: few groups that agree by luck, such as two
        pairs with correlations of 1, are no evidence.
        """
        if not self.groups:
            return Agreement(math.nan, math.nan, math.nan, 0)
        mean = self.total / self.groups
        if self.groups < 2:
            return Agreement(mean, math.nan, math.nan, 1)
        from scipy.special import stdtrit

        between = max(0.0, self.squares - self.groups * mean**2) / (self.groups - 1) / self.groups
        error = math.sqrt(max(between, self.chance / self.groups**2))
        half = float(stdtrit(self.groups - 1, 0.5 + CONFIDENCE / 2)) * error
        return Agreement(mean, max(-1.0, mean - half), min(1.0, mean + half), self.groups)


@dataclass
class RewardSums:
    """Sums of one reward over the responses of one task.

    Attributes:
        role, normalize: as in the config.
        n: responses that it was asked about: of its tasks, as an anchor of the labelled groups.
        applied: those it gave a score.
        total: of the raw scores.
        groups: with at least two scores.
        told_apart: groups whose scores differ by more than rounding.
        within: of the squared distances from the group's mean.
        freedom: of the scores of a group less one.
    """

    role: str
    normalize: str
    n: int = 0
    applied: int = 0
    total: float = 0.0
    groups: int = 0
    told_apart: int = 0
    within: float = 0.0
    freedom: int = 0


@dataclass
class TaskSums:
    """Sums of one task: of each reward, and of each two of them, the anchor under the name ``ANCHOR``."""

    responses: int = 0
    groups: int = 0
    rewards: dict[str, RewardSums] = field(default_factory=dict)
    pairs: dict[tuple[str, str], AgreementSums] = field(default_factory=dict)

    def add(self, other: TaskSums) -> None:
        """Add what was seen of other responses."""
        self.responses += other.responses
        self.groups += other.groups
        for name, theirs in other.rewards.items():
            _add_fields(self.rewards.setdefault(name, RewardSums(theirs.role, theirs.normalize)), theirs)
        for pair, sums in other.pairs.items():
            _add_fields(self.pairs.setdefault(pair, AgreementSums()), sums)


def _add_fields(ours: Any, theirs: Any) -> None:
    for name, value in vars(theirs).items():
        setattr(ours, name, value if isinstance(value, str) else getattr(ours, name) + value)


@dataclass(frozen=True)
class ReportRow:
    """What is told of one reward in one task.

    Attributes:
        task: or ``all``, over every task.
        reward, role, normalize: as in the config.
        n, applied: responses asked about, and scored.
        mean: of the raw scores; NaN where there are none.
        spread: standard deviation of the raw scores inside groups, pooled over groups; NaN where no group has two.
        groups, told_apart: with at least two scores, and of those the ones whose scores differ.
        anchor: correlation with the anchor; None for an anchor itself, and where no anchor has a score.
        verdict: ``helps`` (the interval is above 0), ``hurts`` (below), ``silent``; None where ``anchor`` is.
        because: why it is silent.
        others: correlations with the other rewards that are no anchors.
    """

    task: str
    reward: str
    role: str
    normalize: str
    n: int
    applied: int
    mean: float
    spread: float
    groups: int
    told_apart: int
    anchor: Agreement | None
    verdict: Verdict | None
    because: str
    others: dict[str, Agreement]


class RewardStatistics:
    """What was seen of the rewards so far, in memory that does not grow with the run.

    Attributes:
        tasks: sums by task, in the order in which tasks were first seen.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, TaskSums] = {}

    def add(self, rollout: Rollout, asked: Mapping[str, Sequence[int]] | None = None) -> None:
        """Add a scored rollout.

        Args:
            rollout: whole groups, every reward scored.
            asked: the responses that each reward was asked about; those not named: all.
        """
        size, count = rollout.group_size, len(rollout)
        columns = {
            name: _Column(s.values_B.double().cpu(), s.mask_B.cpu(), size) for name, s in rollout.rewards.items()
        }
        paired = {name: columns[name] for name, s in rollout.rewards.items() if s.spec.role != "anchor"}
        if anchor_scores(rollout):
            value_B = anchor_values(rollout).double()
            paired[ANCHOR] = _Column(value_B.nan_to_num(0.0), ~value_B.isnan(), size)
        names = list(paired)
        pairs = {
            (one, other): correlations(paired[one], paired[other])
            for place, one in enumerate(names)
            for other in names[place + 1 :]
        }
        asked_NG = {}
        for name in rollout.rewards:
            asked_B = torch.zeros(count, dtype=torch.bool)
            asked_B[list(range(count) if asked is None or name not in asked else asked[name])] = True
            asked_NG[name] = asked_B.view(-1, size)
        tasks_N = [str(task) for task in rollout.columns["task"]]
        for task in dict.fromkeys(tasks_N):
            at_N = torch.tensor([each == task for each in tasks_N])
            seen = TaskSums(int(at_N.sum()) * size, int(at_N.sum()))
            for name, scores in rollout.rewards.items():
                column = columns[name]
                seen.rewards[name] = RewardSums(
                    scores.spec.role,
                    scores.spec.normalize,
                    int(asked_NG[name][at_N].sum()),
                    int(column.count_N[at_N].sum()),
                    float(column.values_NG[at_N].sum()),
                    int((column.count_N[at_N] >= 2).sum()),
                    int(column.told_N[at_N].sum()),
                    float(column.within_N[at_N].sum()),
                    int((column.count_N[at_N] - 1).clamp(min=0).sum()),
                )
            for pair, (r_N, chance_N, both_N) in pairs.items():
                r_N, chance_N = r_N[both_N & at_N], chance_N[both_N & at_N]
                seen.pairs[pair] = AgreementSums(
                    len(r_N), float(r_N.sum()), float(r_N.square().sum()), float(chance_N.sum())
                )
            self.tasks.setdefault(task, TaskSums()).add(seen)

    def rows(self) -> list[ReportRow]:
        """A row a task and reward; where there are several tasks, also over all of them."""
        return [row for task, sums in self.by_task().items() for row in rows_of(task, sums)]

    def by_task(self) -> dict[str, TaskSums]:
        """The sums of each task; where there are several, ``all`` last."""
        whole = TaskSums()
        for sums in self.tasks.values():
            whole.add(sums)
        return {**self.tasks, ALL_TASKS: whole} if len(self.tasks) > 1 else dict(self.tasks)

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain values, for a checkpoint."""
        return {
            task: {
                "responses": sums.responses,
                "groups": sums.groups,
                "rewards": {name: dict(vars(each)) for name, each in sums.rewards.items()},
                "pairs": [[one, other, dict(vars(each))] for (one, other), each in sums.pairs.items()],
            }
            for task, sums in self.tasks.items()
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.tasks = {
            task: TaskSums(
                sums["responses"],
                sums["groups"],
                {name: RewardSums(**each) for name, each in sums["rewards"].items()},
                {(one, other): AgreementSums(**each) for one, other, each in sums["pairs"]},
            )
            for task, sums in saved.items()
        }


class _Column:
    """One reward of N groups: values_NG (0 where the mask is False), and what is known of each group."""

    def __init__(self, values_B: Tensor, mask_B: Tensor, size: int) -> None:
        self.mask_NG = mask_B.view(-1, size)
        self.values_NG = torch.where(mask_B, values_B, torch.zeros_like(values_B)).view(-1, size)
        self.count_N = self.mask_NG.sum(1)
        self.z_NG = self.zscores(self.mask_NG)
        self.told_N = (self.z_NG != 0).any(1)  # what training takes for a difference: rounding is none
        mean_N1 = (self.values_NG.sum(1) / self.count_N.clamp(min=1)).unsqueeze(1)
        squares_NG = (self.values_NG - mean_N1).square().masked_fill(~self.mask_NG, 0.0)
        self.within_N = torch.where(self.told_N, squares_NG.sum(1), 0.0)

    def zscores(self, mask_NG: Tensor) -> Tensor:
        """Values z-scored inside their groups over these responses."""
        size = self.values_NG.shape[1]
        return normalize_rewards(self.values_NG.reshape(-1), mask_NG.reshape(-1), size, "zscore").view(-1, size)


def correlations(one: _Column, other: _Column) -> tuple[Tensor, Tensor, Tensor]:
    """Pearson's correlation of two rewards in each group, over the responses that both apply to.

    Returns:
        float r_N in [-1, 1]; float chance_N, its variance were the responses in random order; bool both_N, the groups in
        which both differ (the others have 0 in ``r_N``).
    """
    mask_NG = one.mask_NG & other.mask_NG
    z_NG, other_NG = (
        each.z_NG if torch.equal(mask_NG, each.mask_NG) else each.zscores(mask_NG) for each in (one, other)
    )
    freedom_N = (mask_NG.sum(1) - 1).clamp(min=1).double()
    both_N = (z_NG != 0).any(1) & (other_NG != 0).any(1)
    return ((z_NG * other_NG).sum(1) / freedom_N).clamp(-1.0, 1.0), 1.0 / freedom_N, both_N


def rows_of(task: str, sums: TaskSums) -> list[ReportRow]:
    """A row for each reward that was asked about a response of this task."""
    anchored = any(each.role == "anchor" and each.applied for each in sums.rewards.values())
    rows = []
    for name, each in sums.rewards.items():
        if not each.n:
            continue
        with_anchor = anchored and each.role != "anchor"
        anchor = sums.pairs.get((name, ANCHOR), AgreementSums()).agreement() if with_anchor else None
        verdict, because = (None, "") if anchor is None else verdict_of(each, anchor)
        rows.append(
            ReportRow(
                task,
                name,
                each.role,
                each.normalize,
                each.n,
                each.applied,
                each.total / each.applied if each.applied else math.nan,
                math.sqrt(each.within / each.freedom) if each.freedom else math.nan,
                each.groups,
                each.told_apart,
                anchor,
                verdict,
                because,
                {other: found for other, found in _others(name, sums) if sums.rewards[other].n},
            )
        )
    return rows


def _others(name: str, sums: TaskSums) -> Iterable[tuple[str, Agreement]]:
    for (one, other), each in sums.pairs.items():
        if name in (one, other) and ANCHOR not in (one, other):
            yield (other if name == one else one), each.agreement()


def verdict_of(reward: RewardSums, anchor: Agreement) -> tuple[Verdict, str]:
    """Whether a reward goes along with the anchor, and if it is silent, why."""
    if anchor.low > 0:
        return "helps", ""
    if anchor.high < 0:
        return "hurts", ""
    if not reward.applied:
        return "silent", "it applies to nothing"
    if not reward.told_apart:
        return "silent", "it tells no group apart"
    if not anchor.groups:
        return "silent", "no labelled group in which both it and the anchor differ"
    if anchor.groups == 1:
        return "silent", "one group is too few"
    return "silent", "the interval holds 0"
