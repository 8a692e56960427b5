"""The parts of a Social Story's score, by hand."""

from __future__ import annotations

import pytest

from callbacks.rewards.story import StoryReward
from maestro_pl.errors import UserError
from maestro_pl.rewards import story as rewards_story
from maestro_pl.rewards.story import (
    count_syllables,
    flesch_kincaid_grade,
    flesch_reading_ease,
    sentence_kind,
    split_sentences,
    story_paragraphs,
    story_scores,
)
from tests.support import make_rollout, run

STORY = "Going to bed\nIt is dark. Mom is glad.\nI can read.\nThe end is here."


def test_flesch_by_hand() -> None:
    # 6 words, 2 sentences, 6 syllables
    assert flesch_reading_ease("The cat sat. The dog ran.") == pytest.approx(206.835 - 1.015 * 3 - 84.6)
    assert flesch_kincaid_grade("The cat sat. The dog ran.") == pytest.approx(0.39 * 3 + 11.8 - 15.59)
    assert count_syllables("disappointment") == 4


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("I will try to wait.", "directive"),
        ("Take deep breaths.", "directive"),
        ("My mom feels proud.", "perspective"),
        ("The bus is yellow.", "descriptive"),
    ],
)
def test_kinds_of_sentences(sentence: str, kind: str) -> None:
    assert sentence_kind(sentence) == kind


def test_sentences_and_paragraphs() -> None:
    assert split_sentences("One. Two! \u201cThree?\u201d Four\n...") == ["One.", "Two!", "\u201cThree?", "Four"]
    assert story_paragraphs(STORY) == ["It is dark. Mom is glad.", "I can read.", "The end is here."]
    assert story_paragraphs("One line") == ["One line"]


def test_parts_by_hand() -> None:
    # five sentences with the title, one directive: (5 - 1) / 2 > 1; three short paragraphs; nobody is addressed
    parts = story_scores(STORY, "word " * 32)  # 3 + 3 + 3 + 3 + 4 = 16 words
    assert (parts.readability, parts.length, parts.structure, parts.balance, parts.person) == (1, 0.5, 1, 1, 1)
    assert parts.score == pytest.approx(4.5 / 5)
    assert story_scores(STORY).length is None
    assert story_scores("I can go. I can run. You sit.").balance == 0.25  # one other sentence to two directive ones
    assert story_scores("I sit. You sit.").person == 0.5
    assert story_scores('I sit. Mom says "you sit".').person == 1
    assert story_scores("It is so. " * 7).structure == pytest.approx((1 / 3 + 0) / 2)


@pytest.mark.parametrize("text", ["", "...", "\U0001f600", "42"])
def test_no_words_are_no_story(text: str) -> None:
    assert story_scores(text, "a b").score == 0


def test_long_and_foreign_texts() -> None:
    for text in ("word " * 2000, "x" * 10_000, "\u6c49\u5b57\u3002" * 100):
        assert 0 <= story_scores(text, "a b").score <= 1


def test_the_callback() -> None:
    texts = [f"<think>a</think><answer>{STORY}</answer>", ""]
    scores = run(StoryReward(), make_rollout(texts, reference=["word " * 32, None]))
    assert scores.values_B.tolist() == pytest.approx([0.9, 0])
    assert scores.metrics["words"][0] == 16
    assert scores.metrics["words"][1].isnan()
    assert scores.metrics["length"][0] == 0.5


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards_story._hyphenator.cache_clear()
    monkeypatch.setattr(rewards_story.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[benchmarks\]'"):
        count_syllables("word")
