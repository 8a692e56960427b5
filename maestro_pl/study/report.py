"""The results of a study: from votes to rows with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maestro_pl.errors import UserError
from maestro_pl.study.answers import ALL
from maestro_pl.study.plan import Study
from maestro_pl.study.statistics import (
    Estimate,
    alpha,
    draws,
    estimate,
    pair_agreement,
    pairs_of,
    rater_with_others,
    shares,
    strengths,
    units_of,
    wins,
    with_people,
)
from maestro_pl.study.store import Click
from maestro_pl.study.votes import RaterRow, VoteRow, votes_of

PEOPLE = "a rater, with the others"
FEW_RATERS = 5


@dataclass(frozen=True)
class WinRate:
    """How often ``run`` was preferred to ``baseline``, a tie as half.

    Attributes:
        wins, ties, losses: votes; equal answers, which nobody was asked about, are among the ties.
        prompts: with a vote.
    """

    task: str
    run: str
    baseline: str
    win_rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    prompts: int


@dataclass(frozen=True)
class Strength:
    """A Bradley-Terry strength, log-odds with mean 0 over the runs."""

    task: str
    run: str
    strength: float
    low: float
    high: float


@dataclass(frozen=True)
class RaterAgreement:
    """How far raters agree.

    Attributes:
        alpha: Krippendorff's, ordinal; ``low`` and ``high`` over prompts.
        same: the share of pairs of raters who gave the same vote.
        questions: with at least two votes.
    """

    task: str
    alpha: float
    low: float
    high: float
    same: float
    questions: int


@dataclass(frozen=True)
class MetricAgreement:
    """How often a recorded reward prefers the answer that most people prefer; 0.5 is chance.

    Attributes:
        n: questions on which people are not split evenly; for people, votes of single raters.
    """

    task: str
    metric: str
    agreement: float
    low: float
    high: float
    n: int


@dataclass
class Results:
    """Everything that a report says.

    Attributes:
        people_SP: for each system and prompt the mean vote against the others; NaN without a vote.
        notes: sentences below the tables.
    """

    study: Study
    confidence: float
    win_rates: list[WinRate] = field(default_factory=list)
    strengths: list[Strength] = field(default_factory=list)
    agreement: list[RaterAgreement] = field(default_factory=list)
    metrics: list[MetricAgreement] = field(default_factory=list)
    raters: list[RaterRow] = field(default_factory=list)
    votes: list[VoteRow] = field(default_factory=list)
    people_SP: Any = None
    notes: list[str] = field(default_factory=list)


def results_of(
    study: Study,
    clicks: Sequence[Click],
    least_passed: float = 0.75,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Results:
    """Compute the report.

    Args:
        study: the plan.
        clicks: what stands.
        least_passed: the share of attention checks that a rater has to pass to be counted.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        confidence: of the intervals.

    Raises:
        UserError: a number is out of range, or there is no vote that counts.
    """
    if not 0 <= least_passed <= 1 or resamples < 100 or seed < 0 or not 0 < confidence < 1:
        raise UserError(
            f"--least-passed {least_passed}, --resamples {resamples}, --seed {seed}, --confidence {confidence}: expected "
            "between 0 and 1, at least 100, at least 0, and between 0 and 1."
        )
    votes = votes_of(study, clicks, least_passed)
    out = Results(study, confidence, raters=votes.raters, votes=votes.rows)
    if np.isnan(votes.asked_CPR).all():
        left_out = [row.rater for row in votes.raters if not row.counted]
        why = f" ({', '.join(left_out)} failed the attention checks)" if left_out else ""
        raise UserError(f"There is no vote that counts yet{why}: `maestro-pl study serve` shows the questions.")
    out.people_SP = _people(votes.all_CPR, len(study.systems))
    tasks_P = [prompt.task for prompt in study.prompts[: votes.all_CPR.shape[1]]]
    tasks = list(dict.fromkeys(tasks_P))
    drawn = draws(tasks_P, votes.all_CPR.shape[2], resamples, np.random.default_rng(seed))
    for task in [*tasks, *([ALL] if len(tasks) > 1 else [])]:
        places = [place for place, name in enumerate(tasks_P) if task in (name, ALL)]
        part = _Part(task, out, votes.asked_CPR[:, places], votes.all_CPR[:, places], (drawn[0][:, places], drawn[1]))
        part.win_rates_and_strengths()
        part.agreement()
        part.metrics(places)
    out.notes = [*_method(out, resamples), *_warnings(out, least_passed)]
    return out


def _people(votes_CPR: Any, systems: int) -> Any:
    sums, counts = np.zeros((systems, votes_CPR.shape[1])), np.zeros((systems, votes_CPR.shape[1]))
    known_CP = (~np.isnan(votes_CPR)).sum(axis=2)
    won_CP = np.nansum(votes_CPR, axis=2)
    for (one, other), won_P, known_P in zip(pairs_of(systems), won_CP, known_CP, strict=True):
        sums[one], sums[other] = sums[one] + won_P, sums[other] + known_P - won_P
        counts[one], counts[other] = counts[one] + known_P, counts[other] + known_P
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


class _Part:
    """The rows of one task, or of all."""

    def __init__(self, task: str, out: Results, asked_CPR: Any, all_CPR: Any, drawn: tuple[Any, Any]) -> None:
        self.task, self.out, self.asked_CPR, self.all_CPR = task, out, asked_CPR, all_CPR
        self.prompts_KP, self.raters_KR = drawn
        self.once = np.ones((1, all_CPR.shape[1])), np.ones((1, all_CPR.shape[2]))

    def win_rates_and_strengths(self) -> None:
        names, pairs = self.out.study.systems, pairs_of(len(self.out.study.systems))
        won, asked = wins(self.all_CPR, *self.once)
        won_KC, asked_KC = wins(self.all_CPR, self.prompts_KP, self.raters_KR)
        point, drawn = shares(won, asked)[0], shares(won_KC, asked_KC)
        for place, (one, other) in enumerate(pairs):
            votes_PR = self.all_CPR[place]
            if asked[0, place]:
                rate = self._estimate(point[place], drawn[:, place])
                win, tie, loss = (int((votes_PR == value).sum()) for value in (1.0, 0.5, 0.0))
                prompts = int((~np.isnan(votes_PR)).any(axis=1).sum())
                named = self.task, names[one], names[other]
                self.out.win_rates.append(WinRate(*named, rate.value, rate.low, rate.high, win, tie, loss, prompts))
        strength_S = strengths(won[0], asked[0], len(names))
        strength_KS = np.array([strengths(w, a, len(names)) for w, a in zip(won_KC, asked_KC, strict=True)])
        for place, name in enumerate(names):
            found = self._estimate(strength_S[place], strength_KS[:, place])
            self.out.strengths.append(Strength(self.task, name, found.value, found.low, found.high))

    def agreement(self) -> None:
        counts_U3, prompt_U = units_of(self.asked_CPR)
        if not len(counts_U3):
            return
        drawn = [alpha(np.repeat(counts_U3, weights_P[prompt_U].astype(int), axis=0)) for weights_P in self.prompts_KP]
        found = self._estimate(alpha(counts_U3), np.array(drawn))
        same = pair_agreement(counts_U3, np.ones(len(counts_U3)))
        several = int((counts_U3.sum(axis=1) >= 2).sum())
        if several:
            self.out.agreement.append(RaterAgreement(self.task, found.value, found.low, found.high, same, several))

    def metrics(self, places: Sequence[int]) -> None:
        with np.errstate(invalid="ignore"):
            known_CP = (~np.isnan(self.asked_CPR)).sum(axis=2)
            people_CP = (
                np.where(known_CP > 0, np.nansum(self.asked_CPR, axis=2) / np.maximum(known_CP, 1), np.nan) - 0.5
            )
        rewards = [self.out.study.prompts[place].rewards_S for place in places]
        for name in dict.fromkeys(name for rewards_S in rewards for each in rewards_S for name in each):
            values_PS = np.array([[each.get(name, np.nan) for each in rewards_S] for rewards_S in rewards])
            differences_CP = np.array([values_PS[:, a] - values_PS[:, b] for a, b in pairs_of(values_PS.shape[1])])
            self._metric(name, with_people(people_CP, differences_CP, self.once[0]),
                         with_people(people_CP, differences_CP, self.prompts_KP)[0])  # fmt: skip
        self._metric(PEOPLE, rater_with_others(self.asked_CPR, *self.once),
                     rater_with_others(self.asked_CPR, self.prompts_KP, self.raters_KR)[0])  # fmt: skip

    def _metric(self, name: str, point: tuple[Any, int], drawn_K: Any) -> None:
        value, n = point
        if n:
            found = self._estimate(value[0], drawn_K)
            self.out.metrics.append(MetricAgreement(self.task, name, found.value, found.low, found.high, n))

    def _estimate(self, value: float, drawn_K: Any) -> Estimate:
        return estimate(value, drawn_K, self.out.confidence)


def _method(out: Results, resamples: int) -> list[str]:
    counted = sum(row.counted and row.answered > 0 for row in out.raters)
    over = "prompts (within their task) and raters" if counted > 1 else "prompts"
    return [
        f"{out.confidence:.0%} intervals: percentile bootstrap over {over}, {resamples} draws, the same ones for all that is "
        "compared. A tie is half a win. Strengths are Bradley-Terry log-odds with mean 0; alpha is Krippendorff's for "
        "ordinal votes, its interval over prompts. The agreement of a metric is how often it prefers the answer that most "
        "people prefer; 0.5 is chance."
    ]


def _warnings(out: Results, least_passed: float) -> list[str]:
    said = []
    for row in out.raters:
        if not row.counted:
            said.append(
                f"{row.rater} is left out: passed {row.passed} of {row.checks} attention checks, and "
                f"{least_passed:.0%} are needed."
            )
        elif row.answered < row.asked:
            said.append(f"{row.rater} has answered {row.answered} of {row.asked} questions.")
    counted = sum(row.counted and row.answered > 0 for row in out.raters)
    if counted == 1:
        said.append("There is a single rater: the intervals say nothing about what other people would prefer.")
    elif counted < FEW_RATERS:
        said.append(f"With {counted} raters, intervals tell little of how far other people would differ.")
    if equal := len(out.study.equal):
        said.append(f"{equal} questions were not asked, because both answers are equal; they count as ties.")
    for agreement in out.agreement:
        if np.isnan(agreement.alpha):
            said.append(f"{agreement.task}: all votes are equal, so there is no alpha.")
    return said
