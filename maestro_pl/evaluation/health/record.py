"""What is judged of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maestro_pl.algorithm.advantages import normalize_rewards
from maestro_pl.rollout import RewardScores, Rollout


@dataclass
class WeighedBatch:
    """What is judged of one or several rollouts: whole groups of responses, on the CPU.

    Attributes:
        names: K names of the weighed rewards; empty where nothing was weighed.
        tasks_N: task of each prompt.
        group_size: G.
        weights_BK: float64 the weigher's probabilities, 0 for rewards that do not apply.
        values_BK: float64 raw rewards, 0 where the mask is False.
        mask_BK: bool, the rewards that apply.
        anchor_B: float64 mean of the anchors' z-scores inside the group, NaN where no anchor has a score.
        advantages_B: float64, or None.
    """

    names: list[str]
    tasks_N: list[str]
    group_size: int
    weights_BK: Tensor
    values_BK: Tensor
    mask_BK: Tensor
    anchor_B: Tensor
    advantages_B: Tensor | None = None

    @property
    def z_BK(self) -> Tensor:
        """Rewards z-scored inside their groups: 0 in single-valued groups and where the mask is False."""
        columns = [
            normalize_rewards(self.values_BK[:, k], self.mask_BK[:, k], self.group_size, "zscore")
            for k in range(len(self.names))
        ]
        return torch.stack(columns, dim=1) if columns else self.values_BK

    @property
    def choice_B(self) -> Tensor:
        """Bool: responses to which at least two rewards apply and that have finite weights."""
        return has_choice(self.weights_BK, self.mask_BK)


def has_choice(weights_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """Bool (B,): rows to which at least two rewards apply and that have finite weights."""
    return (mask_BK.sum(1) >= 2) & (weights_BK.sum(1) > 0)  # a sum with NaN is not above 0


def observe(rollout: Rollout, weights_BK: Tensor | None) -> WeighedBatch:
    """What is judged of one rollout, weighed by ``weights_BK`` (None: no weigher)."""
    names = list(rollout.weight_names) if weights_BK is not None else []
    if any(name not in rollout.rewards for name in names):
        names = []
    scores = [rollout.rewards[name] for name in names]
    empty_BK = torch.zeros(len(rollout), 0, dtype=torch.float64)
    return WeighedBatch(
        names,
        [str(task) for task in rollout.columns.get("task", ["all"] * len(rollout.prompts))],
        rollout.group_size,
        empty_BK if weights_BK is None or not names else weights_BK.detach().double().cpu(),
        torch.stack([s.values_B.double().cpu() for s in scores], dim=1) if scores else empty_BK,
        torch.stack([s.mask_B.cpu() for s in scores], dim=1) if scores else empty_BK.bool(),
        _anchor([s for s in rollout.rewards.values() if s.spec.role == "anchor"], len(rollout), rollout.group_size),
        None if rollout.advantages_B is None else rollout.advantages_B.detach().double().cpu(),
    )


def _anchor(anchors: Sequence[RewardScores], count: int, group_size: int) -> Tensor:
    if not anchors:
        return torch.full((count,), torch.nan, dtype=torch.float64)
    columns = []
    for scores in anchors:
        mask_B = scores.mask_B.cpu()
        z_B = normalize_rewards(scores.values_B.double().cpu(), mask_B, group_size, "zscore")
        columns.append(z_B.masked_fill(~mask_B, torch.nan))
    return torch.stack(columns).nanmean(0)


def joined(batches: Sequence[WeighedBatch]) -> WeighedBatch:
    """Several batches as one; those whose rewards or group size are not the last one's are left out."""
    last = batches[-1]
    alike = [b for b in batches if b.names == last.names and b.group_size == last.group_size]
    advantages = [b.advantages_B for b in alike if b.advantages_B is not None]
    return replace(
        last,
        tasks_N=[task for b in alike for task in b.tasks_N],
        weights_BK=torch.cat([b.weights_BK for b in alike]),
        values_BK=torch.cat([b.values_BK for b in alike]),
        mask_BK=torch.cat([b.mask_BK for b in alike]),
        anchor_B=torch.cat([b.anchor_B for b in alike]),
        advantages_B=torch.cat(advantages) if advantages else None,
    )
