"""The module under a real Trainer: resuming, checkpoints, skipped updates, evaluation, KL and gates."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.rewards import FunctionReward
from maestro_pl import KL, Advantages, Anchoring, Loss, Meta
from maestro_pl.algorithm.advantages import group_advantages
from maestro_pl.algorithm.losses import k3, segment_sum
from maestro_pl.conductor import AdvantageSignal
from maestro_pl.conductor.weighers import EqualWeights, FixedWeights
from maestro_pl.errors import UserError
from maestro_pl.module import MaestroModule
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.padding import token_index
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import RewardSpec, rollout_of
from tests.support import constant, data_of, module_of, rewards, sevens, spread, trainer_of, write_rows


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i}", "task": "ab"[i % 2], "reference": str(i)} for i in range(10)]
    return Path(write_rows(path, *rows))


class Watch(L.Callback):
    """Keeps prompts and responses of every training batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[Any], list[str]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch["rollout"].prompts, batch["rollout"].responses))


class Draws(L.Callback):
    """Draws from torch's generator wherever it is called."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:  # what comes before the first step is where the run's own draws begin
            torch.rand(3)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(5)


def drawing(completion: str, **_: Any) -> float:
    return sevens(completion) + 0 * float(torch.rand(()))


def test_what_callbacks_and_rewards_draw_changes_nothing_of_the_run(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    alone, beside = module_of(tiny_qwen3, meta=Meta(every=2)), module_of(tiny_qwen3, meta=Meta(every=2))
    drawn = [FunctionReward(drawing, name="sevens", normalize="zscore"), rewards()[1], Draws()]
    for module, callbacks in ((alone, rewards()), (beside, drawn)):
        torch.manual_seed(0)
        trainer_of(tmp_path, callbacks, max_steps=3).fit(module, data_of(prompts))
    for (name, a), b in zip(alone.named_parameters(), beside.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


class LearnedWeights(EqualWeights):
    """A weigher with a parameter that nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(2))


def test_a_weigher_with_parameters_that_nothing_trains_is_refused(tiny_qwen3: Path) -> None:
    specs = [RewardSpec("one"), RewardSpec("two")]
    with pytest.raises(
        UserError, match=r"weigher=LearnedWeights has parameters to learn \(logits\), and only a maestro"
    ):
        module_of(tiny_qwen3, weigher=LearnedWeights()).build(specs)
    frozen = LearnedWeights()
    frozen.logits.requires_grad_(False)
    module_of(tiny_qwen3, weigher=frozen).build(specs)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, stop_after: int
) -> None:
    straight, watch = module_of(tiny_qwen3, meta=Meta(every=3)), Watch()
    torch.manual_seed(0)
    trainer_of(tmp_path, [*rewards(), watch], max_steps=7).fit(straight, data_of(prompts))

    first, begun = module_of(tiny_qwen3, meta=Meta(every=3)), Watch()
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path, [*rewards(), begun], max_steps=stop_after)
    trainer.fit(first, data_of(prompts))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, ended = module_of(tiny_qwen3, meta=Meta(every=3)), Watch()
    torch.manual_seed(99)
    trainer_of(tmp_path, [*rewards(), ended], max_steps=7).fit(
        second, data_of(prompts), ckpt_path=tmp_path / "half.ckpt"
    )

    assert begun.seen + ended.seen == watch.seen
    assert second.policy_steps == 7
    assert second.outer.updates == straight.outer.updates == 2
    for (name, a), b in zip(straight.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_holds_adapters_and_conductor_as_plain_types(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    module = module_of(tiny_qwen3, meta=Meta(every=2))
    trainer = trainer_of(tmp_path, rewards(), max_steps=3)
    trainer.fit(module, data_of(prompts))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all("lora_" in name or name.startswith("weigher.") for name in checkpoint["state_dict"])
    assert checkpoint["maestro"]["policy_steps"] == 3
    assert len(checkpoint["maestro"]["buffer"]) == 1
    assert len(checkpoint["optimizer_states"]) == 2

    again = module_of(tiny_qwen3)
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"], strict=False)
    for (name, a), b in zip(module.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_checkpoint_that_does_not_fit_is_a_sentence(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rewards(), max_steps=1)
    trainer.fit(module_of(tiny_qwen3), data_of(prompts))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    cases: list[tuple[MaestroModule, list[Any], str]] = [
        (module_of(tiny_qwen3), rewards()[:1], r"weighs the rewards \['sevens', 'elevens'\], this run \['sevens'\]"),
        (module_of(tiny_qwen3, weigher=EqualWeights()), rewards(), "does not fit this policy and weigher"),
        (module_of(tiny_qwen3, lora=LoRA(r=4, target_modules=["q_proj"])), rewards(), "are unknown here"),
    ]
    for module, chain, message in cases:
        with pytest.raises(UserError, match=message):
            trainer_of(tmp_path, chain, max_steps=2).fit(module, data_of(prompts), ckpt_path=tmp_path / "a.ckpt")


def test_changed_settings_are_reported_and_the_new_ones_count(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rewards(), max_steps=1)
    trainer.fit(module_of(tiny_qwen3), data_of(prompts))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = module_of(tiny_qwen3, loss=Loss(clip_high=0.28))
    with pytest.warns(UserWarning, match=r"clip_high: 0.2 -> 0.28"):
        trainer_of(tmp_path, rewards(), max_steps=2).fit(module, data_of(prompts), ckpt_path=tmp_path / "a.ckpt")
    assert module.inner.loss.clip_high == 0.28


def test_every_argument_is_among_the_settings_that_a_resumed_run_compares(tiny_qwen3: Path) -> None:
    module = module_of(tiny_qwen3)
    settings = module.settings()
    for name in inspect.signature(LoRAPolicy.__init__).parameters.keys() - {"self"}:
        assert any(key == f"policy.{name}" or key.startswith(f"policy.{name}.") for key in settings), name
    for group in (Loss, KL, Advantages, Anchoring, Meta):
        for field in fields(group):
            # optimizers and schedules are compared by their own options
            if field.name not in ("optimizer", "scheduler"):
                assert f"{group.__name__.lower()}.{field.name}" in settings
    assert {"max_grad_norm", "micro_batch_tokens", "updates_per_rollout", "weigher"} <= set(settings)
    without = module_of(tiny_qwen3, lora=None, weigher=EqualWeights()).settings()
    assert without["policy.lora"] is None


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({"policy_options": {"sync_every": 9}}, r"policy\.sync_every: 6 -> 9"),
        ({"policy_options": {"packing": False}}, r"policy\.packing: True -> False"),
        ({"lora": LoRA(r=4, dropout=0.2)}, r"policy\.lora\.dropout: 0\.1 -> 0\.2"),
        ({"kl": KL(unbiased=False)}, r"kl\.unbiased: True -> False"),
        ({"meta": Meta(every=5)}, r"meta\.every: 3 -> 5"),
        ({"anchoring": Anchoring(seed=3)}, r"anchoring\.seed: 0 -> 3"),
    ],
)
def test_a_changed_setting_of_any_group_is_reported(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, changes: dict[str, Any], reported: str
) -> None:
    trainer = trainer_of(tmp_path, rewards(), max_steps=1)
    trainer.fit(module_of(tiny_qwen3), data_of(prompts))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=reported):
        trainer_of(tmp_path, rewards(), max_steps=1).fit(
            module_of(tiny_qwen3, **changes), data_of(prompts), ckpt_path=tmp_path / "a.ckpt"
        )


def test_a_run_of_dead_groups_ends_and_changes_nothing(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(tiny_qwen3, weigher=EqualWeights())
    before = [p.clone() for p in module.policy.trained_parameters()]
    same = [FunctionReward(function=constant, name="constant")]
    trainer = trainer_of(tmp_path, same, max_steps=4)
    trainer.fit(module, data_of(prompts))
    assert module.policy_steps == 4
    assert trainer.callback_metrics["group/dead_fraction"] == 1
    assert trainer.callback_metrics["policy/skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.trained_parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_skipped_and_said(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(tiny_qwen3)
    before = [p.clone() for p in module.policy.trained_parameters()]
    original = module.policy.token_statistics

    def broken(*args: Any, **kwargs: Any) -> Any:
        statistics = original(*args, **kwargs)
        if torch.is_grad_enabled():
            statistics.logps_T = statistics.logps_T * float("inf")
        return statistics

    monkeypatch.setattr(module.policy, "token_statistics", broken)
    with pytest.warns(UserWarning, match=r"Policy step 1 skipped: its gradient is not finite"):
        trainer_of(tmp_path, rewards(), max_steps=2).fit(module, data_of(prompts))
    assert module.policy_steps == 2
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.trained_parameters(), strict=True))


def test_max_steps_counts_rollouts_and_schedulers_step(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    halve = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    module = module_of(tiny_qwen3, updates_per_rollout=2, meta=Meta(every=2, scheduler=halve), scheduler=halve)
    trainer = trainer_of(tmp_path, rewards(), max_steps=4)
    trainer.fit(module, data_of(prompts))
    assert (trainer.global_step, module.policy_steps, module.outer.updates) == (4, 4, 2)
    policy_optimizer, conductor_optimizer = trainer.optimizers
    assert policy_optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 16)
    assert conductor_optimizer.param_groups[0]["lr"] == pytest.approx(1e-1 / 4)
    step = policy_optimizer.state[policy_optimizer.param_groups[0]["params"][0]]["step"]
    assert int(step) == 8  # two updates a rollout


def test_no_gradient_crosses_between_policy_and_conductor(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(tiny_qwen3, meta=Meta(every=100))
    trainer_of(tmp_path, rewards(), max_steps=2).fit(module, data_of(prompts))
    assert all(p.grad is None for p in module.weigher.parameters())
    module.policy.zero_grad()
    loss, _ = AdvantageSignal()(module.weigher, module.outer.buffer)
    loss.backward()
    assert all(p.grad is None for p in module.policy.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in module.weigher.parameters())


class Spy(L.Callback):
    """Keeps the rollouts of training and of validation."""

    def __init__(self) -> None:
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.validated.append(batch["rollout"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.trained.append(batch["rollout"])


def test_evaluation_is_soft_and_its_table_is_that_of_the_prompts(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    module, spy = module_of(tiny_qwen3), Spy()
    module.weigher.build(32, ["sevens", "elevens"])
    torch.nn.init.normal_(module.weigher.net[0].weight)
    trainer = trainer_of(tmp_path, [*rewards(), spy])
    trainer.validate(module, data_of(prompts, eval_batch_size=10), verbose=False)
    (rollout,) = spy.validated
    torch.testing.assert_close(rollout.weights_BK, rollout.probabilities_BK)
    assert ((rollout.weights_BK > 0) & (rollout.weights_BK < 1)).all()
    by_key = {(row["task"], row["metric"]): row for row in module.evaluation}
    per_prompt = rollout.rewards["sevens"].values_B.view(-1, 2).mean(1)
    row = by_key["all", "reward/sevens"]
    assert row["mean"] == pytest.approx(float(per_prompt.mean()))
    assert row["n"] == len(per_prompt)
    assert row["low"] <= row["mean"] <= row["high"]
    assert trainer.callback_metrics["val/reward/sevens"] == pytest.approx(row["mean"])
    assert {task for task, _ in by_key} == {"all", *rollout.columns["task"]}


def test_kl_in_the_reward_lowers_the_scalar_reward(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, spy = (
        module_of(tiny_qwen3, weigher=FixedWeights({"sevens": 1, "elevens": 0}), kl=KL(coef=0.3, place="reward")),
        Spy(),
    )
    spread(module.policy, 0.3)
    trainer_of(tmp_path, [*rewards(), spy], max_steps=1).fit(module, data_of(prompts))
    (rollout,) = spy.trained
    reference = module.policy.token_statistics(
        [p for p in rollout.prompt_ids for _ in range(4)], rollout.response_ids, which="reference"
    ).logps_T
    kl = segment_sum(k3(rollout.logps_T, reference), rollout.lengths_B)
    assert float(kl.min()) > 0
    grouped = rollout.rewards["sevens"].values_B.view(-1, 4)
    std = grouped.std(1, keepdim=True)
    z = torch.where(std > 0, (grouped - grouped.mean(1, keepdim=True)) / std, 0.0).view(-1)
    torch.testing.assert_close(rollout.scalar_B, z - 0.3 * kl, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.advantages_B, group_advantages(rollout.scalar_B, 4))


def test_a_gate_and_a_metric_are_not_weighed(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    odd = FunctionReward(function=lambda completion: float(len(completion) % 2), name="odd", role="gate")
    seen = FunctionReward(function=constant, name="seen", role="metric")
    module, spy = module_of(tiny_qwen3), Spy()
    trainer_of(tmp_path, [*rewards(odd, seen), spy], max_steps=1).fit(module, data_of(prompts))
    (rollout,) = spy.trained
    assert module.weight_names == ["sevens", "elevens"]
    assert rollout.weights_BK.shape == (8, 2)
    closed = rollout.rewards["odd"].values_B == 0
    lowest = rollout.scalar_B.view(-1, 4).amin(1).repeat_interleave(4).clamp(max=0)
    torch.testing.assert_close(rollout.scalar_B[closed], lowest[closed])


def test_truncated_responses_can_be_left_out(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(tiny_qwen3, loss=Loss(mask_truncated=True), lora=LoRA(r=4))
    module.policy.eos_token_ids = []  # nothing ends: every response is truncated, none may move the policy
    before = [p.clone() for p in module.policy.trained_parameters()]
    trainer_of(tmp_path, rewards(), max_steps=1).fit(module, data_of(prompts))
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.trained_parameters(), strict=True))


def test_missing_rewards_and_rollouts_are_sentences(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No reward with role 'train'"):
        trainer_of(tmp_path, [], max_steps=1).fit(module_of(tiny_qwen3), data_of(prompts))
    with pytest.raises(UserError, match=r"callbacks\.RolloutGenerator"):
        rollout_of({"prompt": []})


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda _: Meta(every=0), r"model\.meta\.every=0"),
        (lambda model: module_of(model, updates_per_rollout=0), r"model\.updates_per_rollout=0"),
        (lambda _: KL(coef=-1.0), r"model\.kl\.coef=-1.0"),
        (lambda _: Loss(clip_low=-0.1), r"model\.loss\.clip_low=-0.1"),
        (lambda model: module_of(model, micro_batch_tokens=0), r"model\.micro_batch_tokens=0"),
    ],
)
def test_bad_settings_are_named(tiny_qwen3: Path, made: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        made(tiny_qwen3)


def test_token_index_by_hand() -> None:
    assert token_index(torch.tensor([2, 3, 1]), [2, 0]).tolist() == [5, 0, 1]


def test_extra_numbers_of_a_reward_are_logged(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    detailed = FunctionReward(function=lambda completion: {"score": 1.0, "size": 3.0}, name="detailed", role="metric")
    trainer = trainer_of(tmp_path, rewards(detailed), max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module_of(tiny_qwen3), data_of(prompts))
    assert trainer.callback_metrics["reward/detailed/size"] == 3.0
    assert {"time/rollout", "time/rewards", "time/update", "length/mean"} <= set(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Loss(type="foo"), "model.loss.type='foo': expected one of dapo"),  # type: ignore[arg-type]
        (lambda: Advantages(aggregation="foo"), "model.advantages.aggregation='foo'"),  # type: ignore[arg-type]
        (lambda: Loss(delta=float("nan")), "model.loss.delta=nan"),
        (lambda: Loss(sapo_temperatures=(1.0,)), "expected two numbers"),  # type: ignore[arg-type]
        (lambda: Loss(top_entropy=0.0), "model.loss.top_entropy=0.0"),
    ],
)
def test_bad_loss_settings_are_named(made: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made()


def test_kl_in_the_reward_is_exactly_zero_at_the_reference(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = LoRAPolicy(str(tiny_qwen3), dtype="bfloat16", lora=LoRA(r=4))
    module = module_of(policy, weigher=EqualWeights(), kl=KL(coef=0.1, place="reward"))
    trainer = trainer_of(
        tmp_path, [FunctionReward(function=constant, name="constant")], max_steps=1, limit_val_batches=0
    )
    trainer.fit(module, data_of(prompts))
    assert float(trainer.callback_metrics["group/dead_fraction"]) == 1.0


def test_predict_gives_rollouts_to_python(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    found = trainer_of(tmp_path, rewards()).predict(module_of(tiny_qwen3), data_of(prompts))
    assert found
    assert all(len(rollout.responses) == len(rollout.scalar_B) for rollout in found)
