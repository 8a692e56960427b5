"""Which groups an anchor labels: a fixed share of them, drawn with a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

EMPTY: Mapping[str, int] = {}


class LabelSchedule:
    """Draws the groups of each batch that are labelled.

    The number of labelled groups follows the share without noise: after n groups it is n times the share, give or take
    one. Which groups of a batch they are is drawn from the seed, the batch's number and the rank, those of the tasks
    that were labelled least first; a resumed run labels what the uninterrupted one would have labelled.

    Args:
        fraction: share of the groups in (0, 1]; None is one group a batch.
        seed: of the draw.

    Raises:
        UserError: a share outside (0, 1].
    """

    def __init__(self, fraction: float | None = None, seed: int = 0) -> None:
        self.fraction, self.seed = fraction, seed

    def draw(
        self, groups: int, batch: int, rank: int = 0, tasks_N: Sequence[str] = (), asked: Mapping[str, int] = EMPTY
    ) -> Tensor:
        """Bool (N,): which of ``groups`` groups of this batch are labelled.

        Args:
            groups: N, the same in every batch but the last of an epoch.
            batch: number of the batch since the start of the run, 0 first.
            rank: of the process.
            tasks_N: the task of each group; the tasks that were labelled least come first. Empty: it does not matter.
            asked: groups that were labelled so far, by task.
        """
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + batch) * 1_009 + rank)
        order = torch.randperm(groups, generator=generator)
        if self.fraction is None:
            count = 1
        else:
            offset = float(torch.rand((), generator=torch.Generator().manual_seed(self.seed * 1_009 + rank)))
            share = self.fraction * groups
            count = math.floor(share * (batch + 1) + offset) - math.floor(share * batch + offset)
        labelled_N = torch.zeros(groups, dtype=torch.bool)
        left, taken = order.tolist(), dict(asked)
        for _ in range(min(count, groups)):
            n = min(left, key=lambda n: taken.get(tasks_N[n], 0)) if tasks_N else left[0]  # the first of the least
            left.remove(n)
            labelled_N[n] = True
            if tasks_N:
                taken[tasks_N[n]] = taken.get(tasks_N[n], 0) + 1
        return labelled_N
