"""Where prompts come from: files, folders and hub ids of `datasets`, and the named sources that ship with the package."""

from __future__ import annotations

import glob
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from maestro_pl.data import memory
from maestro_pl.data.named_sources import BENCHMARKS
from maestro_pl.data.named_sources.forms import Benchmark
from maestro_pl.data.named_sources.options import BenchmarkOptions, parse_options
from maestro_pl.data.named_sources.reading import read_benchmark
from maestro_pl.data.problems import Problems
from maestro_pl.data.readers import READERS, Values, data_files, read_file, sound_rows, suffix_of
from maestro_pl.data.splits import SPLITS, Split, as_split, check_fractions
from maestro_pl.data.template import PromptTemplate
from maestro_pl.errors import UserError, check_choice

PromptForm: TypeAlias = Literal["as_given", "messages", "rendered"]
LastAssistant: TypeAlias = Literal["refuse", "reference", "continue"]


@dataclass
class Source:
    r"""One place that prompts come from, and how its rows are read.

    Args:
        path: A ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file (the text formats also as ``.gz``); several
            of them as a pattern (``shards/*.parquet``) or a folder, where names such as ``test-00000-of-00002`` tell the
            split; a folder made by ``datasets.save_to_disk``; a ``datasets`` hub id; the name of a source that ships with
            the package (``sandbox``) or of a benchmark (``natural_reasoning``, ``emobench``, ...); or one file a split:
            ``{train: a.jsonl, validation: b.jsonl, test: c.jsonl}``. In Python also rows themselves: see ``of``.
        name: The configuration of a hub id (``main`` of ``openai/gsm8k``) or of a benchmark's.
        task: The tag of all rows, under which rewards, weights and metrics are told apart. Default: the row's own
            ``task`` column, else the file's stem (or its folder's name where the stem is only ``train``, ``dev``, ...).
        columns: Our column name to theirs, for instance ``{prompt: question, reference: answer}``; a path goes into
            nested columns: ``{reference: reward_model.ground_truth}``. The other columns travel to the rewards untouched.
        where: Keep the rows whose columns have these values (or one of a list of values), for instance ``{language:
            en}``; compared as text.
        prompt_template: Builds the prompt from the row's columns, as ``"Write a story titled {title}."``.
            ``{prompt}`` is the row's own prompt, ``{choices!o}`` writes a list as lettered options.
        reference_pattern: A regular expression whose first group is the reference inside the reference column, for
            instance ``####\s*(.+)`` for GSM8K.
        cut_prompt_at: Drop everything in the prompt from this text on, and the blanks around the rest.
        prompt_form: ``as_given``: texts and chat messages as the rows have them; ``messages``: a text becomes a user
            message, so that rewards see a chat; ``rendered``: texts that hold the chat template's marks already, which are
            read as they are.
        last_assistant: What happens to a conversation that ends with the assistant: ``refuse`` it, take that turn as the
            ``reference`` of rows that have none, or let the policy ``continue`` it.
        split: Put all rows into this split.
        split_column: The column that says which split a row belongs to. Default: ``split`` if the rows have it.
        split_names: Our split name to theirs, for instance ``{validation: holdout}``, if theirs is none of the usual.
        fractions: The shares of train, validation and test, by a stable hash of the prompt.
        weight: The source's share of the training prompts, in proportion to the other sources' weights. Default: every
            prompt of every source once an epoch.
        limit: At most this many rows of each split, from the first on.
        options: Further keyword arguments of a named source, of ``datasets.load_dataset``, or of ``csv.reader``; of a
            benchmark above all ``file``, where its rows are.
    """

    path: str | dict[str, str]
    name: str | None = None
    task: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    # str and not str | None: jsonargparse reads a text that begins with "#" as a YAML comment where None is allowed
    prompt_template: str = ""
    reference_pattern: str = ""
    cut_prompt_at: str = ""
    prompt_form: PromptForm = "as_given"
    last_assistant: LastAssistant = "refuse"
    split: Split | None = None
    split_column: str | None = None
    split_names: dict[str, str] = field(default_factory=dict)
    fractions: list[float] | None = None
    weight: float | None = None
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Any, **options: Any) -> Source:
        """A source of rows that are already in memory.

        Args:
            rows: a list of dicts, a ``datasets.Dataset`` or ``DatasetDict``, a dict of columns, or a dict from splits to
                any of these.
            options: the other arguments of a source, by name.

        Raises:
            UserError: they are none of these.
        """
        return cls(path=memory.checked(rows), **options)

    @classmethod
    def from_text(cls, text: str) -> Source:
        """A source from its path alone."""
        if text.lstrip().startswith("{"):
            keys = ", ".join(f.name for f in fields(cls))
            raise UserError(f"data.sources: {text} is not a source that can be read; its keys may be {keys}.")
        return cls(path=text)

    def below(self, root: str) -> Source:
        """The same source with relative files and folders taken from ``root``; named sources and hub ids stay."""
        if self.in_memory:
            return self

        def place(path: str) -> str:
            inside = Path(root).expanduser() / Path(path).expanduser()
            is_file = bool(suffix_of(Path(path))) or inside.exists()
            return str(inside) if is_file and path not in NAMED and path not in BENCHMARKS else path

        path = place(self.path) if isinstance(self.path, str) else {k: place(v) for k, v in self.path.items()}
        if self.benchmark is None or "file" not in self.options:
            return replace(self, path=path)
        return replace(self, path=path, options={**self.options, "file": _placed(self.options["file"], Path(root))})

    @property
    def in_memory(self) -> bool:
        """Whether the path is not one, but rows."""
        return memory.is_rows(self.path)

    @property
    def benchmark(self) -> Benchmark | None:
        """The benchmark that the path names, None for any other source."""
        return BENCHMARKS.get(self.path) if isinstance(self.path, str) else None

    @property
    def benchmark_options(self) -> BenchmarkOptions:
        """The options of a source that names a benchmark.

        Raises:
            UserError: an option that there is not, or a value that cannot be used.
        """
        benchmark = self.benchmark
        assert benchmark is not None
        given = dict(self.options)
        if self.prompt_template:
            if "prompt_template" in given:
                raise UserError(
                    f"data.sources {self.label} has two prompt_templates, one of them in options; keep one."
                )
            given["prompt_template"] = self.prompt_template
        return parse_options(self.label, given, benchmark.options)

    def _check_benchmark(self) -> None:
        if self.split or self.split_column or self.fractions:
            raise UserError(
                f"The benchmark {self.label} brings its own splits; leave out split, split_column and fractions, or "
                "change its options train_size, validation_size and test_size."
            )
        if self.columns:
            raise UserError(
                f"The benchmark {self.label} knows its columns; leave out columns, or name the file itself as the path."
            )
        if self.name and (options := self.benchmark_options).file is not None:
            raise UserError(
                f"The benchmark {self.label} has a name, {self.name!r}, for the hub and a file, {options.file!r}; keep one."
            )
        self.benchmark_options  # noqa: B018 - raises for what cannot be used

    def check(self) -> None:
        """Check what can be checked without reading the source.

        Not in ``__post_init__``: jsonargparse tries the members of ``list[Source | str] | Source | str`` in turn, and
        would wrap the sentence in its own account of them.

        Raises:
            UserError: a value that cannot be used, or two that contradict each other.
        """
        where = f"data.sources {self.label}"
        if self.in_memory:
            memory.checked(self.path)
        elif not isinstance(self.path, (str, dict)):
            raise UserError(
                f"A data source has the path {self.path!r}; expected a text, or rows: a list of dicts, a dict of columns, a "
                "datasets.Dataset, or a dict from splits to these."
            )
        elif "\0" in str(self.path):
            raise UserError(f"{where!r}: the path holds a NUL character.")
        elif not self.path:
            raise UserError("A data source has an empty path; expected a file, a folder, a hub id or a named source.")
        if self.split is not None:
            check_choice(f"{where}: split", self.split, Split, form="{} is {!r}; expected one of {}.")
        check_choice(f"{where}: prompt_form", self.prompt_form, PromptForm, form="{} is {!r}; expected one of {}.")
        check_choice(
            f"{where}: last_assistant", self.last_assistant, LastAssistant, form="{} is {!r}; expected one of {}."
        )
        for names in (self.split_names, self.path if self._by_split else {}):
            if strangers := sorted(set(names) - set(SPLITS)):
                raise UserError(f"{where}: {strangers[0]!r} is no split; expected {', '.join(SPLITS)}.")
        ways = [f for f in ("split", "split_column", "fractions") if getattr(self, f) is not None]
        if len(ways) + self._by_split > 1:
            both = " and ".join(["path by split"] * self._by_split + ways)
            raise UserError(f"{where} says in more than one way how to split: {both}; keep one.")
        check_fractions(self.fractions, f"{where}: fractions")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise UserError(f"{where}: weight is {self.weight}; expected a number of at least 0.")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{where}: limit is {self.limit}; expected at least 1 row.")
        if self.prompt_template:
            PromptTemplate(self.prompt_template)
        if self.benchmark is not None:
            self._check_benchmark()
        if self.reference_pattern:
            self._check_pattern(where, self.reference_pattern)

    @staticmethod
    def _check_pattern(where: str, pattern: str) -> None:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise UserError(f"{where}: reference_pattern {pattern!r} is no regular expression: {error}.") from error
        if not groups:
            raise UserError(f"{where}: reference_pattern {pattern!r} has no (group); put one around the reference.")

    @property
    def label(self) -> str:
        """The source in messages: its path, or the first of its files."""
        if isinstance(self.path, str):
            return self.path
        if self.in_memory or not isinstance(self.path, dict):
            return f"rows ({type(self.path).__name__})"
        return next(iter(self.path.values()), "")

    @property
    def _by_split(self) -> bool:
        return isinstance(self.path, dict) and not self.in_memory


def _placed(file: Any, root: Path) -> Any:
    """Relative paths inside a ``file`` option, whatever its shape, taken from ``root``; ``check`` judges the shape."""
    if isinstance(file, dict):
        return {key: _placed(value, root) for key, value in file.items()}
    if isinstance(file, list):
        return [_placed(value, root) for value in file]
    return str(root.expanduser() / Path(file).expanduser()) if isinstance(file, str) and file else file


@dataclass
class Part:
    """A piece of a source as it was read: a file, a split of a data set.

    Attributes:
        label: names the piece in messages (the file's name).
        stem: the task of rows that have none.
        split: the split the piece itself belongs to, None if that is still to be found.
        rows: (row number, values).
        left_out: how many rows were left out as no part of what is read, by reason.
        blank_options: how many options were left out because they are empty.
    """

    label: str
    stem: str
    split: Split | None
    rows: list[tuple[int, Values]]
    left_out: dict[str, int] = field(default_factory=dict)
    blank_options: int = 0


def _call(name: str, function: Callable[..., list[Values]], split: str, options: dict[str, Any]) -> list[Values]:
    try:
        inspect.signature(function).bind(split, **options)
    except TypeError as error:
        raise UserError(f"The named source {name} does not take options {options}: {error}.") from error
    return function(split, **options)


def _sandbox(split: str, **options: Any) -> list[Values]:
    from maestro_pl import sandbox

    return _call("sandbox", sandbox.rows, split, options)


# name -> f(split, **Source.options) -> rows; one call for each of train, validation and test
NAMED: dict[str, Callable[..., list[Values]]] = {"sandbox": _sandbox}


def read_parts(source: Source, problems: Problems) -> Iterator[Part]:
    """Read a source, piece by piece.

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    if source.in_memory:
        for name, listed in memory.pieces(source.path).items():
            rows = sound_rows(((number, dict(row)) for number, row in enumerate(listed, 1)), name, problems)
            yield Part(name, source.task or "rows", as_split(name, {}), rows)
        return
    if isinstance(source.path, dict):
        for split in SPLITS:
            if split in source.path:
                for file in _matching(Path(source.path[split]).expanduser()):
                    yield _file_part(file, split, source, problems)
        return
    path = Path(source.path).expanduser()
    if source.benchmark is not None:
        for piece in read_benchmark(source.benchmark, source.benchmark_options, source.name, problems):
            left_out = dict(piece.left_out)
            yield Part(piece.label, source.path, piece.split, piece.rows, left_out, piece.blank_options)
    elif source.path in NAMED:
        yield from _named_parts(source.path, source)
    elif path.is_dir():
        if _is_saved(path) or not data_files(path):
            yield from _dataset_parts(_load_folder(path), path.name, source, problems)
        else:
            yield from _shards(data_files(path), path.absolute().name, source, problems)
    elif _is_pattern(path):
        yield from _shards(_matching(path), path.absolute().parent.name, source, problems)
    elif suffix_of(path) or path.is_file():
        yield _file_part(path, None, source, problems)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        yield from _dataset_parts(_load_hub(source.path, source), source.path.rsplit("/", 1)[-1], source, problems)
    else:
        raise UserError(f"There is no file or folder {source.path}; expected one, a hub id, or one of {_names()}.")


def _names() -> str:
    return ", ".join([*sorted(NAMED), *BENCHMARKS])


def _file_part(path: Path, split: Split | None, source: Source, problems: Problems) -> Part:
    name = path.with_suffix("").stem if path.suffix.lower() == ".gz" else path.stem
    stem = name if as_split(name, {}) is None else path.absolute().parent.name or name
    return Part(path.name, stem, split, read_file(path, problems, source.options))


def _is_pattern(path: Path) -> bool:
    return any(mark in str(path) for mark in "*?[") and not path.exists()


def _matching(path: Path) -> list[Path]:
    """The file, or the files that match a pattern, by name.

    Raises:
        UserError: no file matches.
    """
    if not _is_pattern(path):
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path)) if suffix_of(Path(name)))
    if not found:
        raise UserError(f"No file matches {path}; expected some that end in one of {', '.join(READERS)}.")
    return found


def _is_saved(folder: Path) -> bool:
    """Whether a folder was made by ``datasets.save_to_disk``."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def _shards(files: list[Path], stem: str, source: Source, problems: Problems) -> Iterator[Part]:
    """The files of a folder or pattern as pieces of one source; names that tell a split are believed.

    Raises:
        UserError: some names tell a split and others do not.
    """
    own_way = bool(source.split or source.split_column or source.fractions)
    splits = {file: None if own_way else _split_of(file) for file in files}
    told, untold = ([file.name for file in files if bool(splits[file]) is known] for known in (True, False))
    if told and untold:
        raise UserError(
            f"{source.label}: the name of {told[0]} tells its split, and that of {untold[0]} tells none: name the files of "
            "each split as path: {train: ..., test: ...}, or set split."
        )
    for file in files:
        yield Part(file.name, stem, splits[file], read_file(file, problems, source.options))


def _split_of(file: Path) -> Split | None:
    """The split that a shard's name tells: that of ``test-00000-of-00002.parquet`` is test."""
    match = re.match(r"([A-Za-z]+)(?:[-_.]?\d+(?:[-_]of[-_]\d+)?)?(?:[-_][0-9a-f]{8,})?\.", file.name)
    return as_split(match.group(1), {}) if match else None


def _named_parts(name: str, source: Source) -> Iterator[Part]:
    if source.split or source.split_column or source.fractions:
        raise UserError(f"The named source {name} brings its own splits; leave out split, split_column and fractions.")
    for split in SPLITS:
        rows = _call(name, NAMED[name], split, source.options)
        yield Part(f"{name}[{split}]", name, split, list(enumerate(rows, start=1)))


def _load_folder(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is a folder, but not one made by datasets.save_to_disk, and holds no file that can be read."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read as a folder made by datasets.save_to_disk: {reason}") from error


def _load_hub(path: str, source: Source) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, source.name, **source.options)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path!r} is no file or folder here and no named source ({_names()}), and datasets could not load it "
            f"from the hub: {reason}"
        ) from error


def _dataset_parts(loaded: Any, stem: str, source: Source, problems: Problems) -> Iterator[Part]:
    pieces: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    # one split named train is no split at all: fractions or a column may still divide it
    own_way = bool(source.split or source.split_column or source.fractions) or list(pieces) == ["train"]
    known = {name: as_split(name, source.split_names) for name in pieces}
    if not own_way and not any(known.values()):
        raise UserError(f"{source.label} has the splits {', '.join(pieces)}: map them with split_names.")
    for name, rows in pieces.items():
        if own_way or known[name]:
            label = f"{stem}[{name}]"
            yield Part(label, stem, None if own_way else known[name], sound_rows(enumerate(rows, 1), label, problems))
