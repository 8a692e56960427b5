"""Rows of the benchmarks as they are published, and files of rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

INSTRUCTION = "\n\nAnswer the question and return in the following format:\n\n<think>\n...\n</think>\n"
EU = {
    "qid": "7",
    "language": "en",
    "scenario": "Ann's cake fell, but her son said he loved it.",
    "subject": "Ann",
    "emotion_choices": ["Anger", "Delight"],
    "emotion_label": "Delight",
    "cause_choices": ["The cake fell", "She is tired", "Her son loved it"],
    "cause_label": "Her son loved it",
}
EA = {
    "qid": "7",
    "language": "en",
    "question type": "Action",
    "scenario": "A friend of Bo's is sad.",
    "subject": "Bo",
    "choices": ["Listen", "Leave"],
    "label": "Listen",
}
TOM = {
    "能力\nABILITY": "Emotion",
    "序号\nINDEX": 1,
    "故事": "欣欣肚子疼。",
    "问题": "她的感受?",
    "选项A": "A.悲伤",
    "选项B": "B. 害怕",
    "选项C": "C.开心",
    "选项D": "D.失望",
    "STORY": "Xinxin has a stomachache.",
    "QUESTION": "What does she feel?",
    "OPTION-A": "Sad",
    "OPTION-B": "Scared",
    "OPTION-C": "Happy",
    "OPTION-D": "Disappointed",
    "答案\nANSWER": "A",
}
THOUGHT = {"question": "Why?", "reference_answer": "Because.", "prev_messages": None, "task": "chat"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "natural_reasoning": {"question": "Why?", "reference_answer": "Because.", "responses": [{"response": "So."}]},
    "ss_gen": {"id": 1, "chapter": "Home", "explanation": "is about home", "title": "Tidy", "story_content": "I tidy."},
    "webinstruct": {"id": "1", "question": "2 + 2?", "answer": "4", "answer_type": "Integer", "category": "Math"},
    "tombench": TOM,
    "general_thoughts": THOUGHT,
    "opus_books": {"id": "0", "translation": {"en": "The cat.", "fr": "Le chat."}},
    "emobench": EU,
    "gsm8k": {"question": "3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
}


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    """One JSON object a line; returns the path as a config has it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_nover(path: Path, *rows: tuple[str, str, str]) -> str:
    """NOVER's three columns; returns the path as a config has it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "reference", "split"), *rows])
    return str(path)
