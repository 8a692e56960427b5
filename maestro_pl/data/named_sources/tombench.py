"""ToMBench: theory of mind, four options (or two) a question, in English and Chinese."""

from __future__ import annotations

import re

from maestro_pl.data.named_sources.cards import BenchmarkCard, Sizes
from maestro_pl.data.named_sources.choices import (
    check_letter,
    is_blank,
    reference_text,
    split_options,
    without_blanks,
    written_label,
)
from maestro_pl.data.named_sources.forms import BLANK_OPTIONS, Benchmark, Form, nover_question, text_of
from maestro_pl.data.named_sources.options import BenchmarkOptions
from maestro_pl.data.named_sources.questions import QWEN_JUDGE
from maestro_pl.data.readers import Values

LETTERS = "ABCD"
ANSWER = "答案\nANSWER"
FIELDS = {
    "en": ("STORY", "QUESTION", "OPTION-"),
    "zh": ("故事", "问题", "选项"),
}


def _read_published(values: Values, options: BenchmarkOptions) -> list[Values]:
    languages = FIELDS if options.language == "all" else {options.language: FIELDS[options.language]}
    return [_in_language(values, language) for language in languages]


def _in_language(values: Values, language: str) -> Values:
    story, question, option = FIELDS[language]
    given = [letter for letter in LETTERS if not is_blank(values.get(option + letter))]
    if given != list(LETTERS[: len(given)]):  # the answer's letter would mean another option
        lost = next(letter for letter in LETTERS if letter not in given)
        raise ValueError(f"{option}{lost} is empty and {option}{given[-1]} is not")
    # the file of some options repeats the letter: "A. text"
    choices = [re.sub(rf"^{letter}\s*[.．、:：]\s*", "", text_of(values, option + letter)) for letter in given]
    if len(choices) < 2:
        raise ValueError(f"the row has {len(choices)} options, expected at least two")
    label = check_letter(text_of(values, ANSWER), choices)
    missing = [values.get(option + letter) for letter in LETTERS[len(given) :]]
    return {
        BLANK_OPTIONS: sum(value is not None and str(value).strip() != "" for value in missing),
        "story": text_of(values, story),
        "question": text_of(values, question),
        "language": language,
        "choices": choices,
        "label": label,
        "reference": reference_text(choices, label),
    }


def _read_nover(values: Values, options: BenchmarkOptions) -> list[Values]:
    question, choices = split_options(nover_question(values))
    choices, blank = without_blanks(choices)
    label = written_label(text_of(values, "reference"), choices)
    return [
        {
            BLANK_OPTIONS: blank,
            "question": question,
            "choices": choices,
            "label": label,
            "reference": reference_text(choices, label),
        }
    ]


TOMBENCH = Benchmark(
    BenchmarkCard(
        name="tombench",
        title="ToMBench",
        origin="https://github.com/zhchen18/ToMBench, folder data (arXiv 2402.15052)",
        licence="MIT; the authors ask to use it for evaluation only",
        schema="能力\\nABILITY, 序号\\nINDEX, 故事, 问题, 选项A ... 选项D, STORY, QUESTION, OPTION-A ... OPTION-D, "
        "答案\\nANSWER",
        sizes=Sizes(1432, 571, 857),
        template="{story}\n\n{question}\n\n{options}",
        metric="share of right options (exact match of the label), or judged right",
        judge=QWEN_JUDGE,
        caveats=(
            "All 2860 questions are test by default; the paper tests on 857 of them (test_size: 857). "
            "allow_training: true divides them, and warns.",
            "language: en (default), zh or all.",
        ),
        evaluation_only=True,
    ),
    (
        Form("the published form", ("STORY", "QUESTION", "OPTION-A", "OPTION-B", ANSWER), _read_published),
        Form("NOVER's form", ("prompt", "reference"), _read_nover, template="{question}\n\n{options}"),
    ),
    options=("language", "allow_training"),
    group=lambda values: f"{values['STORY']}\n{values['QUESTION']}" if "STORY" in values else None,
)
