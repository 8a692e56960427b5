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


#: How prompts are worded: what the policy was brought up with, and wordings that it has never seen.
SUMS = {
    "plus": "{n} has {a} {t} and finds {b} more. How many {t} are there?",
    "minus": "{n} has {a} {t} and gives away {b}. How many {t} are left?",
    "times": "{n} fills {a} bags with {b} {t} each. How many {t} are there?",
}
NEW_SUMS = {
    "plus": "How many {t} are there? {n} finds {a} and has {b} more.",
    "minus": "How many {t} are left? {n} gives away {b} and {a} is what {n} has.",
    "times": "How many {t} are there? {n} has {b} {t} each in {a} bags.",
}
TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "brainstorm": (
        (
            "List ideas for the {t} of {n}.",
            "{n} wants ideas for the {t}. List some.",
            "Help {n} with the {t}: list ideas.",
            "The {t} of {n} needs ideas. List them.",
            "List what {n} could think of for the {t}.",
        ),
        ("Some ideas for the {t}, {n} wants them.", "What ideas could {n} list for the {t}?"),
    ),
    "reply": (
        ("{n} says: {m}. Reply in one line.", "Reply to {n} in one line: {m}."),
        ("In one line, reply: {m}, {n} says.", "{m}, says {n}. One line to reply."),
    ),
    "explain": (
        ("Explain {t} to {n} in about {w} words.", "{n} asks about {t}. Explain in about {w} words."),
        ("In about {w} words, explain {t} to {n}.", "About {t}, {n} asks: explain it in {w} words."),
    ),
}


def _arithmetic(rng: random.Random, new: bool = False) -> Row:
    name, thing = rng.choice(NAMES), rng.choice(OBJECTS)
    kind = rng.choice(("plus", "minus", "times"))
    if kind == "plus":
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        result = a + b
    elif kind == "minus":
        a, b = rng.randint(7, 14), rng.randint(2, 6)
        result = a - b
    else:
        a, b = rng.randint(2, 5), rng.randint(2, 5)
        result = a * b
    prompt = (NEW_SUMS if new else SUMS)[kind].format(n=name, a=a, b=b, t=thing)
    work = f"{a} {kind} {b} is {result}"
    return {"prompt": prompt, "reference": str(result), "subject": work, "target": result}


def _brainstorm(rng: random.Random, new: bool = False) -> Row:
    name, topic = rng.choice(NAMES), rng.choice(tuple(IDEAS))
    ask = rng.choice(TEMPLATES["brainstorm"][new])
    stock = IDEAS[topic][0]
    reference = f"{stock[0]}, {stock[1]} and {stock[2]}"
    return {"prompt": ask.format(t=topic, n=name), "reference": reference, "subject": topic, "target": 8}


def _reply(rng: random.Random, new: bool = False) -> Row:
    name, act = rng.choice(NAMES), rng.choice(tuple(ACTS))
    messages, stock, _ = ACTS[act]
    ask = rng.choice(TEMPLATES["reply"][new])
    return {"prompt": ask.format(n=name, m=rng.choice(messages)), "reference": stock, "subject": act, "target": 8}


def _explain(rng: random.Random, new: bool = False) -> Row:
    name, topic, length = rng.choice(NAMES), rng.choice(tuple(FACTS)), rng.choice((20, 24, 28))
    ask = rng.choice(TEMPLATES["explain"][new])
    reference = ", ".join(FACTS[topic])
    return {"prompt": ask.format(t=topic, n=name, w=length), "reference": reference, "subject": topic, "target": length}


GENERATORS: dict[str, Callable[[random.Random, bool], Row]] = {
    "arithmetic": _arithmetic,
    "brainstorm": _brainstorm,
    "reply": _reply,
    "explain": _explain,
}


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, from its hash: 8 in 10 train, 1 validation, 1 test, whatever the seed."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def rows(
    split: str, tasks: list[str] | None = None, n_per_task: int = 64, seed: int = 0, new_templates: bool = False
) -> list[Row]:
    """Draw different prompts of one split, task by task in turn.

    Args:
        split: ``train``, ``validation`` or ``test``; no prompt is in two of them, at any seed.
        tasks: the families wanted, all by default.
        n_per_task: prompts a family.
        seed: of the draw.
        new_templates: word the prompts in ways that the policy was not brought up with.

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
    drawn = [_draw(task, split, n_per_task, seed, new_templates) for task in tasks or TASKS]
    return [row for turn in zip(*drawn, strict=True) for row in turn]


def _draw(task: str, split: str, n: int, seed: int, new: bool = False) -> list[Row]:
    rng = random.Random(f"{task} {split} {seed}")
    found: dict[str, Row] = {}
    misses = 0
    while len(found) < n and misses < PATIENCE:
        row = GENERATORS[task](rng, new)
        fresh = row["prompt"] not in found and split_of(row["prompt"]) == split
        misses = 0 if fresh else misses + 1
        if fresh:
            found[row["prompt"]] = {**row, "task": task}
    if len(found) < n:
        raise UserError(
            f"The {split} split of {task} has about {len(found)} different prompts, {n} were asked for: ask for fewer."
        )
    return list(found.values())
