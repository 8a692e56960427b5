"""The training stream: each prompt once an epoch, exact mixtures, a place that can be resumed, shares for ranks."""

from __future__ import annotations

import pytest

from maestro_pl.data.sampling import (
    PromptStream,
    SequentialSampler,
    StreamSampler,
    mixture_draws,
    permutation,
    rank_positions,
)
from maestro_pl.errors import UserError

FIXED_ORDER = [0, 3, 7, 4, 1, 5, 2, 6]


def test_permutation_is_fixed_for_all_releases() -> None:
    assert permutation(8, 0, 0) == FIXED_ORDER
    assert permutation(8, 0, 1) != permutation(8, 0, 0)
    assert permutation(8, 1, 0) != permutation(8, 0, 0)


def test_every_epoch_has_each_row_once_in_another_order() -> None:
    stream = PromptStream([3, 4], None, seed=0)
    epochs = [[stream.row(p) for p in range(7 * e, 7 * e + 7)] for e in range(3)]
    assert [sorted(rows) for rows in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_stream_is_a_pure_function_of_seed_and_position() -> None:
    forwards, backwards = PromptStream([20], None, seed=3), PromptStream([20], None, seed=3)
    there = [forwards.row(p) for p in range(100)]
    assert [backwards.row(p) for p in reversed(range(100))] == there[::-1]
    assert [PromptStream([20], None, seed=4).row(p) for p in range(100)] != there


def test_mixture_has_the_exact_share_in_every_epoch_and_exhausts_a_source_before_repeating() -> None:
    # 100 rows, weights 3 : 1 : 0 -> 75 draws of source 0 (10 rows), 25 of source 1 (60 rows), none of source 2
    stream = PromptStream([10, 60, 30], [3, 1, 0], seed=0)
    assert stream.draws == [75, 25, 0]
    assert stream.epoch_length == 100
    drawn: list[int] = []
    for epoch in range(4):
        rows = stream.order(epoch)
        assert sum(row < 10 for row in rows) == 75
        assert sum(10 <= row < 70 for row in rows) == 25
        drawn += rows
    # 300 draws of 10 rows: each exactly 30 times; 100 draws of 60 rows: each once or twice
    assert [drawn.count(row) for row in range(10)] == [30] * 10
    assert {drawn.count(row) for row in range(10, 70)} == {1, 2}
    first_60 = [row for epoch in range(3) for row in sorted(r for r in stream.order(epoch) if 10 <= r < 70)][:50]
    assert len(set(first_60)) == 50


def test_mixed_sources_are_shuffled_together() -> None:
    rows = PromptStream([50, 50], [1, 1], seed=0).order(0)
    first_half = sum(row < 50 for row in rows[:50])
    assert 10 < first_half < 40


def test_mixture_draws_round_and_never_lose_a_weighted_source() -> None:
    assert mixture_draws([10, 90], [1, 2]) == [33, 67]
    assert mixture_draws([10, 90], [0.001, 1]) == [1, 100]
    with pytest.raises(UserError, match=r"weights of data\.sources are \[0, 0\]; expected at least one above 0"):
        mixture_draws([1, 1], [0, 0])
    with pytest.raises(UserError, match=r"Source 2 of data\.sources has weight 1 but no training rows"):
        mixture_draws([1, 0], [1, 1])


def test_batches_end_with_the_epoch() -> None:
    stream = PromptStream([7], None, seed=0)
    assert [stream.batch_stop(p, 3) for p in (0, 3, 6, 7, 10, 13)] == [3, 6, 7, 10, 13, 14]


def test_ranks_share_a_batch_evenly() -> None:
    assert [rank_positions(10, 16, rank, 2) for rank in (0, 1)] == [[10, 12, 14], [11, 13, 15]]
    # five rows for two ranks: the first fills the gap
    assert [rank_positions(10, 15, rank, 2) for rank in (0, 1)] == [[10, 12, 14], [11, 13, 10]]
    # one row for four ranks
    assert [rank_positions(10, 11, rank, 4) for rank in range(4)] == [[10]] * 4


def test_all_ranks_together_see_the_epoch_once_and_equally_many_batches() -> None:
    stream = PromptStream([23], None, seed=0)
    ranks = [list(StreamSampler(stream, batch_size=2, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [4, 4, 4]
    seen = [place for batches in ranks for batch in batches for place in batch]
    assert {position for position, _ in seen} == set(range(23))
    assert sorted({row for _, row in seen}) == list(range(23))
    assert len(seen) == 24  # one row stands in for the one that is missing
    single = [place for batch in StreamSampler(stream, batch_size=6) for place in batch]
    assert sorted(set(seen)) == single


def test_sampler_moves_with_training_and_not_with_fetching() -> None:
    sampler = StreamSampler(PromptStream([5], None, seed=0), batch_size=2)
    assert len(sampler) == 3
    first = [[position for position, _ in batch] for batch in sampler]
    assert first == [[0, 1], [2, 3], [4]]
    assert [[p for p, _ in batch] for batch in sampler] == first
    sampler.advance()
    assert (sampler.position(in_flight=False), sampler.position(in_flight=True)) == (2, 0)
    assert [[p for p, _ in batch] for batch in sampler] == [[2, 3], [4], [5, 6]]
    sampler.advance()
    sampler.advance()
    assert sampler.position(in_flight=False) == 5
    assert next(iter(sampler))[0] == (5, sampler.stream.order(1)[0])


def test_frozen_sampler_repeats_its_first_batches() -> None:
    sampler = StreamSampler(PromptStream([5], None, seed=0), batch_size=2, frozen=True)
    before = list(sampler)
    sampler.advance()
    assert list(sampler) == before


def test_evaluation_goes_in_order() -> None:
    assert list(SequentialSampler(5, 2)) == [[(0, 0), (1, 1)], [(2, 2), (3, 3)], [(4, 4)]]
    assert [list(SequentialSampler(3, 1, rank, 2)) for rank in (0, 1)] == [
        [[(0, 0)], [(2, 2)]],
        [[(1, 1)], [(2, 2)]],
    ]
    assert len(SequentialSampler(0, 2)) == 0
