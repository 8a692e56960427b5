"""Open questions with a written answer: Natural Reasoning, WebInstruct, GeneralThoughts and GSM8K."""

from __future__ import annotations

from maestro_pl.data.named_sources.cards import BenchmarkCard, Sizes
from maestro_pl.data.named_sources.forms import (
    NOVER,
    Benchmark,
    Form,
    LeftOutError,
    question_form,
    reference_of,
    text_of,
)
from maestro_pl.data.named_sources.options import BenchmarkOptions
from maestro_pl.data.readers import Values

QWEN_JUDGE = "Qwen3-235B, majority of three votes against the reference"

NATURAL_REASONING = Benchmark(
    BenchmarkCard(
        name="natural_reasoning",
        title="NaturalReasoning",
        origin="https://huggingface.co/datasets/facebook/natural_reasoning (arXiv 2502.13124)",
        hub_id="facebook/natural_reasoning",
        licence="CC-BY-NC-4.0: no commercial use",
        schema="question, reference_answer, responses",
        sizes=Sizes(2000, 1000, 1000),
        template="{question}",
        metric="share of answers judged right",
        judge=QWEN_JUDGE,
        caveats=(
            "18 % of the published questions have no reference answer; they are left out and counted.",
            "Published without splits.",
        ),
    ),
    (question_form("the published form", "question", "reference_answer"), NOVER),
)

WEBINSTRUCT = Benchmark(
    BenchmarkCard(
        name="webinstruct",
        title="WebInstruct-verified",
        origin="https://huggingface.co/datasets/TIGER-Lab/WebInstruct-verified",
        hub_id="TIGER-Lab/WebInstruct-verified",
        licence="Apache-2.0",
        schema="id, question, answer, answer_type, category, difficulty",
        sizes=Sizes(2000, 1000, 1000),
        template="{question}",
        metric="share of answers judged right",
        judge=QWEN_JUDGE,
        caveats=(
            "The paper does not say which edition of WebInstruct it used. NOVER's rows have short answers like those of "
            "this one; WebInstructSub has question and answer too, and is read as a file.",
            "80 prompts of NOVER's file stand in more than one split.",
        ),
    ),
    (question_form("the published form", "question", "answer"), NOVER),
)


def _read_general_thought(values: Values, options: BenchmarkOptions) -> list[Values]:
    if values.get("prev_messages"):
        raise LeftOutError("with earlier messages")
    return [{"question": text_of(values, "question"), "reference": reference_of(values, "reference_answer")}]


GENERAL_THOUGHTS = Benchmark(
    BenchmarkCard(
        name="general_thoughts",
        title="GeneralThought-430K, filtered",
        origin="https://huggingface.co/datasets/natolambert/GeneralThought-430K-filtered",
        hub_id="natolambert/GeneralThought-430K-filtered",
        licence="MIT; question_license names the terms of each question",
        schema="question_id, question_url, question, reference_answer, prev_messages, model_name, model_answer, "
        "model_reasoning, task, question_license, question_source, community_answer_score, community_question_score, "
        "verifier_score",
        sizes=Sizes(2000, 1000, 1000),
        template="{question}",
        metric="share of answers judged right",
        judge=QWEN_JUDGE,
        caveats=(
            "A question stands once for each model that answered it: repetitions are dropped.",
            "Questions without a reference or inside a conversation are left out and counted.",
            "The published column task travels as published_task.",
            "17 prompts of NOVER's file stand in more than one split.",
        ),
    ),
    (Form("the published form", ("question", "reference_answer"), _read_general_thought), NOVER),
)


def _read_gsm8k(values: Values, options: BenchmarkOptions) -> list[Values]:
    _, mark, result = text_of(values, "answer").rpartition("####")
    if not mark or not result.strip():
        raise ValueError("the answer has no result after '####'")
    return [{"question": text_of(values, "question"), "reference": result.strip()}]


GSM8K = Benchmark(
    BenchmarkCard(
        name="gsm8k",
        title="GSM8K",
        origin="https://huggingface.co/datasets/openai/gsm8k (arXiv 2110.14168)",
        hub_id="openai/gsm8k",
        hub_config="main",
        licence="MIT",
        schema="question, answer (the result after ####)",
        sizes=Sizes(6473, 1000, 1319),
        template="{question}",
        metric="share of answers with the right number",
        judge="none: the number is compared",
        caveats=(
            "Not among the paper's seven; a benchmark whose answers a rule can check.",
            "reference is the result alone, answer the whole published solution.",
            "The published test split is kept; validation is taken from train.",
        ),
    ),
    (Form("the published form", ("question", "answer"), _read_gsm8k), NOVER),
)
