"""The folder that an export writes into: a hidden neighbour while it is being made, and its own name once it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from maestro_pl.errors import UserError
from maestro_pl.run.paths import file_in_the_way, free_path

CARD = "README.md"
CONFIGS = ("config.json", "adapter_config.json")  # one of them is in every export
LOCK = ".lock"  # in a folder that is being made: held as long as its export lives


class CheckFailed(UserError):
    """What was written is not what was trained."""


def check_output(output: Path, overwrite: bool, run: Path, sources: Sequence[Path]) -> None:
    """Refuse to write where something else stands.

    Args:
        output: the folder to be.
        overwrite: replace an earlier export.
        run: the run's folder.
        sources: folders that are read from: the run's checkpoints, and the base if it is a folder.

    Raises:
        UserError: saying what stands there.
    """
    place = output.resolve()
    for source in sources:
        folder = source.resolve()
        inside = folder in place.parents and folder not in run.resolve().parents  # a base may hold the run's folder
        if place == folder or place in folder.parents or inside:
            raise UserError(f"--output {output} is in use: the export reads {source}. Give another folder.")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"--output {output} is no folder: give the name of a new one.")
    if (file := file_in_the_way(output)) is not None:
        raise UserError(f"--output {output} cannot be a folder, because {file} is a file: give another.")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if held and not overwrite:
        raise UserError(f"--output {output} is not empty: give --overwrite to replace it, or another folder.")
    foreign = [name for name in held if (output / name).is_dir()]
    if held and (foreign or CARD not in held or not any(name in held for name in CONFIGS)):
        raise UserError(
            f"--output {output} holds {(foreign or held)[0]} and is no earlier export, so --overwrite leaves it alone: give "
            "another folder."
        )


@contextmanager
def making(output: Path) -> Iterator[Path]:
    """A new folder beside ``output`` that takes its name at the end of the block.

    An exception removes it, save :class:`CheckFailed`, after which it is kept as ``<output>.failed``. What a killed
    export has left is removed by the next one to the same place.

    Raises:
        UserError: another export is writing to the same place, or nothing can be written there.
        CheckFailed: raised in the block; where the folder is kept is added to what it says.
    """
    output = output.absolute()
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}.") from error
    lock = FileLock(partial / LOCK, timeout=0)
    try:
        with suppress(OSError):  # a file system without locks
            lock.acquire()
        yield partial
        _put(partial, output)
        (output / LOCK).unlink(missing_ok=True)
    except CheckFailed as error:
        kept = free_path(output.with_name(f"{output.name}.failed"))
        partial.rename(kept)
        (kept / LOCK).unlink(missing_ok=True)
        raise CheckFailed(f"{error} What was written is kept for a look in {kept}; it is no export.") from error
    finally:
        lock.release()
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, output: Path) -> None:
    """Give the finished folder its name; one that had it goes when the new one is in its place."""
    # safetensors writes files that nobody else may read; what the folder allows holds for what is in it
    allowed = partial.stat().st_mode & 0o666
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | allowed)
    if output.exists():
        output.rename(output.with_name(f".{output.name}.old-{os.getpid()}"))
    partial.rename(output)
    for old in output.parent.glob(f".{output.name}.old-*"):
        shutil.rmtree(old)


def _remove_abandoned(output: Path) -> None:
    for left in output.parent.glob(f".{output.name}.partial-*"):
        try:
            with FileLock(left / LOCK, timeout=0):
                pass
        except Timeout:
            raise UserError(f"Another export is writing {output}: wait for it, or give another --output.") from None
        except OSError:  # a file system without locks: nobody knows whether it lives
            continue
        shutil.rmtree(left)
