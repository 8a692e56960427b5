"""Where a run writes, where its checkpoints are, and where the shipped configs lie."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from maestro_pl.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

#: What only a run writes: a folder that holds one of these is never written into a second time.
RUN_FILES = ("config.yaml", "metrics.csv", "weights.csv", "checkpoints")


def run_dir(trainer: Trainer) -> Path:
    """The folder of this run: the logger's versioned folder, or ``default_root_dir`` without a logger.

    Collective: call it on every rank, because the folder's name is broadcast from rank zero.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def free_path(path: Path) -> Path:
    """``path``, or the first of ``stem-1.ext``, ``stem-2.ext``, ... that does not exist."""
    number, candidate = 0, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


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


def last_checkpoint(folder: Path) -> Path:
    """The newest ``checkpoints/last*.ckpt`` of the runs in ``folder``, by modification time.

    Raises:
        UserError: no run in ``folder`` has one.
    """
    found = [*folder.glob("checkpoints/last*.ckpt"), *folder.glob("*/checkpoints/last*.ckpt")]
    if not found:
        raise UserError(
            f"There is no last checkpoint in {folder} or its versions to go on from: "
            "give the path of one (--ckpt_path PATH), or leave --ckpt_path out to start anew."
        )
    return max(found, key=lambda path: path.stat().st_mtime)
