"""Labels out of the texts of other programs' files, see ``exchange.py``."""

from __future__ import annotations

import csv
import io
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from maestro_pl.data.messages import is_chat, messages_in
from maestro_pl.errors import from_cell
from maestro_pl.labelling.exchange import ASKED, BAD, TIE
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import Click, Verdict, choice_of

EXPECTED = {
    "csv": "the columns prompt, choice, response_1, response_2, ... (and, where they are known, task, rater, time and of), "
    "with commas between them",
    "jsonl": "on each line an object with prompt, responses and choice (and, where they are known, task, rater and time)",
    "argilla": f"a list of records with the fields prompt, answer_1, answer_2, ... and responses to the question {ASKED!r}",
    "label-studio": "a list of tasks with data (prompt, answer_1, answer_2, ...) and annotations with choices named "
    f"{ASKED!r}",
}


@dataclass(frozen=True)
class Label:
    """A label of a file.

    Attributes:
        place: where it stands there, such as ``row 2``.
        click: what it says.
        own: whether the file names the person.
    """

    place: str
    click: Click
    own: bool


class NoLabel(ValueError):
    """What is wrong, with the place in the file in front."""


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Say where something is wrong."""
    try:
        yield
    except RecursionError as error:
        raise NoLabel(f"{place}: it is nested too deeply; expected texts, lists and chat messages") from error
    except ValueError as error:
        raise NoLabel(f"{place}: {error}") from error


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:80]}..."


# -- one label ---------------------------------------------------------------------------------------------------------


def _click(task: Any, prompt: Any, shown: Sequence[Any], value: Any, rater: Any, when: Any, prefix: str = "") -> Click:
    """A label from the answers as they were shown, and the numbers of the best from 1, or what stands for none.

    Args:
        task: of the prompt; "all" where there is none.
        prompt: a text, which may write out chat messages, or those.
        shown: the answers.
        value: what was said.
        rater: who has said it.
        when: in ISO format; now where there is none.
        prefix: what stands before the numbers.

    Raises:
        ValueError: it is none.
    """
    prompt = prompt if not isinstance(prompt, str) else messages_in(prompt) or prompt
    if not (isinstance(prompt, str) or is_chat(prompt)):
        raise ValueError(f"the prompt is {_short(prompt)}, expected a text or chat messages")
    for text in shown:
        if not isinstance(text, str):
            raise ValueError(f"an answer is {_short(text)}, expected a text")
    if not rater:
        raise ValueError("nobody is named; give --rater NAME")
    task = "all" if task in (None, "") else str(task)
    try:
        json.dumps([task, prompt, list(shown), str(rater)], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise ValueError(f"a text has half a letter, {half}, which cannot be kept; take it out") from error
    question = Question.of(task, prompt, shown)
    order = [question.responses.index(text) for text in shown]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    said: tuple[Verdict, int | None, tuple[int, ...]]
    if value in (TIE, BAD):
        said = "tie" if value == TIE else "bad", None, ()
    else:
        said = choice_of([order[number - 1] for number in _numbers(value, len(shown), prefix)], len(shown))
    verdict, best, also = said
    return Click(question, str(rater), verdict, best, tuple(order), _seconds(when), also=also)


def _numbers(value: Any, count: int, prefix: str) -> list[int]:
    """Which answers are the best: 2, "2", "2, 3" or [2, 3], or with the prefix "answer_2".

    Raises:
        ValueError: others than 1 to ``count``, or none.
    """
    each = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
    each = [number.removeprefix(prefix) if isinstance(number, str) else number for number in each]
    try:
        numbers = [int(number) for number in each]
        whole = numbers == [float(number) for number in each] and not any(isinstance(number, bool) for number in each)
    except (ValueError, TypeError, OverflowError):
        numbers, whole = [], False
    if not numbers or not whole or not all(1 <= number <= count for number in numbers):
        several = "" if prefix else " (several: '1, 2')"
        raise ValueError(
            f"the choice is {_short(value)}, expected {prefix}1 to {prefix}{count}{several}, {TIE!r} or {BAD!r}"
        )
    return numbers


def _seconds(when: Any) -> float:
    if not when:
        return time.time()
    try:
        moment = datetime.fromisoformat(str(when).replace("Z", "+00:00"))
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        seconds = -1.0
    if seconds < 0:
        raise ValueError(
            f"the time is {_short(when)}, expected one since 1970 such as 2026-01-31T12:00:00+00:00; leave it empty where it "
            "is not known"
        )
    return seconds


def _check_of(of: Any, answers: Sequence[Any]) -> None:
    """Raise where a question is said to have another number of answers than it has.

    Raises:
        ValueError: it is.
    """
    if str(of) != str(len(answers)):
        raise ValueError(
            f"'of' is {_short(of)} beside {len(answers)} answers; expected their number, or leave 'of' out"
        )


def _is(value: Any, kind: type[dict[str, Any]] | type[list[Any]], what: str) -> Any:
    """The value.

    Raises:
        ValueError: it is no object, or no list.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {_short(value)}, expected {'an object' if kind is dict else 'a list'}")
    return value


def _check_names(names: Sequence[str], needed: Sequence[str], form: str, hint: str = "") -> None:
    """Raise where something is not there.

    Raises:
        ValueError: it is not.
    """
    missing = [name for name in needed if name not in names]
    if missing:
        held = ", ".join(names) or "nothing"
        raise ValueError(f"there is no {' and no '.join(missing)}, it has {held:.200}; {hint}expected {EXPECTED[form]}")


def _answers(names: Sequence[str], prefix: str) -> list[str]:
    """Those of the names that are the answers', by their numbers."""
    found = [name for name in names if re.fullmatch(f"{prefix}[0-9]{{1,9}}", name)]
    return sorted(found, key=lambda name: int(name.removeprefix(prefix)))


# -- the formats -------------------------------------------------------------------------------------------------------


def _json(text: str, form: str) -> Any:
    """What a text in JSON holds.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, character {error.colno}" if "\n" in text.strip() else f"character {error.colno}"
        raise ValueError(f"it is no JSON ({where}: {error.msg}); expected {EXPECTED[form]}") from error
    except ValueError as error:
        raise ValueError("a number in it has too many digits; take some off") from error


def _from_jsonl(text: str, rater: str | None) -> Iterator[Label]:
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {n}"
        with _at(place):
            row = _json(line, "jsonl")
            if not isinstance(row, dict):
                raise ValueError(f"it is {_short(row)}; expected {EXPECTED['jsonl']}")
            _check_names(list(row), ["prompt", "responses", "choice"], "jsonl")
            if row["choice"] in (None, "", []):
                continue
            answers = _is(row["responses"], list, "'responses'")
            if row.get("of") not in (None, ""):
                _check_of(row["of"], answers)
            own = row.get("rater")
            click = _click(row.get("task"), row["prompt"], answers, row["choice"], own or rater, row.get("time"))
        yield Label(place, click, bool(own))


def _from_csv(text: str, rater: str | None) -> Iterator[Label]:
    """Rows are counted as a spreadsheet does: the header is row 1."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # answers may be longer than its 131,072 letters
    names: list[str] = []
    for n, cells in _csv_rows(text):
        place = f"row {n}"
        if not any(cells):
            continue
        if not names:
            names = cells
            with _at(place):
                other = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
                hint = f"its columns seem to have {other!r} between them; save it with commas; " if other else ""
                _check_names(names, ["prompt", "choice", "response_1", "response_2"], "csv", hint)
            continue
        with _at(place):
            if len(cells) > len(names):
                raise ValueError(
                    f"it has {len(cells)} cells, and the header {len(names)}; put texts with a comma in them into quotes"
                )
            row = dict(zip(names, map(from_cell, cells), strict=False))
            if not row.get("choice"):
                continue
            answers = [row[name] for name in _answers(names, "response_") if name in row]
            of = row.get("of", "").strip()
            if of:  # an empty answer is one, and the columns of a longer question are none
                count = next((k for k in range(len(answers) + 1) if str(k) == of), None)
                unused = 0 if count is None else sum(not text for text in answers[count:])
                _check_of(of, answers[: len(answers) - unused])
                answers = answers[:count]
            own = row.get("rater")
            click = _click(row.get("task"), row["prompt"], answers, row["choice"], own or rater, row.get("time"))
        yield Label(place, click, bool(own))


def _csv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    rows, n = csv.reader(io.StringIO(text, newline=""), strict=True), 0
    while True:
        n += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise NoLabel(
                f"row {n}: its quotes do not match ({error}); expected quotes around a text that has a comma, a quote or a "
                "line's end in it, and each quote in it twice"
            ) from error
        yield n, row


def _from_argilla(text: str, rater: str | None) -> Iterator[Label]:
    for place, record in _parts(text, "argilla", "record"):
        with _at(place):
            responses = _is(_is(record, dict, "it").get("responses") or {}, dict, "'responses'").get(ASKED) or []
            fields = _is(record.get("fields"), dict, "'fields'")
            _check_names(list(fields), ["prompt", "answer_1", "answer_2"], "argilla")
            task = _is(record.get("metadata") or {}, dict, "'metadata'").get("task")
            answers = [fields[name] for name in _answers(list(fields), "answer_")]
            labels = []
            for response in _is(responses, list, f"'responses' to {ASKED!r}"):
                value, own = _is(response, dict, "a response").get("value"), response.get("user_id")
                if value not in (None, "", []):
                    click = _click(task, fields["prompt"], answers, value, own or rater, None, "answer_")
                    labels.append(Label(place, click, bool(own)))
        yield from labels


def _from_label_studio(text: str, rater: str | None) -> Iterator[Label]:
    for place, task in _parts(text, "label-studio", "task"):
        with _at(place):
            data = _is(_is(task, dict, "it").get("data"), dict, "'data'")
            _check_names(list(data), ["prompt", "answer_1", "answer_2"], "label-studio")
            answers = [data[name] for name in _answers(list(data), "answer_")]
            labels = []
            for annotation in _is(task.get("annotations") or [], list, "'annotations'"):
                # an annotation that was skipped has no result
                for result in _is(_is(annotation, dict, "an annotation").get("result") or [], list, "'result'"):
                    if _is(result, dict, "a result").get("from_name") != ASKED:
                        continue
                    value = _is(result.get("value"), dict, "'value'").get("choices")
                    own, when = _annotator(annotation, result), annotation.get("created_at")
                    if value not in (None, "", []):
                        click = _click(data.get("task"), data["prompt"], answers, value, own or rater, when, "answer_")
                        labels.append(Label(place, click, bool(own)))
        yield from labels


def _annotator(annotation: dict[str, Any], result: dict[str, Any]) -> Any:
    """Whose annotation it is: an id of a result that an export wrote stays when somebody else imports it."""
    if annotation.get("created_username"):
        return annotation["created_username"]
    try:
        return str(uuid.UUID(str(result.get("id"))))
    except ValueError:
        who = annotation.get("completed_by")
        return who.get("id") if isinstance(who, dict) else who


def _parts(text: str, form: str, part: str) -> Iterator[tuple[str, Any]]:
    """Each part of a file that is a list, and where it stands."""
    with _at("as a whole"):
        whole = _json(text, form) if text.strip() else []
        if not isinstance(whole, list):
            raise ValueError(f"it is {_short(whole)}; expected {EXPECTED[form]}")
    for n, value in enumerate(whole, 1):
        yield f"{part} {n}", value


READERS: dict[str, Callable[[str, str | None], Iterator[Label]]] = {
    "csv": _from_csv,
    "jsonl": _from_jsonl,
    "argilla": _from_argilla,
    "label-studio": _from_label_studio,
}
