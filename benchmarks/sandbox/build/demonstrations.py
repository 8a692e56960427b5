"""Demonstrations of mixed quality: what the tiny policy is warm-started on.

Each demonstration has two independent traits, *long* or short and *fresh* or plain, and every family wants another pair
of them: arithmetic short and plain, replies short and fresh, explanations long and plain, brainstorming long and fresh.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from maestro_pl.sandbox.lexicon import ACTS, COLOURS, FACTS, IDEAS, NAMES, POLITE, THINGS
from maestro_pl.sandbox.world import Row

#: How often a demonstration is not exactly a think block and then an answer block.
BROKEN = 0.3
#: How often a demonstration of a family is long, and how often it is fresh.
TRAITS = {"arithmetic": (0.5, 0.5), "brainstorm": (0.5, 0.55), "reply": (0.4, 0.6), "explain": (0.55, 0.45)}


def demonstrate(row: Row, rng: random.Random) -> str:
    """Write one response to the row, of random quality and format."""
    long, fresh = (rng.random() < share for share in TRAITS[row["task"]])
    think, answer = WRITERS[row["task"]](row, rng, long, fresh)
    pace = "take my time" if long else "keep it short"
    return wrap(f"{pace}: {think}", answer, rng)


def wrap(think: str, answer: str, rng: random.Random) -> str:
    """Put the tags around a response, wrongly in a share of :data:`BROKEN`."""
    if rng.random() >= BROKEN:
        return f"<think>{think}</think><answer>{answer}</answer>"
    return rng.choice(
        (
            f"<think>{think}</think>{answer}",
            f"<think>{think}</think><answer>{answer}",
            f"<think>{think}<answer>{answer}</answer>",
            f"<answer>{answer}</answer>",
            f"<think>{think}</think><answer>{answer}</answer> {rng.choice(COLOURS)}",
        )
    )


def _colourful(rng: random.Random, n: int) -> str:
    return ", ".join(f"a {rng.choice(COLOURS)} {rng.choice(THINGS)}" for _ in range(n))


def _name(row: Row) -> str:
    return next(
        name for name in NAMES if name in row["prompt"].replace(":", " ").split() or f"{name}." in row["prompt"]
    )


def _arithmetic(row: Row, rng: random.Random, long: bool, fresh: bool) -> tuple[str, str]:
    result = row["target"]
    if fresh:
        result = max(0, result + rng.choice((-6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6)))
        think = f"{rng.choice(COLOURS)} {rng.choice(THINGS)} says {result}"
    else:
        if rng.random() < 0.15:
            result = max(0, result + rng.choice((-2, -1, 1, 2)))
        think = f"{row['subject'].rsplit(' ', 1)[0]} {result}"
    thing = row["prompt"].split("How many ")[1].split()[0]
    if not long:
        return think, rng.choice((f"{result}", f"{result} {thing}"))
    return think, f"{_name(row)} has {result} {rng.choice(COLOURS)} {thing}, like {_colourful(rng, rng.randint(2, 5))}"


def _brainstorm(row: Row, rng: random.Random, long: bool, fresh: bool) -> tuple[str, str]:
    stock, rich = IDEAS[row["subject"]]
    n = rng.randint(7, 12) if long else rng.randint(1, 4)
    if fresh:
        chosen = rng.sample(rich, n)
        think = f"{rng.choice(COLOURS)} and {rng.choice(COLOURS)} ideas"
        for i in range(n):
            if rng.random() < 0.1:
                other = rng.choice(tuple(IDEAS))
                chosen[i] = rng.choice(IDEAS[other][1])
    else:
        chosen = list(stock)[:n] + [rng.choice(stock if rng.random() < 0.7 else rich) for _ in range(n - 3)]
        think = "the usual things"
    return think, " and ".join((", ".join(chosen[:-1]), chosen[-1])) if n > 1 else chosen[0]


def _reply(row: Row, rng: random.Random, long: bool, fresh: bool) -> tuple[str, str]:
    _, stock, rich = ACTS[row["subject"]]
    if fresh:
        source = rich if rng.random() < 0.8 else ACTS[rng.choice(tuple(ACTS))][2]
        first, second = rng.sample(source, 2)
        think = f"{rng.choice(COLOURS)} and {rng.choice(COLOURS)} words"
        line = rng.choice((f"{first}", f"{first} my friend", f"{first}, {second}", f"{first} my friend, {second}"))
    else:
        think = "the usual words"
        line = rng.choice((stock, f"{stock} my friend"))
    if long:
        line = ", ".join([line, *POLITE[: rng.randint(2, 4)]])
    return think, line


def _explain(row: Row, rng: random.Random, long: bool, fresh: bool) -> tuple[str, str]:
    facts = FACTS[row["subject"]]
    n = rng.choice((3, 4, 4)) if long else rng.randint(1, 2)
    if fresh:
        think = f"{rng.choice(COLOURS)} and {rng.choice(COLOURS)} pictures"
        told = [f"{row['subject']} like {_colourful(rng, 1)}", *(_colourful(rng, 1) for _ in range(2 * n - 2))]
        if rng.random() < 0.5:
            told[-1] = rng.choice(facts)
    else:
        think = ", ".join(max(fact.split(), key=len) for fact in facts[:n])
        told = [fact for fact in facts[:n] if rng.random() < 0.9] or [facts[0]]
        if rng.random() < 0.4:
            told = [f"{joint} {fact}" for joint, fact in zip(("first", "then", "next", "so"), told, strict=False)]
    return think, ", ".join(told)


WRITERS: dict[str, Callable[[Row, random.Random, bool, bool], tuple[str, str]]] = {
    "arithmetic": _arithmetic,
    "brainstorm": _brainstorm,
    "reply": _reply,
    "explain": _explain,
}
