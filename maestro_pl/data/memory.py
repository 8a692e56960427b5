"""Rows that are already in memory: lists of dicts, dicts of columns, and what ``datasets`` makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maestro_pl.data.splits import SPLITS
from maestro_pl.errors import UserError


def is_rows(value: Any) -> bool:
    """Whether a source's path is rows: anything of the module's forms, and no dict from splits to files."""
    if isinstance(value, Mapping) and not _is_dataset(value):
        return bool(value) and not all(isinstance(item, str) for item in value.values())
    return isinstance(value, list) or _is_dataset(value)


def checked(value: Any) -> Any:
    """The rows as they are given, once they are known to be of one of the forms.

    Raises:
        UserError: they are not.
    """
    if not is_rows(value):
        raise UserError(
            f"The rows are a {type(value).__name__}; expected a list of dicts, a dict of columns, a datasets.Dataset, or a "
            "dict from splits to these."
        )
    for name, rows in pieces(value).items():
        strange = [] if _is_dataset(rows) else [row for row in rows if not isinstance(row, Mapping)]
        if strange:
            raise UserError(f"{name}: a row is a {type(strange[0]).__name__}; expected dicts from columns to values.")
    return value


def pieces(value: Any) -> dict[str, Any]:
    """The rows by split, under the name ``rows`` where they say none.

    Raises:
        UserError: a dict is none of splits, and none of columns of one length.
    """
    if isinstance(value, Mapping) and set(value) <= set(SPLITS):
        return {str(name): _rows(rows) for name, rows in value.items()}
    if isinstance(value, Mapping) and _is_dataset(value):  # a DatasetDict with splits of other names
        raise UserError(
            f"The data set has the splits {', '.join(value)}; give a dict from {', '.join(SPLITS)} to them."
        )
    return {"rows": _rows(value)}


def _rows(value: Any) -> Any:
    if not isinstance(value, Mapping):
        if isinstance(value, list) or _is_dataset(value):
            return value
        raise UserError(
            f"The rows of a split are a {type(value).__name__}; expected a list of dicts or a datasets.Dataset."
        )
    lengths = {name: len(column) if isinstance(column, (list, tuple)) else None for name, column in value.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise UserError(f"The columns have the lengths {lengths}; expected lists of one length.")
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _is_dataset(value: Any) -> bool:
    return type(value).__module__.split(".")[0] == "datasets"
