"""The options of the benchmarks: ``options`` of a source, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from maestro_pl.data.splits import SPLITS, Split
from maestro_pl.data.template import PromptTemplate
from maestro_pl.errors import UserError

LANGUAGES = ("en", "zh", "all")
SIZES = ("train_size", "validation_size", "test_size")


@dataclass(frozen=True)
class BenchmarkOptions:
    """How a benchmark is read.

    Attributes:
        file: its rows, instead of the hub's: a file, a folder of files, a list of them, or one (or a list) a split.
        prompt_template: the prompt over the row's columns instead of the card's.
        train_size: at most this many training rows, instead of the card's number.
        validation_size: the same for validation.
        test_size: the same for test.
        max_rows: read at most this many rows of each split from the hub, evenly spaced.
        revision: the version of the hub's data set.
        language: ``en``, ``zh`` or ``all``, where a benchmark has both.
        allow_training: use a benchmark for training whose authors ask for evaluation only.
        max_length_ratio: leave out translation pairs of which one side has more than this many times the characters of
            the other; None keeps all.
        direction: translate from the first language to the second, as ``fr-en``; None: in the order of the row.
    """

    file: str | list[str] | dict[Split | None, list[str]] | None = None
    prompt_template: str = ""
    train_size: int | None = None
    validation_size: int | None = None
    test_size: int | None = None
    max_rows: int = 50_000
    revision: str | None = None
    language: str = "en"
    allow_training: bool = False
    max_length_ratio: float | None = None
    direction: str | None = None

    @property
    def files(self) -> dict[Split | None, list[str]]:
        """The files by split; None for those that are not told apart."""
        if isinstance(self.file, dict):
            return self.file
        if self.file is None:
            return {}
        return {None: [self.file] if isinstance(self.file, str) else self.file}


COMMON = ("file", "prompt_template", *SIZES, "max_rows", "revision")


def parse_options(name: str, given: Mapping[str, Any], own: tuple[str, ...]) -> BenchmarkOptions:
    """Check the options of a benchmark.

    Args:
        name: the benchmark.
        given: ``options`` of the source.
        own: the options that this benchmark takes besides the common ones.

    Raises:
        UserError: an option that there is not, or a value that cannot be used.
    """
    where = f"data.sources {name}: options"
    known = [f.name for f in fields(BenchmarkOptions) if f.name in COMMON or f.name in own]
    if strangers := sorted(set(given) - set(known)):
        raise UserError(f"{where}: there is no {strangers[0]!r}; expected {', '.join(known)}.")
    values = {key: value for key, value in given.items() if value is not None}
    if "file" in values:
        values["file"] = _files(values["file"], where)
    for key in (*SIZES, "max_rows"):
        low = 1 if key == "max_rows" else 0
        if key in values and (isinstance(values[key], bool) or not isinstance(values[key], int) or values[key] < low):
            raise UserError(f"{where}: {key} is {values[key]!r}; expected a whole number of at least {low}.")
    for key in ("prompt_template", "revision", "direction"):
        if key in values and not isinstance(values[key], str):
            raise UserError(f"{where}: {key} is {values[key]!r}; expected text.")
    options = BenchmarkOptions(**values)
    if options.language not in LANGUAGES:
        raise UserError(f"{where}: language is {options.language!r}; expected one of {', '.join(LANGUAGES)}.")
    if not isinstance(options.allow_training, bool):
        raise UserError(f"{where}: allow_training is {options.allow_training!r}; expected true or false.")
    ratio = options.max_length_ratio
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1):
        raise UserError(f"{where}: max_length_ratio is {ratio!r}; expected a number of at least 1, for instance 3.")
    if options.direction is not None and len(options.direction.split("-")) != 2:
        raise UserError(f"{where}: direction is {options.direction!r}; expected two languages, for instance fr-en.")
    if options.prompt_template:
        PromptTemplate(options.prompt_template)
    return options


def _files(value: Any, where: str) -> str | list[str] | dict[Split | None, list[str]]:
    if isinstance(value, dict):
        if strangers := sorted(set(map(str, value)) - set(SPLITS)):
            raise UserError(f"{where}: file has the split {strangers[0]!r}; expected {', '.join(get_args(Split))}.")
        return {split: _list(value[split], where) for split in SPLITS if split in value}
    return value if isinstance(value, str) and value else _list(value, where)


def _list(value: Any, where: str) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(item, str) and item for item in listed):
        raise UserError(f"{where}: file is {value!r}; expected a path, a list of paths, or {{train: ..., test: ...}}.")
    return listed
