"""The anchor: what truly matters, labelled on a few groups, and which rewards go along with it there.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maestro_pl.algorithm.advantages import normalize_rewards
from maestro_pl.conductor.credits import group_covariance
from maestro_pl.conductor.signals import Credit, MetaSignal, Observation
from maestro_pl.rollout import RewardScores, Rollout


class AnchorSignal(MetaSignal):
    """The in-group covariance of every reward with an anchor that labels a share of the groups (Eq. 10).

    An anchor is a reward with ``role: anchor``: a judge, a verifier, labels from a file. It is never weighed. In
    training it scores the groups that ``model.anchor_fraction`` draws, and no others. With several anchors (one a task,
    say) a response's value is the mean of those that apply to it, each z-scored in its group.

    A group whose anchor is the same for all responses carries no signal; it is counted as
    ``conductor/anchor_constant``.

    Args:
        entropy_coef: lambda_ent of the gradient learners.
    """

    uses_anchor = True
    gives_values = True

    def __init__(self, entropy_coef: float = 1e-3) -> None:
        super().__init__(entropy_coef)

    def observe(self, seen: Observation) -> Credit:
        """Values of the labelled responses, and each reward's covariance with them."""
        rollout = seen.rollout
        value_B = anchor_values(rollout).to(seen.z_BK.device)
        known_N = (~value_B.isnan()).view(-1, rollout.group_size).any(1)
        asked = int(seen.labelled_N.sum())
        metrics = {"anchor_groups": float(asked), "anchor_constant": float(asked - int(known_N.sum()))}
        return Credit(group_covariance(seen.z_BK, seen.mask_BK, value_B, rollout.group_size), value_B, metrics)


def anchor_scores(rollout: Rollout) -> list[RewardScores]:
    """The scores of the rewards with the role ``anchor``."""
    return [scores for scores in rollout.rewards.values() if scores.spec.role == "anchor"]


def anchor_values(rollout: Rollout) -> Tensor:
    """What the anchors say each response is worth, z-scored in its group: value_B on the CPU.

    NaN where no anchor scored the response, and in groups where the anchor is the same for all: they carry no signal.
    """
    return joint_values(anchor_scores(rollout), len(rollout), rollout.group_size)


def joint_values(anchors: Sequence[RewardScores], count: int, group_size: int) -> Tensor:
    """The z-scored mean over anchors, each z-scored in its group, of ``count`` responses; see :func:`anchor_values`."""
    total_B, applying_B = torch.zeros(count), torch.zeros(count)
    for anchor in anchors:
        mask_B = anchor.mask_B.cpu()
        total_B += normalize_rewards(anchor.values_B.cpu(), mask_B, group_size, "zscore")
        applying_B += mask_B
    known_B = applying_B > 0
    value_B = normalize_rewards(total_B / applying_B.clamp(min=1), known_B, group_size, "zscore")
    varies_N = (value_B != 0).view(-1, group_size).any(1)
    return torch.where(known_B & varies_N.repeat_interleave(group_size), value_B, torch.full_like(value_B, torch.nan))
