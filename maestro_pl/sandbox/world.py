"""The prompts of the sandbox: four task families, each a seeded generator of rows, with disjoint splits."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any, Literal

from maestro_pl.errors import UserError
from maestro_pl.sandbox.lexicon import ACTS, FACTS, IDEAS, NAMES, OBJECTS
from maestro_pl.sandbox.utility import TASKS

Row = dict[str, Any]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PATIENCE = 5000  # draws without a new prompt after which a family counts as exhausted


def _arithmetic(rng: random.Random) -> Row:
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    kind = rng.choice(("plus", "minus", "times"))
    if kind == "plus":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        prompt, result = f"{name} has {a} {thing} and finds {b} more. How many {thing} are there?", a + b
    elif kind == "minus":
        a, b = rng.randint(7, 14), rng.randint(2, 6)
        prompt, result = f"{name} has {a} {thing} and gives away {b}. How many {thing} are left?", a - b
    else:
        a, b = rng.randint(2, 5), rng.randint(2, 5)
        prompt, result = f"{name} fills {a} bags with {b} {thing} each. How many {thing} are there?", a * b
    work = f"{a} {kind} {b} is {result}"
    return {"prompt": prompt, "reference": str(result), "subject": work, "target": result}


def _brainstorm(rng: random.Random) -> Row:
    name, topic = rng.choice(NAMES), rng.choice(tuple(IDEAS))
    ask = rng.choice(
        (
            "List ideas for the {t} of {n}.",
            "{n} wants ideas for the {t}. List some.",
            "Help {n} with the {t}: list ideas.",
            "The {t} of {n} needs ideas. List them.",
            "List what {n} could think of for the {t}.",
        )
    )
    stock = IDEAS[topic][0]
    reference = f"{stock[0]}, {stock[1]} and {stock[2]}"
    return {"prompt": ask.format(t=topic, n=name), "reference": reference, "subject": topic, "target": 8}


def _reply(rng: random.Random) -> Row:
    name, act = rng.choice(NAMES), rng.choice(tuple(ACTS))
    messages, stock, _ = ACTS[act]
    ask = rng.choice(("{n} says: {m}. Reply in one line.", "Reply to {n} in one line: {m}."))
    return {"prompt": ask.format(n=name, m=rng.choice(messages)), "reference": stock, "subject": act, "target": 8}


def _explain(rng: random.Random) -> Row:
    name, topic, length = rng.choice(NAMES), rng.choice(tuple(FACTS)), rng.choice((20, 24, 28))
    ask = rng.choice(("Explain {t} to {n} in about {w} words.", "{n} asks about {t}. Explain in about {w} words."))
    reference = ", ".join(FACTS[topic])
    return {"prompt": ask.format(t=topic, n=name, w=length), "reference": reference, "subject": topic, "target": length}


GENERATORS: dict[str, Callable[[random.Random], Row]] = {
    "arithmetic": _arithmetic,
    "brainstorm": _brainstorm,
    "reply": _reply,
    "explain": _explain,
}


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, from its hash: 8 in 10 train, 1 validation, 1 test, whatever the seed."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def rows(split: str, tasks: list[str] | None = None, n_per_task: int = 64, seed: int = 0) -> list[Row]:
    """Draw different prompts of one split, task by task in turn.

    Args:
        split: ``train``, ``validation`` or ``test``; no prompt is in two of them, at any seed.
        tasks: the families wanted, all by default.
        n_per_task: prompts a family.
        seed: of the draw.

    Returns:
        Rows with ``prompt``, ``reference``, ``task``, ``subject`` (str) and ``target`` (int), the last two for
        :func:`maestro_pl.sandbox.true_utility`.

    Raises:
        UserError: no such split or task, or a family has fewer different prompts than asked for.
    """
    if split not in SPLITS:
        raise UserError(f"The sandbox has no split {split!r}; its splits are {', '.join(SPLITS)}.")
    unknown = [task for task in tasks or () if task not in GENERATORS]
    if unknown:
        raise UserError(f"The sandbox has no task {unknown[0]!r}; its tasks are {', '.join(TASKS)}.")
    drawn = [_draw(task, split, n_per_task, seed) for task in tasks or TASKS]
    return [row for turn in zip(*drawn, strict=True) for row in turn]


def _draw(task: str, split: str, n: int, seed: int) -> list[Row]:
    rng = random.Random(f"{task} {split} {seed}")
    found: dict[str, Row] = {}
    misses = 0
    while len(found) < n and misses < PATIENCE:
        row = GENERATORS[task](rng)
        fresh = row["prompt"] not in found and split_of(row["prompt"]) == split
        misses = 0 if fresh else misses + 1
        if fresh:
            found[row["prompt"]] = {**row, "task": task}
    if len(found) < n:
        raise UserError(
            f"The {split} split of {task} has about {len(found)} different prompts, {n} were asked for: ask for fewer."
        )
    return list(found.values())
