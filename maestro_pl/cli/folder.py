"""A run's folder: taken once, with the whole config in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from maestro_pl.errors import UserError
from maestro_pl.run.paths import free_path, holds_run, run_dir


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole config into the run's folder, never over another, and notes that work was done."""

    steps_done = False
    folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` (fit) or ``<stage>.config.yaml``."""
        self.folder = run_dir(trainer)  # on every rank: the folder's name is broadcast
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
                file.write(self.parser.dump(self.config, skip_unset=False))
        except FileExistsError:
            raise _taken(self.folder) from None
        print(f"Writing to {self.folder}", flush=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is trained: with adapters, a small share."""
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        trained = sum(size for size, requires_grad in sizes if requires_grad)
        if trainer.is_global_zero:
            print(f"Training {trained:,} of {sum(size for size, _ in sizes):,} parameters", flush=True)

    def on_train_batch_end(self, *args: Any) -> None:
        """From here on a failure has something to keep."""
        self.steps_done = True


def claim(folder: Path, fit: bool) -> None:
    """Refuse a folder that holds a run; evaluation may share it as long as no logger would replace ``metrics.csv``."""
    if holds_run(folder) if fit else (folder / "metrics.csv").exists():
        raise _taken(folder)


def _taken(folder: Path) -> UserError:
    return UserError(
        f"{folder} already holds a run, and a run is never overwritten: leave the logger's `version` out for a new "
        "folder, or name another with --trainer.logger.save_dir or --trainer.default_root_dir."
    )
