"""One cell's folder: what has run, what is left, and the commands for it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import write_whole
from maestro_pl.experiment.grid import Cell
from maestro_pl.experiment.lock import holder

State: TypeAlias = Literal["done", "running", "failed", "changed", "interrupted", "to do"]
STATES: tuple[State, ...] = ("done", "running", "failed", "changed", "interrupted", "to do")


class Missing(UserError):
    """A stage cannot start, because what it needs was not left by the one before."""


@dataclass(frozen=True)
class CellFolder:
    """The folder of a cell.

    ``config.yaml`` is the whole config of its commands, ``progress.json`` says what they came to, ``done.json`` is
    there when all have succeeded. Each start of a stage has a folder of its own (``fit-0``, ``fit-1``, ``test-0``); its
    output is appended to ``fit.log``, ``test.log``.
    """

    path: Path
    cell: Cell

    @property
    def config(self) -> Path:
        """The config of all commands of the cell."""
        return self.path / "config.yaml"

    @property
    def lock(self) -> Path:
        """See :class:`maestro_pl.experiment.lock.CellLock`."""
        return self.path / "lock"

    def log(self, stage: str) -> Path:
        """What the stage's commands printed."""
        return self.path / f"{stage}.log"

    def progress(self) -> dict[str, Any]:
        """What ``done.json`` or ``progress.json`` says; the beginning of it in a new cell.

        Raises:
            UserError: the file is not what this program writes.
        """
        for name in ("done.json", "progress.json"):
            path = self.path / name
            if path.is_file():
                try:
                    content = json.loads(path.read_text(encoding="utf-8"))
                    return {"digest": content["digest"], "stages": list(content["stages"]), **content}
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{path} cannot be read ({error}): remove the cell's folder to run the cell anew."
                    ) from error
        return {
            "cell": self.cell.name, "levels": dict(self.cell.levels), "digest": self.cell.digest, "stages": [],
        }  # fmt: skip

    def state(self) -> State:
        """Where the cell stands."""
        progress = self.progress()
        if progress["digest"] != self.cell.digest:
            return "changed"
        if (self.path / "done.json").is_file():
            return "done"
        if holder(self.lock) is not None:
            return "running"
        if not (self.path / "progress.json").is_file():
            return "to do"
        return "failed" if progress["stages"] and progress["stages"][-1]["outcome"] == "failed" else "interrupted"

    def left(self) -> list[str]:
        """The stages that have not succeeded yet."""
        succeeded = {entry["stage"] for entry in self.progress()["stages"] if entry["outcome"] == "done"}
        return [stage for stage in self.cell.stages if stage not in succeeded]

    def begin(self, config: str) -> None:
        """Write the cell's config, unless it has begun before; the folder's lock is held."""
        if not (self.path / "progress.json").is_file():  # written last: a config alone may be an earlier start's
            write_whole(self.config, config)
            write_whole(self.path / "progress.json", json.dumps(self.progress(), indent=1))

    def add(self, entry: dict[str, Any]) -> None:
        """Note what a stage's command came to; the last one makes ``done.json``."""
        progress = self.progress()
        progress["stages"] = [*progress["stages"], entry]
        write_whole(self.path / "progress.json", json.dumps(progress, indent=1))
        if not self.left():
            write_whole(self.path / "done.json", json.dumps(progress, indent=1))

    def arguments(self, stage: str) -> list[str]:
        """The command of a stage: ``fit`` goes on from the cell's newest checkpoint, the others evaluate it.

        Raises:
            Missing: ``fit`` belongs to the cell and has left no checkpoint.
        """
        checkpoint = self.checkpoint()
        if checkpoint is None and stage != "fit" and "fit" in self.cell.stages:
            raise Missing(f"{stage} needs a checkpoint and fit has left none; is trainer.enable_checkpointing false?")
        return self.located(stage) + ([f"--ckpt_path={checkpoint}"] if checkpoint is not None else [])

    def located(self, stage: str) -> list[str]:
        """The command of a stage, with the folder that it writes into."""
        folder = self.free_folder(stage)
        return [
            stage,
            "--config",
            str(self.config),
            f"--trainer.logger.save_dir={folder.parent}",
            "--trainer.logger.name=",
            f"--trainer.logger.version={folder.name}",
        ]

    def free_folder(self, stage: str) -> Path:
        """The first of ``stage-0``, ``stage-1``, ... that does not exist."""
        number = 0
        while (self.path / f"{stage}-{number}").exists():
            number += 1
        return self.path / f"{stage}-{number}"

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint of the cell's own fits."""
        found = sorted(self.path.glob("fit-*/checkpoints/*.ckpt"), key=lambda path: (path.stat().st_mtime, path.name))
        return next((path for path in reversed(found) if zipfile.is_zipfile(path)), None)

    def set_aside(self) -> Path:
        """Move the folder away, so that the cell runs anew and nothing is lost."""
        number = 0
        while (target := self.path.with_name(f"{self.path.name}.before-{number}")).exists():
            number += 1
        self.path.rename(target)
        return target


def counts(states: Sequence[State]) -> str:
    """``3 done, 1 failed``: how many cells are in each state."""
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The end of a log, empty lines left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()][-count:]
