"""Four tasks whose needs conflict, made of real texts: a title, a summary, a story, a translation.

Stories are those of SS-GEN, of which the first sentences (up to :data:`BEGINNING` words) are shown; sentences are those of
OPUS Books, English to French. What is taken from a story stands in one split only, whichever task it is for.
"""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import write_whole

BEGINNING = 45  # words of a story
LONGEST = 18  # words of a sentence to be translated
SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}
REQUEST = "Translate the following text from English to French:"
PROMPTS = {
    "title": "{text}\n\nWrite a title of a few words for this text, and nothing else.",
    "summary": "{text}\n\nSay in one short sentence what this text is about.",
    "story": 'Write three sentences for a child about "{title}".',
    "translation": "Translate this sentence into French. Write only the translation.\n\n{text}",
}


def rows_of(root: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with ``task``, ``prompt``, ``reference`` and ``split``; the same for the same files and seed.

    Args:
        root: folder with ``ssgen/dev.jsonl`` and ``nover/opus_books_all_pairs.csv``.
        seed: of the splits and of which story is for which task.

    Raises:
        UserError: a file is not there.
    """
    stories, books = root / "ssgen" / "dev.jsonl", root / "nover" / "opus_books_all_pairs.csv"
    for path in (stories, books):
        if not path.is_file():
            raise UserError(f"{path} is not there: --root is the folder with ssgen/ and nover/.")
    generator = random.Random(seed)
    told = [json.loads(line) for line in stories.read_text(encoding="utf-8").splitlines() if line.strip()]
    generator.shuffle(told)
    rows = []
    for place, story in enumerate(told):
        task = ("title", "summary", "story")[place % 3]
        text, title = beginning(story["story_content"]), story["title"].strip()
        reference = {"title": title, "summary": text, "story": story["story_content"].strip()}[task]
        rows.append(_row(task, PROMPTS[task].format(text=text, title=title), reference, place / len(told)))
    pairs = sentences(books)
    generator.shuffle(pairs)
    for place, (english, french) in enumerate(pairs):
        prompt = PROMPTS["translation"].format(text=english)
        rows.append(_row("translation", prompt, french, place / len(pairs)))
    return rows


def write_rows(root: Path, path: Path) -> Path:
    """Write :func:`rows_of` as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) for row in rows_of(root))
    write_whole(path, "\n".join(lines) + "\n")  # a run may be reading it
    return path


def beginning(story: str) -> str:
    """The first whole sentences of at most :data:`BEGINNING` words, or the first so many words of a longer sentence."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", story.strip()):
        words = sentence.split()
        if len(kept) + len(words) > BEGINNING:
            break
        kept += words
    return " ".join(kept or story.split()[:BEGINNING])


def sentences(path: Path) -> list[tuple[str, str]]:
    """English and French, one of each text, neither too long nor more than twice the other's length."""
    found: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            _, _, rest = row["prompt"].partition(REQUEST)
            english = rest.partition("Answer the question and return in the following format:")[0].strip()
            french = row["reference"].strip()
            if not english or not french or not 4 <= len(english.split()) <= LONGEST:
                continue
            if max(len(english), len(french)) <= 2 * min(len(english), len(french)):
                found.setdefault(english, french)
    return list(found.items())


def _row(task: str, prompt: str, reference: str, share: float) -> dict[str, Any]:
    split = "train" if share < SPLITS["train"] else "validation" if share < 1 - SPLITS["test"] else "test"
    return {"task": task, "prompt": prompt, "reference": reference, "split": split}
