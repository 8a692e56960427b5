"""``report.html``: one file that a person sends to a colleague after ``fit`` or ``test``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.records import append_records, records
from maestro_pl.report.chosen import Group, chosen
from maestro_pl.report.page import report_html, write_report
from maestro_pl.report.responses import Responses, response_files
from maestro_pl.report.run_files import RunFiles
from maestro_pl.rollout import Rollout
from maestro_pl.run.paths import free_path, run_dir


class RunReport(Callback):
    """Writes ``report.html`` into the run's folder at the end of ``fit`` and ``test``.

    It has the question (the config in a few lines), the tables with intervals, weights and rewards as figures, ten
    groups (best, worst, most disputed) and where the config differs from the defaults. Of a ``fit`` the groups are the
    recorded ones (``ResponseRecorder``), of a ``test`` rank zero's own. One that cannot be written is a warning.

    Attributes:
        path: the file that was written last, or None.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self._folder = Path()
        self._tested: tempfile.TemporaryDirectory[str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew."""
        self._folder = run_dir(trainer)  # on every rank: the folder's name is broadcast
        self.path = None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the responses, of which ten groups are shown."""
        if not trainer.is_global_zero or "rollout" not in batch:
            return
        try:
            self._tested = self._tested or tempfile.TemporaryDirectory(prefix="maestro-pl-")
            rows = ({**row, "group": batch_idx * 1_000_003 + n} for n, row in _numbered(batch["rollout"]))
            append_records(Path(self._tested.name) / "samples_test.jsonl", rows)
        except OSError as error:  # no room for what is only shown: the numbers are what counts
            rank_zero_warn(f"report.html will show no groups ({error}).")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of the evaluation."""
        self._write(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of the training."""
        self._write(trainer, pl_module, "fit")

    def _write(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or not self._folder.is_dir():
            return
        try:
            path = free_path(self._folder / "report.html")
            run = RunFiles(self._folder)
            config, defaults = (_plain(pl_module, name) for name in ("run_config", "run_defaults"))
            run.config = config if config is not None else run.config  # of `test`, the folder may hold that of `fit`
            rows = list(getattr(pl_module, "evaluation", ())) if stage == "test" else ()
            tested = Path(self._tested.name) if self._tested is not None else None
            groups = _recorded(tested, "samples_test") if stage == "test" else _recorded(self._folder, "rollouts")
            write_report(path, report_html(run, groups, rows, defaults))
            self.path = path
        except Exception as error:  # a report never ends a run
            rank_zero_warn(
                f"report.html is not written ({type(error).__name__}: {error}); {self._folder} has the files."
            )
        finally:
            if self._tested is not None:
                self._tested.cleanup()
                self._tested = None


def _numbered(rollout: Rollout) -> list[tuple[int, dict[str, Any]]]:
    """The records with the number of their group, which tells two groups of one prompt apart."""
    return [(i // rollout.group_size, row) for i, row in enumerate(records(rollout))]


def _recorded(folder: Path | None, stage: str) -> list[Group]:
    files = response_files(folder, stage) if folder is not None else []
    found = Responses(files) if files else None
    return chosen(found) if found is not None and len(found) else []


def _plain(module: LightningModule, name: str) -> dict[str, Any] | None:
    """A config that the command line left with the module."""
    text: Any = getattr(module, name, None)
    read = yaml.safe_load(text) if isinstance(text, str) and text else None
    return read if isinstance(read, dict) else None
