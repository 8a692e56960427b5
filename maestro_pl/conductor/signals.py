"""What a decision of the Conductor was worth: the contract of the meta-signals, and the paper's own.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from maestro_pl.algorithm.advantages import scalarise
from maestro_pl.algorithm.settings import Advantages, Anchoring
from maestro_pl.algorithm.simplex import action_weights
from maestro_pl.conductor.buffer import MetaBuffer, action_credit
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.credits import action_advantages, clipped_loss, distribution_entropy, meta_loss, pairwise_loss
from maestro_pl.conductor.labels import LabelScale
from maestro_pl.conductor.own_code import (
    SIGNAL,
    check_begun,
    check_tensor,
    is_own,
    named,
    numbers_of,
    own_code,
    returned,
    settings_of,
)
from maestro_pl.conductor.weighers import UpdatePlan, WeighedRollout
from maestro_pl.errors import UserError, check_choice
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.run.others import PAGE

Actions: TypeAlias = Literal["sampled", "expected"]


@dataclass(frozen=True)
class Observation:
    """One training batch as a meta-signal sees it, after the policy's advantages are known and before its update.

    Attributes:
        conductor: who decided.
        policy: who sampled.
        update: what the policy's update would do with the batch.
        advantages: how advantages are made of scalar rewards.
        weighed: the batch: rollout, rewards, decision, scalar rewards and advantages.
        z_BK: the rewards z-scored in their group.
        open_B: float in [0, 1], how far all gates together are open.
        labelled_N: bool on the CPU, the groups that the anchors have labelled.
        label_scale: of the anchors, where only some responses of a group are rated; None: a group has its own scale.
    """

    conductor: Conductor
    policy: LoRAPolicy
    update: UpdatePlan
    advantages: Advantages
    weighed: WeighedRollout
    z_BK: Tensor
    open_B: Tensor
    labelled_N: Tensor
    label_scale: LabelScale | None = None


@dataclass
class Credit:
    """What a meta-signal says of a batch.

    Attributes:
        credit_BK: float32, what emphasising reward k on response i was worth; NaN: not known.
        value_B: float32, what response i itself was worth, z-scored in its group; NaN: not known. None: the signal does
            not say.
        metrics: counts of this batch, to log as ``conductor/<name>``; those of all ranks are added up.
        rank_BJ: int64, what anchors said that compare responses (:func:`maestro_pl.conductor.labels.choice_ranks`). None:
            nothing.
    """

    credit_BK: Tensor
    value_B: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    rank_BJ: Tensor | None = None


class MetaSignal:
    """Base of the meta-signals: :meth:`observe` says what decisions were worth, a learner moves the Conductor towards it.

    Args:
        entropy_coef: lambda_ent, the weight of the entropy bonus; the paper's 1e-3. Closed-form learners do not read
            it.

    Raises:
        UserError: a negative coefficient.
    """

    uses_anchor = False  # True: reads the rewards with the role `anchor`
    gives_values = False  # True: says what each response was worth, not only what each reward's emphasis was
    credits_all = True  # False: knows the drawn action only
    needs_labels_of_task = False  # True: says nothing of a task that no anchor has labelled
    gives_choices = False  # True: hands on what anchors say that compare responses

    def __init__(self, entropy_coef: float = 1e-3) -> None:
        if not entropy_coef >= 0:
            raise UserError(f"{type(self).__name__} entropy_coef={entropy_coef}: expected at least 0.")
        self.entropy_coef = entropy_coef

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that shape the signal; compared when a run is resumed."""
        return {"entropy_coef": self.entropy_coef}

    def check(self, policy: LoRAPolicy, advantages: Advantages, anchoring: Anchoring) -> None:
        """Raise a ``UserError`` where a run is set up in a way that this signal cannot judge."""

    def observe(self, seen: Observation) -> Credit:
        """What the decisions on one batch were worth."""
        raise NotImplementedError

    def __call__(
        self,
        weigher: Conductor,
        buffer: MetaBuffer,
        entropy_coef: float | None = None,
        importance_clip: float | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """REINFORCE on the buffered actions and their credits (Eq. 9).

        Args:
            weigher: the Conductor.
            buffer: its decisions.
            entropy_coef: in place of the signal's own.
            importance_clip: see :func:`maestro_pl.conductor.credits.clipped_loss`; None trusts old actions as they are.

        Returns:
            The loss, a scalar with gradient in the Conductor only, and detached metrics; None where the credit of no
            drawn action is known.
        """
        decisions = buffer.joined()
        decisions = decisions.rows(decisions.action_B >= 0)
        credit_B = decisions.credit_BK.gather(1, decisions.action_B.unsqueeze(1)).squeeze(1)
        known = (~credit_B.isnan()).nonzero().squeeze(1)
        decisions, credit_B = decisions.rows(known), credit_B[known]
        if not len(decisions):
            return None, {}
        coefficient = self.entropy_coef if entropy_coef is None else entropy_coef
        probabilities_BK = weigher.probabilities(decisions.h_BD, decisions.mask_BK)
        log_prob_B = weigher.log_prob(probabilities_BK, decisions.action_B)
        loss, metrics = meta_loss(log_prob_B, credit_B, probabilities_BK, coefficient)
        if importance_clip is not None:
            surrogate, clipped = clipped_loss(log_prob_B, decisions.log_prob_B, credit_B, importance_clip)
            loss = surrogate - coefficient * distribution_entropy(probabilities_BK).mean()
            metrics |= {"loss": loss.detach(), "reinforce": surrogate.detach(), "clipped": clipped}
        return loss, metrics


def observed(signal: MetaSignal, seen: Observation) -> Credit:
    """What a signal says of a batch; that of a user's own class is looked at.

    Raises:
        UserError: it raised, returned something else, or numbers of another shape.
    """
    with own_code(SIGNAL, signal, "observe"):
        credit = signal.observe(seen)
    if is_own(signal):
        if not isinstance(credit, Credit):
            raise returned(SIGNAL, signal, "observe", credit)
        _check_credit(signal, credit, seen.weighed.mask_BK)
        credit.metrics = numbers_of(SIGNAL, signal, "observe", credit.metrics)  # type: ignore[assignment]
    return credit


def _check_credit(signal: MetaSignal, credit: Credit, mask_BK: Tensor) -> None:
    """Raise where what a user's own class says has another shape or type than it should, or is infinite."""
    name, (count, rewards) = named(SIGNAL, signal), mask_BK.shape
    check_tensor(f"{name}: credit_BK", credit.credit_BK, (count, rewards))
    if credit.value_B is not None:
        check_tensor(f"{name}: value_B", credit.value_B, (count,))
    elif signal.gives_values and credit.rank_BJ is None:
        raise UserError(
            f"{name} says gives_values = True, and its Credit has no value_B: give it, NaN where a response's worth is not "
            f"known, or leave gives_values out ({PAGE})."
        )
    for field_name, values in (("credit_BK", credit.credit_BK), ("value_B", credit.value_B)):
        if values is not None and bool((infinite := values.isinf()).any()):
            row = int(infinite.view(count, -1).any(1).nonzero()[0, 0])
            raise UserError(
                f"{name}: {field_name} of response {row} is infinite, expected finite numbers, and NaN where it is not known "
                f"({PAGE})."
            )
    ranks = credit.rank_BJ
    if ranks is not None and not (
        isinstance(ranks, Tensor) and ranks.dtype == torch.long and ranks.ndim == 2 and len(ranks) == count
    ):
        found = (
            f"{ranks.dtype} of the shape {list(ranks.shape)}"
            if isinstance(ranks, Tensor)
            else f"a {type(ranks).__name__}"
        )
        raise UserError(
            f"{name}: rank_BJ is {found}, expected torch.int64 of the shape [{count}, J], a column for each comparison, or "
            f"None ({PAGE})."
        )


def check_signal(signal: MetaSignal, policy: LoRAPolicy, advantages: Advantages, anchoring: Anchoring) -> None:
    """See :meth:`MetaSignal.check`."""
    with own_code(SIGNAL, signal, "check"):
        signal.check(policy, advantages, anchoring)


class AdvantageSignal(MetaSignal):
    """The paper's meta-signal: the policy's own group-relative advantages (Eq. 9).

    Args:
        entropy_coef: lambda_ent, the weight of the entropy bonus; the paper's 1e-3. 0 is its ablation "- entropy".
        pairwise_coef: weight of :func:`pairwise_loss`; 0 leaves it out. The paper's ablation "+ pairwise" gives no
            formula; this one is ours.
        actions: ``sampled`` (the paper) credits the drawn action with the advantage that followed. ``expected`` credits
            every action with the advantage that would have followed
            (:func:`maestro_pl.conductor.credits.action_advantages`): the same mean, less variance. Learners other than
            ``reinforce`` want it.

    Raises:
        UserError: a negative coefficient, or an unknown value of ``actions``.
    """

    def __init__(self, entropy_coef: float = 1e-3, pairwise_coef: float = 0.0, actions: Actions = "sampled") -> None:
        super().__init__(entropy_coef)
        if not pairwise_coef >= 0:
            raise UserError(f"AdvantageSignal pairwise_coef={pairwise_coef}: expected at least 0.")
        check_choice("AdvantageSignal actions", actions, Actions)
        self.pairwise_coef = pairwise_coef
        self.actions: Actions = actions

    @property
    def credits_all(self) -> bool:  # type: ignore[override]
        """Whether every action is credited."""
        return self.actions == "expected"

    def check(self, policy: LoRAPolicy, advantages: Advantages, anchoring: Anchoring) -> None:
        """In expectation, an action must change its own response's reward and nothing else."""
        alone = advantages.scope == "response" and advantages.aggregation == "sum_then_normalize"
        alone = alone and not advantages.min_consensus and advantages.scale != "batch"
        if self.actions == "expected" and (anchoring.hybrid or not alone):
            raise UserError(
                f"AdvantageSignal(actions: expected) with model.anchoring.hybrid={anchoring.hybrid}, "
                f"model.advantages.scope={advantages.scope}, aggregation={advantages.aggregation}, scale={advantages.scale}, "
                f"min_consensus={advantages.min_consensus:g}: it knows what another action would have done to a response's "
                "own weighed reward and its group only; give hybrid: 0, scope: response, sum_then_normalize, scale: group or "
                "none and min_consensus: 0, or actions: sampled."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The coefficients, and which actions are credited."""
        return {**super().settings, "pairwise_coef": self.pairwise_coef, "actions": self.actions}

    def observe(self, seen: Observation) -> Credit:
        """The advantage of the drawn action, or of every action."""
        weighed, weighing = seen.weighed, seen.weighed.weighing
        mask_BK = weighed.mask_BK
        if self.actions == "sampled":
            if weighing.action_B is None:
                raise UserError(
                    "AdvantageSignal credits drawn actions and the Conductor draws none (action: soft): give action: "
                    "one_hot or mix, or AdvantageSignal(actions: expected) with learner: gradient."
                )
            return Credit(action_credit(weighing.action_B, weighed.advantages_B, mask_BK.shape[1]))
        conductor = seen.conductor
        columns = []
        for k in range(mask_BK.shape[1]):
            action_B = torch.full((len(mask_BK),), k, device=mask_BK.device)
            weights_BK = action_weights(weighing.probabilities_BK, action_B, conductor.emphasis, conductor.mix_rate)
            columns.append(scalarise(weighed.rewards_BK, weights_BK, mask_BK))
        soft_BK = torch.stack(columns, dim=1)
        used_B = scalarise(weighed.rewards_BK, weighing.weights_BK, mask_BK)
        # gates and penalties, which do not depend on the action, stay as they were
        scalar_BK = weighed.scalar_B.unsqueeze(1) + seen.open_B.unsqueeze(1) * (soft_BK - used_B.unsqueeze(1))
        credit_BK = action_advantages(scalar_BK, weighed.scalar_B, weighed.rollout.group_size, seen.advantages.scale)
        return Credit(torch.where(mask_BK, credit_BK, torch.full_like(credit_BK, torch.nan)))

    def __call__(
        self,
        weigher: Conductor,
        buffer: MetaBuffer,
        entropy_coef: float | None = None,
        importance_clip: float | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See :class:`MetaSignal`; with the pairwise term."""
        loss, metrics = super().__call__(weigher, buffer, entropy_coef, importance_clip)
        if self.pairwise_coef and loss is not None:
            decisions = buffer.joined()
            probabilities_BK = weigher.probabilities(decisions.h_BD, decisions.mask_BK)
            log_prob_B = weigher.log_prob(probabilities_BK, decisions.action_B.clamp(min=0))
            pairwise = pairwise_loss(log_prob_B, decisions.advantages_B, decisions.group_B)
            loss = loss + self.pairwise_coef * pairwise
            metrics |= {"loss": loss.detach(), "pairwise": pairwise.detach()}
        return loss, metrics


class CombinedSignal(MetaSignal):
    """A weighted sum of meta-signals.

    What one of them does not know, a credit or a value, counts as 0 where another one knows it.

    Args:
        signals: the signals.
        coefs: one number a signal; default: 1 each.
        entropy_coef: lambda_ent of the sum; those of the parts are not read.

    Raises:
        UserError: no signal, or another number of coefficients than signals.
    """

    def __init__(self, signals: list[MetaSignal], coefs: list[float] | None = None, entropy_coef: float = 1e-3) -> None:
        super().__init__(entropy_coef)
        self.signals, self.coefs = list(signals), list(coefs if coefs is not None else [1.0] * len(signals))
        if not self.signals or len(self.coefs) != len(self.signals):
            raise UserError(
                f"CombinedSignal got {len(self.signals)} signals and {len(self.coefs)} coefs: give at least one signal, and "
                "one number for each."
            )
        for signal in self.signals:
            check_begun(SIGNAL, signal, "entropy_coef")

    @property
    def uses_anchor(self) -> bool:  # type: ignore[override]
        """Whether any of the parts does."""
        return any(signal.uses_anchor for signal in self.signals)

    @property
    def gives_values(self) -> bool:  # type: ignore[override]
        """Whether all of the parts do."""
        return all(signal.gives_values for signal in self.signals)

    @property
    def credits_all(self) -> bool:  # type: ignore[override]
        """Whether all of the parts do."""
        return all(signal.credits_all for signal in self.signals)

    @property
    def needs_labels_of_task(self) -> bool:  # type: ignore[override]
        """Whether all of the parts do."""
        return all(signal.needs_labels_of_task for signal in self.signals)

    @property
    def gives_choices(self) -> bool:  # type: ignore[override]
        """Whether any of the parts does."""
        return any(signal.gives_choices for signal in self.signals)

    def check(self, policy: LoRAPolicy, advantages: Advantages, anchoring: Anchoring) -> None:
        """See the parts."""
        for signal in self.signals:
            check_signal(signal, policy, advantages, anchoring)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the parts, numbered."""
        parts = {
            f"{index}.{name}": value
            for index, (signal, coef) in enumerate(zip(self.signals, self.coefs, strict=True))
            for name, value in {"class": type(signal).__name__, "coef": coef, **settings_of(SIGNAL, signal)}.items()
        }
        return {**super().settings, **parts}

    def observe(self, seen: Observation) -> Credit:
        """The weighted sum of what the parts say."""
        credits = [observed(signal, seen) for signal in self.signals]
        metrics = {name: value for credit in credits for name, value in credit.metrics.items()}
        values = [(coef, c.value_B) for coef, c in zip(self.coefs, credits, strict=True) if c.value_B is not None]
        credit_BK = weighted_sum([c.credit_BK for c in credits], self.coefs)
        value_B = weighted_sum([v for _, v in values], [coef for coef, _ in values]) if values else None
        ranks = [credit.rank_BJ for credit in credits if credit.rank_BJ is not None]
        return Credit(credit_BK, value_B, metrics, ranks[0] if ranks else None)  # all read the same anchors


def weighted_sum(credits: Sequence[Tensor], coefs: Sequence[float]) -> Tensor:
    """Sum of coef times credit over those that are known, NaN where none is."""
    stacked = torch.stack([coef * credit for coef, credit in zip(coefs, credits, strict=True)])
    known = ~stacked.isnan()
    return torch.where(known.any(0), stacked.nan_to_num(0.0).sum(0), torch.full_like(stacked[0], torch.nan))
