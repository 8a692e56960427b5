"""Labels by task: who is labelled first, what becomes of a task without labels, and of one on which no reward helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import ConductorHealth
from callbacks.rewards import BestOfAnchor, FunctionReward
from maestro_pl import Anchoring, Meta
from maestro_pl.conductor import AnchorSignal, Decisions, LabelSchedule, RidgeLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.labels import task_id
from maestro_pl.data import PromptDataModule
from maestro_pl.evaluation.health.findings import Thresholds, examine_drift, examine_unhelped
from maestro_pl.rollout import Rollout
from tests.support import Watch, elevens, module_of, sevens, trainer_of


def soft() -> Conductor:
    return Conductor(action="soft", norm="center", context="prompt")


# -- who is labelled -------------------------------------------------------------------------------------------------


def test_the_task_with_the_fewest_labels_comes_first() -> None:
    schedule = LabelSchedule(0.25, seed=1)
    for batch in range(20):
        plain = schedule.draw(8, batch)
        tasks = ["common"] * 7 + ["rare"]
        labelled = schedule.draw(8, batch, 0, tasks, {"common": 3})
        assert int(labelled.sum()) == int(plain.sum()) == 2
        assert bool(labelled[7])
        assert torch.equal(labelled, schedule.draw(8, batch, 0, tasks, {"common": 3}))
    one_each = LabelSchedule(0.5).draw(4, 0, 0, ["a", "a", "b", "b"])
    assert one_each.view(2, 2).sum(1).tolist() == [1, 1]
    assert int(LabelSchedule(1.0).draw(3, 0, 0, ["a", "b", "b"]).sum()) == 3


def test_a_rare_task_gets_its_share() -> None:
    """One group in sixteen is of the rare task: without coverage it would get a sixteenth of the labels."""
    schedule, asked = LabelSchedule(None, seed=2), {"common": 0, "rare": 0}
    generator = torch.Generator().manual_seed(0)
    for batch in range(80):
        tasks = ["rare" if float(torch.rand((), generator=generator)) < 1 / 16 else "common" for _ in range(8)]
        (chosen,) = schedule.draw(8, batch, 0, tasks, asked).nonzero()[:, 0].tolist()
        asked[tasks[chosen]] += 1
    assert asked["rare"] > 20


# -- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i}", "task": "ab"[i % 2], "split": "train"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fit(tmp_path: Path, folder: Path, prompts: Path, anchors: list[Any], steps: int = 2, **options: Any) -> Any:
    options.setdefault("meta", Meta(AnchorSignal(), RidgeLearner(), every=1, warmup=2))
    module, keep = module_of(folder, weigher=soft(), **options), Watch()
    torch.manual_seed(0)
    two = [
        FunctionReward(function=sevens, name="sevens", normalize="zscore"),
        FunctionReward(function=elevens, name="elevens", normalize="zscore"),
    ]
    extra = options.pop("extra", [])
    trainer = trainer_of(tmp_path, [*two, *anchors, *extra, keep], max_steps=steps, limit_val_batches=0)
    trainer.fit(module, PromptDataModule(sources=str(prompts), batch_size=4, show=False))
    return module, keep.rollouts


def of_task(rollout: Rollout, task: str) -> torch.Tensor:
    return torch.tensor([t == task for t in rollout.tasks])


@pytest.mark.parametrize("how", ["equal", "weighed", "skipped"])
def test_a_task_without_labels(tiny_qwen3: Path, prompts: Path, tmp_path: Path, how: Any) -> None:
    anchor = FunctionReward(function=sevens, name="anchor", role="anchor", tasks=["a"])
    said = {"equal": "weighed equally", "weighed": "worse than equal", "skipped": "do not train the policy"}[how]
    with pytest.warns(UserWarning, match=rf"said nothing of the tasks b: .*{said}"):
        module, rollouts = fit(
            tmp_path, tiny_qwen3, prompts, [anchor], anchoring=Anchoring(fraction=0.5, unlabelled_tasks=how)
        )
    last = rollouts[-1]
    weights = last.weights_BK[of_task(last, "b")]
    if how == "equal":
        torch.testing.assert_close(weights, torch.full_like(weights, 0.5))
    elif how == "skipped":
        assert float(weights.abs().max()) == 0.0
        assert float(last.advantages_B[of_task(last, "b")].abs().max()) == 0.0
    assert float(last.weights_BK[of_task(last, "a")][:, 0].mean()) > 0.6  # what the anchor says
    assert module.outer.counts.tasks["b"].answered == 0 < module.outer.counts.tasks["b"].groups


@pytest.mark.parametrize("hybrid", [0.0, 0.5])
def test_where_no_reward_helps_the_policy_is_not_trained(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, hybrid: float
) -> None:
    """On task a the anchor is the opposite of both rewards."""

    def against(completion: str, task: str) -> float:
        total = sevens(completion) + elevens(completion)
        return total if task == "b" else -total

    health = ConductorHealth(patience=1)
    with pytest.warns(UserWarning, match=r"every reward goes against the anchor on a: sevens -"):
        module, rollouts = fit(
            tmp_path,
            tiny_qwen3,
            prompts,
            [FunctionReward(function=against, name="anchor", role="anchor"), health],
            meta=Meta(AnchorSignal(), RidgeLearner(ridge=3.0), every=1, warmup=5),
            anchoring=Anchoring(fraction=1.0, hybrid=hybrid),
        )
    assert set(module.outer.unhelped) == {"a"}
    last = rollouts[-1]
    on_a, on_b = of_task(last, "a"), of_task(last, "b")
    assert float(last.weights_BK[on_a].abs().max()) == 0.0
    torch.testing.assert_close(last.weights_BK[on_b].sum(1), torch.ones(int(on_b.sum())))
    moved = float(last.advantages_B[on_a].abs().max())
    assert moved > 0.5 if hybrid else moved == 0.0
    assert "no_reward_helps" in {finding.key for finding in health.findings}
    assert "collapse_to_uniform" not in {finding.key for finding in health.findings}


def test_a_task_of_which_choices_told_nothing_is_weighed_equally(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    """On task a the person chooses against both rewards, on task b everything is as good as everything else."""

    def best(responses: list[str], task: str) -> set[int]:
        worth = [0.0 if task == "b" else -sevens(text) - elevens(text) for text in responses]
        return {place for place, value in enumerate(worth) if value == max(worth)}

    module, rollouts = fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        [BestOfAnchor(function=best, name="anchor")],
        meta=Meta(AnchorSignal(), RidgeLearner(target="choice"), every=1, warmup=5),
        anchoring=Anchoring(fraction=1.0),
    )
    counted = module.outer.counts.tasks["b"]
    assert counted.answered == 0 < counted.choices
    assert set(module.outer.unhelped) == {"a"}
    learner = module.outer.learner
    assert isinstance(learner, RidgeLearner)
    assert learner.fitted is not None
    assert learner.fitted.tasks == {task_id("a")}
    last = rollouts[-1]
    weights = last.weights_BK[of_task(last, "b")]
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))


def test_what_is_unhelped_is_in_the_checkpoint(tiny_qwen3: Path) -> None:
    module = module_of(tiny_qwen3, weigher=soft(), meta=Meta(AnchorSignal(), RidgeLearner()))
    module.outer.unhelped = {"a": {"sevens": (-0.5, 0.1)}}
    state = module.outer.state_dict()
    module.outer.unhelped = {}
    module.outer.load_state_dict(state)
    assert module.outer.unhelped == {"a": {"sevens": (-0.5, 0.1)}}
    for name in ("label_counts", "label_scale", "unhelped"):
        del state[name]
    module.outer.load_state_dict(state)  # a checkpoint of before
    assert module.outer.unhelped == {}


# -- what the posterior says -----------------------------------------------------------------------------------------


def decisions(groups: int, sign: float, noise: float, seed: int = 0) -> Decisions:
    """Groups of 4 of one task, whose value is `sign` times the sum of two rewards, with an error."""
    generator = torch.Generator().manual_seed(seed)
    group_B = torch.arange(groups).repeat_interleave(4)
    z_BK = torch.randn(len(group_B), 2, generator=generator)
    value_B = sign * z_BK.sum(1) / 2**0.5 + noise * torch.randn(len(group_B), generator=generator)
    h_BD = torch.ones(len(group_B), 4) + 0.1 * torch.randn(len(group_B), 4, generator=generator)
    return Decisions(
        h_BD, torch.ones_like(z_BK).bool(), torch.full_like(group_B, -1), torch.zeros(len(group_B)), group_B, 0,
        value_B=value_B, z_BK=z_BK, task_B=torch.full_like(group_B, task_id("a")),
    )  # fmt: skip


@pytest.mark.parametrize(("sign", "groups", "unhelped"), [(-1.0, 20, True), (1.0, 20, False), (-1.0, 0, False)])
def test_only_what_the_posterior_is_sure_of_counts(sign: float, groups: int, unhelped: bool) -> None:
    made, learner = soft(), RidgeLearner()
    made.build(4, ["x", "y"])
    learner.attach(made, AnchorSignal())
    batch = decisions(groups or 20, sign if groups else 0.0, 0.7)
    made.observe_rewards(batch.z_BK, batch.mask_BK)
    made(batch.h_BD, batch.z_BK, batch.mask_BK, True)
    learner.remember(batch, 0)
    fit = learner.fit(made)
    assert fit is not None
    found = learner._unhelped(made, fit)
    assert (set(found) == {task_id("a")}) == unhelped
    if unhelped:
        mean_K, deviation_K, applies_K = found[task_id("a")]
        x = made.features(batch.h_BD).mean(0, keepdim=True)
        correlation = made.correlation.matrix_KK  # type: ignore[union-attr]
        torch.testing.assert_close(mean_K, correlation @ (fit.map_KF @ x[0]))
        variance = (correlation @ fit.covariance(x)[0] @ correlation.T).diagonal()
        torch.testing.assert_close(deviation_K, variance.sqrt())
        assert applies_K.tolist() == [True, True]


# -- health ----------------------------------------------------------------------------------------------------------


def test_a_context_that_falls_away_is_found() -> None:
    limits = Thresholds()
    assert examine_drift([0.9] * 9, limits).examined == []
    steady = examine_drift([0.5, 0.7, *[0.9] * 12, 0.5, 0.9], limits, 3)
    assert steady.examined == ["context_drifts"]
    assert not steady.findings
    (finding,) = examine_drift([*[0.9] * 8, *[0.6] * 8], limits, 3).findings
    assert "was 0.90 and is 0.60" in finding.text
    assert "state: base" in finding.advice


def test_unhelped_tasks_are_named_with_their_rewards() -> None:
    assert not examine_unhelped({}).findings
    (finding,) = examine_unhelped({"a": {"x": (-0.5, 0.1), "y": (-0.3, 0.2)}}, 0.5, 7).findings
    assert "a: x -0.50 (deviation 0.10), y -0.30 (deviation 0.20)" in finding.text
    assert "only the anchor's labels" in finding.text
    assert finding.step == 7
