"""``maestro-pl experiment``: a grid of runs, each brought to its end once."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maestro_pl.cli.parser import ToolParser, folder_to_write
from maestro_pl.cli.resolve import Resolve, resolve_config
from maestro_pl.errors import RunStopped, UserError
from maestro_pl.evaluation.records import write_whole
from maestro_pl.experiment.cell import CellFolder, Missing, counts
from maestro_pl.experiment.grid import Cell, Grid, parse_shard, read_grid
from maestro_pl.experiment.lock import holder
from maestro_pl.experiment.schedule import COMMAND, Scheduler, check_jobs, failures

ALL_CHECKED = 50  # cells; each takes about a second to parse
EXPERIMENT_FILE = "experiment.json"


def experiment(arguments: list[str], command: Sequence[str] = COMMAND, resolve: Resolve = resolve_config) -> None:
    """Run a grid, or show where it stands.

    Args:
        arguments: those after ``maestro-pl experiment``.
        command: what runs a stage.
        resolve: gives the whole config of a cell, or raises where it cannot be used.

    Raises:
        UserError: the file, an option or a cell's arguments cannot be used; nothing has run.
        RunStopped: a cell failed (status 1) or Ctrl-C (130).
    """
    options = _parser().parse_args(arguments)
    grid = read_grid(Path(options.file))
    index, count = parse_shard(options.shard)
    out = Path(options.out or Path("runs", "experiments", grid.name)).absolute()
    folders = [CellFolder(out / "cells" / cell.name, cell) for cell in grid.shard(index, count)]
    check_jobs(options.jobs)
    if options.status:
        _show(folders)
        return
    todo = _to_do(folders, options.force, options.dry_run)
    cells = [folder.cell for folder in todo]
    checked = cells if len(cells) <= ALL_CHECKED else grid.sample(cells)
    configs = {cell.name: resolve(cell) for cell in checked}
    if len(checked) < len(cells):
        print(
            f"{len(checked)} of the cells are checked, which have every level; the others when they start.", flush=True
        )
    print(
        f"{grid.name}: {len(folders)} cells, {len(folders) - len(todo)} done, {len(todo)} to run in {out}", flush=True
    )
    if options.dry_run:
        _show_commands(todo, command)
        return
    try:
        write_whole(out_file(out), json.dumps(_summary(grid, Path(options.file)), indent=1))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}; give another folder with --out.") from error

    def config_of(cell: Cell) -> str:
        return configs.pop(cell.name, "") or resolve(cell)

    _run(Scheduler(config_of, options.jobs, command, say=lambda line: print(line, flush=True)), todo)
    _compare(grid, out)


def out_file(out: Path) -> Path:
    """The file that says what the experiment in a folder consists of."""
    out.mkdir(parents=True, exist_ok=True)
    return out / EXPERIMENT_FILE


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="maestro-pl experiment",
        description="Run a grid of runs (docs/experiments.md). A finished run is never run again, an interrupted one goes on.",
    )
    parser.add_argument("file", metavar="FILE", help="the experiment's YAML")
    parser.add_argument(
        "--out", type=folder_to_write, metavar="DIR", help="its folder; default: runs/experiments/<name>"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once on this machine; default: 1")
    parser.add_argument("--shard", metavar="i/n", help="only the i-th of n parts of the grid, i from 1")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check the file and its cells (of more than 50, some that have every level), print the commands and stop",
    )
    parser.add_argument("--status", action="store_true", help="list what is done, failed, running and to do, and stop")
    parser.add_argument("--force", action="store_true", help="run cells anew whose arguments have changed")
    return parser


def _to_do(folders: Sequence[CellFolder], force: bool, dry_run: bool) -> list[CellFolder]:
    states = {folder.cell.name: folder.state() for folder in folders}
    changed = [folder for folder in folders if states[folder.cell.name] == "changed"]
    if changed and not force:
        raise UserError(
            f"The arguments of {len(changed)} cells have changed since they ran ({_few(changed)}): give --force to run them "
            "anew (their folders are kept as <name>.before-<n>), or another --out."
        )
    held = [folder for folder in changed if holder(folder.lock) is not None]
    if held:
        raise UserError(f"{_few(held)}: {holder(held[0].lock)} is running it with other arguments: stop it first.")
    for folder in changed if not dry_run else []:
        print(
            f"{folder.cell.name}: its arguments have changed; what it was is kept in {folder.set_aside()}", flush=True
        )
    return [folder for folder in folders if states[folder.cell.name] != "done"]


def _run(scheduler: Scheduler, folders: Sequence[CellFolder]) -> None:
    try:
        outcomes = scheduler.run(folders)
    except KeyboardInterrupt:
        raise RunStopped("stopped; the same command goes on where the runs are.", status=130) from None
    failed = [outcome.folder for outcome in outcomes if outcome.outcome == "failed"]
    for line in failures(outcomes):
        print(line, flush=True)
    if failed:
        raise RunStopped(
            f"{len(failed)} of {len(folders)} runs failed ({_few(failed)}); the same command tries them again.",
            status=1,
        )


def _compare(grid: Grid, out: Path) -> None:
    """The comparison that the experiment asks for, once every cell of the whole grid is done."""
    if grid.compare is None:
        return
    left = [cell.name for cell in grid.cells if CellFolder(out / "cells" / cell.name, cell).state() != "done"]
    if left:
        print(f"The comparison waits for {len(left)} other cells of the grid, such as {left[0]}.", flush=True)
        return
    from maestro_pl.cli.compare import compare

    asked = grid.compare
    baseline = ["--baseline", str(asked["baseline"])] if asked["baseline"] is not None else []
    by = ["--by", ",".join(asked["by"])] if asked["by"] else []
    metrics = [part for metric in asked["metric"] for part in ("--metric", metric)]
    options = [str(out), *by, *baseline, *metrics, "--split", asked["split"]]
    if (axis := asked.get("within")) is None:
        compare([*options, "--out", str(out / "compare")])
        return
    for level in grid.axes[axis]:
        if any(cell.levels[axis] == level for cell in grid.cells):
            print(f"\n{axis} {level}:", flush=True)
            compare([*options, "--where", f"{axis}={level}", "--out", str(out / "compare" / level)])


def _summary(grid: Grid, path: Path) -> dict[str, Any]:
    cells = [{"name": cell.name, "levels": dict(cell.levels), "stages": list(cell.stages)} for cell in grid.cells]
    return {"name": grid.name, "file": str(path.resolve()), "axes": dict(grid.axes), "cells": cells}


def _show(folders: Sequence[CellFolder]) -> None:
    width = max(len(folder.cell.name) for folder in folders) if folders else 0
    states = [folder.state() for folder in folders]
    for folder, state in zip(folders, states, strict=True):
        entries = folder.progress()["stages"]
        detail = f"{entries[-1]['stage']}: {entries[-1]['reason']}" if state == "failed" else ""
        print(f"{folder.cell.name:<{width}}  {state:<11}  {detail}".rstrip())
    print(f"{len(folders)} cells: {counts(states) or 'none'}", flush=True)


def _show_commands(folders: Sequence[CellFolder], command: Sequence[str]) -> None:
    for folder in folders:
        print(f"{folder.cell.name}:")
        for stage in folder.left():
            try:
                arguments = folder.arguments(stage)
            except Missing:  # fit will have left it by then
                arguments = [*folder.located(stage), "--ckpt_path=<the checkpoint of fit>"]
            print("  " + shlex.join([*command, *arguments]), flush=True)


def _few(folders: Sequence[CellFolder]) -> str:
    names = [folder.cell.name for folder in folders]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
