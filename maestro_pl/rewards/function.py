"""Reward functions people already have: how to find one by name, tell its style apart and call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, SupportsFloat, TypeAlias

from maestro_pl.errors import UserError
from maestro_pl.run.event_loop import run_together
from maestro_pl.run.importing import file_of, import_name
from maestro_pl.run.others import CtrlC, NotBack, Raised, TimeLimit, within

RewardFunction: TypeAlias = Callable[..., Any]
FunctionStyle: TypeAlias = Literal["trl", "per_response", "verl", "verl_batch", "openrlhf", "verifiers"]

#: What verl's functions call the response's text and the right answer.
VERL_RESPONSE = ("solution_str", "predict_str", "model_output")
VERL_TRUTH = "ground_truth"


def load_function(target: str) -> RewardFunction:
    """Import a function from ``package.module.name`` or from ``path/to/file.py:name``.

    Raises:
        UserError: the target has neither form, the file or module is not there or fails to import, it has no such name,
            or the name is no function.
    """
    module, name = import_name(target, "function")
    if not hasattr(module, name):
        there = sorted(key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_")
        owner = file_of(module.__name__) or module.__name__
        raise UserError(f"{target!r}: {owner} has no {name!r}; its functions are {there}.")
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

    In this order: verl's ``compute_score`` (``ground_truth`` and one of ``solution_str``, ``predict_str``,
    ``model_output``) and its batched form (``solution_strs``, ``ground_truths``); OpenRLHF's (``queries``); TRL's batch
    of lists (``completions``, ``prompts``, or ``completion_ids`` without a response's text); verifiers'
    (``completion`` beside ``parser``); one response (``completion`` or ``response``).

    Raises:
        UserError: none of them is there.
    """
    names = set(signature_of(function, target).parameters)
    if VERL_TRUTH in names and names & set(VERL_RESPONSE):
        return "verl"
    if {"solution_strs", "ground_truths"} <= names:
        return "verl_batch"
    if "queries" in names:
        return "openrlhf"
    if names & {"completions", "prompts"}:
        return "trl"
    if {"completion", "parser"} <= names:
        return "verifiers"
    if names & {"completion", "response"}:
        return "per_response"
    if "completion_ids" in names:
        return "trl"
    raise UserError(
        f"{target!r} takes ({', '.join(sorted(names))}), which tells no style of reward function: name an argument "
        "completions (TRL: lists in, a list out), completion or response (one response in, a number out), or "
        "solution_str and ground_truth (verl), or say which it is in its init_args, for instance style: per_response: "
        "one of trl, per_response, verl, verl_batch, openrlhf, verifiers."
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


def call_all(
    function: RewardFunction,
    calls: Sequence[tuple[list[Any], dict[str, Any]]],
    seconds: float | None = None,
    stopping: Callable[[], bool] = bool,
) -> list[Any]:
    """Call the function once for each pair of arguments; coroutines run together, in one loop for the whole run.

    Args:
        function: the function.
        calls: positional and named arguments of each call.
        seconds: how long all calls may take; None: without limit.
        stopping: whether the process was asked to end.

    Returns:
        Per call, what the function returned, or a :class:`~maestro_pl.run.others.Raised`: the caller knows how to name
        the row. A call that did not come back in time raised ``TimeLimit``, and so did those after it.

    Raises:
        Terminated: a call went on long after the process was asked to end.
        CtrlC: the user interrupted it.
    """
    came: list[Any] = []

    def call_each() -> None:
        for positional, named in calls:
            try:
                result = function(*positional, **named)
                came.append(list(result) if isinstance(result, Iterator) else result)
            except (CtrlC, NotBack):
                raise
            except BaseException as error:  # handed over, an exit too: the caller raises it with the row's name
                came.append(Raised(error))

    try:
        within(call_each, seconds, stopping)
        results = came
    except TimeLimit as limit:
        results = list(came)  # outside the main thread, a late call may still come back
        results += [Raised(limit)] * (len(calls) - len(results))
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if waiting:
        awaitables = [results[i] for i in waiting]
        done = within(lambda: run_together(awaitables, seconds), None, stopping)
        for i, result in zip(waiting, done, strict=True):
            results[i] = result
    return results


def waits_by_nature(function: RewardFunction) -> bool:
    """Whether calls of the function are coroutines."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


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
