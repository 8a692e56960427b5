"""Class paths of one's own: ``file.py:Class`` beside ``module.Class``, and modules of the working folder."""

from __future__ import annotations

import re
from types import FunctionType
from typing import Any

import jsonargparse._actions
import jsonargparse._typehints
import jsonargparse._util

from maestro_pl.errors import UserError
from maestro_pl.run.importing import file_of, import_name
from maestro_pl.run.others import extend_path, told
from maestro_pl.training.scheduling import for_configs

_FILE = re.compile(r".+\.py:[A-Za-z_]\w*")
_OF_A_FILE = re.compile(r"\b(_maestro_pl_\w+)\.([A-Za-z_]\w*)")
#: How a message of jsonargparse shows what was given: in quotes, behind a word, or inside its ``Namespace``.
_SHOWN = re.compile(r"""(?:'|value: |string: |a path but )([^'"{}\[\](),<>=:\n]+\.py:[A-Za-z_]\w*)""")
_import_object = jsonargparse._util.import_object


def is_of_file(value: Any) -> bool:
    """Whether this is ``file.py:Class``."""
    return isinstance(value, str) and _FILE.fullmatch(value) is not None


def import_object(name: Any, check_path: bool = True) -> Any:
    """What jsonargparse imports a class path with.

    Raises:
        UserError: the file or module is not there, fails to import, or has no such name.
    """
    extend_path()
    if not is_of_file(name):
        try:
            return for_configs(_import_object(name, check_path))
        except SystemExit as error:
            raise UserError(f"importing {name!r} failed: {told(error)}.") from error
    module, attribute = import_name(name, "class")
    if not hasattr(module, attribute):
        named = {key: value for key, value in vars(module).items() if key[0] != "_"}
        classes = sorted(key for key, value in named.items() if isinstance(value, type))
        functions = sorted(key for key, value in named.items() if isinstance(value, FunctionType))
        also = f", its functions {functions}" if functions else ""
        raise UserError(f"{name!r}: the file has no {attribute!r}; its classes are {classes}{also}.")
    return for_configs(getattr(module, attribute))


def with_files(text: str) -> str:
    """A config's text with ``file.py:Class`` in place of the names of modules that were imported by their path."""

    def back(found: re.Match[str]) -> str:
        file = file_of(found.group(1))
        return found.group(0) if file is None else f"{file}:{found.group(2)}"

    return _OF_A_FILE.sub(back, text)


def file_problem(message: str) -> str | None:
    """What is wrong with the first ``file.py:Class`` of a parser's message that cannot be used; None: all can.

    The parser tries every type that an option takes, and its report says of most of them only that they do not fit.
    """
    for name in _SHOWN.findall(message):
        try:
            import_object(name)
        except UserError as error:
            return str(error)
    return None


def allow_files() -> None:
    """Let the parser take class paths of files; it has no place of its own to ask for that."""
    for module in (jsonargparse._actions, jsonargparse._typehints, jsonargparse._util):
        module.import_object = import_object  # type: ignore[attr-defined]
