"""What a reward function is handed, by its style: copies, so that a function may change what it gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, SupportsFloat

from maestro_pl.errors import UserError
from maestro_pl.rewards.scores import as_list
from maestro_pl.rollout import Message, Prompt, Rollout

#: Styles of functions that are called once for all responses.
BATCHED = ("trl", "verl_batch", "openrlhf")


class PlainParser:
    """The parser that verifiers hands over where a rubric names none: the answer is the text of the last message."""

    def parse(self, text: str) -> str:
        """The text as it is."""
        return text

    def parse_answer(self, completion: str | Sequence[Message]) -> str:
        """The text, or the content of the last message."""
        return completion if isinstance(completion, str) else str(completion[-1]["content"])


class Journal:
    """What a function logs by TRL's ``log_extra`` and ``log_metric`` in one call.

    Args:
        count: responses that the function is called for.
        owner: who logs, as an error should name it.
    """

    def __init__(self, count: int, owner: str) -> None:
        self._count, self._owner = count, owner
        self._metrics: dict[str, list[float]] = {}
        self._columns: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Note a number of this batch; several of one name are averaged."""
        self._metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Note one value a response; numbers become a metric.

        Raises:
            UserError: another number of values than responses.
        """
        listed = as_list(values)
        if not isinstance(listed, list | tuple) or len(listed) != self._count:
            found = f"{len(listed)} values" if isinstance(listed, list | tuple) else f"a {type(values).__name__}"
            raise UserError(f"{self._owner} logged {found} as {column!r} for {self._count} responses: give one each.")
        self._columns[str(column)] = list(listed)

    def numbers(self) -> dict[str, list[float | None]]:
        """Name to one number a response."""
        means: dict[str, list[float | None]] = {
            name: [sum(values) / len(values)] * self._count for name, values in self._metrics.items()
        }
        columns = {name: list(map(_number, values)) for name, values in self._columns.items()}
        return {**means, **{name: values for name, values in columns.items() if any(v is not None for v in values)}}

    def texts(self, rows: Sequence[int], size: int) -> dict[str, list[Any]]:
        """Name to one value for each of ``size`` responses, of the columns that are no numbers."""
        found: dict[str, list[Any]] = {}
        for name, values in self._columns.items():
            if not any(_number(value) is not None for value in values):
                found[name] = [None] * size
                for row, value in zip(rows, values, strict=True):
                    found[name][row] = value
        return found


def _number(value: Any) -> float | None:
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def trainer_state(trainer: Any, module: Any) -> Any:
    """Transformers' ``TrainerState`` with ``global_step``, ``max_steps``, ``epoch`` and ``is_world_process_zero``."""
    from transformers import TrainerState

    state = TrainerState(global_step=module.policy_steps, epoch=0.0)
    if trainer is not None:
        batches = trainer.num_training_batches
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        finite = isinstance(batches, int) and batches > 0
        state.epoch = trainer.current_epoch + (done / batches if finite else 0.0)
        state.is_world_process_zero = trainer.is_global_zero
        of_epochs = (trainer.max_epochs or 0) * batches if finite and (trainer.max_epochs or 0) > 0 else 0
        state.max_steps = trainer.max_steps if trainer.max_steps > 0 else of_epochs
    return state


def batch_arguments(rollout: Rollout, rows: Sequence[int], style: str, form: str) -> dict[str, Any]:
    """What a function of lists can ask for by name: one value for each of ``rows``."""
    columns = {key: [deepcopy(rollout.per_response(key)[row]) for row in rows] for key in rollout.columns}
    ids = [list(rollout.response_ids[row]) for row in rows]
    texts = [rollout.responses[row] for row in rows]
    rendered = [rollout.prompt_texts[row // rollout.group_size] for row in rows]
    if style == "verl_batch":
        filled = [_verl(rollout, row) for row in rows]
        return {
            **columns,
            "data_sources": [values["data_source"] for values in filled],
            "solution_strs": texts,
            "ground_truths": [values["ground_truth"] for values in filled],
            "extra_infos": [values["extra_info"] for values in filled],
            "completion_ids": ids,
        }
    if style == "openrlhf":
        queries = [prompt + text for prompt, text in zip(rendered, texts, strict=True)]
        labels = [deepcopy(rollout.per_response("reference")[row]) for row in rows]
        return {**columns, "queries": queries, "prompts": rendered, "labels": labels, "completion_ids": ids}
    prompts = [rollout.prompts[row // rollout.group_size] for row in rows]
    return {
        **columns,
        "prompts": [_in_form(prompt, form, "user", deepcopy(prompt)) for prompt in prompts],
        "completions": [
            _in_form(text, form, "assistant", text if isinstance(prompt, str) else _messages(text, "assistant"))
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        "completion_ids": ids,
    }


def row_arguments(rollout: Rollout, row: int, style: str, form: str) -> dict[str, Any]:
    """What a function of one response can ask for by name."""
    if style == "verl":
        return _verl(rollout, row)
    prompt, text = row // rollout.group_size, rollout.responses[row]
    columns = _columns(rollout, row)
    if style == "verifiers" and form == "auto":
        form = "messages"
    asked = deepcopy(rollout.prompts[prompt])
    filled: dict[str, Any] = {
        "answer": columns.get("reference"),
        **columns,
        "prompt": _in_form(asked, form, "user", asked),
        "prompt_text": rollout.prompt_texts[prompt],
        "completion": _in_form(text, form, "assistant", text),
        "response": text,
        "completion_ids": list(rollout.response_ids[row]),
        "finish_reason": rollout.finish_reasons[row],
    }
    if style == "verifiers":
        further: dict[str, Callable[[], Any]] = {"info": lambda: _columns(rollout, row), "parser": PlainParser}
        filled |= {name: make() for name, make in further.items() if name not in filled}
        keys = ("prompt", "completion", "answer", "task", "info")
        filled.setdefault("state", {key: deepcopy(filled.get(key)) for key in keys})
    return filled


def verl_truth(rollout: Rollout, row: int, mapped: Mapping[str, str]) -> Any:
    """The ground truth of a row: the mapped column, the column itself, ``reward_model["ground_truth"]``, the reference."""
    argument = next((name for name in ("ground_truth", "ground_truths") if name in mapped), None)
    if argument is not None:
        return rollout.per_response(mapped[argument])[row]
    columns = {key: values[row // rollout.group_size] for key, values in rollout.columns.items()}
    nested = columns.get("reward_model")
    truth = nested.get("ground_truth") if isinstance(nested, Mapping) else None
    return columns.get("ground_truth", columns.get("reference") if truth is None else truth)


def _verl(rollout: Rollout, row: int) -> dict[str, Any]:
    """The arguments of verl's ``compute_score``."""
    columns = _columns(rollout, row)
    return {
        "data_source": columns.get("data_source", columns.get("task")),
        "solution_str": rollout.responses[row],
        "ground_truth": deepcopy(verl_truth(rollout, row, {})),
        "extra_info": columns.get("extra_info", columns),
    }


def _columns(rollout: Rollout, row: int) -> dict[str, Any]:
    return {key: deepcopy(values[row // rollout.group_size]) for key, values in rollout.columns.items()}


def _messages(text: str, role: str) -> list[Message]:
    return [{"role": role, "content": text}]


def _in_form(said: Prompt, form: str, role: str, as_it_is: Any) -> Any:
    """A prompt or a completion as text or as messages, where one of them is asked for."""
    if form == "messages":
        return _messages(said, role) if isinstance(said, str) else deepcopy(said)
    if form == "text" and not isinstance(said, str):
        return "\n".join(str(message.get("content", "")) for message in said)
    return said if form == "text" else as_it_is
