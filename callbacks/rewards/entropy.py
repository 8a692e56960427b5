"""EntropyReward: the policy's entropy along a response, to be lowered or raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice
from maestro_pl.errors import UserError
from maestro_pl.rewards.entropy import EntropyDirection, EntropyReduction, response_entropy
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule


class EntropyReward(Reward):
    """The mean token entropy of a response in nats, negated by default: confident responses score higher.

    Args:
        direction: ``minimize`` rewards low entropy (EM-RL), ``maximize`` high entropy (diversity, the paper's reading
            of story generation).
        reduction: ``mean`` over the response's tokens, or their ``sum`` (EM-RL's own form).
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`; the paper ranks this reward inside the group.
        tasks: see :class:`Reward`.

    Raises:
        UserError: an unknown direction or reduction.
    """

    default_name = "entropy"

    def __init__(
        self,
        *,
        direction: EntropyDirection = "minimize",
        reduction: EntropyReduction = "mean",
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "rank",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_choice("EntropyReward", "direction", direction, EntropyDirection)
        check_choice("EntropyReward", "reduction", reduction, EntropyReduction)
        self.direction, self.reduction = direction, reduction

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> Tensor:
        """Minus or plus the entropy of each response; NaN for a response without tokens."""
        if rollout.entropies_T is None:
            raise UserError(
                f"Reward {self.name!r} needs the entropy of every sampled token, and this rollout has none: use a "
                "RolloutGenerator whose engine reports entropies or scores them afterwards."
            )
        entropy_B = response_entropy(rollout.entropies_T, rollout.lengths_B, self.reduction)[rows]
        return -entropy_B if self.direction == "minimize" else entropy_B
