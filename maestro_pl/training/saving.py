"""Checkpoints on disk: whole or not at all, and never a state that is not finite."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from maestro_pl.errors import UserError
from maestro_pl.policy.sharding import own_share
from maestro_pl.training import sharded_files
from maestro_pl.training.checkpointing import KEY, check_file


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and puts it there when all of it is on the disk.

    Whatever happens in between (a kill, a full disk), the file of that name is a whole one, the new or the one before.
    Nothing is written elsewhere, so that it does not matter where ``$TMPDIR`` is. What is read is checked first. Shares of
    several ranks (:mod:`maestro_pl.training.sharded_files`) are read whole.

    Attributes:
        leaves_optimizers: shares of optimizers' states are left to who asks for them.
    """

    leaves_optimizers = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save, or leave what was there.

        Raises:
            UserError: the file cannot be written.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except OSError as error:
            _remove(partial)
            raise UserError(f"The checkpoint {target} cannot be written: {error.strerror or error}.") from error
        _folder_to_disk(target.parent)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file that is a whole checkpoint of ours.

        Raises:
            UserError: it is none.
        """
        if "://" not in str(path):
            check_file(str(path))
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        sharded_files.fill(loaded, path, loaded.get(KEY, {}), sharded_files.STATE if self.leaves_optimizers else None)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, and the shares that belong to it."""
        super().remove_checkpoint(path)
        if "://" not in str(path):
            sharded_files.remove_others(Path(path), None)


def save_whole_files(trainer: Any) -> None:
    """Let this trainer write and read checkpoints by :class:`WholeFileIO`, unless it was given another way."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFileIO()


def not_finite(parameters: Iterable[tuple[str, torch.Tensor]], optimizers: Iterable[Any]) -> str:
    """What of this state is NaN or infinite: the name of the first parameter, or whose state; empty where all is finite."""
    for name, parameter in parameters:
        if not _is_finite(parameter):
            return name
    for optimizer in optimizers:
        if any(not _is_finite(value) for state in optimizer.state.values() for value in state.values()):
            return f"the state of {type(optimizer).__name__}"
    return ""


def _is_finite(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    return bool(own_share(value).isfinite().all())


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder is what cannot be written, which is said already
        return


def _folder_to_disk(folder: Path) -> None:
    """Let the new name outlive a crash of the machine, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
