"""Labels as files of other programs: CSV, JSON lines, and the JSON of Argilla and of Label Studio."""

from __future__ import annotations

import csv
import io
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from maestro_pl.data.messages import is_chat, messages_in
from maestro_pl.errors import UserError, cell, check_choice, from_cell
from maestro_pl.evaluation.records import write_whole
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import Click, LabelStore, Verdict, choice_of

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
    kind = _format(path, form)
    if path.exists() or not path.absolute().parent.is_dir():
        raise UserError(f"{path}: expected a file that is not there yet, in a folder that exists.")
    clicks = store.clicks()
    write_whole(path, WRITERS[kind](store.questions(), clicks))
    return len(clicks)


def imported(store: LabelStore, path: Path, form: str | None = None, rater: str | None = None) -> tuple[int, int]:
    """Read labels; nothing is kept where one of them cannot be used.

    Args:
        store: that gets them; of a person's answers to one question the one that is there stands.
        path: of the file.
        form: its format; None: by its ending.
        rater: whose labels they are where the file does not say.

    Returns:
        How many labels were new, and how many were there.

    Raises:
        UserError: the file cannot be read, or holds what is no label.
    """
    kind = _format(path, form)
    try:
        with path.open(encoding="utf-8", newline="") as file:  # a line's end inside an answer is one of its letters
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    try:
        clicks = READERS[kind](text, rater)
    except _NoLabel as error:
        raise UserError(f"{path}, label {error.place}: {error}. Nothing was imported.") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} is no {kind} file of labels ({error!r}). Nothing was imported.") from error
    new = store.click(*clicks)
    return new, len(clicks) - new


class _NoLabel(ValueError):
    def __init__(self, place: int, why: object) -> None:
        super().__init__(str(why))
        self.place = place


def _format(path: Path, form: str | None) -> str:
    kind = form or ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: its ending says no format; give --format {', '.join(get_args(Format))}.")
    check_choice("--format", kind, Format)
    return kind


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
                        "user_id": str(uuid.uuid5(uuid.NAMESPACE_URL, click.rater)),
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


# -- reading -----------------------------------------------------------------------------------------------------------


def _click(task: str, prompt: Any, shown: Sequence[str], value: Any, rater: Any, when: Any, place: int) -> Click:
    """A label from the answers as they were shown, and the numbers of the best from 1, or what stands for none.

    Raises:
        _NoLabel: it is none.
    """
    try:
        prompt = prompt if not isinstance(prompt, str) else messages_in(prompt) or prompt
        if not (isinstance(prompt, str) or is_chat(prompt)) or not all(isinstance(text, str) for text in shown):
            raise ValueError("a prompt is a text or chat messages, and an answer is a text")
        json.dumps([task, prompt, list(shown), rater], ensure_ascii=False).encode()  # half a letter can be kept nowhere
        question = Question.of(task, prompt, shown)
        order = [question.responses.index(text) for text in shown]
        said: tuple[Verdict, int | None, tuple[int, ...]]
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]
        if value in (TIE, BAD):
            said = "tie" if value == TIE else "bad", None, ()
        else:
            said = choice_of([order[number - 1] for number in _numbers(value, len(shown))], len(shown))
        verdict, best, also = said
        if not rater:
            raise ValueError("nobody is named: give --rater NAME")
        return Click(question, str(rater), verdict, best, tuple(order), _seconds(when), also=also)
    except (ValueError, TypeError) as error:
        raise _NoLabel(place, error) from error


def _numbers(value: Any, count: int) -> list[int]:
    """Which answers are the best: 2, "2", "2, 3" or [2, 3].

    Raises:
        ValueError: others than 1 to ``count``, or none.
    """
    each = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
    try:
        numbers = [int(number) for number in each]
        whole = numbers == [float(number) for number in each] and not any(isinstance(number, bool) for number in each)
    except (ValueError, TypeError, OverflowError):
        numbers, whole = [], False
    if not numbers or not whole or not all(1 <= number <= count for number in numbers):
        raise ValueError(f"the choice is {value!r}, expected 1 to {count} (several: '1, 2'), {TIE!r} or {BAD!r}")
    return numbers


def _seconds(when: Any) -> float:
    if not when:
        return time.time()
    moment = datetime.fromisoformat(str(when).replace("Z", "+00:00"))
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    if seconds < 0:
        raise ValueError(f"the time is {when!r}, expected one since 1970")
    return seconds


def _from_jsonl(text: str, rater: str | None) -> list[Click]:
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [
        _click(str(r.get("task", "all")), r["prompt"], r["responses"], r["choice"], r.get("rater") or rater,
               r.get("time"), n)
        for n, r in enumerate(rows, 1)
        if r.get("choice") not in (None, "", [])
    ]  # fmt: skip


def _from_csv(text: str, rater: str | None) -> list[Click]:
    clicks = []
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # answers may be longer than its 131,072 letters
    for n, raw in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
        row = {name: from_cell(value or "") for name, value in raw.items()}
        answers = [row[name] for name, value in raw.items() if name.startswith("response_") and value is not None]
        if row.get("of"):  # an empty answer is one, and the columns of a longer question are none
            answers = answers[: int(row["of"])]
        if row["choice"]:
            clicks.append(
                _click(row.get("task") or "all", row["prompt"], answers, row["choice"], row.get("rater") or rater,
                       row.get("time"), n)
            )  # fmt: skip
    return clicks


def _answers(fields: dict[str, Any]) -> list[str]:
    names = [name for name in fields if name.startswith("answer_")]
    return [fields[name] for name in sorted(names, key=lambda name: int(name.removeprefix("answer_")))]


def _named(values: str | Sequence[str]) -> list[str]:
    """The numbers of the answers that are named, or what stands for none."""
    return [value.removeprefix("answer_") for value in ([values] if isinstance(values, str) else values)]


def _from_argilla(text: str, rater: str | None) -> list[Click]:
    clicks = []
    for n, record in enumerate(json.loads(text), 1):
        fields = record["fields"]
        for response in (record.get("responses") or {}).get(ASKED, []):
            who = response.get("user_id") or rater
            task = (record.get("metadata") or {}).get("task", "all")
            value = _named(response["value"])
            clicks.append(_click(str(task), fields["prompt"], _answers(fields), value, who, None, n))
    return clicks


def _from_label_studio(text: str, rater: str | None) -> list[Click]:
    clicks = []
    for n, task in enumerate(json.loads(text), 1):
        data = task["data"]
        for annotation in task.get("annotations") or []:
            for result in annotation.get("result") or []:  # an annotation that was skipped has none
                if result.get("from_name") == ASKED:
                    who = annotation.get("created_username") or annotation.get("completed_by") or rater
                    who = who.get("id") if isinstance(who, dict) else who
                    value = _named(result["value"]["choices"])
                    clicks.append(
                        _click(str(data.get("task", "all")), data["prompt"], _answers(data), value, who,
                               annotation.get("created_at"), n)
                    )  # fmt: skip
    return clicks


WRITERS: dict[str, Callable[[Sequence[Question], Sequence[Click]], str]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "argilla": _argilla,
    "label-studio": _label_studio,
}
READERS: dict[str, Callable[[str, str | None], list[Click]]] = {
    "csv": _from_csv,
    "jsonl": _from_jsonl,
    "argilla": _from_argilla,
    "label-studio": _from_label_studio,
}
