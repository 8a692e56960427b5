"""What the algorithm can be told: groups of settings that check themselves. Their arguments are the keys under ``model``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError, check_choice

LossType: TypeAlias = Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo"]
#: A surrogate of one's own, of a :class:`~maestro_pl.algorithm.losses.TokenBatch` and the :class:`Loss`: the loss of every
#: token, per_token_T, with gradient.
Surrogate: TypeAlias = Callable[[Any, Any], Any]
ImportanceLevel: TypeAlias = Literal["token", "sequence"]
KLPlace: TypeAlias = Literal["loss", "reward"]
Mismatch: TypeAlias = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Aggregation: TypeAlias = Literal["sum_then_normalize", "normalize_then_sum", "mo_grpo", "dvao"]
Scaling: TypeAlias = Literal["group", "batch", "none"]
Scope: TypeAlias = Literal["response", "group"]
Unlabelled: TypeAlias = Literal["weighed", "skipped"]
UnlabelledTasks: TypeAlias = Literal["equal", "weighed", "skipped"]
Shown: TypeAlias = Literal["spread", "random"]


@dataclass(frozen=True)
class Loss:
    """The policy's loss (Eq. 7).

    Attributes:
        type: ``dapo``, ``grpo``, ``dr_grpo`` and ``bnpo`` differ in how token losses are averaged; ``cispo``, ``sapo`` and
            ``luspo`` are other surrogates (:mod:`maestro_pl.algorithm.losses`). A function of one's own, by class path or
            ``file.py:function``, takes a ``TokenBatch`` and this ``Loss`` and gives the loss of every token, averaged as
            ``dapo`` does; of the other keys it reads what it wants.
        importance_level: probability ratio of each ``token``, or of the whole ``sequence`` (GSPO).
        clip_low: lower clip range of the probability ratio, 1 - clip_low.
        clip_high: upper clip range, 1 + clip_high; with ``cispo`` the cap of the ratio itself (4 to 8 are usual).
        delta: upper bound of the ratio where the advantage is negative; null sets none.
        sapo_temperatures: of ``sapo``, for positive and for other advantages.
        top_entropy: share of the tokens, the most uncertain ones, whose surrogate counts; 1 takes all.
        mask_truncated: leave responses that hit the token limit out of the loss.
        mismatch: what corrects for an engine whose probabilities are not quite the trainer's, where it gives its own (vLLM):
            the surrogate is multiplied by rho = pi_trainer / pi_engine, truncated (``token_truncate``) or masked
            (``token_mask``) above ``mismatch_cap``, of each token or of the whole response (``sequence_truncate``,
            ``sequence_mask``); ``none`` only logs it. :mod:`maestro_pl.algorithm.mismatch`.
        mismatch_cap: C, the largest rho.

    Raises:
        UserError: a value outside its range.
    """

    type: LossType | Surrogate = "dapo"
    importance_level: ImportanceLevel = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    top_entropy: float = 1.0
    mask_truncated: bool = False
    mismatch: Mismatch = "token_truncate"
    mismatch_cap: float = 3.0

    def __post_init__(self) -> None:
        """Check every value."""
        if not callable(self.type):
            check_choice("model.loss.type", self.type, LossType)
        check_choice("model.loss.importance_level", self.importance_level, ImportanceLevel)
        if not 0 <= self.clip_low <= 1:
            raise UserError(
                f"model.loss.clip_low={self.clip_low}: the ratio is clipped to 1 - clip_low; expected a number in [0, 1]."
            )
        check_at_least("model.loss.clip_high", self.clip_high, 0)
        if not 0 < self.top_entropy <= 1:
            raise UserError(f"model.loss.top_entropy={self.top_entropy}: expected a share of the tokens in (0, 1].")
        check_choice("model.loss.mismatch", self.mismatch, Mismatch)
        check_at_least("model.loss.mismatch_cap", self.mismatch_cap, 1)
        if self.delta is not None and not self.delta > 0:
            raise UserError(
                f"model.loss.delta={self.delta}: expected a bound above 0 (above 1 + clip_high to matter), or null."
            )
        temperatures = tuple(self.sapo_temperatures)
        if len(temperatures) != 2 or not min(temperatures) > 0:
            raise UserError(f"model.loss.sapo_temperatures={list(temperatures)}: expected two numbers above 0.")
        object.__setattr__(self, "sapo_temperatures", temperatures)  # YAML gives a list
        if self.type == "cispo" and self.clip_high < 1:
            rank_zero_warn(
                f"model.loss.clip_high={self.clip_high}: `cispo` caps the ratio at clip_high itself, so every token's "
                "gradient is scaled down to it; values of 4 to 8 are usual."
            )

    @property
    def name(self) -> str:
        """Its type, of a function its name."""
        return self.type if isinstance(self.type, str) else getattr(self.type, "__qualname__", type(self.type).__name__)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, compared when a run is resumed."""
        return {**asdict(self), "type": self.name}


@dataclass(frozen=True)
class KL:
    """The penalty on the distance to the reference (Eq. 8).

    Attributes:
        coef: weight of the k3 penalty; 0 leaves the reference out.
        place: add the penalty to the ``loss`` (per token) or take it off the ``reward`` (summed over the response).
        unbiased: in the loss, multiply k3 by the probability ratio, so that its gradient is that of the KL; false is the
            GRPO paper's term.

    Raises:
        UserError: a value outside its range.
    """

    coef: float = 0.0
    place: KLPlace = "loss"
    unbiased: bool = True

    def __post_init__(self) -> None:
        """Check every value."""
        check_at_least("model.kl.coef", self.coef, 0)
        check_choice("model.kl.place", self.place, KLPlace)

    @property
    def in_loss(self) -> bool:
        """Whether the loss has a term of it."""
        return self.coef > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        """Whether it is taken off the reward."""
        return self.coef > 0 and self.place == "reward"


@dataclass(frozen=True)
class Advantages:
    """From weighed rewards to advantages (Eq. 6).

    Attributes:
        aggregation: ``sum_then_normalize`` takes advantages of the weighed sum inside each group.
            ``normalize_then_sum`` standardises every reward inside its group first and divides the centred sum by its
            spread over the batch (GDPO, arXiv 2601.05242). ``mo_grpo`` standardises every reward and divides the sum by
            nothing (MO-GRPO, arXiv 2509.22047). ``dvao`` divides the centred sum by the weighed sum of the rewards' own
            standard deviations (DVAO, arXiv 2605.25604).
        scale: what the advantages of ``sum_then_normalize`` are divided by: the standard deviation of the ``group``, of the
            ``batch``, or ``none``; the other aggregations have their own.
        scope: ``response``: every response is weighed by its own weights. ``group``: by the mean weights of its group, so
            that the responses of a group are compared by one ruler.
        min_consensus: responses whose rewards pull both ways and leave less than this share of their pull are dropped
            (GD2PO, arXiv 2606.16771, uses 0.2); 0 keeps all. See
            :func:`maestro_pl.algorithm.advantages.consensus_factor`.
        consensus_scale: also multiply a group's advantages by the share of its responses that was kept (GD2PO's second
            part).

    Raises:
        UserError: a value outside its range.
    """

    aggregation: Aggregation = "sum_then_normalize"
    scale: Scaling = "group"
    scope: Scope = "response"
    min_consensus: float = 0.0
    consensus_scale: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        check_choice("model.advantages.aggregation", self.aggregation, Aggregation)
        check_choice("model.advantages.scale", self.scale, Scaling)
        check_choice("model.advantages.scope", self.scope, Scope)
        if self.scale != "group" and self.aggregation != "sum_then_normalize":
            raise UserError(
                f"model.advantages.scale={self.scale} with aggregation={self.aggregation}, which has a scale of its own: leave "
                "scale out, or give aggregation: sum_then_normalize."
            )
        if not 0 <= self.min_consensus <= 1:
            raise UserError(f"model.advantages.min_consensus={self.min_consensus}: expected a share in [0, 1].")
        if self.consensus_scale and not self.min_consensus:
            raise UserError(
                "model.advantages.consensus_scale=true with min_consensus=0, which drops nothing: give min_consensus, for "
                "instance 0.2."
            )


@dataclass(frozen=True)
class Anchoring:
    """Which groups the anchors label, and what of the labels enters the reward (Eq. 14).

    Attributes:
        fraction: share of the groups that the rewards with role ``anchor`` score in training, where the meta-signal or
            ``hybrid`` reads them; null is one group a step. Groups left out cost nothing.
        seed: of the draw of those groups.
        hybrid: on labelled groups, the share of the anchor itself in the scalar reward; the rest is the weighed reward. 0
            trains the policy on the weighed rewards only.
        unlabelled: what groups without a label train the policy on: the ``weighed`` rewards, or nothing (``skipped``),
            which with ``hybrid: 1`` uses the labels alone.
        coverage: of the groups of a batch, label first those whose tasks were labelled least, so that a rare task is not
            left without a label; false draws them whatever their task.
        unlabelled_tasks: the weights of a task of which the anchors have said nothing yet, while they have of others:
            ``equal`` ones; ``weighed`` by what was learned elsewhere, which can be worse than equal; ``skipped``: none, so
            that its rewards do not train the policy.
        shrink: multiply the advantages of a group by how well its weighed reward is expected to correlate with the anchor, by
            what the Conductor has learned from labels of the task; with ``hybrid`` a labelled group's by that of its mixture,
            1 for the labels alone. Tasks of which the last fit knew nothing keep theirs. Needs an ``AnchorSignal`` and a
            :class:`maestro_pl.RidgeLearner` that is fitted to values or choices.
        responses: how many responses of a labelled group an anchor is shown; null shows all, and so does a number of at
            least ``rollout.group_size``.
        shown: which: the ones whose rewards differ most (``spread``), or drawn at ``random``.

    Raises:
        UserError: a value outside its range.
    """

    fraction: float | None = None
    seed: int = 0
    hybrid: float = 0.0
    unlabelled: Unlabelled = "weighed"
    coverage: bool = True
    unlabelled_tasks: UnlabelledTasks = "equal"
    shrink: bool = False
    responses: int | None = None
    shown: Shown = "spread"

    def __post_init__(self) -> None:
        """Check every value."""
        check_choice("model.anchoring.unlabelled_tasks", self.unlabelled_tasks, UnlabelledTasks)
        check_choice("model.anchoring.shown", self.shown, Shown)
        check_at_least("model.anchoring.seed", self.seed, 0)
        if self.responses is not None and self.responses < 2:
            raise UserError(
                f"model.anchoring.responses={self.responses}: expected at least 2 responses of a group, which can be told "
                "apart, or null for all."
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise UserError(
                f"model.anchoring.fraction={self.fraction}: expected a share of the groups in (0, 1], or null for one group "
                "a step."
            )
        if not 0 <= self.hybrid <= 1:
            raise UserError(
                f"model.anchoring.hybrid={self.hybrid}: expected the anchor's share of the reward on labelled groups, in "
                "[0, 1]."
            )
        check_choice("model.anchoring.unlabelled", self.unlabelled, Unlabelled)
        if self.unlabelled == "skipped" and self.hybrid != 1:
            raise UserError(
                f"model.anchoring.unlabelled=skipped trains on the labels alone, and model.anchoring.hybrid={self.hybrid}: "
                "give hybrid: 1, or unlabelled: weighed."
            )


def check_at_least(where: str, value: float, least: float) -> None:
    """Raise where a number is below its bound, or no number.

    Raises:
        UserError: names the setting, the value and the bound.
    """
    if not value >= least:
        raise UserError(f"{where}={value}: expected at least {least}.")
