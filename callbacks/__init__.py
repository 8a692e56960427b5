"""Lightning callbacks that a user swaps: rollout, rewards, loggers, records."""

from callbacks.checkpoint import RunCheckpoint
from callbacks.progress import StageProgressBar
from callbacks.records import ResponseRecorder
from callbacks.report import EvaluationReport
from callbacks.rewards import (
    ContainsReward,
    EntropyReward,
    ExactMatchReward,
    FormatReward,
    FunctionReward,
    LengthReward,
    PerplexityReward,
    PreferenceReward,
    Reward,
)
from callbacks.rollout import RolloutGenerator
from callbacks.weights import WeightDistributionLogger

__all__ = [
    "ContainsReward",
    "EntropyReward",
    "EvaluationReport",
    "ExactMatchReward",
    "FormatReward",
    "FunctionReward",
    "LengthReward",
    "PerplexityReward",
    "PreferenceReward",
    "ResponseRecorder",
    "Reward",
    "RolloutGenerator",
    "RunCheckpoint",
    "StageProgressBar",
    "WeightDistributionLogger",
]
