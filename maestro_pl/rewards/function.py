"""Reward functions people already have: how to find one by name, tell its style apart and call it."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, SupportsFloat, TypeAlias

from maestro_pl.errors import UserError

RewardFunction: TypeAlias = Callable[..., Any]
FunctionStyle: TypeAlias = Literal["trl", "per_response", "verl"]


def load_function(target: str) -> RewardFunction:
    """Import a function from ``package.module.name`` or from ``path/to/file.py:name``.

    Raises:
        UserError: the target has neither form, the file or module is not there or fails to import, it has no such name,
            or the name is no function.
    """
    if ".py:" in target:
        path, _, name = target.rpartition(":")
        module: Any = _import_file(Path(path))
    elif "." in target and all(part.isidentifier() for part in target.split(".")):
        module_name, _, name = target.rpartition(".")
        module = _import_module(module_name, target)
    else:
        raise UserError(
            f"The function {target!r} has neither of the two forms that can be imported: package.module.name, or "
            "path/to/file.py:name."
        )
    if not hasattr(module, name):
        there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        raise UserError(f"{target!r}: {module.__name__} has no {name!r}; its functions are {there}.")
    function = getattr(module, name)
    check_callable(function, target)
    return function  # type: ignore[no-any-return]


def check_callable(function: object, target: str) -> None:
    """Raise unless the object is a function or another callable, and not a class.

    Raises:
        UserError: it is something else.
    """
    if inspect.isclass(function):
        raise UserError(
            f"{target!r} is a class: give a function, or list the class itself under rewards if it is a Reward."
        )
    if not callable(function):
        raise UserError(f"{target!r} is a {type(function).__name__}, not a function: give the name of a function.")


def signature_of(function: RewardFunction, target: str) -> inspect.Signature:
    """The signature of a callable.

    Raises:
        UserError: Python cannot tell it (some built-in functions).
    """
    try:
        return inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The arguments of {target!r} cannot be read ({error}): wrap it in a Python function."
        ) from error


def tell_style(function: RewardFunction, target: str) -> FunctionStyle:
    """Tell a reward function's style by the names of its arguments.

    ``solution_str`` and ``ground_truth``: verl's ``compute_score``; ``completions`` or ``prompts``: TRL's batch of
    lists; ``completion`` or ``response``: one response.

    Raises:
        UserError: none of them is there.
    """
    names = set(signature_of(function, target).parameters)
    if {"solution_str", "ground_truth"} <= names:
        return "verl"
    if names & {"completions", "prompts"}:
        return "trl"
    if names & {"completion", "response"}:
        return "per_response"
    raise UserError(
        f"{target!r} takes ({', '.join(sorted(names))}), which tells no style of reward function: name an argument "
        "completions (TRL: lists in, a list out), completion or response (one response in, a number out), or "
        "solution_str and ground_truth (verl), or say which it is with style: trl, per_response or verl."
    )


def select_arguments(
    signature: inspect.Signature, available: Mapping[str, Any], bound: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Choose the positional and keyword arguments of a call: ``bound`` first, then what is ``available`` by name.

    Raises:
        KeyError: an argument without a default is neither; the key is its name.
    """
    positional: list[Any] = []
    named: dict[str, Any] = {}
    values = {**available, **bound}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update({key: value for key, value in values.items() if key not in signature.parameters})
        elif name in values and parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(values[name])
        elif name in values:
            named[name] = values[name]
        elif parameter.default is parameter.empty:
            raise KeyError(name)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(parameter.default)
    return positional, named


def call_all(function: RewardFunction, calls: Sequence[tuple[list[Any], dict[str, Any]]]) -> list[Any]:
    """Call the function once for each pair of arguments; coroutines run together.

    Returns:
        Per call, what the function returned, or the exception that it raised: the caller knows how to name the row.
    """
    results: list[Any] = []
    for positional, named in calls:
        try:
            results.append(function(*positional, **named))
        except Exception as error:  # returned, not swallowed: the caller raises it with the row's name
            results.append(error)
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if waiting:
        # A thread of its own, because a notebook already runs an event loop in this one.
        with ThreadPoolExecutor(max_workers=1) as pool:
            done = pool.submit(asyncio.run, _gather([results[i] for i in waiting])).result()
        for i, result in zip(waiting, done, strict=True):
            results[i] = result
    return results


def split_result(result: object) -> tuple[object, dict[str, float]]:
    """The score and the further numbers of one returned value: a number, or a dict with ``score`` or ``reward``.

    Raises:
        KeyError: a dict without a score.
    """
    if not isinstance(result, Mapping):
        return result, {}
    key = "score" if "score" in result else "reward"
    metrics = {
        str(name): float(value)
        for name, value in result.items()
        if name != key and isinstance(value, SupportsFloat) and getattr(value, "ndim", 0) == 0
    }
    return result[key], metrics


async def _gather(awaitables: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _import_module(module_name: str, target: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{target!r}: importing {module_name} failed: {error}.") from error
        raise UserError(
            f"{target!r}: there is no module {error.name!r}: install it, or name a file instead: path/to/file.py:name."
        ) from error
    except Exception as error:
        raise UserError(f"{target!r}: importing {module_name} failed: {type(error).__name__}: {error}.") from error


def _import_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"The file {str(path)!r} of a reward function is not there: give its path, or a full one.")
    # One module for one file, so that two rewards of a file share its state.
    module_name = f"_maestro_pl_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{str(path)!r} is no Python file that can be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise UserError(f"Importing {str(path)!r} failed: {type(error).__name__}: {error}.") from error
    return module
