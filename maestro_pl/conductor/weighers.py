"""Who decides how the rewards of a response are weighed: the interface, and the weighers that do not learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from maestro_pl.algorithm import Metrics
from maestro_pl.algorithm.simplex import on_simplex
from maestro_pl.conductor.own_code import WEIGHER, check_on_simplex, check_tensor, is_own, named, own_code, returned
from maestro_pl.errors import UserError
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import Rollout
from maestro_pl.run.properties import PlainProperties


class Weighing(NamedTuple):
    """What a weigher decided for B responses.

    Attributes:
        weights_BK: on the simplex over the applicable rewards; 0 for the others (all 0 where none applies).
        probabilities_BK: the weigher's own distribution pi(.|h), before any action; equals ``weights_BK`` without one.
        action_B: int64 index of the emphasised reward, or None where no action was drawn.
        log_prob_B: log pi(action | h), or None.
        h_BD: the hidden states that were read, where they are not the ones given.
    """

    weights_BK: Tensor
    probabilities_BK: Tensor
    action_B: Tensor | None = None
    log_prob_B: Tensor | None = None
    h_BD: Tensor | None = None


@dataclass(frozen=True)
class WeighedRollout:
    """A training batch whose rewards are weighed: what both loops learn from, on the module's device.

    Attributes:
        rollout: with every reward scored.
        rewards_BK: float, the weighed rewards, normalised inside their group as configured.
        mask_BK: bool, which of them apply.
        weighing: what the weigher decided.
        scalar_B: float, the scalar rewards; NaN where none applies or a group is skipped.
        advantages_B: float, what the policy is trained on.
    """

    rollout: Rollout
    rewards_BK: Tensor
    mask_BK: Tensor
    weighing: Weighing
    scalar_B: Tensor
    advantages_B: Tensor


class UpdatePlan(Protocol):
    """What the policy's update would do with a batch; ``training.update.PolicyUpdate`` is one."""

    @property
    def pass_limit(self) -> int:
        """Tokens of one forward pass at most."""

    def token_weights(self, weighed: WeighedRollout) -> Tensor:
        """How much each response token counts in the policy's loss: weights_T. Collective."""

    def passes(self, rollout: Rollout, groups: list[int]) -> list[list[int]]:
        """Rows of these groups in forward passes."""


@dataclass(frozen=True)
class Scored:
    """A training batch before it is weighed.

    Attributes:
        raw_BK: float, the weighed rewards as they were given, not normalised; 0 where they do not apply.
        mask_BK: bool, which of them apply.
        group_size: G.
        step: policy steps behind us.
    """

    raw_BK: Tensor
    mask_BK: Tensor
    group_size: int
    step: int


@dataclass(frozen=True)
class Seen:
    """A training batch that was weighed, before the policy's update.

    Attributes:
        scored: the batch before it was weighed.
        weighed: rollout, normalised rewards, decision, scalar rewards and advantages.
        policy: who sampled.
        update: what the policy's update would do with the batch.
    """

    scored: Scored
    weighed: WeighedRollout
    policy: LoRAPolicy
    update: UpdatePlan


class Weigher(PlainProperties, nn.Module):
    """Base of everything that turns K rewards into weights.

    A weigher is told the rewards' names and the policy's hidden size by :meth:`build`, once, before the first batch.
    One that watches the run overrides :meth:`prepare`, :meth:`observe` or :meth:`validated`; what it remembers goes
    into buffers, which are saved and come back with the run.
    """

    context: HiddenContext | None = None  # None: does not read h, and none is computed
    reads_validation = False  # True: learns from the validations of `fit`, so there must be some
    gain = 1.0  # what the advantages of a training batch are multiplied by

    def __init__(self) -> None:
        super().__init__()
        self.reward_names: list[str] = []

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that shape its decisions; compared when a run is resumed."""
        return {}

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """Learn how many rewards there are and how wide h is; called once, before the first batch."""
        self.reward_names = list(reward_names)

    def check(self, policy: LoRAPolicy) -> None:
        """Raise a ``UserError`` where this weigher cannot work with the policy; called once it is built."""

    def prepare(self, scored: Scored) -> None:
        """Look at a training batch before it is weighed. All ranks call it together."""

    def observe(self, seen: Seen) -> Metrics:
        """Learn from a training batch that was weighed; numbers to log as ``weigher/<name>``. All ranks call it together."""
        return {}

    def validated(self, mean_K: Tensor) -> None:
        """Learn from a whole validation of ``fit``: each reward's mean over the prompts; NaN where it applied to none.

        All ranks call it together, with the same numbers.
        """

    def forward(self, h_BD: Tensor | None, rewards_BK: Tensor, mask_BK: Tensor, sample: bool) -> Weighing:
        """Weigh the rewards of B responses.

        Args:
            h_BD: float32 hidden states, or None where ``context`` is None.
            rewards_BK: float normalised rewards.
            mask_BK: bool, which rewards apply.
            sample: True in training (an action may be drawn), False in evaluation.
        """
        raise NotImplementedError


def checked_weighing(
    weigher: Weigher, h_BD: Tensor | None, rewards_BK: Tensor, mask_BK: Tensor, sample: bool
) -> Weighing:
    """What a weigher decides, without gradient; that of a user's own class is looked at.

    Raises:
        UserError: it raised, returned something else, or its weights are not on the simplex over the rewards that apply.
    """
    with torch.no_grad(), own_code(WEIGHER, weigher, "forward"):
        weighing: Weighing = weigher(h_BD, rewards_BK, mask_BK, sample)
    if is_own(weigher):
        name = named(WEIGHER, weigher)
        if not isinstance(weighing, Weighing):
            raise returned(WEIGHER, weigher, "forward", weighing)
        shape = (mask_BK.shape[0], mask_BK.shape[1])
        for field, values_BK in (("weights_BK", weighing.weights_BK), ("probabilities_BK", weighing.probabilities_BK)):
            check_tensor(f"{name}: {field}", values_BK, shape)
            check_on_simplex(f"{name}: {field}", values_BK.cpu(), mask_BK.cpu())
    return weighing


class EqualWeights(Weigher):
    """The same weight for every reward that applies (the paper's baseline "Eq")."""

    def forward(self, h_BD: Tensor | None, rewards_BK: Tensor, mask_BK: Tensor, sample: bool) -> Weighing:
        """See :class:`Weigher`."""
        weights_BK = on_simplex(torch.ones_like(rewards_BK), mask_BK)
        return Weighing(weights_BK, weights_BK)


class FixedWeights(Weigher):
    """Weights given by name, renormalised over the rewards that apply.

    Args:
        weights: reward name to a weight of at least 0; every weighed reward must be named. They need not add up to 1.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__()
        bad = {name: value for name, value in weights.items() if not 0 <= value < float("inf")}
        if bad or sum(weights.values()) <= 0:
            raise UserError(f"FixedWeights got {bad or weights}: give each reward a finite weight >= 0, not all zero.")
        self.weights = dict(weights)

    @property
    def settings(self) -> dict[str, Any]:
        """The weights."""
        return {"weights": self.weights}

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """See :class:`Weigher`; every reward must have a weight."""
        super().build(hidden_size, reward_names)
        if set(reward_names) != set(self.weights):
            raise UserError(
                f"FixedWeights has weights for {sorted(self.weights)}, but the rewards with role 'train' are "
                f"{sorted(reward_names)}: give exactly these a weight under model.weigher.init_args.weights."
            )

    def forward(self, h_BD: Tensor | None, rewards_BK: Tensor, mask_BK: Tensor, sample: bool) -> Weighing:
        """See :class:`Weigher`."""
        row_K = rewards_BK.new_tensor([self.weights[name] for name in self.reward_names])
        weights_BK = on_simplex(row_K.expand_as(rewards_BK), mask_BK)
        return Weighing(weights_BK, weights_BK)


class RandomWeights(Weigher):
    """Weights drawn uniformly from the simplex for every response (the paper's baseline "Rand"); equal in evaluation."""

    def forward(self, h_BD: Tensor | None, rewards_BK: Tensor, mask_BK: Tensor, sample: bool) -> Weighing:
        """See :class:`Weigher`."""
        equal_BK = on_simplex(torch.ones_like(rewards_BK), mask_BK)
        if not sample:
            return Weighing(equal_BK, equal_BK)
        drawn_BK = torch.empty_like(rewards_BK).exponential_()  # normalised exponentials are uniform on the simplex
        weights_BK = on_simplex(drawn_BK, mask_BK)
        return Weighing(weights_BK, weights_BK)
