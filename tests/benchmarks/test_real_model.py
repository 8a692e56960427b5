"""The comparison on a real model: its rewards, the grid it asks for, and its tables."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import real_model
from benchmarks.real_rewards import budget, fluency, on_topic
from maestro_pl.cli.resolve import resolve_config
from maestro_pl.errors import UserError
from maestro_pl.evaluation.compare_runs import Run, read_records
from maestro_pl.experiment.grid import read_grid


def test_a_budget_is_its_tasks() -> None:
    budgets = {"story": [4, 6], "choice": [1, 2]}
    assert budget("one two three four", "story", budgets) == 0
    assert budget("one", "story", budgets) == pytest.approx(-3 / 4)
    assert budget("one two three", "choice", budgets) == pytest.approx(-1 / 2)
    assert budget("one", "other", budgets) is None
    with pytest.raises(UserError, match=r"The budget of a is \[1\]"):
        budget("one", "a", {"a": [1]})


def test_fluency_likes_whole_sentences_without_loops() -> None:
    assert fluency("I like my dog.") == 1
    assert fluency("I like my dog") == pytest.approx(0.5)
    assert fluency('She said "no!"') == 1
    assert fluency("a b c a b c.") == pytest.approx((1 + 3 / 4) / 2)  # abc bca cab abc
    assert fluency("Yes.") == 1
    assert fluency("...") == 0


def test_on_topic_counts_words_of_the_prompt() -> None:
    assert on_topic("Brave rabbits sleep in the sun.", "A story about RABBITS that sleep") == pytest.approx(2 / 3)
    assert on_topic("to be or no", "to be or not") == 0


# -- the benchmark
# -------------------------------------------------------------------------------------------------------

ANCHORS = {
    "gsm8k": "reward/anchor_gsm8k",
    "emobench": "reward/anchor_emobench",
    "opus_books": "reward/anchor_opus_books",
    "ss_gen": "reward/anchor_ss_gen",
}


def evaluated(folder: Path, shift: float) -> list[Any]:
    """An evaluation of two prompts a task, whose anchors are 0.1 and 0.3, and ``shift`` more in stories."""
    folder.mkdir(parents=True)
    path = folder / "test_prompts.csv"
    values = [(task, place, 0.1 + 0.2 * place + shift * (task == "ss_gen")) for task in ANCHORS for place in (0, 1)]
    rows = [
        (f"{task}-{place}", task, metric, value if metric == ANCHORS[task] else "nan")
        for task, place, value in values
        for metric in ANCHORS.values()
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "task", "metric", "value"), *rows])
    path.with_suffix(".json").write_text(json.dumps({"prompts": {}}))
    return [read_records(path)]


def test_the_anchors_are_told_apart_by_their_tasks() -> None:
    assert real_model.anchor_of_task() == ANCHORS
    assert all(anchor["init_args"]["role"] == "anchor" for anchor in real_model.anchors())


@pytest.mark.slow
def test_the_table_gives_each_tasks_own_anchor_and_what_is_above_equal(tmp_path: Path) -> None:
    shifts = {"equal": (0.0, 0.1), "paper": (0.2, 0.5)}
    runs = [
        Run(name, [evaluated(tmp_path / f"{name}-{seed}", shift) for seed, shift in enumerate(given)])
        for name, given in shifts.items()
    ]
    summary = real_model.summarise(runs)
    assert list(summary) == list(ANCHORS)
    story = summary["ss_gen"]
    assert story["equal"]["by_seed"] == [0.2, 0.3]
    assert story["paper"]["by_seed"] == [0.4, 0.7]
    assert "minus_equal" not in story["equal"]
    assert story["paper"]["minus_equal"]["difference"] == pytest.approx(0.3)
    # differences 0.2 and 0.4: mean 0.3, sd 0.1414, t(0.975, 1) = 12.706, so 0.3 -+ 12.706 * 0.1
    assert story["paper"]["minus_equal"]["seed_interval"] == pytest.approx([-0.9706, 1.5706], abs=1e-3)
    assert summary["gsm8k"]["paper"]["minus_equal"]["difference"] == 0
    assert summary["gsm8k"]["paper"]["mean"] == pytest.approx(0.2)
    assert real_model.seed_interval([0.1], [0.2]) is None


@pytest.mark.slow
def test_the_grid_changes_nothing_but_the_weigher(tmp_path: Path) -> None:
    asked = [
        "--root",
        str(tmp_path),
        "--methods",
        "base",
        "equal",
        "anchor",
        "--seeds",
        "2",
        "--set",
        "data.batch_size=2",
    ]
    grid = real_model.grid(real_model.parser().parse_args(asked))
    methods = grid["axes"]["method"]
    assert methods["base"] == {"args": {}, "stages": ["test"]}
    assert methods["equal"] == {"args": {"model.weigher": "maestro_pl.EqualWeights"}}
    assert all(key.startswith("model.") for key in methods["anchor"]["args"])
    assert grid["axes"]["seed"]["1"] == {"args": {"seed_everything": 1, "data.seed": 1}}
    assert grid["common"]["args"]["data.batch_size"] == 2
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    cells = read_grid(tmp_path / "grid.yaml").cells
    assert [cell.name for cell in cells] == [f"{m}__seed{s}" for m in ("base", "equal", "anchor") for s in (0, 1)]
    equal = yaml.safe_load(resolve_config(cells[3]))
    assert (equal["seed_everything"], equal["data"]["seed"]) == (1, 1)
    roles = [reward["init_args"]["role"] for reward in equal["rewards"]]
    assert roles == ["train"] * 5 + ["anchor"] * 4
