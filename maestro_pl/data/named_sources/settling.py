"""From the rows of a benchmark to its splits, with an account of what was left out."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.data.named_sources.cards import Sizes
from maestro_pl.data.named_sources.forms import Benchmark
from maestro_pl.data.named_sources.options import SIZES, BenchmarkOptions
from maestro_pl.data.named_sources.splitting import Keyed, cut_to_size, divide, without_leaks, without_repetitions
from maestro_pl.data.splits import SPLITS, Split

# the order in which splits without rows are taken out of train
MISSING_FIRST: tuple[Split, ...] = ("test", "validation")

R = TypeVar("R", bound=Keyed)


def settle(
    benchmark: Benchmark, options: BenchmarkOptions, rows: dict[Split, list[R]], own_splits: bool, seed: int
) -> tuple[dict[Split, list[R]], str, list[str]]:
    """Drop repetitions and leaks, divide what is not divided, and keep the benchmark's sizes.

    Args:
        benchmark: whose rows they are.
        options: its sizes, and whether it may train.
        rows: the rows by split; those of which nobody says it stand under ``train``.
        own_splits: the rows or files say themselves which split they are: nothing is taken out of ``train``.
        seed: seed of the hash that divides.

    Returns:
        The rows by split, how they were divided if not as they came, and sentences for the announcement.
    """

    def group(row: R) -> str:
        return benchmark.group(row.values) or row.key

    card = benchmark.card
    if card.evaluation_only and not options.allow_training:
        everything: dict[Split, list[R]] = {split: [] for split in SPLITS}
        everything["test"] = [row for split in SPLITS for row in rows[split]]
        kept, notes = without_repetitions(everything)
        limits: dict[Split, int] = {} if options.test_size is None else {"test": options.test_size}
        kept, cut = cut_to_size(kept, limits, seed, group)
        return kept, "all test", [*notes, *cut, "for evaluation only: its train and validation rows are test too"]
    if card.evaluation_only:
        rank_zero_warn(
            f"{card.name}: its authors ask to use it for evaluation only; allow_training: true trains on it all the same."
        )
    asked: dict[Split, int | None] = dict(zip(SPLITS, (getattr(options, name) for name in SIZES), strict=True))
    exact = [split for split, size in asked.items() if size is not None]
    sizes = Sizes(*(_size(asked[split], card.sizes.of(split), options) for split in SPLITS))
    kept, repeated = without_repetitions(rows)
    kept, leaked = without_leaks(kept)
    wanted = _beyond_train(kept, sizes, exact) if own_splits else sizes
    kept, divided = divide(kept, wanted, exact, seed, group)
    kept, cut = cut_to_size(kept, {split: sizes.of(split) for split in SPLITS}, seed, group)
    return kept, f"by hash, split_seed {seed}" if divided else "", [*repeated, *leaked, *cut]


def _beyond_train(rows: dict[Split, list[R]], sizes: Sizes, exact: Collection[Split]) -> Sizes:
    """What rows that say themselves where they belong give up of train: what is asked for, else what train has too many."""
    room = max(0, len(rows["train"]) - sizes.train)
    wanted: dict[Split, int] = {"train": 0}
    for split in MISSING_FIRST:
        wanted[split] = sizes.of(split) if split in exact else min(room, sizes.of(split))
        room -= wanted[split] if not rows[split] else 0
        room = max(0, room)
    return Sizes(**wanted)


def _size(asked: int | None, default: int, options: BenchmarkOptions) -> int:
    if asked is not None:
        return asked
    return 2 * default if options.language == "all" else default
