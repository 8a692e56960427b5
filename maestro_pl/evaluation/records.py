"""What an evaluation says of every single prompt, as a file that other runs can be compared with."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from maestro_pl.errors import cell

FIELDS = ("prompt", "task", "metric", "value")
TEXT_LENGTH = 120
KEY_BITS = 52  # thirteen hexadecimal digits


class PromptKey(NamedTuple):
    """What a prompt is called in every run: a hash of its task, text and reference, and how its text begins."""

    number: int
    text: str


def prompt_key(prompt: Any, reference: Any, task: str) -> PromptKey:
    """The key of a prompt, which depends on nothing but what is asked: not on its place, the run or the model.

    Args:
        prompt: the text, or the chat messages.
        reference: whatever the row has, None included.
        task: the name of its task.
    """
    text = json.dumps([task, prompt, reference], sort_keys=True, ensure_ascii=False, default=str)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - KEY_BITS)
    shown = prompt if isinstance(prompt, str) else " ".join(str(m.get("content", "")) for m in prompt)
    return PromptKey(number, " ".join(shown.split())[:TEXT_LENGTH])


class PromptValue(NamedTuple):
    """The value of a metric for one prompt.

    Attributes:
        task: its task.
        metric: what was measured.
        place: where it stands in the data, which tells it apart from the others of its task.
        value: NaN where the metric does not apply.
        key: of the prompt, if it has one.
    """

    task: str
    metric: str
    place: int
    value: float
    key: int | None


@dataclass
class PromptRecords:
    """One value a prompt and metric.

    Attributes:
        entries: the values; all of them have keys.
        metrics: in the order in which they are reported.
        texts: how the prompt of a key begins.
    """

    entries: Sequence[PromptValue] = ()
    metrics: Sequence[str] = ()
    texts: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.entries)

    def rows(self) -> Iterator[tuple[str, str, str, float]]:
        """(prompt, task, metric, value), sorted by task, prompt and metric; NaN where a metric does not apply.

        A prompt that stands in the data several times is numbered in the order of the data: ``KEY``, ``KEY-2``, ...
        """
        names = self._names()
        order = {metric: i for i, metric in enumerate(self.metrics)}
        rows = [(e.task, names[e.task, e.place], order[e.metric], e.value) for e in self.entries]
        for task, (number, occurrence), metric, value in sorted(rows, key=lambda row: row[:3]):
            yield _text(number, occurrence), task, self.metrics[metric], value

    def prompts(self) -> dict[str, str]:
        """Every prompt's key and how it begins."""
        keys = sorted(set(self._names().values()))
        return {_text(number, occurrence): self.texts.get(number, "") for number, occurrence in keys}

    def _names(self) -> dict[tuple[str, int], tuple[int, int]]:
        """(task, place) to (key, which occurrence of it)."""
        seen: dict[tuple[str, int], int] = defaultdict(int)
        names: dict[tuple[str, int], tuple[int, int]] = {}
        for place, task, key in sorted({(e.place, e.task, e.key) for e in self.entries if e.key is not None}):
            seen[task, key] += 1
            names[task, place] = (key, seen[task, key])
        return names


def _text(number: int, occurrence: int) -> str:
    return f"{number:0{KEY_BITS // 4}x}" + (f"-{occurrence}" if occurrence > 1 else "")


def write_records(path: Path, records: PromptRecords, header: Mapping[str, Any]) -> None:
    """Write ``path`` (CSV: prompt, task, metric, value) and beside it a header, each whole or not at all.

    Args:
        path: the CSV; the header is the ``.json`` of the same stem, written first.
        records: the values.
        header: what a comparison needs to know: stage, split, step, limits, sampling.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = records.prompts()
    write_whole(
        path.with_suffix(".json"),
        json.dumps({**header, "n": len(prompts), "prompts": prompts}, indent=1, ensure_ascii=False, default=str),
    )
    partial = _partial(path)
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows([cell(value) for value in row] for row in records.rows())
        _to_disk(file)
    os.replace(partial, path)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees all of it or what was there before."""
    partial = _partial(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        _to_disk(file)
    os.replace(partial, path)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def keys_of(prompts: Sequence[Any], references: Sequence[Any], tasks: Sequence[str]) -> list[PromptKey]:
    """See :func:`prompt_key`, for the N prompts of a batch."""
    return [prompt_key(*each) for each in zip(prompts, references, tasks, strict=True)]
