"""From the scores in a rollout to one scalar reward a response: normalised, weighed, gated, mixed with the anchor.

Pure functions. Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maestro_pl.algorithm.advantages import apply_gate, normalize_rewards, scalarise, standardize_rewards
from maestro_pl.algorithm.settings import Advantages, Anchoring
from maestro_pl.errors import UserError
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout

STANDARDIZED = ("normalize_then_sum", "mo_grpo")  # aggregations of rewards that are standardised first


def raw_rewards(rollout: Rollout, specs: Sequence[RewardSpec], device: torch.device) -> tuple[Tensor, Tensor]:
    """The weighed rewards as they were given, not normalised: rewards_BK, 0 where bool mask_BK says that none applies."""
    scores = [rollout.rewards[spec.name] for spec in specs if spec.role == "train"]
    values_BK = torch.stack([s.values_B for s in scores], dim=1).to(device)
    return values_BK, torch.stack([s.mask_B for s in scores], dim=1).to(device)


def normalized_rewards(
    rollout: Rollout, specs: Sequence[RewardSpec], settings: Advantages, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The weighed rewards, each normalised inside its group (Eq. 4).

    Args:
        rollout: with every reward scored.
        specs: of the run's rewards; those with the role ``train`` become columns, in this order.
        settings: GDPO and MO-GRPO standardise every reward before the sum.
        device: of the results.

    Returns:
        float rewards_BK, and bool mask_BK of those that apply.
    """
    scores = [rollout.rewards[spec.name] for spec in specs if spec.role == "train"]
    mask_BK = torch.stack([s.mask_B for s in scores], dim=1).to(device)
    columns = [normalize_rewards(s.values_B, s.mask_B, rollout.group_size, s.spec.normalize) for s in scores]
    rewards_BK = torch.stack(columns, dim=1).to(device)
    if settings.aggregation in STANDARDIZED:
        rewards_BK = standardize_rewards(rewards_BK, mask_BK, rollout.group_size)
    return rewards_BK, mask_BK


def scalar_reward(
    rollout: Rollout, rewards_BK: Tensor, mask_BK: Tensor, weights_BK: Tensor, anchoring: Anchoring | None = None
) -> Tensor:
    """R = sum_k w_k r_k, gated (Eq. 5); in training, anchors may have a share in it (Eq. 14).

    Args:
        rollout: for its gates, and the labels of its anchors.
        rewards_BK: from :func:`normalized_rewards`.
        mask_BK: which of them apply.
        weights_BK: on the simplex over the rewards that apply.
        anchoring: of a training batch; None: an evaluation, whose anchors are only reported.

    Returns:
        float scalar_B, NaN where no reward applies and in groups that are left out (``unlabelled: skipped``).
    """
    scalar_B = scalarise(rewards_BK, weights_BK, mask_BK)
    skipped_B = torch.zeros_like(scalar_B, dtype=torch.bool)
    if anchoring is not None and anchoring.hybrid:
        scalar_B, skipped_B = with_anchor(rollout, scalar_B, anchoring)
    for open_B in gates(rollout):
        scalar_B = apply_gate(scalar_B, open_B.to(scalar_B.device), rollout.group_size)
    return scalar_B.masked_fill(skipped_B, torch.nan)


def with_anchor(rollout: Rollout, scalar_B: Tensor, anchoring: Anchoring) -> tuple[Tensor, Tensor]:
    """On labelled groups, let the anchor itself enter the scalar reward (Eq. 14).

    R <- (1 - hybrid) z(R) + hybrid v, v the anchors' value and z(R) the z-score in the group; a response that the
    anchor did not score has no place on that scale and gets none. Groups without a label, and those whose anchor is the
    same for all responses, keep R; with ``unlabelled: skipped`` they are skipped.

    Returns:
        scalar_B, and bool skipped_B.
    """
    value_B = anchor_values(rollout).to(scalar_B.device)
    known_B = anchored_responses(rollout, value_B)
    z_B = normalize_rewards(scalar_B.nan_to_num(0.0), ~scalar_B.isnan(), rollout.group_size, "zscore")
    mixed_B = torch.where(known_B, (1.0 - anchoring.hybrid) * z_B + anchoring.hybrid * value_B, scalar_B)
    return mixed_B, ~known_B if anchoring.unlabelled == "skipped" else torch.zeros_like(known_B)


def anchored_responses(rollout: Rollout, value_B: Tensor) -> Tensor:
    """Bool (B,): responses of groups that are labelled and whose anchor tells them apart.

    Args:
        rollout: for its groups, and those that are labelled.
        value_B: from :func:`anchor_values`.
    """
    known_N = (~value_B.isnan()).view(-1, rollout.group_size).any(1)
    if rollout.labelled_N is not None:
        known_N = known_N & rollout.labelled_N.to(known_N.device)
    return known_N.repeat_interleave(rollout.group_size)


def never_dropped(rollout: Rollout, anchoring: Anchoring | None = None) -> Tensor:
    """Bool (B,): responses that ``model.advantages.min_consensus`` keeps whatever their rewards say of each other.

    Those that a gate is not wholly open for, and those of groups in whose scalar reward an anchor has a share.

    Args:
        rollout: for its gates, and the labels of its anchors.
        anchoring: of a training batch; None: an evaluation.
    """
    kept_B = gate_product(rollout) < 1
    if anchoring is not None and anchoring.hybrid:
        kept_B = kept_B | anchored_responses(rollout, anchor_values(rollout))
    return kept_B


def gates(rollout: Rollout) -> list[Tensor]:
    """How far each gate is open for each response, in [0, 1]; one that does not apply is open.

    Raises:
        UserError: a gate gave something else.
    """
    scores = [scores for scores in rollout.rewards.values() if scores.spec.role == "gate"]
    for gate in scores:
        outside = gate.mask_B & ((gate.values_B < 0) | (gate.values_B > 1))
        if bool(outside.any()):
            raise UserError(
                f"The gate {gate.spec.name!r} gave {float(gate.values_B[outside][0]):.4g}: a gate is a share in [0, 1]. "
                "Give the reward the role train, or rescale it."
            )
    return [torch.where(gate.mask_B, gate.values_B, torch.ones_like(gate.values_B)) for gate in scores]


def gate_product(rollout: Rollout) -> Tensor:
    """How far all gates together are open for each response, in [0, 1]: open_B."""
    open_B = torch.ones(len(rollout))
    for gate_B in gates(rollout):
        open_B = open_B * gate_B
    return open_B


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
