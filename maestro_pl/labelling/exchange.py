"""Labels as files of other programs: CSV, JSON lines, and the JSON of Argilla and of Label Studio."""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from maestro_pl.errors import UserError, cell, check_choice
from maestro_pl.evaluation.records import write_whole
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import Click, LabelStore

Format: TypeAlias = Literal["csv", "jsonl", "argilla", "label-studio"]
ENDINGS = {".csv": "csv", ".jsonl": "jsonl"}
TIE, BAD = "no difference", "all bad"  # what stands for a choice of no answer
ASKED = "best"  # the name of the question in Argilla and Label Studio


def exported(store: LabelStore, path: Path, form: str | None = None) -> int:
    """Write every label that stands; Argilla and Label Studio get the questions without an answer as well.

    Args:
        store: with the labels.
        path: of a file that is not there yet.
        form: its format; None: by its ending.

    Returns:
        How many labels were written.

    Raises:
        UserError: the file exists, its folder does not, or its format is not known.
    """
    kind = format_of(path, form)
    if path.exists() or not path.absolute().parent.is_dir():
        raise UserError(f"{path}: expected a file that is not there yet, in a folder that exists.")
    clicks = store.clicks()
    write_whole(path, WRITERS[kind](store.questions(), clicks))
    return len(clicks)


def format_of(path: Path, form: str | None) -> str:
    """The format of a file: the one that is given, or what its ending says.

    Raises:
        UserError: it is not known.
    """
    kind = form or ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: its ending says no format; give --format {', '.join(get_args(Format))}.")
    check_choice("--format", kind, Format)
    return kind


def user_id(rater: str) -> str:
    """The id that a pseudonym has in other programs; people who came from there have the one that they had."""
    try:
        return str(uuid.UUID(rater))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, rater))


# -- writing -----------------------------------------------------------------------------------------------------------


def _row(click: Click) -> dict[str, Any]:
    question = click.question
    return {
        "task": question.task,
        "prompt": question.prompt,
        "responses": [question.responses[place] for place in click.shown],
        "choice": _choice(click),
        "rater": click.rater,
        "time": datetime.fromtimestamp(click.time, timezone.utc).isoformat(),
    }


def _choice(click: Click) -> str | int | list[int]:
    """The number of the best answer as they were shown, the numbers of several, or what stands for none."""
    numbers = [1 + click.shown.index(place) for place in click.bests]
    return {"tie": TIE, "bad": BAD}.get(click.verdict) or (numbers if len(numbers) > 1 else numbers[0])


def _jsonl(questions: Sequence[Question], clicks: Sequence[Click]) -> str:
    return "".join(json.dumps(_row(click), ensure_ascii=False) + "\n" for click in clicks)


def _csv(questions: Sequence[Question], clicks: Sequence[Click]) -> str:
    most = max((len(click.shown) for click in clicks), default=2)
    out = io.StringIO()
    answers = [f"response_{n}" for n in range(1, most + 1)]
    names = ["task", "prompt", "choice", "rater", "time", "of", *answers]
    # all in quotes: a carriage return alone gets none otherwise, and is the end of a line to whoever reads it
    writer = csv.DictWriter(out, names, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    for click in clicks:
        row = _row(click)
        row["of"] = len(row["responses"])
        row |= dict(zip(answers, row.pop("responses"), strict=False))
        row["prompt"] = _prompt_cell(row["prompt"])
        if isinstance(row["choice"], list):
            row["choice"] = ", ".join(map(str, row["choice"]))
        writer.writerow({name: cell(value) for name, value in row.items()})
    return out.getvalue()


def _prompt_cell(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _fields(question: Question) -> dict[str, str]:
    answers = {f"answer_{n}": text for n, text in enumerate(question.responses, 1)}
    return {"prompt": _prompt_cell(question.prompt), **answers}


def _values(click: Click) -> list[str]:
    none = {"tie": TIE, "bad": BAD}.get(click.verdict)
    return [none] if none else [f"answer_{1 + place}" for place in click.bests]


def _by_key(clicks: Sequence[Click]) -> dict[str, list[Click]]:
    found: dict[str, list[Click]] = defaultdict(list)
    for click in clicks:
        found[click.question.key].append(click)
    return found


def _argilla(questions: Sequence[Question], clicks: Sequence[Click]) -> str:
    """Records as ``Dataset.records.to_json`` writes them, for a dataset with the label question ``best``.

    Where somebody called several answers the best it is a multi-label question, whose values are lists.
    """
    given, several = _by_key(clicks), any(click.also for click in clicks)
    records = [
        {
            "id": question.key,
            "fields": _fields(question),
            "metadata": {"task": question.task},
            "suggestions": {},
            "responses": {
                ASKED: [
                    {
                        "value": _values(click) if several else _values(click)[0],
                        "user_id": user_id(click.rater),
                    }
                    for click in given[question.key]
                ]
            }
            if given[question.key]
            else {},
            "vectors": {},
        }
        for question in questions
    ]
    return json.dumps(records, ensure_ascii=False, indent=1)


def _label_studio(questions: Sequence[Question], clicks: Sequence[Click]) -> str:
    """Tasks as Label Studio imports them, for a ``Choices`` tag named ``best`` over the text ``prompt``."""
    given = _by_key(clicks)
    tasks: list[dict[str, Any]] = [
        {
            "data": {**_fields(question), "task": question.task, "key": question.key},
            "annotations": [
                {
                    "result": [
                        {
                            "id": user_id(click.rater),  # Label Studio gives annotations to whoever imports them
                            "from_name": ASKED,
                            "to_name": "prompt",
                            "type": "choices",
                            "value": {"choices": _values(click)},
                        }
                    ],
                    "created_username": click.rater,
                    "created_at": datetime.fromtimestamp(click.time, timezone.utc).isoformat(),
                }
                for click in given[question.key]
            ],
        }
        for question in questions
    ]
    return json.dumps(tasks, ensure_ascii=False, indent=1)


WRITERS: dict[str, Callable[[Sequence[Question], Sequence[Click]], str]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "argilla": _argilla,
    "label-studio": _label_studio,
}
