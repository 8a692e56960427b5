"""The correction for an engine that is not the trainer, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from maestro_pl import KL, Loss
from maestro_pl.algorithm.losses import RolloutTokens, TokenBatch, grpo_loss
from maestro_pl.algorithm.mismatch import mismatch_correction
from maestro_pl.errors import UserError

LENGTHS = torch.tensor([2, 3])
RATIOS = torch.tensor([2.0, 4.0, 0.5, 1.0, 3.5])  # products 8 and 1.75
ENGINE = torch.full((5,), -2.0)


@pytest.mark.parametrize(
    ("kind", "expected", "masked"),
    [
        ("token_truncate", [2.0, 3.0, 0.5, 1.0, 3.0], 2 / 5),
        ("token_mask", [2.0, 0.0, 0.5, 1.0, 0.0], 2 / 5),
        ("sequence_truncate", [3.0, 3.0, 1.75, 1.75, 1.75], 2 / 5),
        ("sequence_mask", [0.0, 0.0, 1.75, 1.75, 1.75], 2 / 5),
    ],
)
def test_each_kind_by_hand(kind: Any, expected: list[float], masked: float) -> None:
    logps = (ENGINE + RATIOS.log()).requires_grad_()
    correction, metrics = mismatch_correction(logps, ENGINE, LENGTHS, kind, cap=3.0)
    assert correction is not None
    assert not correction.requires_grad
    torch.testing.assert_close(correction, torch.tensor(expected))
    assert float(metrics["engine/masked"]) == pytest.approx(masked)
    assert float(metrics["engine/ratio_max"]) == pytest.approx(4.0)
    kl = sum(r - math.log(r) - 1 for r in RATIOS.tolist()) / 5
    assert float(metrics["engine/kl"]) == pytest.approx(kl)


def test_none_measures_and_corrects_nothing() -> None:
    correction, metrics = mismatch_correction(ENGINE + RATIOS.log(), ENGINE, LENGTHS, "none")
    assert correction is None
    assert set(metrics) == {"engine/kl", "engine/ratio_max"}


@pytest.mark.parametrize("kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_equal_programs_are_corrected_by_exactly_one(kind: Any) -> None:
    correction, metrics = mismatch_correction(ENGINE, ENGINE.clone(), LENGTHS, kind)
    assert torch.equal(correction, torch.ones(5))  # type: ignore[arg-type]
    assert float(metrics["engine/kl"]) == 0.0


def test_a_ratio_beyond_all_numbers_is_cut_like_any_other() -> None:
    logps, engine = torch.zeros(4), torch.full((4,), -60.0)
    lengths = torch.tensor([4])
    assert mismatch_correction(logps, engine, lengths, "sequence_truncate")[0].tolist() == [3.0] * 4  # type: ignore[union-attr]
    assert mismatch_correction(logps, engine, lengths, "sequence_mask")[0].tolist() == [0.0] * 4  # type: ignore[union-attr]


def test_an_empty_rollout_has_no_mean() -> None:
    none = torch.zeros(0)
    correction, metrics = mismatch_correction(none, none, torch.zeros(0, dtype=torch.long))
    assert correction is not None
    assert correction.shape == (0,)
    assert math.isnan(float(metrics["engine/kl"]))


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo"])
def test_the_surrogate_is_multiplied_and_the_kl_term_is_not(loss_type: Any) -> None:
    logps = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    ref, advantages, weights = torch.tensor([-1.2, -0.4, -2.0]), torch.tensor([1.0, -1.0, 2.0]), torch.full((3,), 1 / 3)
    loss, kl, factor = Loss(type=loss_type, clip_high=5.0), KL(coef=0.5, unbiased=False), torch.tensor([2.0, 0.0, 1.0])
    tokens = RolloutTokens(advantages, weights, logps.detach(), ref)
    lengths = torch.tensor([3])
    plain = [grpo_loss(tokens.at(torch.tensor([i])).batch(logps[[i]], lengths), loss, KL())[0] for i in range(3)]
    penalty = grpo_loss(RolloutTokens(0 * advantages, weights, logps.detach(), ref).batch(logps, lengths), loss, kl)[0]
    corrected = RolloutTokens(advantages, weights, logps.detach(), ref, correction_T=factor)
    # `plain` has a KL term of weight 0
    got, _ = grpo_loss(corrected.batch(logps, lengths), loss, kl)
    torch.testing.assert_close(got, 2 * plain[0] + plain[2] + penalty)


def test_a_correction_of_one_changes_no_bit() -> None:
    torch.manual_seed(0)
    logps, old, advantages = (torch.randn(50) for _ in range(3))
    batch = (logps.requires_grad_(), old, advantages, torch.full((50,), 0.02))
    plain, _ = grpo_loss(TokenBatch(*batch))
    (expected,) = torch.autograd.grad(plain, logps)
    same, _ = grpo_loss(TokenBatch(*batch, correction_T=torch.ones(50)))
    (gradient,) = torch.autograd.grad(same, logps)
    assert torch.equal(plain, same)
    assert torch.equal(expected, gradient)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mismatch": "truncate"}, "model.loss.mismatch='truncate'"),
        ({"mismatch_cap": 0.5}, "model.loss.mismatch_cap=0.5: expected at least 1"),
        ({"mismatch_cap": math.nan}, "model.loss.mismatch_cap=nan"),
    ],
)
def test_settings_are_checked(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Loss(**options)
