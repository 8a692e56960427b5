"""Prompts: sources, splits, rendering, and the order of training."""

from maestro_pl.data.module import PromptDataModule
from maestro_pl.data.named_sources import BENCHMARKS, BenchmarkCard
from maestro_pl.data.sources import NAMED, Source

__all__ = ["BENCHMARKS", "NAMED", "BenchmarkCard", "PromptDataModule", "Source"]
