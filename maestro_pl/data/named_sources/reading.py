"""The rows of a benchmark, from files in one of its forms or from the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maestro_pl.data.named_sources.forms import BLANK_OPTIONS, Benchmark, LeftOutError
from maestro_pl.data.named_sources.options import BenchmarkOptions
from maestro_pl.data.problems import Problems
from maestro_pl.data.readers import READERS, Values, data_files, read_file
from maestro_pl.data.splits import Split, as_split
from maestro_pl.errors import UserError


@dataclass
class Piece:
    """The finished rows of one file, or of one split of the hub's data set.

    Attributes:
        label: names the piece in messages.
        split: the split it belongs to, None if its rows or nobody says.
        rows: (row number, values).
        left_out: how many rows were left out, by reason.
        blank_options: how many options were left out because they are empty.
    """

    label: str
    split: Split | None
    rows: list[tuple[int, Values]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    blank_options: int = 0


def read_benchmark(
    benchmark: Benchmark, options: BenchmarkOptions, config: str | None, problems: Problems
) -> Iterator[Piece]:
    """Read a benchmark, piece by piece.

    Args:
        benchmark: what to read.
        options: its files, or which rows of the hub's.
        config: the configuration of the hub id, None for the card's.
        problems: receives the rows that cannot be used.

    Raises:
        UserError: there are neither files nor a hub, or they cannot be read, or are of no known form.
    """
    if options.file is None:
        for name, split, of_split, rows in _hub(benchmark, options, config):
            piece = _piece(benchmark, options, f"{benchmark.card.name}[{name}]", split, rows, problems)
            if of_split > len(rows):
                piece.left_out[f"beyond max_rows={options.max_rows}"] = of_split - len(rows)
            yield piece
        return
    for of, paths in options.files.items():
        for path in _files(benchmark, paths):
            rows = [(number, row) for number, row in read_file(path, problems)]
            yield _piece(benchmark, options, path.name, of, rows, problems)


def _piece(
    benchmark: Benchmark,
    options: BenchmarkOptions,
    label: str,
    split: Split | None,
    rows: list[tuple[int, Values]],
    problems: Problems,
) -> Piece:
    piece = Piece(label, split)
    if not rows:
        return piece
    form = benchmark.detect(label, list(rows[0][1]))
    for number, values in rows:
        try:
            for row in benchmark.rows(form, values, options):
                piece.blank_options += row.pop(BLANK_OPTIONS, 0)
                piece.rows.append((number, row))
        except LeftOutError as reason:
            piece.left_out[str(reason)] += 1
        except ValueError as error:
            problems.add(label, number, str(error))
    return piece


def _files(benchmark: Benchmark, paths: list[str]) -> Iterator[Path]:
    for name in paths:
        path = Path(name).expanduser()
        if not path.is_dir():
            yield path
            continue
        inside = data_files(path)
        if not inside:
            raise UserError(
                f"data.sources {benchmark.card.name}: the folder {path} holds no {', '.join(READERS)} file."
            )
        yield from inside


def _hub(
    benchmark: Benchmark, options: BenchmarkOptions, config: str | None
) -> Iterator[tuple[str, Split | None, int, list[tuple[int, Values]]]]:
    """The hub's splits: name, our split (None if there is but one), rows it has, and the rows that are read."""
    card = benchmark.card
    remedy = f"give its rows with options: {{file: PATH}}, as {benchmark.accepted()}"
    if card.hub_id is None:
        raise UserError(f"data.sources {card.name} is published as files only ({card.origin}): {remedy}.")
    loaded = _load(card.hub_id, config or card.hub_config, options.revision, f"data.sources {card.name}", remedy)
    splits: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if len(splits) > 1 and not any(as_split(name, {}) for name in splits):
        raise UserError(f"data.sources {card.name}: {card.hub_id} has the splits {', '.join(splits)}; {remedy}.")
    for name, rows in splits.items():
        step = -(-len(rows) // options.max_rows) or 1
        chosen = range(0, len(rows), step)
        read = rows.select(chosen) if step > 1 else rows
        split = as_split(name, {})
        if split is not None or len(splits) == 1:
            numbered = [(place + 1, dict(row)) for place, row in zip(chosen, read, strict=True)]
            yield name, None if len(splits) == 1 else split, len(rows), numbered


def _load(hub_id: str, config: str | None, revision: str | None, where: str, remedy: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(hub_id, config, revision=revision)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{where}: there is no options.file, and datasets could not load {hub_id!r} from the hub ({reason}): {remedy}."
        ) from error
