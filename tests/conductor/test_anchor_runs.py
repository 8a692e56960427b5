"""Anchors, warm-up, hybrid rewards and learners under a real Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch

from callbacks.rewards import BestOfAnchor, FunctionReward
from maestro_pl import KL, Advantages, Anchoring, Meta
from maestro_pl.algorithm.advantages import group_advantages, normalize_rewards
from maestro_pl.conductor import (
    AdvantageSignal,
    AnchorSignal,
    GradientLearner,
    RidgeLearner,
    WeighedRollout,
    anchor_values,
)
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import UserError
from tests.support import constant, module_of, rewards, trainer_of, watched_fit


def fives(completion: str, **_: Any) -> float:
    return float(sum(map(ord, completion)) % 5)


def sometimes(completion: str, **_: Any) -> float | None:
    return None if sum(map(ord, completion)) % 3 == 0 else fives(completion)


def shortest(responses: list[str]) -> int:
    return min(range(len(responses)), key=lambda i: len(responses[i]))


def anchor(function: Any = fives) -> FunctionReward:
    return FunctionReward(function=function, name="anchor", role="anchor")


def soft(**options: Any) -> Conductor:
    return Conductor(action="soft", norm="center", context="prompt", **options)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"word {i}", "task": "ab"[i % 2], "split": "train" if i < 8 else "validation"} for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_of(prompts: Path) -> PromptDataModule:
    return PromptDataModule(sources=str(prompts), batch_size=2, show=False)


class SaveAfter(L.Callback):
    """Writes a checkpoint after the first batch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            trainer.save_checkpoint(self.path)


def test_an_anchor_scores_the_drawn_groups_only_and_is_never_weighed(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    calls: list[str] = []

    def counted(completion: str) -> float:
        calls.append(completion)
        return fives(completion)

    module, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor(counted)),
        steps=4,
        weigher=soft(),
        meta=Meta(signal=AnchorSignal(), learner="ridge"),
        anchoring=Anchoring(fraction=0.25),
    )
    scored = [r.rewards["anchor"].mask_B.view(-1, 4).all(1).tolist() for r in watch.rollouts]
    assert sum(map(sum, scored)) == module.outer.labelled_groups
    assert abs(module.outer.labelled_groups - 2) <= 1  # a quarter of 8 groups
    assert len(calls) == 4 * module.outer.labelled_groups
    assert module.weight_names == ["sevens", "elevens"]
    assert all(r.weights_BK.shape == (8, 2) for r in watch.rollouts)


@pytest.mark.parametrize("weigher", [EqualWeights, Conductor])
def test_nothing_is_labelled_where_nobody_reads_it(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, weigher: Any
) -> None:
    def forbidden(completion: str) -> float:
        raise AssertionError("asked")

    chain = rewards(anchor(forbidden))
    module, watch = watched_fit(
        tmp_path, tiny_qwen3, prompts, chain, weigher=weigher(), meta=Meta(signal=AdvantageSignal())
    )
    assert module.outer.labelled_groups == 0
    assert not any(r.rewards["anchor"].mask_B.any() for r in watch.rollouts)


def test_in_an_evaluation_an_anchor_scores_everything(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(
        tiny_qwen3,
        weigher=soft(),
        meta=Meta(signal=AnchorSignal(), learner="ridge"),
        anchoring=Anchoring(fraction=0.01),
    )
    trainer = trainer_of(tmp_path, rewards(anchor()), max_steps=1)
    trainer.validate(module, data_of(prompts), verbose=False)
    rows = [row for row in module.evaluation if row["metric"] == "reward/anchor" and row["task"] == "all"]
    assert [row["n"] for row in rows] == [2]


def test_the_warm_up_moves_the_conductor_and_not_the_policy(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor()),
        steps=2,
        weigher=soft(),
        meta=Meta(signal=AnchorSignal(), learner="ridge", warmup=3),
        anchoring=Anchoring(fraction=0.01),
    )
    assert len(watch.rollouts) == 5
    assert (module.policy_steps, module.outer.warmup_done, module.batches_done) == (2, 3, 5)
    for batch in range(3):
        assert all(torch.equal(a, b) for a, b in zip(watch.adapters[0], watch.adapters[batch + 1], strict=True))
        assert bool(watch.rollouts[batch].rewards["anchor"].mask_B.all())
    assert not all(torch.equal(a, b) for a, b in zip(watch.adapters[3], watch.adapters[4], strict=True))
    assert module.outer.labelled_groups in (6, 7)
    texts = [tuple(r.responses) for r in watch.rollouts]
    assert len(set(texts)) == 5  # every batch of the warm-up is sampled anew
    equal = torch.full((8, 2), 0.5)
    torch.testing.assert_close(watch.rollouts[0].weights_BK, equal)
    assert not torch.allclose(watch.rollouts[3].weights_BK, equal)
    assert all("policy/grad_norm" not in watch.logged[batch] for batch in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 3, "in the warm-up"])
@pytest.mark.parametrize("learner", ["ridge", "ucb", "gradient", "choices"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, stop_after: int | str, learner: str
) -> None:
    def run(steps: int, **options: Any) -> tuple[Any, L.Trainer]:
        made: Any = {
            "ridge": RidgeLearner(forgetting=0.9),
            "ucb": RidgeLearner(exploration="ucb"),
            "gradient": GradientLearner(replay=2, ema=0.5, target_entropy=0.8),
            "choices": RidgeLearner(target="choice", prior_mean=0.1),
        }[learner]
        chosen = learner == "choices"
        module = module_of(
            tiny_qwen3,
            weigher=soft(state="base") if chosen else soft(),
            meta=Meta(signal=AnchorSignal(), learner=made, every=1, warmup=2),
            anchoring=Anchoring(fraction=0.5, hybrid=0.5, responses=3 if chosen else None),
        )
        torch.manual_seed(0)
        anchors = [BestOfAnchor(shortest, tasks=["a"]), anchor()] if chosen else [anchor()]
        early = [SaveAfter(tmp_path / "part.ckpt")] if options.pop("after_one", False) else []
        trainer = trainer_of(tmp_path, [*rewards(*anchors), *early], max_steps=steps)
        trainer.fit(module, data_of(prompts), weights_only=True, **options)
        return module, trainer

    straight, _ = run(5)
    if isinstance(stop_after, int):
        _, trainer = run(stop_after)
        trainer.save_checkpoint(tmp_path / "part.ckpt")
    else:
        run(1, after_one=True)
    resumed, _ = run(5, ckpt_path=tmp_path / "part.ckpt")
    assert (resumed.policy_steps, resumed.outer.warmup_done) == (5, 2)
    assert resumed.outer.labelled_groups == straight.outer.labelled_groups
    assert resumed.outer.counts.tasks == straight.outer.counts.tasks
    assert resumed.frozen_states.read == straight.frozen_states.read
    expected, got = straight.state_dict(), resumed.state_dict()
    assert set(expected) == set(got)
    assert any(name.startswith("weigher.scale.mean_D") for name in got)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)


def test_hybrid_rewards_by_hand(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    _, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor(sometimes)),
        steps=4,
        weigher=EqualWeights(),
        anchoring=Anchoring(hybrid=0.25, fraction=0.5),
    )
    mixed = 0
    for rollout in watch.rollouts:
        a, b = (rollout.rewards[name] for name in ("sevens", "elevens"))
        weighed = 0.5 * normalize_rewards(a.values_B, a.mask_B, 4, "zscore")
        weighed += 0.5 * normalize_rewards(b.values_B, b.mask_B, 4, "rank")
        value = anchor_values(rollout)
        z = normalize_rewards(weighed, torch.ones(8, dtype=torch.bool), 4, "zscore")
        expected = torch.where(value.isnan(), weighed, 0.75 * z + 0.25 * value)
        # a response without a label in a labelled group has no place on the group's mixed scale
        group_known = (~value.isnan()).view(-1, 4).any(1).repeat_interleave(4)
        expected = torch.where(group_known & value.isnan(), torch.nan, expected)
        torch.testing.assert_close(rollout.scalar_B, expected, equal_nan=True)
        torch.testing.assert_close(rollout.advantages_B, group_advantages(expected, 4))
        mixed += int((~value.isnan()).sum())
    assert mixed > 0


def test_labels_alone_train_on_labelled_groups_only(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor()),
        steps=4,
        weigher=EqualWeights(),
        anchoring=Anchoring(hybrid=1.0, unlabelled="skipped", fraction=0.5),
    )
    assert module.outer.labelled_groups == 4
    for rollout in watch.rollouts:
        labelled = rollout.rewards["anchor"].mask_B
        assert bool(rollout.scalar_B[~labelled].isnan().all())
        assert bool((rollout.advantages_B[~labelled] == 0).all())
        torch.testing.assert_close(
            rollout.advantages_B[labelled],
            group_advantages(rollout.rewards["anchor"].values_B[labelled], 4),
            atol=2e-3,
            rtol=2e-3,
        )


def test_a_closed_gate_keeps_its_response_below_the_labelled_ones(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    def closed(completion: str) -> float:
        return float(sum(map(ord, completion)) % 2)

    gate = FunctionReward(function=closed, name="gate", role="gate")
    _, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(gate, anchor()),
        weigher=EqualWeights(),
        anchoring=Anchoring(hybrid=1.0, fraction=1.0),
    )
    seen = 0
    for rollout in watch.rollouts:
        scalar, open_ = rollout.scalar_B.view(-1, 4), rollout.rewards["gate"].values_B.view(-1, 4).bool()
        for group, passes in zip(scalar, open_, strict=True):
            if passes.any() and not passes.all():
                assert float(group[~passes].max()) <= float(group[passes].min())
                seen += 1
    assert seen


def test_one_ruler_a_group(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    _, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(),
        weigher=Conductor(action="one_hot"),
        advantages=Advantages(scope="group"),
        meta=Meta(every=1),
    )
    for rollout in watch.rollouts:
        groups = rollout.weights_BK.view(2, 4, 2)
        torch.testing.assert_close(groups, groups[:, :1].expand_as(groups))
        torch.testing.assert_close(rollout.weights_BK.sum(1), torch.ones(8))


@pytest.mark.parametrize("learner", ["reinforce", "gradient"])
def test_the_gradient_learners_take_an_anchor_too(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, learner: Any
) -> None:
    weigher = Conductor(action="mix", context="both", norm="center")
    module, _ = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor()),
        weigher=weigher,
        meta=Meta(signal=AnchorSignal(), learner=learner, every=1),
        anchoring=Anchoring(fraction=1.0),
    )
    assert module.outer.updates == 3
    assert bool((weigher.net[0].weight != 0).any())
    assert weigher.net[0].in_features == 64


def test_the_advantage_signal_in_expectation_runs(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, _ = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(),
        weigher=Conductor(action="mix"),
        meta=Meta(signal=AdvantageSignal(actions="expected"), learner="gradient", every=1),
    )
    assert module.outer.updates == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weigher": soft(), "meta": Meta(signal=AnchorSignal(), learner="ridge")}, "no reward has the role 'anchor'"),
        ({"weigher": EqualWeights(), "anchoring": Anchoring(hybrid=0.5)}, "no reward has the role 'anchor'"),
    ],
)
def test_an_anchor_must_be_there(tiny_qwen3: Path, prompts: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        watched_fit(tmp_path, tiny_qwen3, prompts, rewards(), **options)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda _: Anchoring(hybrid=1.5), "hybrid=1.5"),
        (lambda _: Anchoring(unlabelled="skipped"), "hybrid: 1"),
        (lambda _: Anchoring(unlabelled="x"), "unlabelled='x'"),  # type: ignore[arg-type]
        (lambda _: Advantages(scope="x"), "scope='x'"),  # type: ignore[arg-type]
        (lambda _: Meta(warmup=-1), r"meta\.warmup=-1"),
        (lambda _: Anchoring(fraction=0.0), r"anchoring\.fraction=0.0"),
        (lambda _: Meta(learner="x"), "learner='x'"),  # type: ignore[arg-type]
        (lambda model: module_of(model, meta=Meta(coupling="joint", learner="gradient")), "model.meta.learner out"),
        (lambda model: module_of(model, meta=Meta(coupling="joint"), weigher=soft()), "joint"),
    ],
)
def test_bad_values_are_sentences(tiny_qwen3: Path, made: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tiny_qwen3)


def test_a_constant_anchor_is_counted_and_teaches_nothing(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor(constant)),
        weigher=soft(),
        meta=Meta(signal=AnchorSignal(), learner="ridge", every=1),
        anchoring=Anchoring(fraction=1.0, hybrid=1.0),
    )
    assert watch.logged[-1]["conductor/anchor_constant"] == 2.0
    assert module.outer.updates == 0
    assert not any(r.scalar_B.isnan().any() for r in watch.rollouts)  # the weighed rewards are used instead


def test_without_a_label_nothing_is_trained_not_even_the_kl(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor()),
        steps=6,
        weigher=EqualWeights(),
        anchoring=Anchoring(hybrid=1.0, unlabelled="skipped", fraction=0.25),
        kl=KL(coef=0.5),
    )
    labelled = [bool(r.rewards["anchor"].mask_B.any()) for r in watch.rollouts]
    assert 0 < sum(labelled) < 6
    after = [*watch.adapters[1:], [p.detach() for p in module.policy.trained_parameters()]]
    for known, before, now in zip(labelled, watch.adapters, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True)) is not known
    assert module.skipped_steps == 6 - sum(labelled)
    seen, nothing = watch.rollouts[labelled.index(True)], cast("Any", None)
    weights_T = module.inner.token_weights(
        WeighedRollout(seen, nothing, nothing, nothing, seen.scalar_B, seen.advantages_B)
    )
    assert float(weights_T.sum()) == pytest.approx(1.0)  # the mean over the labelled tokens alone


def test_a_gate_counts_once_beside_an_anchor(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    def half(completion: str) -> float:
        return (0.0, 0.5, 1.0)[sum(map(ord, completion)) % 3]

    def gated(hybrid: float) -> list[torch.Tensor]:
        gate = FunctionReward(function=half, name="gate", role="gate")
        _, watch = watched_fit(
            tmp_path,
            tiny_qwen3,
            prompts,
            rewards(gate, anchor()),
            steps=1,
            weigher=EqualWeights(),
            anchoring=Anchoring(hybrid=hybrid, fraction=1.0),
        )
        return [watch.rollouts[0].advantages_B, watch.rollouts[0].scalar_B]

    (plain, _), (mixed, _) = gated(0.0), gated(1e-6)
    z = normalize_rewards(plain, torch.ones(8, dtype=torch.bool), 4, "zscore")
    order = [z.view(2, 4).argsort(1).tolist(), mixed.view(2, 4).argsort(1).tolist()]
    assert order[0] == order[1]


def test_the_penalty_stays_beside_an_anchor(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    _, watch = watched_fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        rewards(anchor()),
        steps=3,
        weigher=EqualWeights(),
        anchoring=Anchoring(hybrid=1.0, fraction=1.0),
        kl=KL(coef=100.0, place="reward"),
    )
    last = watch.rollouts[-1]
    value = anchor_values(last)
    assert bool(((last.scalar_B - value)[~value.isnan()] < -1e-3).any())  # the policy has moved, and pays for it


def test_an_evaluation_does_without_the_anchor(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(tiny_qwen3, weigher=soft(), meta=Meta(signal=AnchorSignal(), learner="ridge"))
    trainer_of(tmp_path, rewards()).validate(module, data_of(prompts), verbose=False)
    assert module.evaluation


def test_a_checkpoint_goes_on_with_its_own_learner(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    common: Any = {"weigher": soft(), "anchoring": Anchoring(fraction=1.0)}
    trainer = trainer_of(tmp_path, rewards(anchor()), max_steps=1)
    trainer.fit(module_of(tiny_qwen3, meta=Meta(AnchorSignal(), "gradient"), **common), data_of(prompts))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"trained by GradientLearner, this run has model\.meta\.learner RidgeLearner"):
        trainer_of(tmp_path, rewards(anchor()), max_steps=2).fit(
            module_of(tiny_qwen3, **{**common, "weigher": soft()}, meta=Meta(AnchorSignal(), "ridge")),
            data_of(prompts),
            ckpt_path=tmp_path / "a.ckpt",
        )


@pytest.mark.parametrize(
    "options",
    [
        {"anchoring": Anchoring(hybrid=0.5)},
        {"advantages": Advantages(scope="group")},
        {"advantages": Advantages(aggregation="normalize_then_sum")},
        {"advantages": Advantages(scale="batch")},
    ],
)
def test_an_expectation_needs_a_response_of_its_own(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, options: Any
) -> None:
    signal = AdvantageSignal(actions="expected")
    with pytest.raises(UserError, match="actions: sampled"):
        watched_fit(
            tmp_path, tiny_qwen3, prompts, rewards(anchor()), meta=Meta(signal=signal, learner="gradient"), **options
        )


def test_a_warm_up_needs_a_conductor_apart_from_the_policy(tiny_qwen3: Path) -> None:
    assert module_of(tiny_qwen3, weigher=EqualWeights(), meta=Meta(warmup=3)).warmup == (0, 0)
    with pytest.raises(UserError, match="no warm-up"):
        module_of(tiny_qwen3, weigher=Conductor(), meta=Meta(coupling="joint", warmup=1))


def test_weights_of_a_fit_are_for_zscores(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"\['elevens'\] are normalised otherwise"):
        watched_fit(
            tmp_path,
            tiny_qwen3,
            prompts,
            rewards(anchor()),
            steps=1,
            weigher=soft(),
            meta=Meta(signal=AnchorSignal(), learner="ridge"),
        )
