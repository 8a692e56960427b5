"""How the Conductor is trained: what it learns from, by whom it is fitted, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.algorithm.settings import check_at_least
from maestro_pl.conductor.learners import GradientLearner, Learner, ReinforceLearner
from maestro_pl.conductor.own_code import LEARNER, SIGNAL, check_begun
from maestro_pl.conductor.ridge import RidgeLearner
from maestro_pl.conductor.signals import AdvantageSignal, MetaSignal
from maestro_pl.errors import UserError, check_choice

Coupling: TypeAlias = Literal["async", "joint"]
LearnerName: TypeAlias = Literal["reinforce", "gradient", "ridge"]


@dataclass(frozen=True)
class Meta:
    """The outer loop (Eq. 9 to 13).

    Attributes:
        signal: what the Conductor learns from: ``maestro_pl.AdvantageSignal`` (the paper), ``AnchorSignal``,
            ``LookaheadSignal``, ``CombinedSignal``.
        learner: how it learns: ``reinforce`` (the paper), ``gradient`` or ``ridge``, or a learner with its options
            (``maestro_pl.RidgeLearner``, ...).
        every: M, policy steps between two updates of the Conductor; the paper's 3.
        warmup: batches before the first policy step in which the Conductor alone learns, from the untrained policy; an
            anchor labels all of their groups. They do not count in ``trainer.max_steps``, and without a Conductor there are
            none.
        coupling: ``async`` (the paper): no gradient flows between the two. ``joint``, its ablation: the policy's loss also
            moves the Conductor, through the weights, and the Conductor's also moves the policy, through h; both step at
            every optimizer step of the policy, and ``every`` is not read.
        optimizer: of the Conductor; the paper's AdamW at 5e-5.
        scheduler: of the Conductor's learning rate, stepped once an update of the Conductor; as the policy's.

    Raises:
        UserError: a value outside its range.
    """

    signal: MetaSignal = field(default_factory=AdvantageSignal)
    learner: LearnerName | Learner = "reinforce"
    every: int = 3
    warmup: int = 0
    coupling: Coupling = "async"
    optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5)
    scheduler: Schedule | LRSchedulerCallable | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        check_at_least("model.meta.every", self.every, 1)
        check_at_least("model.meta.warmup", self.warmup, 0)
        check_choice("model.meta.coupling", self.coupling, Coupling)
        if self.coupling == "joint" and self.warmup:
            raise UserError(
                f"model.meta.warmup={self.warmup} with coupling=joint: policy and Conductor step together there, so there "
                "is no warm-up; give 0."
            )
        check_begun(SIGNAL, self.signal, "entropy_coef")
        check_begun(LEARNER, self.made_learner, "unhelped")

    @cached_property
    def made_learner(self) -> Learner:
        """The learner itself, where only a name was given with its defaults."""
        return make_learner(self.learner)


def make_learner(learner: LearnerName | Learner) -> Learner:
    """A learner from its name, with its defaults, or the learner itself.

    Raises:
        UserError: no such name.
    """
    if isinstance(learner, Learner):
        return learner
    kinds: dict[str, type[Learner]] = {
        "reinforce": ReinforceLearner,
        "gradient": GradientLearner,
        "ridge": RidgeLearner,
    }
    if learner not in kinds:
        raise UserError(
            f"model.meta.learner={learner!r}: expected one of {', '.join(kinds)}, or a learner with its options."
        )
    return kinds[learner]()
