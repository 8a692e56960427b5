"""Lightning callbacks that a user swaps: rollout, rewards, loggers, records."""

from callbacks.checkpoint import RunCheckpoint
from callbacks.health import ConductorHealth
from callbacks.memory import MemoryProbe
from callbacks.progress import StageProgressBar
from callbacks.records import ResponseRecorder
from callbacks.report import EvaluationReport
from callbacks.response_table import ResponseTable
from callbacks.reward_report import RewardReport
from callbacks.reward_table import RewardTable
from callbacks.rewards import (
    BestOfAnchor,
    ChoiceReward,
    ContainsReward,
    EmbeddingReward,
    EntropyReward,
    ExactMatchReward,
    FormatReward,
    FunctionReward,
    JudgeReward,
    LabelFileReward,
    LengthReward,
    MathReward,
    PeopleAnchor,
    PerplexityReward,
    PreferenceReward,
    Reward,
    StoryReward,
    TranslationReward,
)
from callbacks.rollout import RolloutGenerator
from callbacks.weights import WeightDistributionLogger

__all__ = [
    "BestOfAnchor",
    "ChoiceReward",
    "ConductorHealth",
    "ContainsReward",
    "EmbeddingReward",
    "EntropyReward",
    "EvaluationReport",
    "ExactMatchReward",
    "FormatReward",
    "FunctionReward",
    "JudgeReward",
    "LabelFileReward",
    "LengthReward",
    "MathReward",
    "MemoryProbe",
    "PeopleAnchor",
    "PerplexityReward",
    "PreferenceReward",
    "ResponseRecorder",
    "ResponseTable",
    "Reward",
    "RewardReport",
    "RewardTable",
    "RolloutGenerator",
    "RunCheckpoint",
    "StageProgressBar",
    "StoryReward",
    "TranslationReward",
    "WeightDistributionLogger",
]
