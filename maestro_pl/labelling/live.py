"""Questions about the groups of a run that is still training, read from what it records."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maestro_pl.conductor.credits import zscores
from maestro_pl.labelling.questions import Asked, Group, Question, question_of
from maestro_pl.labelling.store import EARLIER, Click
from maestro_pl.report.responses import response_files

TAIL = 1 << 26  # bytes of a file that was there before us; its newest groups are in them
KEPT = 4096  # questions that an answer is still taken for


@dataclass(frozen=True)
class LiveQuestion:
    """A question about a group of a run.

    Attributes:
        question: what people see.
        step: of the run, when the group was trained on.
        spread: the largest distance between the rewards of two answers, each reward z-scored in the group.
        foretold: the answer (a place in ``question.responses``) that the run's weighed reward calls the best; None where it
            has no reward.
    """

    question: Question
    step: int
    spread: float
    foretold: int | None


class RunTail:
    """The groups that a run writes into ``rollouts.jsonl``; whole lines and whole groups only.

    Args:
        folder: of the run; there may be no such file yet.
        group_size: responses of a group.
    """

    def __init__(self, folder: Path, group_size: int) -> None:
        self.folder, self.group_size = folder, group_size
        self._read_to: dict[Path, int] = {}
        self._open: dict[Path, list[dict[str, Any]]] = {}  # rows of a group that is not whole yet

    def new(self) -> list[list[dict[str, Any]]]:
        """The groups that were recorded since, in their order: one record a response."""
        groups: list[list[dict[str, Any]]] = []
        for path in response_files(self.folder, "rollouts"):
            for record in self._records(path):
                rows = self._open.setdefault(path, [])
                if rows and _group(rows[0]) != _group(record):
                    rows.clear()  # the rest of a group whose beginning we have not read
                rows.append(record)
                if len(rows) == self.group_size:
                    groups.append(list(rows))
                    rows.clear()
        return groups

    def _records(self, path: Path) -> list[dict[str, Any]]:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                start = self._read_to.get(path)
                if start is None or start > size:  # new to us, or written anew
                    start = max(0, size - TAIL)
                    self._open.pop(path, None)
                    if start:
                        file.seek(start - 1)
                        start += len(file.readline()) - 1
                file.seek(start)
                lines = file.read(size - start)
        except OSError:  # the next look has it
            return []
        whole = lines.rfind(b"\n") + 1
        self._read_to[path] = start + whole
        records = []
        for line in lines[:whole].splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a line that a kill has cut, with the next one behind it
                continue
            if isinstance(record, dict) and "response" in record:
                records.append(record)
        return records


class LiveQuestions:
    """What can be asked about a run while it trains.

    Args:
        folder: of the run.
        group_size: of the run.
        shown: answers of a question at most.
        earlier: responses of earlier batches that the run takes labels for; groups that it has forgotten are not asked.
        tasks: that the run takes labels of; None: all.
    """

    def __init__(
        self,
        folder: Path,
        group_size: int,
        shown: int = 4,
        earlier: int = EARLIER,
        tasks: Collection[str] | None = None,
    ) -> None:
        self.tail, self.shown, self.earlier, self.tasks = RunTail(folder, group_size), shown, earlier, tasks
        self.known: dict[str, LiveQuestion] = {}  # by key, the oldest first
        self._rows: Counter[int] = Counter()  # responses of each recorded step
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Take in what the run has recorded since."""
        with self._lock:
            for records in self.tail.new():
                self._rows[int(records[0].get("step", 0))] += len(records)
                if self.tasks is None or str(records[0]["task"]) in self.tasks:
                    found = live_question(records, self.shown)
                    if found is not None:
                        self.known.pop(found.question.key, None)
                        self.known[found.question.key] = found
            self._rows = Counter({step: self._rows[step] for step in sorted(self._rows)[-KEPT:]})
            for key in list(self.known)[:-KEPT]:
                del self.known[key]

    @property
    def newest(self) -> int | None:
        """The newest step that was recorded."""
        return max(self._rows, default=None)

    def open(self, answered: Collection[str]) -> list[LiveQuestion]:
        """What somebody who has answered these may be asked, the newest step first.

        Of a step, tasks of which this person has answered the fewest questions come first, and of a task the group whose
        rewards differ most.
        """
        with self._lock:
            known = dict(self.known)
            oldest = self._oldest()
        done = Counter(known[key].question.task for key in answered if key in known)
        left = [each for key, each in known.items() if key not in answered and each.step >= oldest]
        return sorted(left, key=lambda each: (-each.step, done[each.question.task], -each.spread))

    def foretold(self, clicks: Sequence[Click]) -> tuple[int, int, float]:
        """How many of these clicks the run's weighed reward says, of how many, and how many a guess would."""
        hits, tried, chance = 0, 0, 0.0
        for click in clicks:
            live = self.known.get(click.question.key)
            if live is not None and live.foretold is not None and click.best is not None:
                hits, tried = hits + (live.foretold in click.bests), tried + 1
                chance += len(click.bests) / len(click.question.responses)
        return hits, tried, chance

    def _oldest(self) -> float:
        """The oldest step of which the run still knows the groups; a batch is as large as the largest that was recorded."""
        steps = [step for step in self._rows if step] or list(self._rows)
        if not steps:
            return 0
        batches = self.earlier // max(self._rows[step] for step in steps)
        return max(steps) - batches


def live_question(records: Sequence[Mapping[str, Any]], shown: int) -> LiveQuestion | None:
    """The question about a recorded group; None where all its responses have one text."""
    names = list(records[0].get("weights") or records[0].get("rewards") or ())
    raw = [[_number((record.get("rewards") or {}).get(name)) for name in names] for record in records]
    rewards_GK = torch.tensor(raw, dtype=torch.float32).view(len(records), len(names))
    mask_GK = ~rewards_GK.isnan()
    z_GK = zscores(rewards_GK.nan_to_num(0.0), mask_GK, len(records)) if names else torch.zeros(len(records), 1)
    texts = [str(record["response"]) for record in records]
    group = Group(str(records[0]["task"]), records[0]["prompt"], texts, z_GK, mask_GK, torch.zeros(len(records), 0))
    asked = question_of([group], 0, shown)
    if asked is None:
        return None
    rows = list(asked.rows)
    spread = float(torch.cdist(z_GK[rows].double(), z_GK[rows].double()).max())
    return LiveQuestion(asked.question, int(records[0].get("step", 0)), spread, _best(records, asked))


def _best(records: Sequence[Mapping[str, Any]], asked: Asked) -> int | None:
    values = [_number(records[row].get("reward")) for row in asked.rows]
    return None if any(map(math.isnan, values)) else max(range(len(values)), key=values.__getitem__)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _group(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return record.get("step"), record.get("group"), json.dumps(record.get("prompt"))
