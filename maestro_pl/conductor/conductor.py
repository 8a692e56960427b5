"""The Conductor: a small network that reads the policy's hidden state and weighs the rewards of each response.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from maestro_pl.algorithm.simplex import Action, action_weights, best_correlating_weights
from maestro_pl.conductor.statistics import RunningCorrelation, RunningScale, in_parts, usable_states
from maestro_pl.conductor.weighers import Weigher, Weighing
from maestro_pl.errors import UserError, check_choice
from maestro_pl.policy.context import HiddenContext, Layer, Place, Pool, State

Reads: TypeAlias = Literal["hidden", "nothing", "shuffled"]
Norm: TypeAlias = Literal["rms", "center", "none"]
Mapping: TypeAlias = Literal["softmax", "correlation"]
Explorer: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # features_BF, value_BK -> value_BK
CONSTANT = 0.5  # the constant feature of a fitted Conductor: what all contexts share is a little harder to learn than to differ


class Conductor(Weigher):
    """pi_phi(.|h) = softmax(f(h) / tau) with a floor on every probability (Eq. 2).

    The last layer starts at zero, so training starts from equal weights.

    Args:
        hidden_sizes: widths of hidden layers (GELU between them); none is the paper's single linear layer.
        action: how a drawn action a becomes weights (Eq. 3). ``one_hot``: w = e_a. ``mix``:
            w = (1 - mix_rate) * pi(.|h) + mix_rate * e_a. ``soft``: w = pi(.|h), nothing is drawn; for learners that do
            not need drawn actions (``gradient``, ``ridge``), since the expected gradient of REINFORCE would be zero.
        mix_rate: the share eta of the action under ``mix``, in (0, 1].
        min_probability: floor on each probability before they are renormalised; the paper's 1e-4.
        tau: temperature at the start; the paper's 1.0.
        learn_tau: learn tau with the other parameters, as the paper does.
        tau_range: tau is kept inside this interval, so that a run cannot freeze in a corner of the simplex.
        norm: ``rms`` divides h by its root mean square, so that the Conductor's learning rate means the same for every
            backbone; ``center`` then takes off the running mean over responses and divides by the running spread:
            hidden states share a large common part, and what tells contexts apart is the rest; ``none`` reads h as it
            is (the paper).
        layer: which hidden state h is: ``last`` (the paper), ``middle``, ``first``, or an index.
        pool: ``last`` response token, or ``mean`` over the response.
        context: ``terminal`` reads h(x, y) (the paper); ``prompt`` the state of the prompt's last token, so that a
            group has one ruler; ``both`` reads both.
        state: whose hidden state it is: the ``policy``'s, which drifts away from what was learned while the policy
            trains, or that of the frozen ``base`` (adapters off; the loaded copy with ``lora: null``). With ``context:
            prompt`` the base reads every prompt of a run once; else it costs one more forward pass over the responses,
            which is the reference's where there is one anyway.
        reads: ``hidden`` is h(x, y); two ablations say what h is worth. ``nothing`` puts h = 0, so that all responses
            get the same probabilities (a context-free Conductor); ``shuffled`` gives every response the h of another
            one of the batch, drawn at random.

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
        norm: Norm = "rms",
        layer: Layer = "last",
        pool: Pool = "last",
        context: Place = "terminal",
        reads: Reads = "hidden",
        state: State = "policy",
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
        for name, chosen, known in (
            ("action", action, Action),
            ("norm", norm, Norm),
            ("context", context, Place),
            ("reads", reads, Reads),
            ("state", state, State),
        ):
            check_choice(f"Conductor {name}", chosen, known)
        self.reads: Reads = reads
        self.hidden_sizes = list(hidden_sizes or [])
        self.action: Action = action
        self.mix_rate = mix_rate
        self.min_probability = min_probability
        self.tau_range = tau_range
        self.norm: Norm = norm
        self.context: HiddenContext = HiddenContext(layer, pool, context, state)
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau)), requires_grad=learn_tau)
        self.net: nn.Sequential = nn.Sequential()
        self.slow: nn.Sequential | None = None  # a moving average of `net`, where a learner keeps one
        self.scale: RunningScale | None = None  # with norm: center
        self.correlation: RunningCorrelation | None = None  # of the rewards, with mapping: correlation
        self.mapping: Mapping = "softmax"
        self.constant = CONSTANT  # the value of the constant feature
        self.fits_covariances = False
        self.explore: Explorer | None = None  # set by a learner that explores

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """Make the layers for this hidden size and these rewards."""
        super().build(hidden_size, reward_names)
        if self.min_probability * len(self.reward_names) >= 1:
            raise UserError(
                f"Conductor min_probability={self.min_probability} with {len(self.reward_names)} rewards leaves nothing "
                f"to choose: keep it below {1 / len(self.reward_names):.4g}."
            )
        width = hidden_size * self.context.parts
        widths = [width, *self.hidden_sizes]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        head = nn.Linear(widths[-1], len(self.reward_names))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.net = nn.Sequential(*layers, head).to(self.log_tau.device)
        if self.norm == "center":
            self.scale = RunningScale(width, self.context.parts).to(self.log_tau.device)

    @property
    def settings(self) -> dict[str, Any]:
        """What shapes its decisions besides its parameters."""
        return {
            "hidden_sizes": self.hidden_sizes,
            "action": self.action if self.action != "mix" else f"mix {self.mix_rate}",
            "min_probability": self.min_probability,
            "norm": self.norm,
            "layer": self.context.layer,
            "pool": self.context.pool,
            "context": self.context.place,
            "reads": self.reads,
            "state": self.context.state,
        }

    @property
    def tau(self) -> Tensor:
        """The temperature, inside ``tau_range``."""
        return self.log_tau.exp().clamp(*self.tau_range)

    @property
    def emphasis(self) -> Action:
        """How an action that somebody imagines becomes weights; a soft Conductor draws none, and leans towards it."""
        return "mix" if self.action == "soft" else self.action

    def inputs(self, h_BD: Tensor) -> Tensor:
        """What the layers read: h, normalised; float32, a mean square of about 1 a feature (but for ``norm: none``)."""
        h_BD = h_BD.float()
        if self.reads == "nothing":
            return torch.zeros_like(h_BD)
        if self.norm == "none":
            return h_BD
        normed_BD = self._root_mean_square(h_BD)
        return normed_BD if self.scale is None else self.scale(normed_BD)

    def features(self, h_BD: Tensor) -> Tensor:
        """What a linear fit reads: the inputs with a mean square norm of about 1, and a constant: x_BF, F = D + 1."""
        inputs_BD = self.inputs(h_BD) / math.sqrt(h_BD.shape[-1])
        return torch.cat([inputs_BD, torch.full_like(inputs_BD[..., :1], self.constant)], dim=-1)

    def probabilities(self, h_BD: Tensor, mask_BK: Tensor, in_use: bool = False, explore: bool = False) -> Tensor:
        """pi_phi(.|h) over the applicable rewards, floored and renormalised (Eq. 2).

        Args:
            h_BD: float hidden states.
            mask_BK: bool, which rewards apply; rows without any give a row of zeros.
            in_use: by the parameters that the policy sees, where a learner averages them.
            explore: with the learner's exploration, if it has any.

        Returns:
            float32 probabilities_BK, differentiable in the Conductor's parameters.
        """
        net = self.slow if in_use and self.slow is not None else self.net
        inputs_BD = self.inputs(h_BD)
        inputs_BD = torch.where(usable_states(h_BD).unsqueeze(-1), inputs_BD, 0.0)  # a broken state says nothing
        with torch.autocast(h_BD.device.type, enabled=False):  # float32 under bf16-mixed too
            value_BK = net(inputs_BD)
            if explore and self.explore is not None:
                value_BK = self.explore(self.features(h_BD), value_BK)
            soft_BK = self._mapped(value_BK, mask_BK)
        floored_BK = torch.where(mask_BK, soft_BK.clamp(min=self.min_probability), torch.zeros_like(soft_BK))
        return floored_BK / floored_BK.sum(-1, keepdim=True).clamp(min=torch.finfo(floored_BK.dtype).tiny)

    @torch.no_grad()
    def predicted(self, h_BD: Tensor, z_BK: Tensor) -> Tensor:
        """What the fitted coefficients say each response is worth, of a Conductor that is fitted to values: float32 (B,).

        Args:
            h_BD: float hidden states.
            z_BK: float rewards, z-scored in their group, 0 where they do not apply.
        """
        with torch.autocast(h_BD.device.type, enabled=False):
            value_BK = self.net(torch.where(usable_states(h_BD).unsqueeze(-1), self.inputs(h_BD), 0.0))
            found: Tensor = (value_BK * z_BK.float()).sum(-1)
            return found

    def _mapped(self, value_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """From what the layers give to weights, before the floor."""
        if self.mapping == "correlation":
            assert self.correlation is not None
            correlation_KK = self.correlation.matrix_KK
            if not self.fits_covariances:  # coefficients of a regression: times C they are covariances
                value_BK = torch.where(mask_BK, value_BK, torch.zeros_like(value_BK)) @ correlation_KK
            return best_correlating_weights(value_BK, correlation_KK, mask_BK)
        return (value_BK / self.tau).masked_fill(~mask_BK, -torch.inf).softmax(-1).nan_to_num(0.0)

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
        if sample and self.scale is not None:
            self.scale.observe(self._root_mean_square(h_BD))
        probabilities_BK = self.probabilities(h_BD, mask_BK, in_use=True, explore=sample)
        if not sample or self.action == "soft":
            return Weighing(probabilities_BK, probabilities_BK, h_BD=read_BD)
        none_B1 = ~mask_BK.any(-1, keepdim=True)
        action_B = torch.multinomial(torch.where(none_B1, torch.ones_like(probabilities_BK), probabilities_BK), 1)[:, 0]
        weights_BK = action_weights(probabilities_BK, action_B, self.action, self.mix_rate)
        weights_BK = weights_BK.masked_fill(none_B1, 0.0)
        return Weighing(weights_BK, probabilities_BK, action_B, self.log_prob(probabilities_BK, action_B), read_BD)

    def observe_rewards(self, z_BK: Tensor, mask_BK: Tensor) -> None:
        """Note how the rewards go along with each other; z-scores of a training batch. Collective."""
        if self.correlation is not None:
            with torch.autocast(z_BK.device.type, enabled=False):
                self.correlation.observe(z_BK.float(), mask_BK)

    @torch.no_grad()
    def constrain_(self) -> None:
        """Put tau back into its interval after an optimizer step, so that its gradient does not die at the edge."""
        self.log_tau.clamp_(math.log(self.tau_range[0]), math.log(self.tau_range[1]))

    # -- what a learner does to it -----------------------------------------------------------------------------------

    def keep_slow_copy(self) -> None:
        """Let the policy see a moving average of the layers, which :meth:`follow` moves."""
        self.slow = copy.deepcopy(self.net).requires_grad_(False)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the average: slow <- decay * slow + (1 - decay) * net."""
        assert self.slow is not None
        for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)

    def be_fitted(self, mapping: Mapping, covariances: bool, constant: float = CONSTANT) -> None:
        """Be fitted in closed form from now on: no gradient, and ``mapping`` from the fitted numbers to weights.

        Args:
            mapping: as in :class:`maestro_pl.RidgeLearner`.
            covariances: what is fitted are covariances of the rewards with the value, and not coefficients.
            constant: the constant feature.
        """
        self.constant = constant
        self.mapping, self.fits_covariances = mapping, covariances
        self.requires_grad_(False)
        if mapping == "correlation":
            self.correlation = RunningCorrelation(len(self.reward_names)).to(self.log_tau.device)

    @torch.no_grad()
    def set_linear(self, map_KF: Tensor) -> None:
        """Take a linear map from :meth:`features` for the layer."""
        layer = self.net[-1]
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(map_KF[:, :-1] / math.sqrt(layer.in_features))
        layer.bias.copy_(map_KF[:, -1] * self.constant)

    def _root_mean_square(self, h_BD: Tensor) -> Tensor:
        """Each part of h divided by its root mean square."""
        parts_BPD = in_parts(h_BD.float(), self.context.parts)
        return (parts_BPD * torch.rsqrt(parts_BPD.square().mean(-1, keepdim=True) + 1e-6)).flatten(-2)
