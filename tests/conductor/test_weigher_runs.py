"""Weighers that watch the run, under a real Trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.checkpoint import RunCheckpoint
from maestro_pl import Advantages
from maestro_pl.conductor.adaptive import CTWAWeights, SAWWeights, ScheduledWeights
from maestro_pl.conductor.credits import zscores
from maestro_pl.conductor.influence import GradientWeights
from maestro_pl.conductor.progress import DynaOptWeights, HypervolumeWeights
from maestro_pl.conductor.weighers import EqualWeights, Seen, Weigher
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import UserError
from maestro_pl.policy.scoring import evaluating
from maestro_pl.rollout import Rollout
from tests.support import module_of, rewards, spread, trainer_of


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i}", "split": "train" if i < 8 else "validation"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fit(folder: Path, prompts: Path, tmp_path: Path, weigher: Weigher, steps: int = 2, **options: Any) -> Any:
    trained = {name: options.pop(name) for name in ("ckpt_path", "weights_only") if name in options}
    module = module_of(folder, weigher=weigher, advantages=options.pop("advantages", Advantages()))
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path, [*rewards(), *options.pop("more", [])], max_steps=steps, **options)
    trainer.fit(module, PromptDataModule(sources=str(prompts), batch_size=2, show=False), **trained)
    return module, trainer


class Values(L.Callback):
    """Every training rollout, and what the module logged after it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.rollouts: list[Rollout] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(dict(pl_module.step_metrics))
        self.rollouts.append(batch["rollout"])


def test_a_schedule_runs_over_the_policys_steps(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    values = Values()
    weigher = ScheduledWeights({0: {"sevens": 1.0, "elevens": 0.0}, 2: {"sevens": 0.0, "elevens": 1.0}})
    fit(tiny_qwen3, prompts, tmp_path, weigher, steps=3, more=[values], limit_val_batches=0)
    weights = [rollout.weights_BK for rollout in values.rollouts]
    assert [float(each[-1, 0]) for each in weights if each is not None] == pytest.approx([1.0, 0.5, 0.0])


def test_dvao_of_standardised_rewards_is_said(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"aggregation=dvao .*\['sevens'\] are z-scored .*give them normalize: none"):
        fit(
            tiny_qwen3, prompts, tmp_path, EqualWeights(), steps=1, advantages=Advantages(aggregation="dvao"),
            limit_val_batches=0,
        )  # fmt: skip


def test_raw_rewards_reach_a_weigher(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    """SAW's weights of the last batch, from the scores as the reward functions gave them."""
    kept = Values()
    module, _ = fit(tiny_qwen3, prompts, tmp_path, SAWWeights(), more=[kept], limit_val_batches=0)
    rollout = kept.rollouts[-1]
    assert rollout.weights_BK is not None
    values = [rollout.rewards[name].values_B for name in ("sevens", "elevens")]
    variation = torch.stack([v.std() / v.mean() for v in values])
    torch.testing.assert_close(module.weigher.weights_K, variation / variation.sum())
    assert rollout.weights_BK[0].tolist() == pytest.approx(module.weigher.weights_K.tolist())


def test_validations_reach_a_weigher(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    seen: list[list[float]] = []

    class Watched(HypervolumeWeights):
        def validated(self, mean_K: Tensor) -> None:
            super().validated(mean_K)
            seen.append(mean_K.tolist())

    values = Values()
    run = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": -1}
    module, _ = fit(tiny_qwen3, prompts, tmp_path, Watched(), more=[values], **run)
    assert len(seen) == 3  # before the first step, and after each
    means = {row["metric"]: row["mean"] for row in module.evaluation if row["task"] == "all"}
    assert seen[-1] == pytest.approx([means["reward/sevens"], means["reward/elevens"]])
    first, second = (row["weigher/gain"] for row in values.rows)
    assert first == 1.0
    assert 0.5 <= second <= 2.0


class KeepLast(L.Callback):
    """Copies ``last.ckpt`` as it lies there when the validation after a step begins: what a kill would leave."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.policy_steps == self.step:
            shutil.copy(trainer.checkpoint_callback.last_model_path, self.path)


@pytest.mark.parametrize("make", [lambda: DynaOptWeights(step=0.5), lambda: HypervolumeWeights(scales=0.1)])
def test_a_validation_is_heard_once_whenever_a_run_is_killed(
    make: Any, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    run = {"val_check_interval": 1, "check_val_every_n_epoch": None, "enable_checkpointing": True}

    def saves(**options: Any) -> RunCheckpoint:
        return RunCheckpoint(every_n_train_steps=1, **options)

    killed = tmp_path / "killed.bin"
    straight, _ = fit(
        tiny_qwen3, prompts, tmp_path / "a", make(), steps=4, more=[saves(), KeepLast(2, killed)], **run
    )  # fmt: skip
    _, finished = fit(tiny_qwen3, prompts, tmp_path / "b", make(), steps=2, more=[saves()], **run)
    for place in (killed, Path(finished.checkpoint_callback.last_model_path)):
        resumed, _ = fit(
            tiny_qwen3, prompts, tmp_path / "c", make(), steps=4, ckpt_path=place, weights_only=True,
            **{**run, "enable_checkpointing": False},
        )  # fmt: skip
        assert resumed.policy_steps == 4
        for name, value in straight.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_sanity_check_of_some_batches_is_not_heard(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    when: list[int] = []

    class Watched(HypervolumeWeights):
        def validated(self, mean_K: Tensor) -> None:
            when.append(len(values.rows))

    values = Values()
    fit(tiny_qwen3, prompts, tmp_path, Watched(), steps=1, num_sanity_val_steps=1, more=[values])
    assert when == [1]  # the one at the end


def test_a_run_without_validations_is_refused(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HypervolumeWeights learns from validations, and this run has none"):
        fit(tiny_qwen3, prompts, tmp_path, HypervolumeWeights(), limit_val_batches=0)


def test_the_gain_scales_the_advantages(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    class Doubled(EqualWeights):
        gain = 2.0

    (plain, _), (doubled, _) = (
        fit(tiny_qwen3, prompts, tmp_path, weigher, steps=1, limit_val_batches=0)
        for weigher in (EqualWeights(), Doubled())
    )
    ratio = doubled.step_metrics["policy/grad_norm"] / plain.step_metrics["policy/grad_norm"]
    assert ratio == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("name", ["ctwa", "dynaopt"])
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    def made() -> Weigher:
        return CTWAWeights(targets=50.0, lr=1.0) if name == "ctwa" else DynaOptWeights(step=0.5)

    run = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    straight, _ = fit(tiny_qwen3, prompts, tmp_path, made(), steps=3, **run)
    _, trainer = fit(tiny_qwen3, prompts, tmp_path, made(), steps=1, **run)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    again = {"ckpt_path": tmp_path / "part.ckpt", "weights_only": True}
    resumed, _ = fit(tiny_qwen3, prompts, tmp_path, made(), steps=3, **run, **again)
    expected, got = straight.state_dict(), resumed.state_dict()
    assert set(expected) == set(got)
    assert "weigher.weights_K" in got
    assert got["weigher.weights_K"].tolist() != [0.5, 0.5]
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, msg=key, equal_nan=True)


def test_influences_are_those_of_k_gradients(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    """One backward and two forward passes against G G^T 1 from K backward passes."""
    found: list[tuple[Tensor, Tensor]] = []

    class Checked(GradientWeights):
        def observe(self, seen: Seen) -> Any:
            influence_K, _ = self.influences(seen)
            assert influence_K is not None
            found.append((influence_K, by_backward(seen)))
            return super().observe(seen)

    module = module_of(tiny_qwen3, weigher=Checked(normalize=False, rate=0.5))
    spread(module.policy, 0.1)
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path, rewards(), max_steps=1, limit_val_batches=0)
    trainer.fit(module, PromptDataModule(sources=str(prompts), batch_size=2, show=False))
    ((mine_K, exact_K),) = found
    torch.testing.assert_close(mine_K, exact_K, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(module.weigher.weights_K, (0.5 * mine_K).softmax(0))
    assert module.step_metrics["weigher/gradient_backwards"] >= 1


def by_backward(seen: Seen) -> Tensor:
    """G G^T 1 with the rewards' gradients one by one."""
    rollout, policy = seen.weighed.rollout, seen.policy
    z_BK = zscores(seen.weighed.rewards_BK, seen.weighed.mask_BK, rollout.group_size)
    prompts = [ids for ids in rollout.prompt_ids for _ in range(rollout.group_size)]
    parameters = policy.trained_parameters()
    gradients = []
    for k in range(z_BK.shape[1]):
        with torch.enable_grad(), evaluating(policy):
            logps_T = policy.token_statistics(prompts, rollout.response_ids, temperature=rollout.temperature).logps_T
            weight_T = z_BK[:, k].repeat_interleave(rollout.lengths_B)
            given = torch.autograd.grad((weight_T * logps_T).sum() / len(rollout), parameters, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in given if g is not None]))
    matrix = torch.stack(gradients)
    return (matrix @ matrix.T).sum(1)


@pytest.mark.parametrize("aggregation", ["mo_grpo", "dvao", "normalize_then_sum"])
def test_every_aggregation_trains(aggregation: Any, tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    settings = Advantages(aggregation, min_consensus=0.2, consensus_scale=True)
    module, _ = fit(tiny_qwen3, prompts, tmp_path, EqualWeights(), steps=1, advantages=settings, limit_val_batches=0)
    assert 0.0 <= module.step_metrics["group/dropped"] <= 1.0
    assert module.step_metrics["policy/grad_norm"] > 0
