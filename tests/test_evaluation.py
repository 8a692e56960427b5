"""The evaluation table against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from callbacks.rewards import ExactMatchReward
from maestro_pl.errors import UserError
from maestro_pl.evaluation.metrics import (
    EvaluationTable,
    bootstrap_interval,
    pass_at_k,
    pass_at_k_values,
    rollout_values,
)
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0


def test_pass_at_k_values_skip_prompts_it_does_not_apply_to() -> None:
    values = pass_at_k_values(torch.tensor([[1.0, 0.0], [0.0, 0.0], [math.nan, math.nan]]))
    assert values["pass@1"][:2].tolist() == [0.5, 0.0]
    assert values["pass@2"][:2].tolist() == [1.0, 0.0]
    assert values["pass@1"][2].isnan()


def test_the_table_has_a_row_per_task_and_metric() -> None:
    table = EvaluationTable()
    table.update(["b", "a"], {"x": torch.tensor([1.0, 3.0]), "y": torch.tensor([5.0, math.nan])})
    table.update(["b"], {"x": torch.tensor([2.0])})
    rows = {(row["task"], row["metric"]): row for row in table.compute()}
    assert set(rows) == {("a", "x"), ("b", "x"), ("b", "y"), ("all", "x"), ("all", "y")}
    assert (rows["b", "x"]["mean"], rows["b", "x"]["n"]) == (1.5, 2)
    assert (rows["all", "x"]["mean"], rows["all", "x"]["n"]) == (2.0, 3)
    assert (rows["all", "y"]["mean"], rows["all", "y"]["n"]) == (5.0, 1)
    table.reset()
    assert table.compute() == []


def test_bootstrap_interval_covers_the_mean_at_its_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(100):
        low, high = bootstrap_interval(torch.randn(40, generator=generator).numpy(), 0.95, 500, seed)
        covered += low <= 0.0 <= high
    assert 86 <= covered <= 100
    assert bootstrap_interval(torch.tensor([2.0]).numpy(), 0.95, 100, 0) == (2.0, 2.0)
    assert bootstrap_interval(torch.tensor([3.0, 3.0]).numpy(), 0.95, 100, 0) == (3.0, 3.0)


def test_rollout_values_are_means_of_groups() -> None:
    rollout = Rollout(
        prompts=["p", "q"],
        prompt_texts=["p", "q"],
        prompt_ids=[[1], [2]],
        response_ids=[[1], [1, 2], [1, 2, 3], [1, 2, 3]],
        responses=["", "", "", ""],
        finish_reasons=["stop", "length", "stop", "stop"],
        group_size=2,
        columns={"task": ["a", "b"], "reference": [None, None]},
    )
    spec = RewardSpec("r")
    rollout.rewards["r"] = RewardScores.from_list(spec, [1.0, 2.0, None, 5.0])
    match = ExactMatchReward().spec
    rollout.rewards[match.name] = RewardScores.from_list(match, [1.0, 0.0, 1.0, 1.0])
    values = rollout_values(rollout)
    assert values["reward/r"].tolist() == [1.5, 5.0]
    assert values["length/mean"].tolist() == [1.5, 3.0]
    assert values["length/truncated"].tolist() == [0.5, 0.0]
    assert values["pass@1"].tolist() == [0.5, 1.0]
    assert values["pass@2"].tolist() == [1.0, 1.0]


def test_a_prompt_that_two_ranks_were_given_counts_once() -> None:
    table = EvaluationTable()
    table.update(["a", "a"], {"x": torch.tensor([1.0, 3.0])}, [4, 7])
    table.update(["a", "b"], {"x": torch.tensor([1.0, 8.0])}, [4, 9])
    rows = {(row["task"], row["metric"]): row for row in table.compute()}
    assert (rows["a", "x"]["mean"], rows["a", "x"]["n"]) == (2.0, 2)
    assert (rows["all", "x"]["mean"], rows["all", "x"]["n"]) == (4.0, 3)


def test_a_task_may_not_be_called_all() -> None:
    with pytest.raises(UserError, match="A task is called 'all'"):
        EvaluationTable().update(["all"], {"x": torch.tensor([1.0])})
