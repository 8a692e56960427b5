"""How well the weighed reward is expected to go along with the anchor, and advantages that are shrunk to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import nnls

from maestro_pl import Anchoring, Meta
from maestro_pl.algorithm.advantages import group_advantages
from maestro_pl.algorithm.simplex import SHRINK, best_correlating
from maestro_pl.conductor import AnchorSignal, RidgeLearner, anchor_values
from maestro_pl.conductor.choices import LOGIT
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.errors import UserError
from tests.conductor.test_anchor_runs import anchor, fit, sometimes
from tests.support import rewards

WIDTH = 8


def soft(**options: Any) -> Conductor:
    return Conductor(action="soft", context="prompt", **options)


def test_the_spread_of_what_is_predicted_by_hand() -> None:
    every = torch.ones(1, 2, dtype=torch.bool)
    weights, spread = best_correlating(torch.tensor([[0.3, 0.4]]), torch.eye(2), every)
    torch.testing.assert_close(weights, torch.tensor([[3 / 7, 4 / 7]]))
    assert float(spread) == pytest.approx((0.25 / (1 + SHRINK)) ** 0.5, rel=1e-5)
    assert float(best_correlating(torch.tensor([[-0.3, -0.4]]), torch.eye(2), every)[1]) == 0.0
    torch.manual_seed(0)
    for _ in range(20):
        c, q = torch.corrcoef(torch.randn(4, 9)), torch.randn(4)
        root = torch.linalg.cholesky((c + SHRINK * torch.eye(4)).double()).T
        expected, _ = nnls(root.numpy(), torch.linalg.solve(root.T, q.double()).numpy())
        got = best_correlating(q[None], c, torch.ones(1, 4, dtype=torch.bool))[1]
        assert float(got) == pytest.approx(float(expected @ q.numpy()) ** 0.5, abs=2e-3)


def taught(learner: RidgeLearner, groups: int, choose: bool, worth: float, noise: float) -> Conductor:
    """A Conductor of two rewards, the first of which is worth ``worth`` a standard deviation to a judge that errs."""
    draw = torch.Generator().manual_seed(0)
    conductor = soft()
    conductor.build(WIDTH, ["good", "idle"])
    learner.attach(conductor, AnchorSignal())
    z_NGK = torch.randn(groups, 4, 2, generator=draw)
    z_NGK = (z_NGK - z_NGK.mean(1, keepdim=True)) / z_NGK.std(1, correction=0, keepdim=True)
    rows = groups * 4
    value_NG = worth * z_NGK[:, :, 0]
    if choose:  # an error of Gumbel's kind, with a deviation of 1
        value_NG = value_NG - torch.empty(groups, 4).exponential_(generator=draw).log() / LOGIT
    else:
        value_NG = value_NG + noise * torch.randn(groups, 4, generator=draw)
    best_NG = (value_NG == value_NG.max(1, keepdim=True).values).long()
    conductor.observe_rewards(z_NGK.flatten(0, 1), torch.ones(rows, 2, dtype=torch.bool))
    nothing = torch.full((rows,), torch.nan)
    learner.remembered = {
        "h_BD": torch.ones(rows, WIDTH),
        "z_BK": z_NGK.flatten(0, 1),
        "value_B": nothing if choose else value_NG.flatten(),
        "credit_BK": torch.zeros(rows, 2),
        "mask_BK": torch.ones(rows, 2, dtype=torch.bool),
        "group_B": torch.arange(groups).repeat_interleave(4),
        "step_B": torch.zeros(rows, dtype=torch.long),
        "rank_B": 1 - best_NG.flatten() if choose else torch.full((rows,), -1),
        "task_B": torch.zeros(rows, dtype=torch.long),
    }
    found = learner.fit(conductor)
    assert found is not None
    conductor.set_linear(found.map_KF)
    return conductor


def expected(conductor: Conductor) -> float:
    return float(conductor.expected_correlation(torch.ones(1, WIDTH), torch.ones(1, 2, dtype=torch.bool)))


def test_a_rated_correlation_is_found_and_few_labels_say_less() -> None:
    many = taught(
        RidgeLearner(window=10_000), 1000, False, 0.6, 0.8
    )  # a value of spread 1, of which 0.6 is the reward's
    assert expected(many) == pytest.approx(0.6, abs=0.04)
    few = taught(RidgeLearner(), 2, False, 0.6, 0.8)
    assert 0 < expected(few) < 0.35
    against = taught(RidgeLearner(), 500, False, -0.6, 0.8)
    assert expected(against) < 0.1  # of the idle one, by chance


@pytest.mark.parametrize("worth", [0.5, 1.0])
def test_a_chosen_correlation_is_that_with_one_look(worth: float) -> None:
    conductor = taught(RidgeLearner(target="choice", window=10_000), 1000, True, worth, 0.0)
    assert expected(conductor) == pytest.approx(worth / (1 + worth**2) ** 0.5, abs=0.06)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i}", "task": "ab"[i % 2], "split": "train"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("hybrid", [0.0, 1.0])
def test_advantages_are_shrunk_where_nothing_but_rewards_is_known(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hybrid: float
) -> None:
    def by_response(self: Conductor, h_BD: torch.Tensor, mask_BK: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat(len(h_BD) // 4)

    def only_a(completion: str, task: str, **_: Any) -> float | None:
        return sometimes(completion) if task == "a" else None

    monkeypatch.setattr(Conductor, "expected_correlation", by_response)
    _, watch = fit(
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
            own = bool(labelled_N[n]) and hybrid > 0  # its labels are what it is trained on
            gain = 0.25 if known and task == "a" and not own else 1.0
            torch.testing.assert_close(rollout.advantages_B[rows], gain * plain_B[rows], equal_nan=True)
            seen.add((task, bool(labelled_N[n]), gain))
        assert ("conductor/expected_correlation/a" in logged) == known
        assert "conductor/expected_correlation/b" not in logged  # nothing was said of it
        known = known or bool(labelled_N.any())
    assert {("a", False, 0.25), ("a", True, 1.0 if hybrid else 0.25), ("b", False, 1.0)} <= seen


def test_what_cannot_expect_anything_cannot_shrink(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    anchored = {"signal": AnchorSignal(), "every": 1}
    for options in (
        {"weigher": EqualWeights()},
        {"weigher": soft(norm="center"), "meta": Meta(**anchored, learner="gradient")},
        {"weigher": soft(norm="center"), "meta": Meta(**anchored, learner=RidgeLearner(mapping="softmax"))},
    ):
        with pytest.raises(UserError, match=r"anchoring\.shrink=true with (EqualWeights|Conductor) and"):
            fit(tmp_path, tiny_qwen3, prompts, rewards(anchor()), anchoring=Anchoring(shrink=True), **options)
