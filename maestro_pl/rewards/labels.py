"""Labels that people gave: a file of prompts, responses and scores, looked up by prompt and response."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple, TypeAlias

import torch

from maestro_pl.data.messages import is_chat, messages_in
from maestro_pl.data.problems import Problems
from maestro_pl.data.readers import read_file
from maestro_pl.errors import UserError
from maestro_pl.rollout import Message, Prompt

LabelKey: TypeAlias = tuple[str, str]

_FLOAT32_MAX = torch.finfo(torch.float32).max


class Label(NamedTuple):
    """What people said about one response.

    Attributes:
        score: the mean of their scores.
        disagreement: the standard deviation of their scores (that of the population: of 0 and 1 it is 0.5); None where
            only one of them labelled it.
    """

    score: float
    disagreement: float | None


class LabelColumns(NamedTuple):
    """What the columns of a file of labels are called."""

    prompt: str = "prompt"
    response: str = "response"
    score: str = "score"


def read_labels(path: Path, columns: LabelColumns = LabelColumns()) -> dict[LabelKey, Label]:  # noqa: B008
    """Read a file of labels; rows of one prompt and response are averaged.

    Args:
        path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file. An empty one holds no labels.
        columns: their names; other columns are not looked at. A score that is empty or null means: not labelled.

    Raises:
        UserError: there is no such file, or rows that cannot be used: not readable, without one of the columns, a
            prompt or response of another kind, or a score that is no finite number.
    """
    if not path.is_file():
        raise UserError(
            f"There is no file of labels {path}: give the path of one, or an empty file for the run that writes the responses "
            "to be labelled."
        )
    if not path.read_bytes().strip():
        return {}
    problems = Problems(
        f"of the labels {path} cannot be used",
        "Correct them, or leave their score empty: such a row counts as not labelled.",
    )
    rows = read_file(path, problems)
    total = len(rows) + len(problems)
    given: dict[LabelKey, list[float]] = {}
    for line, row in rows:
        try:
            score = _score(row, columns)
            key = label_key(_value(row, columns.prompt, Prompt), _value(row, columns.response, str))
        except ValueError as error:
            problems.add(path.name, line, str(error))
            continue
        if score is not None:
            given.setdefault(key, []).append(score)
    problems.settle("error", total)
    return {key: Label(fmean(scores), pstdev(scores) if len(scores) > 1 else None) for key, scores in given.items()}


def label_key(prompt: Prompt, response: str) -> LabelKey:
    """What a response is looked up by: its prompt and its text, without white space at the ends.

    Line ends are levelled. Chat messages may be a list or its text, as a CSV file holds it (JSON, or Python's way of
    writing it).
    """
    messages = prompt if isinstance(prompt, list) else messages_in(prompt)
    return _text(prompt) if messages is None else _chat(messages), _text(response)  # type: ignore[arg-type]


def _text(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def _chat(messages: list[Message]) -> str:
    plain = [{key: _text(value) if isinstance(value, str) else value for key, value in m.items()} for m in messages]
    return json.dumps(plain, sort_keys=True, default=str)


def _value(row: Mapping[str, Any], column: str, kind: Any) -> Any:
    """The text (or, of a prompt, the messages) in a column.

    Raises:
        ValueError: the column is not there, or holds something else.
    """
    value = _cell(row, column)
    if isinstance(value, str) or (kind is Prompt and is_chat(value)):
        return value
    expected = "a text or a list of chat messages" if kind is Prompt else "a text"
    raise ValueError(f"{column!r} is {value!r}, expected {expected}")


def _cell(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise ValueError(f"no column {column!r}; it has {', '.join(row) or 'none'}")
    return row[column]


def _score(row: Mapping[str, Any], columns: LabelColumns) -> float | None:
    """The score of a row, or None where it is empty.

    Raises:
        ValueError: the column is not there, or holds no finite number.
    """
    value = _cell(row, columns.score)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not abs(number) <= _FLOAT32_MAX:
        raise ValueError(f"{columns.score!r} is {value!r}, expected a finite number")
    return number
