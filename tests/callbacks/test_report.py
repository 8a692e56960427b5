"""``EvaluationReport``: the tables, what is kept as before and after, and the files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from callbacks.report import (
    Evaluation,
    EvaluationReport,
    change_rows,
    change_tables,
    evaluation_tables,
    number,
    summary,
)
from callbacks.rollout import RolloutGenerator
from maestro_pl.data import PromptDataModule
from maestro_pl.evaluation.metrics import EvaluationTable
from maestro_pl.evaluation.records import keys_of

Row = dict[str, Any]


def row(task: str, metric: str, mean: float, half: float = 0.125, n: int = 8) -> Row:
    return {"task": task, "metric": metric, "mean": mean, "low": mean - half, "high": mean + half, "n": n}


BEFORE = [row(task, metric, 0.25) for task in ("a", "b", "all") for metric in ("reward/x", "length/mean")]
AFTER = [row(task, metric, 0.75) for task in ("a", "b", "all") for metric in ("reward/x", "reward/new", "length/mean")]


def rendered(tables: list[Any], width: int) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(*tables)
    return capture.get()


def module_of(step: int, rows: list[Row]) -> Any:
    table = EvaluationTable()
    table.update(["a"], {"reward/x": torch.tensor([0.75])}, [0], keys_of(["the prompt"], [None], ["a"]))
    table.compute()
    return SimpleNamespace(policy_steps=step, evaluation=rows, prompt_records=table.records)


def trainer_of(folder: Path, fn: TrainerFn, sanity: bool = False, sanity_batches: int = 2) -> Any:
    return SimpleNamespace(
        log_dir=str(folder),
        default_root_dir=".",
        is_global_zero=True,
        sanity_checking=sanity,
        num_sanity_val_batches=[sanity_batches],
        num_val_batches=[2],
        checkpoint_callbacks=[],
        callbacks=[RolloutGenerator(eval_group_size=3, eval_temperature=0.5)],
        datamodule=PromptDataModule(eval_limit=7, show=False),
        ckpt_path="last.ckpt",
        state=SimpleNamespace(fn=fn),
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_table_by_hand() -> None:
    text = rendered(evaluation_tables(BEFORE), 80)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0] == ["a"]
    assert lines[3] == ["reward/x", "0.250", "[0.125,", "0.375]", "8"]
    assert ["all", "tasks"] in lines


def test_all_tasks_is_left_out_beside_a_single_task() -> None:
    rows = [r for r in BEFORE if r["task"] != "b"]
    assert len(evaluation_tables(rows)) == 1


def test_before_and_after_by_hand() -> None:
    rows = change_rows(BEFORE, AFTER)
    assert rows[0] == {
        "task": "a", "metric": "reward/x",
        "before": 0.25, "before_low": 0.125, "before_high": 0.375, "before_n": 8,
        "after": 0.75, "after_low": 0.625, "after_high": 0.875, "after_n": 8,
    }  # fmt: skip
    assert rows[1]["before"] is None
    text = rendered(change_tables(Evaluation(0, BEFORE), Evaluation(60, AFTER)), 80)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[1] == ["metric", "step", "0", "step", "60", "change"]
    assert lines[3] == ["reward/x", "0.250", "[0.125,", "0.375]", "0.750", "[0.625,", "0.875]", "+0.500"]
    assert lines[4] == ["reward/new", "-", "0.750", "[0.625,", "0.875]"]


def test_numbers_are_whole_at_80_columns_and_long_names_fold() -> None:
    metric = "reward/a_reward_with_a_long_name_and_then_some_more_of_it"
    before, after = ([row("a", metric, mean, half=1.0)] for mean in (-123.456, 987.654))
    text = rendered(change_tables(Evaluation(0, before), Evaluation(1000, after)), 80)
    for figure in ("-123.5 [-124.5, -122.5]", "987.7 [986.7, 988.7]", "+1111.110"):
        assert figure in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_a_reward_counts_besides_its_score_is_not_printed() -> None:
    rows = [row("a", "reward/x", 1.0), row("a", "reward/x/cut", 2.0), row("a", "pass@2/x", 0.5)]
    text = rendered(evaluation_tables(rows), 80)
    assert "reward/x " in text
    assert "pass@2/x" in text
    assert "cut" not in text


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.123"), (-1.0, "-1.000"), (48.27, "48.3"), (12345.6, "12346")])
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_summary_names_the_rewards_over_all_tasks() -> None:
    assert summary(Evaluation(60, AFTER)) == "evaluation at step 60: x 0.750  new 0.750"


def test_fit_keeps_the_evaluation_before_training_and_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, module = EvaluationReport(), module_of(0, BEFORE)
    report.setup(trainer_of(tmp_path, TrainerFn.FITTING), module, "fit")
    report.on_validation_end(trainer_of(tmp_path, TrainerFn.FITTING, sanity=True), module)
    for step in (30, 60):
        module.policy_steps, module.evaluation = step, AFTER
        report.on_validation_end(trainer_of(tmp_path, TrainerFn.FITTING), module)
    (tmp_path / "weights.png").touch()
    report.on_fit_end(trainer_of(tmp_path, TrainerFn.FITTING), module)
    out = capsys.readouterr().out
    assert out.startswith("evaluation at step 0: x 0.250\n")
    assert "step 60" in out
    assert out.splitlines()[-2:] == [f"Weights:    {tmp_path / 'weights.png'}", f"Run:        {tmp_path}"]
    assert [r["before"] for r in read_csv(tmp_path / "before_after.csv")] == ["0.25", "", "0.25"] * 3
    assert {r["step"] for r in read_csv(tmp_path / "val_metrics.csv")} == {"0", "30", "60"}


def test_a_short_sanity_check_is_no_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, module = EvaluationReport(), module_of(0, BEFORE)
    report.setup(trainer_of(tmp_path, TrainerFn.FITTING), module, "fit")
    report.on_validation_end(trainer_of(tmp_path, TrainerFn.FITTING, sanity=True, sanity_batches=1), module)
    assert report.first is None
    report.on_fit_end(trainer_of(tmp_path, TrainerFn.FITTING), module)
    assert capsys.readouterr().out == f"Run:        {tmp_path}\n"


def test_test_prints_tables_and_never_writes_into_an_old_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        report, module = EvaluationReport(), module_of(60, AFTER)
        report.setup(trainer_of(tmp_path, TrainerFn.TESTING), module, "test")
        report.on_test_end(trainer_of(tmp_path, TrainerFn.TESTING), module)
    assert "all tasks" in capsys.readouterr().out
    first, second = read_csv(tmp_path / "test_metrics.csv"), read_csv(tmp_path / "test_metrics-1.csv")
    assert first == second
    assert first[0] == {
        "step": "60", "task": "a", "metric": "reward/x", "mean": "0.75", "low": "0.625", "high": "0.875", "n": "8",
    }  # fmt: skip


def test_validate_prints_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, module = EvaluationReport(), module_of(60, AFTER)
    report.setup(trainer_of(tmp_path, TrainerFn.VALIDATING), module, "validate")
    report.on_validation_end(trainer_of(tmp_path, TrainerFn.VALIDATING), module)
    assert "all tasks" in capsys.readouterr().out
    assert not (tmp_path / "test_prompts.csv").exists()
    assert json.loads((tmp_path / "val_prompts.json").read_text())["split"] == "validation"


def test_test_writes_every_prompt_and_how_it_was_made(tmp_path: Path) -> None:
    for name in ("test_prompts.csv", "test_prompts-1.csv"):
        report, module = EvaluationReport(), module_of(60, AFTER)
        report.setup(trainer_of(tmp_path, TrainerFn.TESTING), module, "test")
        report.on_test_end(trainer_of(tmp_path, TrainerFn.TESTING), module)
        assert (tmp_path / name).is_file()
    (row,) = read_csv(tmp_path / "test_prompts.csv")
    assert (row["task"], row["metric"], row["value"]) == ("a", "reward/x", "0.75")
    header = json.loads((tmp_path / "test_prompts.json").read_text())
    assert (header["split"], header["step"], header["checkpoint"]) == ("test", 60, "last.ckpt")
    assert (header["data"]["eval_limit"], header["rollout"]["eval_group_size"]) == (7, 3)
    assert header["rollout"]["temperature"] == 0.5
    assert header["prompts"] == {row["prompt"]: "the prompt"}


@pytest.mark.parametrize("task", ["[/math]", "[math]", "=1+1", "\x1b[31mred"])
def test_a_task_is_shown_and_written_as_it_is_called(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import csv

    import rich

    from callbacks.report import FIELDS, evaluation_tables
    from callbacks.weights import append_rows
    from maestro_pl.errors import from_cell

    rows = [{"task": task, "metric": "reward/[b]", "mean": 0.5, "low": -0.25, "high": 0.75, "n": 4}]
    for table in evaluation_tables(rows):
        rich.print(table)
    shown = capsys.readouterr().out
    assert task.replace("\x1b", "\\x1b") in shown
    assert "reward/[b]" in shown
    append_rows(tmp_path / "a.csv", [{"step": 1, **row} for row in rows], FIELDS)
    with (tmp_path / "a.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    assert from_cell(row["task"]) == task
    assert row["task"] == ("'=1+1" if task == "=1+1" else task)
    assert row["low"] == "-0.25"  # a number is none


def test_the_newest_of_several_checkpoints_is_named(tmp_path: Path) -> None:
    import os

    from lightning.pytorch.callbacks import ModelCheckpoint

    from maestro_pl.run.paths import newest_checkpoint

    callbacks = [ModelCheckpoint(), ModelCheckpoint(monitor="a"), SimpleNamespace()]
    trainer: Any = SimpleNamespace(checkpoint_callbacks=callbacks)
    assert newest_checkpoint(trainer) == ""
    for name, time in (("old.ckpt", 50), ("new.ckpt", 100)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
    callbacks[0].last_model_path = str(tmp_path / "old.ckpt")
    callbacks[1].best_model_path = str(tmp_path / "new.ckpt")
    callbacks[1].last_model_path = str(tmp_path / "never written.ckpt")
    assert newest_checkpoint(trainer) == str(tmp_path / "new.ckpt")
