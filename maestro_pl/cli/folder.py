"""A run's folder: taken once, with the whole config in it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError
from maestro_pl.run.paths import free_path, holds_run, run_dir, shown


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole config into the run's folder, never over another, and notes that work was done.

    Attributes:
        steps_done: whether a training batch is behind us.
        folder: the run's.
        first_error: what ended the run, whatever failed on the way out after it.
        text: the whole config, as YAML.
    """

    steps_done = False
    folder = Path()
    first_error: BaseException | None = None
    text = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` (fit) or ``<stage>.config.yaml``."""
        self.folder = run_dir(trainer)  # on every rank: the folder's name is broadcast
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / "checkpoints")
        # the parser has checked it, and would check it again for as long as parsing took
        self.text = self.parser.dump(self.config, skip_unset=False, skip_validation=True)
        pl_module.run_config = self.text  # type: ignore[assignment]  # a PolicyModule's, whose checkpoints carry it
        defaults: str = self.parser.dump(self.parser.get_defaults(), skip_unset=False, skip_validation=True)
        pl_module.run_defaults = defaults  # type: ignore[assignment]  # for the report
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the file exclusively, so that of two runs started together one stops.

        Raises:
            UserError: another run has just taken the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        stage = TrainerFn(stage).value  # Lightning passes the enum, whose text is not its value
        path = self.folder / "config.yaml" if stage == "fit" else free_path(self.folder / f"{stage}.config.yaml")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self.text)
        except FileExistsError:
            raise _taken(self.folder) from None
        print(f"Writing to {shown(self.folder)}", flush=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is trained: with adapters, a small share."""
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        trained = sum(size for size, requires_grad in sizes if requires_grad)
        if trainer.is_global_zero:
            print(f"Training {trained:,} of {sum(size for size, _ in sizes):,} parameters", flush=True)

    def on_train_batch_end(self, *args: Any) -> None:
        """From here on a failure has something to keep."""
        self.steps_done = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remember what ended the run."""
        self.first_error = self.first_error or exception


class Guarded:
    """A callback's ``on_exception`` whose own failure is a warning: it neither hides the error nor stops the checkpoint.

    Args:
        callback: whose hook it takes the place of.
    """

    def __init__(self, callback: Callback) -> None:
        self.name, self.hook = type(callback).__name__, callback.on_exception

    def __call__(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Call the hook."""
        try:
            self.hook(trainer, pl_module, exception)
        except Exception as error:
            rank_zero_warn(f"{self.name} failed while the run was ending: {type(error).__name__}: {error}")


def claim(folder: Path, fit: bool) -> None:
    """Refuse a folder that holds a run; evaluation may share it as long as no logger would replace ``metrics.csv``."""
    if holds_run(folder) if fit else (folder / "metrics.csv").exists():
        raise _taken(folder)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def is_about(error: OSError, folder: Path) -> bool:
    """Whether an error says that the run's folder cannot be made or written: the disk is full, or it lies elsewhere."""
    if error.errno in _NO_ROOM:
        return True
    if not isinstance(error.filename, str):
        return False
    place, run = Path(error.filename).absolute(), folder.absolute()
    return place == run or place in run.parents or run in place.parents


def _taken(folder: Path) -> UserError:
    return UserError(
        f"{shown(folder)} already holds a run, and a run is never overwritten: leave the logger's `version` out for a new "
        "folder, or name another with --trainer.logger.save_dir or --trainer.default_root_dir."
    )
