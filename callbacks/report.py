"""Evaluations as tables: after ``validate`` and ``test``, and before and after ``fit``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich import box
from rich.table import Table
from rich.text import Text

from callbacks.rollout import RolloutGenerator
from callbacks.run_report import RunReport
from callbacks.weights import append_rows
from maestro_pl.data.module import STAGE_SPLITS
from maestro_pl.errors import escaped
from maestro_pl.evaluation.records import PromptRecords, write_records
from maestro_pl.run.paths import free_path, newest_checkpoint, run_dir, shown

Row: TypeAlias = dict[str, Any]

ALL_TASKS = "all"
FIELDS = ("step", "task", "metric", "mean", "low", "high", "n")
CHANGES = (
    "task", "metric", "before", "before_low", "before_high", "before_n", "after", "after_low", "after_high", "after_n",
)  # fmt: skip


class Evaluation(NamedTuple):
    """The rows ``{task, metric, mean, low, high, n}`` of one evaluation, and the policy step it was made at."""

    step: int
    rows: list[Row]


class EvaluationReport(Callback):
    """Prints each evaluation per task with its intervals, and writes it as CSV into the run's folder.

    ``validate`` and ``test`` end with a table a task and ``val_metrics.csv`` or ``test_metrics.csv``, and with the
    values of every prompt in ``val_prompts.csv`` or ``test_prompts.csv``, which ``maestro-pl compare`` reads. ``fit``
    prints a line a validation, appends its rows to ``val_metrics.csv``, and ends with the first and the last evaluation
    side by side (also in ``before_after.csv``) and the names of what was written. The first is the one before training
    where ``trainer.num_sanity_val_steps`` is -1; a shorter sanity check is no evaluation.
    """

    def __init__(self) -> None:
        self.first: Evaluation | None = None
        self.last: Evaluation | None = None
        self._folder = Path()
        self._path = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose a file that does not exist yet."""
        self._folder = run_dir(trainer)  # on every rank: the folder's name is broadcast
        self._path = free_path(self._folder / f"{'test' if stage == 'test' else 'val'}_metrics.csv")
        self.first = self.last = None

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the evaluation; print it whole in ``validate``, in one line inside ``fit``."""
        if trainer.sanity_checking and sum(trainer.num_sanity_val_batches) < sum(trainer.num_val_batches):
            return
        self._take(trainer, pl_module, whole=trainer.state.fn == "validate")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print the evaluation."""
        self._take(trainer, pl_module, whole=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print before and after, and name what was written."""
        if not trainer.is_global_zero:
            return
        if self.first is not None and self.last is not None and self.first.step != self.last.step:
            path = free_path(self._folder / "before_after.csv")
            append_rows(path, change_rows(self.first.rows, self.last.rows), CHANGES)
            for table in change_tables(self.first, self.last):
                rich.print("", table)
        figures = sorted(self._folder.glob("weights*.png"), key=lambda p: p.stat().st_mtime)
        named = {
            "Checkpoint": newest_checkpoint(trainer),
            "Weights": figures[-1] if figures else "",
            "Report": _report(trainer),
            "Run": self._folder,
        }
        for label, value in named.items():
            if value:
                print(f"{label + ':':<12}{shown(value)}", flush=True)

    def _take(self, trainer: Trainer, pl_module: Any, whole: bool) -> None:
        rows: list[Row] = list(pl_module.evaluation)
        if not trainer.is_global_zero or not rows:
            return
        evaluation = Evaluation(int(pl_module.policy_steps), rows)
        self.first = self.first or evaluation
        self.last = evaluation
        append_rows(self._path, [{"step": evaluation.step, **row} for row in rows], FIELDS)
        if whole:
            self._write_prompts(trainer, pl_module)
            for table in evaluation_tables(rows):
                rich.print("", table)
            print(f"Written to {shown(self._path)}", flush=True)
            if _report(trainer):
                print(f"Report:     {shown(_report(trainer))}", flush=True)
        else:
            print(summary(evaluation), flush=True)

    def _write_prompts(self, trainer: Trainer, pl_module: Any) -> None:
        records: PromptRecords = pl_module.prompt_records
        if len(records):
            path = self._path.with_name(self._path.name.replace("_metrics", "_prompts", 1))
            write_records(path, records, evaluation_header(trainer, pl_module))


def _report(trainer: Any) -> Path | str:
    """The report that ``RunReport``, which stands before this callback, has written; empty where there is none."""
    return next((each.path for each in trainer.callbacks if isinstance(each, RunReport) and each.path), "")


def evaluation_header(trainer: Any, module: Any) -> dict[str, Any]:
    """How an evaluation was made, for the comparison with others: two are alike where all but the run is."""
    data, policy = trainer.datamodule, getattr(module, "policy", None)
    rollout = next((c for c in trainer.callbacks if isinstance(c, RolloutGenerator)), None)
    sampling = {} if rollout is None else {**asdict(rollout.sampling), "temperature": rollout.eval_temperature}
    stage = "test" if trainer.state.fn == TrainerFn.TESTING else "validate"
    return {
        "stage": stage,
        "split": STAGE_SPLITS[stage][0],
        "step": int(module.policy_steps),
        "checkpoint": trainer.ckpt_path and str(trainer.ckpt_path),
        "model": getattr(policy, "name_or_path", None),
        "seed": None if rollout is None else rollout.seed,
        "data": {key: getattr(data, key, None) for key in _DATA_SETTINGS},
        "rollout": {
            "eval_group_size": getattr(rollout, "eval_group_size", None),
            **{key: value for key, value in sampling.items() if key != "seed"},
        },
    }


_DATA_SETTINGS = ("eval_limit", "split_seed", "system_prompt", "chat_template_kwargs", "max_prompt_tokens", "overlong")


def evaluation_tables(rows: Sequence[Row]) -> list[Table]:
    """One table a task and one over all: metric, mean, interval, number of prompts."""
    tables = []
    for task in _tasks(rows):
        table = _table(_title(task), "mean", "95 % interval", "n")
        for row in rows:
            if row["task"] == task and _is_shown(row):
                interval = f"[{number(row['low'])}, {number(row['high'])}]"
                table.add_row(_text(row["metric"]), number(row["mean"]), interval, str(row["n"]))
        tables.append(table)
    return tables


def change_rows(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """The rows of two evaluations side by side, in the order of the later one; a side that is missing is None."""
    earlier = {(row["task"], row["metric"]): row for row in before}
    out = []
    for row in after:
        old = earlier.get((row["task"], row["metric"]), dict.fromkeys(("mean", "low", "high", "n")))
        pair = {"before": old, "after": row}
        sides = {f"{side}{suffix}": values[key] for side, values in pair.items() for suffix, key in _SUFFIXES}
        out.append({"task": row["task"], "metric": row["metric"], **sides})
    return out


_SUFFIXES = (("", "mean"), ("_low", "low"), ("_high", "high"), ("_n", "n"))


def change_tables(before: Evaluation, after: Evaluation) -> list[Table]:
    """One table a task and one over all: every metric before and after, with intervals, and the change."""
    rows = change_rows(before.rows, after.rows)
    tables = []
    for task in _tasks(after.rows):
        table = _table(_title(task), f"step {before.step}", f"step {after.step}", "change")
        for row in rows:
            if row["task"] == task and _is_shown(row):
                change = "" if row["before"] is None else f"{row['after'] - row['before']:+.3f}"
                table.add_row(_text(row["metric"]), _with_interval(row, "before"), _with_interval(row, "after"), change)
        tables.append(table)
    return tables


def summary(evaluation: Evaluation) -> str:
    """The rewards' raw means over all tasks in one line."""
    rows = [
        row
        for row in evaluation.rows
        if row["task"] == ALL_TASKS and row["metric"].startswith(("reward/", "pass@")) and _is_shown(row)
    ]
    values = "  ".join(f"{row['metric'].removeprefix('reward/')} {number(row['mean'])}" for row in rows)
    return f"evaluation at step {evaluation.step}: {escaped(values)}"


def number(value: float) -> str:
    """Three decimals, fewer for large values."""
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:.0f}"


def _with_interval(row: Row, side: str) -> str:
    if row[side] is None:
        return "-"
    return f"{number(row[side])} [{number(row[f'{side}_low'])}, {number(row[f'{side}_high'])}]"


def _tasks(rows: Sequence[Row]) -> list[str]:
    """The tasks, ``all`` last; ``all`` is left out beside a single task."""
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task != ALL_TASKS]
    return tasks if len(tasks) == 1 else [*tasks, ALL_TASKS]


def _is_shown(row: Row) -> bool:
    """Whether a row stands in the printed tables; what a reward counts besides its score is in the CSV only."""
    return not (row["metric"].startswith("reward/") and row["metric"].count("/") > 1)


def _title(task: str) -> str:
    return "all tasks" if task == ALL_TASKS else task


def _text(name: str) -> Text:
    """A name as it is: no markup, and no control characters."""
    return Text(escaped(name))


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=_text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("metric", overflow="fold", min_width=12)
    for column in columns:  # numbers are never cut: the metric's name folds instead
        table.add_column(column, justify="right", no_wrap=True)
    return table
