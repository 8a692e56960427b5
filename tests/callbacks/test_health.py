"""``ConductorHealth``: hand-computed measurements, one case built for every finding, and silence on a healthy run."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from callbacks.health import ConductorHealth, summary
from maestro_pl.cli import main
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.errors import UserError
from maestro_pl.evaluation.health.advice import ADVICE
from maestro_pl.evaluation.health.conflict import conflict, pareto_front, pareto_set, static_gain
from maestro_pl.evaluation.health.findings import Thresholds, examine, examine_gaps
from maestro_pl.evaluation.health.record import WeighedBatch, joined, observe
from maestro_pl.evaluation.health.reward_weights import relative_entropy, saturation, self_grading, weight_over_share
from maestro_pl.evaluation.health.tasks import (
    Gap,
    PromptWeights,
    prompt_weights,
    task_difference,
    task_information,
    weight_gaps,
)
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from maestro_pl.run.paths import config_path
from tests.support import make_rollout

NAMES = ["a", "b", "c"]
TASKS = ["x", "y", "x", "y"]
SIZE = 8


def t64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weighed(
    weights: Any,
    values: Any,
    tasks: list[str],
    group_size: int,
    mask: Any = None,
    anchor: Any = None,
    advantages: Any = None,
) -> WeighedBatch:
    weights_BK, values_BK = t64(weights), t64(values)
    return WeighedBatch(
        NAMES[: weights_BK.shape[1]],
        tasks,
        group_size,
        weights_BK,
        values_BK,
        torch.ones_like(values_BK, dtype=torch.bool) if mask is None else torch.tensor(mask),
        torch.full((len(values_BK),), torch.nan, dtype=torch.float64) if anchor is None else t64(anchor),
        None if advantages is None else t64(advantages),
    )


# -- measurements by hand --------------------------------------------------------------------------------------------


def test_entropy_is_relative_to_the_rewards_that_apply() -> None:
    weights, mask = t64([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[True, True, False], [True, True, True]])
    assert relative_entropy(weights[:1], mask[:1]) == pytest.approx(1.0)
    assert relative_entropy(weights, mask) == pytest.approx(0.5)
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert relative_entropy(t64([[0.25, 0.75]]), torch.ones(1, 2, dtype=torch.bool)) == pytest.approx(quarter)


def test_weight_over_the_equal_share() -> None:
    mask = [[True, True, True], [True, True, False], [True, False, False], [True, True, True]]
    weights = [[0.5, 0.3, 0.2], [0.8, 0.2, 0.0], [1.0, 0.0, 0.0], [torch.nan] * 3]
    excess = weight_over_share(weighed(weights, torch.zeros(4, 3).tolist(), ["x"] * 2, 2, mask))
    # a: (0.5 - 1/3 + 0.8 - 1/2) / 2; a single applicable reward is no choice, weights that are not finite do not count
    assert excess.tolist() == pytest.approx([(0.5 - 1 / 3 + 0.3) / 2, (0.3 - 1 / 3 - 0.3) / 2, 0.2 - 1 / 3])


def test_saturation_by_groups_and_by_the_edge() -> None:
    values = [[1.0, 0.0, 0.1], [1.0, 1.0, 0.2], [1.0, 1.0, 0.3], [1.0, 1.0, 0.3], [0.0, 1.0, 5.0], [1.0, 1.0, 9.0]]
    mask = [[True, True, True]] * 4 + [[True, True, False]] * 2
    batch = weighed([[1 / 3] * 3] * 6, values, ["x"] * 3, 2, mask)
    # a: constant in 2 of 3 groups, 5 of 6 at the top; b the same; c: constant in 1 of its 2 groups, 2 of 4 at the top
    assert saturation(batch).tolist() == pytest.approx([5 / 6, 5 / 6, 1 / 2])
    low = weighed([[0.5] * 2] * 4, [[0, 1], [0, 2], [0, 3], [0, 4]], ["x"] * 2, 2)
    assert saturation(low).tolist() == [1.0, 0.25]
    constant = weighed([[0.5] * 2] * 4, [[0, 1], [0, 2], [5, 3], [5, 4]], ["x"] * 2, 2)
    assert saturation(constant).tolist() == [1.0, 0.25]  # in every group, at no common edge
    nowhere = weighed([[0.5] * 2] * 2, [[0, 1], [0, 2]], ["x"], 2, [[False, True]] * 2)
    assert math.isnan(saturation(nowhere)[0])


def test_self_grading_by_hand() -> None:
    own = [[0.8, 0.2], [0.2, 0.8]]
    first, second = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
    assert self_grading(weighed(own, first, ["x"], 2)).value == pytest.approx(1.0)
    assert self_grading(weighed(own, second, ["x"], 2)).value == pytest.approx(-1.0)
    mixed = self_grading(weighed(own * 4, first * 3 + second, ["x"] * 4, 2))
    # four groups with a quarter of the scale each: 1/4, 1/4, 1/4, -1/4, whose standard deviation is 1/4
    assert mixed.value == pytest.approx(0.5)
    assert mixed.error == pytest.approx(0.25 * math.sqrt(4))
    even = [[0.501, 0.499], [0.499, 0.501]]
    assert self_grading(weighed(even, first, ["x"], 2)) == (0.0, 0.0)  # nothing to gain by it
    one = self_grading(weighed(own, first, ["x"], 2, [[True, True], [True, False]]))
    assert one.value == 0.0  # the second response has no choice, so that the first has nobody to be compared with
    off = self_grading(weighed([[0.9, 0.1], [0.1, 0.9]], [[5.0, 1.0], [7.0, 3.0]], ["x"], 2))
    assert off.value == pytest.approx(0.0)  # between rewards the levels differ, inside them the weights cancel


def test_self_grading_is_judged_beyond_its_error() -> None:
    own, first, second = [[0.8, 0.2], [0.2, 0.8]], [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]

    def keys(values: Any) -> list[str]:
        batch = weighed(own * 20, values, ["x"] * 20, 2)
        return [f.key for f in examine(batch, Thresholds(conflict=0.0, errors=3.0), updates=30).findings]

    assert "self_grading" not in keys(first * 15 + second * 5)  # 0.5, with an error of 0.2
    assert "self_grading" in keys(first * 19 + second)  # 0.9, with an error of 0.1


def test_prompt_weights_are_over_what_all_tasks_have() -> None:
    weights = [[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.2, 0.8, 0.0], [1.0, 0.0, 0.0]]
    mask = [[True] * 3] * 2 + [[True, True, False], [True, False, False]]
    found = prompt_weights(t64(weights), torch.tensor(mask), ["x", "y"], 2)
    assert found.tasks_N == ["x", "y"]
    assert found.weights_NK.tolist() == [pytest.approx([(2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2]), [0.2, 0.8]]
    nothing = prompt_weights(t64([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]), t64([[1, 1, 0], [0, 1, 1]]).bool(), ["x", "y"], 1)
    assert nothing.tasks_N == []


def test_information_is_the_jensen_shannon_divergence_without_its_bias() -> None:
    apart = PromptWeights(t64([[0.9, 0.1]] * 50 + [[0.1, 0.9]] * 50), ["x"] * 50 + ["y"] * 50)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert task_information(apart).value == pytest.approx(math.log(2) - entropy, abs=0.01)
    uneven = PromptWeights(t64([[0.9, 0.1]] * 75 + [[0.5, 0.5]] * 25), ["x"] * 75 + ["y"] * 25)
    mean = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert task_information(uneven).value == pytest.approx(mean - 0.75 * entropy - 0.25 * math.log(2), abs=0.01)
    same = task_information(PromptWeights(t64([[0.3, 0.7]] * 20), ["x", "y"] * 10))
    assert (same.value, same.error) == pytest.approx((0.0, 0.0), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    found, plain = [], []
    for seed in range(40):
        drawn = torch.nn.functional.one_hot(torch.randint(3, (24,), generator=generator), 3).double()
        found.append(task_information(PromptWeights(drawn, ["x", "y", "z", "x"] * 6), seed).value)
        means = [drawn[[i for i in range(24) if "xyzx"[i % 4] == task]].mean(0) for task in "xyz"]
        parts = sum(
            share * float(torch.special.entr(m).sum()) for share, m in zip((0.5, 0.25, 0.25), means, strict=True)
        )
        plain.append(float(torch.special.entr(drawn.mean(0)).sum()) - parts)
    assert sum(plain) / 40 > 0.05  # few prompts: the tasks seem to tell something
    assert abs(sum(found) / 40) < 0.02


def test_tasks_differ_by_how_rewards_move_together_or_with_the_anchor() -> None:
    together, against = [[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]
    tasks = ["x"] * 6 + ["y"] * 6
    batch = weighed([[0.5, 0.5]] * 24, together * 6 + against * 6, tasks, 2)
    found = task_difference(batch, least=5)
    assert found is not None
    assert (found.size, found.by) == (pytest.approx(2.0), "rewards")  # +1 against -1
    assert found.p <= 0.01
    alike = task_difference(weighed([[0.5, 0.5]] * 24, (together + against) * 6, tasks, 2), least=5)
    assert alike is not None
    assert alike.size == pytest.approx(0.0)
    assert alike.p > 0.5
    assert task_difference(weighed([[0.5, 0.5]] * 24, together * 12, ["x"] * 8 + ["y"] * 4, 2), least=5) is None
    anchor = [0.7, -0.7] * 6 + [-0.7, 0.7] * 6  # follows a in task x, and its opposite in y
    labelled = task_difference(weighed([[0.5, 0.5]] * 24, together * 12, tasks, 2, anchor=anchor), least=5)
    assert labelled is not None
    assert (labelled.by, labelled.size) == ("anchor", pytest.approx(2 * 2 * 0.7 * math.sqrt(0.5)))
    few = [torch.nan] * 4 + anchor[4:]  # task x has four labelled groups: not enough, the rewards stand in
    unlabelled = task_difference(weighed([[0.5, 0.5]] * 24, together * 12, tasks, 2, anchor=few), least=5)
    assert unlabelled is not None
    assert (unlabelled.by, unlabelled.size) == ("rewards", pytest.approx(0.0))


def test_gap_between_training_and_validation_prompts() -> None:
    def side(first: list[float], group_size: int = 1) -> WeighedBatch:
        rows = [[w, 1 - w] for w in first for _ in range(group_size)]
        return weighed(rows, [[0.0, 0.0]] * len(rows), ["x"] * len(first), group_size)

    gap = weight_gaps(side([0.6, 0.6]), side([0.4, 0.4, 0.4], 2), least=2)["x"]
    assert gap == pytest.approx((0.2, 0.0, 0.0))
    noisy = weight_gaps(side([0.5, 0.7]), side([0.4] * 3), least=2)["x"]
    # the variance of both weights' means is 0.02 / 2, so that half the sum of the errors is 0.1; the halves are 0.2
    # apart
    assert noisy == pytest.approx((0.2, 0.1, 0.2))
    both_noisy = weight_gaps(side([0.6, 0.6]), side([0.5, 0.7]), least=2)["x"]
    assert both_noisy == pytest.approx((0.0, 0.1, 0.0))
    assert weight_gaps(side([0.6] * 2), side([0.4] * 3), least=3) == {}
    other = side([0.4] * 3)
    other.tasks_N = ["z"] * 3
    assert weight_gaps(side([0.6] * 3), other, least=2) == {}
    three = weighed([[0.4, 0.4, 0.2]] * 3, [[0.0] * 3] * 3, ["x"] * 3, 1)
    fewer = weighed([[0.5, 0.5, 0.0]] * 3, [[0.0] * 3] * 3, ["x"] * 3, 1, [[True, True, False]] * 3)
    assert weight_gaps(three, fewer, least=2)["x"].distance == pytest.approx(0.0)  # over the two that both have


@pytest.mark.parametrize(
    ("covariance", "value", "weights"),
    [
        ([[1.0, -1.0], [-1.0, 1.0]], 0.0, [0.5, 0.5]),
        ([[1.0, -0.6], [-0.6, 1.0]], 0.2, [0.5, 0.5]),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], 1 / 3, [1 / 3] * 3),
        ([[1.0, -0.5, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.0, 1.0]], 0.2, [0.4, 0.4, 0.2]),
    ],
)
def test_static_gain_is_the_value_of_the_game(
    covariance: list[list[float]], value: float, weights: list[float]
) -> None:
    found, vector = static_gain(t64(covariance))
    assert found == pytest.approx(value, abs=1e-9)
    assert vector.tolist() == pytest.approx(weights)


def test_conflict_of_rewards_inside_groups() -> None:
    opposed = weighed([[0.5, 0.5]] * 8, [[0.0, 3.0], [1.0, 2.0]] * 4, ["x"] * 4, 2)
    found = conflict(opposed)
    assert found is not None
    assert (found.gain, found.error) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert found.correlations == [("a", "b", pytest.approx(-1.0))]
    # three groups against, one with: the correlation is -1/2, the gain (1 - 1/2) / 2 times K
    half = conflict(weighed([[0.5, 0.5]] * 8, [[0.0, 3.0], [1.0, 2.0]] * 3 + [[0.0, 0.0], [1.0, 1.0]], ["x"] * 4, 2))
    assert half is not None
    assert half.gain == pytest.approx(0.5)
    assert half.error == pytest.approx(
        2 * 0.125 * math.sqrt(4)
    )  # the groups give 0, 0, 0, 1/4, the standard deviation 1/8
    values = [[0.0, 3.0, 7.0], [1.0, 2.0, 7.0]] * 4
    constant = conflict(weighed([[1 / 3] * 3] * 8, values, ["x"] * 4, 2))
    assert constant is not None
    assert set(constant.weights) == {"a", "b"}
    assert conflict(weighed([[0.5, 0.5]] * 4, [[0.0, 7.0], [1.0, 7.0]] * 2, ["x"] * 2, 2)) is None


def test_conflict_is_judged_beyond_its_error() -> None:
    against, together = [[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]
    # one group of twenty gives all of the gain, 1 - 0.9, which is then no larger than its error
    chance = examine(weighed([[0.5, 0.5]] * 40, against * 19 + together, ["x"] * 20, 2), Thresholds())
    assert chance.numbers["static_gain"] == pytest.approx(0.1)
    assert chance.findings == []
    certain = examine(weighed([[0.5, 0.5]] * 40, against * 20, ["x"] * 20, 2), Thresholds())
    assert [finding.key for finding in certain.findings] == ["conflict"]
    assert "conflict" not in examine(weighed([[0.5, 0.5]] * 38, against * 19, ["x"] * 19, 2), Thresholds()).examined


def test_pareto_front_and_set() -> None:
    rewards = t64([[1.0, 0.0], [0.0, 1.0], [0.5, 0.0], [1.0, 0.0], [0.4, 0.4]])
    assert pareto_front(rewards).tolist() == [True, True, False, True, True]  # equal ones do not dominate each other
    batch = weighed(
        [[0.5, 0.5]] * 6,
        [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [9.0, 0.0], [0.0, 2.0], [1.0, 0.0]],
        ["x"] * 2,
        3,
        [[True, True]] * 3 + [[True, False]] + [[True, True]] * 2,
    )
    found = pareto_set(batch, ["a", "b"])
    assert (found.size, found.total) == (3, 5)
    assert found.examples == [(1, {"a": 0.0, "b": 2.0}), (2, {"a": 1.0, "b": 0.0})]


def test_worst_gap_counts_beyond_noise_and_drift() -> None:
    assert [f.key for f in examine_gaps({"x": Gap(0.3, 0.05, 0.1)}, Thresholds()).findings] == ["overfit_prompts"]
    assert examine_gaps({"x": Gap(0.3, 0.05, 0.16)}, Thresholds()).findings == []  # 0.3 < 0.15 + 0.16
    assert examine_gaps({"x": Gap(0.09, 0.0, 0.0)}, Thresholds()).findings == []  # below the limit
    assert examine_gaps({}, Thresholds()).examined == []
    two = examine_gaps({"x": Gap(0.4, 0.2, 0.0), "y": Gap(0.2, 0.0, 0.0)}, Thresholds())
    assert "task y" in two.findings[0].text


# -- a simulated run -------------------------------------------------------------------------------------------------


class World:
    """Rollouts of a run; every knob is healthy until a test turns it."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = {"x": [0.5, 0.3, 0.2], "y": [0.2, 0.3, 0.5]}
        self.noise = 0.02  # of the weights, between responses
        self.own = 0.0  # how much a response's weights lean to what it is good at
        self.mixing = {"x": 0.6, "y": -0.4}  # correlation of a and b
        self.constant: str | None = None
        self.dead = 0.0
        self.dead_task: str | None = None
        self.mask: dict[str, list[bool]] = {}
        self.names = list(NAMES)

    def rollout(self, tasks: list[str] = TASKS, size: int = SIZE) -> Rollout:
        count = len(tasks) * size
        tasks_B = [task for task in tasks for _ in range(size)]
        values = torch.randn(count, 3, generator=self.generator)
        rho = torch.tensor([self.mixing[task] for task in tasks_B])
        values[:, 1] = rho * values[:, 0] + (1 - rho**2).sqrt() * values[:, 1]
        if self.constant:
            values[:, NAMES.index(self.constant)] = 1.0
        weights = torch.tensor([self.weights[task] for task in tasks_B])
        weights = weights + self.noise * torch.randn(weights.shape, generator=self.generator) + self.own * values
        mask = torch.tensor([self.mask.get(task, [True] * 3) for task in tasks_B])
        weights = weights.clamp(min=1e-4) * mask
        weights = weights / weights.sum(1, keepdim=True)
        advantages = torch.randn(count, generator=self.generator)
        dead = torch.rand(len(tasks), generator=self.generator) < self.dead
        if self.dead_task:  # in four of five of its groups: two of five of all
            often = torch.rand(len(tasks), generator=self.generator) < 0.8
            dead = dead | (often & torch.tensor([task == self.dead_task for task in tasks]))
        keep = [NAMES.index(name) for name in self.names]
        rewards = {n: RewardScores(RewardSpec(n), values[:, NAMES.index(n)], mask[:, NAMES.index(n)]) for n in NAMES}
        fields = {
            "rewards": rewards,
            "weights_BK": torch.nn.functional.one_hot(torch.zeros(count, dtype=torch.long), len(keep)).float(),
            "weight_names": list(self.names),
            "advantages_B": advantages.masked_fill(dead.repeat_interleave(size), 0.0),
            "probabilities_BK": weights[:, keep],
        }
        return make_rollout(["r"] * count, group_size=size, fields=fields, task=list(tasks))


class Run:
    """The hooks of a fit, without a Trainer."""

    def __init__(self, health: ConductorHealth, folder: Path, weigher: Any = None, state: Any = None) -> None:
        self.health, self.logged, self.warned = health, [], []
        self.trainer: Any = SimpleNamespace(
            log_dir=str(folder),
            default_root_dir=".",
            is_global_zero=True,
            global_step=0,
            sanity_checking=False,
            should_stop=False,
            callback_metrics={},
            state=SimpleNamespace(fn="fit"),
            strategy=SimpleNamespace(broadcast=lambda value: value),
        )
        self.module: Any = SimpleNamespace(
            policy_steps=0,
            outer=SimpleNamespace(updates=0),
            weigher=weigher or Conductor(),
            log_dict=lambda values, **kwargs: self.logged.append((self.module.policy_steps, dict(values))),
        )
        health.setup(self.trainer, self.module, "fit")
        if state is not None:
            health.load_state_dict(state)
        health.on_train_start(self.trainer, self.module)

    def train(self, world: World, steps: int = 60, step_change: float = 0.02) -> Run:
        for _ in range(steps):
            self.module.policy_steps += 1
            self.module.outer.updates += 1
            self.trainer.callback_metrics["conductor/step_change"] = torch.tensor(step_change)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.health.on_train_batch_end(self.trainer, self.module, None, {"rollout": world.rollout()}, 0)
            self.warned += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        return self

    def validate(self, world: World, batches: int = 4) -> Run:
        self.health.on_validation_start(self.trainer, self.module)
        for _ in range(batches):
            batch = {"rollout": world.rollout(size=4)}
            self.health.on_validation_batch_end(self.trainer, self.module, None, batch, 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.health.on_validation_end(self.trainer, self.module)
        self.warned += [str(w.message) for w in caught]
        return self

    def end(self) -> dict[str, Any]:
        self.health.on_train_end(self.trainer, self.module)
        return json.loads(Path(self.trainer.log_dir, "health.json").read_text())

    @property
    def keys(self) -> list[str]:
        return [finding.key for finding in self.health.findings]


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_is_silent(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(seed)
    before = torch.random.get_rng_state()
    run = Run(ConductorHealth(), tmp_path).train(world).validate(world).train(world, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (run.keys, run.warned, run.trainer.should_stop) == ([], [], False)
    report = run.end()
    assert report["healthy"]
    assert report["not_judged"] == []  # everything was measured, and found healthy
    assert capsys.readouterr().out == "Health: healthy\n"
    step, values = run.logged[-1]
    assert (step, len(run.logged)) == (61, 52)  # from the tenth step on
    assert values.keys() == {
        "health/dead_share", "health/static_gain", "health/relative_entropy", "health/top_weight",
        "health/saturated_excess", "health/median_step_change", "health/self_grading_correlation",
        "health/task_information", "health/task_difference", "health/train_validation_gap",
    }  # fmt: skip
    assert values["health/top_weight"] == pytest.approx(0.35, abs=0.01)
    assert values["health/median_step_change"] == pytest.approx(0.02)


def uniform(world: World) -> None:
    world.weights = {task: [1 / 3] * 3 for task in "xy"}
    world.noise = 0.002


def one_reward(world: World) -> None:
    world.weights = {"x": [0.98, 0.01, 0.01], "y": [0.97, 0.02, 0.01]}
    world.noise = 0.001


def saturated(world: World) -> None:
    world.constant, world.weights = "a", {"x": [0.6, 0.3, 0.1], "y": [0.5, 0.1, 0.4]}


def self_grades(world: World) -> None:
    world.own = 0.03


def no_context(world: World) -> None:
    world.weights = {task: [0.5, 0.3, 0.2] for task in "xy"}


def dead(world: World) -> None:
    world.dead = 0.8


def one_answer(world: World) -> None:
    world.dead_task = "y"


def conflicting(world: World) -> None:
    world.mixing, world.names = {"x": -0.95, "y": -0.97}, ["a", "b"]
    world.weights = {"x": [0.7, 0.3, 0.01], "y": [0.3, 0.7, 0.01]}


@pytest.mark.parametrize(
    ("break_it", "key", "numbers"),
    [
        (uniform, "collapse_to_uniform", "after 20 updates"),
        (one_reward, "collapse_to_one_reward", "a has 0.97"),
        (saturated, "saturated_reward", "a is constant, or at its edge, in 100%"),
        (self_grades, "self_grading", "correlate with the response's own rewards by 0."),
        (no_context, "context_ignored", "correlations of the rewards inside groups are up to 1.0"),
        (dead, "dead_groups", "of the last 40 groups every advantage is 0"),
        (one_answer, "dead_groups", "on y have advantages of 0 only"),
        (conflicting, "conflict", "Correlations inside groups: a and b -0.9"),
    ],
)
def test_each_failure_is_named_and_nothing_else(
    break_it: Any, key: str, numbers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World()
    break_it(world)
    run = Run(ConductorHealth(), tmp_path).train(world, 40).validate(world)
    assert run.keys == [key]
    assert len(run.warned) == 1  # once, although every later step sees it too
    assert numbers in run.warned[0]
    assert f"What to try: {ADVICE[key]}" in run.warned[0]
    first = run.health.findings[0].step
    assert [step for step, values in run.logged if f"health/{key}" in values] == [first]
    assert first == (20 if key in ("collapse_to_uniform", "context_ignored") else 10)
    report = run.end()
    assert not report["healthy"]
    assert report["findings"] == [
        {"key": key, "step": first, "text": run.health.findings[0].text, "advice": ADVICE[key]}
    ]
    out = capsys.readouterr().out
    assert out.startswith("Health: 1 finding\n")
    assert f"  step {first}: {key}\n" in out
    assert "health.json has them in full" in out
    assert ADVICE[key] not in out  # which was said when it was found


def test_conflict_names_the_pareto_set(tmp_path: Path) -> None:
    world = World()
    conflicting(world)
    text = Run(ConductorHealth(), tmp_path).train(world, 10).health.findings[0].text
    assert "of 320 responses are dominated by no other of their group; in the last one, response" in text
    size = int(text.split("Pareto set: ")[1].split(" ")[0])
    assert 160 < size < 320  # opposed rewards: most are


def test_fast_weights(tmp_path: Path) -> None:
    run = Run(ConductorHealth(patience=1), tmp_path).train(World(), 2, 0.3)
    assert run.keys == []  # two updates are no speed yet
    run.train(World(), 1, 0.3)
    assert run.keys == ["weights_move_fast"]
    assert "last 3 updates moved 30.0% of the weight (limit 10%)" in run.warned[0]


def test_one_jump_is_no_speed(tmp_path: Path) -> None:
    run = Run(ConductorHealth(patience=1), tmp_path).train(World(), 1, 0.9).train(World(), 4, 0.02)
    assert run.keys == []
    assert run.train(World(), 3, 0.2).keys == ["weights_move_fast"]  # three of the last five


def test_a_step_change_counts_once_an_update(tmp_path: Path) -> None:
    run = Run(ConductorHealth(patience=1), tmp_path)
    run.trainer.callback_metrics["conductor/step_change"] = torch.tensor(0.3)  # stays there until the next update
    for _ in range(5):
        run.health.on_train_batch_end(run.trainer, run.module, None, {"rollout": World().rollout()}, 0)
    assert run.keys == []
    assert all("health/median_step_change" not in values for _, values in run.logged)


def test_over_fitting_to_training_prompts(tmp_path: Path) -> None:
    train, unseen = World(), World(1)
    unseen.weights = {"x": [0.35, 0.35, 0.3], "y": [0.2, 0.3, 0.5]}
    run = Run(ConductorHealth(), tmp_path).train(train).validate(unseen)
    assert run.keys == ["overfit_prompts"]
    assert "in task x, 1" in run.warned[0]
    run.train(train, 1).validate(unseen)
    assert len(run.warned) == 1
    assert run.logged[-1][1]["health/overfit_prompts"] == 1.0
    assert run.logged[-1][1]["health/train_validation_gap"] == pytest.approx(0.15, abs=0.02)


def test_a_sanity_check_and_validation_outside_fit_judge_nothing(tmp_path: Path) -> None:
    unseen = World(1)
    unseen.weights = {"x": [0.2, 0.3, 0.5], "y": [0.5, 0.3, 0.2]}
    run = Run(ConductorHealth(), tmp_path).train(World(), 20)
    run.trainer.sanity_checking = True
    run.validate(unseen)
    run.trainer.sanity_checking, run.trainer.state.fn = False, "validate"
    run.validate(unseen)
    assert run.keys == []


@pytest.mark.parametrize("break_it", [uniform, one_reward, saturated, no_context, self_grades])
def test_a_weigher_that_does_not_learn_is_not_accused(break_it: Any, tmp_path: Path) -> None:
    world = World()
    break_it(world)
    run = Run(ConductorHealth(), tmp_path, weigher=EqualWeights()).train(world, 40, 0.5).validate(world)
    assert run.keys == []
    assert run.end()["not_judged"] == []


@pytest.mark.parametrize(("break_it", "key"), [(dead, "dead_groups"), (conflicting, "conflict")])
def test_what_any_weigher_is_judged_by(break_it: Any, key: str, tmp_path: Path) -> None:
    world = World()
    break_it(world)
    assert Run(ConductorHealth(), tmp_path, weigher=EqualWeights()).train(world, 12).keys == [key]


def test_equal_weights_are_where_a_conductor_starts(tmp_path: Path) -> None:
    world = World()
    uniform(world)
    run = Run(ConductorHealth(), tmp_path).train(world, 19)
    assert run.keys == []
    assert "collapse_to_uniform" in run.end()["not_judged"]


def test_a_task_with_a_single_reward_is_no_collapse(tmp_path: Path) -> None:
    world = World()
    world.mask = {"x": [True, False, False]}
    assert Run(ConductorHealth(), tmp_path).train(world, 40).keys == []
    world.mask = {"x": [True, True, False], "y": [False, True, True]}  # one reward in common: nothing to compare by
    assert Run(ConductorHealth(), tmp_path).train(world, 40).keys == []


def test_tasks_that_are_alike_need_no_context(tmp_path: Path) -> None:
    world = World()
    no_context(world)
    world.mixing = {"x": 0.3, "y": 0.3}
    assert Run(ConductorHealth(), tmp_path).train(world, 40).keys == []


def test_context_is_judged_beyond_chance() -> None:
    together, against = [[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]

    def keys(values: Any, weights: Any, tasks: list[str], **limits: Any) -> list[str]:
        batch = weighed(weights, values, tasks, 2)
        return [finding.key for finding in examine(batch, Thresholds(**limits), updates=30).findings]

    # a difference of 1 between tasks, but from two groups each
    few = together + against + together * 2
    assert keys(few, [[0.7, 0.3]] * 8, ["x", "x", "y", "y"], least_groups=4) == []
    # tasks that are opposites, and weights that differ between prompts so much that twenty tell nothing of the tasks
    opposite, tasks = together * 10 + against * 10, ["x"] * 10 + ["y"] * 10
    noisy = [w for _ in range(10) for w in [[0.8, 0.2]] * 2 + [[0.2, 0.8]] * 2]
    assert keys(opposite, noisy, tasks) == []
    assert keys(opposite, [[0.7, 0.3]] * 40, tasks) == ["context_ignored"]


def test_few_groups_are_no_evidence(tmp_path: Path) -> None:
    world = World()
    self_grades(world)
    dead(world)
    world.constant, world.weights = "a", {"x": [0.6, 0.3, 0.1], "y": [0.5, 0.1, 0.4]}
    health = ConductorHealth(thresholds=Thresholds(least_groups=1000))
    assert Run(health, tmp_path).train(world, 40).keys == []


def test_stop_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    world = World()
    dead(world)
    run = Run(ConductorHealth(action="stop"), tmp_path).train(world, 9)
    assert not run.trainer.should_stop
    run.train(world, 1)
    assert run.trainer.should_stop
    assert "The run stops here" in run.warned[0]
    other = Run(ConductorHealth(action="stop"), tmp_path / "other")
    other.trainer.is_global_zero, other.trainer.strategy.broadcast = False, lambda value: True  # rank zero found one
    other.train(World(), 1)
    assert (other.trainer.should_stop, other.keys, other.logged) == (True, [], [])
    gentle = Run(ConductorHealth(), tmp_path / "gentle").train(world, 12)
    assert (gentle.keys, gentle.trainer.should_stop) == (["dead_groups"], False)


def test_a_validation_stops_the_run_too(tmp_path: Path) -> None:
    unseen = World(1)
    unseen.weights = {"x": [0.2, 0.3, 0.5], "y": [0.5, 0.3, 0.2]}
    run = Run(ConductorHealth(action="stop"), tmp_path).train(World(), 20).validate(unseen)
    assert (run.keys, run.trainer.should_stop) == (["overfit_prompts"], True)


def test_a_resumed_run_does_not_warn_again(tmp_path: Path) -> None:
    world = World()
    dead(world)
    first = Run(ConductorHealth(), tmp_path / "first").train(world, 12)
    torch.save(first.health.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = Run(ConductorHealth(action="stop"), tmp_path / "second", state=state).train(world, 12)
    assert (second.keys, second.warned, second.trainer.should_stop) == (["dead_groups"], [], False)
    assert second.end()["findings"][0]["step"] == 10
    again = Run(second.health, tmp_path / "third").train(World(), 12)  # a new fit with the same callback
    assert again.keys == []


def test_runs_without_weights_rewards_or_rollouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    run = Run(ConductorHealth(patience=1), tmp_path)
    run.module.weigher = None
    for batch in ({}, {"rollout": None}, [1]):
        run.health.on_train_batch_end(run.trainer, run.module, None, batch, 0)
    run.health.on_train_end(run.trainer, run.module)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "health.json").exists()
    bare = world.rollout()
    bare.weights_BK = bare.advantages_B = None
    bare.probabilities_BK, bare.rewards = None, {}
    run.health.on_train_batch_end(run.trainer, run.module, None, {"rollout": bare}, 0)
    nameless = world.rollout()
    nameless.weight_names = ["gone"]
    run.health.on_train_batch_end(run.trainer, run.module, None, {"rollout": nameless}, 0)
    world.names = ["a"]
    single = Run(ConductorHealth(), tmp_path).train(world, 40).validate(world)
    assert single.keys == []
    assert {name for _, values in single.logged for name in values} == {"health/dead_share"}


def test_an_exception_keeps_the_report_and_no_file_is_overwritten(tmp_path: Path) -> None:
    ConductorHealth().on_exception(SimpleNamespace(), SimpleNamespace(), RuntimeError())  # before setup: nothing to say
    for name in ("health.json", "health-1.json"):
        run = Run(ConductorHealth(), tmp_path).train(World(), 2)
        run.health.on_exception(run.trainer, run.module, RuntimeError())
        run.health.on_train_end(run.trainer, run.module)  # said once
        assert json.loads((tmp_path / name).read_text())["batches"] == 2
    assert len(list(tmp_path.glob("health*.json"))) == 2


def test_what_was_not_judged_is_said() -> None:
    assert summary([], ["conflict"]) == "Health: healthy (not judged, too little data: conflict)"


def test_only_alike_batches_are_joined() -> None:
    world = World()
    three = observe(world.rollout(), world.rollout().probabilities_BK)
    world.names = ["a", "b"]
    two = [observe(r, r.probabilities_BK) for r in (world.rollout(), world.rollout())]
    window = joined([three, *two])
    assert (window.names, len(window.tasks_N), window.weights_BK.shape) == (["a", "b"], 8, (64, 2))
    assert window.advantages_B is not None
    assert window.advantages_B.shape == (64,)


def test_anchors_are_read_and_not_weighed() -> None:
    rollout = World().rollout(["x"], 2)
    anchor = RewardScores.from_list(RewardSpec("judge", role="anchor"), [1.0, 0.0])
    rollout.rewards["judge"] = anchor
    seen = observe(rollout, rollout.probabilities_BK)
    assert seen.anchor_B.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])
    rollout.rewards["judge"] = RewardScores.from_list(anchor.spec, [1.0, None])
    assert torch.isnan(observe(rollout, None).anchor_B).tolist() == [False, True]
    assert observe(rollout, None).names == []


def test_weights_that_are_not_finite_are_left_out() -> None:
    world = World()
    rollouts = [world.rollout() for _ in range(10)]
    for rollout in rollouts:
        rollout.probabilities_BK[0] = torch.nan
    window = joined([observe(r, r.probabilities_BK) for r in rollouts])
    numbers = examine(window, Thresholds(), updates=30, step_changes=[0.01] * 3).numbers
    assert len(numbers) == 9
    assert all(math.isfinite(number) for number in numbers.values())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ConductorHealth(action="cry"), "action='cry': expected one of warn, stop"),
        (lambda: ConductorHealth(window=5), "patience=10, window=5"),
        (lambda: ConductorHealth(patience=0), "patience=0"),
        (
            lambda: ConductorHealth(seed=-1),
            r"^ConductorHealth seed=-1: expected a whole number from 0 to 4294967295\.$",
        ),
        (lambda: Thresholds(conflict=1.5), r"thresholds.conflict=1.5: expected a number in \[0, 1\]"),
        (lambda: Thresholds(least_groups=0), "thresholds.least_groups=0: expected at least 1"),
    ],
)
def test_arguments_outside_their_range(build: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build()


def test_every_advice_names_options_in_backticks() -> None:
    assert len(ADVICE) == 11
    assert all(text.count("`") >= 2 for text in ADVICE.values())


# -- a real run ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fit_on_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {
        "action": "stop",
        "patience": 2,
        "thresholds": {"least_groups": 2},
    }
    callback = {"class_path": "callbacks.ConductorHealth", "init_args": options}
    gated = yaml.safe_load(config_path("rewards/sandbox.yaml").read_text())
    gated[0]["init_args"] = {"role": "gate"}
    (tmp_path / "gated.yaml").write_text(yaml.safe_dump(gated))
    args = [
        "fit", f"--config={config_path('quickstart.yaml')}", f"--trainer.callbacks={json.dumps([callback])}",
        "--trainer.max_steps=4", "--trainer.num_sanity_val_steps=0", "--trainer.val_check_interval=1", "--data.batch_size=2",
        "--data.eval_limit=2", "--rollout.group_size=2", "--rollout.eval_group_size=1", "--rollout.max_new_tokens=6",
        "--model.meta.every=1", "--data.show=false",
        f"--rewards={tmp_path / 'gated.yaml'}", "--model.meta.warmup=0", "--model.anchoring.fraction=1",
    ]  # fmt: skip
    # six tokens hold no answer block: the format gate is shut everywhere, and all groups are dead
    with pytest.warns(
        UserWarning, match=r"Health, step 2\. Dead groups: in 100% of the last 4 groups .* The run stops here"
    ):
        main(args)
    report = json.loads(next(tmp_path.rglob("health.json")).read_text())
    assert report["batches"] == 2  # stopped by the first finding, before max_steps
    assert (report["findings"][0]["key"], report["findings"][0]["step"]) == ("dead_groups", 2)
    metrics = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert {"health/dead_groups", "health/dead_share", "health/top_weight"} <= set(metrics[0].split(","))
    checkpoint = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    state = next(value for key, value in checkpoint["callbacks"].items() if key.startswith("ConductorHealth"))
    assert state["findings"] == report["findings"]

    options |= {"action": "warn", "patience": 1, "thresholds": {"least_groups": 1000, "step_change": 0.0}}
    with pytest.warns(UserWarning, match=r"Health, step 3\. The weights move too fast"):
        main([
            *args, f"--trainer.callbacks={json.dumps([callback])}", "--trainer.max_steps=3", "--rollout.max_new_tokens=40",
            "--rollout.group_size=4", "--trainer.limit_val_batches=0",
        ])  # fmt: skip
