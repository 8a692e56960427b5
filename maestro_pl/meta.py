"""What the Conductor learns from: the buffer of its decisions and the meta-signals computed on it.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from maestro_pl.conductor import Conductor
from maestro_pl.errors import UserError


@dataclass
class Decisions:
    """Decisions of the Conductor on B responses and what became of them, detached from any graph.

    Attributes:
        h_BD: float32 hidden states that it read.
        mask_BK: bool, the rewards that it could choose among.
        action_B: int64 actions that it drew.
        advantages_B: float32 group-relative advantages of the responses, which the policy was trained on too.
        version: how often the Conductor had been updated when it drew the actions.
    """

    h_BD: Tensor
    mask_BK: Tensor
    action_B: Tensor
    advantages_B: Tensor
    version: int


class MetaBuffer:
    """The triplets (h, a, A) since the Conductor's last update (the paper's buffer)."""

    def __init__(self) -> None:
        self.decisions: list[Decisions] = []

    def __len__(self) -> int:
        """How many batches are in it."""
        return len(self.decisions)

    def add(self, decisions: Decisions) -> None:
        """Keep one batch of decisions."""
        self.decisions.append(decisions)

    def clear(self) -> None:
        """Forget everything; called after an update."""
        self.decisions.clear()

    def joined(self) -> Decisions:
        """All batches as one, with the oldest version."""
        if not self.decisions:
            raise UserError("The meta-buffer is empty: there is nothing to update the Conductor on.")
        names = [f.name for f in fields(Decisions) if f.name != "version"]
        device = self.decisions[-1].h_BD.device  # a buffer from a checkpoint was loaded before the model was moved
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(d, name).to(device) for d in self.decisions]) for name in names
        }
        return Decisions(**tensors, version=min(d.version for d in self.decisions))

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain tensors and integers, for a checkpoint."""
        return [{f.name: getattr(d, f.name) for f in fields(Decisions)} for d in self.decisions]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.decisions = [Decisions(**entry) for entry in state]


class MetaSignal:
    """Base: from the Conductor and its buffer to a loss whose gradient updates the Conductor."""

    def __call__(self, weigher: Conductor, buffer: MetaBuffer) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (a scalar with gradient in the Conductor only) and detached metrics."""
        raise NotImplementedError


class AdvantageSignal(MetaSignal):
    """The paper's meta-signal: REINFORCE on the policy's own group-relative advantages (Eq. 9).

    Args:
        entropy_coef: lambda_ent, the weight of the entropy bonus; the paper's 1e-3.
    """

    def __init__(self, entropy_coef: float = 1e-3) -> None:
        self.entropy_coef = entropy_coef

    def __call__(self, weigher: Conductor, buffer: MetaBuffer) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`MetaSignal`."""
        decisions = buffer.joined()
        probabilities_BK = weigher.probabilities(decisions.h_BD, decisions.mask_BK)
        log_prob_B = weigher.log_prob(probabilities_BK, decisions.action_B)
        return meta_loss(log_prob_B, decisions.advantages_B, probabilities_BK, self.entropy_coef)


def meta_loss(
    log_prob_B: Tensor, advantages_B: Tensor, probabilities_BK: Tensor, entropy_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_meta = -mean(A log pi(a|h)) - lambda_ent mean H(pi(.|h)) (Eq. 9)."""
    entropy = distribution_entropy(probabilities_BK).mean()
    reinforce = -(advantages_B * log_prob_B).mean()
    loss = reinforce - entropy_coef * entropy
    return loss, {"loss": loss.detach(), "reinforce": reinforce.detach(), "entropy": entropy.detach()}


def distribution_entropy(probabilities_BK: Tensor) -> Tensor:
    """Entropy in nats of each row: entropy_B; zero probabilities (rewards that do not apply) add nothing."""
    # not torch.special.entr: its gradient at 0 is infinite, and times the mask's 0 that is NaN
    safe_BK = torch.where(probabilities_BK > 0, probabilities_BK, torch.ones_like(probabilities_BK))
    return -(probabilities_BK * safe_BK.log()).sum(-1)
