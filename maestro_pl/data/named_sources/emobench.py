"""EmoBench: an emotion and its cause (EU), or what to do or say (EA), in English and Chinese."""

from __future__ import annotations

import re

from maestro_pl.data.named_sources.cards import BenchmarkCard, Sizes
from maestro_pl.data.named_sources.choices import (
    Choices,
    Label,
    label_of,
    reference_text,
    split_options,
    without_blanks,
    written_label,
)
from maestro_pl.data.named_sources.forms import BLANK_OPTIONS, Benchmark, Form, list_of, nover_question, text_of
from maestro_pl.data.named_sources.options import BenchmarkOptions
from maestro_pl.data.named_sources.questions import QWEN_JUDGE
from maestro_pl.data.readers import Values

EU_QUESTION = {
    "en": "Which emotion does {subject} feel, and what is its cause? Choose one option of each list.",
    "zh": "{subject}感到的是哪种情绪？原因是什么？请从每个列表中各选一项。",
}
EA_QUESTION = {
    "en": "What would be best for {subject} to do or say in this situation? Choose one option.",
    "zh": "在这种情况下，{subject}最好怎么做或怎么说？请选择一项。",
}
EU_COLUMNS = ("scenario", "subject", "emotion_choices", "emotion_label", "cause_choices", "cause_label")
EA_COLUMNS = ("scenario", "subject", "choices", "label")
ASKED = re.compile(r"(?:emotion is|course of action for) (.+?) (?:feeling|in this situation)\b")


def _row(scenario: str, subject: str, language: str, choices: Choices, label: Label) -> Values:
    texts = EU_QUESTION if isinstance(choices, dict) else EA_QUESTION
    return {
        "scenario": scenario,
        "subject": subject,
        "language": language,
        # some scenarios are told by the one who is asked about
        "question": texts[language].format(subject="the narrator" if subject == "I" else subject),
        "choices": choices,
        "label": label,
        "reference": reference_text(choices, label),
    }


def _read(values: Values, options: BenchmarkOptions, choices: Choices, label: Label) -> list[Values]:
    language = values.get("language", "en")
    if not isinstance(language, str) or language not in EU_QUESTION:
        raise ValueError(f"language is {language!r}, expected one of {', '.join(EU_QUESTION)}")
    if options.language not in (language, "all"):
        return []
    return [_row(text_of(values, "scenario"), text_of(values, "subject"), language, choices, label)]


def _read_eu(values: Values, options: BenchmarkOptions) -> list[Values]:
    choices = {"Emotion": list_of(values, "emotion_choices"), "Cause": list_of(values, "cause_choices")}
    label = {
        "Emotion": label_of(text_of(values, "emotion_label"), choices["Emotion"]),
        "Cause": label_of(text_of(values, "cause_label"), choices["Cause"]),
    }
    return _read(values, options, choices, label)


def _read_ea(values: Values, options: BenchmarkOptions) -> list[Values]:
    choices = list_of(values, "choices")
    return _read(values, options, choices, label_of(text_of(values, "label"), choices))


def _read_nover(values: Values, options: BenchmarkOptions) -> list[Values]:
    if options.language not in ("en", "all"):
        return []
    question, choices = split_options(nover_question(values))
    choices, blank = without_blanks(choices)
    scenario, _, asked = question.rpartition("\n")
    subject = ASKED.search(asked)
    if subject is None or not scenario.strip():
        raise ValueError(f"the question {asked.strip()!r} is none of NOVER's two about a scenario")
    label = written_label(text_of(values, "reference"), choices)
    return [{BLANK_OPTIONS: blank, **_row(scenario.strip(), subject.group(1), "en", choices, label)}]


EMOBENCH = Benchmark(
    BenchmarkCard(
        name="emobench",
        title="EmoBench",
        origin="https://github.com/Sahandfer/EmoBench, files data/EU.jsonl and data/EA.jsonl (arXiv 2402.12071)",
        licence="MIT",
        schema="EU: qid, language, coarse_category, finegrained_category, scenario, subject, emotion_choices, "
        "emotion_label, cause_choices, cause_label. EA: qid, language, category, question type, scenario, subject, "
        "choices, label",
        sizes=Sizes(272, 0, 128),
        template="{scenario}\n\n{question}\n\n{options}",
        metric="share of right options (exact match of all labels), or judged right",
        judge=QWEN_JUDGE,
        caveats=(
            "EU asks two questions: choices and label are objects with Emotion and Cause. EA asks one.",
            "language: en (default), zh or all; both languages of a question share their split.",
            "No validation split: validation_size takes one out of the rows that train.",
        ),
    ),
    (
        Form("the published EU form", EU_COLUMNS, _read_eu),
        Form("the published EA form", EA_COLUMNS, _read_ea),
        Form("NOVER's form", ("prompt", "reference"), _read_nover),
    ),
    options=("language",),
    group=lambda values: f"{isinstance(values['choices'], dict)} {values['qid']}" if "qid" in values else None,
)
