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
        group_B: int64, equal for responses to one prompt of one batch.
        version: how often the Conductor had been updated when it drew the actions.
    """

    h_BD: Tensor
    mask_BK: Tensor
    action_B: Tensor
    advantages_B: Tensor
    group_B: Tensor
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
        # groups are numbered batch by batch: the second batch's go on after the first's
        firsts = torch.tensor([0, *(int(d.group_B.max()) + 1 for d in self.decisions[:-1])]).cumsum(0)
        sizes = torch.tensor([len(d.group_B) for d in self.decisions])
        tensors["group_B"] = tensors["group_B"] + firsts.repeat_interleave(sizes).to(device)
        return Decisions(**tensors, version=min(d.version for d in self.decisions))

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain tensors and integers, for a checkpoint."""
        return [{f.name: getattr(d, f.name) for f in fields(Decisions)} for d in self.decisions]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take back what :meth:`state_dict` gave."""
        # checkpoints of version 0.1 have no groups: every response is then its own, and makes no pairs
        self.decisions = [Decisions(**{"group_B": torch.arange(len(entry["action_B"])), **entry}) for entry in state]


class MetaSignal:
    """Base: from the Conductor and its buffer to a loss whose gradient updates the Conductor."""

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that shape the signal; compared when a run is resumed."""
        return {}

    def __call__(self, weigher: Conductor, buffer: MetaBuffer) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss (a scalar with gradient in the Conductor only) and detached metrics."""
        raise NotImplementedError


class AdvantageSignal(MetaSignal):
    """The paper's meta-signal: REINFORCE on the policy's own group-relative advantages (Eq. 9).

    Args:
        entropy_coef: lambda_ent, the weight of the entropy bonus; the paper's 1e-3. 0 is its ablation "- entropy".
        pairwise_coef: weight of :func:`pairwise_loss`; 0 leaves it out. The paper's ablation "+ pairwise" gives no
            formula; this one is ours.

    Raises:
        UserError: a negative coefficient.
    """

    def __init__(self, entropy_coef: float = 1e-3, pairwise_coef: float = 0.0) -> None:
        if not entropy_coef >= 0 or not pairwise_coef >= 0:
            raise UserError(
                f"AdvantageSignal entropy_coef={entropy_coef}, pairwise_coef={pairwise_coef}: expected at least 0."
            )
        self.entropy_coef, self.pairwise_coef = entropy_coef, pairwise_coef

    @property
    def settings(self) -> dict[str, Any]:
        """The coefficients."""
        return {"entropy_coef": self.entropy_coef, "pairwise_coef": self.pairwise_coef}

    def __call__(self, weigher: Conductor, buffer: MetaBuffer) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`MetaSignal`."""
        decisions = buffer.joined()
        probabilities_BK = weigher.probabilities(decisions.h_BD, decisions.mask_BK)
        log_prob_B = weigher.log_prob(probabilities_BK, decisions.action_B)
        loss, metrics = meta_loss(log_prob_B, decisions.advantages_B, probabilities_BK, self.entropy_coef)
        if self.pairwise_coef:
            pairwise = pairwise_loss(log_prob_B, decisions.advantages_B, decisions.group_B)
            loss = loss + self.pairwise_coef * pairwise
            metrics |= {"loss": loss.detach(), "pairwise": pairwise.detach()}
        return loss, metrics


def meta_loss(
    log_prob_B: Tensor, advantages_B: Tensor, probabilities_BK: Tensor, entropy_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_meta = -mean(A log pi(a|h)) - lambda_ent mean H(pi(.|h)) (Eq. 9)."""
    entropy = distribution_entropy(probabilities_BK).mean()
    reinforce = -(advantages_B * log_prob_B).mean()
    loss = reinforce - entropy_coef * entropy
    return loss, {"loss": loss.detach(), "reinforce": reinforce.detach(), "entropy": entropy.detach()}


def pairwise_loss(log_prob_B: Tensor, advantages_B: Tensor, group_B: Tensor) -> Tensor:
    """Mean over the pairs (i, j) of a group with A_i > A_j of -log sigmoid(log pi(a_i|h_i) - log pi(a_j|h_j)).

    The action of the better response should be the more probable one, by however much it is better; a Bradley-Terry loss
    with the log-probabilities as scores. 0 where no group has two different advantages.

    Args:
        log_prob_B: log pi(a|h), with gradient in the Conductor.
        advantages_B: group-relative advantages.
        group_B: int64, equal inside a group.
    """
    better_BB = (advantages_B.unsqueeze(1) > advantages_B.unsqueeze(0)) & (group_B.unsqueeze(1) == group_B.unsqueeze(0))
    margin_BB = log_prob_B.unsqueeze(1) - log_prob_B.unsqueeze(0)
    losses_P = -torch.nn.functional.logsigmoid(margin_BB[better_BB])
    return losses_P.sum() / max(len(losses_P), 1)


def distribution_entropy(probabilities_BK: Tensor) -> Tensor:
    """Entropy in nats of each row: entropy_B; zero probabilities (rewards that do not apply) add nothing."""
    # not torch.special.entr: its gradient at 0 is infinite, and times the mask's 0 that is NaN
    safe_BK = torch.where(probabilities_BK > 0, probabilities_BK, torch.ones_like(probabilities_BK))
    return -(probabilities_BK * safe_BK.log()).sum(-1)
