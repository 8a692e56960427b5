"""What a run says about its data before it starts: where the rows went, what stands in two splits, one whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from maestro_pl.data.rendering import RenderedPrompt
from maestro_pl.data.rows import Loaded, Row
from maestro_pl.data.sources import Source
from maestro_pl.data.splits import SPLITS, Split
from maestro_pl.errors import escaped


@rank_zero_only  # type: ignore[untyped-decorator,unused-ignore]
def announce_sources(sources: Sequence[Source], loaded: Sequence[Loaded]) -> None:
    """Print how many rows of each source went to which split, and by what, and what the sources have left out."""
    table = Table("data source", *SPLITS, "split", box=None, title_justify="left")
    for source, piece in zip(sources, loaded, strict=True):
        counts = [str(len(piece.rows[split])) for split in SPLITS]
        table.add_row(Text(escaped(source.label)), *counts, Text(escaped(piece.how)))
    console = Console()
    console.print(table)
    for source, piece in zip(sources, loaded, strict=True):
        for note in piece.notes:
            console.print(Text(escaped(f"{source.label}: {note}")))


@rank_zero_only  # type: ignore[untyped-decorator,unused-ignore]
def announce_prompt(prompt: RenderedPrompt) -> None:
    """Print one prompt exactly as the policy reads it."""
    title = f"the first prompt ({prompt.row.task}), {len(prompt.ids)} tokens"
    Console().print(Panel(Text(escaped(prompt.text)), title=Text(escaped(title)), title_align="left"))


def find_overlap(rows: dict[Split, list[Row]]) -> dict[tuple[Split, Split], set[str]]:
    """The prompts that stand in two splits, by pair of splits."""
    keys = {split: {row.key for row in rows[split]} for split in SPLITS}
    return {(a, b): shared for a, b in combinations(SPLITS, 2) if (shared := keys[a] & keys[b])}


def warn_of_overlap(overlap: dict[tuple[Split, Split], set[str]], dropped: int) -> None:
    """Warn of prompts that stand in two splits, and say what was done."""
    if not overlap:
        return
    pairs = ", ".join(f"{len(keys)} in {a} and {b}" for (a, b), keys in overlap.items())
    done = f"{dropped} training rows are left out" if dropped else "set data.overlap: drop to take them out of training"
    rank_zero_warn(f"{len(set().union(*overlap.values()))} prompts stand in more than one split ({pairs}): {done}.")
