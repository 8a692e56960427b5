"""What an experiment's YAML asks for: axes, their levels, and the cells that they span."""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from maestro_pl.errors import LARGEST_SEED, UserError
from maestro_pl.run.yaml_files import not_utf8, parse_yaml, read_yaml

STAGES = ("fit", "validate", "test", "predict")
TOP_KEYS = ("name", "stages", "common", "axes", "include", "exclude", "compare")
CONFIG_KEYS = ("method", "model", "data", "rollout", "rewards", "anchors", "metrics", "trainer", "seed_everything")
LIST_KEYS = ("rewards", "anchors", "metrics")  # whose value may be the YAML file of a list
LAYER_KEYS = ("config", "args", *CONFIG_KEYS)
COMPARE_KEYS = ("by", "within", "baseline", "metric", "split")
SEED_KEY = "seed_everything"
SPLITS = ("test", "validation")  # that an evaluation of every prompt can be of
LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255, and `.before-<n>` may follow


@dataclass(frozen=True)
class Layer:
    """Arguments that are laid over those before: config files, then nested keys, then single options.

    Attributes:
        configs: absolute paths of config files; the later one wins.
        nested: keys as in a config file.
        options: dotted key to value, as on the command line.
    """

    configs: tuple[str, ...] = ()
    nested: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def definition(self) -> list[Any]:
        """What the layer says, whatever its files are called: contents and not paths, those of named files as well."""
        contents = [_contents(Path(path)) for path in self.configs]
        files = {
            key: str(value) for key, value in self.options.items() if key.rstrip("+") in LIST_KEYS and _is_file(value)
        }
        others = {key: value for key, value in self.options.items() if key not in files}
        named = _named([self.nested, others], Path())
        return [
            contents,
            self.nested,
            others,
            [_contents(Path(path)) for path in files.values()],
            *([named] if named else []),
        ]

    @property
    def is_number(self) -> bool:
        """Whether it says nothing but numbers for single keys, as an axis of seeds does."""
        values = self.options.values()
        numbers = all(_is_number(value) for value in values)
        return bool(values) and numbers and not self.configs and not self.nested


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        name: of its folder: the levels, joined by ``__``.
        levels: axis to level.
        stages: Lightning's (fit, validate, test, predict), in order; each is a command.
        layers: of arguments, the later one wins.
    """

    name: str
    levels: Mapping[str, str]
    stages: tuple[str, ...]
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> str:
        """Changes with the stages and with what the arguments say, in whatever file."""
        layers = [layer.definition() for layer in self.layers]
        text = json.dumps([self.stages, layers], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Grid:
    """An experiment.

    Attributes:
        name: of the experiment.
        axes: axis to its levels, in order.
        cells: in the order of the axes, the last one varying fastest.
        compare: arguments of the comparison at the end, or None.
    """

    name: str
    axes: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    compare: Mapping[str, Any] | None

    def sample(self, cells: Sequence[Cell]) -> list[Cell]:
        """Some of these cells that together have every level that they have; of an axis of numbers, the ends."""
        wanted = [self._levels_of(cell) for cell in cells]
        chosen: list[Cell] = []
        left = set().union(*wanted)
        while left:
            best = max(range(len(cells)), key=lambda i: len(wanted[i] & left))
            chosen.append(cells[best])
            left -= wanted[best]
        return chosen

    def _levels_of(self, cell: Cell) -> frozenset[tuple[str, str]]:
        """The levels of a cell, those between the ends of an axis of numbers left out."""
        return frozenset(
            (axis, cell.levels[axis])
            for axis, layer in zip(self.axes, cell.layers[1:], strict=True)
            if not layer.is_number or cell.levels[axis] in (self.axes[axis][0], self.axes[axis][-1])
        )

    def shard(self, index: int, count: int) -> list[Cell]:
        """Every ``count``-th cell; the same cells on every machine."""
        return list(self.cells[index::count])


def read_grid(path: Path) -> Grid:
    """Read and check an experiment's YAML.

    Raises:
        UserError: the file, one of its keys or values, or a file that it names cannot be used.
    """
    if not path.is_file():
        raise UserError(f"There is no experiment file {str(path)!r}: give the path of a YAML file.")
    content = _mapping(read_yaml(path, str(path)), str(path))
    _check_keys(content, TOP_KEYS, str(path))
    reader = _Reader(path)
    stages = reader.stages(content.get("stages", ["fit", "test"]), "stages")
    common = reader.layer(_mapping(content.get("common") or {}, f"{path}: common"), "common")
    axes = {str(name): reader.axis(str(name), value) for name, value in reader.axes(content.get("axes")).items()}
    cells = [reader.cell(levels, common, stages) for levels in itertools.product(*axes.values())]
    names = {axis: tuple(level.name for level in levels) for axis, levels in axes.items()}
    include = reader.rules(content.get("include"), names, "include")
    exclude = reader.rules(content.get("exclude"), names, "exclude")
    kept = [
        cell
        for cell in cells
        if (not include or any(_matches(cell, rule) for rule in include))
        and not any(_matches(cell, rule) for rule in exclude)
    ]
    if not kept:
        raise UserError(f"{path}: include and exclude leave none of the {len(cells)} cells.")
    _check_names(kept, path)
    compare = reader.compare(content.get("compare"), names)
    return Grid(reader.name(content.get("name", path.stem)), names, tuple(kept), compare)


@dataclass(frozen=True)
class _Level:
    axis: str
    name: str
    layer: Layer
    stages: tuple[str, ...] | None = None


class _Reader:
    """Reads the parts of one file; its sentences name the file, its relative paths start from the file's folder."""

    # by hand: under Any, jsonargparse reads a string as YAML once more ('1e-3', 'no'), which renames cells and digests

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, where: str, what: str) -> UserError:
        return UserError(f"{self.path}: {where}: {what}")

    def name(self, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"[\w.+-]+", value) or not value.strip("."):
            raise self.fail("name", f"{value!r} is no name of a folder: use letters, digits, `_`, `-` and `.`.")
        if _is_long(value):
            raise self.fail("name", f"{value!r} is longer than {LONGEST_NAME} bytes: shorten it.")
        return value

    def stages(self, value: Any, where: str) -> tuple[str, ...]:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed:
            raise self.fail(where, f"expected a list of {', '.join(STAGES)}, got {value!r}.")
        for stage in listed:
            if stage not in STAGES:
                raise self.fail(
                    where, f"there is no stage {stage!r}{_close(stage, STAGES)}; one of {', '.join(STAGES)}."
                )
        if len(set(listed)) < len(listed):
            raise self.fail(where, f"a stage stands twice in {listed}; name each once.")
        return tuple(listed)

    def axes(self, value: Any) -> dict[Any, Any]:
        axes = _mapping(value or {}, f"{self.path}: axes")
        if not axes:
            raise self.fail("axes", "there are none; give at least one, such as `seed: [0, 1, 2]`.")
        return axes

    def axis(self, name: str, value: Any) -> list[_Level]:
        """The levels: of a mapping of levels, of ``{key, values}``, or of a list of seeds."""
        where = f"axes.{name}"
        if isinstance(value, list) and name == "seed":
            value = {"key": SEED_KEY, "values": value}
        if isinstance(value, list):
            raise self.fail(
                where, f"a list needs the key that its values go to: `{name}: {{key: model.kl.coef, values: [...]}}`."
            )
        levels = _mapping(value, f"{self.path}: {where}")
        if "values" in levels:
            found = self._listed(name, levels)
        else:
            found = [self._level(name, str(level), settings) for level, settings in levels.items()]
        if not found:
            raise self.fail(where, "it has no levels; give at least one.")
        if len({level.name for level in found}) < len(found):
            raise self.fail(where, f"two levels have one name among {[level.name for level in found]}.")
        return found

    def _listed(self, axis: str, settings: Mapping[Any, Any]) -> list[_Level]:
        where = f"axes.{axis}"
        _check_keys(settings, ("key", "values"), f"{self.path}: {where}")
        keys, values = settings.get("key"), settings["values"]
        keys = [keys] if isinstance(keys, str) else keys
        if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
            raise self.fail(
                where, f"`key` is {settings.get('key')!r}; expected a key such as model.kl.coef, or a list."
            )
        if not isinstance(values, list):
            raise self.fail(where, f"`values` is {values!r}; expected a list.")
        if SEED_KEY in keys and not all(type(v) is int and 0 <= v <= LARGEST_SEED for v in values):
            raise self.fail(where, f"seeds are whole numbers from 0 to {LARGEST_SEED}, got {values}.")
        for place, value in enumerate(values):
            if isinstance(value, (dict, list)):
                raise self.fail(where, f"{value!r} has no name for a folder: give named levels instead of `values`.")
            self._check_value(value, where)
            for earlier in values[:place]:  # equal texts have one name, which is said below
                if _is_number(value) and _is_number(earlier) and value == earlier and str(value) != str(earlier):
                    raise self.fail(
                        where, f"`values` has {earlier} and {value}, which are one number: keep one of them."
                    )
        return [
            _Level(axis, self._level_name(axis, _value_name(v)), Layer(options=dict.fromkeys(keys, v))) for v in values
        ]

    def _level(self, axis: str, name: str, settings: Any) -> _Level:
        where = f"axes.{axis}.{name}"
        settings = dict(_mapping(settings or {}, f"{self.path}: {where}"))
        stages = self.stages(settings.pop("stages"), f"{where}.stages") if "stages" in settings else None
        return _Level(axis, self._level_name(axis, name), self.layer(settings, where, ("stages",)), stages)

    def _level_name(self, axis: str, name: str) -> str:
        if not re.fullmatch(r"[\w.+-]+", name) or "__" in name or name.startswith("."):
            raise self.fail(
                f"axes.{axis}", f"the level {name!r} is no name of a folder: use letters, digits, `_`, `-` and `.`."
            )
        return name

    def layer(self, settings: Mapping[Any, Any], where: str, more: Sequence[str] = ()) -> Layer:
        """Arguments: config files, nested keys and dotted ``args``."""
        _check_keys(settings, (*LAYER_KEYS, *more), f"{self.path}: {where}")
        configs = settings.get("config") or []
        configs = [configs] if isinstance(configs, str) else configs
        if not isinstance(configs, list) or not all(isinstance(config, str) for config in configs):
            raise self.fail(f"{where}.config", f"expected a file or a list of files, got {configs!r}.")
        options = dict(_mapping(settings.get("args") or {}, f"{self.path}: {where}.args"))
        for key, value in options.items():
            self._check_option(key, f"{where}.args")
            self._check_value(value, f"{where}.args.{key}")
        nested = {key: value for key, value in settings.items() if key in CONFIG_KEYS}
        for key in LIST_KEYS:
            for option in (key, f"{key}+"):  # `+` appends
                if isinstance(options.get(option), str) and (option == key or _is_yaml(options[option])):
                    options[option] = self._file(options[option], f"{where}.args.{option}")
            if isinstance(nested.get(key), str):
                options[key] = self._file(nested.pop(key), f"{where}.{key}")
            elif isinstance(nested.get(key), list):
                nested[key] = [self._entry(entry, f"{where}.{key}") for entry in nested[key]]
        return Layer(tuple(self._file(config, f"{where}.config") for config in configs), nested, options)

    def _check_option(self, key: Any, where: str) -> None:
        first = re.split(r"[.+]", str(key))[0]
        if first not in CONFIG_KEYS:
            raise self.fail(
                where,
                f"there is no key {str(key)!r}{_close(first, CONFIG_KEYS)}; it starts with {', '.join(CONFIG_KEYS)}.",
            )
        if str(key).startswith("trainer.logger"):
            raise self.fail(where, f"{key} is the experiment's: each run writes into the folder of its cell.")

    def _check_value(self, value: Any, where: str) -> None:
        try:
            option_text(value)
        except UserError as error:
            raise self.fail(where, str(error)) from error

    def _file(self, name: str, where: str) -> str:
        path = self.path.parent / Path(name).expanduser()
        if not path.is_file():
            raise self.fail(where, f"there is no file {str(path)!r}; paths start from the experiment's folder.")
        return str(path.resolve())

    def _entry(self, entry: Any, where: str) -> Any:
        """An entry of a list of callbacks; that of a file with its whole path."""
        if isinstance(entry, list):
            return [self._entry(item, where) for item in entry]
        return self._file(entry, where) if _is_yaml(entry) else entry

    def cell(self, levels: Sequence[_Level], common: Layer, stages: tuple[str, ...]) -> Cell:
        """The cell at these levels; of several levels with stages of their own, the last one counts."""
        own = [level.stages for level in levels if level.stages is not None]
        return Cell(
            "__".join(level.name if level.axis != "seed" else f"seed{level.name}" for level in levels),
            {level.axis: level.name for level in levels},
            own[-1] if own else stages,
            (common, *(level.layer for level in levels)),
        )

    def rules(self, value: Any, axes: Mapping[str, Sequence[str]], where: str) -> list[dict[str, list[str]]]:
        """Rules: axis to the levels it matches; a cell matches where every axis of the rule does."""
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.fail(where, f"expected a list of rules such as {{method: base, seed: [1, 2]}}, got {value!r}.")
        rules = []
        for rule in value:
            _check_keys(_mapping(rule, f"{self.path}: {where}"), tuple(axes), f"{self.path}: {where}")
            listed = {
                axis: [_value_name(v) for v in (levels if isinstance(levels, list) else [levels])]
                for axis, levels in rule.items()
            }
            for axis, levels in listed.items():
                for level in levels:
                    if level not in axes[axis]:
                        known = ", ".join(axes[axis])
                        raise self.fail(
                            where, f"{axis} has no level {level!r}{_close(level, axes[axis])}; it has {known}."
                        )
            rules.append(listed)
        return rules

    def compare(self, value: Any, axes: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
        """The comparison at the end: ``by`` (axes), ``baseline`` (a level), ``metric`` (one or several), ``split``.

        With ``within`` (an axis) there is one for each of its levels.
        """
        if value is None:
            return None
        settings = _mapping(value, f"{self.path}: compare")
        _check_keys(settings, COMPARE_KEYS, f"{self.path}: compare")
        by, metric = settings.get("by", []), settings.get("metric", [])
        by, metric = ([by] if isinstance(by, str) else by), ([metric] if isinstance(metric, str) else metric)
        for key, value in (("by", by), ("metric", metric)):
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise self.fail(f"compare.{key}", f"expected a name or a list of names, got {value!r}.")
        split = settings.get("split", "test")
        if split not in SPLITS:
            raise self.fail("compare.split", f"{split!r} is not one of {', '.join(SPLITS)}.")
        for axis in by:
            if axis not in axes:
                raise self.fail(
                    "compare.by", f"there is no axis {axis!r}{_close(axis, axes)}; one of {', '.join(axes)}."
                )
        if (within := settings.get("within")) is not None and (
            not isinstance(within, str) or within not in axes or within in by
        ):
            raise self.fail(
                "compare.within",
                f"{within!r} is not an axis beside those of `by`{_close(within, axes)}: one of "
                f"{', '.join(axis for axis in axes if axis not in by)}.",
            )
        baseline = settings.get("baseline")
        shown = by or [axis for axis in axes if axis not in ("seed", within)]  # as `maestro-pl compare` takes them
        names = ["/".join(levels) for levels in itertools.product(*(axes[axis] for axis in shown))] if shown else []
        if baseline is not None and names and str(baseline) not in names:
            raise self.fail(
                "compare.baseline",
                f"there is no {str(baseline)!r}{_close(str(baseline), names)}; one of {', '.join(names)}.",
            )
        found = {"by": by, "baseline": baseline, "metric": metric, "split": split}
        return found if within is None else {**found, "within": within}


def parse_shard(text: str | None) -> tuple[int, int]:
    """``i/n`` with i from 1 to n, as (index from 0, count); None is the whole grid.

    Raises:
        UserError: it is not of that form.
    """
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text}: expected i/n with i from 1 to n, for instance 1/4.")
    return int(match[1]) - 1, int(match[2])


def option_text(value: Any) -> str:
    """A value as it stands behind ``--key=``."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{value} cannot be an argument; give a finite number.")
    try:
        return json.dumps(value)
    except TypeError as error:  # a date, a set or bytes, which YAML knows and an argument does not
        raise UserError(
            f"{value} is a {type(value).__name__}, which cannot be an argument: put it in quotes to give it as text."
        ) from error


def _matches(cell: Cell, rule: Mapping[str, Sequence[str]]) -> bool:
    return all(cell.levels[axis] in levels for axis, levels in rule.items())


def _check_names(cells: Sequence[Cell], path: Path) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.name.lower(), cell)
        if other is not cell:
            raise UserError(f"{path}: two cells would share the folder {cell.name!r}: rename a level.")
        if _is_long(cell.name):
            raise UserError(
                f"{path}: the cell {cell.name!r} would have a folder whose name is longer than {LONGEST_NAME} bytes: shorten "
                "the names of its levels."
            )


def _is_long(name: str) -> bool:
    return len(os.fsencode(name)) > LONGEST_NAME


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value_name(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool) or value is None else str(value)


def _is_yaml(value: Any) -> bool:
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_file()


def _contents(path: Path, above: tuple[Path, ...] = ()) -> Any:
    """The text of a YAML file; where it names further ones, a list of it and of their contents."""
    text = _text(path)
    above = (*above, path.resolve())
    named = _named(_named_yaml(text), path.parent, above)
    return [text, named] if named else text


def _named(value: Any, folder: Path, above: tuple[Path, ...] = ()) -> list[Any]:
    """The contents of the YAML files that the value names, from a folder; one that is being read is not read again."""
    paths = [folder / name for name in _yaml_names(value) if os.path.isfile(folder / name)]
    return [_contents(path, above) for path in paths if path.resolve() not in above]


def _yaml_names(value: Any) -> Iterator[str]:
    """The strings in a nested value that may be paths of YAML files."""
    if _is_yaml(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _yaml_names(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _yaml_names(item)


@functools.lru_cache
def _named_yaml(text: str) -> tuple[str, ...]:
    """The strings in a YAML text that may be paths; none of one that is no YAML, which the parser will refuse."""
    try:
        return tuple(_yaml_names(parse_yaml(text)))
    except yaml.YAMLError:
        return ()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} {not_utf8(error)}.") from error


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys with values, got {value!r}.")
    return value


def _check_keys(content: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise UserError(
                f"{where}: there is no key {str(key)!r}{_close(str(key), known)}; known: {', '.join(known)}."
            )


def _close(name: Any, known: Any) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
