"""Measurements on the weights themselves: how even they are, what they rest on, whom they favour."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from maestro_pl.evaluation.health.record import WeighedBatch

MIN_SPREAD = 0.005  # weights that differ by less inside a group (root mean square) grade all its responses alike


def relative_entropy(weights_BK: Tensor, mask_BK: Tensor) -> float:
    """Mean of H(w) / log(number of applicable rewards): 1 is equal weights, 0 all on one; NaN without a response."""
    possible_B = mask_BK.sum(1).double().log()
    return float((torch.special.entr(weights_BK.double()).sum(1) / possible_B).mean())


def weight_over_share(batch: WeighedBatch) -> Tensor:
    """How much more than its equal share each reward has, over the responses with a choice that it applies to: (K,)."""
    rows_BK = batch.mask_BK & batch.choice_B.unsqueeze(1)
    excess_BK = batch.weights_BK - 1.0 / batch.mask_BK.sum(1, keepdim=True).clamp(min=1)
    return excess_BK.masked_fill(~rows_BK, 0.0).sum(0) / rows_BK.sum(0)


def saturation(batch: WeighedBatch) -> Tensor:
    """How saturated each raw reward is, in [0, 1]: (K,), NaN without a group of two scores.

    The larger of two shares: groups in which all scores are equal, and scores that equal the highest, or the lowest,
    one seen in the batch.
    """
    groups = (-1, batch.group_size)
    columns = []
    for k, z_B in enumerate(batch.z_BK.unbind(1)):
        mask_B = batch.mask_BK[:, k]
        scored_N = mask_B.view(groups).sum(1) >= 2
        constant = (z_B.view(groups)[scored_N] == 0).all(1).double().mean()
        values = batch.values_BK[:, k][mask_B]
        edges = [(values == edge).double().mean() for edge in (values.min(), values.max())] if len(values) else []
        columns.append(torch.stack([constant, *edges]).max())
    return torch.stack(columns) if columns else torch.zeros(0)


class Measured(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def self_grading(batch: WeighedBatch) -> Measured:
    """Correlation, inside groups, of a response's weights with its own z-scored rewards, pooled over rewards and groups.

    The error is that of the sum over independent groups. 0 where the weights hardly differ inside a group.
    """
    rows_BK = batch.mask_BK & batch.choice_B.unsqueeze(1)
    shape = (-1, batch.group_size, len(batch.names))
    rows, weights = rows_BK.view(shape), batch.weights_BK.view(shape)
    mean = weights.masked_fill(~rows, 0.0).sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)
    centred = (weights - mean).masked_fill(~rows, 0.0)
    z = batch.z_BK.view(shape).masked_fill(~rows, 0.0)
    spread, scale = centred.square().sum(), (centred.square().sum() * z.square().sum()).sqrt()
    if not float(spread) > MIN_SPREAD**2 * int(rows.sum()) or not float(scale) > 0:
        return Measured(0.0, 0.0)
    return _sum_over_groups((centred * z).sum((1, 2)) / scale)


def _sum_over_groups(parts_N: Tensor) -> Measured:
    count = len(parts_N)
    error = float(parts_N.std()) * math.sqrt(count) if count > 1 else math.inf
    return Measured(float(parts_N.sum()), error)
