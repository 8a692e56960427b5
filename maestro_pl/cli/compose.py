"""Configs that name their parts, and lists of rewards, anchors and metrics that name files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader

from maestro_pl.cli.arguments import LISTS, is_text, take
from maestro_pl.cli.class_paths import is_of_file
from maestro_pl.errors import UserError
from maestro_pl.run.paths import config_path
from maestro_pl.run.yaml_files import not_utf8

#: The key of a config that lists the files merged before its own keys, as if each were given by a ``--config`` before it.
PARTS = "configs"


def with_parts(arguments: Sequence[str]) -> list[str]:
    """The arguments with a ``--config`` for every part of a config before its own, and no file in a list of callbacks.

    A path starts from the file that names it, else from the working folder; ``configs/...`` is at last the shipped one.

    Raises:
        UserError: a part or a file of a list that is missing, cannot be read, holds something else or names itself.
    """
    working = Path.cwd()
    configs, others = take(arguments[1:], ("--config", "-c"))
    layers = [str(layer) for config in configs for layer in _layers(config, working)]
    return [
        arguments[0],
        *(part for layer in layers for part in ("--config", layer)),
        *_with_flat_lists(others, working),
    ]


def own_keys(content: str, file: Path, working: Path) -> str:
    """The text of a config without the key of its parts, and with the entries of files in its lists of callbacks.

    A ``file.py:Class`` that lies beside the config, and not in the working folder, is given by its whole path.

    Args:
        content: the file's text; one that is no YAML is left to the parser, which says so.
        file: where the text stands.
        working: the working folder.

    Raises:
        UserError: a file of a list that is missing, cannot be read, holds something else or names itself.
    """
    try:
        loaded = get_loader("yaml")(content)  # the parser's own: 1e-3 is a number
    except yaml.YAMLError:
        return content
    if not isinstance(loaded, dict):
        return content
    own = {
        key: _flat(value, f"{file}: {key}", (file.parent, working)) if _is_list_of_files(str(key), value) else value
        for key, value in loaded.items()
        if key != PARTS
    }
    own = {key: _with_own_files(value, file.parent, working) for key, value in own.items()}
    return content if own == loaded else str(yaml.safe_dump(own, sort_keys=False, allow_unicode=True))


def _with_own_files(value: Any, folder: Path, working: Path) -> Any:
    if isinstance(value, dict):
        return {key: _with_own_files(item, folder, working) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_own_files(item, folder, working) for item in value]
    found = is_of_file(value) and value.rpartition(":")
    if not found or Path(found[0]).is_absolute() or folder.resolve() == working.resolve():
        return value
    beside = folder / found[0]
    return f"{beside.resolve()}:{found[2]}" if beside.is_file() else value


def _layers(config: str, working: Path) -> Iterator[str | Path]:
    """The files that a config given on the command line stands for, in the order in which they are merged."""
    path = None if "\n" in config else _locate(config, (working,))  # a checkpoint carries its config as text
    if path is None:  # missing, or YAML itself: the parser's
        yield config
        return
    yield from _parts_of(path if (working / config).resolve() != path.resolve() else Path(config), working, ())


def _parts_of(path: Path, working: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    if path.resolve() in [other.resolve() for other in above]:
        way = " > ".join(str(other) for other in (*above, path))
        raise UserError(f"{path} is a part of itself ({way}): take it out of the `{PARTS}` of one of them.")
    content = _read(path, f"{above[-1]}: {PARTS}" if above else "--config")
    if above and not isinstance(content, dict):
        raise UserError(f"{above[-1]}: {PARTS}: {path} holds {_what(content)}: expected the keys of a config.")
    if isinstance(content, dict) and "config" in content:
        raise UserError(f"{path}: there is no key config: the files that a config is made of stand under `{PARTS}`.")
    named = content.get(PARTS, []) if isinstance(content, dict) else []
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{path}: {PARTS} is {named!r}: expected a list of config files.")
    for name in named:
        part = _locate(name, (path.parent, working))
        if part is None:
            raise UserError(
                f"{path}: {PARTS}: the file {name!r} does not exist: a path starts from {path.parent}, else from the "
                "working folder."
            )
        yield from _parts_of(part, working, (*above, path))
    own_keys(path.read_text(encoding="utf-8"), path, working)  # what is wrong with its lists is said before parsing
    yield path


def _with_flat_lists(arguments: Sequence[str], working: Path) -> list[str]:
    """Options such as ``--metrics FILE`` and ``--metrics+=[callbacks.MathReward, FILE]`` with the entries of the files."""
    flat, words = [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name.removeprefix("--").removesuffix("+") in LISTS and name.startswith("--"):
            value = value if equals else next(words, "")
            try:
                given = get_loader("yaml")(value)
            except yaml.YAMLError:
                given = value
            key = name.removeprefix("--")
            if _is_list_of_files(key, given):
                value = yaml.safe_dump(
                    _flat(given, key.removesuffix("+"), (working,)), default_flow_style=True, width=float("inf")
                ).strip()
            word = f"{name}={value}"
        flat.append(word)
    return flat


def _flat(value: Any, where: str, starts: Sequence[Path], above: tuple[Path, ...] = ()) -> list[Any]:
    """The entries of a list of callbacks, those of a file in its place."""
    if isinstance(value, list):
        return [entry for item in value for entry in _flat(item, where, starts, above)]
    if not _is_file(value):
        return [value]
    path = _locate(value, starts)
    if path is None:
        raise UserError(
            f"{where}: the file {value!r} does not exist: a path starts from {starts[0]}, else from the working folder."
        )
    if path.resolve() in above:
        raise UserError(f"{where}: the file {value!r} is an entry of itself: take it out.")
    content = _read(path, where, value)
    if not isinstance(content, list) and "class_path" not in (content if isinstance(content, dict) else {}):
        raise UserError(f"{where}: {value} holds {_what(content)}: expected a list of class paths.")
    return _flat(content, f"{where}: {value}", (path.parent, starts[-1]), (*above, path.resolve()))


def _is_list_of_files(key: str, value: Any) -> bool:
    """Whether a key is one of callbacks and its value names a file."""
    return key.removesuffix("+") in LISTS and (
        _is_file(value) or (isinstance(value, list) and any(_is_list_of_files(key, item) for item in value))
    )


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith((".yaml", ".yml", ".json"))


def _locate(name: str, starts: Sequence[Path]) -> Path | None:
    if is_text(name):  # a config itself, as a checkpoint carries it; it may be longer than any path
        return None
    given = Path(name).expanduser()
    found = next((start / given for start in starts if (start / given).is_file()), None)
    if found is None and given.parts[:1] == ("configs",):
        try:
            return config_path(str(Path(*given.parts[1:])))
        except UserError:
            return None
    return found


def _read(path: Path, where: str, name: str = "") -> Any:
    try:
        return get_loader("yaml")(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: {path} cannot be read ({error}): give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {path} {not_utf8(error)}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or error
        named = f"the file {name!r}" if name else str(path)
        raise UserError(f"{where}: {named} is not valid YAML: {problem}{place}.") from error


def _what(content: Any) -> str:
    if isinstance(content, dict):
        return f"the keys {', '.join(map(str, content))}"
    return "nothing" if content is None else "a list" if isinstance(content, list) else repr(content)
