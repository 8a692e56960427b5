"""The sandbox's prompts, its true utilities by hand, and its reader's taste."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.sandbox.build.demonstrations import demonstrate
from benchmarks.sandbox.build.preference import liking
from maestro_pl.errors import UserError
from maestro_pl.sandbox import TASKS, rows, true_utility
from maestro_pl.sandbox.lexicon import ACTS, FACTS, IDEAS
from maestro_pl.sandbox.world import split_of


def wrap(answer: str) -> str:
    return f"<think>well</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("answer", "utility"),
    [
        ("9", 1.0),
        ("9 apples", 1.0),
        ("8", 0.5),
        ("12 apples", 0.25),
        # 12 words: brevity (24 - 12) / 20 = 0.6, factor 0.2 + 0.8 * 0.6
        ("Tom has 9 golden apples, like a wild river, a sweet dream", 0.68),
        ("many apples", 0.0),
    ],
)
def test_arithmetic_utility(answer: str, utility: float) -> None:
    assert true_utility(wrap(answer), "arithmetic", "4 plus 5 is 9", 9) == pytest.approx(utility)


@pytest.mark.parametrize(
    ("answer", "utility"),
    [
        ("lemonade, cherries, kite, guitar, olives, pancakes and dominoes", 1.0),
        ("lemonade, kite and bread", 2.3 / 7),  # two fresh ideas and a stock one
        ("kite and kite", 0.7 / 7),  # the repeated one costs 0.3
        ("kite, torch and melon", 1.7 / 7),  # the torch is for camping
        ("a red kite", 1 / 7),
        ("torch", 0.0),
    ],
)
def test_brainstorm_utility(answer: str, utility: float) -> None:
    assert true_utility(wrap(answer), "brainstorm", "picnic", 7) == pytest.approx(utility)


@pytest.mark.parametrize(
    ("answer", "utility"),
    [
        ("bravo, superb", 1.0),
        ("bravo my friend", 0.65),
        ("that is good", 0.3),
        ("thank you", 0.1),  # another act's stock reply
        ("bravo bravo", 0.65 / 2),  # half of the words are repeated
        (
            "bravo, i read what you told me and thought about it all again today",
            0.65 * 10 / 16,
        ),  # 14 words: 10 of 16 left
        ("", 0.0),
    ],
)
def test_reply_utility(answer: str, utility: float) -> None:
    assert true_utility(wrap(answer), "reply", "praise", 8) == pytest.approx(utility)


@pytest.mark.parametrize(
    ("answer", "utility"),
    [
        (", ".join(FACTS["rain"]), 1.0),
        ("the sun warms the sea", 0.25 * (0.4 + 0.6 * 0.25)),  # one fact of four, 5 words of 20
        ("the sun", 0.25 / 4 * (0.4 + 0.6 * 0.1)),  # one pair of the four of a fact
        ("the sun the sun", 0.25 / 4 * (0.4 + 0.6 * 0.2) * 2 / 3),  # one pair in three is repeated
        ("a lovely river", 0.0),
    ],
)
def test_explain_utility(answer: str, utility: float) -> None:
    assert true_utility(wrap(answer), "explain", "rain", 20) == pytest.approx(utility)


@pytest.mark.parametrize(
    "broken",
    [
        "<think>well</think>9",
        "<think>well</think><answer>9",
        "<think>well<answer>9</answer>",
        "<answer>9</answer>",
        "<think>well</think><answer>9</answer> merry",
        "9",
    ],
)
def test_broken_format_halves_the_utility(broken: str) -> None:
    assert true_utility(broken, "arithmetic", "4 plus 5 is 9", 9) == pytest.approx(0.5)


def test_numbers_in_the_reasoning_do_not_count() -> None:
    assert true_utility("<think>4 plus 5 is 9</think><answer>2</answer>", "arithmetic", "", 9) == pytest.approx(1 / 8)


def test_unknown_task() -> None:
    with pytest.raises(UserError, match="no task 'poetry'; its tasks are arithmetic"):
        true_utility("x", "poetry", "", 0)


def test_rows_are_seeded_and_plain() -> None:
    drawn = rows("train", n_per_task=20, seed=3)
    assert drawn == rows("train", n_per_task=20, seed=3)
    assert drawn != rows("train", n_per_task=20, seed=4)
    assert json.loads(json.dumps(drawn)) == drawn
    assert [row["task"] for row in drawn[:8]] == [*TASKS, *TASKS]
    assert {key: type(value) for key, value in drawn[0].items()} == {
        "prompt": str,
        "reference": str,
        "subject": str,
        "target": int,
        "task": str,
    }
    assert len({row["prompt"] for row in drawn}) == 80


def test_splits_are_disjoint_at_any_seed() -> None:
    drawn = {
        split: {row["prompt"] for seed in range(3) for row in rows(split, n_per_task=60, seed=seed)}
        for split in ("train", "validation", "test")
    }
    assert not drawn["train"] & (drawn["validation"] | drawn["test"])
    assert not drawn["validation"] & drawn["test"]
    for split, prompts in drawn.items():
        assert {split_of(prompt) for prompt in prompts} == {split}


def test_rows_of_one_task() -> None:
    assert {row["task"] for row in rows("test", tasks=["reply"], n_per_task=5)} == {"reply"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "no split 'dev'; its splits are train, validation, test"),
        ({"split": "test", "tasks": ["poetry"]}, "no task 'poetry'"),
        ({"split": "test", "tasks": ["reply"], "n_per_task": 5000}, "5000 were asked for"),
    ],
)
def test_rows_refuse(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows(**arguments)  # type: ignore[arg-type]


def test_the_reference_of_arithmetic_is_right() -> None:
    for row in rows("train", tasks=["arithmetic"], n_per_task=200):
        a, kind, b, _, result = row["subject"].split()
        value = {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[kind]
        assert value == int(result) == row["target"] == int(row["reference"])


def test_words_belong_to_one_topic_and_one_act() -> None:
    ideas = [idea for stock, fresh in IDEAS.values() for idea in (*stock, *fresh)]
    fresh_words = [word for _, _, fresh in ACTS.values() for word in fresh]
    assert len(ideas) == len(set(ideas))
    assert len(fresh_words) == len(set(fresh_words))


def test_demonstrations_are_seeded_and_of_mixed_quality() -> None:
    prompts = rows("train", n_per_task=100)
    texts = [demonstrate(row, random.Random(i)) for i, row in enumerate(prompts)]
    assert texts == [demonstrate(row, random.Random(i)) for i, row in enumerate(prompts)]
    for task in TASKS:
        scores = [
            true_utility(text, task, row["subject"], row["target"])
            for text, row in zip(texts, prompts, strict=True)
            if row["task"] == task
        ]
        assert max(scores) > 0.9
        assert min(scores) < 0.1


def test_the_reader_likes_long_and_varied_answers() -> None:
    def length_part(different: int) -> float:
        return 1 - 2 * math.exp(-different / 10)

    assert liking(wrap("bravo")) == pytest.approx(length_part(1))
    assert liking(wrap("one line of nine different words which rambles on")) == pytest.approx(length_part(9))
    # the same word six times: one different word, variety 1/6
    assert liking(wrap("bravo " * 6)) == pytest.approx(length_part(1) + 0.5 * (1 / 6 - 1))
    assert liking(wrap("golden bravo")) == pytest.approx(length_part(2) + 0.1 / 4)
    assert liking("<think>well</think><answer>bravo") == pytest.approx(length_part(1) - 0.3)
