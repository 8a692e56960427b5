"""Hand-computed values of normalisation, scalarisation, gating and group advantages."""

from __future__ import annotations

import math

import pytest
import torch

from maestro_pl.algorithm.advantages import (
    apply_gate,
    batch_advantages,
    dead_groups,
    group_advantages,
    normalize_rewards,
    scalarise,
)

NAN = math.nan


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


ALL = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("how", "values", "expected"),
    [
        ("none", [1, 2, 3, 6], [1, 2, 3, 6]),
        # mean 3, sample variance (4 + 1 + 0 + 9) / 3
        ("zscore", [1, 2, 3, 6], [-2 / math.sqrt(14 / 3), -1 / math.sqrt(14 / 3), 0, 3 / math.sqrt(14 / 3)]),
        ("minmax", [1, 2, 3, 6], [0, 0.2, 0.4, 1]),
        ("rank", [1, 2, 3, 6], [0, 1 / 3, 2 / 3, 1]),
        ("rank", [5, 1, 5, 9], [0.5, 0, 0.5, 1]),  # ties share the average of ranks 1 and 2
        ("zscore", [7, 7, 7, 7], [0, 0, 0, 0]),
        ("rank", [7, 7, 7, 7], [0.5, 0.5, 0.5, 0.5]),
        ("minmax", [7, 7, 7, 7], [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_normalize_a_group(how: str, values: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(normalize_rewards(tensor(*values), ALL, 4, how), tensor(*expected))


def test_normalize_leaves_out_what_does_not_apply_and_keeps_groups_apart() -> None:
    values = tensor(1, 100, 3, 2, 10, 30, 20, 40)
    mask = torch.tensor([True, False, True, True, True, True, True, True])
    expected = tensor(0, 0, 1, 0.5, 0, 2 / 3, 1 / 3, 1)
    torch.testing.assert_close(normalize_rewards(values, mask, 4, "rank"), expected)
    torch.testing.assert_close(normalize_rewards(values, mask, 4, "minmax")[:4], tensor(0, 0, 1, 0.5))
    torch.testing.assert_close(normalize_rewards(values, mask, 4, "zscore")[:4], tensor(-1, 0, 1, 0))


@pytest.mark.parametrize(("how", "middle"), [("zscore", 0.0), ("rank", 0.5), ("minmax", 0.5)])
def test_rounding_is_no_signal(how: str, middle: float) -> None:
    values = tensor(2, 2, 2, 2) + torch.tensor([0.0, 5e-7, 0.0, 0.0])
    assert values.unique().numel() == 2
    assert normalize_rewards(values, ALL, 4, how).tolist() == [middle] * 4


@pytest.mark.parametrize("how", ["zscore", "rank", "minmax"])
def test_a_group_with_one_applicable_value_carries_no_signal(how: str) -> None:
    mask = torch.tensor([False, True, False, False])
    middle = 0.0 if how == "zscore" else 0.5
    torch.testing.assert_close(normalize_rewards(tensor(1, 5, 2, 3), mask, 4, how), tensor(0, middle, 0, 0))


def test_scalarise_weighs_applicable_rewards_only() -> None:
    rewards = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    scalar = scalarise(rewards, weights, mask)
    assert scalar[:2].tolist() == [5.5, 2.0]
    assert scalar[2].isnan()


def test_group_advantages_by_hand() -> None:
    scalar = tensor(0, 1, 2, 3, 0, 0, 0, 4)
    std = math.sqrt(5 / 3)
    torch.testing.assert_close(group_advantages(scalar, 4)[:4], tensor(-1.5, -0.5, 0.5, 1.5) / (std + 1e-4))
    torch.testing.assert_close(group_advantages(scalar, 4)[4:], tensor(-1, -1, -1, 3) / (2 + 1e-4))
    torch.testing.assert_close(group_advantages(scalar, 4, "none"), tensor(-1.5, -0.5, 0.5, 1.5, -1, -1, -1, 3))
    batch_std = scalar.std()
    torch.testing.assert_close(
        group_advantages(scalar, 4, "batch"), tensor(-1.5, -0.5, 0.5, 1.5, -1, -1, -1, 3) / (batch_std + 1e-4)
    )


def test_advantages_skip_responses_without_a_reward() -> None:
    advantages = group_advantages(tensor(1, NAN, 3, NAN), 4, "none")
    assert advantages.tolist() == [-1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.7, 0.0])
def test_single_valued_groups_have_exactly_zero_advantage(scale: str, value: float) -> None:
    noise = torch.tensor([0.0, 1e-7, -1e-7, 0.0]) * abs(value)  # the rounding of a weighted sum
    advantages = group_advantages(torch.cat([tensor(*[value] * 4) + noise, tensor(1, 2, 3, 4)]), 4, scale)
    assert (advantages[:4] == 0).all()
    assert dead_groups(advantages, 4).tolist() == [True, False]


def test_gate_is_a_product_for_rewards_of_at_least_zero() -> None:
    gated = apply_gate(tensor(0.2, 0.8, 0.5, 0.9), tensor(1, 0, 0.5, 1), 4)
    torch.testing.assert_close(gated, tensor(0.2, 0, 0.25, 0.9))


def test_a_closed_gate_never_beats_an_open_one() -> None:
    gated = apply_gate(tensor(-2.0, 1.5, NAN, 0.3), tensor(1, 0, 1, 1), 4)
    assert gated[:2].tolist() == [-2.0, -2.0]
    assert gated[2].isnan()
    torch.testing.assert_close(gated[3], torch.tensor(0.3))


HUGE_AND_TINY = [
    ((1e19, 2e19, 3e19, 6e19), (1, 2, 3, 6)),
    ((1e-30, 2e-30, 3e-30, 6e-30), (1, 2, 3, 6)),
    ((1e30, 1, 1, 1), (1, 0, 0, 0)),
    ((3e38, 3e38, 3e38, 1), (1, 1, 1, 0)),
    ((3e38, -3e38, 0, 0), (1, -1, 0, 0)),
]


@pytest.mark.parametrize("how", ["zscore", "rank", "minmax"])
@pytest.mark.parametrize(("values", "same"), HUGE_AND_TINY)
def test_normalising_is_the_same_at_every_scale(values: tuple[float, ...], same: tuple[float, ...], how: str) -> None:
    mine, expected = (normalize_rewards(tensor(*v), ALL, 4, how) for v in (values, same))  # type: ignore[arg-type]
    if how == "rank" and values[1:] == (1, 1, 1):
        expected = tensor(1, 1 / 3, 1 / 3, 1 / 3)
    torch.testing.assert_close(mine, expected, atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize(("values", "same"), [case for case in HUGE_AND_TINY if case[0][0] > 1])
def test_advantages_of_huge_rewards(values: tuple[float, ...], same: tuple[float, ...]) -> None:
    unit = torch.tensor(same, dtype=torch.float64)
    expected = ((unit - unit.mean()) / unit.std()).float()
    for mine in (
        group_advantages(tensor(*values), 4),
        group_advantages(tensor(*values), 4, "batch"),
        batch_advantages(tensor(*values), 4),
    ):
        torch.testing.assert_close(mine, expected, atol=3e-7, rtol=1e-6)
    assert group_advantages(tensor(*values), 4, "none").isfinite().all()


def test_the_scaling_changes_no_digit_of_ordinary_rewards() -> None:
    """In plain float32 arithmetic, as the formulas read."""
    torch.manual_seed(0)
    for scale in (1e-4, 1.0, 1e4):
        values = torch.randn(40, 8) * scale + scale
        centred = values - values.sum(1, keepdim=True) / 8
        std = (centred.square().sum(1, keepdim=True) / 7).sqrt()
        assert torch.equal(
            normalize_rewards(values.view(-1), torch.ones(320).bool(), 8, "zscore"), (centred / std).view(-1)
        )
        assert torch.equal(group_advantages(values.view(-1), 8), (centred / (std + 1e-4)).view(-1))
        batch = (centred / (values.view(-1).std() + 1e-4)).view(-1)
        assert torch.equal(group_advantages(values.view(-1), 8, "batch"), batch)
