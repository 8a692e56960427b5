"""Social Stories without a judge: readability, length, structure, kinds of sentences and person, by simple rules.

These are heuristics over English surface forms: they see words, sentences and line breaks, not what is said. A solution
of a sum or one word again and again can score above 0.7, so they are for comparing texts that are known to be stories.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from maestro_pl.errors import UserError

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)]*\s+|\n+")
_QUOTED = re.compile(r"\"[^\"]*\"|\u201c[^\u201d]*\u201d")
_DIRECTIVE = re.compile(
    r"^(?:take|talk|try|remember|do|don't|ask|tell|think about|use|look|listen|stop|wait|go|keep|let|be|say|count|breathe)\b"
    r"|\b(?:i|we|he|she|they|you)\s+(?:\w+\s+)?(?:will|can|should|must|need to|have to|could)\b"
    r"|\btry(?:ing)? (?:my best )?to\b",
    re.IGNORECASE,
)
_PERSPECTIVE = re.compile(
    r"\b(?:feel|think|know|believe|hope|like|love|worry|want|understand|enjoy|wonder|prefer)(?:s|ing)?\b"
    r"|\b(?:felt|thought|knew|happy|sad|angry|scared|proud|upset|nervous|excited|calm|afraid|worried)\b",
    re.IGNORECASE,
)
_SECOND_PERSON = re.compile(r"\b(?:you|your|yours|yourself)\b", re.IGNORECASE)
_EASY = 80.0  # Flesch: "easy", sixth grade
_LONG_PARAGRAPH = 6  # sentences


@dataclass(frozen=True)
class StoryScores:
    """The parts of a story's score, each in [0, 1]; ``length`` is None without a reference.

    Attributes:
        readability: Flesch reading ease / 80, cut to [0, 1] (80 is "easy").
        length: words of the shorter of story and reference over words of the longer.
        structure: mean of min(paragraphs, 3) / 3 (an introduction, a body, a conclusion; a title does not count) and
            the share of paragraphs with at most 6 sentences.
        balance: min(1, (descriptive + perspective) / (2 * directive)), Gray's two descriptive sentences or more to a
            directive one; 1 where there is no directive one.
        person: share of sentences without "you" outside quotes, since a Social Story speaks in the first or third
            person.
    """

    readability: float
    length: float | None
    structure: float
    balance: float
    person: float

    @property
    def score(self) -> float:
        """The mean of the parts that apply."""
        parts = [part for part in asdict(self).values() if part is not None]
        return float(sum(parts) / len(parts))


def story_scores(story: str, reference: str | None = None) -> StoryScores:
    """The parts of a story's score; all 0 for a text without words.

    Args:
        story: its text; paragraphs end at a line break.
        reference: a story whose length is aimed at.
    """
    words = len(_WORD.findall(story))
    aim = len(_WORD.findall(reference)) if reference else 0
    if not words:
        return StoryScores(0.0, 0.0 if aim else None, 0.0, 0.0, 0.0)
    sentences = split_sentences(story)
    kinds = [sentence_kind(sentence) for sentence in sentences]
    directive = kinds.count("directive")
    sizes = [len(split_sentences(paragraph)) for paragraph in story_paragraphs(story)]
    short = sum(size <= _LONG_PARAGRAPH for size in sizes) / len(sizes) if sizes else 0.0
    addressed = sum(bool(_SECOND_PERSON.search(_QUOTED.sub("", sentence))) for sentence in sentences)
    return StoryScores(
        readability=min(1.0, max(0.0, flesch_reading_ease(story) / _EASY)),
        length=min(words, aim) / max(words, aim) if aim else None,
        structure=(min(len(sizes), 3) / 3 + short) / 2,
        balance=min(1.0, (len(kinds) - directive) / (2 * directive)) if directive else 1.0,
        person=1.0 - addressed / len(sentences),
    )


def story_counts(story: str) -> dict[str, float]:
    """What the parts are made of: Flesch and Flesch-Kincaid, words, paragraphs, and the share of each kind of sentence."""
    sentences, kinds = split_sentences(story), [sentence_kind(sentence) for sentence in split_sentences(story)]
    paragraphs = story_paragraphs(story)
    if not sentences:
        return {}
    return {
        "flesch_reading_ease": flesch_reading_ease(story),
        "flesch_kincaid_grade": flesch_kincaid_grade(story),
        "words": float(len(_WORD.findall(story))),
        "paragraphs": float(len(paragraphs)),
        "sentences_per_paragraph": sum(len(split_sentences(p)) for p in paragraphs) / max(1, len(paragraphs)),
        **{f"{kind}_share": kinds.count(kind) / len(kinds) for kind in ("directive", "perspective", "descriptive")},
    }


def flesch_reading_ease(text: str) -> float:
    """206.835 - 1.015 words / sentences - 84.6 syllables / words (Flesch 1948); 100 is very easy, 0 very hard."""
    per_sentence, per_word = _ratios(text)
    return 206.835 - 1.015 * per_sentence - 84.6 * per_word


def flesch_kincaid_grade(text: str) -> float:
    """0.39 words / sentences + 11.8 syllables / words - 15.59 (Kincaid et al. 1975): a school grade."""
    per_sentence, per_word = _ratios(text)
    return 0.39 * per_sentence + 11.8 * per_word - 15.59


def count_syllables(word: str) -> int:
    """The places where pyphen's dictionary of American English may hyphenate a word, plus one.

    Raises:
        UserError: ``pyphen`` is not installed.
    """
    return len(_hyphenator().positions(word.lower())) + 1


def sentence_kind(sentence: str) -> str:
    """``directive`` (says what to do), else ``perspective`` (feelings and thoughts), else ``descriptive``, by key words."""
    if _DIRECTIVE.search(sentence.replace("\u2019", "'").strip()):
        return "directive"
    return "perspective" if _PERSPECTIVE.search(sentence) else "descriptive"


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, which end at ``.``, ``!``, ``?`` or a line break; those without a word are left out."""
    return [part.strip() for part in _SENTENCE_END.split(text) if _WORD.search(part)]


def story_paragraphs(story: str) -> list[str]:
    """The lines with words; a first line of at most 12 words without a closing mark is a title and left out."""
    lines = [line.strip() for line in story.split("\n") if _WORD.search(line)]
    is_title = len(lines) > 1 and len(lines[0].split()) <= 12 and not re.search(r"[.!?:][\"'*\u201d]*$", lines[0])
    return lines[1:] if is_title else lines


def _ratios(text: str) -> tuple[float, float]:
    """Words a sentence and syllables a word."""
    words = _WORD.findall(text)
    return len(words) / max(1, len(split_sentences(text))), sum(map(count_syllables, words)) / max(1, len(words))


@lru_cache(maxsize=1)
def _hyphenator() -> Any:
    if importlib.util.find_spec("pyphen") is None:
        raise UserError(
            "Readability needs the package pyphen, which is not installed: run pip install -e '.[benchmarks]'."
        )
    import pyphen

    return pyphen.Pyphen(lang="en_US")
