"""The ablation "joint": one loss for policy and Conductor, gradients through the weights and through h.

The paper trains them apart ("async"): the policy on fixed weights, the Conductor on fixed hidden states and advantages.
Here the advantages of Eq. 7 are a function of the Conductor's probabilities, and the hidden states of Eq. 9 one of the
policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_pl.algorithm.advantages import group_advantages, scalarise
from maestro_pl.algorithm.settings import Scaling
from maestro_pl.algorithm.simplex import Action, action_weights


@dataclass(frozen=True)
class JointDecision:
    """What was decided for B responses, kept so that it can be computed again with gradient.

    Attributes:
        action_B: int64, the drawn actions.
        rewards_BK: float, normalised rewards.
        mask_BK: bool, which of them apply.
        open_B: float in [0, 1], how far the gates are open.
        scalar_B: float, the scalar rewards as used, gates and penalties included; NaN where no reward applies.
    """

    action_B: Tensor
    rewards_BK: Tensor
    mask_BK: Tensor
    open_B: Tensor
    scalar_B: Tensor

    def rows(self, rows: list[int]) -> JointDecision:
        """The same for some responses."""
        parts = (self.action_B, self.rewards_BK, self.mask_BK, self.open_B, self.scalar_B)
        return JointDecision(*(part[rows] for part in parts))


def joint_advantages(
    probabilities_BK: Tensor,
    decision: JointDecision,
    group_size: int,
    action: Action,
    mix_rate: float,
    scale: Scaling = "group",
) -> Tensor:
    """The advantages of Eq. 6, their values unchanged, differentiable in the Conductor's probabilities.

    Under ``one_hot`` the weights e_a do not depend on the probabilities, and the gradient is passed straight through:
    w = e_a + pi - stop(pi). A gate lets through the share that it is open.

    Args:
        probabilities_BK: pi(.|h) with gradient; whole groups.
        decision: what was decided for the same responses.
        group_size: G.
        action: what an action does to the weights (Eq. 3).
        mix_rate: its share under ``mix``.
        scale: ``group`` or ``none``.

    Returns:
        advantages_B with gradient.
    """
    weights_BK = action_weights(probabilities_BK, decision.action_B, action, mix_rate)
    if action == "one_hot":
        weights_BK = weights_BK + probabilities_BK - probabilities_BK.detach()
    soft_B = scalarise(decision.rewards_BK, weights_BK, decision.mask_BK)
    known_B = decision.mask_BK.any(-1)
    slope_B = torch.where(known_B, soft_B - soft_B.detach(), torch.zeros_like(soft_B))
    return group_advantages(decision.scalar_B.detach() + decision.open_B * slope_B, group_size, scale)
