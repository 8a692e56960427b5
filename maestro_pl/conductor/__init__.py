"""Who weighs the rewards, and how it learns: weighers, signals (what a decision was worth), learners, the outer loop."""

from maestro_pl.algorithm.scalar_reward import anchor_values
from maestro_pl.conductor.adaptive import CTWAWeights, SAWWeights, ScheduledWeights, SharedWeights
from maestro_pl.conductor.anchor import AnchorSignal
from maestro_pl.conductor.buffer import Decisions, MetaBuffer
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.credits import distribution_entropy, meta_loss, pairwise_loss
from maestro_pl.conductor.influence import GradientWeights
from maestro_pl.conductor.learners import GradientLearner, Learner, ReinforceLearner
from maestro_pl.conductor.lookahead import LookaheadSignal
from maestro_pl.conductor.meta import LearnerName, Meta, make_learner
from maestro_pl.conductor.outer_loop import OuterLoop
from maestro_pl.conductor.progress import DynaOptWeights, HypervolumeWeights
from maestro_pl.conductor.ridge import RidgeLearner
from maestro_pl.conductor.schedule import LabelSchedule
from maestro_pl.conductor.signals import AdvantageSignal, CombinedSignal, Credit, MetaSignal, Observation
from maestro_pl.conductor.weighers import (
    EqualWeights,
    FixedWeights,
    RandomWeights,
    Scored,
    Seen,
    WeighedRollout,
    Weigher,
    Weighing,
)

__all__ = [
    "AdvantageSignal",
    "AnchorSignal",
    "CTWAWeights",
    "CombinedSignal",
    "Conductor",
    "Credit",
    "Decisions",
    "DynaOptWeights",
    "EqualWeights",
    "FixedWeights",
    "GradientLearner",
    "GradientWeights",
    "HypervolumeWeights",
    "LabelSchedule",
    "Learner",
    "LearnerName",
    "LookaheadSignal",
    "Meta",
    "MetaBuffer",
    "MetaSignal",
    "Observation",
    "OuterLoop",
    "RandomWeights",
    "ReinforceLearner",
    "RidgeLearner",
    "SAWWeights",
    "ScheduledWeights",
    "Scored",
    "Seen",
    "SharedWeights",
    "WeighedRollout",
    "Weigher",
    "Weighing",
    "anchor_values",
    "distribution_entropy",
    "make_learner",
    "meta_loss",
    "pairwise_loss",
]
