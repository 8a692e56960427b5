"""From the parser's report of a wrong argument to the one sentence that a user needs."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from maestro_pl.cli.class_paths import file_problem, import_object, with_files
from maestro_pl.cli.renamed import renamed
from maestro_pl.run.yaml_files import check_yaml, not_utf8, yaml_reason

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_GIVEN_CLASS = re.compile(r"Given value: Namespace\(class_path='([^']+)'")
_LACKING = re.compile(r": *\s*the following arguments are required: (\w[\w., ]*)")
_OPTION = re.compile(r"(?:Option|does not accept option) '([^']+)'")
_NO_PATH = re.compile(r"Expected a path but (\S+) either not accessible or invalid")
_GIVEN = re.compile(r"(?:Given value: |Got value: |Expected a dot import path string: )(.*)")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: .*|: .*)?$", re.MULTILINE)
_NOT_IMPORTED = re.compile(r"(No module named '[^']+'|module '[^']+' has no attribute '[^']+')")
_NOT_SUBCLASS = re.compile(r"does not correspond to a subclass of (\w+)")
_UNTYPED = re.compile(r"Parameter '(\w+)' from '([^']+)\.\w+' does not specify a type")
_ABSTRACT = re.compile(r"Expected an instantiatable class, but (\S+) is abstract")
_NO_CONFIG = re.compile(r"Unable to load config '([^']*)'")
_LONGEST = 320


def condense(message: str, command: str, keys: Iterable[str], configs: Sequence[str] = ()) -> str:
    """One sentence from a jsonargparse error: the key, the given value, what was expected, and a near match.

    Args:
        message: the parser's own text, of any number of lines.
        command: the subcommand whose arguments were wrong, such as ``"fit"``.
        keys: every key the subcommand accepts, such as ``"trainer.max_steps"``.
        configs: the files given by ``--config``, to be named where one of them is not valid YAML.
    """
    known = sorted(set(keys))
    if message.startswith("unrecognized arguments:"):
        return _unrecognized(message.removeprefix("unrecognized arguments:").split(), command, known)
    if message.startswith("the following arguments are required:"):
        missing = message.split(":", 1)[1].replace(f" {command}.", " ").strip()
        return f"{missing} is required: give it with --{missing.split(',')[0]} or in --config FILE."
    path = ".".join(dict.fromkeys(_KEY.findall(message))).removeprefix(f"{command}.")
    if option := _OPTION.search(message):
        return _unknown_key(path, option.group(1), message, command, known)
    if path:
        if untyped := _UNTYPED.search(message):
            name, owner = untyped.groups()
            return f"{path}: {with_files(owner)} takes {name!r} without a type: write one, such as `{name}: str`."
        if lacking := _LACKING.search(message):
            missing = lacking.group(1)
            owner = (_CLASS.findall(message) or _GIVEN_CLASS.findall(message) or ["it"])[-1]
            return f"{path}: {owner} requires {missing}: give it with --{path}.{missing.split(',')[0]} or in --config FILE."
        if problem := file_problem(message):
            return f"{path}: {problem[0].lower()}{problem[1:]}"
        return _wrong_value(path, _without_null(message))
    for config in configs:
        if problem := yaml_problem(config):
            return f"{config} is not valid YAML: {problem}."
    return _shorten(message)


def _unrecognized(words: Sequence[str], command: str, known: Sequence[str]) -> str:
    options = [word for word in words if word.startswith("-")]
    if not options:
        return f"{' '.join(words)!r} is not an option of `maestro-pl {command}`: options look like --key value."
    name = options[0].lstrip("-").split("=", 1)[0].rstrip("+")
    return f"there is no option --{name}{_meant(name, known, '--')}; `maestro-pl {command} --help` lists all."


def _unknown_key(path: str, option: str, message: str, command: str, known: Sequence[str]) -> str:
    if owner := _CLASS.findall(message):
        accepted = _parameters(owner[-1])
        listed = f" takes {', '.join(accepted)}" if accepted else " does not take it"
        return f"{path}: there is no key {option!r}{_meant(option, accepted)}; {owner[-1]}{listed}."
    return f"there is no key {option}{_meant(option, known)}; `maestro-pl {command} --help` lists all."


def _without_null(message: str) -> str:
    """The message without the alternative null, where it says what is wrong with the class that was given."""
    if "Problem with given class_path" not in message:
        return message
    return re.sub(r"\n\s*- Expected a <class 'NoneType'>(\n\s*Given value.*)*", "", message)


def _wrong_value(path: str, message: str) -> str:
    if path == "config" and "File does not exist" in message:
        return f"--config: the file {_quoted(message)} does not exist."
    if not_keys := _NO_CONFIG.search(message):
        return no_keys(path, not_keys.group(1))
    if abstract := _ABSTRACT.search(message):
        lacks = ", ".join(sorted(import_object(abstract.group(1)).__abstractmethods__))
        return f"{path}: {abstract.group(1)!r} cannot be used as it is: it has no {lacks} of its own, which is needed."
    no_path, given = _NO_PATH.search(message), _GIVEN.search(message)
    if no_path and no_path.group(1).endswith((".yaml", ".yml", ".json")):
        problem = yaml_problem(no_path.group(1))
        state = f"is not valid YAML: {problem}" if problem else "does not exist, or holds something else"
        return f"{path}: the file {no_path.group(1)!r} {state}."
    value = no_path.group(1) if no_path else given.group(1).strip() if given else ""
    if subclass := _NOT_SUBCLASS.search(message):
        return f"{path}: {value!r} is not a {subclass.group(1)}: give the class path of one."
    if absent := _NOT_IMPORTED.search(message):
        owner = _CLASS.findall(message)
        return _no_class(path, owner[-1] if owner else value, absent.group(1))
    expected = list(
        dict.fromkeys(_readable(kind) for kind in _EXPECTED.findall(message) if not kind.startswith("path "))
    )
    if expected and value:
        return _shorten(f"{path} takes {' or '.join(expected)}, not {value!r}.")
    return _shorten(f"{path}: {_KEY.sub('', message)}")


def no_keys(path: str, value: str) -> str:
    """Of a key that has keys below it, which was given something else."""
    problem = yaml_problem(value)
    state = f", and the file {value!r} is not valid YAML: {problem}" if problem else f", not {value!r}"
    default = " Leave it out for the defaults." if "." in path and value in ("null", "~", "") else ""
    return f"{path} takes the keys below it (--{path}.KEY VALUE), or a YAML file of them{state}.{default}"


def _no_class(path: str, class_path: str, reason: str) -> str:
    module, _, name = class_path.rpartition(".")
    try:
        owner = importlib.import_module(module) if module else None
        siblings = getattr(owner, "__all__", dir(owner))
    except ImportError:
        siblings = []
    close = difflib.get_close_matches(name, siblings, n=1)
    meant = f"did you mean {module}.{close[0]}?" if close else reason
    return f"{path}: the class {class_path!r} cannot be imported ({meant})."


def _meant(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The key that took its place, else the nearest: a near leaf on the same branch, the same leaf elsewhere, a near whole."""
    if successor := renamed(name, known, prefix):
        return successor
    branch, _, leaf = name.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == branch}
    near = [siblings[close] for close in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7)]
    near += [key for key in known if key.rpartition(".")[2] == leaf]
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


def yaml_problem(file: str) -> str | None:
    """What is wrong with the syntax of a YAML file, and where; None for a good file or one that cannot be read."""
    try:
        check_yaml(Path(file).read_text(encoding="utf-8"))
    except OSError:
        return None
    except UnicodeDecodeError as error:
        return f"it {not_utf8(error)}"
    except yaml.YAMLError as error:
        return yaml_reason(error)
    return None


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return [p for p in inspect.signature(getattr(importlib.import_module(module), name)).parameters if p != "self"]
    except (ImportError, AttributeError, ValueError, TypeError):  # a path the parser itself could not resolve
        return []


def _readable(kind: str) -> str:
    """``<class 'float'>`` to ``float``, ``typing.Literal['a', 'b']`` to ``'a', 'b'``, ``NoneType`` to ``null``."""
    kind = re.sub(r"typing\.Literal\[(.*)\]", r"\1", kind)
    kind = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", kind).replace("NoneType", "null")
    return re.sub(r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", kind).replace("dot import path string", "class path")


def _quoted(message: str) -> str:
    quoted = re.search(r"'[^']+'", message)
    return quoted.group(0) if quoted else "given"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
