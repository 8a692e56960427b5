"""The comparison on four real tasks: its rows, rewards and anchors, and the grids that it asks for."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import real_anchors, real_conflict, real_model
from benchmarks.real_rewards import brevity, own_words, richness
from benchmarks.real_tasks import BEGINNING, beginning, rows_of, sentences, write_rows
from maestro_pl.cli.resolve import resolve_config
from maestro_pl.errors import UserError
from maestro_pl.evaluation.compare_runs import Run, read_records
from maestro_pl.experiment.grid import read_grid

ASK = (
    "\nTranslate the following text from {} to {}:\n{}\n\nAnswer the question and return in the following format:\n..."
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twenty-four stories and some pairs of sentences, as the files have them."""
    (tmp_path / "ssgen").mkdir()
    stories = [
        {"id": n, "title": f"Title {n}", "chapter": "c", "story_content": f"Story {n} begins here. It goes on."}
        for n in range(24)
    ]
    (tmp_path / "ssgen/dev.jsonl").write_text("\n".join(json.dumps(story) for story in stories) + "\n")
    (tmp_path / "nover").mkdir()
    pairs = [
        (ASK.format("English", "French", f"This is sentence number {n}."), f"C'est la phrase {n}.") for n in range(8)
    ]
    pairs += [
        (ASK.format("English", "French", "Too short."), "Court."),
        (ASK.format("English", "French", "A sentence of some seven words here."), "Oui."),  # another length
        (ASK.format("French", "English", "Une phrase tout autre que cela."), "A sentence quite unlike that."),
        pairs[0],
    ]
    with (tmp_path / "nover/opus_books_all_pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "reference"), *pairs])
    return tmp_path


def test_a_story_is_of_one_task_and_one_split(root: Path) -> None:
    rows = rows_of(root)
    assert rows == rows_of(root)
    assert sum(row["task"] == "translation" for row in rows) == 8
    for task in ("title", "summary", "story"):
        own = [row for row in rows if row["task"] == task]
        assert len(own) == 8
        assert {row["split"] for row in own} == {"train", "validation", "test"}
    numbers = [row["prompt"] for row in rows if row["task"] != "translation"]
    assert len(set(numbers)) == 24
    title = next(row for row in rows if row["task"] == "title")
    assert title["prompt"].startswith("Story ")
    assert title["reference"].startswith("Title ")
    with pytest.raises(UserError, match="is not there: --root"):
        rows_of(root / "nover")


def test_beginnings_are_whole_sentences_where_they_can_be() -> None:
    assert beginning("One two. Three four.") == "One two. Three four."
    long = " ".join(["word"] * BEGINNING)
    assert beginning(f"One two. {long}. End.") == "One two."
    assert beginning(f"{long} {long}.") == long


def test_sentences_that_fit_their_translation(root: Path) -> None:
    found = sentences(root / "nover/opus_books_all_pairs.csv")
    assert len(found) == 8
    assert found[0] == ("This is sentence number 0.", "C'est la phrase 0.")


def test_the_rewards_want_opposite_things() -> None:
    short, long = "A red fox.", "A red fox ran over the hill and found a friend."
    assert brevity(short) > brevity(long)
    assert brevity("") == brevity("one")
    assert richness(long) == 10
    assert richness(short) == 3
    assert own_words("the red fox sleeps", "Tell of the red fox") == pytest.approx(1 / 3)  # fox sleeps, of three pairs
    assert own_words("fox", "fox") == 0


def test_lengths_that_were_asked_for_count() -> None:
    assert real_anchors.keeps(5, 2, 8) == 1
    assert real_anchors.keeps(1, 2, 8) == 0.5
    assert real_anchors.keeps(16, 2, 8) == 0.5
    assert real_anchors.keeps(0, 2, 8) == 0
    assert real_anchors.quality("C'est la vie.", "C'est la vie.", "translation") == pytest.approx(1.0)


def test_the_best_is_named_and_alike_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_anchors, "quality", lambda text, reference, task: float(text))
    assert real_anchors.best(["0.1", "0.5", "0.3"], "", "title") == {1}
    assert real_anchors.best(["0.1", "0.5", "0.49"], "", "title") == {1, 2}
    assert real_anchors.best(["0.51", "0.5"], "", "title") is None


def asked(tmp_path: Path, *more: str) -> Any:
    given = ["--root", str(tmp_path), "--folder", str(tmp_path / "out"), "--seeds", "2", *more]
    return real_conflict.parser().parse_args(given)


def resolved(tmp_path: Path, grid: dict[str, Any]) -> dict[str, Any]:
    """Each cell's whole config."""
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return {cell.name: yaml.safe_load(resolve_config(cell)) for cell in read_grid(tmp_path / "grid.yaml").cells}


@pytest.mark.slow
def test_every_method_is_a_config_that_holds(tmp_path: Path, root: Path) -> None:
    write_rows(root, tmp_path / "out/tasks.jsonl")
    given = {"title": {"brevity": 1.0}, "story": {"richness": 2.0}}
    levels = {name: real_conflict.METHODS[name] for name in ("GDPO", "paper", "choices")}
    levels |= {"static": real_conflict.static(given)}
    grid = real_conflict.grid(asked(tmp_path, "--part", "compare", "--set", "data.batch_size=2"), levels)
    assert grid["axes"]["seed"]["1"] == {"args": {"seed_everything": 1, "data.seed": 1}}
    grid["axes"]["seed"] = {"0": grid["axes"]["seed"]["0"]}
    found = resolved(tmp_path, grid)
    assert set(found) == {f"{name}__seed0" for name in levels}
    assert {row["data"]["batch_size"] for row in found.values()} == {2}
    for name, config in found.items():
        roles = [reward["init_args"]["name"] for reward in config["rewards"]]
        fixed = ["brevity.title", "richness.story"]
        assert roles == (
            fixed if name == "static__seed0" else ["brevity", "richness", "on_topic", "own_words", "fluency"]
        )
        assert bool(config.get("anchors")) == (name == "choices__seed0")
    assert found["static__seed0"]["model"]["weigher"]["init_args"]["weights"] == {
        "brevity.title": 1.0,
        "richness.story": 2.0,
    }


def test_the_best_of_each_task_becomes_its_weights(tmp_path: Path) -> None:
    best = {"title": "brevity", "summary": "equal", "story": "richness", "translation": "own_words"}
    runs = []
    for name in real_conflict.candidates():
        folder = tmp_path / name
        folder.mkdir()
        rows = [(f"{t}-0", t, real_conflict.QUALITY, 0.5 if best[t] == name else 0.1) for t in real_conflict.TASKS]
        with (folder / "val_prompts.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("prompt", "task", "metric", "value"), *rows])
        (folder / "val_prompts.json").write_text(json.dumps({"prompts": {}}))
        runs.append(Run(name, [[read_records(folder / "val_prompts.csv")]]))
    found = real_conflict.found_headroom(runs)
    assert found["best"] == best
    assert found["weights"]["story"] == {"richness": 1.0}
    assert found["weights"]["summary"] == dict.fromkeys(
        ("brevity", "richness", "on_topic", "own_words", "fluency"), 1.0
    )
    assert found["quality"]["title"]["fluency"] == 0.1


def test_two_commands_in_one_folder_run_and_read_their_own_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def run(command: list[str], **_: Any) -> None:
        started.append(Path(next(part for part in command if part.endswith(".yaml"))))
        if len(started) == 1:  # another command is begun while the cells of the first one are run
            runs_of("7")

    def runs_of(first: str) -> list[str]:
        options = asked(tmp_path, "--part", "compare", "--first-seed", first)
        found: Any = real_model.run_cells(
            real_conflict.grid(options, {"equal": {}, "GDPO": {}}), tmp_path / "out", 1, "test"
        )
        return list(found)

    monkeypatch.setattr(real_model.subprocess, "run", run)
    monkeypatch.setattr(real_model, "read_runs", lambda texts, split: (texts, []))
    cells = tmp_path / "out/cells"
    assert runs_of("1") == [
        f"{name}={cells / f'{name}__seed1'},{cells / f'{name}__seed2'}" for name in ("equal", "GDPO")
    ]
    assert [set(yaml.safe_load(file.read_text())["axes"]["seed"]) for file in started] == [{"1", "2"}, {"7", "8"}]


def test_static_weights_by_hindsight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Titles are worth what one reward says, stories the sum of two, summaries nothing that a reward says."""
    names = [reward["init_args"]["name"] for reward in real_conflict.rewards()]
    draws = np.random.default_rng(0)
    rows = []
    for group in range(80):
        task = real_conflict.TASKS[group % 4]
        scores = draws.standard_normal((4, len(names)))
        scores = (scores - scores.mean(0)) / scores.std(0)
        for row in scores:
            rewards = dict(zip(names, row.tolist(), strict=True))
            worth = {
                "title": rewards["brevity"],
                "summary": -sum(rewards.values()),
                "story": rewards["richness"] + rewards["fluency"],
                "translation": rewards["brevity"] - 0.9 * rewards["richness"],
            }[task]
            rewards["quality"] = 0.5 + 0.1 * worth
            row_of = {"step": 0, "group": group, "task": task, "prompt": f"p{group}", "response": "r"}
            rows.append(row_of | {"rewards": rewards, "weights": dict.fromkeys(names, 0.2)})
    cell = tmp_path / "out/compare/cells/equal__seed0/fit-0"
    cell.mkdir(parents=True)
    (cell / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = tmp_path / "results"
    real_conflict.main(
        ["--part", "hindsight", "--root", "x", "--folder", str(tmp_path / "out"), "--output", str(results)]
    )
    found = json.loads((results / "real_conflict_headroom.json").read_text())
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["groups"] == dict.fromkeys(real_conflict.TASKS, 20)
    assert found["weights"]["summary"] == dict.fromkeys(names, 0.2)  # no reward goes along with it
    assert found["weights"]["translation"]["richness"] == 0.0
    assert found["weights"]["title"]["brevity"] > 0.95
    assert found["weights"]["story"]["richness"] == pytest.approx(found["weights"]["story"]["fluency"], abs=0.1)
    assert found["weights"]["story"]["richness"] > 0.4
    assert found["correlation"]["title"] > 0.99
    split = real_conflict.static(found["weights"])["args"]["model.weigher"]["init_args"]["weights"]
    assert split["brevity.title"] == found["weights"]["title"]["brevity"]
