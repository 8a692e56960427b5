"""Every number of a report, against raters of known skill and sums done by hand."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maestro_pl.cli import main
from maestro_pl.errors import UserError
from maestro_pl.study.plan import Study, write_study
from maestro_pl.study.report import PEOPLE, results_of
from maestro_pl.study.statistics import (
    alpha,
    draws,
    estimate,
    pair_agreement,
    rater_with_others,
    shares,
    strengths,
    wins,
    with_people,
)
from maestro_pl.study.store import FILE, Clicks
from maestro_pl.study.tables import latex, markdown, write_report
from maestro_pl.study.votes import votes_of
from tests.support.studies import clicks_of, study_of

NAN = float("nan")


def test_win_rates_of_a_table_by_hand() -> None:
    votes_CPR = np.array([[[1.0, 1.0], [0.5, 0.0], [NAN, 1.0]]])
    won, asked = wins(votes_CPR, np.ones((1, 3)), np.ones((1, 2)))
    assert (won[0, 0], asked[0, 0]) == (3.5, 5)
    won, asked = wins(votes_CPR, np.array([[2.0, 1, 0]]), np.array([[2.0, 0]]))  # the first prompt and rater twice
    assert (won[0, 0], asked[0, 0]) == (2 * 2 * 1 + 2 * 0.5, 6)


def test_alpha_of_a_table_by_hand() -> None:
    """Two raters, four questions: (1, 1), (1, 1), (0, 0), (1, 0). Nominal and ordinal are one with two values.

    Coincidences: 1 with 1: 4, 0 with 0: 2, 1 with 0: 2 (both orders); n = 8, n1 = 5, n0 = 3.
    Observed disagreement 2 / 8, expected 2 * 5 * 3 / (8 * 7): alpha = 1 - 0.25 / (30 / 56) = 1 - 14 / 30.
    """
    counts = np.array([[0.0, 0, 2], [0, 0, 2], [2, 0, 0], [1, 0, 1], [0, 1, 0]])  # the last has one vote only
    assert alpha(counts) == pytest.approx(1 - 14 / 30)
    assert pair_agreement(counts, np.ones(5)) == pytest.approx(0.75)
    assert alpha(np.array([[0.0, 0, 2], [2, 0, 0]])) == pytest.approx(1.0)
    assert math.isnan(alpha(np.array([[0.0, 0, 2], [0, 0, 2]])))
    near, far = np.array([[0.0, 1, 1], [2, 0, 0], [0, 0, 2]]), np.array([[1.0, 0, 1], [2, 0, 0], [0, 0, 2]])
    assert alpha(near) > alpha(far)  # a tie is nearer to a win than a loss is


def test_strengths_are_the_log_odds_of_two_and_recovered_exactly_for_three() -> None:
    two = strengths(np.array([29.5]), np.array([39.0]), 2)
    assert two[0] - two[1] == pytest.approx(math.log(30 / 10))
    true = np.array([0.7, 0.0, -0.7])
    odds = [1 / (1 + math.exp(true[b] - true[a])) for a, b in ((0, 1), (0, 2), (1, 2))]
    asked = np.full(3, 1e6)
    assert strengths(np.array(odds) * asked, asked, 3) == pytest.approx(true, abs=1e-4)
    assert np.isnan(strengths(np.array([1.0, 0, 0]), np.array([2.0, 0, 0]), 3)).all()  # nobody compared the third


def test_agreement_with_people_by_hand() -> None:
    people_CP = np.array([[0.5, -0.5, 0.5, 0.0, NAN]])
    metric_CP = np.array([[2.0, 1.0, 0.0, 1.0, 1.0]])  # with, against, cannot tell, people split, nobody asked
    value, n = with_people(people_CP, metric_CP, np.ones((1, 5)))
    assert (value[0], n) == (pytest.approx(0.5), 3)
    value, _ = with_people(people_CP, metric_CP, np.array([[3.0, 1, 0, 0, 0]]))
    assert value[0] == pytest.approx(0.75)
    votes_CPR = np.array([[[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]])
    value, n = rater_with_others(votes_CPR, np.ones((1, 2)), np.ones((1, 3)))
    assert (value[0], n) == (pytest.approx(3 / 4), 4)  # of the first prompt only the third rater has a majority to meet


def test_prompts_are_drawn_within_tasks_and_a_single_rater_is_not_drawn() -> None:
    prompts_KP, raters_KR = draws(["a", "b", "a"], 3, 200, np.random.default_rng(0))
    assert (prompts_KP[:, [0, 2]].sum(axis=1) == 2).all()
    assert (prompts_KP[:, 1] == 1).all()
    assert (raters_KR.sum(axis=1) == 3).all()
    assert raters_KR.std() > 0
    assert (draws(["a"], 1, 100, np.random.default_rng(0))[1] == 1).all()


def test_raters_of_known_skill_are_recovered(tmp_path: Path) -> None:
    true = [0.8, 0.0, -0.8]
    study = study_of(tmp_path, 3, 60, raters=4)
    results = results_of(study, clicks_of(study, true, ties=0.1), resamples=200)
    for row, value in zip(results.strengths, true, strict=True):
        assert row.low < 0.9 * value + 0.02 < row.high or row.low < value < row.high  # ties draw strengths together
        assert row.high - row.low < 0.6
    first = results.win_rates[0]
    expected = 0.05 + 0.9 / (1 + math.exp(-0.8))
    assert first.low < expected < first.high
    assert first.wins + first.ties + first.losses == 240


def test_intervals_cover_where_prompts_and_raters_differ(tmp_path: Path) -> None:
    """Two equal systems: the true win rate is a half, and 95 % intervals hold it; those over votes alone do not."""
    study = study_of(tmp_path, 2, 24, raters=8, checks=0)
    held = naive = 0
    for seed in range(40):
        clicks = clicks_of(study, [0.0, 0.0], seed, prompt_spread=1.0, rater_spread=0.7)
        votes_CPR = votes_of(study, clicks, 0.0).all_CPR
        drawn = draws(["story"] * 24, 8, 200, np.random.default_rng(seed))
        rate = float(np.nanmean(votes_CPR))
        found = estimate(rate, shares(*wins(votes_CPR, *drawn))[:, 0], 0.95)
        held += found.low <= 0.5 <= found.high
        naive += abs(rate - 0.5) <= 1.96 * math.sqrt(rate * (1 - rate) / (24 * 8))
    assert held >= 35
    assert naive < held


def test_raters_who_do_not_read_are_left_out_and_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2, 40, raters=4, checks=6)
    clicks = clicks_of(study, [2.0, -2.0], careless=["R4"])
    results = results_of(study, clicks, resamples=100)
    assert [row.counted for row in results.raters] == [True, True, True, False]
    assert any(note.startswith("R4 is left out: passed") for note in results.notes)
    assert results.win_rates[0].wins + results.win_rates[0].losses == 120
    everybody = results_of(study, clicks, least_passed=0.0, resamples=100)
    assert everybody.agreement[0].same < results.agreement[0].same
    with pytest.raises(UserError, match="no vote that counts yet"):
        results_of(study, [], resamples=100)


def test_a_metric_that_people_follow_agrees_and_its_opposite_does_not(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2, 30)
    told = [{"judge": 1.0, "length": 1.0, "half": 1.0}, {"judge": 0.0, "length": 2.0}]
    study = replace(study, prompts=[replace(prompt, rewards_S=told) for prompt in study.prompts])
    results = results_of(study, clicks_of(study, [9.0, -9.0]), resamples=100)
    found = {row.metric: row.agreement for row in results.metrics}
    assert found == {"judge": 1.0, "length": 0.0, PEOPLE: 1.0}  # `half` has nothing to be compared with


def test_equal_answers_count_as_ties_and_not_as_agreement(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2, 10, raters=2, checks=0)
    raters = [replace(r, items=[item for item in r.items if item.prompt != 0]) for r in study.raters]
    study = replace(study, raters=raters, equal=[(0, 0, 1)])
    results = results_of(study, clicks_of(study, [9.0, -9.0]), resamples=100)
    row = results.win_rates[0]
    assert (row.wins, row.ties, row.losses, row.win_rate) == (18, 2, 0, pytest.approx(19 / 20))
    assert math.isnan(results.agreement[0].alpha)
    assert any("not asked" in note for note in results.notes)


@pytest.fixture
def answered(tmp_path: Path) -> tuple[Path, Study]:
    study = study_of(tmp_path, 3, 8, ("story", "a|b & <c>"))
    write_study(study, tmp_path / "study")
    store = Clicks(tmp_path / "study" / FILE)
    for click in clicks_of(study, [1.0, 0.0, -1.0]):
        store.add(click.rater, click.place, click.choice)
    return tmp_path / "study", study


@pytest.mark.slow
def test_files_of_a_report_and_compare_reads_them(
    answered: tuple[Path, Study], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = answered
    main(["study", "report", str(folder), "--resamples", "100"])
    out = capsys.readouterr().out
    assert "Bradley-Terry strengths" in out
    report = folder / "report"
    names = {"win_rates", "strengths", "agreement", "metrics", "raters", "votes"}
    assert {path.stem for path in report.glob("*.csv")} == names
    with (report / "win_rates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["run"], row["baseline"]) for row in rows[-3:]] == [
        ("all", "A", "B"), ("all", "A", "C"), ("all", "B", "C")
    ]  # fmt: skip
    assert (report / "study.png").read_bytes().startswith(b"\x89PNG")
    folders = sorted(map(str, (report / "compare").iterdir()))
    main(["compare", *folders, "--resamples", "100", "--baseline", "1-A"])
    assert "reward/people" in capsys.readouterr().out


@pytest.mark.slow
def test_markdown_and_latex_escape_names(answered: tuple[Path, Study], tmp_path: Path) -> None:
    folder, study = answered
    study = replace(study, systems=["=cmd|x", "b_1", "c"])
    results = results_of(study, Clicks(folder / FILE).all(), resamples=100)
    assert r"a\|b & <c>" in markdown(results)
    assert r"b\_1" in latex(results)
    write_report(results, tmp_path / "out")
    assert ",'=cmd|x," in (tmp_path / "out" / "win_rates.csv").read_text()
