"""Lightning callbacks that a user swaps: rollout, rewards, loggers, records."""

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

__all__ = [
    "ContainsReward",
    "EntropyReward",
    "ExactMatchReward",
    "FormatReward",
    "FunctionReward",
    "LengthReward",
    "PerplexityReward",
    "PreferenceReward",
    "Reward",
]
