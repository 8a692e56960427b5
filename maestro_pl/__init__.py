"""maestro_pl: GRPO with a Conductor that weighs the rewards of every response (MAESTRO, arXiv 2601.07208)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maestro_pl.algorithm.schedule import Schedule
    from maestro_pl.algorithm.settings import KL, Advantages, Anchoring, Loss
    from maestro_pl.conductor.adaptive import CTWAWeights, SAWWeights, ScheduledWeights
    from maestro_pl.conductor.anchor import AnchorSignal
    from maestro_pl.conductor.conductor import Conductor
    from maestro_pl.conductor.influence import GradientWeights
    from maestro_pl.conductor.learners import GradientLearner, ReinforceLearner
    from maestro_pl.conductor.lookahead import LookaheadSignal
    from maestro_pl.conductor.meta import Meta
    from maestro_pl.conductor.progress import DynaOptWeights, HypervolumeWeights
    from maestro_pl.conductor.ridge import RidgeLearner
    from maestro_pl.conductor.signals import AdvantageSignal, CombinedSignal
    from maestro_pl.conductor.weighers import EqualWeights, FixedWeights, RandomWeights, Weigher, Weighing
    from maestro_pl.data import PromptDataModule
    from maestro_pl.errors import UserError
    from maestro_pl.generation import NativeEngine, VLLMEngine, VLLMServerEngine
    from maestro_pl.module import MaestroModule
    from maestro_pl.policy.loading import LoRA
    from maestro_pl.policy.policy import LoRAPolicy
    from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
    from maestro_pl.sft import SFTModule
    from maestro_pl.training.fsdp import FSDP2Strategy

__version__ = "0.1.0"

# names are imported when they are first used, so that `maestro-pl --version` does not wait for torch
_HOME = {
    "AdvantageSignal": "conductor.signals",
    "AnchorSignal": "conductor.anchor",
    "CombinedSignal": "conductor.signals",
    "Conductor": "conductor.conductor",
    "Advantages": "algorithm.settings",
    "Anchoring": "algorithm.settings",
    "KL": "algorithm.settings",
    "Loss": "algorithm.settings",
    "Meta": "conductor.meta",
    "EqualWeights": "conductor.weighers",
    "FSDP2Strategy": "training.fsdp",
    "FixedWeights": "conductor.weighers",
    "GradientLearner": "conductor.learners",
    "LoRA": "policy.loading",
    "LoRAPolicy": "policy.policy",
    "LookaheadSignal": "conductor.lookahead",
    "MaestroModule": "module",
    "NativeEngine": "generation",
    "PromptDataModule": "data",
    "RandomWeights": "conductor.weighers",
    "ReinforceLearner": "conductor.learners",
    "RewardScores": "rollout",
    "RewardSpec": "rollout",
    "RidgeLearner": "conductor.ridge",
    "Rollout": "rollout",
    "SFTModule": "sft",
    "Schedule": "algorithm.schedule",
    "UserError": "errors",
    "VLLMEngine": "generation",
    "VLLMServerEngine": "generation",
    "CTWAWeights": "conductor.adaptive",
    "SAWWeights": "conductor.adaptive",
    "ScheduledWeights": "conductor.adaptive",
    "GradientWeights": "conductor.influence",
    "DynaOptWeights": "conductor.progress",
    "HypervolumeWeights": "conductor.progress",
    "Weigher": "conductor.weighers",
    "Weighing": "conductor.weighers",
}
__all__ = [
    "KL",
    "AdvantageSignal",
    "Advantages",
    "AnchorSignal",
    "Anchoring",
    "CTWAWeights",
    "CombinedSignal",
    "Conductor",
    "DynaOptWeights",
    "EqualWeights",
    "FSDP2Strategy",
    "FixedWeights",
    "GradientLearner",
    "GradientWeights",
    "HypervolumeWeights",
    "LoRA",
    "LoRAPolicy",
    "LookaheadSignal",
    "Loss",
    "MaestroModule",
    "Meta",
    "NativeEngine",
    "PromptDataModule",
    "RandomWeights",
    "ReinforceLearner",
    "RewardScores",
    "RewardSpec",
    "RidgeLearner",
    "Rollout",
    "SAWWeights",
    "SFTModule",
    "Schedule",
    "ScheduledWeights",
    "UserError",
    "VLLMEngine",
    "VLLMServerEngine",
    "Weigher",
    "Weighing",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'maestro_pl' has no attribute {name!r}")
    return getattr(import_module(f"maestro_pl.{_HOME[name]}"), name)
