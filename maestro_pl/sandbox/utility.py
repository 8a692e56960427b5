"""The true utility of a response, computed from its text: the number that the five rewards only approximate."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from itertools import pairwise

from maestro_pl.errors import UserError
from maestro_pl.rewards.format import format_score, parse_response
from maestro_pl.sandbox.lexicon import ACTS, FACTS, IDEAS

TAGS = re.compile(r"</?(?:think|answer)>")
#: What is left of the utility of a response that is not exactly a think block and then an answer block.
BROKEN_FORMAT = 0.5
#: Standard deviation of the true utility over the untrained policy's responses, the unit of :func:`noisy_utility`.
UTILITY_SD = 0.27


def answer_of(completion: str) -> str:
    """The answer block of a well-formed response, else whatever follows the last opening that is there."""
    parsed = parse_response(completion)
    if parsed.valid and parsed.answer is not None:
        return parsed.answer
    for opening in ("<answer>", "</think>"):
        if opening in completion:
            completion = completion.rsplit(opening, 1)[1]
            break
    return TAGS.sub(" ", completion.split("</answer>")[0]).strip()


def words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"[a-z]+|\d+", text.lower())


def brevity(count: int, limit: int, zero: int) -> float:
    """1 up to ``limit`` words, falling linearly to 0 at ``zero``."""
    return 1.0 if count <= limit else max(0.0, (zero - count) / (zero - limit))


def arithmetic(answer: str, subject: str, target: int) -> float:
    """1 / (1 + distance of the first number to the result), times brevity (4 words are free, 24 leave 0.2)."""
    found = words(answer)
    numbers = [int(word) for word in found if word.isdigit()]
    if not numbers:
        return 0.0
    return (0.2 + 0.8 * brevity(len(found), 4, 24)) / (1 + abs(numbers[0] - target))


def items(answer: str) -> list[str]:
    """The last word of each segment between commas and "and"."""
    segments = [words(segment) for segment in re.split(r",|\band\b", answer.lower())]
    return [segment[-1] for segment in segments if segment]


def brainstorm(answer: str, subject: str, target: int) -> float:
    """Different ideas on the topic, over ``target``: a fresh one counts 1, a stock one 0.3, any other or repeated -0.3."""
    stock, fresh = IDEAS[subject]
    seen: set[str] = set()
    total = 0.0
    for item in items(answer):
        value = 1.0 if item in fresh else 0.3 if item in stock else -0.3
        total += -0.3 if item in seen else value
        seen.add(item)
    return min(1.0, max(0.0, total / target))


def reply(answer: str, subject: str, target: int) -> float:
    """How well one line fits the act: two fresh expressions are best; at most ``target`` words, more cost.

    Fit is 0.1, a stock phrase makes it 0.3, one fresh expression 0.65 and two 1. A repeated word costs its share of the
    words.
    """
    found = words(answer)
    if not found:
        return 0.0
    text = f" {' '.join(found)} "
    _, stock, fresh = ACTS[subject]
    hits = sum(f" {expression} " in text for expression in fresh)
    fit = (0.3 if f" {stock} " in text else 0.1) if hits == 0 else 0.65 if hits == 1 else 1.0
    return fit * brevity(len(found), target, 3 * target) * len(set(found)) / len(found)


def explain(answer: str, subject: str, target: int) -> float:
    """The share of the facts told, in their own order of words, times the closeness of the length to ``target`` words.

    A fact counts by the share of its pairs of neighbouring words in the answer; repeated pairs of the answer cost their
    share. Length is graded from 0.4 (far off) to 1.
    """
    found = words(answer)
    pairs = list(pairwise(found))
    if not pairs:
        return 0.0
    told = 0.0
    for fact in FACTS[subject]:
        wanted = list(pairwise(fact.split()))
        told += sum(pair in pairs for pair in wanted) / len(wanted) / len(FACTS[subject])
    closeness = max(0.0, 1 - abs(len(found) - target) / target)
    return told * (0.4 + 0.6 * closeness) * len(set(pairs)) / len(pairs)


UTILITIES: dict[str, Callable[[str, str, int], float]] = {
    "arithmetic": arithmetic,
    "brainstorm": brainstorm,
    "reply": reply,
    "explain": explain,
}
TASKS = tuple(UTILITIES)


def true_utility(completion: str, task: str, subject: str, target: int) -> float:
    """Score one response of the sandbox by what its task truly wants.

    Args:
        completion: the response text, tags included, without special tokens.
        task: the family of the row.
        subject: the row's ``subject`` column.
        target: the row's ``target`` column.

    Returns:
        A number in [0, 1]; halved where the response is not exactly a think block and then an answer block.

    Raises:
        UserError: the task is not one of the sandbox.
    """
    if task not in UTILITIES:
        raise UserError(f"The sandbox has no task {task!r}; its tasks are {', '.join(TASKS)}.")
    quality = UTILITIES[task](answer_of(completion), subject, target)
    return quality * (1.0 if format_score(completion) else BROKEN_FORMAT)


def noisy_utility(
    completion: str, task: str, subject: str, target: int, prompt: str, noise: float = 1.0, seed: int = 0
) -> float:
    """The true utility as a judge that errs sees it: an anchor for experiments.

    Args:
        completion: the response text, tags included.
        task: the family of the row.
        subject: the row's ``subject`` column.
        target: the row's ``target`` column.
        prompt: the row's prompt.
        noise: standard deviation of the error, in units of :data:`UTILITY_SD`.
        seed: of the error, which depends on it and on prompt and response only: asked twice, the judge errs alike.

    Returns:
        A number around the true utility; not bounded.
    """
    utility = true_utility(completion, task, subject, target)
    digest = hashlib.sha256(f"{seed}\0{prompt}\0{completion}".encode()).digest()
    return utility + noise * UTILITY_SD * random.Random(digest).gauss(0.0, 1.0)


def simulated_choice(
    responses: list[str], task: str, subject: str, target: int, prompt: str, noise: float = 1.0, seed: int = 0
) -> int:
    """The response that a person who errs calls the best: an anchor for experiments (``callbacks.BestOfAnchor``).

    Args:
        responses: what is shown, tags included.
        task: the family of the row.
        subject: the row's ``subject`` column.
        target: the row's ``target`` column.
        prompt: the row's prompt.
        noise: standard deviation of the error at each look at a response, in units of :data:`UTILITY_SD`.
        seed: of the errors, which depend on it and on what is shown: another set of responses is looked at anew.

    Returns:
        The place of the best among ``responses``.
    """
    shown = "\0".join(responses)
    seen = random.Random(hashlib.sha256(f"choice\0{seed}\0{prompt}\0{shown}".encode()).digest())
    looks = [
        true_utility(text, task, subject, target) + noise * UTILITY_SD * seen.gauss(0.0, 1.0) for text in responses
    ]
    return max(range(len(looks)), key=looks.__getitem__)
