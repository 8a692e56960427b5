"""How the Conductor learns: what a decision was worth (signals), what is kept of it (buffer), who fits (learners)."""

from maestro_pl.conductor.anchor import AnchorSignal, anchor_values
from maestro_pl.conductor.buffer import Decisions, MetaBuffer
from maestro_pl.conductor.credits import distribution_entropy, meta_loss, pairwise_loss
from maestro_pl.conductor.learners import GradientLearner, Learner, LearnerName, ReinforceLearner, make_learner
from maestro_pl.conductor.lookahead import LookaheadSignal
from maestro_pl.conductor.ridge import RidgeLearner
from maestro_pl.conductor.schedule import LabelSchedule
from maestro_pl.conductor.signals import AdvantageSignal, CombinedSignal, Credit, MetaSignal, Observation

__all__ = [
    "AdvantageSignal",
    "AnchorSignal",
    "CombinedSignal",
    "Credit",
    "Decisions",
    "GradientLearner",
    "LabelSchedule",
    "Learner",
    "LearnerName",
    "LookaheadSignal",
    "MetaBuffer",
    "MetaSignal",
    "Observation",
    "ReinforceLearner",
    "RidgeLearner",
    "anchor_values",
    "distribution_entropy",
    "make_learner",
    "meta_loss",
    "pairwise_loss",
]
