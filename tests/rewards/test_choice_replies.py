"""Replies to multiple-choice questions: 187 written by hand and 725 made of templates, less than 1 % of them misread."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from maestro_pl.rewards.choice import Question, choice_accuracies, chosen_option

HAND = Path(__file__).with_name("choice_replies.txt")
ALLOWED = 0.01
OPTIONS = [
    ("Proud", "Angry", "Sadness", "Grateful"),
    ("He lost the race", "He won a prize", "A friend left", "It is not raining"),
    ("He is happy because of the gift", "She is not at home", "the bus, which was late", "an apple"),
    ("2", "4", "6", "8"),
    ("\u9ad8\u5174", "\u751f\u6c14", "\u96be\u8fc7", "\u611f\u6fc0"),
]
PICKS = [  # {x} the letter, {t} its text, {o} another letter, {p} and {q} the two others
    "{x}",
    "({x})",
    "**{x}**",
    "{x}. {t}",
    "{x}) {t}",
    "**{x}. {t}**",
    "Option {x}",
    "The answer is {x}!",
    "The answer is **{x}**.",
    "The correct answer is ({x}) {t}.",
    "**Answer:** {x}",
    "Final answer: \\boxed{{{x}}}",
    "{x} is correct.",
    "Option {x} is the best choice.",
    "{o}, {p} and {q} are wrong; {x} is right.",
    "{o} is wrong since it is not mentioned. {x} is correct.",
    "Option {o} is wrong because of the text. Option {x} it is.",
    "The correct answer is {x}. Option {o} is incorrect because it is not mentioned.",
    "The answer is {x}, not {o}.",
    "It is not {o}, it is {x}.",
    "We can rule out {o} and {p}, so the answer is {x}.",
    "{o} doesn't fit. {p} doesn't fit. So the answer is {x}.",
    "{o}: no.\n{x}: yes.",
    "Let me think.\n\nAnswer: {x}",
    "\u9009{x}\u3002",
    "\u9009\u9879{x}",
    "\u7b54\u6848\u662f{x}\u3002",
]
NO_PICKS = [
    "{x} or {o}",
    "{x}, {o}, {p}, {q}",
    "{x} is wrong.",
    "Option {x} is incorrect because it is not mentioned.",
    "The answer is not {x}.",
    "I don't think it is {x}.",
    "Either {x} or {o} is right.",
    "The answer is {x}. The answer is {o}.",
    "Both {x} and {o} are correct.",
]
COUNT = 725


def by_hand() -> Iterator[tuple[tuple[str, ...], str | None, str]]:
    options: tuple[str, ...] = ()
    for line in HAND.read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            options = tuple(line[2:].split(" | "))
        elif not line.startswith("#"):
            letter, reply = line.split("\t")
            yield options, None if letter == "-" else letter, reply.replace("\\n", "\n")


def synthetic() -> Iterator[tuple[tuple[str, ...], str | None, str]]:
    for template, options, place in product([*PICKS, *NO_PICKS], OPTIONS, range(4)):
        o, p, q = ("ABCD"[(place + step) % 4] for step in (1, 2, 3))
        reply = template.format(x="ABCD"[place], t=options[place], o=o, p=p, q=q)
        yield options, "ABCD"[place] if template in PICKS else None, reply
    for place in range(4):  # the text alone
        yield OPTIONS[0], "ABCD"[place], f"He feels {OPTIONS[0][place].lower()}."
    yield OPTIONS[0], None, ""


@pytest.mark.parametrize(
    ("replies", "count"), [(list(by_hand()), 187), (list(synthetic()), COUNT)], ids=["hand", "made"]
)
def test_hardly_any_reply_is_misread(replies: list[tuple[tuple[str, ...], str | None, str]], count: int) -> None:
    assert len(replies) == count
    misread, taken = [], []
    for options, letter, reply in replies:
        place = chosen_option(reply, options)
        got = None if place is None else "ABCD"[place]
        if got != letter:
            misread.append((reply, options, letter, got))
            if got is not None:
                taken.append(reply)  # for right, where another option or none was meant
    assert not taken
    assert len(misread) < ALLOWED * count, misread


def test_emphasised_letters_of_several_questions() -> None:
    two = [Question("Emotion", ("x", "y", "z"), 1), Question("Cause", ("u", "v", "w"), 2)]
    assert choice_accuracies("Emotion: **B**. Cause: **C**.", two) == {"Emotion": 1, "Cause": 1}
    assert choice_accuracies("**Emotion:** **B**\n**Cause:** A is wrong. C.", two) == {"Emotion": 1, "Cause": 1}


@pytest.mark.parametrize(
    "reply", ["(" * 300, "Proud Angry " * 5000, "\x00", "why " * 10_000 + "?", "Not Proud, " * 3000]
)
def test_long_and_odd_replies_pick_nothing(reply: str) -> None:
    assert chosen_option(reply, OPTIONS[0]) is None
