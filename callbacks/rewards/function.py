"""FunctionReward: reward functions people already have, in the style of TRL, verl, OpenRLHF, verifiers or plain."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rewards.arguments import BATCHED, Journal, batch_arguments, row_arguments, trainer_state, verl_truth
from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice
from maestro_pl.errors import RunStopped, UserError
from maestro_pl.rewards.function import (
    VERL_RESPONSE,
    call_all,
    check_callable,
    load_function,
    select_arguments,
    signature_of,
    split_result,
    tell_style,
    waits_by_nature,
)
from maestro_pl.rewards.scores import ScoresAndMetrics, as_list, read_score
from maestro_pl.rollout import Normalization, Role, Rollout
from maestro_pl.run.others import Raised, TimeLimit, origin, told

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

StyleOption: TypeAlias = Literal["auto", "trl", "per_response", "verl", "verl_batch", "openrlhf", "verifiers"]
CompletionsOption: TypeAlias = Literal["auto", "text", "messages"]
OnError: TypeAlias = Literal["stop", "skip"]
Arguments: TypeAlias = tuple[list[Any], dict[str, Any]]
_REFERENCES = ("answer", "labels", "ground_truth", "ground_truths")  # arguments that the reference fills
ERRORS = "errors"  # the metric of ``on_error: skip``


class FunctionReward(Reward):
    """Scores responses with a function, whose style is told apart by the names of its arguments.

    - TRL, ``f(prompts, completions, **columns) -> list``: called once for all responses with lists. Completions are
      strings, or ``[{"role": "assistant", "content": ...}]`` where the prompt is a list of chat messages. The columns
      of the data (``reference`` and ``task`` among them), ``completion_ids``, ``trainer_state`` (transformers'
      ``TrainerState`` with ``global_step``, ``max_steps`` and ``epoch``), ``log_extra(column, values)`` and
      ``log_metric(name, value)`` are passed where the function takes them. What is logged becomes a metric of the
      reward; columns of an evaluation's or a step's records where they are no numbers.
    - One response, ``f(prompt, completion, answer, ...) -> float``: arguments are filled by name from ``prompt``,
      ``prompt_text``, ``completion`` and ``response`` (both the text), ``completion_ids``, ``finish_reason``,
      ``reference``, ``task`` and every other column; ``answer`` is the reference where there is no such column.
    - verl, ``compute_score(data_source, solution_str, ground_truth, extra_info) -> float``: ``data_source`` is the
      column or the task; ``ground_truth`` the column, ``reward_model["ground_truth"]`` or the reference (without one
      the reward does not apply); ``extra_info`` the column, or a dict of all columns. The text may be called
      ``predict_str`` or ``model_output``. Its batched form takes ``data_sources``, ``solution_strs``,
      ``ground_truths`` and ``extra_infos``.
    - OpenRLHF, ``reward_func(queries, prompts, labels) -> tensor`` or a dict with ``rewards``: lists of the rendered
      prompt with its response, of the rendered prompt, and of the references.
    - verifiers, ``f(completion, answer, state, parser, info)``: as one response, ``prompt`` and ``completion`` always
      as chat messages; ``parser.parse_answer(completion)`` is the text of the last message.

    Coroutine functions run together, in one event loop for the whole run. A returned dict gives its ``score`` (or
    ``reward``); its other numbers become metrics. ``None`` and NaN mean that the reward does not apply. Arguments are
    copies: a function may change them.

    Args:
        function: ``package.module.name``, ``path/to/file.py:name``, or (from Python) the function itself.
        style: ``auto`` tells it by the argument names.
        columns: argument name to the data column that fills it, where the names differ.
        kwargs: further keyword arguments of every call.
        completions: how prompts and completions are handed over: ``auto`` as the style and the prompt have them,
            ``text``, or ``messages``, ``[{"role": "assistant", "content": ...}]``.
        timeout: seconds that the calls of one batch may take (of a coroutine function: each of its calls); null: no
            limit.
        on_error: what becomes of a call that raises or does not come back: ``stop`` ends the run; ``skip`` takes it as
            "does not apply", warns of the first, and logs the share of them as ``reward/<name>/errors``.
        waits: whether the function waits for others (a server, a process) rather than computes: rewards that wait are under
            way together, beside those that compute, each in a thread of its own. Null: coroutine functions do. Such a
            function draws from no global generator, and one that is no coroutine cannot be interrupted at its ``timeout``:
            nobody waits for it any more.
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
        completions: CompletionsOption = "auto",
        timeout: float | None = 600.0,
        on_error: OnError = "stop",
        waits: bool | None = None,
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        check_choice("FunctionReward", "style", style, StyleOption)
        check_choice("FunctionReward", "completions", completions, CompletionsOption)
        check_choice("FunctionReward", "on_error", on_error, OnError)
        if timeout is not None and not timeout > 0:
            raise UserError(f"FunctionReward: timeout is {timeout}, expected seconds above 0, or null for no limit.")
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
        self.completions, self.call_timeout, self.on_error = completions, timeout, on_error
        self.columns, self.kwargs = dict(columns or {}), dict(kwargs or {})
        self._check_names("columns", self.columns)
        self._check_names("kwargs", self.kwargs)
        self.waits = waits_by_nature(self.function) if waits is None else waits
        self._none_for_all = False  # the last batch's calls all returned None
        self._warned = False

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """Call the function and read the scores and the further numbers it returns."""
        journal = Journal(len(rows), f"Reward {self.name!r}: {self.target}")
        if self.style in BATCHED:
            results = self._call_batch(rollout, rows, pl_module, journal)
        else:
            results = self._call_each(rollout, rows)
        owner = f"Reward {self.name!r}"
        scores: list[float | None] = []
        metrics: dict[str, list[float | None]] = journal.numbers()
        for i, (row, result) in enumerate(zip(rows, results, strict=True)):
            if isinstance(result, Raised):
                scores.append(None)
                continue
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
        if self.on_error == "skip":
            metrics[ERRORS] = [float(isinstance(result, Raised)) for result in results]
        self._notes = journal.texts(rows, len(rollout))
        return scores, metrics

    def why_not(self, rollout: Rollout) -> str | None:
        """See :meth:`Reward.why_not`."""
        prompts = {row // rollout.group_size for row in self.rows_of(rollout)}
        taken = {
            self.columns.get(name, "reference" if name in _REFERENCES else name) for name in self.signature.parameters
        }
        empty = [
            column
            for column, values in rollout.columns.items()
            if column in taken and all(values[prompt] is None for prompt in prompts)
        ]
        if empty:
            return f"no row has the column {empty[0]!r}"
        if self._none_for_all:
            return f"{self.target} returned None for every one of them (does it end with `return`?)"
        return super().why_not(rollout)

    def _call_batch(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule, journal: Journal) -> list[Any]:
        applies = rows
        if self.style == "verl_batch":  # verl's functions compare with a ground truth: without one they say nothing
            applies = [row for row in rows if verl_truth(rollout, row, self.columns) is not None]
        by_row: dict[int, Any] = dict.fromkeys(rows)
        if not applies:
            return list(by_row.values())
        available = batch_arguments(rollout, applies, self.style, self.completions) | {
            "trainer_state": trainer_state(self._trainer, pl_module),
            "log_extra": journal.log_extra,
            "log_metric": journal.log_metric,
        }
        available |= {
            argument: [deepcopy(rollout.per_response(column)[row]) for row in applies]
            for argument, column in self.columns.items()
        }
        (result,) = self._call([self._arguments(rollout, available)])
        if isinstance(result, Raised):
            where = f"{len(applies)} responses, the first {self.describe(rollout, applies[0])}"
            self._refuse(result.error, where)
            by_row |= dict.fromkeys(applies, result)
            return list(by_row.values())
        if result is None:
            raise UserError(
                f"Reward {self.name!r}: {self.target} returned a NoneType for {len(applies)} responses: does it end with "
                "`return`? Return a list with one score for each, in their order, and None where the reward does not "
                "apply."
            )
        by_row |= zip(applies, _rows_of(result, len(applies), f"Reward {self.name!r}: {self.target}"), strict=True)
        self._none_for_all = all(value is None for value in by_row.values())
        return list(by_row.values())

    def _call_each(self, rollout: Rollout, rows: list[int]) -> list[Any]:
        # verl's functions compare with a ground truth: without one they have nothing to say.
        applies = [self.style != "verl" or verl_truth(rollout, row, self.columns) is not None for row in rows]
        calls = [
            self._arguments(rollout, self._of_row(rollout, row)) for row, ok in zip(rows, applies, strict=True) if ok
        ]
        answers = self._call(calls)
        self._none_for_all = bool(answers) and all(answer is None for answer in answers)
        returned = iter(answers)
        results = [next(returned) if ok else None for ok in applies]
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Raised):
                self._refuse(result.error, self.describe(rollout, row))
        return results

    def _of_row(self, rollout: Rollout, row: int) -> dict[str, Any]:
        filled = row_arguments(rollout, row, self.style, self.completions) | self._mapped(rollout, row)
        if self.style == "verl":
            named = [name for name in VERL_RESPONSE if name in self.signature.parameters]
            filled |= dict.fromkeys(named, rollout.responses[row])
        return filled

    def _call(self, calls: list[Arguments]) -> list[Any]:
        return call_all(self.function, calls, self.call_timeout, self.stopping)

    def _mapped(self, rollout: Rollout, row: int) -> dict[str, Any]:
        return {argument: deepcopy(rollout.per_response(column)[row]) for argument, column in self.columns.items()}

    def _arguments(self, rollout: Rollout, available: Mapping[str, Any]) -> Arguments:
        try:
            return select_arguments(self.signature, available, self.kwargs)
        except KeyError as error:
            missing, others = error.args[0], sorted(set(available) - set(rollout.columns))
            verifiers = missing in ("state", "info") and self.style == "per_response"
            hint = " A function of verifiers says so with style: verifiers." if verifiers else ""
            raise UserError(
                f"Reward {self.name!r}: {self.target} needs an argument {missing!r}, which is neither a column of the "
                f"data ({sorted(rollout.columns)}) nor one of {others}: map it with columns: {{{missing}: <column>}}, "
                f"bind it in kwargs, or give it a default.{hint}"
            ) from None

    def _refuse(self, error: BaseException, where: str) -> None:
        """Raise what a call raised as a sentence, or warn of the first where errors are skipped; exits are never skipped."""
        sentence = self._failure(error, where)
        if self.on_error == "stop" or not isinstance(error, Exception | TimeLimit):
            raise RunStopped(sentence, status=1) from error
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{sentence} The response is left out (on_error: skip), and so are further ones; reward/{self.name}/"
                f"{ERRORS} is their share."
            )

    def _failure(self, error: BaseException, where: str) -> str:
        if isinstance(error, TimeLimit):
            return (
                f"Reward {self.name!r}: {self.target} did not come back within {self.call_timeout:g} s for {where}: "
                "correct the function, or give it more time with timeout (null: no limit)."
            )
        hint = ""
        if isinstance(error, TypeError) and str(error).startswith("string indices must be integers"):
            hint = " It may read chat messages, and got texts: give completions: messages."
        elif isinstance(error, AttributeError) and "'list' object has no attribute" in str(error):
            hint = " It may read texts, and got chat messages: give completions: text."
        return (
            f"Reward {self.name!r}: {self.target} raised {told(error)} ({origin(error)}) for {where}: correct the "
            f"function, or let it return None where the reward does not apply.{hint}"
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


def _rows_of(result: Any, count: int, owner: str) -> list[Any]:
    """One result a response from what a batch function returned: a list, or a dict of lists.

    Raises:
        UserError: the result, or a list in the dict, is no list of ``count`` values.
    """
    if isinstance(result, Mapping):
        result = _openrlhf(result)
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
    result = as_list(result)
    if not isinstance(result, list | tuple) or len(result) != count:
        found = f"{len(result)} values" if isinstance(result, list | tuple) else f"a {type(result).__name__}"
        raise UserError(
            f"{owner} returned {found} for {count} responses: return a list with one score for each, in their order, "
            "and None where the reward does not apply. A function of one response says so with style: per_response."
        )
    return list(result)


def _openrlhf(result: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """OpenRLHF's dict, ``rewards``, ``scores`` and ``extra_logs``, with our names."""
    if "rewards" not in result or "score" in result or "reward" in result:
        return result
    further = {key: value for key, value in result.items() if key not in ("rewards", "extra_logs")}
    return {"score": result["rewards"], **further, **(result.get("extra_logs") or {})}
