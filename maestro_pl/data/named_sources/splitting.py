"""The splits of a benchmark: repetitions out, missing splits taken from the training rows, sizes kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar

from maestro_pl.data.named_sources.cards import Sizes
from maestro_pl.data.splits import SPLITS, Split, stable_unit

# a row whose prompt stands in two splits stays in the first of these
KEPT_FIRST: tuple[Split, ...] = ("test", "validation", "train")


class Keyed(Protocol):
    """What is needed of a row: what makes its prompt the same as another's, and its columns."""

    @property
    def key(self) -> str: ...

    @property
    def values(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Keyed)


def without_repetitions(rows: dict[Split, list[R]]) -> tuple[dict[Split, list[R]], list[str]]:
    """Drop rows with the prompt and reference of an earlier row of their split.

    Returns:
        The rows kept, and in words what was dropped.
    """
    kept: dict[Split, list[R]] = {}
    for split in SPLITS:
        first: dict[tuple[str, Any], R] = {}
        for row in rows[split]:
            first.setdefault((row.key, row.values.get("reference")), row)
        kept[split] = list(first.values())
    dropped = _less(rows, kept)
    return kept, [f"repeated in its split: {dropped}"] if dropped else []


def without_leaks(rows: dict[Split, list[R]]) -> tuple[dict[Split, list[R]], list[str]]:
    """Drop prompts that also stand in test from train and validation, and those of validation from train.

    Returns:
        The rows kept, and in words what was dropped.
    """
    keys = {split: {row.key for row in rows[split]} for split in SPLITS}
    shared = (keys["train"] & (keys["validation"] | keys["test"])) | (keys["validation"] & keys["test"])
    kept: dict[Split, list[R]] = {}
    taken: set[str] = set()
    for split in KEPT_FIRST:
        kept[split] = [row for row in rows[split] if row.key not in taken]
        taken |= keys[split]
    kept = {split: kept[split] for split in SPLITS}
    return kept, [f"{len(shared)} prompts in more than one split: {_less(rows, kept)}"] if shared else []


def _less(before: dict[Split, list[R]], after: dict[Split, list[R]]) -> str:
    gone = {split: len(before[split]) - len(after[split]) for split in SPLITS}
    return ", ".join(f"{count} rows left out of {split}" for split, count in gone.items() if count)


def divide(
    rows: dict[Split, list[R]], sizes: Sizes, exact: Collection[Split], seed: int, group: Callable[[R], str]
) -> tuple[dict[Split, list[R]], bool]:
    """Take the splits that have no rows yet out of the training rows.

    The order is that of a stable hash of ``group``, and rows of one group stay together. ``exact`` splits get their
    size; where the rows left are fewer than the other sizes ask for, each of these and train gets its share of them.

    Returns:
        The rows by split, and whether anything was taken.
    """
    missing: list[Split] = [split for split in ("test", "validation") if not rows[split] and sizes.of(split)]
    if not rows["train"] or not missing:
        return rows, False
    pool = _by_hash(rows["train"], seed, group)
    left = max(0, len(pool) - sum(sizes.of(split) for split in missing if split in exact))
    wanted = sum(sizes.of(split) for split in missing if split not in exact) + sizes.train
    share = min(1.0, left / wanted) if wanted else 1.0
    divided, start, upto = dict(rows), 0, 0.0
    for split in missing:
        upto += sizes.of(split) * (1.0 if split in exact else share)
        end = max(start, min(round(upto), len(pool)))
        while 0 < end < len(pool) and group(pool[end]) == group(pool[end - 1]):
            end += 1
        divided[split], start = pool[start:end], end
    divided["train"] = pool[start:]
    return divided, True


def cut_to_size(
    rows: dict[Split, list[R]], limits: dict[Split, int], seed: int, group: Callable[[R], str]
) -> tuple[dict[Split, list[R]], list[str]]:
    """Keep at most so many rows of each split, the first by a stable hash of ``group``, in their old order.

    Returns:
        The rows kept, and in words what was not.
    """
    kept = dict(rows)
    for split, limit in limits.items():
        if len(rows[split]) > limit:
            chosen = {id(row) for row in _by_hash(rows[split], seed, group)[:limit]}
            kept[split] = [row for row in rows[split] if id(row) in chosen]
    dropped = _less(rows, kept)
    return kept, [f"more than asked for: {dropped}"] if dropped else []


def _by_hash(rows: Sequence[R], seed: int, group: Callable[[R], str]) -> list[R]:
    return sorted(rows, key=lambda row: (stable_unit(group(row), seed), group(row)))
