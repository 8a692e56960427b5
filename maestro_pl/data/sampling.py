"""The order of training prompts: an endless stream that is a pure function of a seed, and its place in it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from maestro_pl.errors import UserError


def permutation(n: int, *seeds: object) -> list[int]:
    """0 ... n - 1 in an order that depends on the seeds alone.

    Sorting by ``random.Random(str).random()`` is the one shuffle whose order Python promises to keep between releases:
    a run resumed after an upgrade goes on in the same order.
    """
    generator = random.Random("/".join(map(str, seeds)))
    keys = [generator.random() for _ in range(n)]
    return sorted(range(n), key=keys.__getitem__)


class PromptStream:
    """The endless training stream: position p is row ``row(p)``, and every ``epoch_length`` positions are an epoch.

    Without weights an epoch is a permutation of all rows. With weights, source s has
    ``round(weight_s / sum(weights) * rows)`` places in every epoch, which it fills from its own endless chain of
    permutations, so that none of its rows comes twice before all have come once.

    Args:
        sizes: how many rows each source has; the rows of all sources are numbered through.
        source_weights: one number a source, or None.
        seed: another seed, another order.
    """

    def __init__(self, sizes: Sequence[int], source_weights: Sequence[float] | None, seed: int) -> None:
        self.sizes, self.seed = list(sizes), seed
        self.draws = None if source_weights is None else mixture_draws(sizes, source_weights)
        self.epoch_length = sum(self.sizes if self.draws is None else self.draws)
        self._orders: dict[int, list[int]] = {}

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch, in order."""
        if epoch not in self._orders:
            # the epoch in progress and the one before or after it are all that a batch can ask for
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            self._orders[epoch] = self._shuffled(epoch)
        return self._orders[epoch]

    def row(self, position: int) -> int:
        """The row at a place in the stream."""
        epoch, place = divmod(position, self.epoch_length)
        return self.order(epoch)[place]

    def batch_stop(self, start: int, size: int) -> int:
        """Where the batch that starts here ends: after ``size`` positions, or earlier with the epoch."""
        return min(start + size, (start // self.epoch_length + 1) * self.epoch_length)

    def _shuffled(self, epoch: int) -> list[int]:
        if self.draws is None:
            return permutation(self.epoch_length, self.seed, epoch)
        rows: list[int] = []
        first = 0
        for source, (size, draws) in enumerate(zip(self.sizes, self.draws, strict=True)):
            rows += [first + row for row in self._drawn(source, size, epoch * draws, draws)]
            first += size
        return [rows[place] for place in permutation(len(rows), self.seed, "mix", epoch)]

    def _drawn(self, source: int, size: int, start: int, draws: int) -> list[int]:
        """Draws ``start`` to ``start + draws`` of a source's chain of permutations."""
        drawn: list[int] = []
        while len(drawn) < draws:
            cycle, place = divmod(start + len(drawn), size)
            drawn += permutation(size, self.seed, "source", source, cycle)[place:]
        return drawn[:draws]


def mixture_draws(sizes: Sequence[int], source_weights: Sequence[float]) -> list[int]:
    """How many places each source has in an epoch as long as all rows together: its share of the weights, rounded.

    Raises:
        UserError: no weight is above 0, or a source with a weight has no rows.
    """
    total = sum(source_weights)
    if total <= 0:
        raise UserError(f"The weights of data.sources are {list(source_weights)}; expected at least one above 0.")
    for source, (size, weight) in enumerate(zip(sizes, source_weights, strict=True)):
        if weight > 0 and not size:
            raise UserError(f"Source {source + 1} of data.sources has weight {weight} but no training rows.")
    # a source with a weight, however small, has its place
    return [max(1, round(w / total * sum(sizes))) if w > 0 else 0 for w in source_weights]


def rank_positions(start: int, stop: int, rank: int, world_size: int) -> list[int]:
    """The positions of a global batch that one rank takes: every ``world_size``-th, from its own number on.

    If the batch cannot be shared out evenly, it is filled up with its own first positions, so that every rank has
    equally many and none waits for ever.
    """
    size = stop - start
    padded = math.ceil(size / world_size) * world_size
    return [start + place % size for place in range(rank, padded, world_size)]


class StreamSampler:
    """Yields training batches as lists of (position, row), and knows how far training has come.

    The loop may fetch ahead, so what was yielded is not what was trained on: whoever trains calls ``advance`` for each
    batch it takes up, and ``start`` moves with these calls alone. Iterating begins there, and yields as many batches as
    an epoch has; a batch never spans two epochs, so the last one of an epoch may be short.

    Args:
        stream: the order.
        batch_size: prompts a step and rank.
        rank: this process.
        world_size: how many there are.
        start: the first position not yet trained on.
        frozen: always begin at the start of the stream (``overfit_batches``).
    """

    def __init__(
        self,
        stream: PromptStream,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        frozen: bool = False,
    ) -> None:
        self.stream, self.global_size = stream, batch_size * world_size
        self.rank, self.world_size = rank, world_size
        self.start = self.before = start
        self.frozen = frozen

    def __len__(self) -> int:
        return math.ceil(self.stream.epoch_length / self.global_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = 0 if self.frozen else self.start
        for _ in range(len(self)):
            stop = self.stream.batch_stop(start, self.global_size)
            positions = rank_positions(start, stop, self.rank, self.world_size)
            yield [(position, self.stream.row(position)) for position in positions]
            start = stop

    def advance(self) -> None:
        """Note that training has taken up the next batch."""
        self.before, self.start = self.start, self.stream.batch_stop(self.start, self.global_size)

    def position(self, in_flight: bool) -> int:
        """The first position not yet trained on; ``in_flight``: the batch taken up last is not done."""
        return self.before if in_flight else self.start


class SequentialSampler:
    """Yields evaluation batches as lists of (position, row), in order, shared out among the ranks.

    Where the rows cannot be shared out evenly, some come twice: equal positions tell.
    """

    def __init__(self, rows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.rows, self.global_size = rows, batch_size * world_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return math.ceil(self.rows / self.global_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, self.rows, self.global_size):
            stop = min(start + self.global_size, self.rows)
            yield [(p, p) for p in rank_positions(start, stop, self.rank, self.world_size)]
