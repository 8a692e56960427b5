"""From raw rewards to advantages: normalise inside the group, scalarise, gate, centre. Pure functions.

Equation numbers are those of docs/algorithm.md, which walks through section 3 of MAESTRO (arXiv 2601.07208).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from maestro_pl.algorithm.settings import Advantages, Scaling
from maestro_pl.rollout import Normalization

Everywhere: TypeAlias = Callable[[Tensor], Tensor]  # a vector of this rank -> those of all ranks, end to end

STD_EPS = 1e-4  # added to the standard deviation of an advantage, as TRL does
SILENT = 1e-8  # a pull below this has no direction
ROUNDING = 4 * torch.finfo(torch.float32).eps  # a spread below this share of the largest value is rounding, not signal


class Weighed(NamedTuple):
    """What scalar rewards are made of.

    Attributes:
        rewards_BK: float rewards.
        weights_BK: their weights.
        mask_BK: bool, which of them apply.
        kept_B: bool, responses that are kept whatever their rewards say of each other, for a gate or an anchor speaks of
            them; None: none.
    """

    rewards_BK: Tensor
    weights_BK: Tensor
    mask_BK: Tensor
    kept_B: Tensor | None = None


def normalize_rewards(values_B: Tensor, mask_B: Tensor, group_size: int, how: Normalization) -> Tensor:
    """Normalise one reward inside each group, over the responses that it applies to (Eq. 4).

    Args:
        values_B: float raw rewards, whole groups.
        mask_B: bool, False where the reward does not apply.
        group_size: G.
        how: ``none`` keeps the values; ``zscore`` is (r - mean) / std with the sample standard deviation; ``rank`` is
            the average rank scaled to [0, 1] (the paper's choice for perplexity and entropy); ``minmax`` maps the
            group's range to [0, 1].

    Returns:
        float values_B, 0 where the mask is False; finite for every finite reward, however large or small. A single-valued
        group carries no signal and gets the middle of the scale: 0 for ``zscore``, 1/2 for ``rank`` and ``minmax``.
    """
    if how == "none":
        return torch.where(mask_B, values_B, torch.zeros_like(values_B))
    values, mask = values_B.view(-1, group_size), mask_B.view(-1, group_size)
    if how == "zscore":
        normal = _center_and_scale(values, mask, eps=0.0)
    elif how == "rank":
        normal = _average_rank(values, mask)
    else:
        values = values * _unit(values, mask)
        low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
        high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
        normal = torch.where(_single_valued(values, mask), 0.5, (values - low) / (high - low))
    return torch.where(mask, normal, torch.zeros_like(normal)).view(-1)


def scalarise(rewards_BK: Tensor, weights_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """The scalar reward R = sum_k w_k r_k over the rewards that apply (Eq. 5).

    Returns:
        float scalar_B, NaN where no reward applies.
    """
    scalar_B = (weights_BK * rewards_BK.masked_fill(~mask_BK, 0.0)).sum(-1)
    return torch.where(mask_BK.any(-1), scalar_B, torch.full_like(scalar_B, torch.nan))


def apply_gate(scalar_B: Tensor, gate_B: Tensor, group_size: int) -> Tensor:
    """Let the other rewards count only as far as the gate is open: g R + (1 - g) min(0, lowest R of the group).

    For rewards of at least 0 this is the product g R of NOVER. Where a scalar reward is negative (z-scores, penalties)
    a product would lift a closed gate above the open ones, so a closed gate gets the group's lowest reward instead. It
    gets it too where no other reward applies: a response that breaks the format must not escape by being unscored.

    Args:
        scalar_B: float scalar rewards, NaN where none applies.
        gate_B: float in [0, 1].
        group_size: G.
    """
    lowest = scalar_B.view(-1, group_size).nan_to_num(torch.inf).amin(1, keepdim=True).clamp(max=0.0)
    floor_B = lowest.expand(-1, group_size).reshape(-1)
    return torch.where(gate_B == 0, floor_B, gate_B * scalar_B + (1.0 - gate_B) * floor_B)


def own(values_X: Tensor) -> Tensor:
    """The ``everywhere`` of a single rank: the values as they are."""
    return values_X


def group_advantages(
    scalar_B: Tensor, group_size: int, scale: Scaling = "group", eps: float = STD_EPS, everywhere: Everywhere = own
) -> Tensor:
    """Group-relative advantage A = (R - mean) / (std + eps) (Eq. 6; GRPO, arXiv 2402.03300).

    Args:
        scalar_B: float scalar rewards, whole groups; NaN where no reward applies.
        group_size: G.
        scale: what divides: the sample standard deviation of the ``group``, that of the whole ``batch``, or nothing.
        eps: added to the standard deviation.
        everywhere: gathers the batch of all ranks.

    Returns:
        float advantages_B. Exactly 0 in single-valued groups, and for responses without a reward.
    """
    scalar, mask = scalar_B.view(-1, group_size), ~scalar_B.isnan().view(-1, group_size)
    if scale == "group":
        return _center_and_scale(scalar, mask, eps).view(-1)
    centred = _centred(scalar, mask)
    if scale == "batch":
        known = everywhere(scalar_B[~scalar_B.isnan()])
        if known.numel() < 2:
            return (centred / eps).view(-1)
        unit = _unit(known, torch.ones_like(known, dtype=torch.bool))
        centred = centred * unit / ((known * unit).std() + eps * unit)
    return centred.view(-1)


def standardize_rewards(rewards_BK: Tensor, mask_BK: Tensor, group_size: int, eps: float = STD_EPS) -> Tensor:
    """Every reward centred and divided by (std + eps) inside its group, before the sum (GDPO, arXiv 2601.05242).

    Returns:
        float rewards_BK; 0 where the mask is False and in single-valued groups.
    """
    columns = [
        _center_and_scale(rewards.view(-1, group_size), mask.view(-1, group_size), eps).view(-1)
        for rewards, mask in zip(rewards_BK.unbind(1), mask_BK.unbind(1), strict=True)
    ]
    return torch.stack(columns, dim=1)


def batch_advantages(
    scalar_B: Tensor,
    group_size: int,
    factor_B: Tensor | None = None,
    eps: float = STD_EPS,
    everywhere: Everywhere = own,
) -> Tensor:
    """A = (R - mean of the group) / (std of the batch + eps): the second normalisation of GDPO (arXiv 2601.05242).

    GDPO takes off the batch's mean. Where weights are the same for all responses every group's mean is 0, and so is the
    batch's; where they are not, it would lift whole groups, and a group whose responses are all alike would be
    trained on. So each group is centred by its own mean.

    Args:
        scalar_B: float sums of standardised rewards; NaN where no reward applies.
        group_size: G.
        factor_B: float at least 0, what centred sums are multiplied by; 0 drops a response, also from the spread.
        eps: added to the sample standard deviation.
        everywhere: gathers the batch of all ranks.

    Returns:
        float advantages_B, 0 for responses without a reward, dropped ones, and in single-valued groups.
    """
    known_B = ~scalar_B.isnan()
    unit = _unit(everywhere(scalar_B[known_B]), None)
    centred_B = _centred((scalar_B * unit).view(-1, group_size), known_B.view(-1, group_size)).view(-1)
    if factor_B is not None:
        centred_B, known_B = centred_B * factor_B, known_B & (factor_B > 0)
    spread_of = everywhere(centred_B[known_B])
    if spread_of.numel() < 2:
        return torch.zeros_like(scalar_B)
    return torch.where(known_B, centred_B / (spread_of.std() + eps * unit), 0.0)


def weighed_spread(weighed: Weighed, scalar_B: Tensor, group_size: int) -> Tensor:
    """sum_k w_k sd_k of each group, sd the sample standard deviation of a reward, w its mean weight: spread_N.

    Unlike the standard deviation of the sum, it does not shrink where rewards cancel out, so that advantages over it
    are bounded as those of one reward are (DVAO, arXiv 2605.25604). Scalar rewards may vary for more than their
    rewards: weights of each response's own, rewards that apply to some of the group, a gate, a penalty, an anchor's share.
    What they are apart from sum_k w_k r_k counts as one more part, by its own standard deviation; a reward
    that does not apply to a response counts by its mean over those that it applies to.

    Args:
        weighed: rewards, weights and masks.
        scalar_B: float scalar rewards; NaN where no reward applies.
        group_size: G.
    """
    shape = (-1, group_size)
    rest = scalar_B.view(shape)
    spread_N = torch.zeros_like(rest[:, 0])
    for reward_B, weight_B, mask_B in zip(*(part.unbind(1) for part in weighed[:3]), strict=True):
        applies, rewards = mask_B.view(shape), reward_B.view(shape)
        count = applies.sum(1, keepdim=True).clamp(min=1)
        share = weight_B.view(shape).masked_fill(~applies, 0.0).sum(1, keepdim=True) / count
        mean = rewards.masked_fill(~applies, 0.0).sum(1, keepdim=True) / count
        rest = rest - share * torch.where(applies, rewards, mean)
        spread_N = spread_N + share.squeeze(1) * _deviation(rewards, applies)
    return spread_N + _deviation(rest.nan_to_num(0.0), ~scalar_B.isnan().view(shape))


def consensus_factor(weighed: Weighed, group_size: int, settings: Advantages) -> Tensor | None:
    """What advantages are multiplied by where responses on which the rewards disagree are dropped (GD2PO, 2606.16771).

    Reward k pulls response i by p_ik = w_ik z_ik, z the reward standardised in its group. Where some p_ik are above 0
    and some below, and |sum_k p_ik| / sum_k |p_ik| < ``min_consensus``, the response is dropped: 0. Others get 1, or with
    ``consensus_scale`` the share of their group that was kept. With equal weights this is the paper's rule. Those of
    ``kept_B`` are never dropped: what a gate or an anchor says of a response is no disagreement of its rewards.

    Returns:
        float factor_B; None where the settings drop nothing.
    """
    if not settings.min_consensus:
        return None
    pull_BK = weighed.weights_BK * standardize_rewards(weighed.rewards_BK, weighed.mask_BK, group_size)
    both_B = (pull_BK > SILENT).any(1) & (pull_BK < -SILENT).any(1)
    consensus_B = pull_BK.sum(1).abs() / pull_BK.abs().sum(1).clamp(min=SILENT)
    dropped_B = both_B & (consensus_B < settings.min_consensus)
    if weighed.kept_B is not None:
        dropped_B = dropped_B & ~weighed.kept_B
    factor_B = 1.0 - dropped_B.to(pull_BK.dtype)
    if not settings.consensus_scale:
        return factor_B
    kept_N1 = factor_B.view(-1, group_size).mean(1, keepdim=True)
    return factor_B * kept_N1.expand(-1, group_size).reshape(-1)


def dropped_share(weighed: Weighed, group_size: int, settings: Advantages) -> dict[str, Tensor]:
    """``group/dropped``: the share of the responses that are dropped; empty where the settings drop none."""
    factor_B = consensus_factor(weighed, group_size, settings)
    return {} if factor_B is None else {"group/dropped": (factor_B == 0).float().mean()}


def advantages_of(
    scalar_B: Tensor,
    group_size: int,
    settings: Advantages,
    weighed: Weighed | None = None,
    everywhere: Everywhere = own,
) -> Tensor:
    """Advantages from scalar rewards, as the settings ask (Eq. 6).

    Args:
        scalar_B: float scalar rewards, whole groups; NaN where none applies.
        group_size: G.
        settings: ``aggregation``, ``scale`` and what is dropped.
        weighed: what the scalar rewards were made of; ``dvao`` and ``min_consensus`` read it.
        everywhere: gathers the batch of all ranks, where a spread of the batch is asked for.

    Returns:
        float advantages_B; 0 for responses without a reward and dropped ones.
    """
    factor_B = None if weighed is None else consensus_factor(weighed, group_size, settings)
    if settings.aggregation == "normalize_then_sum":
        return batch_advantages(scalar_B, group_size, factor_B, everywhere=everywhere)
    if settings.aggregation == "sum_then_normalize":
        advantages_B = group_advantages(scalar_B, group_size, settings.scale, everywhere=everywhere)
    else:
        advantages_B = group_advantages(scalar_B, group_size, "none")
    if settings.aggregation == "dvao":
        assert weighed is not None
        spread_N = weighed_spread(weighed, scalar_B, group_size) + STD_EPS
        advantages_B = (advantages_B.view(-1, group_size) / spread_N.unsqueeze(1)).view(-1)
    return advantages_B if factor_B is None else advantages_B * factor_B


def dead_groups(advantages_B: Tensor, group_size: int) -> Tensor:
    """Bool (N,): groups in which every advantage is 0, so that they teach the policy nothing."""
    return (advantages_B.view(-1, group_size) == 0).all(1)


def _single_valued(values: Tensor, mask: Tensor) -> Tensor:
    """Bool (N, 1): groups whose spread is nothing but rounding (or that have fewer than two values)."""
    low = values.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    size = values.abs().masked_fill(~mask, 0.0).amax(1, keepdim=True)
    return ~(high - low > ROUNDING * size)


def _deviation(values: Tensor, mask: Tensor) -> Tensor:
    """Sample standard deviation of each row over the values that apply: (N,)."""
    unit = _unit(values, mask)
    centred, freedom = _centred(values * unit, mask), (mask.sum(1) - 1).clamp(min=1)
    return (centred.square().sum(1) / freedom).sqrt() / unit.squeeze(1)


def _unit(values: Tensor, mask: Tensor | None) -> Tensor:
    """What brings the largest value of each row (of the whole, of a vector) to a size of about 1, so that sums and
    squares of very large or small rewards stay within float32.

    A power of two: for all other rewards multiplying by it changes no digit of what is computed.
    """
    size = values.detach().abs() if mask is None else values.detach().abs().masked_fill(~mask, 0.0)
    size = size.amax(-1, keepdim=True) if size.numel() else torch.ones_like(size.sum(-1, keepdim=True))
    digits = -int(math.log2(torch.finfo(values.dtype).tiny))
    exponent = torch.frexp(size).exponent.clamp(-digits, digits)
    return torch.exp2(-exponent.double()).to(values.dtype)


def _centred(values: Tensor, mask: Tensor) -> Tensor:
    unit = _unit(values, mask)
    values, count = values * unit, mask.sum(1, keepdim=True).clamp(min=1)
    mean = values.masked_fill(~mask, 0.0).sum(1, keepdim=True) / count
    keep = mask & ~_single_valued(values, mask)
    return torch.where(keep, values - mean, torch.zeros_like(values)) / unit


def _center_and_scale(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    unit = _unit(values, mask)
    centred = _centred(values * unit, mask)
    freedom = (mask.sum(1, keepdim=True) - 1).clamp(min=1)
    variance = centred.square().sum(1, keepdim=True) / freedom
    std = torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()  # the root's slope at 0 is infinite
    return torch.where(variance > 0, centred / (std + eps * unit), centred)


def _average_rank(values: Tensor, mask: Tensor) -> Tensor:
    """Average rank of each value among the applicable ones of its group, 0 for the lowest and 1 for the highest."""
    others = mask.unsqueeze(1)  # (N, 1, G): the values compared with
    below = ((values.unsqueeze(1) < values.unsqueeze(2)) & others).sum(2)
    equal = ((values.unsqueeze(1) == values.unsqueeze(2)) & others).sum(2)  # counts the value itself
    count = mask.sum(1, keepdim=True)
    rank = below + 0.5 * (equal - 1)
    return torch.where(_single_valued(values, mask), 0.5, rank / (count - 1).clamp(min=1))
