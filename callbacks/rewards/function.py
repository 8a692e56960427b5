"""FunctionReward: reward functions people already have, in TRL's, verl's or the plain one-response style."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, TypeAlias

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice
from maestro_pl.errors import UserError
from maestro_pl.rewards.function import (
    call_all,
    check_callable,
    load_function,
    select_arguments,
    signature_of,
    split_result,
    tell_style,
)
from maestro_pl.rewards.scores import ScoresAndMetrics, read_score
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

StyleOption: TypeAlias = Literal["auto", "trl", "per_response", "verl"]
Arguments: TypeAlias = tuple[list[Any], dict[str, Any]]


class FunctionReward(Reward):
    """Scores responses with a function, whose style is told apart by the names of its arguments.

    - TRL, ``f(prompts, completions, **columns) -> list``: called once for all responses with lists. Completions are
      strings, or ``[{"role": "assistant", "content": ...}]`` where the prompt is a list of chat messages. The columns
      of the data (``reference`` and ``task`` among them), ``completion_ids`` and ``trainer_state`` (with
      ``global_step``) are passed where the function takes them.
    - One response, ``f(prompt, completion, answer, ...) -> float``: arguments are filled by name from ``prompt``,
      ``prompt_text``, ``completion`` and ``response`` (both the text), ``completion_ids``, ``finish_reason``,
      ``reference``, ``task`` and every other column; ``answer`` is the reference where there is no such column.
    - verl, ``compute_score(data_source, solution_str, ground_truth, extra_info) -> float``: ``data_source`` is the
      column or the task; ``ground_truth`` the column, ``reward_model["ground_truth"]`` or the reference (without one
      the reward does not apply); ``extra_info`` the column, or a dict of all columns.

    Coroutine functions run together. A returned dict gives its ``score`` (or ``reward``); its other numbers become
    metrics. ``None`` and NaN mean that the reward does not apply.

    Args:
        function: ``package.module.name``, ``path/to/file.py:name``, or (from Python) the function itself.
        style: ``auto`` tells it by the argument names.
        columns: argument name to the data column that fills it, where the names differ.
        kwargs: further keyword arguments of every call.
        name: see :class:`Reward`; default: the function's name.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: the function cannot be imported, its style cannot be told, or ``kwargs`` or ``columns`` names an
            argument that it does not take.
    """

    default_name = "function"

    def __init__(
        self,
        function: str | Callable[..., Any],
        *,
        style: StyleOption = "auto",
        columns: dict[str, str] | None = None,
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        check_choice("FunctionReward", "style", style, StyleOption)
        self.target = function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
        self.function = load_function(function) if isinstance(function, str) else function
        check_callable(self.function, self.target)
        own_name = getattr(self.function, "__name__", "")
        super().__init__(
            name=name if name is not None or not re.fullmatch(r"\w+", own_name) else own_name,
            role=role,
            normalize=normalize,
            tasks=tasks,
        )
        self.signature = signature_of(self.function, self.target)
        self.style = tell_style(self.function, self.target) if style == "auto" else style
        self.columns, self.kwargs = dict(columns or {}), dict(kwargs or {})
        self._check_names("columns", self.columns)
        self._check_names("kwargs", self.kwargs)

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """Call the function and read the scores and the further numbers it returns."""
        batched = self.style == "trl"
        results = self._call_batch(rollout, rows, pl_module) if batched else self._call_each(rollout, rows)
        owner = f"Reward {self.name!r}"
        scores: list[float | None] = []
        metrics: dict[str, list[float | None]] = {}
        for i, (row, result) in enumerate(zip(rows, results, strict=True)):
            try:
                value, further = split_result(result)
            except KeyError:
                raise UserError(
                    f"{owner}: {self.target} returned a dict with {sorted(map(str, result))} for "
                    f"{self.describe(rollout, row)}: it must hold the score under 'score' or 'reward'."
                ) from None
            scores.append(read_score(value, owner, lambda row=row: self.describe(rollout, row)))  # type: ignore[misc]
            for key, number in further.items():
                metrics.setdefault(key, [None] * len(rows))[i] = number
        return scores, metrics

    def _call_batch(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[Any]:
        prompts = rollout.prompts_B()
        available: dict[str, Any] = {key: _take(rollout.per_response(key), rows) for key in rollout.columns}
        available |= {
            "prompts": _take(prompts, rows),
            "completions": [_completion(prompts[row], rollout.responses[row]) for row in rows],
            "completion_ids": _take(rollout.response_ids, rows),
            "trainer_state": SimpleNamespace(global_step=pl_module.policy_steps),
        }
        available |= {argument: _take(rollout.per_response(column), rows) for argument, column in self.columns.items()}
        (result,) = call_all(self.function, [self._arguments(rollout, available)])
        if isinstance(result, Exception):
            raise self._failure(
                result, f"{len(rows)} responses, the first {self.describe(rollout, rows[0])}"
            ) from result
        return _rows_of(result, len(rows), f"Reward {self.name!r}: {self.target}")

    def _call_each(self, rollout: Rollout, rows: list[int]) -> list[Any]:
        fill = _verl_arguments if self.style == "verl" else _response_arguments
        filled = [fill(rollout, row) | self._mapped(rollout, row) for row in rows]
        # verl's functions compare with a ground truth: without one they have nothing to say.
        applies = [self.style != "verl" or values["ground_truth"] is not None for values in filled]
        calls = [self._arguments(rollout, values) for values, ok in zip(filled, applies, strict=True) if ok]
        returned = iter(call_all(self.function, calls))
        results = [next(returned) if ok else None for ok in applies]
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Exception):
                raise self._failure(result, self.describe(rollout, row)) from result
        return results

    def _mapped(self, rollout: Rollout, row: int) -> dict[str, Any]:
        return {argument: rollout.per_response(column)[row] for argument, column in self.columns.items()}

    def _arguments(self, rollout: Rollout, available: Mapping[str, Any]) -> Arguments:
        try:
            return select_arguments(self.signature, available, self.kwargs)
        except KeyError as error:
            missing, others = error.args[0], sorted(set(available) - set(rollout.columns))
            raise UserError(
                f"Reward {self.name!r}: {self.target} needs an argument {missing!r}, which is neither a column of the "
                f"data ({sorted(rollout.columns)}) nor one of {others}: map it with columns: {{{missing}: <column>}}, "
                "bind it in kwargs, or give it a default."
            ) from None

    def _failure(self, error: Exception, where: str) -> UserError:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return UserError(
            f"Reward {self.name!r}: {self.target} raised {type(error).__name__}: {error} "
            f"({frame.filename}:{frame.lineno}) for {where}: correct the function, or let it return "
            "None where the reward does not apply."
        )

    def _check_names(self, argument: str, names: Mapping[str, Any]) -> None:
        parameters = self.signature.parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = [name for name in names if name not in parameters]
        if unknown and not takes_any:
            raise UserError(
                f"FunctionReward: {argument} names {unknown}, which {self.target} does not take; it takes "
                f"{list(parameters)}."
            )


def _take(values: list[Any], rows: list[int]) -> list[Any]:
    return [values[row] for row in rows]


def _completion(prompt: Any, response: str) -> Any:
    """A completion as TRL hands it over: chat messages for a chat prompt, else the text."""
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


def _response_arguments(rollout: Rollout, row: int) -> dict[str, Any]:
    """What a one-response function can ask for by name."""
    prompt = row // rollout.group_size
    columns = {key: values[prompt] for key, values in rollout.columns.items()}
    return {
        "answer": columns.get("reference"),
        **columns,
        "prompt": rollout.prompts[prompt],
        "prompt_text": rollout.prompt_texts[prompt],
        "completion": rollout.responses[row],
        "response": rollout.responses[row],
        "completion_ids": rollout.response_ids[row],
        "finish_reason": rollout.finish_reasons[row],
    }


def _verl_arguments(rollout: Rollout, row: int) -> dict[str, Any]:
    """The arguments of verl's ``compute_score``."""
    columns = {key: values[row // rollout.group_size] for key, values in rollout.columns.items()}
    nested = columns.get("reward_model")
    truth = nested.get("ground_truth") if isinstance(nested, Mapping) else None
    return {
        "data_source": columns.get("data_source", columns.get("task")),
        "solution_str": rollout.responses[row],
        "ground_truth": columns.get("ground_truth", columns.get("reference") if truth is None else truth),
        "extra_info": columns.get("extra_info", columns),
    }


def _rows_of(result: Any, count: int, owner: str) -> list[Any]:
    """One result a response from what a batch function returned: a list, or a dict of lists.

    Raises:
        UserError: the result, or a list in the dict, is no list of ``count`` values.
    """
    if isinstance(result, Mapping):
        columns = {
            # one value for the whole batch (a cost, the judge's name) is every response's; a score must be a list
            key: [values] * count
            if key not in ("score", "reward")
            and isinstance(values, str | SupportsFloat)
            and not hasattr(values, "tolist")
            else _rows_of(values, count, f"{owner}, key {key!r},")
            for key, values in result.items()
        }
        return [{key: values[i] for key, values in columns.items()} for i in range(count)]
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, list | tuple) or len(result) != count:
        found = f"{len(result)} values" if isinstance(result, list | tuple) else f"a {type(result).__name__}"
        raise UserError(
            f"{owner} returned {found} for {count} responses: return a list with one score for each, in their order, "
            "and None where the reward does not apply."
        )
    return list(result)
