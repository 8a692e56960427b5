"""Anchors, warm-up, hybrid rewards and learners under a real Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_module import constant, module_of, rewards, trainer_of

from callbacks.rewards import FunctionReward
from maestro_pl.advantages import group_advantages, normalize_rewards
from maestro_pl.conductor import Conductor
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import UserError
from maestro_pl.meta import AdvantageSignal, AnchorSignal, GradientLearner, RidgeLearner, anchor_values
from maestro_pl.rollout import Rollout
from maestro_pl.weighers import EqualWeights


def fives(completion: str, **_: Any) -> float:
    return float(sum(map(ord, completion)) % 5)


def sometimes(completion: str, **_: Any) -> float | None:
    return None if sum(map(ord, completion)) % 3 == 0 else fives(completion)


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


class Watch(L.Callback):
    """Keeps every training rollout, the policy's adapters before each batch, and what was logged."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.adapters: list[list[torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.adapters.append([p.detach().clone() for p in pl_module.policy.trained_parameters()])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rollouts.append(batch["rollout"])
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def fit(tmp_path: Path, folder: Path, prompts: Path, chain: list[Any], steps: int = 3, **options: Any) -> Any:
    watch, module = Watch(), module_of(folder, **options)
    torch.manual_seed(0)
    trainer_of(tmp_path, [*chain, watch], max_steps=steps, limit_val_batches=0).fit(module, data_of(prompts))
    return module, watch


def test_an_anchor_scores_the_drawn_groups_only_and_is_never_weighed(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    calls: list[str] = []

    def counted(completion: str) -> float:
        calls.append(completion)
        return fives(completion)

    module, watch = fit(
        tmp_path, tiny_qwen3, prompts, rewards(anchor(counted)), steps=4,
        weigher=soft(), meta_signal=AnchorSignal(), learner="ridge", anchor_fraction=0.25,
    )  # fmt: skip
    scored = [r.rewards["anchor"].mask_B.view(-1, 4).all(1).tolist() for r in watch.rollouts]
    assert sum(map(sum, scored)) == module.labelled_groups
    assert abs(module.labelled_groups - 2) <= 1  # a quarter of 8 groups
    assert len(calls) == 4 * module.labelled_groups
    assert module.weight_names == ["sevens", "elevens"]
    assert all(r.weights_BK.shape == (8, 2) for r in watch.rollouts)


@pytest.mark.parametrize("weigher", [EqualWeights, Conductor])
def test_nothing_is_labelled_where_nobody_reads_it(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, weigher: Any
) -> None:
    def forbidden(completion: str) -> float:
        raise AssertionError("asked")

    chain = rewards(anchor(forbidden))
    module, watch = fit(tmp_path, tiny_qwen3, prompts, chain, weigher=weigher(), meta_signal=AdvantageSignal())
    assert module.labelled_groups == 0
    assert not any(r.rewards["anchor"].mask_B.any() for r in watch.rollouts)


def test_in_an_evaluation_an_anchor_scores_everything(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(tiny_qwen3, weigher=soft(), meta_signal=AnchorSignal(), learner="ridge", anchor_fraction=0.01)
    trainer = trainer_of(tmp_path, rewards(anchor()), max_steps=1)
    trainer.validate(module, data_of(prompts), verbose=False)
    rows = [row for row in module.evaluation if row["metric"] == "reward/anchor" and row["task"] == "all"]
    assert [row["n"] for row in rows] == [2]


def test_the_warm_up_moves_the_conductor_and_not_the_policy(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, watch = fit(
        tmp_path, tiny_qwen3, prompts, rewards(anchor()), steps=2,
        weigher=soft(), meta_signal=AnchorSignal(), learner="ridge", anchor_fraction=0.01, conductor_warmup_steps=3,
    )  # fmt: skip
    assert len(watch.rollouts) == 5
    assert (module.policy_steps, module.warmup_done, module.batches_done) == (2, 3, 5)
    for batch in range(3):
        assert all(torch.equal(a, b) for a, b in zip(watch.adapters[0], watch.adapters[batch + 1], strict=True))
        assert bool(watch.rollouts[batch].rewards["anchor"].mask_B.all())
    assert not all(torch.equal(a, b) for a, b in zip(watch.adapters[3], watch.adapters[4], strict=True))
    assert module.labelled_groups in (6, 7)
    texts = [tuple(r.responses) for r in watch.rollouts]
    assert len(set(texts)) == 5  # every batch of the warm-up is sampled anew
    equal = torch.full((8, 2), 0.5)
    torch.testing.assert_close(watch.rollouts[0].weights_BK, equal)
    assert not torch.allclose(watch.rollouts[3].weights_BK, equal)
    assert all("policy/grad_norm" not in watch.logged[batch] for batch in range(3))


@pytest.mark.parametrize("stop_after", [1, 3])
@pytest.mark.parametrize("learner", ["ridge", "gradient"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, stop_after: int, learner: str
) -> None:
    def run(steps: int, **options: Any) -> tuple[Any, L.Trainer]:
        made: Any = (
            RidgeLearner(forgetting=0.9)
            if learner == "ridge"
            else GradientLearner(replay=2, ema=0.5, target_entropy=0.8)
        )
        module = module_of(
            tiny_qwen3, weigher=soft(), meta_signal=AnchorSignal(), learner=made, conductor_every=1, anchor_fraction=0.5,
            conductor_warmup_steps=2, hybrid=0.5,
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, rewards(anchor()), max_steps=steps)
        trainer.fit(module, data_of(prompts), weights_only=True, **options)
        return module, trainer

    straight, _ = run(5)
    _, trainer = run(stop_after)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed, _ = run(5, ckpt_path=tmp_path / "part.ckpt")
    assert (resumed.policy_steps, resumed.warmup_done) == (5, 2)
    assert resumed.labelled_groups == straight.labelled_groups
    expected, got = straight.state_dict(), resumed.state_dict()
    assert set(expected) == set(got)
    assert any(name.startswith("weigher.scale.mean_D") for name in got)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)


def test_hybrid_rewards_by_hand(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    _, watch = fit(
        tmp_path, tiny_qwen3, prompts, rewards(anchor(sometimes)), steps=4,
        weigher=EqualWeights(), hybrid=0.25, anchor_fraction=0.5,
    )  # fmt: skip
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
    module, watch = fit(
        tmp_path, tiny_qwen3, prompts, rewards(anchor()), steps=4,
        weigher=EqualWeights(), hybrid=1.0, unlabelled="skipped", anchor_fraction=0.5,
    )  # fmt: skip
    assert module.labelled_groups == 4
    for rollout in watch.rollouts:
        labelled = rollout.rewards["anchor"].mask_B
        assert bool(rollout.scalar_B[~labelled].isnan().all())
        assert bool((rollout.advantages_B[~labelled] == 0).all())
        torch.testing.assert_close(
            rollout.advantages_B[labelled],
            group_advantages(rollout.rewards["anchor"].values_B[labelled], 4),
            atol=2e-3, rtol=2e-3,
        )  # fmt: skip


def test_a_closed_gate_keeps_its_response_below_the_labelled_ones(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    def closed(completion: str) -> float:
        return float(sum(map(ord, completion)) % 2)

    gate = FunctionReward(function=closed, name="gate", role="gate")
    _, watch = fit(
        tmp_path, tiny_qwen3, prompts, rewards(gate, anchor()), weigher=EqualWeights(), hybrid=1.0, anchor_fraction=1.0
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
    _, watch = fit(
        tmp_path, tiny_qwen3, prompts, rewards(), weigher=Conductor(action="one_hot"), scope="group", conductor_every=1
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
    module, _ = fit(
        tmp_path, tiny_qwen3, prompts, rewards(anchor()), weigher=weigher, meta_signal=AnchorSignal(),
        learner=learner, anchor_fraction=1.0, conductor_every=1,
    )  # fmt: skip
    assert module.conductor_updates == 3
    assert bool((weigher.net[0].weight != 0).any())
    assert weigher.net[0].in_features == 64


def test_the_advantage_signal_in_expectation_runs(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, _ = fit(
        tmp_path, tiny_qwen3, prompts, rewards(), weigher=Conductor(action="mix"),
        meta_signal=AdvantageSignal(actions="expected"), learner="gradient", conductor_every=1,
    )  # fmt: skip
    assert module.conductor_updates == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weigher": soft(), "meta_signal": AnchorSignal(), "learner": "ridge"}, "no reward has the role 'anchor'"),
        ({"weigher": EqualWeights(), "hybrid": 0.5}, "no reward has the role 'anchor'"),
    ],
)
def test_an_anchor_must_be_there(tiny_qwen3: Path, prompts: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(tmp_path, tiny_qwen3, prompts, rewards(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hybrid": 1.5}, "hybrid=1.5"),
        ({"unlabelled": "skipped"}, "hybrid: 1"),
        ({"unlabelled": "x"}, "unlabelled='x'"),
        ({"scope": "x"}, "scope='x'"),
        ({"conductor_warmup_steps": -1}, "conductor_warmup_steps=-1"),
        ({"anchor_fraction": 0.0}, "anchor_fraction=0.0"),
        ({"learner": "x"}, "learner='x'"),
        ({"coupling": "joint", "learner": "gradient"}, "model.learner out"),
        ({"coupling": "joint", "weigher": soft()}, "joint"),
    ],
)
def test_bad_values_are_sentences(tiny_qwen3: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        module_of(tiny_qwen3, **options)


def test_a_constant_anchor_is_counted_and_teaches_nothing(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, watch = fit(
        tmp_path, tiny_qwen3, prompts, rewards(anchor(constant)),
        weigher=soft(), meta_signal=AnchorSignal(), learner="ridge", anchor_fraction=1.0, hybrid=1.0, conductor_every=1,
    )  # fmt: skip
    assert watch.logged[-1]["conductor/anchor_constant"] == 2.0
    assert module.conductor_updates == 0
    assert not any(r.scalar_B.isnan().any() for r in watch.rollouts)  # the weighed rewards are used instead
