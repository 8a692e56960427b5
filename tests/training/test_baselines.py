"""Every baseline of the paper on one group of four responses, from raw scores to advantages, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maestro_pl.algorithm.advantages import advantages_of, apply_gate
from maestro_pl.algorithm.scalar_reward import normalized_rewards, scalar_reward
from maestro_pl.conductor.weighers import EqualWeights, FixedWeights, RandomWeights, Weigher
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import make_rollout, module_of

BASELINES = Path(__file__).parents[2] / "configs" / "paper" / "baselines"
NAN = float("nan")
# raw scores of four responses; the third has not the format
PERPLEXITY = [-2.0, -1.0, -4.0, -3.0]  # ranks 2/3, 1, 0, 1/3
FORMAT = [1.0, 1.0, 0.0, 1.0]
ENTROPY = [-0.5, -0.2, -0.9, -0.4]  # ranks 1/3, 1, 0, 2/3
LENGTH = [0.0, -0.5, 0.0, -1.0]
PREFERENCE = [0.3, -0.1, 0.6, 0.2]
FIVE = [
    (RewardSpec("perplexity", normalize="rank"), PERPLEXITY),
    (RewardSpec("format"), FORMAT),
    (RewardSpec("entropy", normalize="rank"), ENTROPY),
    (RewardSpec("length"), LENGTH),
    (RewardSpec("preference"), PREFERENCE),
]


@pytest.fixture(scope="module")
def policy() -> LoRAPolicy:
    return LoRAPolicy(dtype="float32")


def rollout_of(scores: list[tuple[RewardSpec, list[float]]]) -> Rollout:
    rollout = make_rollout(["r"] * 4, group_size=4)
    rollout.rewards = {spec.name: RewardScores.from_list(spec, values) for spec, values in scores}
    return rollout


def scalar_and_advantages(
    policy: LoRAPolicy, weigher: Weigher, scores: list[tuple[RewardSpec, list[float]]]
) -> tuple[list[float], list[float]]:
    """What the module makes of a group, in training."""
    module, rollout = module_of(policy, weigher=weigher), rollout_of(scores)
    module.build([spec for spec, _ in scores])
    rewards_BK, mask_BK = normalized_rewards(rollout, module.reward_specs, module.advantages, module.device)
    weighing = module.weigh(rollout, rewards_BK, mask_BK, sample=True)
    scalar_B = scalar_reward(rollout, rewards_BK, mask_BK, weighing.weights_BK)
    return scalar_B.tolist(), advantages_of(scalar_B, 4, module.advantages).tolist()


def standardised(scalars: list[float]) -> list[float]:
    mean = sum(scalars) / len(scalars)
    std = math.sqrt(sum((s - mean) ** 2 for s in scalars) / (len(scalars) - 1))
    return [(s - mean) / (std + 1e-4) for s in scalars]


def weigher_of(name: str) -> Weigher:
    """The weigher of a baseline's config."""
    given = yaml.safe_load((BASELINES / f"{name}.yaml").read_text())["model"]["weigher"]
    classes: dict[str, Any] = {
        "maestro_pl.EqualWeights": EqualWeights,
        "maestro_pl.RandomWeights": RandomWeights,
        "maestro_pl.FixedWeights": FixedWeights,
    }
    if isinstance(given, str):
        return classes[given]()
    return classes[given["class_path"]](**given["init_args"])


def test_eq(policy: LoRAPolicy) -> None:
    scalars, advantages = scalar_and_advantages(policy, weigher_of("eq"), FIVE)
    by_hand = [2.3 / 5, 2.4 / 5, 0.6 / 5, 1.2 / 5]
    assert scalars == pytest.approx(by_hand, abs=1e-6)
    # mean 0.325; squared deviations 0.018225, 0.024025, 0.042025, 0.007225; sd sqrt(0.0305) = 0.174642
    assert advantages == pytest.approx([0.772568, 0.887022, -1.173159, -0.486432], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("perplexity", [2 / 3, 1, 0, 1 / 3]),
        ("format", [1, 1, 0, 1]),
        ("entropy", [1 / 3, 1, 0, 2 / 3]),
        ("length", [0, -0.5, 0, -1]),
        ("preference", [0.3, -0.1, 0.6, 0.2]),
    ],
)
def test_each_single_reward(policy: LoRAPolicy, name: str, by_hand: list[float]) -> None:
    scalars, advantages = scalar_and_advantages(policy, weigher_of(f"only_{name}"), FIVE)
    assert scalars == pytest.approx(by_hand, abs=1e-6)
    assert advantages == pytest.approx(standardised(by_hand), abs=1e-4)


def test_em(policy: LoRAPolicy) -> None:
    """Minus the entropy, ranked: the mean is 1/2, the sd sqrt(5/27) = 0.430331."""
    scores = [(RewardSpec("entropy", normalize="rank"), ENTROPY)]
    _, advantages = scalar_and_advantages(policy, weigher_of("em"), scores)
    assert advantages == pytest.approx([-0.387, 1.1616, -1.1616, 0.387], abs=1e-3)


def test_nover(policy: LoRAPolicy) -> None:
    """Format plus the rank among the formatted; a broken format is the worst there is, whatever its perplexity."""
    scores = [
        (RewardSpec("format"), FORMAT),
        (RewardSpec("format_gate", role="gate"), FORMAT),
        (RewardSpec("perplexity", normalize="rank"), [-2.0, -1.0, NAN, -3.0]),
    ]
    scalars, advantages = scalar_and_advantages(policy, weigher_of("nover"), scores)
    by_hand = [(1 + 0.5) / 2, (1 + 1) / 2, 0, (1 + 0) / 2]
    assert scalars == pytest.approx(by_hand)
    assert advantages == pytest.approx(standardised(by_hand), abs=1e-5)


def test_a_closed_gate_is_the_floor_even_where_no_reward_applies() -> None:
    scalar, gate = torch.tensor([0.5, 1.0, NAN, NAN]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    assert apply_gate(scalar, gate, 4).nan_to_num(-9.0).tolist() == [0.5, 1.0, 0.0, -9.0]
    assert apply_gate(torch.tensor([-2.0, -1.0, NAN, 0.5]), gate, 4).tolist() == [-2.0, -1.0, -2.0, 0.5]


def test_rand(policy: LoRAPolicy) -> None:
    """Uniform on the simplex, for every response anew: each weight has mean 1/5 and variance (1/5)(4/5)/6."""
    torch.manual_seed(0)
    weigher = weigher_of("rand")
    weights_BK = weigher(None, torch.zeros(20_000, 5), torch.ones(20_000, 5, dtype=torch.bool), True).weights_BK
    torch.testing.assert_close(weights_BK.sum(1), torch.ones(20_000))
    torch.testing.assert_close(weights_BK.mean(0), torch.full((5,), 0.2), atol=0.005, rtol=0)
    torch.testing.assert_close(weights_BK.var(0), torch.full((5,), 4 / 150), atol=0.001, rtol=0)
    scalars, _ = scalar_and_advantages(policy, weigher, FIVE)
    columns = [[2 / 3, 1, 1 / 3, 0, 0.3], [1, 1, 1, -0.5, -0.1], [0, 0, 0, 0, 0.6], [1 / 3, 1, 2 / 3, -1, 0.2]]
    assert all(min(row) <= scalar <= max(row) for scalar, row in zip(scalars, columns, strict=True))


def test_judge(policy: LoRAPolicy) -> None:
    """The judge's verdict behind the format gate: what it liked without the format counts nothing; a failed one is masked."""
    scores = [
        (RewardSpec("format", role="gate"), FORMAT),
        (RewardSpec("judge"), [1.0, 0.0, 1.0, NAN]),
    ]
    scalars, advantages = scalar_and_advantages(policy, weigher_of("judge"), scores)
    assert scalars[:3] == [1.0, 0.0, 0.0]
    assert math.isnan(scalars[3])
    assert advantages == pytest.approx([*standardised([1, 0, 0]), 0.0], abs=1e-5)
