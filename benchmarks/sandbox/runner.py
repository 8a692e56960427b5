"""Runs cells, several at once, each once: results are kept in a file and a stopped experiment goes on where it was."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.sandbox.cells import Cell, describe, run_cell
from maestro_pl.errors import UserError

Result = dict[str, Any]


def digest(described: dict[str, Any]) -> str:
    """A hash of everything in a described cell that shapes its result; what is at its default is left out."""
    default = json.loads(json.dumps(describe(Cell("", -1))))
    changed = {key: value for key, value in described.items() if value != default.get(key)}
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:16]


def key_of(cell: Cell) -> str:
    """The digest of a cell."""
    return digest(json.loads(json.dumps(describe(cell))))


def finished(path: Path) -> dict[str, Result]:
    """Results of the file, by digest; a line cut short by a kill is left out."""
    found: dict[str, Result] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[digest(entry["cell"])] = entry
    return found


def take_over(results: Path, path: Path) -> None:
    """Add the runs of a results file to those that are known. They say nothing of the code that made them: mind its commit."""
    known = finished(path)
    runs = [entry for entry in json.loads(results.read_text(encoding="utf-8"))["runs"] if "cell" in entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in runs if digest(entry["cell"]) not in known)


def hand_on(path: Path, results: Path) -> None:
    """Write all runs that are known into a results file, by name and seed, for :func:`take_over`."""
    runs = sorted(finished(path).values(), key=lambda entry: (str(entry["name"]), int(entry["seed"])))
    results.parent.mkdir(parents=True, exist_ok=True)
    known = [{key: value for key, value in entry.items() if value == value} for entry in runs]  # JSON has no NaN
    lines = ",\n".join(json.dumps(entry, sort_keys=True, allow_nan=False) for entry in known)
    results.write_text(f'{{"runs": [\n{lines}\n]}}\n', encoding="utf-8")


def run_all(cells: Sequence[Cell], path: Path, jobs: int) -> list[Result]:
    """The results of the cells in their order; those that the file has are not run again.

    Raises:
        UserError: some failed; the others have been run, and the file has them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = finished(path)
    wanted = {key_of(cell): cell for cell in cells}
    missing = [cell for key, cell in wanted.items() if key not in known]
    began = time.perf_counter()
    print(f"{len(cells)} runs, {len(wanted) - len(missing)} of them known", flush=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context = multiprocessing.get_context("spawn")
    with path.open("a", encoding="utf-8") as file, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write("\n")
        futures = {pool.submit(run_cell, cell): cell for cell in missing}
        failed: list[tuple[Cell, Exception]] = []
        for count, future in enumerate(as_completed(futures), start=1):
            cell = futures[future]
            try:
                entry = {"name": cell.name, "seed": cell.seed, **future.result()}
            except BrokenExecutor:  # no process is left to run the others
                raise
            except Exception as error:
                failed.append((cell, error))
                print(f"{count}/{len(missing)} {cell.name} seed {cell.seed} FAILED: {error}", flush=True)
                continue
            known[key_of(cell)] = entry
            file.write(json.dumps(entry) + "\n")
            file.flush()
            left = (time.perf_counter() - began) / count * (len(missing) - count)
            print(
                f"{count}/{len(missing)} {cell.name} seed {cell.seed}: utility {entry['utility']['all']:.3f}, "
                f"{entry['seconds']:.0f} s, {left / 60:.0f} min left",
                flush=True,
            )
    if failed:
        cell, error = failed[0]
        raise UserError(
            f"{len(failed)} of {len(missing)} runs failed, first {cell.name} with seed {cell.seed}: {error} The others "
            f"are kept in {path}, and the same command tries again those that are missing."
        ) from error
    return [known[key_of(cell)] for cell in cells]
