"""How well the weighed reward is expected to go along with the anchor, and advantages that are shrunk to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.rewards import FunctionReward
from maestro_pl import KL, Anchoring, Meta
from maestro_pl.algorithm.advantages import group_advantages
from maestro_pl.conductor import AnchorSignal, RidgeLearner, anchor_values, outer_loop
from maestro_pl.conductor.buffer import Decisions, MetaBuffer
from maestro_pl.conductor.choices import LOGIT, spread_rows
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.labels import LabelScale
from maestro_pl.conductor.outer_loop import expected_correlation
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.errors import UserError
from maestro_pl.rollout import RewardScores, RewardSpec
from tests.support import rewards, watched_fit
from tests.support.rollouts import make_rollout

WIDTH = 8


def sometimes(completion: str, **_: Any) -> float | None:
    number = sum(map(ord, completion))
    return None if number % 3 == 0 else float(number % 5)


def anchor(function: Any = sometimes) -> FunctionReward:
    return FunctionReward(function=function, name="anchor", role="anchor")


def soft(**options: Any) -> Conductor:
    return Conductor(action="soft", context="prompt", **options)


def test_the_expected_correlation_by_hand() -> None:
    weighed = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, 2.0, 2.0, 2.0, 1.0, torch.nan, -1.0, 5.0])
    predicted = torch.tensor([0.6, -0.6, 0.6, -0.6, 0.6, -0.6, 0.6, -0.6, -1.0, 9.0, 1.0, -5.0])
    c, tells = expected_correlation(weighed, predicted, 0.64 * 4 / 3, 4)
    # variances over three: 0.8 / (sqrt(4 / 3) x sqrt(0.48 + 0.64 x 4 / 3)); nothing where the reward is
    # one, or goes the other way
    torch.testing.assert_close(c, torch.tensor([0.6, 0.0, 0.0]))
    assert tells.tolist() == [True, False, True]
    for unit in (1e-9, 1e25):  # of the rewards
        other, _ = expected_correlation(weighed * unit, predicted, 0.64 * 4 / 3, 4)
        torch.testing.assert_close(other, c)
    c, _ = expected_correlation(torch.tensor([1.0, -1.0, torch.nan]), torch.tensor([1.0, -1.0, 7.0]), 2.0, 3)
    assert float(c) == pytest.approx(0.5**0.5)  # one look that errs by as much as the value differs
    # a reward that says the half of what is known: cov / (sd(R) sqrt(var(v) + noise)), 2 / 3 / (sqrt(4 / 3) x sqrt(4 / 3))
    c, _ = expected_correlation(torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, 0, 0, -1]), 2 / 3, 4)
    assert float(c) == pytest.approx(0.5)


def taught(learner: RidgeLearner, groups: int, worth: float, noise: float | None, shown: int = 4) -> float:
    """What is expected after labels of a judge to whom the first of two rewards is worth ``worth`` a standard deviation.

    Args:
        learner: that is taught.
        groups: labelled ones, of 8 responses.
        worth: see above.
        noise: deviation of a rating's error; None: the best of those that are shown is chosen, by a look that errs by 1.
        shown: responses that are labelled, those that differ most.
    """
    draw, size = torch.Generator().manual_seed(0), 8
    conductor = soft()
    conductor.build(WIDTH, ["good", "idle"])
    learner.attach(conductor, AnchorSignal())

    def sampled(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        z_NGK = torch.randn(count, size, 2, generator=draw)
        z_NGK = (z_NGK - z_NGK.mean(1, keepdim=True)) / z_NGK.std(1, keepdim=True)
        return z_NGK, worth * z_NGK[:, :, 0]

    z_NGK, value_NG = sampled(groups)
    if noise is None:
        value_NG = value_NG - torch.empty(groups, size).exponential_(generator=draw).log() / LOGIT
    else:
        value_NG = value_NG + noise * torch.randn(groups, size, generator=draw)
    rows = groups * size
    shown_NG = torch.zeros(groups, size, dtype=torch.bool)
    for n in range(groups):
        shown_NG[n, spread_rows(z_NGK[n], shown)] = True
    seen_NG = value_NG.masked_fill(~shown_NG, -torch.inf)
    best_NG = seen_NG == seen_NG.max(1, keepdim=True).values
    rank_BJ = torch.where(shown_NG, (~best_NG).long(), -1).flatten().unsqueeze(1)
    none_B = torch.full((rows,), torch.nan)
    rated_B = value_NG.masked_fill(~shown_NG, torch.nan).flatten()
    rollout = make_rollout(["r"] * rows, group_size=size)
    rollout.rewards["judge"] = RewardScores.from_list(RewardSpec("judge", role="anchor"), rated_B.tolist())
    value_B = none_B if noise is None else LabelScale().values(rollout)
    every_BK = torch.ones(rows, 2, dtype=torch.bool)
    conductor.observe_rewards(z_NGK.flatten(0, 1), every_BK)
    decisions = Decisions(
        torch.ones(rows, WIDTH),
        every_BK,
        torch.full((rows,), -1),
        torch.zeros(rows),
        torch.arange(groups).repeat_interleave(size),
        0,
        log_prob_B=None,
        credit_BK=value_B.unsqueeze(1) * z_NGK.flatten(0, 1),
        value_B=value_B,
        z_BK=z_NGK.flatten(0, 1),
        rank_BJ=rank_BJ if noise is None else None,  # type: ignore[arg-type]
        task_B=torch.zeros(rows, dtype=torch.long),
    )
    buffer = MetaBuffer()
    buffer.add(decisions)
    learner.learn(conductor, AnchorSignal(), buffer, step=lambda _: {}, batch=0)
    assert learner.fitted is not None
    fresh_NGK, _ = sampled(400)
    fresh_BK, h_BD = fresh_NGK.flatten(0, 1), torch.ones(400 * size, WIDTH)
    weights_BK = conductor.probabilities(h_BD, torch.ones(400 * size, 2, dtype=torch.bool))
    weighed_B = (weights_BK * fresh_BK).sum(1)
    c_N, _ = expected_correlation(weighed_B, conductor.predicted(h_BD, fresh_BK), learner.fitted.noise, size)
    return float(c_N.mean())


@pytest.mark.parametrize("shown", [2, 4, 8])
@pytest.mark.parametrize(("worth", "noise"), [(0.6, 0.8), (0.9, 0.4359), (0.2, 0.98)])
def test_a_rated_correlation_is_found_whatever_was_shown(worth: float, noise: float, shown: int) -> None:
    found = taught(RidgeLearner(window=20_000), 1000, worth, noise, shown)
    assert found == pytest.approx(worth, abs=0.06)
    assert taught(RidgeLearner(target="choice", window=20_000), 1000, worth, noise, shown) == pytest.approx(
        found, abs=1e-3
    )


def test_few_labels_say_less_and_labels_against_the_rewards_nothing() -> None:
    assert 0 < taught(RidgeLearner(), 2, 0.6, 0.8, 8) < 0.45
    assert taught(RidgeLearner(window=20_000), 500, -0.6, 0.8, 8) < 0.1  # of the idle one, by chance


@pytest.mark.parametrize("worth", [0.5, 1.0, 2.0])
def test_a_chosen_correlation_is_that_with_one_look(worth: float) -> None:
    found = taught(RidgeLearner(target="choice", window=20_000), 1000, worth, None)
    assert found == pytest.approx(worth / (1 + worth**2) ** 0.5, abs=0.06)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i}", "task": "ab"[i % 2], "split": "train"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("hybrid", [0.0, 0.5, 1.0])
def test_advantages_are_shrunk_where_nothing_but_rewards_is_known(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hybrid: float
) -> None:
    def quarter(weighed_B: torch.Tensor, predicted_B: torch.Tensor, noise: float, size: int) -> Any:
        c, tells = expected_correlation(weighed_B, predicted_B, noise, size)
        return torch.full_like(c, 0.25), tells

    def only_a(completion: str, task: str, **_: Any) -> float | None:
        return sometimes(completion) if task == "a" else None

    monkeypatch.setattr(outer_loop, "expected_correlation", quarter)
    _, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor(only_a)),
        steps=6,
        weigher=soft(norm="center"),
        meta=Meta(signal=AnchorSignal(), learner="ridge", every=1),
        anchoring=Anchoring(fraction=0.5, coverage=False, shrink=True, hybrid=hybrid),
    )
    known, seen = False, set()
    for rollout, logged in zip(watch.rollouts, watch.logged, strict=True):
        labelled_N = (~anchor_values(rollout).isnan()).view(-1, 4).any(1)
        plain_B = group_advantages(rollout.scalar_B, 4)
        for n, task in enumerate(rollout.columns["task"]):
            rows = slice(4 * n, 4 * n + 4)
            gain = 1.0
            if known and task == "a":  # of a mixture with the labels: (0.5 x 0.25 + 0.5) / sqrt(0.25 + 0.25 + 0.125)
                gain = {0.0: 0.25, 0.5: 0.7905694, 1.0: 1.0}[hybrid] if labelled_N[n] else 0.25
            torch.testing.assert_close(rollout.advantages_B[rows], gain * plain_B[rows], equal_nan=True)
            seen.add((task, bool(labelled_N[n]), gain < 1))
        assert ("conductor/expected_correlation/a" in logged) == (known and bool(logged))
        assert "conductor/expected_correlation/b" not in logged  # nothing was said of it
        known = known or bool(labelled_N.any())
    assert {("a", False, True), ("a", True, hybrid < 1), ("b", False, False)} <= seen


@pytest.mark.parametrize("hybrid", [0.0, 0.5])
def test_a_gate_and_a_label_alone_are_not_shrunk(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hybrid: float
) -> None:
    """Rewards that are the same for all say nothing: what is left of the advantages is the gate's and the anchor's."""

    def nothing(weighed_B: torch.Tensor, predicted_B: torch.Tensor, noise: float, size: int) -> Any:
        c, tells = expected_correlation(torch.zeros_like(weighed_B), predicted_B, noise, size)
        assert not bool(tells.any())
        return c, tells

    monkeypatch.setattr(outer_loop, "expected_correlation", nothing)
    gate = FunctionReward(function=lambda completion: float(sum(map(ord, completion)) % 2), name="gate", role="gate")
    _, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(gate, anchor()),
        steps=6,
        weigher=soft(norm="center"),
        meta=Meta(signal=AnchorSignal(), learner="ridge", every=1),
        anchoring=Anchoring(fraction=0.5, shrink=True, hybrid=hybrid),
    )
    told, seen = set(), set()
    for rollout in watch.rollouts:
        labelled_N = (~anchor_values(rollout).isnan()).view(-1, 4).any(1)
        labelled_B = labelled_N.repeat_interleave(4)
        new_B = torch.tensor([task not in told for task in rollout.columns["task"]]).repeat_interleave(4)
        closed_B = rollout.rewards["gate"].values_B < 1
        kept_B = closed_B | (labelled_B if hybrid else torch.zeros_like(labelled_B)) | new_B
        plain_B = group_advantages(rollout.scalar_B, 4)
        assert torch.equal(rollout.advantages_B, torch.where(kept_B, plain_B, 0.0))
        assert rollout.gain_B is not None
        assert torch.equal(rollout.gain_B, kept_B.float())
        seen |= set(zip(kept_B[~new_B].tolist(), (plain_B[~new_B] != 0).tolist(), strict=True))
        told |= {task for task, ok in zip(rollout.columns["task"], labelled_N.tolist(), strict=True) if ok}
    assert {(True, True), (False, True)} <= seen


def test_a_penalty_in_the_reward_cannot_be_shrunk(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"shrink=true with model\.kl\.place=reward.*Give model\.kl\.place: loss"):
        watched_fit(
            tmp_path,
            tiny_qwen3,
            prompts,
            rewards(anchor()),
            weigher=soft(norm="center"),
            meta=Meta(signal=AnchorSignal(), learner="ridge", every=1),
            anchoring=Anchoring(shrink=True),
            kl=KL(coef=0.1, place="reward"),
        )


def test_nothing_is_shrunk_before_the_first_fit_and_a_resumed_run_goes_on(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    """Between the first labels and the first fit the coefficients are 0, and so would every gradient be."""
    options = {
        "weigher": soft(norm="center"),
        "meta": Meta(signal=AnchorSignal(), learner="ridge", every=4),
        "anchoring": Anchoring(fraction=1.0, shrink=True),
    }
    module, watch = watched_fit(tmp_path, tiny_qwen3, prompts, rewards(anchor()), steps=6, **options)
    for step, (rollout, logged) in enumerate(zip(watch.rollouts, watch.logged, strict=True)):
        plain_B = group_advantages(rollout.scalar_B, 4)
        assert torch.equal(rollout.advantages_B, plain_B) == (step < 4)
        assert any(key.startswith("conductor/expected_correlation/") for key in logged) == (step >= 4)
    assert module.skipped_steps == 0
    other = RidgeLearner()
    other.load_state_dict(module.outer.learner.state_dict())
    assert other.fitted == module.outer.learner.fitted is not None
    saved = module.outer.learner.state_dict()
    del saved["fitted"]  # of a version that did not know it
    other.load_state_dict(saved)
    assert other.fitted is None


def test_what_cannot_expect_anything_cannot_shrink(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    anchored = {"signal": AnchorSignal(), "every": 1}
    for options in (
        {"weigher": EqualWeights()},
        {"weigher": soft(norm="center"), "meta": Meta(**anchored, learner="gradient")},
        {"weigher": soft(norm="center"), "meta": Meta(**anchored, learner=RidgeLearner(target="covariance"))},
    ):
        with pytest.raises(UserError, match=r"anchoring\.shrink=true with (EqualWeights|Conductor) and"):
            watched_fit(tmp_path, tiny_qwen3, prompts, rewards(anchor()), anchoring=Anchoring(shrink=True), **options)
