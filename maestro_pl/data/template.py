"""Prompt templates over the columns of a row: `str.format` without its access to attributes."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from maestro_pl.errors import UserError


class PromptTemplate(string.Formatter):
    r"""Fills a template such as ``"{scenario}\n{choices!o}"`` from the columns of a row.

    ``{name}`` is a column (spaces in the name are fine), ``{name[key]}`` or ``{name.key}`` goes into nested objects and
    lists, ``{name!o}`` writes a list as lettered options, one a line (``A: ...``), ``{name!j}`` joins it with commas.
    Options at the end of a list that are empty (None, NaN) are left out, and counted in ``blank_options``.

    Raises:
        UserError: braces that do not match, or a field without a name.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        self.blank_options = 0  # left out of lettered options so far
        try:
            fields = [name for _, name, _, _ in self.parse(template) if name is not None]
        except ValueError as error:
            raise UserError(f"prompt_template {template!r}: {error}; write {{{{ and }}}} for plain braces.") from error
        if any(not re.split(r"[.\[]", name)[0].strip() for name in fields):
            raise UserError(f"prompt_template {template!r} has a field without a name; write {{column}}.")

    def fill(self, row: Mapping[str, Any]) -> str:
        """The text for one row.

        Raises:
            ValueError: the row lacks a column of the template, or its value is None; the message says which.
        """
        return self.vformat(self.template, (), row)

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        """The value of a field: a column of exactly that name, else a path into a nested column."""
        try:
            value = value_at(kwargs, field_name)
        except KeyError:
            raise ValueError(f"the template's {{{field_name}}} is not in the row, which has {list(kwargs)}") from None
        if value is None:
            raise ValueError(f"the template's {{{field_name}}} is empty in this row")
        return value, field_name if field_name in kwargs else re.findall(r"[^.\[\]]+", field_name)[0]

    def convert_field(self, value: Any, conversion: str | None) -> Any:
        """Apply ``!o`` (lettered options) and ``!j`` (joined with commas) besides Python's own conversions."""
        if conversion not in ("o", "j"):
            try:
                return super().convert_field(value, conversion)
            except ValueError as error:
                raise ValueError(
                    f"the template has an unknown conversion !{conversion}; there are !o and !j"
                ) from error
        if not isinstance(value, list):
            raise ValueError(f"the template's !{conversion} needs a list, the row has {type(value).__name__} {value!r}")
        options = filled(value)
        self.blank_options += len(value) - len(options)
        value = options
        if conversion == "j":
            return ", ".join(map(str, value))
        return "\n".join(f"{letters(i)}: {item}" for i, item in enumerate(value))


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """A column of exactly this name, else what a path such as ``meta.key`` or ``meta[0]`` leads to in nested columns.

    Raises:
        KeyError: there is neither.
    """
    if path in row:
        return row[path]
    value: Any = row
    steps = re.findall(r"[^.\[\]]+", path)
    for step in steps:
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, TypeError, ValueError):
            raise KeyError(path) from None
    if not steps:
        raise KeyError(path)
    return value


def filled(options: Sequence[Any]) -> list[Any]:
    """The options without the empty ones at the end: None, NaN, and ``nan`` as table libraries write it."""
    kept = list(options)
    while kept and (kept[-1] is None or kept[-1] != kept[-1] or kept[-1] == "nan"):
        kept.pop()
    return kept


def letters(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    return (letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)
