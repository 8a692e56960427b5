"""Rewards of configs/real/ that no class of ``callbacks`` gives: a budget a task, fluency, words of the prompt, and more.

Each is a proxy with a blind spot, as rewards are. ``budget`` knows how long an answer should be, not what it should
say; ``fluency`` likes any whole sentence without loops; ``on_topic`` likes a story about its theme and, as much, a
sentence that was copied in place of being translated.
"""

from __future__ import annotations

import re
from itertools import pairwise

from maestro_pl.errors import UserError
from maestro_pl.rewards.length import length_penalty

_WORD = re.compile(r"[^\W_]+")
_END = re.compile(r"[.!?…][\"'”’»)\]]*\s*$")


def budget(completion: str, task: str, budgets: dict[str, list[int]]) -> float | None:
    """0 for a response whose words are within its task's budget, and a penalty down to -1 outside.

    Args:
        completion: the response.
        task: of its prompt.
        budgets: task to the fewest and the most words; other tasks have no budget, and no score.

    Raises:
        UserError: a budget is not two numbers.
    """
    if task not in budgets:
        return None
    bounds = budgets[task]
    if len(bounds) != 2:
        raise UserError(f"The budget of {task} is {bounds!r}, expected the fewest and the most words: [4, 30].")
    return length_penalty(len(completion.split()), minimum=bounds[0], maximum=bounds[1])


def fluency(completion: str) -> float:
    """The mean of two: 1 if the response ends as a sentence does, and the share of its trigrams that repeat none before.

    An empty response has 0; one of fewer than three words has no trigram, and repeats none.
    """
    words = [word.lower() for word in _WORD.findall(completion)]
    if not words:
        return 0.0
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    fresh = len(set(trigrams)) / len(trigrams) if trigrams else 1.0
    return (float(bool(_END.search(completion))) + fresh) / 2


def on_topic(completion: str, prompt_text: str) -> float:
    """The share of the response's different words of four letters or more that also stand in the prompt; 0 if it has none."""
    said = _content_words(completion)
    return len(said & _content_words(prompt_text)) / len(said) if said else 0.0


def _content_words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text) if len(word) > 3}


def brevity(completion: str) -> float:
    """The fewer words, the better; an empty response is no shorter than one word."""
    return -float(max(len(completion.split()), 1))


def richness(completion: str) -> float:
    """The number of different words."""
    return float(len({word.lower() for word in _WORD.findall(completion)}))


def own_words(completion: str, prompt_text: str) -> float:
    """The share of the response's different pairs of neighbouring words that do not stand in the prompt; 0 if it has none."""
    said = _pairs(completion)
    return len(said - _pairs(prompt_text)) / len(said) if said else 0.0


def _pairs(text: str) -> set[tuple[str, str]]:
    words = [word.lower() for word in _WORD.findall(text)]
    return set(pairwise(words))
