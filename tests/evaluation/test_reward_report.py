"""What the rewards are worth: sums over groups, correlations with intervals over groups, verdicts."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from maestro_pl.evaluation.reward_report import AgreementSums, ReportRow, RewardStatistics
from maestro_pl.evaluation.reward_report_tables import NO_ANCHOR, PAIRS, csv_table, json_report, report_text
from maestro_pl.rollout import RewardScores, RewardSpec, Role, Rollout
from tests.support import make_rollout

NAN = float("nan")


def rollout_of_scores(
    group_size: int, rewards: dict[str, tuple[Role, list[Any]]], tasks: list[str] | None = None
) -> Rollout:
    scored = {name: RewardScores.from_list(RewardSpec(name, role), v) for name, (role, v) in rewards.items()}
    count = len(next(iter(rewards.values()))[1])
    columns: dict[str, list[Any]] = {} if tasks is None else {"task": tasks}
    return make_rollout(["r"] * count, group_size=group_size, fields={"rewards": scored}, **columns)


def rows_by_name(statistics: RewardStatistics, task: str = "a") -> dict[str, ReportRow]:
    return {row.reward: row for row in statistics.rows() if row.task == task}


def test_a_row_by_hand() -> None:
    # groups of three: two that differ, one that does not, one with a single score
    values = [1.0, 2.0, 6.0, 0.0, 0.0, 3.0, 4.0, 4.0, 4.0, 5.0, None, None]
    statistics = RewardStatistics()
    statistics.add(rollout_of_scores(3, {"x": ("train", values)}), {"x": range(11)})
    row = rows_by_name(statistics)["x"]
    assert (row.n, row.applied, row.groups, row.told_apart) == (11, 10, 3, 2)
    assert row.mean == pytest.approx(2.9)
    assert row.spread == pytest.approx(math.sqrt((14 + 6) / 6))  # squares inside groups over their degrees of freedom
    assert row.anchor is None
    assert row.verdict is None


def test_a_correlation_is_the_mean_over_groups_where_both_differ() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 5, 4)).round(3)
    one[3] = 1.0  # tells nothing apart there
    statistics = RewardStatistics()
    statistics.add(
        rollout_of_scores(4, {"x": ("train", one.ravel().tolist()), "y": ("metric", other.ravel().tolist())})
    )
    found = rows_by_name(statistics)["x"].others["y"]
    expected = [np.corrcoef(one[n], other[n])[0, 1] for n in (0, 1, 2, 4)]
    assert found.groups == 4
    assert found.r == pytest.approx(np.mean(expected), abs=1e-6)
    assert rows_by_name(statistics)["y"].others["x"] == found


def test_only_responses_that_both_apply_to_count() -> None:
    statistics = RewardStatistics()
    x, y = [1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, None]
    statistics.add(rollout_of_scores(4, {"x": ("train", x), "y": ("train", y)}))
    assert rows_by_name(statistics)["x"].others["y"].r == pytest.approx(1.0)


def test_the_interval_is_never_narrower_than_luck() -> None:
    # three groups of two whose correlations are 1: one chance in four of the same sign in all
    sums = AgreementSums(groups=3, total=3.0, squares=3.0, chance=3.0)
    assert sums.agreement().low < 0
    # by hand: the spread between groups rules where it is the larger one
    sums = AgreementSums(groups=4, total=0.0, squares=3.0, chance=0.4)
    assert sums.agreement().high == pytest.approx(min(1.0, 3.182446 * math.sqrt(3.0 / 3 / 4)))
    sums = AgreementSums(groups=100, total=50.0, squares=26.0, chance=4.0)
    assert sums.agreement().high == pytest.approx(0.5 + 1.984217 * 0.02, abs=1e-6)
    assert math.isnan(AgreementSums(1, 1.0, 1.0, 1.0).agreement().low)
    assert math.isnan(AgreementSums().agreement().r)


def test_verdicts_of_rewards_with_and_against_an_anchor() -> None:
    torch.manual_seed(3)
    count, size = 24, 8
    truth = torch.randn(count * size)
    rewards: dict[str, tuple[Role, list[Any]]] = {
        "good": ("train", (truth + torch.randn(count * size)).tolist()),
        "bad": ("train", (-truth + 2 * torch.randn(count * size)).tolist()),
        "flat": ("train", [1.0] * (count * size)),
        "absent": ("train", [None] * (count * size)),
        "gold": ("anchor", truth.tolist()),
    }
    statistics = RewardStatistics()
    statistics.add(rollout_of_scores(size, rewards))
    rows = rows_by_name(statistics)
    assert [rows[name].verdict for name in rewards] == ["helps", "hurts", "silent", "silent", None]
    assert rows["flat"].because == "it tells no group apart"
    assert rows["absent"].because == "it applies to nothing"
    assert set(rows["good"].others) == {"bad", "flat", "absent"}  # the anchor has columns of its own


def test_noise_is_silent_about_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(1)
    truth, noise = rng.normal(size=(300, 12 * 4)), rng.integers(0, 2, size=(300, 12 * 4)).astype(float)
    verdicts = []
    for one, other in zip(truth, noise, strict=True):
        statistics = RewardStatistics()
        statistics.add(rollout_of_scores(4, {"x": ("train", other.tolist()), "gold": ("anchor", one.tolist())}))
        verdicts.append(rows_by_name(statistics)["x"].verdict)
    assert 0.9 < verdicts.count("silent") / len(verdicts) < 1.0


def test_an_anchor_speaks_on_its_labelled_groups_only() -> None:
    gold: list[Any] = [0.0, 1.0, None, None, 1.0, 0.0]
    statistics = RewardStatistics()
    statistics.add(
        rollout_of_scores(2, {"x": ("train", [0.0, 1.0] * 3), "gold": ("anchor", gold)}), {"gold": [0, 1, 4, 5]}
    )
    rows = rows_by_name(statistics)
    assert rows["x"].anchor is not None
    assert rows["x"].anchor.groups == 2
    assert (rows["gold"].n, rows["gold"].applied) == (4, 4)


def test_what_training_takes_for_rounding_tells_nothing_apart() -> None:
    statistics = RewardStatistics()
    statistics.add(rollout_of_scores(2, {"x": ("train", [1e8, 1e8 + 8, 1.0, 2.0])}))
    row = rows_by_name(statistics)["x"]
    assert (row.groups, row.told_apart) == (2, 1)


def two_tasks() -> list[Rollout]:
    torch.manual_seed(5)
    made = []
    for _ in range(3):
        x, y, gold = torch.randn(3, 12).tolist()
        rewards: dict[str, tuple[Role, list[Any]]] = {
            "x": ("train", x), "y": ("gate", [*y[:8], *[None] * 4]), "gold": ("anchor", [*gold[:8], *[None] * 4]),
        }  # fmt: skip
        made.append(rollout_of_scores(4, rewards, ["a", "a", "b"]))
    return made


def test_batches_add_up_to_the_whole_and_survive_a_checkpoint() -> None:
    whole, first, resumed = RewardStatistics(), RewardStatistics(), RewardStatistics()
    asked = {"gold": range(8), "y": range(8)}
    *before, last = two_tasks()
    for rollout in (*before, last):
        whole.add(rollout, asked)
    for rollout in before:
        first.add(rollout, asked)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed.add(last, asked)
    assert list(resumed.tasks) == ["a", "b"]
    for mine, theirs in zip(resumed.rows(), whole.rows(), strict=True):
        assert (mine.task, mine.reward, mine.n, mine.told_apart) == (
            theirs.task, theirs.reward, theirs.n, theirs.told_apart,
        )  # fmt: skip
        assert [mine.mean, mine.spread] == pytest.approx([theirs.mean, theirs.spread], nan_ok=True)
        assert mine.anchor == pytest.approx(theirs.anchor) if mine.anchor else theirs.anchor is None


def test_memory_does_not_grow_with_the_run() -> None:
    statistics = RewardStatistics()
    sizes = set()
    for rollout in two_tasks() * 3:
        statistics.add(rollout)
        sizes.add(sum(len(task["rewards"]) + len(task["pairs"]) for task in statistics.state_dict().values()))
    assert len(sizes) == 1


def test_the_text_has_a_table_a_task_and_says_where_no_anchor_is() -> None:
    statistics = RewardStatistics()
    for rollout in two_tasks():
        statistics.add(rollout, {"gold": range(8), "y": range(8)})
    text = report_text(statistics)
    blocks = text.split("\n\n")
    assert blocks[0].startswith("a: 24 responses in 6 groups\nreward")
    assert "with the anchor" in blocks[0]
    assert "gold    anchor" in blocks[0]
    found = rows_by_name(statistics)["x"].others["y"]
    half = max(found.r - found.low, found.high - found.r)
    assert blocks[1] == f"{PAIRS}\n   x\ny  {found.r:+.2f} ±{half:.2f}"
    assert blocks[2].startswith("b: 12 responses in 3 groups\n")
    assert "with the anchor" not in blocks[2]
    assert "gold" not in blocks[2]
    assert blocks[3].startswith("all tasks: 36 responses in 9 groups\n")
    assert "No anchor gave a score in b: its columns are left out there." in text
    assert NO_ANCHOR not in text


def test_without_an_anchor_its_columns_are_left_out_and_that_is_said() -> None:
    statistics = RewardStatistics()
    statistics.add(rollout_of_scores(2, {"x": ("train", [0.0, 1.0])}))
    text = report_text(statistics)
    assert text.endswith(NO_ANCHOR)
    assert "verdict" not in text
    (line,) = csv.DictReader(io.StringIO(csv_table(statistics.rows())))
    assert "verdict" not in line
    assert line["told_apart_share"] == "1.0"


def test_an_anchor_that_was_not_asked_is_named_and_not_asked_for() -> None:
    statistics = RewardStatistics()
    statistics.add(rollout_of_scores(2, {"x": ("train", [0.0, 1.0])}))
    note = report_text(statistics, ["gold"]).split("\n\n")[-1]
    assert note.startswith(
        "The anchor 'gold' was asked about none of these responses, so nothing says which rewards help"
    )
    assert "under `anchors`" not in note
    assert "The anchors 'gold', 'judge' were asked about none" in report_text(statistics, ["gold", "judge"])


def test_csv_and_json_hold_every_number() -> None:
    statistics = RewardStatistics()
    for rollout in two_tasks():
        statistics.add(rollout, {"gold": range(8), "y": range(8)})
    lines = list(csv.DictReader(io.StringIO(csv_table(statistics.rows()))))
    found = json.loads(json_report(statistics))
    assert list(found["tasks"]) == ["a", "b", "all"]
    for line in lines:
        held = found["tasks"][line["task"]]["rewards"][line["reward"]]
        assert float(line["mean"]) == held["mean"]
        assert int(line["applied"]) == held["applied"]
        assert line["verdict"] == (held["verdict"] or "")
        if line["reward"] == "x" and line["task"] != "b":
            assert float(line["y low"]) == held["others"]["y"]["low"]
            assert float(line["anchor_r"]) == held["anchor"]["r"]
    (only,) = [line for line in lines if line["task"] == "b"]
    assert only["reward"] == "x"
    assert only["y r"] == only["anchor_r"] == ""
