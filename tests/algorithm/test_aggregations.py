"""GDPO, MO-GRPO, DVAO and the filter of GD2PO, by hand."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_pl.algorithm.advantages import (
    Weighed,
    advantages_of,
    consensus_factor,
    dropped_share,
    standardize_rewards,
    weighed_spread,
)
from maestro_pl.algorithm.settings import Advantages
from maestro_pl.errors import UserError

EPS = 1e-4
SD = math.sqrt(5 / 3)  # of 1, 2, 3, 4


def parts(rewards: list[list[float]], weights: list[list[float]], mask: list[list[bool]] | None = None) -> Weighed:
    rewards_BK = torch.tensor(rewards)
    mask_BK = torch.ones_like(rewards_BK).bool() if mask is None else torch.tensor(mask)
    return Weighed(rewards_BK, torch.tensor(weights), mask_BK)


def scalar_of(weighed: Weighed) -> Tensor:
    return (weighed.rewards_BK * weighed.weights_BK * weighed.mask_BK).sum(1)


# -- GDPO
# ------------------------------------------------------------------------------------------------------------


def two_groups() -> Weighed:
    """Group 1 weighed on each response's own best reward, group 2 alike in every reward."""
    rewards_BK = standardize_rewards(
        torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2 + [[5.0, 5.0]] * 4), torch.ones(8, 2).bool(), 4
    )
    return Weighed(rewards_BK, torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2 + [[0.5, 0.5]] * 4), torch.ones(8, 2).bool())


def test_gdpo_takes_off_the_groups_own_mean() -> None:
    weighed = two_groups()
    scalar_B = scalar_of(weighed)
    assert scalar_B[:4].tolist() == pytest.approx([math.sqrt(3 / 4)] * 4, abs=1e-3)  # (1/2) / sqrt(1/3)
    advantages_B = advantages_of(scalar_B, 4, Advantages("normalize_then_sum"), weighed)
    assert advantages_B.tolist() == [0.0] * 8  # with the batch's mean: +0.935 four times, -0.935 four times


def test_gdpo_by_hand() -> None:
    settings = Advantages("normalize_then_sum")
    scalar_B = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 10.0, 12.0, 12.0])
    centred = [-1.5, -0.5, 0.5, 1.5, -1.0, -1.0, 1.0, 1.0]
    spread = math.sqrt(sum(value**2 for value in centred) / 7) + EPS
    assert advantages_of(scalar_B, 4, settings).tolist() == pytest.approx([value / spread for value in centred])


def on_two_ranks(halves: tuple[Tensor, Tensor], settings: Advantages) -> Tensor:
    """The advantages of two ranks with a half each, which wait for each other in every collective call."""
    barrier = threading.Barrier(2, timeout=30)
    shared: list[Tensor] = list(halves)

    def rank(number: int) -> Tensor:
        def everywhere(values: Tensor) -> Tensor:
            shared[number] = values
            barrier.wait()
            both = torch.cat(shared)
            barrier.wait()
            return both

        return advantages_of(halves[number], 4, settings, everywhere=everywhere)

    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(rank, (0, 1))))


@pytest.mark.parametrize("settings", [Advantages("normalize_then_sum"), Advantages(scale="batch")])
def test_the_batch_is_that_of_all_ranks(settings: Advantages) -> None:
    scalar_B = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 10.0, math.nan, 12.0])
    together = advantages_of(scalar_B, 4, settings)
    torch.testing.assert_close(on_two_ranks((scalar_B[:4], scalar_B[4:]), settings), together)
    assert not torch.allclose(advantages_of(scalar_B[:4], 4, settings), together[:4])


# -- MO-GRPO
# ---------------------------------------------------------------------------------------------------------


def test_mo_grpo_by_hand() -> None:
    """Rewards of any scale pull alike, and nothing divides their sum."""
    z_BK = standardize_rewards(
        torch.tensor([[1.0, 400.0], [2.0, 300.0], [3.0, 200.0], [4.0, 200.0]]), torch.ones(4, 2).bool(), 4
    )
    weighed = Weighed(z_BK, torch.full((4, 2), 0.5), torch.ones(4, 2).bool())
    first = [value / (SD + EPS) for value in (-1.5, -0.5, 0.5, 1.5)]
    sd = math.sqrt((125.0**2 + 25.0**2 + 2 * 75.0**2) / 3)
    second = [value / (sd + EPS) for value in (125.0, 25.0, -75.0, -75.0)]
    got = advantages_of(scalar_of(weighed), 4, Advantages("mo_grpo"), weighed)
    assert got.tolist() == pytest.approx([0.5 * (a + b) for a, b in zip(first, second, strict=True)], rel=1e-5)


# -- DVAO
# ------------------------------------------------------------------------------------------------------------


def test_dvao_by_hand() -> None:
    weighed = parts([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]], [[0.75, 0.25]] * 4)
    assert weighed_spread(weighed, scalar_of(weighed), 4).tolist() == pytest.approx([SD])
    got = advantages_of(scalar_of(weighed), 4, Advantages("dvao"), weighed)
    # 0.75 r - 0.25 r: half of the reward's own advantages, where the group's standard deviation would give all of it
    assert got.tolist() == pytest.approx([0.5 * value / (SD + EPS) for value in (-1.5, -0.5, 0.5, 1.5)])


def test_dvao_counts_what_applies() -> None:
    weighed = parts(
        [[1.0, 7.0], [2.0, 0.0], [3.0, 9.0], [4.0, 0.0]],
        [[0.5, 0.5], [1.0, 0.0]] * 2,
        [[True, True], [True, False]] * 2,
    )
    # R = 4, 2, 6, 4 less 0.75 r and less 0.5 times 7, 8 (its mean), 9, 8: -0.25, -3.5, -0.75, -3
    rest = math.sqrt((1.625**2 + 1.625**2 + 1.125**2 + 1.125**2) / 3)
    spread = 0.75 * SD + 0.5 * math.sqrt(2.0) + rest
    assert weighed_spread(weighed, scalar_of(weighed), 4).tolist() == pytest.approx([spread])
    alike = parts([[3.0, 1.0]] * 4, [[0.5, 0.5]] * 4)
    assert advantages_of(scalar_of(alike), 4, Advantages("dvao"), alike).tolist() == [0.0] * 4


MOST = 3 / math.sqrt(4)  # the largest advantage of a single reward in a group of four: (G - 1) / sqrt(G)


@pytest.mark.parametrize(
    ("rewards", "weights", "mask", "more"),
    [
        ([[1.0, 0.0]] * 4, [[1.0, 0.0], [0.0, 1.0]] * 2, None, None),  # one reward for each response
        ([[1.0, 1.0]] * 4, [[0.5, 0.5]] * 4, None, [0.0, 0.0, -1.0, 0.0]),  # a gate
        ([[1.0, 1.0]] * 4, [[0.5, 0.5]] * 4, None, [-0.01, -0.02, 0.0, -0.03]),  # a penalty
        ([[1.0, 3.0]] * 4, [[0.5, 0.5], [1.0, 0.0]] * 2, [[True, True], [True, False]] * 2, None),
        (
            [[0.01, 0.0], [0.0, 0.02], [0.01, 0.01], [0.0, 0.0]],
            [[0.5, 0.5]] * 4,
            None,
            [0.7, -1.1, 0.2, 0.2],
        ),  # an anchor
    ],
)
def test_dvao_is_bounded_whatever_moves_the_scalar_reward(rewards: Any, weights: Any, mask: Any, more: Any) -> None:
    weighed = parts(rewards, weights, mask)
    scalar_B = scalar_of(weighed) + (0.0 if more is None else torch.tensor(more))
    got = advantages_of(scalar_B, 4, Advantages("dvao"), weighed)
    assert 0.1 < float(got.abs().max()) <= MOST + 1e-6
    torch.testing.assert_close(got.sign(), (scalar_B - scalar_B.mean()).sign())


# -- GD2PO
# -----------------------------------------------------------------------------------------------------------


def conflicting() -> Weighed:
    """Standardised, +-0.866 in both rewards: responses 2 and 3 are pulled both ways, with nothing left."""
    return parts([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.5, 0.5]] * 4)


def test_responses_that_are_pulled_both_ways_are_dropped() -> None:
    settings = Advantages(min_consensus=0.2)
    factor_B = consensus_factor(conflicting(), 4, settings)
    assert factor_B is not None
    assert factor_B.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert float(dropped_share(conflicting(), 4, settings)["group/dropped"]) == 0.5
    assert consensus_factor(conflicting(), 4, Advantages()) is None
    assert dropped_share(conflicting(), 4, Advantages()) == {}


def test_what_a_gate_or_an_anchor_speaks_of_is_kept() -> None:
    weighed = conflicting()._replace(kept_B=torch.tensor([False, True, False, False]))
    factor_B = consensus_factor(weighed, 4, Advantages(min_consensus=0.2))
    assert factor_B is not None
    assert factor_B.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_weights_decide_how_much_of_the_pull_is_left() -> None:
    weighed = conflicting()._replace(weights_BK=torch.tensor([[0.7, 0.3]] * 4))  # 0.4 of the pull is left
    for least, kept in ((0.39, 1.0), (0.41, 0.0)):
        factor_B = consensus_factor(weighed, 4, Advantages(min_consensus=least))
        assert factor_B is not None
        assert factor_B[1:3].tolist() == [kept, kept]


def test_the_share_that_was_kept_counts() -> None:
    weighed = Weighed(*(torch.cat([part, part[[0, 0, 3, 3]]]) for part in conflicting()[:3]))
    factor_B = consensus_factor(weighed, 4, Advantages(min_consensus=0.2, consensus_scale=True))
    assert factor_B is not None
    assert factor_B.tolist() == [0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]


def test_dropped_responses_have_no_advantage_and_no_part_in_the_spread() -> None:
    weighed = parts([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.5, 0.5]] * 4)
    scalar_B = torch.tensor([3.0, 1.0, -1.0, -3.0])
    got = advantages_of(scalar_B, 4, Advantages("normalize_then_sum", min_consensus=0.2), weighed)
    spread = math.sqrt(18.0) + EPS  # of 3 and -3
    assert got.tolist() == pytest.approx([3.0 / spread, 0.0, 0.0, -3.0 / spread])
    got = advantages_of(scalar_B, 4, Advantages(min_consensus=0.2), weighed)
    assert got.tolist() == pytest.approx([3.0 / (math.sqrt(20 / 3) + EPS), 0.0, 0.0, -3.0 / (math.sqrt(20 / 3) + EPS)])


# -- what cannot be used
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"aggregation": "gdpo"}, "expected one of sum_then_normalize, normalize_then_sum, mo_grpo, dvao"),
        ({"aggregation": "dvao", "scale": "batch"}, "has a scale of its own"),
        ({"min_consensus": 1.5}, r"a share in \[0, 1\]"),
        ({"consensus_scale": True}, "which drops nothing"),
    ],
)
def test_bad_settings_are_sentences(options: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Advantages(**options)
