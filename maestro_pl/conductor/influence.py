"""A weigher that asks the policy: how much a step for one reward helps them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.conductor.adaptive import SharedWeights
from maestro_pl.conductor.credits import zscores
from maestro_pl.conductor.lookahead import Cost, difference_step, directional_credits, held_out_gradient
from maestro_pl.conductor.weighers import Seen
from maestro_pl.errors import UserError
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.run.ranks import gathered


class GradientWeights(SharedWeights):
    """Raises the rewards whose gradients go along with those of all: dynamic reward weighting (arXiv 2509.11452).

    w <- softmax(log w + rate I) with the influences I = G G^T 1, G the rewards' policy gradients: I_k = <g_k, sum_j g_j>,
    g_k the gradient of the mean over the responses of z_ik log pi(y_i|x_i). The paper's rate is the policy's learning rate over
    a regularisation factor (1e-6 / 1e-5). Where the paper makes K backward passes, this makes one, for sum_j g_j, and
    two forward passes along it, whose central difference gives <sum_j g_j, gradient of log pi(y_i|x_i)> for every
    response and so all I_k. The weights are those of the next batch; the paper's are those of the same.

    Args:
        rate: step size of log w.
        every: policy steps between two updates; the influences of the batches between are not looked at.
        step: length of the difference, as in :class:`maestro_pl.LookaheadSignal`.
        normalize: divide the influences by |sum_j g_j|^2, so that they add up to 1 and the rate does not depend on the
            size of the gradients; the paper does not.
        weights: see :class:`SharedWeights`.

    Raises:
        UserError: a value outside its range, or a policy without adapters.
    """

    influence_K: Tensor

    def __init__(
        self,
        rate: float = 0.1,
        every: int = 1,
        step: float | None = None,
        normalize: bool = True,
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(weights)
        if not rate >= 0 or every < 1 or (step is not None and not step > 0):
            raise UserError(
                f"GradientWeights rate={rate}, every={every}, step={step}: expected at least 0, at least 1, and nats above "
                "0 or null."
            )
        self.rate, self.every, self.step, self.normalize = rate, every, step, normalize

    @property
    def settings(self) -> dict[str, Any]:
        """Step sizes, and the weights at the start."""
        own = {"rate": self.rate, "every": self.every, "step": self.step, "normalize": self.normalize}
        return {**super().settings, **own}

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """See :class:`SharedWeights`."""
        super().build(hidden_size, reward_names)
        self.register_buffer("influence_K", torch.zeros(len(self.reward_names)))

    def check(self, policy: LoRAPolicy) -> None:
        """Adapters must be there to be moved."""
        if policy.lora is None:
            raise UserError(
                "GradientWeights moves adapters along a gradient, and model.policy.lora is null: train adapters, or take "
                "another weigher."
            )

    def observe(self, seen: Seen) -> Metrics:
        """Move the weights for the next batch. Collective."""
        if seen.scored.step % self.every:
            return {}
        influence_K, cost = self.influences(seen)
        numbers: Metrics = {f"gradient_{name}": float(value) for name, value in vars(cost).items()}
        if influence_K is None:
            return numbers
        self.influence_K.copy_(influence_K)
        self.multiply(self.rate * influence_K)
        return numbers | {f"influence/{name}": v for name, v in zip(self.reward_names, influence_K, strict=True)}

    def influences(self, seen: Seen) -> tuple[Tensor | None, Cost]:
        """I_K on the CPU, None where the gradient is 0 or not finite; and what it cost. Collective."""
        rollout, policy, size, cost = seen.weighed.rollout, seen.policy, seen.scored.group_size, Cost()
        z_BK = zscores(seen.weighed.rewards_BK, seen.weighed.mask_BK, size).float().cpu()
        groups, rows = list(range(len(rollout.prompts))), list(range(len(rollout)))
        every_T = torch.ones(int(rollout.lengths_B.sum()))
        total_B = z_BK.sum(1)
        direction = held_out_gradient(
            policy, rollout, groups, total_B, seen.update.passes(rollout, groups), every_T, cost
        )
        if direction is None:
            return None, cost
        step = difference_step(policy) if self.step is None else self.step
        along_B = directional_credits(policy, direction, rollout, rows, every_T, step, seen.update.pass_limit, cost)
        parts = gathered((z_BK.T @ along_B, len(rollout)))
        influence_K = torch.stack([part for part, _ in parts]).sum(0) / sum(count for _, count in parts)
        if self.normalize:
            influence_K = influence_K / float(sum(part.double().square().sum() for part in direction))
        return (influence_K if bool(influence_K.isfinite().all()) else None), cost
