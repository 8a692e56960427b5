"""Reward callbacks: each scores the responses of a batch's rollout."""

from callbacks.rewards.base import Reward
from callbacks.rewards.entropy import EntropyReward
from callbacks.rewards.format import FormatReward
from callbacks.rewards.function import FunctionReward
from callbacks.rewards.length import LengthReward
from callbacks.rewards.match import ContainsReward, ExactMatchReward
from callbacks.rewards.perplexity import PerplexityReward
from callbacks.rewards.preference import PreferenceReward

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
