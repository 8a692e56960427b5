"""The GRPO loss against values worked out by hand, and against autograd on a softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from maestro_pl import KL, Loss
from maestro_pl.algorithm.losses import TokenBatch, grpo_loss, k3, segment_sum, token_weights
from maestro_pl.errors import UserError

LENGTHS = torch.tensor([1, 3])


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ("dapo", [1 / 4] * 4),
        ("bnpo", [1 / 4] * 4),
        ("dr_grpo", [1 / 20] * 4),
    ],
)
def test_token_weights(loss_type: str, expected: list[float]) -> None:
    weights = token_weights(loss_type, LENGTHS, torch.tensor([True, True]), 10)
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [("grpo", [1 / 2, 0, 0, 0]), ("dapo", [1, 0, 0, 0]), ("dr_grpo", [1 / 20, 0, 0, 0])],
)
def test_token_weights_of_inactive_responses_are_zero(loss_type: str, expected: list[float]) -> None:
    weights = token_weights(loss_type, LENGTHS, torch.tensor([True, False]), 10)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_loss_by_hand_with_clipping_on_both_sides() -> None:
    ratios = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    advantages = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0])
    old = torch.full((5,), -1.0)
    batch = TokenBatch(old + ratios.log(), old, advantages, torch.full((5,), 0.2))
    loss, sums = grpo_loss(batch, loss=Loss(clip_low=0.2, clip_high=0.3))
    # min(rho A, clip A): 2, min(1.5, 1.3), min(0.5, 0.8), min(-1.5, -1.3), min(-0.5, -0.8)
    assert float(loss) == pytest.approx(-(2 + 1.3 + 0.5 - 1.5 - 0.8) / 5, abs=1e-6)
    assert float(sums["clip"]) == 2  # 1.5 with A > 0 and 0.5 with A < 0


def test_kl_is_added_per_token() -> None:
    logps, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    batch = TokenBatch(logps, logps, torch.zeros(2), torch.full((2,), 0.5), ref)
    loss, sums = grpo_loss(batch, kl=KL(coef=0.1))
    by_hand = (math.exp(-0.5) + 0.5 - 1) + (math.exp(1.0) - 1 - 1)
    assert float(sums["kl"]) == pytest.approx(by_hand, rel=1e-6)
    assert float(loss) == pytest.approx(0.1 * by_hand / 2, rel=1e-6)


def test_on_policy_gradient_is_that_of_reinforce() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    chosen = torch.tensor([0, 3, 4])
    logps = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    advantages, weights = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.2, 0.3, 0.5])
    loss, _ = grpo_loss(TokenBatch(logps, logps.detach(), advantages, weights))
    (gradient,) = torch.autograd.grad(loss, logits)
    probabilities = logits.detach().softmax(-1)
    one_hot = torch.nn.functional.one_hot(chosen, 5)
    torch.testing.assert_close(gradient, -(weights * advantages)[:, None] * (one_hot - probabilities))


def test_clipped_tokens_have_no_gradient() -> None:
    logps = torch.tensor([math.log(1.5), math.log(0.5)], requires_grad=True)
    batch = TokenBatch(logps, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2))
    loss, _ = grpo_loss(batch)
    loss.backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [0.0, 0.0]


def test_k3_is_zero_only_where_both_agree() -> None:
    values = k3(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -3.0]))
    assert float(values[0]) == 0.0
    assert float(values[1]) == pytest.approx(math.exp(-2) + 2 - 1)


def test_segment_sum() -> None:
    assert segment_sum(torch.tensor([1.0, 2.0, 3.0, 4.0]), LENGTHS).tolist() == [1.0, 9.0]


def test_a_loss_of_ones_own_by_hand() -> None:
    def squared(batch: TokenBatch, loss: Loss) -> torch.Tensor:
        return -batch.advantages_T * batch.logps_T + loss.clip_low * batch.logps_T**2

    logps_T = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    batch = TokenBatch(
        logps_T,
        logps_T.detach(),
        torch.tensor([1.0, 1.0, -2.0]),
        token_weights(squared, torch.tensor([2, 1]), torch.tensor([True, True]), 8),
        ref_logps_T=logps_T.detach(),
        chosen_T=torch.tensor([True, False, True]),
    )
    loss, sums = grpo_loss(batch, Loss(type=squared, clip_low=0.5), KL(coef=0.1))
    # (1 + 0.5) / 3, nothing of the token that was not chosen, (-1 + 0.125) / 3; the KL term is 0 at the reference
    assert float(loss.detach()) == pytest.approx((1.5 - 0.875) / 3)
    loss.backward()
    assert logps_T.grad is not None
    assert logps_T.grad.tolist() == pytest.approx([(-1 - 1) / 3, 0.0, (2 - 0.5) / 3])
    assert float(sums["kl"]) == 0
    assert Loss(type=squared).settings["type"].endswith("squared")


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda batch, loss: batch.logps_T.sum(), r"gave \[\]: expected the loss of every token, .* \[3\]"),
        (lambda batch, loss: 0.0, "gave float: expected the loss of every token"),
        (lambda batch, loss: batch.logps_T.detach(), "has no gradient, so nothing would be learned"),
    ],
)
def test_a_loss_of_ones_own_that_is_none(function: Any, sentence: str) -> None:
    logps_T = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    batch = TokenBatch(logps_T, logps_T.detach(), torch.ones(3), torch.ones(3))
    with pytest.raises(UserError, match=sentence):
        grpo_loss(batch, Loss(type=function))
