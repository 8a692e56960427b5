"""What there is in a user's data, as far as a first config needs to know it: kinds of rows, references, lengths, splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, TypeAlias

from maestro_pl.data.guess import Guess, at, check_named, guess_columns, names
from maestro_pl.data.problems import Problems
from maestro_pl.data.readers import Values
from maestro_pl.data.rows import Row, load_source
from maestro_pl.data.sources import NAMED, Source, read_parts
from maestro_pl.data.splits import SPLITS, Split, split_by_fraction
from maestro_pl.errors import UserError

Kind: TypeAlias = Literal["choice", "number", "math", "short", "long", "none"]

SAMPLE = 2000  # rows whose texts are measured
MOST_KINDS = 12  # different values of a column that tells kinds of rows apart
SHORT = 8  # words of an answer that can be compared word for word
DIVISIONS = ([0.8, 0.1, 0.1], [0.7, 0.15, 0.15], [0.6, 0.2, 0.2], [0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.5, 0.5, 0.0])
SEEDS = 20  # of a division, tried until nothing is empty

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?")
_MATHS = re.compile(r"\\[a-zA-Z]+|\$[^$]+\$|[-+]?[\d.]+\s*[/^*=]\s*[-\d(]|^[-+\d.,\s()\\{}^_/*=<>a-z]{1,12}$")
_TAGS = re.compile(r"</?answer>")


@dataclass
class Piece:
    """Rows of one kind.

    Attributes:
        source: how they are read.
        guess: what was guessed of their columns; None where the source knows them itself.
        rows: as a run would have them.
        kind: what their references are.
        several: whether some rows accept more than one answer.
        task: the tasks of its rows.
        by: in words, how the source itself divides them; empty where it does not.
    """

    source: Source
    guess: Guess | None
    rows: dict[Split, list[Row]]
    kind: Kind
    several: bool
    tasks: list[str]
    by: str = ""

    @property
    def all_rows(self) -> list[Row]:
        """Of every split."""
        return [row for split in SPLITS for row in self.rows[split]]


@dataclass
class Survey:
    """What a data set is.

    Attributes:
        pieces: one, or one a kind of rows.
        apart: the column that tells the kinds apart; None where there is one kind.
        fractions, split_seed: a division after which every split of every piece has rows; None where the data is divided
            already, or is too little.
        systems: the share of the prompts with a system message of their own.
        tagged: whether the prompts ask for ``<answer>`` themselves.
    """

    pieces: list[Piece]
    apart: str | None = None
    fractions: list[float] | None = None
    split_seed: int = 0
    systems: float = 0.0
    tagged: bool = False
    counts: dict[Split, int] = field(default_factory=dict)


def survey(path: str, prompt: str | None = None, reference: str | None = None) -> Survey:
    """Look at a data set.

    Args:
        path: as of a ``Source``: a file, a pattern, a folder, a hub id or a name.
        prompt: the column of the prompt, where its name says nothing.
        reference: the column of the reference, likewise.

    Raises:
        UserError: it cannot be read, has rows that cannot be used, or no column that looks like a prompt.
    """
    whole = Source(path)
    whole.check()
    if whole.benchmark is not None or path in NAMED:
        if prompt or reference:
            raise UserError(f"{path} knows its own columns; leave out --prompt and --reference.")
        return _divided(Survey([_piece(whole, None)]))
    rows = _raw_rows(whole)
    for role, column in (("prompt", prompt), ("reference", reference)):
        check_named(rows, role, column)
    apart = _column_of_kinds(rows, prompt, reference)
    if apart is None:
        guess = guess_columns(rows, prompt, reference)
        return _divided(Survey([_piece(replace(whole, **guess.options), guess)]))
    pieces = []
    for value in dict.fromkeys(at(row, apart) for row in rows):
        own = [row for row in rows if at(row, apart) == value]
        has = reference is not None and any(at(row, reference) is not None for row in own)
        guess = guess_columns(own, prompt, reference if has else None)
        source = replace(whole, where={apart: value}, task=str(value), **guess.options)
        pieces.append(_piece(source, guess))
    return _divided(Survey(pieces, apart))


def _raw_rows(source: Source) -> list[Values]:
    problems = Problems("cannot be used", "Mend the rows, or leave them out of the file.")
    rows = [values for part in read_parts(source, problems) for _, values in part.rows]
    problems.settle("error", len(rows) + len(problems))
    return rows


def _column_of_kinds(rows: Sequence[Values], prompt: str | None, reference: str | None) -> str | None:
    """The column by whose values rows of different kinds can be told apart, if there are different kinds."""
    guesses: dict[frozenset[str], Guess | None] = {}
    kinds = [_kind_of_row(row, guesses, prompt, reference) for row in rows]
    if len(set(kinds)) < 2 or max(Counter(kinds).values()) > 0.98 * len(rows):
        return None
    found: list[tuple[bool, str]] = []
    for name in names(rows):
        if name in (prompt, reference):
            continue
        values = [at(row, name) for row in rows]
        if not all(isinstance(value, str) and len(value) < 80 for value in values):
            continue
        if not 2 <= len(set(values)) <= min(MOST_KINDS, len(rows) // 2):
            continue
        pairs = Counter(zip(values, kinds, strict=True))
        purest: Counter[str] = Counter()
        for (value, _), count in pairs.items():
            purest[value] = max(purest[value], count)
        if sum(purest.values()) >= 0.95 * len(rows):
            found.append((name not in ("task", "kind", "type", "data_source", "dataset", "category"), name))
    return min(found)[1] if found else None


def _kind_of_row(
    row: Values, guesses: dict[frozenset[str], Guess | None], prompt: str | None, reference: str | None
) -> str:
    """Roughly: what its columns are, and whether the reference is a number."""
    present = frozenset(name for name in row if at(row, name) is not None)
    if present not in guesses:
        try:
            guesses[present] = guess_columns([row], prompt, reference if reference in present else None)
        except UserError:
            guesses[present] = None
    guess = guesses[present]
    if guess is None:
        return "unknown"
    if guess.choices:
        return "choice"
    value = at(row, guess.columns.get("reference", "reference"))
    if value is None:
        return "none" if not guess.reference else "text"
    text = str(value[0] if isinstance(value, list) else value)
    if guess.reference_pattern or _NUMBER.fullmatch(text.strip()):
        return "number"
    return "text"


def _piece(source: Source, guess: Guess | None) -> Piece:
    loaded = load_source(0, source)
    rows = [row for split in SPLITS for row in loaded.rows[split]]
    kind, several = _kind(rows, guess is not None and guess.choices)
    tasks = list(dict.fromkeys(row.task for row in rows))
    by = "" if loaded.how == "all train" else loaded.how
    return Piece(source, guess, loaded.rows, kind, several, tasks, by)


def _kind(rows: Sequence[Row], choices: bool) -> tuple[Kind, bool]:
    if choices or all({"choices", "label"} <= row.values.keys() and row.values["choices"] for row in rows):
        return "choice", False
    given = [references for row in _sampled(rows) if (references := references_of(row))]
    several = any(len(references) > 1 for references in given)
    texts = [text.strip() for references in given for text in references]
    if not texts:
        return "none", False
    numbers = sum(bool(_NUMBER.fullmatch(text)) for text in texts)
    if numbers >= 0.95 * len(texts):
        return "number", several
    if numbers + sum(not _NUMBER.fullmatch(text) and _is_maths(text) for text in texts) >= 0.9 * len(texts):
        return "math", several
    words = sorted(len(text.split()) for text in texts)
    return "short" if words[int(0.9 * (len(words) - 1))] <= SHORT else "long", several


def _is_maths(text: str) -> bool:
    return len(text) < 200 and bool(_MATHS.search(text)) and not re.search(r"(?<!\\)\b[a-zA-Z]{4,}", text)


def references_of(row: Row) -> list[str]:
    """The references of a row, none or several."""
    value = row.values.get("reference")
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _sampled(rows: Sequence[Row]) -> list[Row]:
    step = max(1, len(rows) // SAMPLE)
    return list(rows[::step])


def _divided(found: Survey) -> Survey:
    """Find a division, unless the data brings one, and count what it gives."""
    rows = [row for piece in found.pieces for row in piece.all_rows]
    sample = _sampled(rows)
    found.systems = sum(_has_system(row) for row in sample) / len(sample)
    found.tagged = sum(bool(_TAGS.search(prompt_text(row))) for row in sample) > len(sample) / 2
    if any(piece.by for piece in found.pieces):
        found.counts = {split: sum(len(piece.rows[split]) for piece in found.pieces) for split in SPLITS}
        return found
    for fractions, seed in product(DIVISIONS, range(SEEDS)):
        counts = [
            Counter(split_by_fraction(row.key, fractions, seed) for row in piece.all_rows) for piece in found.pieces
        ]
        wanted = [split for split, fraction in zip(SPLITS, fractions, strict=True) if fraction]
        if all(of[split] for of in counts for split in wanted):
            found.fractions, found.split_seed = list(fractions), seed
            found.counts = {split: sum(of[split] for of in counts) for split in SPLITS}
            return found
    found.counts = {"train": len(rows), "validation": 0, "test": 0}
    return found


def _has_system(row: Row) -> bool:
    return isinstance(row.prompt, list) and any(message["role"] == "system" for message in row.prompt)


def prompt_text(row: Row) -> str:
    """All that stands in a row's prompt."""
    prompt = row.prompt
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


@dataclass
class Lengths:
    """Lengths in tokens.

    Attributes:
        prompts: of the prompts, ascending.
        references: of the references, ascending; empty where there are none.
    """

    prompts: list[int]
    references: list[int]

    @staticmethod
    def at(lengths: Sequence[int], share: float) -> int:
        """The length below which this share of them lies; 0 of none."""
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))] if lengths else 0


def lengths_of(rows: Sequence[Row], count: Callable[[str], int]) -> Lengths:
    """Measure a sample of rows with a counter of tokens."""
    sample = _sampled(rows)
    return Lengths(sorted(count(prompt_text(row)) for row in sample), sorted(_reference_lengths(sample, count)))


def _reference_lengths(rows: Sequence[Row], count: Callable[[str], int]) -> Iterator[int]:
    for row in rows:
        yield from (count(text) for text in references_of(row))


def as_plain(source: Source) -> dict[str, Any]:
    """The source as YAML has it: its path and what differs from the defaults."""
    keys = ("task", "where", "columns", "prompt_template", "reference_pattern", "last_assistant")
    default = Source(source.path)
    plain = {key: value for key in keys if (value := getattr(source, key)) != getattr(default, key)}
    return {"path": source.path, **plain}
