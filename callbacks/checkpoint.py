"""Checkpoints of a run: regularly, when it ends, and when it is cut off."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class RunCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` whose ``last.ckpt`` is the last policy step, also when the run ends between two saves.

    Args:
        every_n_train_steps: policy steps between two checkpoints.
        keep: how many of the numbered checkpoints stay; ``last.ckpt`` is kept beside them. 1, the newest, or -1, all.
    """

    def __init__(self, every_n_train_steps: int = 50, keep: int = 1) -> None:
        super().__init__(
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            save_top_k=keep,
            save_last=True,
            save_on_exception=True,
        )
        self._saved_at = -1

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self._saved_at = trainer.lightning_module.batches_done

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step; Lightning does so only where nothing was saved before."""
        # by policy steps: a skipped update moves the data's place and the buffer, but not Lightning's global_step
        if self._saved_at != pl_module.batches_done and not trainer.fast_dev_run:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
