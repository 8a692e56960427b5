"""The rows of metrics.csv: on disk before the checkpoint of their step, and never lost to a new column."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_warn


class RowWriter(ExperimentWriter):
    """Lightning's writer of ``metrics.csv``, of which a kill at any moment leaves every row that was written.

    A new column is a new file, which is put in the old one's place when all of it is on the disk. A row can be written
    :meth:`early`: when the logger gives it again, it is not doubled, and what was logged in between is added to it.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir=log_dir)
        self._begin()

    @classmethod
    def of(cls, writer: ExperimentWriter) -> RowWriter:
        """One that goes on where ``writer`` is."""
        made = cls.__new__(cls)
        made.__dict__.update(vars(writer))
        made._begin()
        return made

    def _begin(self) -> None:
        self._columns = list(self.metrics_keys)  # of the file
        self._is_early = False
        self._early: dict[str, Any] | None = None  # the last row of the file, which the logger will give again
        self._replaces_early = False

    @contextmanager
    def early(self) -> Iterator[None]:
        """Rows in here come before the logger's turn, and are on the disk at the end."""
        self._is_early = True
        try:
            yield
        finally:
            self._is_early = False

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Record a row, unless it is in the file already."""
        super().log_metrics(metrics_dict, step)
        row, known = self.metrics[-1], self._early
        if known is not None and row["step"] == known["step"]:
            if _same(row, known):
                self.metrics.pop()
            else:
                self._replaces_early = True
        if not self._is_early:
            self._early = None

    def save(self) -> None:
        """Write the recorded rows; where that fails, the file is as it was, and they stay recorded.

        Raises:
            OSError: the file cannot be written.
        """
        if not self.metrics:
            return
        path = Path(self.metrics_file_path)
        self._record_new_keys()
        if self.metrics_keys != self._columns or self._replaces_early or not path.is_file():
            rows = _rows_of(path)
            self._write([*(rows[:-1] if self._replaces_early else rows), *self.metrics], path)
        else:
            self._append(path)
        if self._is_early:
            self._early = self.metrics[-1]
        self._replaces_early = False
        self.metrics = []

    def _write(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
                writer.writeheader()
                writer.writerows(rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            self._columns = list(self.metrics_keys)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def _append(self, path: Path) -> None:
        text = io.StringIO(newline="")
        csv.DictWriter(text, fieldnames=self.metrics_keys).writerows(self.metrics)
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                file.write(text.getvalue().encode())
                if self._is_early:
                    os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise


def keep_rows(trainer: Any) -> None:
    """Let the CSV loggers of this trainer, in this process, write by :class:`RowWriter`, unless they write elsewhere."""
    for logger in trainer.loggers:
        # without one: another rank, or nothing was written yet, which the Trainer sees to before it comes here
        if (
            isinstance(logger, CSVLogger)
            and type(logger._experiment) is ExperimentWriter
            and "://" not in logger.log_dir
        ):
            logger._experiment = RowWriter.of(logger._experiment)


def write_row_early(trainer: Any) -> None:
    """Write the row of the training step that is just done, if Lightning has not; it does so after the checkpoint.

    A row that cannot be written is a warning: the checkpoint is worth more.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    connector = trainer._logger_connector
    if not trainer.training or progress.processed <= progress.completed or not connector.should_update_logs:
        return
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    step = metrics.pop("step", None)
    if step is None:
        metrics.setdefault("epoch", trainer.current_epoch)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        writer = logger._experiment if isinstance(logger, CSVLogger) else None
        if not isinstance(writer, RowWriter):
            continue
        try:
            with writer.early():
                logger.log_metrics(metrics, int(step))
                logger.save()
        except OSError as error:
            writer.metrics.pop()  # the logger will give it again
            rank_zero_warn(
                f"The row of step {int(step)} is not in {writer.metrics_file_path}: {error.strerror or error}."
            )


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """By what is written: NaN is NaN."""
    return {key: repr(value) for key, value in one.items()} == {key: repr(value) for key, value in other.items()}


def _rows_of(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
