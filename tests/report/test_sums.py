"""Sums that are read back from records, against the reward that training computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maestro_pl.algorithm.advantages import group_advantages
from maestro_pl.algorithm.scalar_reward import anchor_values, normalized_rewards, scalar_reward
from maestro_pl.algorithm.settings import Advantages, Anchoring
from maestro_pl.report.sums import sums
from maestro_pl.rollout import RewardScores, RewardSpec
from tests.support.rollouts import make_rollout

SPECS = [RewardSpec("x", normalize="zscore"), RewardSpec("y")]
WEIGHTS = torch.tensor([[0.25, 0.75]]).expand(4, 2)


def recorded(gate: bool = False, hybrid: float = 0.0, kl: bool = False) -> list[dict[str, Any]]:
    """A group of four as it is recorded, its scalar reward by the functions of training."""
    scores = {
        "x": RewardScores.from_list(SPECS[0], [1.0, 2.0, 4.0, 0.5]),
        "y": RewardScores.from_list(SPECS[1], [0.5, None, -1.0, 2.0]),
        "anchor": RewardScores.from_list(RewardSpec("anchor", "anchor"), [1.0, 0.0, 3.0, 2.0]),
    }
    shares = [1.0, 0.0, 0.5, 1.0]
    if gate:
        scores["g"] = RewardScores.from_list(RewardSpec("g", "gate"), shares)
    rollout = make_rollout(list("abcd"), group_size=4, fields={"rewards": scores})
    rewards_BK, mask_BK = normalized_rewards(rollout, SPECS, Advantages(), torch.device("cpu"))
    anchoring = Anchoring(fraction=1.0, hybrid=hybrid) if hybrid else None
    scalar_B = scalar_reward(rollout, rewards_BK, mask_BK, WEIGHTS, anchoring) - (0.125 if kl else 0.0)
    advantage_B = group_advantages(scalar_B, 4)
    value_B = anchor_values(rollout)
    return [
        {
            "response": "abcd"[i],
            "rewards": {n: float(s.values_B[i]) if s.mask_B[i] else None for n, s in scores.items()},
            "normalized": {n: float(rewards_BK[i, k]) for k, n in enumerate("xy") if mask_BK[i, k]},
            "weights": {"x": 0.25, "y": 0.75},
            "reward": float(scalar_B[i]),
            "advantage": float(advantage_B[i]),
            "advantage_by": "group",
            **({"gates": {"g": shares[i]}} if gate else {}),
            **({"anchor": {"value": float(value_B[i]), "share": hybrid}} if hybrid else {}),
            **({"kl": 0.125} if kl else {}),
        }
        for i in range(4)
    ]


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("hybrid", [0.0, 0.5])
@pytest.mark.parametrize("kl", [False, True])
def test_parts_come_to_the_reward_that_was_trained_on(gate: bool, hybrid: float, kl: bool) -> None:
    for i, each in enumerate(sums(recorded(gate, hybrid, kl))):
        assert each.adds_up
        assert each.value == pytest.approx(each.recorded, abs=1e-5)
        assert len(each.then) == bool(hybrid) + kl + (gate and i in (1, 2))  # the gates that are not open
        low, high = each.scale
        assert all(low <= part.start + part.value <= high for part in each.parts)


def test_parts_begin_where_the_last_one_ended() -> None:
    each = sums(recorded())[0]
    assert [part.name for part in each.parts] == ["x", "y"]
    assert each.parts[0].start == 0
    assert each.parts[1].start == pytest.approx(each.parts[0].value)
    assert each.parts[1].value == pytest.approx(0.375)
    assert each.unweighed == {"anchor": 1.0}


def test_a_record_that_says_something_else_does_not_add_up() -> None:
    group = recorded()
    group[0]["reward"] += 0.1
    found = sums(group)
    assert [each.adds_up for each in found] == [False, True, True, True]


def test_without_normalised_rewards_a_sum_is_not_exact() -> None:
    group = recorded()
    for record in group:
        del record["normalized"]
    assert not any(each.exact or each.adds_up for each in sums(group))
    assert sums(group)[0].value == pytest.approx(0.25 * 1.0 + 0.75 * 0.5)


def test_the_sentence_of_an_advantage_gives_it() -> None:
    for each in sums(recorded()):
        reward, mean, spread = (
            float(w.strip("()")) for w in each.how.replace("−", " ").split() if w.strip("()-.")[:1].isdigit()
        )
        assert (reward - mean) / spread == pytest.approx(each.advantage, abs=0.02)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({}, " / spread "),
        ({"gain": 0.25}, " × 0.25"),
        ({"advantage_by": "mo_grpo"}, " − group mean "),
        ({"advantage_by": "mo_grpo", "gain": 2.0}, "(({0:.3f} − group mean {1:.3f}) × 2"),
        ({"advantage_by": "normalize_then_sum"}, " / spread of the batch's centred sums"),
        ({"advantage_by": "dvao"}, " / the rewards' own spreads, weighed"),
        ({"advantage_by": "dvao", "min_consensus": 0.2, "advantage": 0.0}, "dropped where its rewards disagree"),
        ({"reward": 1.0, "advantage": 0.0}, "all responses of the group have the same reward"),
    ],
)
def test_every_way_to_an_advantage_has_its_sentence(more: dict[str, Any], sentence: str) -> None:
    rows = [row | more for row in recorded()]
    mean = sum(row["reward"] for row in rows) / 4
    for row, each in zip(rows, sums(rows), strict=True):
        assert sentence.format(row["reward"], mean).replace("((", "(") in each.how


def test_responses_that_no_reward_applies_to_have_no_sum() -> None:
    record = {
        "response": "a",
        "rewards": {"x": None},
        "normalized": {},
        "weights": {"x": 0.0},
        "reward": None,
        "advantage": 0.0,
    }
    found = sums([record, record])
    assert [each.adds_up for each in found] == [True, True]
