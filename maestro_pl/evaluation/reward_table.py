"""What the rewards of a run say of its first responses: whether each applies, and whether it can tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maestro_pl.rollout import RewardScores


@dataclass(frozen=True)
class RewardRow:
    """A reward and what it said of B responses.

    Attributes:
        name, role, normalize: as in the config.
        tasks: those it scores; empty: all.
        n: responses that it was asked about: of its tasks, as an anchor of the labelled groups.
        applied: to how many of them it gave a score.
        mean: of the raw scores; NaN where it gave none.
        std: population standard deviation of the same.
        groups: with at least two scores.
        told_apart: groups whose scores are not all the same.
    """

    name: str
    role: str
    normalize: str
    tasks: tuple[str, ...]
    n: int
    applied: int
    mean: float
    std: float
    groups: int
    told_apart: int


def reward_row(scores: RewardScores, group_size: int, rows: Sequence[int], tasks: Sequence[str] = ()) -> RewardRow:
    """Sum up one reward.

    Args:
        scores: of B responses in whole groups.
        group_size: G.
        rows: the responses that the reward was asked about.
        tasks: the names of those that it scores; none: all.
    """
    values_B, mask_B = scores.values_B.double(), scores.mask_B
    applied = values_B[mask_B]
    values_NG, mask_NG = values_B.view(-1, group_size), mask_B.view(-1, group_size)
    low_N = torch.where(mask_NG, values_NG, torch.inf).amin(dim=1)
    high_N = torch.where(mask_NG, values_NG, -torch.inf).amax(dim=1)
    judged_N = mask_NG.sum(dim=1) >= 2
    return RewardRow(
        scores.spec.name,
        scores.spec.role,
        scores.spec.normalize,
        tuple(tasks),
        len(rows),
        len(applied),
        float(applied.mean()) if len(applied) else float("nan"),
        float(applied.std(correction=0)) if len(applied) else float("nan"),
        int(judged_N.sum()),
        int((judged_N & (high_N > low_N)).sum()),
    )


def reward_table(rows: Sequence[RewardRow]) -> str:
    """The rows as a table to read."""
    lines = [("reward", "role", "normalize", "tasks", "applied", "mean", "std", "groups told apart")]
    for row in rows:
        some = row.applied > 0
        lines.append(
            (
                row.name,
                row.role,
                row.normalize,
                ", ".join(row.tasks) or "all",
                f"{row.applied} of {row.n}",
                f"{row.mean:.3g}" if some else "-",
                f"{row.std:.3g}" if some else "-",
                f"{row.told_apart} of {row.groups}" if row.groups else "-",
            )
        )
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, every column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def never_applied(row: RewardRow, reason: str | None) -> str | None:
    """The sentence on a reward that was asked and applied to nothing; None where there is nothing to say."""
    if not row.n or row.applied:
        return None
    because = f", because {reason}" if reason else ""
    return (
        f"Reward {row.name!r} applied to 0 of the first {row.n} responses{because}. A response is judged by the rewards "
        "that apply to it; this one judges nothing."
    )
