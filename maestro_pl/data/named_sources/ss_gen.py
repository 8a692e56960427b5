"""SS-GEN: Social Stories for a title and a theme."""

from __future__ import annotations

from maestro_pl.data.named_sources.cards import BenchmarkCard, Sizes
from maestro_pl.data.named_sources.forms import NOVER, Benchmark, Form, reference_of, text_of
from maestro_pl.data.named_sources.options import BenchmarkOptions
from maestro_pl.data.readers import Values

COLUMNS = ("chapter", "explanation", "title", "story_content")


def _read(values: Values, options: BenchmarkOptions) -> list[Values]:
    named = {column: text_of(values, column) for column in COLUMNS[:3]}
    return [{**named, "reference": reference_of(values, "story_content")}]


SS_GEN = Benchmark(
    BenchmarkCard(
        name="ss_gen",
        title="SS-GEN, social story generation",
        origin="https://github.com/MIMIFY/SS-GEN (arXiv 2406.15695)",
        hub_id="FMiMiY/SS-GEN",
        licence="OpenRAIL; the repository's badge says MIT",
        schema="id, chapter, explanation, title, story_content",
        sizes=Sizes(4068, 509, 508),
        template='Write a Social Story for a child with autism, titled "{title}". '
        'Its theme is "{chapter}": {explanation}',
        metric="share of stories judged good",
        judge="Gemini-2.5-Flash, majority of three votes",
        caveats=(
            "The hub asks for a log-in before it hands out the data set.",
            "The stories were written by GPT-4 and filtered by people: the reference is one good story among many.",
        ),
    ),
    (Form("the published form", COLUMNS, _read), NOVER),
)
