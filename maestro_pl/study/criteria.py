"""What raters are told: a welcome, and for each task a question and criteria, from YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from maestro_pl.errors import UserError

DEFAULTS = Path(__file__).with_name("criteria.yaml")
FILE = "criteria.yaml"
DEFAULT = "default"
SHOWS = ("markdown", "plain")
#: Words in a task's name by which a description is proposed.
_WORDS = {
    "creative_writing": ("story", "stories", "ss_gen", "writing", "creative", "poem"),
    "social": ("social", "emobench", "tombench", "empath", "emotion"),
}


@dataclass(frozen=True)
class TaskCriteria:
    """What raters of one task are asked.

    Attributes:
        show: ``markdown`` or ``plain``.
    """

    question: str
    criteria: tuple[str, ...] = ()
    show: str = "markdown"


@dataclass(frozen=True)
class Criteria:
    """What raters are told.

    Attributes:
        welcome: Markdown, before the first question.
        tasks: by the task's name; ``default`` is for those that have none.
    """

    welcome: str
    tasks: Mapping[str, TaskCriteria]

    def of(self, task: str) -> TaskCriteria:
        """The task's own, or the default."""
        return self.tasks.get(task, self.tasks[DEFAULT])


def read_criteria(path: Path) -> Criteria:
    """Read a file of the form of ``maestro_pl/study/criteria.yaml``.

    Raises:
        UserError: it cannot be read, or has another form.
    """
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}.") from error
    if not isinstance(read, dict) or set(read) != {"welcome", "tasks"} or not isinstance(read["welcome"], str):
        raise UserError(f"{path}: expected the keys welcome (a text) and tasks, and no others.")
    tasks = read["tasks"]
    if not isinstance(tasks, dict) or DEFAULT not in tasks:
        raise UserError(f"{path}: tasks has to be an object with the entry {DEFAULT!r}.")
    return Criteria(read["welcome"], {str(name): _task(path, tasks, name) for name in tasks})


def _task(path: Path, tasks: Mapping[Any, Any], name: Any) -> TaskCriteria:
    entry, where = tasks[name], f"{path}: tasks.{name}"
    if isinstance(entry, str):
        if not isinstance(tasks.get(entry), dict):
            raise UserError(f"{where} is {entry!r}: expected an object, or the name of an entry that is one.")
        entry = tasks[entry]
    if not isinstance(entry, dict) or not set(entry) <= {"question", "criteria", "show"}:
        raise UserError(f"{where}: expected an object with question, criteria and show, and no others.")
    question, criteria, show = entry.get("question"), entry.get("criteria", []), entry.get("show", "markdown")
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}.question is {question!r}: expected a text.")
    if not isinstance(criteria, list) or not all(isinstance(each, str) for each in criteria):
        raise UserError(f"{where}.criteria is {criteria!r}: expected a list of texts (quote one that has a colon).")
    if show not in SHOWS:
        raise UserError(f"{where}.show is {show!r}: expected {' or '.join(SHOWS)}.")
    return TaskCriteria(question.strip(), tuple(criteria), show)


def starting_text(tasks: Sequence[str], chosen: Mapping[str, str]) -> str:
    """The defaults as a study's own file, with a line for each of its tasks.

    Args:
        tasks: of the study.
        chosen: task to the description it takes; others are proposed by their names.

    Raises:
        UserError: an unknown task or description.
    """
    text = DEFAULTS.read_text(encoding="utf-8")
    known = list(yaml.safe_load(text)["tasks"])
    for task, entry in chosen.items():
        if task not in tasks:
            raise UserError(f"--criteria {task}={entry}: there is no such task; the study has {', '.join(tasks)}.")
        if entry not in known:
            raise UserError(f"--criteria {task}={entry}: expected one of {', '.join(known)}, or a file without a task.")
    lines = {task: chosen.get(task) or _proposed(task) for task in tasks if task not in known}
    dumped = yaml.safe_dump(lines, allow_unicode=True, sort_keys=False) if lines else ""
    return text + "".join(f"  {line}\n" for line in dumped.splitlines())


def _proposed(task: str) -> str:
    name = task.lower()
    return next((entry for entry, words in _WORDS.items() if any(word in name for word in words)), DEFAULT)
