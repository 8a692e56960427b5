"""The one way in which YAML is read: within limits of size, depth and aliases, and no key given twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from maestro_pl.errors import UserError

#: The longest text, in characters: a few megabytes take seconds to parse.
LONGEST = 4 * 2**20

#: The deepest nesting of lists and mappings; what walks through a config does so recursively.
DEEPEST = 100

#: How many values aliases may stand for, all of them together: ten levels of ten aliases each stand for 10^10.
ALIASED = 10_000

_COMPOSED = re.compile(r"[:?{*]")  # without one of these there is neither a key nor an alias
_SURROGATE = re.compile("[\ud800-\udfff]")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # without libyaml some hundred times slower


class RefusedYAML(yaml.MarkedYAMLError):  # type: ignore[misc]
    """YAML whose syntax is right and that is not read all the same."""


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file.

    Args:
        path: the file, in UTF-8.
        what: the file at the beginning of the error: its path, or ``The judge's prompts file 'a.yaml'``.

    Raises:
        FileNotFoundError: there is no such file; the caller knows what to say.
        UserError: it cannot be read, is not UTF-8, not YAML, beyond the limits, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {not_utf8(error)}.") from error
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not YAML: {yaml_reason(error)}.{_excerpt(error, text)}") from error


def parse_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        yaml.YAMLError: it is not YAML, beyond the limits, or gives a key twice.
    """
    return guarded(_load)(text)


def guarded(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """A loader of YAML texts that checks them first, and raises a ``yaml.YAMLError`` for whatever it cannot read."""

    def checked(text: str) -> Any:
        if not _is_value(text):
            check_yaml(text)
        try:
            return load(text)
        except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            # what PyYAML lets through: 2026-13-45 looks like a date, `!!int ''` and `!!timestamp x` say what they are not
            raise RefusedYAML(problem=f"a value cannot be read ({error})") from error

    return checked


def guard_jsonargparse() -> None:
    """Let the command line's parser read YAML within the same limits, once for the process."""
    from jsonargparse import get_loader, set_loader

    if not getattr(get_loader("yaml"), "is_guarded", False):
        loader = guarded(get_loader("yaml"))
        loader.is_guarded = True  # type: ignore[attr-defined]
        set_loader("yaml", loader, (yaml.YAMLError,))


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_LOADER)


def _is_value(text: str) -> bool:
    """Whether a text is too short and too plain to break a limit, as are a thousand values that a config is parsed from."""
    return len(text) < DEEPEST and text.isascii() and not _COMPOSED.search(text)


def check_yaml(text: str) -> None:
    """Raise unless a text is YAML within the limits that gives no key twice.

    Raises:
        yaml.YAMLError: it is not; the mark says where.
    """
    if len(text) > LONGEST:
        raise RefusedYAML(problem=f"it has {len(text)} characters, and at most {LONGEST} are read")
    if not text.isascii() and (half := _SURROGATE.search(text)):
        raise RefusedYAML(problem=f"it holds {half.group()!r}, half a character")
    _check_events(yaml.parse(text, Loader=_LOADER))
    _check_keys(yaml.compose(text, Loader=_LOADER))


def yaml_reason(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    place = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
    return f"{error.problem or error.context}{place}"


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with the bytes of a text, and what to do."""
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "is UTF-16: save it as UTF-8"
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): save it as UTF-8"


def _excerpt(error: yaml.YAMLError, text: str) -> str:
    """The line that the error is about with a mark under the place, on lines of their own; empty where it has none."""
    mark = getattr(error, "context_mark", None) or getattr(error, "problem_mark", None)
    if mark is None:
        return ""
    snippet = yaml.Mark(mark.name, mark.index, mark.line, mark.column, text + "\0", mark.index).get_snippet()
    return f"\n{snippet}" if snippet else ""


def _check_events(events: Iterator[Any]) -> None:
    """Depth and aliases, before anything is built: the composer recurses, and deep enough that ends the process."""
    sizes: list[int] = [0]  # values in each open list or mapping
    names: list[str | None] = [None]  # its anchor
    anchored: dict[str, int] = {}
    aliased = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in names:
                raise RefusedYAML(problem=f"the anchor &{event.anchor} contains itself", problem_mark=event.start_mark)
            size = anchored.get(event.anchor, 1)
            aliased += size
            sizes[-1] += size
            if aliased > ALIASED:
                raise RefusedYAML(
                    problem=f"its aliases stand for more than {ALIASED} values: write them out or leave them out",
                    problem_mark=event.start_mark,
                )
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(sizes) > DEEPEST:
                raise RefusedYAML(problem=f"it is nested more than {DEEPEST} deep", problem_mark=event.start_mark)
            sizes.append(1)
            names.append(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            size, name = sizes.pop(), names.pop()
            sizes[-1] += size
            if name is not None:
                anchored[name] = size
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
            if event.anchor is not None:
                anchored[event.anchor] = 1


def _check_keys(root: Any) -> None:
    open_nodes, seen = [root], set()
    while open_nodes:
        node = open_nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            open_nodes += node.value
            continue
        keys: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            open_nodes += [key, value]
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in keys and key.value != "<<":  # merges of several mappings are no repetition
                raise RefusedYAML(
                    problem=f"the key {key.value!r}, given at line {keys[name]}, is given again",
                    problem_mark=key.start_mark,
                )
            keys[name] = key.start_mark.line + 1
