"""Checkpoints of a run: regularly, in its warm-up too, when it ends, and when it is cut off."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from maestro_pl.run.paths import run_dir


class RunCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` whose ``last.ckpt`` is the last policy step, also when the run ends between two saves.

    The Conductor's warm-up is kept as well, although no policy step is done in it: every ``every_n_train_steps`` batches,
    at its end, and when it is cut off. Where something learns from validations (a weigher that does, a callback with a
    ``monitor``), a step with a validation is saved after it: a run that goes on does not validate again.

    Args:
        every_n_train_steps: policy steps between two checkpoints.
        keep: how many of the numbered checkpoints stay; ``last.ckpt`` is kept beside them. 1, the newest, or -1, all.

    Attributes:
        saved_at: training batches behind us at the last save, or at the start where none was made; -1 before it.
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
        self.saved_at = -1
        self._waits = False  # for the validation after this step

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Save into the run's folder, whatever the logger."""
        if self.dirpath is None:
            self.dirpath = str(run_dir(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """What a run begins with is on disk already, or nothing."""
        super().on_train_start(trainer, pl_module)
        self.saved_at = pl_module.batches_done

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where it is time, in the warm-up by its own batches; or wait for the validation that follows."""
        self._waits = _learns_from_validations(trainer, pl_module) and _validates_next(trainer)
        if not self._waits:
            self._save_where_due(trainer, pl_module, batch_idx)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Save what waited for it."""
        super().on_validation_end(trainer, pl_module)
        if self._waits and not trainer.sanity_checking:
            self._waits = False
            self._save_where_due(trainer, pl_module, trainer.fit_loop.batch_idx)

    def _save_where_due(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, None, None, batch_idx)
        done, total = pl_module.warmup
        due = done and (done == total or done % self._every_n_train_steps == 0)
        if due and not pl_module.policy_steps and self.saved_at != pl_module.batches_done and not trainer.fast_dev_run:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step; Lightning does so only where nothing was saved before."""
        # by policy steps: a skipped update moves the data's place and the buffer, but not Lightning's global_step
        if (self.saved_at != pl_module.batches_done or not self._last_checkpoint_saved) and not trainer.fast_dev_run:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save what was done since the last save; an error here is warned of, so that the first one is shown."""
        training = trainer.state.fn == "fit" and not trainer.fast_dev_run and not trainer.sanity_checking
        if not training or self.saved_at in (-1, pl_module.batches_done):
            return
        try:
            agreed = isinstance(exception, SIGTERMException)  # all ranks are here; else some may be gone, or wait
            if trainer.world_size > 1 and not agreed:
                if pl_module.saves_together:
                    rank_zero_warn(
                        "What was done since the last checkpoint is not saved: with trainer.strategy=fsdp and all parameters "
                        "trained, that takes all ranks."
                    )
                elif trainer.is_global_zero:
                    self._save_alone(trainer)
                return
            candidates = self._monitor_candidates(trainer)
            if pl_module.policy_steps:
                self._save_checkpoint(trainer, self.format_checkpoint_name(metrics=candidates))
            self._save_last_checkpoint(trainer, candidates)
        except Exception as error:
            rank_zero_warn(f"What was done since the last checkpoint is not saved: {error}")

    def _save_alone(self, trainer: Any) -> None:
        """Write ``last.ckpt`` without a word to the other ranks."""
        path = f"{self.dirpath}/{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        trainer.strategy.checkpoint_io.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), path)
        self.last_model_path = path

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.saved_at = trainer.lightning_module.batches_done


def _learns_from_validations(trainer: Any, pl_module: Any) -> bool:
    """Whether a checkpoint before a validation would forget what it found."""
    weigher = getattr(pl_module, "weigher", None)
    return getattr(weigher, "reads_validation", False) or any(getattr(c, "monitor", None) for c in trainer.callbacks)


def _validates_next(trainer: Any) -> bool:
    """Whether Lightning validates after the batch that has just ended; not known where that is a matter of time."""
    loop = trainer.fit_loop
    if not trainer.enable_validation or getattr(trainer, "_val_check_time_interval", None) is not None:
        return False
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
