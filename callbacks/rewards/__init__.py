"""Reward callbacks: each scores the responses of a batch's rollout."""

from callbacks.rewards.base import Reward
from callbacks.rewards.best_of import BestOfAnchor
from callbacks.rewards.choice import ChoiceReward
from callbacks.rewards.embedding import EmbeddingReward
from callbacks.rewards.entropy import EntropyReward
from callbacks.rewards.format import FormatReward
from callbacks.rewards.function import FunctionReward
from callbacks.rewards.judge import JudgeReward
from callbacks.rewards.labels import LabelFileReward
from callbacks.rewards.length import LengthReward
from callbacks.rewards.match import ContainsReward, ExactMatchReward
from callbacks.rewards.math import MathReward
from callbacks.rewards.people import PeopleAnchor
from callbacks.rewards.perplexity import PerplexityReward
from callbacks.rewards.preference import PreferenceReward
from callbacks.rewards.story import StoryReward
from callbacks.rewards.translation import TranslationReward

__all__ = [
    "BestOfAnchor",
    "ChoiceReward",
    "ContainsReward",
    "EmbeddingReward",
    "EntropyReward",
    "ExactMatchReward",
    "FormatReward",
    "FunctionReward",
    "JudgeReward",
    "LabelFileReward",
    "LengthReward",
    "MathReward",
    "PeopleAnchor",
    "PerplexityReward",
    "PreferenceReward",
    "Reward",
    "StoryReward",
    "TranslationReward",
]
