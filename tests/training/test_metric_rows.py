"""Rows of metrics.csv: there before the checkpoint of their step, and there after a kill at any moment."""

from __future__ import annotations

import csv
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from callbacks.checkpoint import RunCheckpoint
from maestro_pl.training.metric_rows import RowWriter
from tests.support import data_of, module_of, rewards, trainer_of


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v and not k.startswith("time/")} for row in csv.DictReader(file)]


def killed(act: Callable[[], object]) -> int:
    """The signal that ended a child process which did this."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledAfterSaving(RunCheckpoint):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.saved_at == pl_module.batches_done:
            die()


def test_the_rows_up_to_a_checkpoint_are_on_disk_with_it(tiny_qwen3: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "word {i}", "task": "{"ab"[i % 2]}"}}\n' for i in range(10)))

    def fit(version: str, checkpoint: RunCheckpoint, go_on: Path | None = None) -> None:
        logger = CSVLogger(tmp_path, name="run", version=version, flush_logs_every_n_steps=1)
        run = {"max_steps": 4, "limit_val_batches": 0, "logger": logger, "log_every_n_steps": 1}
        trainer = trainer_of(tmp_path, [*rewards(), checkpoint], enable_checkpointing=True, **run)
        trainer.fit(module_of(tiny_qwen3), data_of(path), ckpt_path=go_on, weights_only=True)

    fit("whole", RunCheckpoint(2))
    whole = rows_of(tmp_path / "run/whole")
    assert len(whole) == 4
    assert killed(lambda: fit("killed", KilledAfterSaving(2))) == signal.SIGKILL
    last = tmp_path / "run/killed/checkpoints/last.ckpt"
    assert last.is_file()
    assert rows_of(tmp_path / "run/killed") == whole[:2]
    fit("resumed", RunCheckpoint(2), last)
    assert rows_of(tmp_path / "run/killed") + rows_of(tmp_path / "run/resumed") == whole


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_kill_while_a_column_is_added_leaves_every_row(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RowWriter(str(tmp_path))
    for step in range(3):
        writer.log_metrics({"a": step / 2}, step)
        writer.save()
    before = rows_of(tmp_path)

    def add() -> None:
        monkeypatch.setattr(os, moment, die)
        writer.log_metrics({"a": 1.5, "b": 1.0}, 3)
        writer.save()

    assert killed(add) == signal.SIGKILL
    assert rows_of(tmp_path) == before == [{"a": str(step / 2), "step": str(step)} for step in range(3)]


def test_a_disk_that_is_full_leaves_the_file_and_the_rows_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = RowWriter(str(tmp_path))
    writer.log_metrics({"a": 0.0}, 0)
    writer.save()
    for step, row in enumerate(({"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 2.0}), start=1):
        before = (tmp_path / "metrics.csv").read_bytes()
        writer.log_metrics(row, step)
        with monkeypatch.context() as patch, writer.early():
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                writer.save()
        assert (tmp_path / "metrics.csv").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
        writer.save()
    assert [row.get("b") for row in rows_of(tmp_path)] == [None, "1.0", "2.0"]


def test_a_row_that_is_written_early_is_there_once_with_what_was_logged_later(tmp_path: Path) -> None:
    writer = RowWriter(str(tmp_path))

    def log(step: int, early: dict[str, float], late: dict[str, float]) -> None:
        for _ in range(2):  # two checkpoints of one step
            with writer.early():
                writer.log_metrics(early, step)
                writer.save()
        writer.log_metrics(late, step)
        writer.save()

    log(0, {"a": 0.0}, {"a": 0.0})
    log(1, {"a": float("nan")}, {"a": float("nan")})
    log(2, {"a": 2.0}, {"a": 2.0, "b": 3.0})
    writer.log_metrics({"val/a": 4.0}, 2)  # a validation's own row
    writer.save()
    assert rows_of(tmp_path) == [
        {"a": "0.0", "step": "0"},
        {"a": "nan", "step": "1"},
        {"a": "2.0", "b": "3.0", "step": "2"},
        {"val/a": "4.0", "step": "2"},
    ]


def test_a_full_disk_costs_the_row_and_not_the_checkpoint(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "word {i}", "task": "a"}}\n' for i in range(10)))

    def full(self: RowWriter, *_: Any) -> None:
        if self._is_early:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(self, *_)

    written = RowWriter._write
    monkeypatch.setattr(RowWriter, "_write", full)
    logger = CSVLogger(tmp_path, name="run", version="v", flush_logs_every_n_steps=1)
    run = {"max_steps": 1, "limit_val_batches": 0, "logger": logger, "log_every_n_steps": 1}
    trainer = trainer_of(tmp_path, [*rewards(), RunCheckpoint(1)], enable_checkpointing=True, **run)
    with pytest.warns(UserWarning, match=r"The row of step 0 is not in .*metrics\.csv: No space left on device"):
        trainer.fit(module_of(tiny_qwen3), data_of(path))
    assert (tmp_path / "run/v/checkpoints/last.ckpt").is_file()
    assert len(rows_of(tmp_path / "run/v")) == 1
