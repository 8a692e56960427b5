"""Rewards of the campaign's runs; a file of its own, because configs name them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from maestro_pl.sandbox import noisy_utility


def drawing(completion: str, **columns: Any) -> float:
    """The share of vowels, with a small error that is drawn from every global generator there is."""
    error = random.random() + float(np.random.sample()) + float(torch.rand(()))  # noqa: NPY002
    return sum(letter in "aeiou" for letter in completion) / max(len(completion), 1) + 1e-3 * error


_calls = iter(range(10**9))
AT = 11  # the response whose score is odd


def nan(completion: str, **columns: Any) -> float:
    """A score that is NaN once, which says that the reward does not apply."""
    return float("nan") if next(_calls) == AT else drawing(completion)


def infinite(completion: str, **columns: Any) -> float:
    """A score that is infinite once."""
    return float("inf") if next(_calls) == AT else drawing(completion)


def nan_anchor(completion: str, task: str, subject: str, target: int, prompt: str) -> float:
    """An anchor that is NaN once."""
    return float("nan") if next(_calls) == AT else noisy_utility(completion, task, subject, target, prompt)
