"""Weighers that look at what every validation found: the hypervolume's gain, and bandits over the weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.algorithm.hypervolume import Point, hypervolume_gain, pareto_front
from maestro_pl.conductor.adaptive import SharedWeights
from maestro_pl.conductor.weighers import Seen
from maestro_pl.errors import UserError

MOST_REWARDS = 8  # the hypervolume is exact, and exponential in them
KEPT = 32  # points of the front, and payoffs, that are remembered
QUANTILES = (0.2, 0.8)  # of the payoffs so far, which become 0 and 1
MIDDLE = 0.5  # of a scaled payoff


class HypervolumeWeights(SharedWeights):
    """Learns faster while validations find new trade-offs: dynamic reward weighting by hypervolume (arXiv 2509.11452).

    With dV what the newest validation's mean rewards add to the hypervolume of those before, the advantages of every
    batch until the next one are multiplied by 0.5 + 1.5 tanh(dV); the rewards' own weights stay. The first whole
    validation is the reference point (``trainer.num_sanity_val_steps: -1`` has it before the first step), and what is
    worse than it counts as equal. Before there is a second one the factor is 1. A validation in which a reward has no mean
    is left out, with a warning. The paper multiplies the reward, which would cancel out in the group's standard
    deviation.

    Args:
        weights: see :class:`SharedWeights`.
        scales: the rewards' means are divided by them, one number or by name: dV is a volume in their units.

    Raises:
        UserError: a scale that is not above 0, or more than 8 rewards.
    """

    reads_validation = True
    points_MK: Tensor
    factor: Tensor

    def __init__(self, weights: dict[str, float] | None = None, scales: float | dict[str, float] = 1.0) -> None:
        super().__init__(weights)
        given = scales.values() if isinstance(scales, dict) else (scales,)
        if not all(0 < scale < math.inf for scale in given):
            raise UserError(f"HypervolumeWeights scales={scales}: expected finite numbers above 0.")
        self.scales = scales

    @property
    def settings(self) -> dict[str, Any]:
        """Weights and scales."""
        return {**super().settings, "scales": self.scales}

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """See :class:`SharedWeights`."""
        super().build(hidden_size, reward_names)
        if len(self.reward_names) > MOST_REWARDS:
            raise UserError(
                f"HypervolumeWeights has {len(self.reward_names)} rewards, and their hypervolume is exponential in them: give "
                f"at most {MOST_REWARDS}, or another weigher."
            )
        self.by_name("scales", self.scales)
        # the reference first, then the front; NaN where there is none yet
        self.register_buffer(
            "points_MK", torch.full((1 + KEPT, len(self.reward_names)), torch.nan, dtype=torch.float64)
        )
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))

    @property
    def gain(self) -> float:  # type: ignore[override]
        """0.5 + 1.5 tanh(dV) of the newest validation; 1 before there is one to compare."""
        return float(self.factor)

    def validated(self, mean_K: Tensor) -> None:
        """Note the point, and what it adds."""
        if absent := [name for name, mean in zip(self.reward_names, mean_K.tolist(), strict=True) if math.isnan(mean)]:
            rank_zero_warn(
                f"HypervolumeWeights leaves a validation out: {', '.join(absent)} applied to none of its responses, and "
                "a point has a mean for every reward."
            )
            return
        scaled_K = mean_K.double().cpu() / self.by_name("scales", self.scales).double()
        point: Point = tuple(scaled_K.tolist())
        known = [tuple(row) for row in self.points_MK.tolist() if not math.isnan(row[0])]
        if not known:
            self.points_MK[0] = torch.tensor(point, dtype=torch.float64)
            return
        reference, front = known[0], known[1:]
        self.factor.fill_(0.5 + 1.5 * math.tanh(hypervolume_gain(point, front, reference)))
        front = pareto_front([*front, tuple(map(max, point, reference))])[-KEPT:]
        self.points_MK[1 : 1 + len(front)] = torch.tensor(front, dtype=torch.float64)
        self.points_MK[1 + len(front) :] = torch.nan

    def observe(self, seen: Seen) -> Metrics:
        """The factor, to be logged."""
        return {"gain": self.gain}


class DynaOptWeights(SharedWeights):
    """A bandit that raises one reward's weight at a time, by what validations say of it: DynaOpt (arXiv 2403.13578).

    The arms: raise the weight of reward k by ``step`` and rescale, for each of the K rewards, or leave the weights. After
    every whole validation the arm that was drawn before it is paid the mean change of the rewards' means, the next one
    is drawn and its change of the weights made. Payoffs are scaled to [0, 1] by the 20 % and 80 % quantiles of those so
    far. A reward without a mean in a validation has no part in the change, and no change at all pays nobody.

    Exp3 (DynaOpt) draws arm a with probability p_a = (1 - gamma) u_a / sum u + gamma / (K + 1), and u_a <- u_a
    exp(gamma payoff / (p_a (K + 1))). ``contextual`` (C-DynaOpt) predicts how far the payoff of each arm is above the
    middle, 1/2, from the weights and the rewards' last changes by ridge regression and takes the best one, with
    probability gamma any. An arm that was never paid is predicted to have the middle: so one that did worse is left for
    it. The paper leaves this to Vowpal Wabbit.

    Args:
        step: what an arm adds to a weight before they are rescaled to add up to 1.
        gamma: share of the draws that explore.
        contextual: C-DynaOpt.
        ridge: penalty of its regression.
        seed: of the draws, which are the same on every rank; None: the run's ``seed_everything``.
        weights: see :class:`SharedWeights`.

    Raises:
        UserError: a value outside its range.
    """

    reads_validation = True
    arm: Tensor
    round: Tensor
    drawn_by: Tensor
    before_K: Tensor
    log_u_A: Tensor
    probability: Tensor
    payoffs_M: Tensor
    gram_AFF: Tensor
    moment_AF: Tensor
    context_F: Tensor

    def __init__(
        self,
        step: float = 0.1,
        gamma: float = 0.1,
        contextual: bool = False,
        ridge: float = 1.0,
        seed: int | None = None,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(weights)
        if not step > 0 or not 0 < gamma <= 1 or not ridge > 0:
            raise UserError(
                f"DynaOptWeights step={step}, gamma={gamma}, ridge={ridge}: expected above 0, a share in (0, 1], and above 0."
            )
        self.step, self.gamma, self.contextual, self.ridge, self.seed = step, gamma, contextual, ridge, seed

    @property
    def settings(self) -> dict[str, Any]:
        """The bandit's numbers, and the weights at the start."""
        names = ("step", "gamma", "contextual", "ridge", "seed")
        return {**super().settings, **{name: getattr(self, name) for name in names}}

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """See :class:`SharedWeights`."""
        super().build(hidden_size, reward_names)
        rewards = len(self.reward_names)
        arms, features = rewards + 1, 2 * rewards + 1
        for name, value in {
            "arm": torch.tensor(-1),  # none drawn yet
            "round": torch.tensor(0),
            "drawn_by": torch.tensor(int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed),
            "before_K": torch.full((rewards,), torch.nan, dtype=torch.float64),
            "log_u_A": torch.zeros(arms, dtype=torch.float64),
            "probability": torch.ones((), dtype=torch.float64),
            "payoffs_M": torch.full((KEPT,), torch.nan, dtype=torch.float64),
            "gram_AFF": torch.zeros(arms, features, features, dtype=torch.float64),
            "moment_AF": torch.zeros(arms, features, dtype=torch.float64),
            "context_F": torch.zeros(features, dtype=torch.float64),
        }.items():
            self.register_buffer(name, value)

    def validated(self, mean_K: Tensor) -> None:
        """Pay the last arm, and draw and make the next one."""
        mean_K = mean_K.double().to(self.before_K.device)
        change_K = mean_K - self.before_K  # NaN before there are two means
        known_K = ~change_K.isnan()
        if int(self.arm) >= 0 and bool(known_K.any()):
            self._pay(float(change_K[known_K].mean()))
        self.before_K.copy_(torch.where(mean_K.isnan(), self.before_K, mean_K))
        self.context_F.copy_(torch.cat([self.weights_K.double(), change_K.nan_to_num(0.0), mean_K.new_ones(1)]))
        probability_A = self.probabilities()
        draws = torch.Generator().manual_seed((int(self.drawn_by) * 1_000_003 + int(self.round)) % 2**63)
        arm = int(torch.multinomial(probability_A.cpu(), 1, generator=draws))
        self.arm.fill_(arm)
        self.probability.copy_(probability_A[arm])
        self.round.add_(1)
        if arm < len(self.reward_names):
            raised_K = self.weights_K.clone()
            raised_K[arm] += self.step
            self.weights_K.copy_(raised_K / raised_K.sum())

    def probabilities(self) -> Tensor:
        """Of each arm, the last one that leaves the weights: p_A."""
        arms = len(self.log_u_A)
        if not self.contextual:
            return (1.0 - self.gamma) * self.log_u_A.softmax(0) + self.gamma / arms
        penalty_FF = self.ridge * torch.eye(len(self.context_F), dtype=torch.float64, device=self.context_F.device)
        predicted_A: Tensor = torch.linalg.solve(self.gram_AFF + penalty_FF, self.moment_AF) @ self.context_F
        best_A = (predicted_A >= predicted_A.max()).double()
        return (1.0 - self.gamma) * best_A / best_A.sum() + self.gamma / arms

    def observe(self, seen: Seen) -> Metrics:
        """The arm in use, to be logged; K leaves the weights."""
        return {"arm": float(self.arm)}

    def _pay(self, change: float) -> None:
        arm = int(self.arm)
        known = self.payoffs_M[~self.payoffs_M.isnan()]
        known = torch.cat([known, known.new_tensor([change])])[-KEPT:]
        self.payoffs_M[: len(known)] = known
        low, high = (float(known.quantile(share)) for share in QUANTILES)
        payoff = MIDDLE if high <= low else min(max((change - low) / (high - low), 0.0), 1.0)
        self.log_u_A[arm] += self.gamma * payoff / (float(self.probability) * len(self.log_u_A))
        self.gram_AFF[arm] += torch.outer(self.context_F, self.context_F)
        self.moment_AF[arm] += (payoff - MIDDLE) * self.context_F
