"""Files to rows: JSON lines, JSON, CSV, TSV and Parquet, each row with the place where it stands.

Text files may be packed with gzip. What is read is limited in size and depth, so that no file ends the process.

The text formats go through the standard library, because ``json`` and ``csv`` let us name the line of a bad row.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.data.problems import Problems
from maestro_pl.errors import UserError

Values: TypeAlias = dict[str, Any]
Numbered: TypeAlias = Iterator[tuple[int, Values]]

# csv refuses fields of more than 128 KiB by default; a long document is no error
FIELD_LIMIT = 2**31 - 1

#: The largest file, unpacked, in bytes: its rows take several times as much memory.
LARGEST = 4 * 2**30

#: The most rows of a Parquet file, which can say that it has any number without having a byte for each.
MOST_ROWS = 20_000_000

#: The deepest nesting of lists and objects in a row; what copies or writes rows does so recursively.
DEEPEST = 100

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_file(path: Path, problems: Problems, options: Values | None = None) -> list[tuple[int, Values]]:
    """Read the rows of one file, by its suffix.

    Args:
        path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file; the text formats also as ``.gz``.
        problems: receives the rows that cannot be read.
        options: keyword arguments of ``csv.reader`` (for instance ``delimiter``); the other formats take none.

    Returns:
        (row number, values): the line the row starts on in JSON lines and CSV, else its place in the file, from 1.

    Raises:
        UserError: the file is missing, empty, too large, of an unknown kind or broken as a whole.
    """
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise UserError(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(READERS)}.")
    if options and reader not in (_read_csv, _read_tsv):
        raise UserError(f"{path} takes no options, got {options}: only CSV files, named sources and hub ids do.")
    if not path.is_file():
        near = [p.name for p in data_files(path.parent)][:8]
        there = f"{path.parent} holds {', '.join(near)}" if near else f"{path.parent} holds no data files"
        raise UserError(f"There is no file {path}; {there}.")
    before = len(problems)
    try:
        rows = sound_rows(reader(path, problems, options or {}), path.name, problems)
    except (OSError, EOFError, zlib.error) as error:  # the last two: gzip
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not rows and len(problems) == before:
        raise UserError(f"{path} has no rows.")
    return rows


def suffix_of(path: Path) -> str:
    """The suffix that says how a file is read: that of ``a.jsonl.gz`` is ``.jsonl``; empty if it is none of ours."""
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    return suffix if suffix in READERS and not (packed and suffix == ".parquet") else ""


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that can be read, by name."""
    return sorted(p for p in folder.glob("*") if suffix_of(p) and p.is_file() and p.name[0] not in "._")


def sound_rows(rows: Iterable[tuple[int, Values]], label: str, problems: Problems) -> list[tuple[int, Values]]:
    """The rows whose texts are whole and whose values are not nested too deeply; the others are problems."""
    sound = []
    for number, values in rows:
        if reason := unsound(values):
            problems.add(label, number, reason)
        else:
            sound.append((number, values))
    return sound


def unsound(values: Values) -> str | None:
    """Why a row cannot be used whatever its columns are, or None."""
    level: list[Any] = [values]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if not value.isascii() and (half := _SURROGATE.search(value)):
                    return f"a text holds {half.group()!r}, which is half a character and no text"
            elif isinstance(value, dict):
                inner += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple)):
                inner += value
        if not inner:
            return None
        level = inner
    return f"its values are nested more than {DEEPEST} deep"


def _text_bytes(path: Path) -> bytes:
    packed = path.suffix.lower() == ".gz"
    pieces, size = [], 0 if packed else path.stat().st_size
    if packed:
        with gzip.open(path) as file:
            while size <= LARGEST and (piece := file.read(2**20)):
                pieces.append(piece)
                size += len(piece)
    if size > LARGEST:
        raise UserError(f"{path} has more than {LARGEST / 2**30:.0f} GiB, and is read into memory: divide it.")
    data = b"".join(pieces) if packed else path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; save it as UTF-8.")
    return data.removeprefix(b"\xef\xbb\xbf")


def _undecodable(text: str) -> str | None:
    """The reason why text decoded with ``surrogateescape`` is not UTF-8, or None."""
    for column, char in enumerate(text):
        if "\udc80" <= char <= "\udcff":
            return f"byte 0x{ord(char) - 0xDC00:02x} at character {column + 1} is not UTF-8"
    return None


def _once(pairs: list[tuple[str, Any]]) -> Values:
    values = dict(pairs)
    if len(values) < len(pairs):
        doubled = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {doubled!r} is given more than once")
    return values


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _object(text: str) -> Values:
    value = _parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"the line holds {_kind(value)}, expected an object like {{...}}")
    return value


def _read_jsonl(path: Path, problems: Problems, options: Values) -> Numbered:
    # split on b"\n" alone: str.splitlines would also cut at U+2028, which JSON allows inside strings
    for number, line in enumerate(_text_bytes(path).split(b"\n"), start=1):
        text = line.decode("utf-8", errors="surrogateescape").strip()
        if not text:
            continue
        if not text.isascii() and (reason := _undecodable(text)):
            problems.add(path.name, number, reason)
            continue
        try:
            yield number, _object(text)
        except json.JSONDecodeError as error:
            problems.add(path.name, number, f"not JSON: {error.msg} at character {error.colno}")
        except RecursionError:
            problems.add(path.name, number, "not JSON that can be read: nested too deeply")
        except ValueError as error:
            problems.add(path.name, number, str(error))


def _read_json(path: Path, problems: Problems, options: Values) -> Numbered:
    try:
        value = _parse(_text_bytes(path).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}.") from error
    except json.JSONDecodeError as error:
        hint = " It looks like one object a line: name it .jsonl." if error.msg == "Extra data" else ""
        raise UserError(f"{path} is not JSON: line {error.lineno}: {error.msg}.{hint}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not JSON that can be read: nested too deeply.") from error
    except ValueError as error:  # a key given twice, a number of thousands of digits
        raise UserError(f"{path} is not JSON that can be read: {error}.") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f'{path} holds {_kind(value)}; expected a list of rows, or {{"data": [rows]}}.')
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict):
            yield number, row
        else:
            problems.add(path.name, number, f"the row is {_kind(row)}, expected an object like {{...}}")


def _read_csv(path: Path, problems: Problems, options: Values) -> Numbered:
    text = _text_bytes(path).decode("utf-8", errors="surrogateescape")
    old_limit = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield from _csv_rows(path, text, problems, options)
    finally:
        csv.field_size_limit(old_limit)


def _csv_rows(path: Path, text: str, problems: Problems, options: Values) -> Numbered:
    # csv wants the line ends inside quoted fields kept; every "\n" (and "\r\n") ends a line of the file
    try:
        reader = csv.reader((line + "\n" for line in text.split("\n")), strict=True, **options)
        header = next(reader)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}; options of a CSV source are those of Python's csv.reader.") from error
    except csv.Error as error:
        raise UserError(f"{path} has no readable header line: {error}.") from error
    if not any(header):
        raise UserError(f"{path} is empty; expected a header line with the column names.")
    doubled = sorted(name for name, count in Counter(header).items() if count > 1)
    if doubled:
        raise UserError(f"{path} has more than one column named {', '.join(doubled)}; rename them.")
    if reason := next(filter(None, map(_undecodable, header)), None):
        raise UserError(f"{path}: the header line is not UTF-8: {reason}.")
    if blank := [name for name in header if name != name.strip()]:
        rank_zero_warn(
            f"{path}: the name of the column {blank[0]!r} begins or ends with a blank, which is part of it: take it out, "
            f"or map it: columns: {{{blank[0].strip()}: {blank[0]!r}}}."
        )
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(path.name, line, f"not CSV: {error}")
            continue
        if not fields:
            continue
        if len(fields) != len(header):
            names = ", ".join(header)
            problems.add(path.name, line, f"{len(fields)} fields, expected {len(header)} ({names})")
        elif "\0" in "".join(fields):
            problems.add(path.name, line, "it holds a NUL byte: the file is broken, or no text")
        elif reason := next(filter(None, map(_undecodable, (f for f in fields if not f.isascii()))), None):
            problems.add(path.name, line, reason)
        else:
            yield line, dict(zip(header, fields, strict=True))


def _read_tsv(path: Path, problems: Problems, options: Values) -> Numbered:
    return _read_csv(path, problems, {"delimiter": "\t", **options})


def _read_parquet(path: Path, problems: Problems, options: Values) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            size, count = sum(group.total_byte_size for group in groups), file.metadata.num_rows
            if size > LARGEST or count > MOST_ROWS:
                raise UserError(
                    f"{path} has {count} rows of {size / 2**30:.1f} GiB; at most {MOST_ROWS} of {LARGEST / 2**30:.0f} GiB "
                    "are read into memory: divide it."
                )
            rows = file.read().to_pylist()
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a Parquet file that can be read: {reason}") from error
    yield from enumerate(rows, start=1)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


READERS: dict[str, Callable[[Path, Problems, Values], Numbered]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
