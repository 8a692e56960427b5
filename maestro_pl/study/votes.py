"""Clicks as votes: which system a rater preferred, whatever the side, and who did not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from maestro_pl.study.plan import Study
from maestro_pl.study.statistics import pairs_of
from maestro_pl.study.store import Click


@dataclass(frozen=True)
class RaterRow:
    """What a rater did.

    Attributes:
        answered, asked: questions, without checks.
        passed, checks: attention checks that were answered as they ask, and all that were answered.
        ties: questions answered with "no difference".
        left: how often the left answer was preferred, among the questions that were no tie; NaN without one.
        seconds: median between a question's being shown and the click; NaN where unknown.
        counted: whether the votes are part of the results.
    """

    rater: str
    answered: int
    asked: int
    passed: int
    checks: int
    ties: int
    left: float
    seconds: float
    counted: bool


@dataclass(frozen=True)
class VoteRow:
    """One vote, by names.

    Attributes:
        preferred: the name of a system, or ``tie``.
    """

    rater: str
    place: int
    task: str
    prompt: int
    left: str
    right: str
    check: str
    choice: str
    preferred: str
    seconds: float | None
    at: str
    counted: bool


@dataclass(frozen=True)
class Votes:
    """The votes of the raters that count.

    Attributes:
        asked_CPR: of questions: 1, 0.5, 0 or NaN (see :mod:`maestro_pl.study.statistics`); P are the prompts of questions.
        all_CPR: the same with a tie where two answers are equal, which nobody was asked about.
        raters: a row a rater, those left out too.
        rows: every click that stands.
    """

    asked_CPR: Any
    all_CPR: Any
    raters: list[RaterRow]
    rows: list[VoteRow]


def votes_of(study: Study, clicks: Sequence[Click], least_passed: float) -> Votes:
    """Read clicks with the plan.

    Args:
        study: the plan.
        clicks: what stands.
        least_passed: the share of attention checks (of those answered) that a rater has to pass to be counted.
    """
    by_rater = {rater.name: [c for c in clicks if c.rater == rater.name] for rater in study.raters}
    raters = [_rater_row(study, place, by_rater[rater.name], least_passed) for place, rater in enumerate(study.raters)]
    counted = {row.rater: row.counted for row in raters}
    rows = [
        _vote_row(study, place, click, counted[rater.name])
        for place, rater in enumerate(study.raters)
        for click in by_rater[rater.name]
    ]
    places = {pair: number for number, pair in enumerate(pairs_of(len(study.systems)))}
    names = [row.rater for row in raters if row.counted and row.answered]
    prompts = 1 + max(number for number in [*_asked_about(study), *(prompt for prompt, _, _ in study.equal)])
    asked_CPR = np.full((len(places), prompts, len(names)), np.nan)
    for number, rater in enumerate(rater for rater in study.raters if rater.name in names):
        for click in by_rater[rater.name]:
            item = rater.items[click.place]
            if item.check is None:
                preferred = {"left": item.left, "right": item.right}.get(str(click.choice))
                vote = 0.5 if preferred is None else float(preferred == item.pair[0])
                asked_CPR[places[item.pair], item.prompt, number] = vote
    all_CPR = asked_CPR.copy()
    for number, (prompt, one, other) in enumerate(study.equal):
        for each in range(min(study.votes, len(names))):
            all_CPR[places[one, other], prompt, (number + each) % len(names)] = 0.5
    return Votes(asked_CPR, all_CPR, raters, rows)


def _asked_about(study: Study) -> list[int]:
    return [item.prompt for rater in study.raters for item in rater.items if item.check is None]


def _rater_row(study: Study, number: int, clicks: Sequence[Click], least_passed: float) -> RaterRow:
    rater = study.raters[number]
    checks = [(rater.items[c.place].check, c.choice) for c in clicks if rater.items[c.place].check is not None]
    votes = [c for c in clicks if rater.items[c.place].check is None]
    passed = sum(wanted == choice for wanted, choice in checks)
    sides = [c.choice == "left" for c in votes if c.choice != "tie"]
    seconds = [c.seconds for c in votes if c.seconds is not None]
    return RaterRow(
        rater.name,
        len(votes),
        sum(item.check is None for item in rater.items),
        passed,
        len(checks),
        len(votes) - len(sides),
        sum(sides) / len(sides) if sides else float("nan"),
        median(seconds) if seconds else float("nan"),
        not checks or passed / len(checks) >= least_passed - 1e-12,
    )


def _vote_row(study: Study, number: int, click: Click, counted: bool) -> VoteRow:
    item = study.raters[number].items[click.place]
    left, right = study.systems[item.left], study.systems[item.right]
    preferred = {"left": left, "right": right}.get(str(click.choice), "tie")
    return VoteRow(
        click.rater,
        click.place,
        study.prompts[item.prompt].task,
        item.prompt,
        left,
        right,
        item.check or "",
        str(click.choice),
        preferred,
        click.seconds,
        click.at,
        counted,
    )
