"""The sandbox's experiments: statistics by hand, cells, and one whole experiment in small."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks.sandbox import __main__ as command
from benchmarks.sandbox import known_optimum, sensitivity, static_search
from benchmarks.sandbox.cells import Cell, Protocol, describe, module_of, rewards_of
from benchmarks.sandbox.methods import anchored, labels_alone, oracle_weights, seeded
from benchmarks.sandbox.runner import digest, finished, key_of, take_over
from benchmarks.sandbox.statistics import mean_interval, ratio_interval, share
from maestro_pl.sandbox import TASKS, noisy_utility, rows, true_utility
from maestro_pl.sandbox.utility import UTILITY_SD


def entry(name: str, seed: int, utility: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "seed": seed, "labelled_groups": 3, "groups": 9, "tokens": 100, "cell": describe(Cell(name, seed)),
        "utility": dict.fromkeys(["all", *TASKS], utility), **more,
    }  # fmt: skip


def test_shares_are_paired_over_seeds() -> None:
    table = {"equal": [0.2, 0.3], "oracle": [0.6, 0.7], "m": [0.5, 0.6], "n": [0.4, 0.5]}
    assert share(table, "m") == {
        "share": 0.75,
        "low": 0.75,
        "high": 0.75,
    }  # the same in both seeds, whatever their level
    assert share(table, "m", other="n") == {"share": 0.25, "low": 0.25, "high": 0.25}
    assert share(table, "equal")["share"] == 0.0


def test_the_interval_by_hand() -> None:
    gain, whole = [1.0, 2.0, 3.0], [4.0, 4.0, 4.0]
    ratio, low, high = ratio_interval(gain, whole)
    assert ratio == pytest.approx(0.5)
    half = stats.t.ppf(0.975, 2) * 1.0 / math.sqrt(3) / 4.0
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    assert ratio_interval([1.0], [2.0])[1:] == (-math.inf, math.inf)
    assert mean_interval([1.0, 1.0])["mean"] == 1.0


def test_the_noise_of_the_anchor_is_what_it_says() -> None:
    row = rows("train", ["reply"], n_per_task=1)[0]
    given = {key: row[key] for key in ("task", "subject", "target", "prompt")}
    text = "<think>x</think><answer>cheers</answer>"
    errors = []
    for seed in range(800):
        true = true_utility(text, row["task"], row["subject"], row["target"])
        errors.append((noisy_utility(text, noise=2.0, seed=seed, **given) - true) / UTILITY_SD)
    assert sum(errors) / 800 == pytest.approx(0.0, abs=0.25)
    assert math.sqrt(sum(e * e for e in errors) / 800) == pytest.approx(2.0, rel=0.1)
    again = [noisy_utility(text, noise=2.0, seed=3, **given) for _ in range(2)]
    assert again[0] == again[1]
    assert noisy_utility(text, noise=0.0, **given) == true_utility(text, row["task"], row["subject"], row["target"])


def test_new_wordings_are_new_and_stay_in_their_split() -> None:
    usual, new = rows("test", n_per_task=20), rows("test", n_per_task=20, new_templates=True)
    assert not {row["prompt"] for row in usual} & {row["prompt"] for row in new}
    assert {row["task"] for row in new} == set(TASKS)
    # what is asked for is the same: numbers, topics and messages still stand in the prompt
    for row in (row for row in new if row["task"] == "arithmetic"):
        a, _, b = row["subject"].split()[:3]
        assert a in row["prompt"]
        assert b in row["prompt"]


@pytest.mark.parametrize("labels", [1.0, 0.25, 0.0625, 0.02])
def test_labels_count_the_warm_up(labels: float) -> None:
    protocol = Protocol()
    cell = anchored("x", protocol, labels=labels, warmup=1)
    schedule = module_of(cell).outer.schedule
    drawn = sum(int(schedule.draw(protocol.batch, step).sum()) for step in range(protocol.steps))
    assert abs(drawn + protocol.batch - labels * protocol.groups) <= 1
    alone = module_of(labels_alone("y", protocol, labels)).outer.schedule
    drawn_alone = sum(int(alone.draw(protocol.batch, step).sum()) for step in range(protocol.steps))
    assert abs(drawn_alone - labels * protocol.groups) <= 1  # the same number of labels


def test_the_oracle_weighs_each_family_by_its_own_vector() -> None:
    cell = Cell("oracle", 0, weigher="static", weights=oracle_weights())
    names = [reward.name for reward in rewards_of(cell) if reward.role == "train"]
    assert names == [f"{r}.{t}" for t in TASKS for r in ("format", "length", "entropy", "perplexity", "preference")]
    assert all(reward.tasks == [reward.name.split(".")[1]] for reward in rewards_of(cell) if reward.role == "train")


def test_a_result_belongs_to_what_shaped_it(tmp_path: Path) -> None:
    first, other = anchored("x", Protocol()), anchored("x", Protocol(), noise=2.0)
    assert key_of(first) != key_of(other)
    assert key_of(first.with_seed(1)) != key_of(first)
    path = tmp_path / "runs.jsonl"
    line = json.dumps(entry("x", 0, 0.5, cell=describe(first)))
    path.write_text(line + "\n" + line[:40])  # killed while it wrote
    assert list(finished(path)) == [key_of(first)]
    older = {key: value for key, value in describe(first).items() if key != "new_templates"}
    assert digest(json.loads(json.dumps(older))) == key_of(first)  # an option that came later, at its default


def test_runs_of_a_results_file_are_known(tmp_path: Path) -> None:
    cell = anchored("x", Protocol())
    results, path = tmp_path / "results.json", tmp_path / "new" / "runs.jsonl"
    results.write_text(
        json.dumps({"runs": [entry("x", 0, 0.5, cell=describe(cell)), {"offline": "base", "shares": []}]})
    )
    for _ in range(2):
        take_over(results, path)
    assert list(finished(path)) == [key_of(cell)]
    assert len(path.read_text().splitlines()) == 1


def test_every_method_is_a_cell_of_its_own() -> None:
    for cells in (known_optimum.known_optimum(Protocol()), sensitivity.trained_variants(Protocol())):
        assert len({cell.name for cell in cells}) == len({key_of(cell) for cell in cells}) == len(cells)
    assert len(seeded(known_optimum.known_optimum(Protocol()), [0, 1])) == 2 * len(
        known_optimum.known_optimum(Protocol())
    )


def test_the_search_tunes_each_family_for_itself() -> None:
    tried = [({"format": float(i)}, {task: {"format": float(i)} for task in TASKS}) for i in range(2)]
    results = []
    for i in range(2):
        results.append(entry(f"tune all {i}", 200, 0.1 * i))
        utility = {"all": 0.0, **{task: (1 - i if task == "reply" else i) * 0.5 for task in TASKS}}
        results.append({**entry(f"tune task {i}", 200, 0.0), "utility": utility})
    every, per_task = static_search.tuned(results, tried, Protocol())
    assert every.weights == {"all": {"format": 1.0}}
    assert {task: row["format"] for task, row in per_task.weights.items()} == {
        "arithmetic": 1.0, "brainstorm": 1.0, "explain": 1.0, "reply": 0.0,
    }  # fmt: skip


@pytest.mark.slow
def test_an_experiment_in_small_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command, "QUICK", Protocol(steps=2, batch=4, eval_prompts=2, eval_group=2)
    )  # in a process apart
    arguments = ["--experiment", "known_optimum", "--quick", "--jobs", "1", "--folder", str(tmp_path)]
    command.main(arguments)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["experiment"] == "known_optimum"
    assert list(summary["methods"]) == ["equal", "oracle", "anchor 0.0625", "labels 0.0625"]
    assert summary["methods"]["oracle"]["share"] == 1.0
    assert summary["methods"]["anchor 0.0625"]["labelled_groups"] >= 4
    assert (tmp_path / "sandbox_known_optimum_quick.json").exists()
    command.main(arguments)
    again = capsys.readouterr().out
    assert "8 runs, 8 of them known" in again
    assert json.loads(again.splitlines()[-1]) == summary


def test_methods_can_be_chosen_and_unknown_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Cell] = []
    monkeypatch.setattr(known_optimum, "run_all", lambda cells, path, jobs: ran.extend(cells) or [])
    known_optimum.run(Protocol(), [1, 2], tmp_path, 1, False, methods=["paper"])
    assert [(cell.name, cell.seed) for cell in ran] == [
        (name, seed) for seed in (1, 2) for name in ("equal", "oracle", "paper")
    ]
    with pytest.raises(ValueError, match=r"no method \['papr'\]"):
        known_optimum.run(Protocol(), [1], tmp_path, 1, False, methods=["papr"])
