"""Files to rows: JSON lines, JSON, CSV, TSV and Parquet, each row with the place where it stands.

The text formats go through the standard library, because ``json`` and ``csv`` let us name the line of a bad row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from maestro_pl.data.problems import Problems
from maestro_pl.errors import UserError

Values: TypeAlias = dict[str, Any]
Numbered: TypeAlias = Iterator[tuple[int, Values]]

# csv refuses fields of more than 128 KiB by default; a long document is no error
FIELD_LIMIT = 2**31 - 1


def read_file(path: Path, problems: Problems, options: Values | None = None) -> list[tuple[int, Values]]:
    """Read the rows of one file, by its suffix.

    Args:
        path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file.
        problems: receives the rows that cannot be read.
        options: keyword arguments of ``csv.reader`` (for instance ``delimiter``); the other formats take none.

    Returns:
        (row number, values): the line the row starts on in JSON lines and CSV, else its place in the file, from 1.

    Raises:
        UserError: the file is missing, empty, of an unknown kind or broken as a whole.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} has the suffix {path.suffix!r}; expected one of {', '.join(READERS)}.")
    if options and reader not in (_read_csv, _read_tsv):
        raise UserError(f"{path} takes no options, got {options}: only CSV files, named sources and hub ids do.")
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix.lower() in READERS)[:8]
        there = f"{path.parent} holds {', '.join(near)}" if near else f"{path.parent} holds no data files"
        raise UserError(f"There is no file {path}; {there}.")
    before = len(problems)
    try:
        rows = list(reader(path, problems, options or {}))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not rows and len(problems) == before:
        raise UserError(f"{path} has no rows.")
    return rows


def _text_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16; save it as UTF-8.")
    return data.removeprefix(b"\xef\xbb\xbf")


def _undecodable(text: str) -> str | None:
    """The reason why text decoded with ``surrogateescape`` is not UTF-8, or None."""
    for column, char in enumerate(text):
        if "\udc80" <= char <= "\udcff":
            return f"byte 0x{ord(char) - 0xDC00:02x} at character {column + 1} is not UTF-8"
    return None


def _object(text: str) -> Values:
    value = json.loads(text)
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
        value = json.loads(_text_bytes(path).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}.") from error
    except json.JSONDecodeError as error:
        hint = " It looks like one object a line: name it .jsonl." if error.msg == "Extra data" else ""
        raise UserError(f"{path} is not JSON: line {error.lineno}: {error.msg}.{hint}") from error
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
    except TypeError as error:
        raise UserError(f"{path}: {error}; options of a CSV source are those of Python's csv.reader.") from error
    except csv.Error as error:
        raise UserError(f"{path} has no readable header line: {error}.") from error
    if not any(header):
        raise UserError(f"{path} is empty; expected a header line with the column names.")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise UserError(f"{path} has more than one column named {', '.join(doubled)}; rename them.")
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
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from error
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
