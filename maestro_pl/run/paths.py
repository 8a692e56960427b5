"""Where a run writes, where its checkpoints are, and where the shipped configs lie."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maestro_pl.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

#: What only a run writes: a folder that holds one of these is never written into a second time.
RUN_FILES = ("config.yaml", "metrics.csv", "weights.csv", "checkpoints")


_ASSIGNED = "maestro_run_dir"  # attribute of a Trainer, set by `assign_run_dir`


def run_dir(trainer: Trainer) -> Path:
    """The folder of this run, one whatever the loggers.

    It is the versioned folder of the first logger that has one (CSV, TensorBoard), or else the one that was assigned, or
    ``<save_dir>/<name>/<version>`` of the first logger, where Lightning puts its checkpoints, or ``default_root_dir``
    without a logger. Collective: call it on every rank, because the folder's name is broadcast from rank zero.
    """
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.loggers.logger import DummyLogger

    assigned = getattr(trainer, _ASSIGNED, None)
    loggers = [each for each in getattr(trainer, "loggers", ()) if isinstance(each, Logger)]
    if assigned is None and (not loggers or isinstance(loggers[0], DummyLogger)):
        return Path(trainer.log_dir or trainer.default_root_dir)
    if assigned is None:
        assigned = _folder_of(loggers, trainer.default_root_dir)
    return Path(trainer.strategy.broadcast(str(assigned)))


def _folder_of(loggers: list[Any], root: str) -> Path:
    kept = file_logger(loggers)
    if kept is not None:
        return Path(kept.log_dir)
    name, version = loggers[0].name, loggers[0].version
    return (
        Path(loggers[0].save_dir or root) / str(name) / (version if isinstance(version, str) else f"version_{version}")
    )


def file_logger(loggers: Iterable[Any]) -> Any:
    """The first logger that has a folder of this run alone, or None."""
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    return next((each for each in loggers if isinstance(each, (CSVLogger, TensorBoardLogger))), None)


def fix_places(loggers: Iterable[Any]) -> None:
    """Let the loggers that have a folder write there whatever becomes of the working folder during the run."""
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    for logger in loggers:
        for name in ("_root_dir", "_save_dir") if isinstance(logger, CSVLogger | TensorBoardLogger) else ():
            place = getattr(logger, name, None)
            if place is not None and "://" not in str(place):
                setattr(logger, name, os.path.abspath(place))


def assign_run_dir(trainer: Trainer, runs: Path) -> None:
    """Give a run whose loggers have no folder the next ``version_<n>`` in ``runs``."""
    taken = [path.name.removeprefix("version_") for path in runs.glob("version_*")]
    number = max((int(n) for n in taken if n.isdecimal()), default=-1) + 1
    setattr(trainer, _ASSIGNED, runs.absolute() / f"version_{number}")


def shown(path: Path | str) -> str:
    """A path as a user writes it: from the working folder where it lies below it."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere; or the working folder is gone
        return str(path)


def free_path(path: Path) -> Path:
    """``path``, or the first of ``stem-1.ext``, ``stem-2.ext``, ... that does not exist."""
    number, candidate = 0, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def file_in_the_way(folder: Path) -> Path | None:
    """The file that stands where this folder is to be, or where one above it is."""
    places = (folder, *folder.parents)
    return next((place for place in places if os.path.exists(place) and not os.path.isdir(place)), None)


def holds_run(folder: Path) -> bool:
    """Whether ``folder`` already has the files of a run."""
    return any((folder / name).exists() for name in RUN_FILES)


def config_path(name: str) -> Path:
    """The shipped config ``name``, such as ``"quickstart.yaml"``: from the installed package or from a checkout.

    Raises:
        UserError: there is no such file.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"The shipped config {name!r} is missing from {package / 'configs'}: reinstall, or give --config FILE."
    )


def sandbox_model(kind: Literal["policy", "preference"]) -> Path:
    """The folder of a model that comes with the package: the sandbox's tiny policy, or its small preference model."""
    return Path(__file__).resolve().parents[1] / "sandbox" / "assets" / kind


def newest_checkpoint(trainer: Trainer) -> str:
    """The newest file that this trainer's ``ModelCheckpoint`` callbacks have written; empty where there is none."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    written = [path for each in callbacks for path in (each.last_model_path, each.best_model_path, *each.best_k_models)]
    files = [path for path in written if path and Path(path).is_file()]
    return max(files, key=lambda path: Path(path).stat().st_mtime_ns, default="")


def checkpoints_in(folder: Path) -> list[Path]:
    """Every ``checkpoints/*.ckpt`` of the runs in ``folder``: those called ``last`` before the others, the newest first.

    Raises:
        UserError: no run in ``folder`` has one.
    """
    found = [*folder.glob("checkpoints/*.ckpt"), *folder.glob("*/checkpoints/*.ckpt")]
    if not found:
        raise _no_checkpoint(folder)
    return sorted(found, key=lambda path: (not path.name.startswith("last"), -path.stat().st_mtime_ns))


def last_checkpoint(folder: Path) -> Path:
    """The newest ``checkpoints/last*.ckpt`` of the runs in ``folder``, by modification time.

    Raises:
        UserError: no run in ``folder`` has one.
    """
    newest = checkpoints_in(folder)[0]
    if not newest.name.startswith("last"):
        raise _no_checkpoint(folder)
    return newest


def _no_checkpoint(folder: Path) -> UserError:
    return UserError(
        f"There is no last checkpoint in {shown(folder)} or its versions to go on from: "
        "give the path of one (--ckpt_path PATH), or leave --ckpt_path out to start anew."
    )
