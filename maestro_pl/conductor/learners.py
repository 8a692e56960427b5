"""Who moves the Conductor towards what a meta-signal says: by gradient here, in closed form in ``ridge``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.conductor.buffer import Decisions, MetaBuffer
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.credits import distribution_entropy, expected_loss
from maestro_pl.conductor.signals import MetaSignal
from maestro_pl.errors import UserError

Step: TypeAlias = Callable[
    [Tensor], Metrics
]  # backward of a meta-loss and a step of the optimizer; empty, or `skipped`
CONTROL_RATE = 0.5  # of the target-entropy controller, on log lambda_ent


class Learner:
    """Base of the learners: what they share is how far an update may go and what the policy sees of it.

    Args:
        fits: fits on the buffer at each update.
        replay: batches of the buffer that are kept after an update and learned from again at the next ones; 0 forgets
            all, as the paper does.
        trust_region: bound in nats on the mean KL divergence from the weights before an update to those after it, over
            the contexts of the buffer. A longer step is shortened towards the old parameters until it fits. null sets
            none.
        ema: the policy sees an exponential moving average of the Conductor's parameters with this decay; 0 shows them
            as they are.

    Raises:
        UserError: a value outside its range.
    """

    trains_by_gradient = True
    takes_choices = False  # True: learns from anchors that compare responses

    def __init__(self, fits: int = 1, replay: int = 0, trust_region: float | None = None, ema: float = 0.0) -> None:
        name = type(self).__name__
        if fits < 1 or replay < 0:
            raise UserError(f"{name} fits={fits}, replay={replay}: expected at least 1 fit and at least 0 batches.")
        if trust_region is not None and not trust_region > 0:
            raise UserError(f"{name} trust_region={trust_region}: expected nats above 0, or null for none.")
        if not 0 <= ema < 1:
            raise UserError(f"{name} ema={ema}: expected a decay in [0, 1).")
        self.fits, self.replay, self.trust_region, self.ema = fits, replay, trust_region, ema
        #: tasks (:func:`maestro_pl.conductor.labels.task_id`) on which no reward goes along with the anchor: each reward's
        #: covariance with it, the posterior deviation of that, and whether it applies
        self.unhelped: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, compared when a run is resumed."""
        return {"fits": self.fits, "replay": self.replay, "trust_region": self.trust_region, "ema": self.ema}

    def attach(self, conductor: Conductor, signal: MetaSignal) -> None:
        """Check that Conductor, signal and learner fit, and tell the Conductor how it is going to be trained."""
        if self.ema:
            conductor.keep_slow_copy()

    def learn(self, conductor: Conductor, signal: MetaSignal, buffer: MetaBuffer, *, step: Step, batch: int) -> Metrics:
        """One update of the Conductor on the buffer, which is the same on every rank.

        Args:
            conductor: who is moved.
            signal: what its decisions were worth.
            buffer: the decisions.
            step: backward of a loss and a step of the Conductor's optimizer.
            batch: training batches so far, by which remembered labels age.

        Returns:
            Plain metrics without prefix; ``skipped`` where nothing was learned.
        """
        with torch.autocast(conductor.log_tau.device.type, enabled=False):  # float32 under bf16-mixed too
            decisions = buffer.joined()
            with torch.no_grad():
                before_BK = conductor.probabilities(decisions.h_BD, decisions.mask_BK)
            old = {name: p.detach().clone() for name, p in conductor.named_parameters()}
            metrics = self._fit(conductor, signal, buffer, step, batch)
            metrics |= self._shorten(conductor, decisions, before_BK, old)
            if self.ema:
                conductor.follow(self.ema)
            return metrics

    def nearest(self, conductor: Conductor, h_BD: Tensor) -> Tensor | None:
        """Cosine of each context to the nearest one that was learned from: cosine_B; None: nothing is remembered."""
        return None

    def resume(self, conductor: Conductor) -> None:
        """Go on with what a checkpoint brought, once the Conductor's parameters are back."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""

    def _fit(self, conductor: Conductor, signal: MetaSignal, buffer: MetaBuffer, step: Step, batch: int) -> Metrics:
        raise NotImplementedError

    @torch.no_grad()
    def _shorten(
        self, conductor: Conductor, decisions: Decisions, before_BK: Tensor, old: dict[str, Tensor]
    ) -> Metrics:
        """Halve the step towards the old parameters until it stays inside the trust region."""
        if self.trust_region is None:
            return {}
        new = {name: p.detach().clone() for name, p in conductor.named_parameters()}
        share = 1.0
        divergence = mean_divergence(before_BK, conductor.probabilities(decisions.h_BD, decisions.mask_BK))
        while divergence > self.trust_region and share > 0.0:
            share = share / 2 if share > 1e-3 else 0.0  # no step is inside
            for name, parameter in conductor.named_parameters():
                parameter.copy_(torch.lerp(old[name], new[name], share))
            divergence = mean_divergence(before_BK, conductor.probabilities(decisions.h_BD, decisions.mask_BK))
        return {"trust_share": share, "divergence": divergence}


class _GradientLearner(Learner):
    """What REINFORCE and the expected gradient share: the optimizer, and a controller of the entropy bonus."""

    def __init__(
        self,
        fits: int = 1,
        replay: int = 0,
        trust_region: float | None = None,
        ema: float = 0.0,
        target_entropy: float | None = None,
    ) -> None:
        super().__init__(fits, replay, trust_region, ema)
        if target_entropy is not None and not 0 < target_entropy < 1:
            raise UserError(
                f"{type(self).__name__} target_entropy={target_entropy}: expected a share of the largest entropy in (0, 1), or "
                "null for a fixed bonus."
            )
        self.target_entropy = target_entropy
        self.entropy_coef: float | None = None  # the controller's; None: not started

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, compared when a run is resumed."""
        return {**super().settings, "target_entropy": self.target_entropy}

    def state_dict(self) -> dict[str, Any]:
        """The controller's coefficient."""
        return {"entropy_coef": self.entropy_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.entropy_coef = state.get("entropy_coef")

    def _fit(self, conductor: Conductor, signal: MetaSignal, buffer: MetaBuffer, step: Step, batch: int) -> Metrics:
        metrics: Metrics = {}
        for _ in range(self.fits):
            loss, numbers = self.loss(signal, conductor, buffer)
            if loss is None:
                return {"skipped": 1.0}
            metrics |= numbers
            metrics |= step(loss)
            if metrics.get("skipped"):
                break
        if self.target_entropy is not None:
            metrics |= self._control(signal, conductor, buffer.joined())
        return metrics

    def loss(
        self, signal: MetaSignal, conductor: Conductor, buffer: MetaBuffer
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The loss whose gradient moves the Conductor, and detached metrics; None where nothing is known."""
        raise NotImplementedError

    def coefficient(self, signal: MetaSignal) -> float:
        """lambda_ent: the signal's, or what the controller has made of it."""
        return signal.entropy_coef if self.entropy_coef is None else self.entropy_coef

    @torch.no_grad()
    def _control(self, signal: MetaSignal, conductor: Conductor, decisions: Decisions) -> Metrics:
        """Raise lambda_ent where the weights are more one-sided than wanted, lower it where they are less."""
        assert self.target_entropy is not None
        choices_B = decisions.mask_BK.sum(1)
        several = choices_B > 1
        entropy_B = distribution_entropy(conductor.probabilities(decisions.h_BD, decisions.mask_BK))[several]
        if not bool(several.any()):
            return {}
        share = float((entropy_B / choices_B[several].float().log()).mean())
        start = max(self.coefficient(signal), 1e-4)
        self.entropy_coef = min(10.0, max(1e-5, start * math.exp(CONTROL_RATE * (self.target_entropy - share))))
        return {"entropy_share": share, "entropy_coef": self.entropy_coef}


class ReinforceLearner(_GradientLearner):
    """REINFORCE on the drawn actions (Eq. 9): the paper's.

    Args:
        fits: see :class:`Learner`.
        replay: see :class:`Learner`.
        trust_region: see :class:`Learner`.
        ema: see :class:`Learner`.
        target_entropy: share of the largest entropy, log of the number of rewards, that lambda_ent is steered to; null
            keeps the signal's coefficient.
        importance_clip: c of a clipped importance ratio, for actions that an older Conductor drew
            (:func:`maestro_pl.conductor.credits.clipped_loss`); null trusts them as they are. Wanted with ``fits`` or
            ``replay``.

    Raises:
        UserError: a value outside its range.
    """

    def __init__(
        self,
        fits: int = 1,
        replay: int = 0,
        trust_region: float | None = None,
        ema: float = 0.0,
        target_entropy: float | None = None,
        importance_clip: float | None = None,
    ) -> None:
        super().__init__(fits, replay, trust_region, ema, target_entropy)
        if importance_clip is not None and not 0 < importance_clip < 1:
            raise UserError(
                f"ReinforceLearner importance_clip={importance_clip}: expected a number in (0, 1), or null."
            )
        self.importance_clip = importance_clip

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, compared when a run is resumed."""
        return {**super().settings, "importance_clip": self.importance_clip}

    def attach(self, conductor: Conductor, signal: MetaSignal) -> None:
        """See :class:`Learner`; needs drawn actions."""
        super().attach(conductor, signal)
        if conductor.action == "soft":
            raise UserError(
                "model.meta.learner=reinforce learns from drawn actions, and model.weigher has action: soft, which draws "
                "none: its expected gradient would be 0. Give action: one_hot or mix, or learner: gradient or ridge."
            )

    def loss(
        self, signal: MetaSignal, conductor: Conductor, buffer: MetaBuffer
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See :class:`maestro_pl.conductor.MetaSignal`."""
        return signal(conductor, buffer, self.entropy_coef, self.importance_clip)


class GradientLearner(_GradientLearner):
    """The gradient of the credits' expectation under the Conductor, all actions at once (Eq. 11).

    Args:
        fits: see :class:`Learner`.
        replay: see :class:`Learner`.
        trust_region: see :class:`Learner`.
        ema: see :class:`Learner`.
        target_entropy: see :class:`ReinforceLearner`.

    Raises:
        UserError: a value outside its range.
    """

    def attach(self, conductor: Conductor, signal: MetaSignal) -> None:
        """See :class:`Learner`; the paper's sampled signal knows one action a response only."""
        super().attach(conductor, signal)
        check_knows_all(signal, "gradient")

    def loss(
        self, signal: MetaSignal, conductor: Conductor, buffer: MetaBuffer
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Eq. 11 over the responses of which any credit is known."""
        decisions = buffer.joined()
        decisions = decisions.rows(~decisions.credit_BK.isnan().all(1))
        if not len(decisions):
            return None, {}
        probabilities_BK = conductor.probabilities(decisions.h_BD, decisions.mask_BK)
        return expected_loss(probabilities_BK, decisions.credit_BK, self.coefficient(signal))


def check_knows_all(signal: MetaSignal, learner: str) -> None:
    """Raise where the signal credits drawn actions only.

    Raises:
        UserError: it does.
    """
    if not signal.credits_all:
        raise UserError(
            f"model.meta.learner={learner} wants the credit of every action, and AdvantageSignal(actions: sampled) knows "
            "that of the drawn one only: give actions: expected, or learner: reinforce."
        )


def mean_divergence(before_BK: Tensor, after_BK: Tensor) -> float:
    """Mean over the responses of KL(before || after) in nats."""
    safe_after = after_BK.clamp(min=1e-8)
    terms_BK = torch.where(before_BK > 0, before_BK * (before_BK.clamp(min=1e-8).log() - safe_after.log()), 0.0)
    return float(terms_BK.sum()) / max(len(terms_BK), 1)
