"""Functions and classes of others by name: ``package.module.name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from maestro_pl.errors import UserError
from maestro_pl.run.others import extend_path, origin, told

_PREFIX = "_maestro_pl_"


def import_name(target: str, kind: str) -> tuple[ModuleType, str]:
    """The module of ``package.module.name`` or ``path/to/file.py:name``, imported, and the name.

    The working folder and the file's own are on the path, so that both can import their neighbours.

    Args:
        target: what to import.
        kind: what it should be, for the sentence: ``function`` or ``class``.

    Raises:
        UserError: the target has neither form, or the file or module is not there or fails to import.
    """
    if ".py:" in target:
        path, _, name = target.rpartition(":")
        return _import_file(Path(path), kind), name
    if "." in target and all(part.isidentifier() for part in target.split(".")):
        module_name, _, name = target.rpartition(".")
        return _import_module(module_name, target), name
    raise UserError(
        f"The {kind} {target!r} has neither of the two forms that can be imported: package.module.name, or "
        "path/to/file.py:name."
    )


def file_of(module_name: str) -> str | None:
    """The file behind the name of a module that was imported by its path; None for another module."""
    module = sys.modules.get(module_name) if module_name.startswith(_PREFIX) else None
    return None if module is None else module.__file__


def _import_module(module_name: str, target: str) -> ModuleType:
    extend_path()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{target!r}: importing {module_name} failed: {error}.") from error
        raise UserError(
            f"{target!r}: there is no module {error.name!r}: install it, or name a file instead: path/to/file.py:name."
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an exit too: it would end the command without a word
        raise UserError(f"{target!r}: importing {module_name} failed: {_told_with_place(error)}.") from error


def _import_file(path: Path, kind: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        owner = "reward function" if kind == "function" else kind
        raise UserError(f"The file {str(path)!r} of a {owner} is not there: give its path, or a full one.")
    # One module for one file, so that two rewards of a file share its state.
    module_name = f"{_PREFIX}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{str(path)!r} is no Python file that can be imported.")
    module = importlib.util.module_from_spec(spec)
    extend_path(str(path.parent))
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        del sys.modules[module_name]
        raise
    except BaseException as error:  # an exit too: it would end the command without a word
        del sys.modules[module_name]
        raise UserError(f"Importing {str(path)!r} failed: {_told_with_place(error)}.") from error
    return module


def _told_with_place(error: BaseException) -> str:
    """What a file raised while it was imported, and the file and line; of bad syntax those that it stands in."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    return f"{told(error)} ({origin(error)})"
