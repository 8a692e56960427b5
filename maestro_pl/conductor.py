"""The Conductor: a small network that reads the policy's hidden state and weighs the rewards of each response.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from maestro_pl.errors import UserError
from maestro_pl.weighers import HiddenContext, Layer, Pool, Weigher, Weighing

Action: TypeAlias = Literal["one_hot", "mix"]
Reads: TypeAlias = Literal["hidden", "nothing", "shuffled"]


class Conductor(Weigher):
    """pi_phi(.|h) = softmax(f(h) / tau) with a floor on every probability (Eq. 2).

    The last layer starts at zero, so training starts from equal weights.

    Args:
        hidden_sizes: widths of hidden layers (GELU between them); none is the paper's single linear layer.
        action: how a drawn action a becomes weights (Eq. 3). ``one_hot``: w = e_a. ``mix``:
            w = (1 - mix_rate) * pi(.|h) + mix_rate * e_a.
        mix_rate: the share eta of the action under ``mix``, in (0, 1].
        min_probability: floor on each probability before they are renormalised; the paper's 1e-4.
        tau: temperature at the start; the paper's 1.0.
        learn_tau: learn tau with the other parameters, as the paper does.
        tau_range: tau is kept inside this interval, so that a run cannot freeze in a corner of the simplex.
        norm: ``rms`` divides h by its root mean square, so that the Conductor's learning rate means the same for every
            backbone; ``none`` reads h as it is (the paper).
        layer: which hidden state h is: ``last`` (the paper), ``middle``, ``first``, or an index.
        pool: ``last`` response token, or ``mean`` over the response.
        reads: ``hidden`` is h(x, y); two ablations say what h is worth. ``nothing`` puts h = 0, so that all responses get
            the same probabilities (a context-free Conductor); ``shuffled`` gives every response the h of another one of
            the batch, drawn at random.

    Raises:
        UserError: a value outside its range.
    """

    def __init__(
        self,
        hidden_sizes: list[int] | None = None,
        action: Action = "one_hot",
        mix_rate: float = 0.5,
        min_probability: float = 1e-4,
        tau: float = 1.0,
        learn_tau: bool = True,
        tau_range: tuple[float, float] = (0.1, 10.0),
        norm: Literal["rms", "none"] = "rms",
        layer: Layer = "last",
        pool: Pool = "last",
        reads: Reads = "hidden",
    ) -> None:
        super().__init__()
        low, high = tau_range
        if not 0 < low <= tau <= high:
            raise UserError(f"Conductor tau={tau} is outside tau_range=({low}, {high}): choose 0 < low <= tau <= high.")
        if not 0 < mix_rate <= 1:
            raise UserError(f"Conductor mix_rate={mix_rate}: expected a share in (0, 1].")
        if not 0 <= min_probability < 1:
            raise UserError(f"Conductor min_probability={min_probability}: expected a probability in [0, 1/K).")
        if any(width < 1 for width in hidden_sizes or []):
            raise UserError(f"Conductor hidden_sizes={hidden_sizes}: every width must be at least 1.")
        if reads not in get_args(Reads):
            raise UserError(f"Conductor reads={reads!r}: expected one of {', '.join(get_args(Reads))}.")
        self.reads: Reads = reads
        self.hidden_sizes = list(hidden_sizes or [])
        self.action: Action = action
        self.mix_rate = mix_rate
        self.min_probability = min_probability
        self.tau_range = tau_range
        self.norm = norm
        self.context: HiddenContext = HiddenContext(layer, pool)
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau)), requires_grad=learn_tau)
        self.net: nn.Sequential = nn.Sequential()

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """Make the layers for this hidden size and these rewards."""
        super().build(hidden_size, reward_names)
        if self.min_probability * len(self.reward_names) >= 1:
            raise UserError(
                f"Conductor min_probability={self.min_probability} with {len(self.reward_names)} rewards leaves nothing "
                f"to choose: keep it below {1 / len(self.reward_names):.4g}."
            )
        widths = [hidden_size, *self.hidden_sizes]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        head = nn.Linear(widths[-1], len(self.reward_names))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.net = nn.Sequential(*layers, head).to(self.log_tau.device)

    @property
    def settings(self) -> dict[str, Any]:
        """What shapes its decisions besides its parameters."""
        return {
            "hidden_sizes": self.hidden_sizes,
            "action": self.action if self.action == "one_hot" else f"mix {self.mix_rate}",
            "min_probability": self.min_probability,
            "norm": self.norm,
            "layer": self.context.layer,
            "pool": self.context.pool,
            "reads": self.reads,
        }

    @property
    def tau(self) -> Tensor:
        """The temperature, inside ``tau_range``."""
        return self.log_tau.exp().clamp(*self.tau_range)

    def probabilities(self, h_BD: Tensor, mask_BK: Tensor) -> Tensor:
        """pi_phi(.|h) over the applicable rewards, floored and renormalised (Eq. 2).

        Args:
            h_BD: float hidden states.
            mask_BK: bool, which rewards apply; rows without any give a row of zeros.

        Returns:
            float32 probabilities_BK, differentiable in the Conductor's parameters.
        """
        h_BD = torch.zeros_like(h_BD, dtype=torch.float32) if self.reads == "nothing" else h_BD.float()
        if self.norm == "rms":
            h_BD = h_BD * torch.rsqrt(h_BD.square().mean(-1, keepdim=True) + 1e-6)
        with torch.autocast(h_BD.device.type, enabled=False):  # float32 under bf16-mixed too
            logits_BK = self.net(h_BD) / self.tau
        soft_BK = logits_BK.masked_fill(~mask_BK, -torch.inf).softmax(-1).nan_to_num(0.0)
        floored_BK = torch.where(mask_BK, soft_BK.clamp(min=self.min_probability), torch.zeros_like(soft_BK))
        return floored_BK / floored_BK.sum(-1, keepdim=True).clamp(min=torch.finfo(floored_BK.dtype).tiny)

    def log_prob(self, probabilities_BK: Tensor, action_B: Tensor) -> Tensor:
        """Log-probability log pi(a | h) of given actions: log_prob_B (0 where no reward applies)."""
        chosen_B = probabilities_BK.gather(-1, action_B.unsqueeze(-1)).squeeze(-1)
        return torch.where(chosen_B > 0, chosen_B, torch.ones_like(chosen_B)).log()

    def forward(self, h_BD: Tensor | None, rewards_BK: Tensor, mask_BK: Tensor, sample: bool) -> Weighing:
        """Draw an action for every response on its own in training; soft weights in evaluation (Eq. 2 and 3)."""
        if h_BD is None:
            raise UserError("The Conductor needs hidden states: let RolloutGenerator fill rollout.hidden_BD.")
        read_BD = None
        if self.reads == "shuffled":
            h_BD = read_BD = h_BD[torch.randperm(len(h_BD)).to(h_BD.device)]
        probabilities_BK = self.probabilities(h_BD, mask_BK)
        if not sample:
            return Weighing(probabilities_BK, probabilities_BK, h_BD=read_BD)
        none_B1 = ~mask_BK.any(-1, keepdim=True)
        action_B = torch.multinomial(torch.where(none_B1, torch.ones_like(probabilities_BK), probabilities_BK), 1)[:, 0]
        weights_BK = action_weights(probabilities_BK, action_B, self.action, self.mix_rate)
        weights_BK = weights_BK.masked_fill(none_B1, 0.0)
        return Weighing(weights_BK, probabilities_BK, action_B, self.log_prob(probabilities_BK, action_B), read_BD)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Put tau back into its interval after an optimizer step, so that its gradient does not die at the edge."""
        self.log_tau.clamp_(math.log(self.tau_range[0]), math.log(self.tau_range[1]))


def action_weights(probabilities_BK: Tensor, action_B: Tensor, action: Action, mix_rate: float) -> Tensor:
    """w(h, a): the weights that an action stands for (Eq. 3): ``one_hot`` is e_a, ``mix`` leans pi(.|h) towards it."""
    emphasis_BK = torch.nn.functional.one_hot(action_B, probabilities_BK.shape[-1]).to(probabilities_BK.dtype)
    if action == "one_hot":
        return emphasis_BK
    return (1.0 - mix_rate) * probabilities_BK + mix_rate * emphasis_BK
