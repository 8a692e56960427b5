"""The paper's seven benchmarks, and GSM8K, as named sources with data cards."""

from __future__ import annotations

from maestro_pl.data.named_sources.cards import BenchmarkCard, Sizes
from maestro_pl.data.named_sources.emobench import EMOBENCH
from maestro_pl.data.named_sources.forms import Benchmark, Form
from maestro_pl.data.named_sources.opus_books import OPUS_BOOKS
from maestro_pl.data.named_sources.questions import GENERAL_THOUGHTS, GSM8K, NATURAL_REASONING, WEBINSTRUCT
from maestro_pl.data.named_sources.ss_gen import SS_GEN
from maestro_pl.data.named_sources.tombench import TOMBENCH

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkCard", "Form", "Sizes", "cards_markdown"]

# name under data.sources -> how it is read
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.card.name: benchmark
    for benchmark in (
        NATURAL_REASONING,
        SS_GEN,
        WEBINSTRUCT,
        TOMBENCH,
        GENERAL_THOUGHTS,
        OPUS_BOOKS,
        EMOBENCH,
        GSM8K,
    )
}


def cards_markdown() -> str:
    """All data cards, as they stand in ``docs/benchmarks.md``."""
    return "\n".join(benchmark.card.markdown() for benchmark in BENCHMARKS.values())
