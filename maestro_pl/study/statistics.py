"""What the votes of people say: pure functions on arrays.

Shapes: ``_C`` pairs of systems, ``_P`` prompts, ``_R`` raters, ``_S`` systems, ``_K`` bootstrap draws. A vote is 1 where
the first system of the pair is preferred, 0 where the second is, 0.5 for a tie, NaN where nobody was asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PRIOR = 0.5  # wins that each system of a pair is given beforehand, so that a strength is finite where one always wins
ORDERED = (0.0, 0.5, 1.0)  # second better, tie, first better


@dataclass(frozen=True)
class Estimate:
    """A number and its percentile interval; NaN where the votes do not tell."""

    value: float
    low: float
    high: float


def pairs_of(systems: int) -> list[tuple[int, int]]:
    """The C pairs of S systems, in the order of ``_C``."""
    return list(itertools.combinations(range(systems), 2))


def draws(tasks_P: Sequence[str], raters: int, resamples: int, generator: np.random.Generator) -> tuple[Any, Any]:
    """How often every draw takes each prompt, and each rater.

    Prompts and raters are drawn with replacement, independently of each other (the pigeonhole bootstrap of crossed factors,
    Owen 2007, https://doi.org/10.1214/07-AOAS122), prompts within their task, whose number the plan fixes. Everything that
    is compared uses the same draws, which makes differences paired. A single rater is not drawn: intervals then hold for
    this rater.

    Returns:
        Float64 [K, P] and [K, R].
    """
    tasks = np.asarray(tasks_P)
    prompts_KP = np.zeros((resamples, len(tasks)))
    for task in dict.fromkeys(tasks_P):
        places = np.flatnonzero(tasks == task)
        prompts_KP[:, places] = generator.multinomial(len(places), np.full(len(places), 1 / len(places)), resamples)
    if raters == 1:
        return prompts_KP, np.ones((resamples, 1))
    return prompts_KP, generator.multinomial(raters, np.full(raters, 1 / raters), resamples).astype(float)


def wins(votes_CPR: Any, prompts_KP: Any, raters_KR: Any) -> tuple[Any, Any]:
    """The weighed sum of the votes of every pair, and how many votes that is.

    Returns:
        Float64 [K, C] each.
    """
    known_CPR = ~np.isnan(votes_CPR)
    filled_CPR = np.where(known_CPR, votes_CPR, 0.0)

    def total(values_CPR: Any) -> Any:
        return np.stack([((prompts_KP @ values_PR) * raters_KR).sum(axis=1) for values_PR in values_CPR], axis=1)

    return total(filled_CPR), total(known_CPR.astype(float))


def shares(won_KC: Any, asked_KC: Any) -> Any:
    """Win rates, ties as half a win; NaN for a draw without a vote."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(asked_KC > 0, won_KC / asked_KC, np.nan)


def strengths(won_C: Any, asked_C: Any, systems: int) -> Any:
    """Bradley-Terry strengths: log-odds, their mean 0; P(i before j) = 1 / (1 + exp(s_j - s_i)).

    Bradley and Terry 1952, by iterative Luce spectral ranking (``choix``); a tie is half a win of each, and every pair that
    was asked about has :data:`PRIOR` further wins on either side.

    Args:
        won_C: votes for the first system of each pair, ties as half.
        asked_C: votes on each pair.
        systems: S.

    Returns:
        Float64 [S]; NaN where some system was compared with none.
    """
    import choix

    wins_SS = np.zeros((systems, systems))
    for (one, other), won, asked in zip(pairs_of(systems), won_C, asked_C, strict=True):
        if asked > 0:
            wins_SS[one, other], wins_SS[other, one] = won + PRIOR, asked - won + PRIOR
    if not _connected(wins_SS > 0):
        return np.full(systems, np.nan)
    if systems == 2:  # what the iteration comes to
        half = 0.5 * np.log(wins_SS[0, 1] / wins_SS[1, 0])
        return np.array([half, -half])
    found = choix.ilsr_pairwise_dense(wins_SS)
    return found - found.mean()


def _connected(compared_SS: Any) -> bool:
    reached, waiting = {0}, [0]
    while waiting:
        new = set(np.flatnonzero(compared_SS[waiting.pop()]).tolist()) - reached
        reached |= new
        waiting += new
    return len(reached) == len(compared_SS)


def estimate(value: float, drawn_K: Any, confidence: float) -> Estimate:
    """The value with the percentile interval of its draws."""
    known = np.asarray(drawn_K)[~np.isnan(drawn_K)]
    if np.isnan(value) or not len(known):
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(value), float(low), float(high))


def units_of(votes_CPR: Any) -> tuple[Any, Any]:
    """How many raters gave each value of :data:`ORDERED` to each question, and the question's prompt.

    Returns:
        Float64 [U, 3] and int [U], for the U questions with at least one vote.
    """
    counts = np.stack([(votes_CPR == value).sum(axis=2) for value in ORDERED], axis=2)  # [C, P, 3]
    prompts = np.broadcast_to(np.arange(counts.shape[1]), counts.shape[:2])
    some = counts.sum(axis=2) > 0
    return counts[some].astype(float), prompts[some]


def alpha(counts_U3: Any) -> float:
    """Krippendorff's alpha of the votes, which are ordinal: second better, tie, first better.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability" (package ``krippendorff``).

    Returns:
        1 for agreement in everything, 0 for agreement by chance; NaN where no question has two votes, or all votes are
        equal, so that there is nothing to agree on.
    """
    import krippendorff

    paired = counts_U3[counts_U3.sum(axis=1) >= 2]
    if not len(paired) or (paired.sum(axis=0) > 0).sum() < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=paired, value_domain=list(ORDERED), level_of_measurement="ordinal"))


def pair_agreement(counts_U3: Any, weights_U: Any) -> float:
    """The share of pairs of raters who gave the same vote to the same question; NaN without such a pair."""
    votes = counts_U3.sum(axis=1)
    pairs = float((weights_U * votes * (votes - 1)).sum())
    same = float((weights_U[:, None] * counts_U3 * (counts_U3 - 1)).sum())
    return same / pairs if pairs else float("nan")


def with_people(people_CP: Any, differences_CP: Any, weights_KP: Any) -> tuple[Any, int]:
    """How often a number goes the way most people go.

    Args:
        people_CP: the mean vote less 0.5, NaN where nobody voted.
        differences_CP: the number of the first system less that of the second, NaN where either has none.
        weights_KP: of the prompts.

    Returns:
        Float64 [K] (half a point where the number does not tell two answers apart), over the questions on which people are
        not split evenly; and how many these are.
    """
    used_CP = ~np.isnan(people_CP) & ~np.isnan(differences_CP) & (np.abs(np.nan_to_num(people_CP)) > 1e-12)
    agree_CP = np.where(
        used_CP, 0.5 + 0.5 * np.sign(np.nan_to_num(people_CP)) * np.sign(np.nan_to_num(differences_CP)), 0
    )
    total_K = weights_KP @ used_CP.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total_K > 0, (weights_KP @ agree_CP.sum(axis=0)) / total_K, np.nan), int(used_CP.sum())


def rater_with_others(votes_CPR: Any, weights_KP: Any, raters_KR: Any) -> tuple[Any, int]:
    """The same of a rater with all the others, which is what a metric can hope for.

    Returns:
        Float64 [K], and how many votes of single raters it is over.
    """
    agree, total, number = 0.0, 0.0, 0
    known_CPR = ~np.isnan(votes_CPR)
    sums_CP, counts_CP = np.nansum(votes_CPR, axis=2), known_CPR.sum(axis=2)
    for rater in range(votes_CPR.shape[2]):
        own_CP, known_CP = votes_CPR[:, :, rater], known_CPR[:, :, rater]
        others = counts_CP - known_CP
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_CP = np.where(others > 0, (sums_CP - np.nan_to_num(own_CP)) / others, np.nan)
        drawn_K, used = with_people(mean_CP - 0.5, own_CP - 0.5, np.eye(own_CP.shape[1]))
        per_P = np.nan_to_num(drawn_K)  # a prompt's own share; how many questions it is over:
        used_P = (~np.isnan(own_CP) & ~np.isnan(mean_CP) & (np.abs(np.nan_to_num(mean_CP) - 0.5) > 1e-12)).sum(axis=0)
        agree = agree + raters_KR[:, rater] * (weights_KP @ (per_P * used_P))
        total = total + raters_KR[:, rater] * (weights_KP @ used_P)
        number += used
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(total) > 0, np.asarray(agree) / np.asarray(total), np.nan), number
