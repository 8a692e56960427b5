"""Advantages of the same rewards: ``MaestroModule``'s equations 4 to 6 against ``GRPOTrainer._generate_and_score_completions``.

TRL runs its own code from the reward functions on; only what they return and the completions are scripted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_pl import Advantages
from maestro_pl.algorithm.advantages import advantages_of
from maestro_pl.algorithm.scalar_reward import normalized_rewards, scalar_reward
from maestro_pl.conductor.weighers import EqualWeights, RandomWeights
from maestro_pl.rollout import RewardScores, RewardSpec
from tests.support import make_rollout, module_of
from tests.trl.reference import make_policy, make_trainer

Table = list[list[float | None]]  # B rows of K rewards
ABSOLUTE = 1e-6  # relative where an advantage is above 1
REWARDS = 3
MODES = [("sum_then_normalize", scale) for scale in ("group", "batch", "none")] + [("normalize_then_sum", "group")]
CASES_PER_MODE = 20


class Both:
    """A TRL trainer and a MaestroModule that are shown the same tables of rewards."""

    def __init__(self, folder: Path, output_dir: Path) -> None:
        policy = make_policy(folder, "lora")
        self.table: Table = []
        self.module = module_of(policy, weigher=EqualWeights())
        self.module.reward_specs = [RewardSpec(f"r{k}") for k in range(REWARDS)]
        columns = [lambda completions, k=k, **_: [row[k] for row in self.table] for k in range(REWARDS)]
        scalar = [lambda completions, **_: self.summed]
        self.summed: list[float | None] = []
        self.trainer, self.scalar_trainer = (
            make_trainer(policy, folder, output_dir, rewards=rewards, rollout=one_token_each)
            for rewards in (columns, scalar)
        )

    def theirs(self, trainer: Any, aggregation: str, scale: str, group_size: int) -> Tensor:
        trainer.multi_objective_aggregation, trainer.scale_rewards = aggregation, scale
        trainer.num_generations = group_size
        inputs = [{"prompt": str(row // group_size)} for row in range(len(self.table))]
        advantages: Tensor = trainer._generate_and_score_completions(inputs)["advantages"]
        return advantages

    def ours(self, aggregation: str, scale: str, group_size: int, weights_BK: Tensor) -> Tensor:
        module, rows = self.module, len(self.table)
        settings = Advantages(aggregation, scale)  # type: ignore[arg-type]
        rollout = make_rollout(["x"] * rows, group_size=group_size)
        for k, spec in enumerate(module.reward_specs):
            rollout.rewards[spec.name] = RewardScores.from_list(spec, [row[k] for row in self.table])
        rewards_BK, mask_BK = normalized_rewards(rollout, module.reward_specs, settings, module.device)
        return advantages_of(scalar_reward(rollout, rewards_BK, mask_BK, weights_BK), group_size, settings)


def one_token_each(prompts: list[str], trainer: Any) -> dict[str, Any]:
    return {"prompt_ids": [[65]] * len(prompts), "completion_ids": [[66]] * len(prompts), "logprobs": None}


@pytest.fixture(scope="module")
def both(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tiny_qwen3, tmp_path_factory.mktemp("trl"))


def draw_table(rng: torch.Generator, group_size: int) -> Table:
    """Smooth, tied and missing rewards; the last group is single-valued, and one response has no reward at all.

    Rewards of single-valued groups are integers: their mean is exact, so that TRL too finds no spread in them (the
    rounding that it keeps of others is in test_trl_differences.py).
    """
    groups = 5
    rows = groups * group_size
    table = torch.randn(rows, REWARDS, generator=rng)
    table[:, 1] = torch.randint(0, 3, (rows,), generator=rng).float()
    table[:, 2] = 3.0 * table[:, 2] - 1.0
    missing = torch.rand(rows, REWARDS, generator=rng) < 0.15
    missing[int(torch.randint(0, rows - group_size, (), generator=rng))] = True
    missing[-group_size:] = False
    table[-group_size:] = torch.tensor([2.0, 1.0, -3.0])
    return [
        [None if gone else value for value, gone in zip(*pair, strict=True)]
        for pair in zip(table.tolist(), missing.tolist(), strict=True)
    ]


def assert_close(mine: Tensor, expected: Tensor, group_size: int) -> None:
    """Equal to 1e-6; the single-valued last group exactly 0 here and nothing but rounding there."""
    assert not mine[-group_size:].any()
    assert float(expected[-group_size:].abs().max()) <= 1e-2  # some 1e-7 of rounding, divided by TRL's 1e-4
    error = (mine - expected)[:-group_size].abs() / expected[:-group_size].abs().clamp(min=1.0)
    assert float(error.max()) <= ABSOLUTE, (mine, expected)


@pytest.mark.parametrize(("aggregation", "scale"), MODES)
def test_reward_weights(both: Both, aggregation: str, scale: str) -> None:
    for case in range(CASES_PER_MODE):
        rng = torch.Generator().manual_seed(case)
        group_size = (2, 3, 4, 7)[case % 4]
        both.table = draw_table(rng, group_size)
        weights_K = torch.ones(REWARDS) if case % 5 == 0 else 2.0 * torch.rand(REWARDS, generator=rng)
        both.trainer.reward_weights = weights_K
        mine = both.ours(aggregation, scale, group_size, weights_K.expand(len(both.table), -1))
        expected = both.theirs(both.trainer, aggregation, scale, group_size)
        if aggregation == "normalize_then_sum":  # the batch's mean moves single-valued groups too
            error = (mine - expected).abs() / expected.abs().clamp(min=1.0)
            assert float(error.max()) <= ABSOLUTE, (mine, expected)
        else:
            assert_close(mine, expected, group_size)
        unscored = torch.tensor([all(value is None for value in row) for row in both.table])
        assert bool(unscored.any())
        assert not mine[unscored].any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_weights_of_each_response(both: Both, scale: str) -> None:
    """Against a TRL trainer whose reward function returns the weighted sum."""
    for case in range(CASES_PER_MODE):
        rng = torch.Generator().manual_seed(100 + case)
        group_size = (2, 3, 4, 7)[case % 4]
        both.table = draw_table(rng, group_size)
        mask_BK = torch.tensor([[value is not None for value in row] for row in both.table])
        torch.manual_seed(case)
        weights_BK = RandomWeights()(None, torch.zeros(mask_BK.shape), mask_BK, sample=True).weights_BK
        weights_BK[-group_size:] = weights_BK[-1]
        both.summed = []
        for row, weights in zip(both.table, weights_BK.tolist(), strict=True):
            terms = [w * value for w, value in zip(weights, row, strict=True) if value is not None]
            both.summed.append(sum(terms) if terms else None)
        mine = both.ours("sum_then_normalize", scale, group_size, weights_BK)
        expected = both.theirs(both.scalar_trainer, "sum_then_normalize", scale, group_size)
        assert_close(mine, expected, group_size)
