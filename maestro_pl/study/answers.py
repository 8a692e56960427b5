"""What a study compares: the recorded answers of runs, or files of answers, to the same prompts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maestro_pl.errors import UserError
from maestro_pl.evaluation.compare_runs import Key, check_same_prompts, folder_name
from maestro_pl.evaluation.records import prompt_key

ALL = "all"  # of the rows over all tasks
NO_TASK = "answers"  # of a file that names no tasks, and whose prompts no other file names one for
STAGES = ("samples_test", "predictions")


@dataclass(frozen=True)
class Answer:
    """An answer to one prompt.

    Attributes:
        prompt: the text, or the chat messages.
        task: empty where the file names none.
        rewards: name to raw value; what does not apply is left out.
    """

    prompt: Any
    task: str
    reference: Any
    response: str
    rewards: Mapping[str, float]

    @property
    def asked(self) -> str:
        """The prompt as a key: the same in every file that asks it."""
        return json.dumps(self.prompt, sort_keys=True, ensure_ascii=False)


@dataclass
class System:
    """What is compared with others under one name.

    Attributes:
        source: where its answers were read.
        answers: (task, prompt as a key) to the first answer that was recorded for it.
    """

    name: str
    source: str
    answers: dict[Key, Answer] = field(default_factory=dict)


def read_systems(texts: Sequence[str]) -> list[System]:
    """The systems that the command line names, all asked the same prompts.

    Args:
        texts: ``FOLDER`` of a run, ``FILE.jsonl``, or ``NAME=`` either.

    Returns:
        At least two, whose ``answers`` have the same keys.

    Raises:
        UserError: fewer than two, two of one name, a file that cannot be used, prompts that differ, or a task of several that
            is called ``all``.
    """
    if len(texts) < 2:
        raise UserError("A study compares at least two: give the folders of two runs, or two files of answers.")
    read = [(name, path, _records(path)) for name, path in map(_named, texts)]
    names = [name for name, _, _ in read]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"Two are called {twice[0]!r}: name them, as in NAME=FOLDER or NAME=FILE.jsonl.")
    known: dict[str, str] = {}  # prompt to its task, of whichever file names one
    for _, _, rows in read:
        for row in rows:
            if row.task:
                known.setdefault(row.asked, row.task)
    systems = []
    for name, path, rows in read:
        system = System(name, str(path))
        for row in rows:
            task = row.task or known.get(row.asked, NO_TASK)
            system.answers.setdefault((task, row.asked), row)
        systems.append(system)
    first = systems[0]
    for system in systems[1:]:
        check_same_prompts(_shown(first), _shown(system))
    tasks = {task for task, _ in first.answers}
    if len(tasks) > 1 and ALL in tasks:
        raise UserError(
            f"{first.name} has a task called {ALL!r}, the name of the row over all tasks: give it another name in the files of "
            "answers."
        )
    return systems


def _shown(system: System) -> tuple[str, set[Key], Mapping[str, str]]:
    texts = {key[1]: prompt_key(answer.prompt, None, key[0]).text for key, answer in system.answers.items()}
    return system.name, set(system.answers), texts


def _named(text: str) -> tuple[str, Path]:
    name, equals, rest = text.partition("=")
    if not equals or "/" in name:
        path = Path(text)
        return (path.stem if path.is_file() else folder_name(path)), path
    if not name or not rest:
        raise UserError(f"{text!r}: expected NAME=FOLDER or NAME=FILE.jsonl.")
    return name, Path(rest)


def answer_files(path: Path) -> list[Path]:
    """The file itself, or of a run's folder (or its only evaluation below) the newest recorded answers.

    Raises:
        UserError: there is nothing, or several evaluations lie below.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"There is no {str(path)!r}: give the folder of a run, or a file of answers (JSON lines).")
    if own := _newest(path):
        return own
    below = [found for child in sorted(path.iterdir()) if child.is_dir() and (found := _newest(child))]
    if len(below) == 1:
        return below[0]
    if below:
        some = ", ".join(str(files[0].parent) for files in below[:4])
        raise UserError(f"{path} holds {len(below)} runs with recorded answers: give one of their folders ({some}).")
    raise UserError(
        f"{path} has no recorded answers of a test: run `maestro-pl test` with callbacks.ResponseRecorder "
        "(evaluation: true), or `maestro-pl predict`; give the folder of such a run."
    )


def _newest(folder: Path) -> list[Path]:
    """The files (one a rank in runs of an older version) with the highest number of the first stage that was recorded."""
    for stage in STAGES:
        form = re.compile(rf"{stage}(?:\.rank\d+)?(?:-(\d+))?\.jsonl")
        found = [(int(m[1] or 0), path) for path in folder.glob(f"{stage}*") if (m := form.fullmatch(path.name))]
        if found:
            last = max(number for number, _ in found)
            return sorted(path for number, path in found if number == last)
    return []


def _records(path: Path) -> list[Answer]:
    rows = []
    for file in answer_files(path):
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {error}.") from error
        rows += [_answer(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} has no answers: expected a JSON object a line, with prompt and response.")
    return rows


def _answer(line: str, where: str) -> Answer:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON ({error}); expected an object with prompt and response.") from error
    if not isinstance(row, dict) or not isinstance(row.get("response"), str) or not _is_prompt(row.get("prompt")):
        raise UserError(
            f"{where}: expected an object with response (a text) and prompt (a text, or chat messages with role and "
            f"content); it is {line[:80]!r}."
        )
    task, rewards = row.get("task") or "", row.get("rewards") or {}
    if not isinstance(task, str) or not isinstance(rewards, dict):
        raise UserError(f"{where}: expected a text as task and an object of numbers as rewards.")
    return Answer(row["prompt"], task, row.get("reference"), row["response"], _numbers(rewards, where))


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt)
    return isinstance(prompt, str)


def _numbers(rewards: Mapping[str, Any], where: str) -> dict[str, float]:
    known = {name: value for name, value in rewards.items() if value is not None}
    for name, value in known.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}: rewards.{name} is {value!r}, expected a finite number or null.")
    return {name: float(value) for name, value in known.items()}
