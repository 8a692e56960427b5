"""Reads the per-prompt values of runs, groups seeds, and refuses what cannot be compared."""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from maestro_pl.errors import UserError, from_cell
from maestro_pl.evaluation.records import FIELDS

Key: TypeAlias = tuple[str, str]  # task, prompt
EXPERIMENT_FILE = "experiment.json"
STEMS = {"test": "test_prompts", "validation": "val_prompts"}


@dataclass
class Evaluated:
    """The per-prompt values of one evaluation.

    Attributes:
        path: the CSV.
        header: how it was made.
        values: metric to (task, prompt) to value.
    """

    path: Path
    header: Mapping[str, Any]
    values: dict[str, dict[Key, float]]

    @property
    def keys(self) -> set[Key]:
        """The prompts."""
        return {key for values in self.values.values() for key in values}


@dataclass
class Run:
    """A run over S seeds, each evaluated on the same P prompts.

    Attributes:
        name: in the tables.
        seeds: for every seed its evaluations; more than one where cells hold different tasks.
        keys_N: the prompts, sorted.
    """

    name: str
    seeds: list[list[Evaluated]]
    keys_N: list[Key] = field(init=False)

    def __post_init__(self) -> None:
        for parts in self.seeds:
            _check_disjoint(self.name, parts)
        first = _union(self.seeds[0])
        for parts in self.seeds[1:]:
            check_same_prompts(
                (f"{self.name} ({self.seeds[0][0].path.parent})", first, self.texts),
                (f"{self.name} ({parts[0].path.parent})", _union(parts), _texts(parts)),
            )
        self.keys_N = sorted(first)

    @property
    def metrics(self) -> list[str]:
        """The metrics that every seed has, in the order of the first."""
        first = list(dict.fromkeys(metric for part in self.seeds[0] for metric in part.values))
        return [m for m in first if all(any(m in part.values for part in parts) for parts in self.seeds)]

    @property
    def texts(self) -> dict[str, str]:
        """How the prompts begin."""
        return _texts([part for parts in self.seeds for part in parts])

    @property
    def headers(self) -> list[Mapping[str, Any]]:
        """How each evaluation was made."""
        return [part.header for parts in self.seeds for part in parts]

    @property
    def seed_numbers(self) -> list[int]:
        """Of every seed what its evaluations say it was; their places, from 0, where that tells not all of them apart."""
        said = [parts[0].header.get("seed") for parts in self.seeds]
        known = [number for number in said if isinstance(number, int)]
        return known if len(set(known)) == len(said) else list(range(len(said)))

    def matrix(self, metric: str) -> Any:
        """Float64 [P, S]: NaN where the metric does not apply."""
        nan = float("nan")
        columns = []
        for parts in self.seeds:
            merged = {key: value for part in parts for key, value in part.values.get(metric, {}).items()}
            columns.append([merged.get(key, nan) for key in self.keys_N])
        return np.array(columns, dtype=np.float64).T.reshape(len(self.keys_N), len(self.seeds))


def read_runs(
    texts: Sequence[str], split: str, by: Sequence[str] = (), where: Mapping[str, str] | None = None
) -> tuple[list[Run], list[str]]:
    """The runs that the command line names.

    Args:
        texts: ``FOLDER``, ``NAME=FOLDER``, ``NAME=FOLDER,FOLDER`` (seeds), or the folder of an experiment.
        split: ``test`` or ``validation``.
        by: the axes of an experiment that make a run; the others, save ``seed``, must hold different prompts.
        where: axis to level: only the cells of an experiment that are there.

    Returns:
        The runs, and sentences about cells that are left out.

    Raises:
        UserError: a folder or file cannot be used, two runs have one name, the prompts of a run's seeds differ, or ``by`` or
            ``where`` is given and no experiment.
    """
    if split not in STEMS:
        raise UserError(f"--split {split}: expected one of {', '.join(STEMS)}.")
    runs: list[Run] = []
    notes: list[str] = []
    experiments = 0
    for text in texts:
        name, folders = _named(text)
        if name is None and (folders[0] / EXPERIMENT_FILE).is_file():
            experiments += 1
            found, missing = _experiment(folders[0], split, by, where or {})
            runs += found
            notes += missing
        else:
            parts = [[read_records(records_path(folder, split))] for folder in folders]
            runs.append(Run(name or folder_name(folders[0]), parts))
    asked = ["--by " + ",".join(by)] if by else []
    asked += [f"--where {axis}={level}" for axis, level in (where or {}).items()]
    if asked and not experiments:
        raise UserError(
            f"{' '.join(asked)}: {', '.join(texts)} are runs, and only an experiment's folder has axes: give one, or leave "
            f"{'it' if len(asked) == 1 else 'them'} out."
        )
    names = [run.name for run in runs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"Two runs are called {twice[0]!r}: name them, as in NAME=FOLDER.")
    return runs, notes


def records_path(folder: Path, split: str) -> Path:
    """The newest per-prompt file of a run's folder, or of its only evaluation below.

    Raises:
        UserError: there is none, or several evaluations lie below.
    """
    stem = STEMS[split]
    if not folder.is_dir():
        raise UserError(f"There is no folder {str(folder)!r}: give the folder of a run.")
    own = _numbered(folder, stem)
    if own:
        return own[-1]
    below = [found[-1] for child in sorted(folder.iterdir()) if child.is_dir() and (found := _numbered(child, stem))]
    if len(below) == 1:
        return below[0]
    if below:
        some = ", ".join(str(path.parent) for path in below[:4])
        raise UserError(f"{folder} holds {len(below)} evaluations: give one of their folders ({some}).")
    command = "test" if split == "test" else "validate"
    raise UserError(f"{folder} has no {stem}.csv: `maestro-pl {command}` writes it; give the folder of such a run.")


def read_records(path: Path) -> Evaluated:
    """Read a per-prompt file and its header.

    Raises:
        UserError: one of the two is missing or is not what an evaluation writes.
    """
    header = _read_header(path.with_suffix(".json"))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            values = _read_values(path, file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): evaluate the run again.") from error
    if not values:
        raise UserError(f"{path} has no values; evaluate the run again.")
    return Evaluated(path, header, values)


def _read_header(path: Path) -> Mapping[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): evaluate the run again.") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} holds {_cut(header)}, expected an object of settings; evaluate the run again.")
    # by hand: jsonargparse reads strings of settings as YAML once more, and they are compared as they are
    for key in ("prompts", "data", "rollout"):
        part = header.get(key, {})
        if not isinstance(part, dict) or (key == "prompts" and not all(isinstance(t, str) for t in part.values())):
            of = "texts" if key == "prompts" else "settings"
            raise UserError(f"{path}: {key} is {_cut(part)}, expected an object of {of}; evaluate the run again.")
    return header


def _read_values(path: Path, file: Iterable[str]) -> dict[str, dict[Key, float]]:
    """Metric to (task, prompt) to value; NaN where the metric does not apply."""
    values: dict[str, dict[Key, float]] = {}
    reader = csv.reader(file)
    if tuple(next(reader, ())) != FIELDS:
        raise UserError(f"{path}: expected the columns {', '.join(FIELDS)}; evaluate the run again.")
    for line in reader:
        where = f"{path}, line {reader.line_num}"
        try:
            prompt, task, metric, text = line
            value, task, metric = float(text), from_cell(task), from_cell(metric)
        except ValueError as error:
            raise UserError(f"{where}: {error}; evaluate the run again.") from error
        if math.isinf(value):
            raise UserError(f"{where}: {metric} is {text}, expected a finite number or nan; evaluate the run again.")
        if (task, prompt) in values.setdefault(metric, {}):
            raise UserError(f"{where}: {metric} of the prompt {prompt} of {task} stands twice; evaluate the run again.")
        values[metric][task, prompt] = value
    return values


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


Prompts: TypeAlias = tuple[str, set[Key], Mapping[str, str]]


def check_same_prompts(one: Prompts, other: Prompts) -> None:
    """Raise unless both have the same prompts.

    Args:
        one: a name, the prompts and how they begin.
        other: the same of the other.

    Raises:
        UserError: per task, how many are only in either, and an example.
    """
    (name, keys, texts), (other_name, other_keys, other_texts) = one, other
    if keys == other_keys:
        return
    sentences = []
    for task in sorted({task for task, _ in keys ^ other_keys}):
        sides = (
            (name, {k for k in keys - other_keys if k[0] == task}, texts),
            (other_name, {k for k in other_keys - keys if k[0] == task}, other_texts),
        )
        told = [f"{len(only)} only in {run} (such as {_shown(min(only), known)})" for run, only, known in sides if only]
        common = sum(key[0] == task for key in keys & other_keys)
        sentences.append(f"{task}: {' and '.join(told)}, {common} in both")
    raise UserError(
        f"{name} and {other_name} were not evaluated on the same prompts, so they cannot be paired. {'; '.join(sentences)}. "
        "Evaluate both with the same data, data.eval_limit and data.split_seed."
    )


def setting_warnings(runs: Sequence[Run]) -> list[str]:
    """A sentence for every setting of the evaluation in which a run differs from the first."""
    warnings = []
    first = _flat(runs[0].headers[0])
    for run in runs:
        told: set[str] = set()
        for header in run.headers:
            for key, value in _flat(header).items():
                if key in first and first[key] != value and key not in told:
                    told.add(key)
                    warnings.append(f"{key} is {first[key]!r} in {runs[0].name} and {value!r} in {run.name}.")
    return warnings


def choose_metrics(runs: Sequence[Run], asked: Sequence[str]) -> list[str]:
    """The metrics to compare: those asked for, or the rewards and pass@1 that every run has.

    Raises:
        UserError: a run lacks one; close names are given.
    """
    for metric in asked:
        for run in runs:
            if metric not in run.metrics:
                close = difflib.get_close_matches(metric, run.metrics, n=3, cutoff=0.4)
                hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(run.metrics)}."
                raise UserError(f"{run.name} has no metric {metric!r}: {hint}")
    if asked:
        return list(dict.fromkeys(asked))
    common = [m for m in runs[0].metrics if all(m in run.metrics for run in runs)]
    chosen = [m for m in common if (m.startswith("reward/") and m.count("/") == 1) or m.startswith("pass@1")]
    if not chosen:
        raise UserError(
            "The runs have no reward in common: give --metric, one of " + (", ".join(common) or "none") + "."
        )
    return chosen


def _named(text: str) -> tuple[str | None, list[Path]]:
    name, equals, rest = text.partition("=")
    if not equals or "/" in name:
        return None, [Path(text)]
    folders = [Path(part) for part in rest.split(",") if part]
    if not name or not folders:
        raise UserError(f"{text!r}: expected NAME=FOLDER or NAME=FOLDER,FOLDER,...")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{text!r} names a folder twice: a seed counts once.")
    return name, folders


def folder_name(folder: Path) -> str:
    """What a run is called that is given by its folder alone."""
    parts = folder.resolve().parts
    generic = re.fullmatch(r"(version_|(test|validate|fit)-)\d+", parts[-1])
    return "/".join(parts[-2:]) if generic and len(parts) > 1 else parts[-1]


def _experiment(folder: Path, split: str, by: Sequence[str], where: Mapping[str, str]) -> tuple[list[Run], list[str]]:
    """The runs of an experiment: the cells of the same ``by`` levels, over their seeds."""
    summary = _read_summary(folder / EXPERIMENT_FILE)
    axes, cells = list(summary["axes"]), summary["cells"]
    for axis in by:
        if axis not in axes:
            raise UserError(f"--by {axis}: {folder} has no such axis; it has {', '.join(axes)}.")
    for axis, level in where.items():
        levels = list(dict.fromkeys(cell["levels"].get(axis) for cell in cells))
        if axis not in axes or level not in levels:
            known = f"it has {', '.join(map(str, levels))}" if axis in axes else f"the axes are {', '.join(axes)}"
            raise UserError(f"--where {axis}={level}: {folder} has no such cell; {known}.")
    cells = [cell for cell in cells if all(cell["levels"][axis] == level for axis, level in where.items())]
    by = by or [axis for axis in axes if axis != "seed" and axis not in where]
    groups: dict[str, dict[str, list[Evaluated]]] = {}
    missing = []
    for cell in cells:
        path = folder / "cells" / cell["name"]
        if not (path / "done.json").is_file():
            missing.append(cell["name"])
            continue
        name = "/".join(cell["levels"][axis] for axis in by) or folder.name
        seeds = groups.setdefault(name, {})
        seeds.setdefault(cell["levels"].get("seed", ""), []).append(read_records(_cell_records(path, split)))
    if not groups:
        raise UserError(
            f"No cell of {folder} is done yet: `maestro-pl experiment {summary.get('file', 'FILE')} --status`."
        )
    notes = [f"{folder}: {len(missing)} cells are not done and left out: {', '.join(missing)}."] if missing else []
    return [Run(name, list(seeds.values())) for name, seeds in groups.items()], notes


def _read_summary(path: Path) -> Mapping[str, Any]:
    """What an experiment consists of: the axes, and each cell with its name and a level of every axis."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): run the experiment again.") from error
    parts = summary if isinstance(summary, dict) else {}
    axes, cells = parts.get("axes"), parts.get("cells")
    if not isinstance(axes, dict) or not isinstance(cells, list):
        raise UserError(f"{path} holds {_cut(summary)}, expected axes and a list of cells: run the experiment again.")
    for cell in cells:  # by hand: jsonargparse does not say which cell of the list is wrong
        levels = cell.get("levels") if isinstance(cell, dict) and isinstance(cell.get("name"), str) else None
        if (
            not isinstance(levels, dict)
            or not set(levels) >= set(axes)
            or not all(isinstance(level, str) for level in levels.values())
        ):
            raise UserError(
                f"{path} has the cell {_cut(cell)}, expected a name and a level of {', '.join(axes) or 'each axis'}: run the "
                "experiment again."
            )
    return parts


def _cell_records(cell: Path, split: str) -> Path:
    """The per-prompt file of a cell's newest evaluation."""
    stage = "test" if split == "test" else "validate"
    numbered = [(int(m[1]), path) for path in cell.iterdir() if (m := re.fullmatch(rf"{stage}-(\d+)", path.name))]
    for _, folder in sorted(numbered, reverse=True):
        if found := _numbered(folder, STEMS[split]):
            return found[-1]
    raise UserError(f"{cell} has no {STEMS[split]}.csv: give the experiment the stage {stage!r}.")


def _numbered(folder: Path, stem: str) -> list[Path]:
    """``stem.csv``, ``stem-1.csv``, ... in the order in which they were written."""
    found = [
        (int(m[1] or 0), p) for p in folder.glob(f"{stem}*.csv") if (m := re.fullmatch(stem + r"(?:-(\d+))?", p.stem))
    ]
    return [path for _, path in sorted(found)]


def _check_disjoint(name: str, parts: Sequence[Evaluated]) -> None:
    seen: dict[Key, Evaluated] = {}
    for part in parts:
        for key in sorted(part.keys):
            if key in seen:
                raise UserError(
                    f"{name} would hold {seen[key].path.parent.parent.name} and {part.path.parent.parent.name}, which were "
                    "evaluated on the same prompts: name the axis in which they differ in --by."
                )
            seen[key] = part


def _union(parts: Iterable[Evaluated]) -> set[Key]:
    return {key for part in parts for key in part.keys}


def _texts(parts: Iterable[Evaluated]) -> dict[str, str]:
    return {key: text for part in parts for key, text in dict(part.header.get("prompts", {})).items()}


def _shown(key: Key, texts: Mapping[str, str]) -> str:
    text = texts.get(key[1], "")
    return f"{key[1]}: {text[:60]!r}" if text else key[1]


def _flat(header: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that two evaluations should share, by dotted name."""
    nested = {f"{group}.{key}": value for group in ("data", "rollout") for key, value in header.get(group, {}).items()}
    return {"split": header.get("split"), "the policy's model": header.get("model"), **nested}
