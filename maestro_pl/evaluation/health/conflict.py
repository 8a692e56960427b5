"""Do the rewards contradict each other, whatever the weights? Correlations inside groups, a small game, Pareto sets."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maestro_pl.evaluation.health.record import WeighedBatch

LIVE_SHARE = 0.1  # a reward that differs in fewer groups says nothing of how rewards move together


class Conflict(NamedTuple):
    """What the best static weights can do for the reward that gains the least from them.

    Attributes:
        gain: K times its correlation-scaled gain: 1 for rewards that are independent of each other, 0 where every
            vector of weights leaves or makes some reward worse.
        error: standard error of ``gain``, from the spread between groups.
        weights: the best static weights, by name.
        correlations: pairwise correlations inside groups, ``(name, name, correlation)``, the most negative first.
    """

    gain: float
    error: float
    weights: dict[str, float]
    correlations: list[tuple[str, str, float]]


def conflict(batch: WeighedBatch) -> Conflict | None:
    """The best static weights for the worst-served reward (max over w on the simplex of min over k of K (C w)_k).

    C are the correlations of the z-scored rewards inside groups. Under a scalar reward w.r, the mean of reward k moves
    with its covariance with w.r, which is (C w)_k. A reward that is constant in nine of ten groups takes no part.

    Returns:
        None with fewer than two rewards that take part.
    """
    if not batch.names:
        return None
    z_BK = batch.z_BK
    groups = (-1, batch.group_size, len(batch.names))
    live_K = (z_BK.view(groups) != 0).any(1).double().mean(0) >= LIVE_SHARE
    names = [name for name, live in zip(batch.names, live_K.tolist(), strict=True) if live]
    if len(names) < 2:
        return None
    unit_BK = z_BK[:, live_K] / z_BK[:, live_K].square().sum(0).sqrt()
    correlations_KK = unit_BK.T @ unit_BK
    value, weights_K = static_gain(correlations_KK)
    parts_NK = (unit_BK * (unit_BK @ weights_K).unsqueeze(1)).view(-1, batch.group_size, len(names)).sum(1)
    served_K = parts_NK.sum(0)
    worst = parts_NK[:, served_K <= served_K.min() + 1e-6]
    error = float(worst.std(0).max()) * math.sqrt(len(parts_NK)) if len(parts_NK) > 1 else math.inf
    pairs = [
        (names[i], names[j], float(correlations_KK[i, j])) for i in range(len(names)) for j in range(i + 1, len(names))
    ]
    return Conflict(
        max(0.0, len(names) * value),  # correlations are positive semi-definite: below 0 is rounding
        len(names) * error,
        dict(zip(names, (weights_K.clamp(min=0.0) + 0.0).tolist(), strict=True)),
        sorted(pairs, key=lambda pair: pair[2]),
    )


def static_gain(covariance_KK: Tensor) -> tuple[float, Tensor]:
    """The largest min over k of (C w)_k that a w on the simplex attains, and this w: a linear programme, solved exactly."""
    from scipy.optimize import linprog

    count = len(covariance_KK)
    solution = linprog(
        c=np.append(np.zeros(count), -1.0),  # maximise t ...
        A_ub=np.hstack([-covariance_KK.double().numpy(), np.ones((count, 1))]),  # ... with t <= (C w)_k for all k
        b_ub=np.zeros(count),
        A_eq=np.append(np.ones(count), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
    )
    return float(solution.x[-1]), torch.from_numpy(solution.x[:-1]).to(covariance_KK.dtype)


def pareto_front(rewards_GK: Tensor) -> Tensor:
    """Bool (G,): responses that no other of the group matches in every reward and beats in one (more is better)."""
    at_least = (rewards_GK.unsqueeze(1) >= rewards_GK.unsqueeze(0)).all(2)  # [j, i]: j is nowhere below i
    better = (rewards_GK.unsqueeze(1) > rewards_GK.unsqueeze(0)).any(2)
    return ~(at_least & better).any(0)


class ParetoSet(NamedTuple):
    """The responses of recent groups that no other response of their group dominates.

    Attributes:
        size: how many; ``total``: of how many responses.
        examples: of the last group, each the response's place in it and its raw rewards.
    """

    size: int
    total: int
    examples: list[tuple[int, dict[str, float]]]


def pareto_set(batch: WeighedBatch, names: list[str], examples: int = 3) -> ParetoSet:
    """The Pareto set of every group in these rewards, over the responses that all of them apply to."""
    columns = [batch.names.index(name) for name in names]
    size, total, last = 0, 0, []
    for start in range(0, len(batch.values_BK), batch.group_size):
        rows = slice(start, start + batch.group_size)
        scored = batch.mask_BK[rows][:, columns].all(1).nonzero()[:, 0]
        values = batch.values_BK[rows][:, columns][scored]
        front = pareto_front(values)
        size, total = size + int(front.sum()), total + len(scored)
        if len(scored):
            last = [
                (int(i), dict(zip(names, row, strict=True)))
                for i, row in zip(scored[front].tolist(), values[front].tolist(), strict=True)
            ]
    return ParetoSet(size, total, last[:examples])
