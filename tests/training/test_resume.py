"""What a resumed run obeys, reports and refuses; and the modes in which the policy samples, is scored and is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

from callbacks.rewards import FunctionReward, LengthReward
from maestro_pl import Meta
from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.errors import UserError
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.training.checkpointing import (
    check_file,
    go_on_with_schedule,
    group_options,
    leaves,
    reapply_options,
)
from tests.support import data_of, module_of, rewards, trainer_of

PROMPTS, RESPONSES = [[1, 2, 3], [4]], [[11, 12], [13, 14, 15]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(10)))
    return path


@pytest.fixture
def checkpoint(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> Path:
    trainer = trainer_of(tmp_path, rewards(), max_steps=1)
    trainer.fit(module_of(tiny_qwen3), data_of(prompts))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def adamw(lr: float) -> Any:
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0)


def test_the_config_decides_the_learning_rate(
    tiny_qwen3: Path, prompts: Path, checkpoint: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, rewards(), max_steps=2)
    with pytest.warns(UserWarning, match=r"AdamW goes on with this run's options: lr: 0.01 -> 0.003"):
        trainer.fit(module_of(tiny_qwen3, optimizer=adamw(3e-3)), data_of(prompts), ckpt_path=checkpoint)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 3e-3
    assert int(next(iter(trainer.optimizers[0].state.values()))["step"]) == 2  # its moments go on


@pytest.mark.parametrize(
    ("options", "chain", "message"),
    [
        ({"lora": LoRA(r=2)}, rewards, r"has the shape \(4, 64\) in it and \(2, 64\) here"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, rewards, r"\['AdamW', 'AdamW'\], this run has \['SGD'"),
    ],
)
def test_what_cannot_be_resumed_is_a_sentence(
    tiny_qwen3: Path, prompts: Path, checkpoint: Path, tmp_path: Path, options: Any, chain: Any, message: str
) -> None:
    trainer = trainer_of(tmp_path, chain(), max_steps=2)
    with pytest.raises(UserError, match=message):
        trainer.fit(module_of(tiny_qwen3, **options), data_of(prompts), ckpt_path=checkpoint)


def test_every_changed_setting_is_reported(tiny_qwen3: Path, prompts: Path, checkpoint: Path, tmp_path: Path) -> None:
    chain = rewards(FunctionReward(function=lambda completion: 1.0, name="open", role="gate"))
    chain[0].normalize = "rank"
    module = module_of(tiny_qwen3, weigher=Conductor(action="mix", layer="first"))
    trainer = trainer_of(tmp_path, chain, max_steps=2)
    trainer.callbacks[0].sampling = trainer.callbacks[0].sampling.__class__(max_new_tokens=5, temperature=0.5)
    with pytest.warns(UserWarning, match="weigher.action") as warned:
        trainer.fit(module, data_of(prompts), ckpt_path=checkpoint)
    text = " ".join(str(w.message) for w in warned)
    for change in (
        "weigher.action: 'one_hot' -> 'mix 0.5'",
        "weigher.layer: 'last' -> 'first'",
        "reward sevens: 'role train, normalize zscore' -> 'role train, normalize rank'",
        "reward open: None -> 'role gate, normalize none'",
        "rollout.temperature: 1.0 -> 0.5",
        "rollout.max_new_tokens: 6 -> 5",
    ):
        assert change in text


def test_a_foreign_or_damaged_file_is_a_sentence(checkpoint: Path, tmp_path: Path) -> None:
    check_file(str(checkpoint))
    torch.save({"a": 1}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="no 'maestro' entry"):
        check_file(str(tmp_path / "foreign.ckpt"))
    damaged = bytearray(checkpoint.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 64] = bytes(b ^ 255 for b in damaged[middle : middle + 64])
    (tmp_path / "damaged.ckpt").write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):
        check_file(str(tmp_path / "damaged.ckpt"))


@pytest.mark.parametrize("lora", [LoRA(r=4, dropout=0.5), None])
def test_the_reference_is_scored_without_dropout(tiny_gpt2: Path, lora: LoRA | None) -> None:
    options = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    policy = LoRAPolicy(str(tiny_gpt2), dtype="float32", lora=lora, reference="synced", model_options=options)
    policy.train()
    modes = [module.training for module in policy.modules()]
    first, again = (policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T for _ in range(2))
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    assert [module.training for module in policy.modules()] == modes
    noisy = [policy.token_statistics(PROMPTS, RESPONSES).logps_T for _ in range(2)]
    assert not torch.allclose(noisy[0], noisy[1])  # the policy's own update has its dropout


class Modes(L.Callback):
    """Notes for every scoring of the policy whether gradients and dropout were on."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.calls: list[tuple[bool, bool]] = []
        original = pl_module.policy.token_statistics

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((torch.is_grad_enabled(), pl_module.policy.model.training))
            return original(*args, **kwargs)

        pl_module.policy.token_statistics = noted


@pytest.mark.parametrize(("engine", "expected"), [("hf", {(False, False), (True, True)}), ("native", {(True, True)})])
def test_scoring_is_in_eval_mode_and_the_update_in_training_mode(
    engine: str, expected: set[Any], tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    modes = Modes()
    trainer_of(tmp_path, [*rewards(), modes], max_steps=3, limit_val_batches=0, engine=engine).fit(
        module_of(tiny_qwen3), data_of(prompts)
    )
    assert set(modes.calls) == expected


def test_every_step_draws_anew(tiny_qwen3: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "always the same", "task": "a"}) + "\n")

    class Keep(L.Callback):
        def __init__(self) -> None:
            self.seen: list[list[str]] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(batch["rollout"].responses)

    keep, module = Keep(), module_of(tiny_qwen3, optimizer=adamw(0.0))
    data = data_of(path)
    data.fractions = None
    trainer_of(tmp_path, [*rewards(), keep], max_steps=2).fit(module, data)
    assert keep.seen[0] != keep.seen[1]


def test_a_run_that_teaches_nothing_says_so(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    same = [FunctionReward(function=lambda completion: 1.0, name="constant")]
    with pytest.warns(UserWarning, match="2 of 2 policy steps did not move the policy"):
        trainer_of(tmp_path, same, max_steps=2).fit(module_of(tiny_qwen3), data_of(prompts))


def test_a_gate_outside_its_range_is_named(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    chain = rewards(LengthReward(min=90, max=99, floor=-5.0, role="gate"))
    with pytest.raises(UserError, match=r"gate 'length' gave -0\.\d+"):
        trainer_of(tmp_path, chain, max_steps=1).fit(module_of(tiny_qwen3), data_of(prompts))
    with pytest.raises(UserError, match="give normalize: none"):
        LengthReward(role="gate", normalize="zscore")


def test_a_hidden_state_that_is_not_a_number_does_not_reach_the_conductor(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch["rollout"].hidden_BD[0] = float("nan")

    module = module_of(tiny_qwen3, meta=Meta(every=1))
    trainer = trainer_of(tmp_path, [*rewards(), Spoil()], max_steps=2)
    with pytest.warns(UserWarning, match=r"Step 0: 1 response\(s\) have a hidden state.* does not learn from them"):
        trainer.fit(module, data_of(prompts))
    assert module.outer.updates == 2
    assert trainer.callback_metrics["conductor/nonfinite"] == 1
    assert all(bool(p.isfinite().all()) for p in module.weigher.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o)}, "ReduceLROnPlateau"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=-1.0)}, "Invalid learning rate"),
    ],
)
def test_bad_optimizers_and_schedulers_are_named(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trainer_of(tmp_path, rewards(), max_steps=1).fit(module_of(tiny_qwen3, **options), data_of(prompts))


def test_the_rate_is_scheduled_over_the_steps_of_the_run(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    meta = Meta(every=2, warmup=1, scheduler=Schedule(warmup=1, decay="linear"))
    module = module_of(tiny_qwen3, meta=meta, scheduler=Schedule(decay="linear"))
    trainer = trainer_of(tmp_path, rewards(), max_steps=4)
    trainer.fit(module, data_of(prompts))
    assert module.scheduled_steps() == [4, 3]  # the warm-up's batch, and every second step
    policy, conductor = (optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers)
    assert (policy, conductor) == (0.0, 0.0)


def test_callbacks_that_average_whole_models_are_refused(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    for callback in (EMAWeightAveraging(), WeightAveraging(), StochasticWeightAveraging(1e-2)):
        trainer = trainer_of(tmp_path, rewards(callback), max_steps=1)
        with pytest.raises(UserError, match=rf"trainer\.callbacks has {type(callback).__name__}, which averages"):
            trainer.fit(module_of(tiny_qwen3), data_of(prompts))


def test_only_precisions_that_keep_the_conductor_in_float32(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use 32-true, bf16-mixed or 16-mixed"):
        trainer_of(tmp_path, rewards(), max_steps=1, precision="bf16-true").fit(module_of(tiny_qwen3), data_of(prompts))


def test_the_second_update_of_a_rollout_is_off_policy(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestro_pl.training import update

    ratios: list[float] = []
    original = update.grpo_loss

    def noted(batch: Any, *settings: Any) -> Any:
        ratios.append(float((batch.logps_T - batch.old_logps_T).detach().abs().max()))
        return original(batch, *settings)

    monkeypatch.setattr(update, "grpo_loss", noted)
    module = module_of(tiny_qwen3, lora=LoRA(r=4), updates_per_rollout=2)
    trainer_of(tmp_path, rewards(), max_steps=1, limit_val_batches=0).fit(module, data_of(prompts))
    assert len(ratios) == 2
    assert ratios[0] < 1e-5  # against the policy that sampled, which has not moved yet
    assert ratios[1] > 1e-4


def test_a_synced_reference_follows_the_policy_in_training(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(tiny_qwen3)
    module.policy = LoRAPolicy(
        str(tiny_qwen3), dtype="float32", lora=LoRA(r=4), reference="synced", sync_every=2, sync_rate=1.0
    )
    trainer = trainer_of(tmp_path, rewards(), max_steps=2, limit_val_batches=0)
    trainer.fit(module, data_of(prompts))
    parameters = dict(module.policy.named_parameters())
    pairs = [(n, n.replace(".default.", ".reference.")) for n in parameters if ".default." in n]
    assert pairs
    assert all(torch.equal(parameters[a], parameters[b]) for a, b in pairs)
    assert any(bool(parameters[a].any()) for a, _ in pairs if "lora_B" in a)


def cosine(steps: int) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def linear(steps: int) -> Any:
    return lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, total_iters=steps)


def sequence(optimizer: Any) -> Any:
    parts = [linear(2)(optimizer), cosine(6)(optimizer)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)


def rates(optimizer: Any, scheduler: Any, steps: int) -> tuple[float, ...]:
    """The learning rate and betas after so many steps of a run that was never cut off."""
    made = optimizer([torch.nn.Parameter(torch.zeros(1))])
    schedule = scheduler(made) if scheduler else None
    for _ in range(steps if schedule else 0):
        made.step()
        schedule.step()
    return (made.param_groups[0]["lr"], *made.param_groups[0]["betas"])


@pytest.mark.parametrize(
    ("before", "now", "rate", "said"),
    [
        (cosine(6), cosine(6), 1e-2, False),
        (sequence, sequence, 1e-2, False),
        (one_cycle, one_cycle, 1e-2, False),
        (cosine(6), cosine(12), 1e-2, True),
        (cosine(6), cosine(6), 3e-3, True),
        (cosine(6), sequence, 1e-2, True),
        (sequence, linear(6), 1e-2, True),
        (None, cosine(6), 1e-2, True),
        (cosine(6), None, 1e-2, False),  # the optimizer's own options are reported
    ],
)
def test_the_config_decides_the_schedule_at_the_step_reached(
    before: Any, now: Any, rate: float, said: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """Without a model: two steps under one schedule, saved as a trainer does, gone on with under another one."""
    first = adamw(1e-2)([torch.nn.Parameter(torch.zeros(1))])
    schedule = before(first) if before else None
    for _ in range(2 if schedule else 0):
        first.step()
        schedule.step()
    saved = {"optimizer": first.state_dict(), "schedule": schedule.state_dict() if schedule else None}

    second = adamw(rate)([torch.nn.Parameter(torch.zeros(1))])
    scheduler = now(second) if now else None
    configured = group_options(second)
    second.load_state_dict(saved["optimizer"])
    reapply_options([second], [configured], [scheduler is not None], report=False)
    recwarn.clear()
    if scheduler is not None:
        go_on_with_schedule("model.scheduler", scheduler, configured, saved["schedule"], 2)
    assert [str(w.message)[:39] for w in recwarn] == ["model.scheduler is not the checkpoint's"] * said
    for step in range(2, 6):
        group = second.param_groups[0]
        assert (group["lr"], *group["betas"]) == pytest.approx(rates(adamw(rate), now, step))
        if scheduler is not None:
            second.step()
            scheduler.step()


def test_a_schedule_that_is_too_short_is_a_sentence() -> None:
    optimizer = adamw(1e-2)([torch.nn.Parameter(torch.zeros(1))])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=3)
    with pytest.raises(UserError, match=r"model\.scheduler cannot go on from step 9: .*longer schedule"):
        go_on_with_schedule("model.scheduler", scheduler, group_options(optimizer), None, 9)


def test_a_changed_schedule_in_a_run(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rewards(), max_steps=2, limit_val_batches=0)
    trainer.fit(module_of(tiny_qwen3, scheduler=cosine(6)), data_of(prompts))
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    again = trainer_of(tmp_path, rewards(), max_steps=3, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"model\.scheduler is not the checkpoint's: from step 2"):
        again.fit(module_of(tiny_qwen3, scheduler=cosine(12)), data_of(prompts), ckpt_path=tmp_path / "b.ckpt")
    assert again.optimizers[0].param_groups[0]["lr"] == pytest.approx(rates(adamw(1e-2), cosine(12), 3)[0])


@pytest.mark.parametrize("skipped", [False, True])
def test_nothing_left_to_train_is_said_and_nothing_is_trained(
    skipped: bool, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    chain = [FunctionReward(function=lambda completion: 1.0, name="constant")] if skipped else rewards()
    first = trainer_of(tmp_path, chain, max_steps=1, limit_val_batches=0)
    first.fit(module_of(tiny_qwen3), data_of(prompts))
    assert first.global_step == (0 if skipped else 1)
    first.save_checkpoint(tmp_path / "b.ckpt")
    module = module_of(tiny_qwen3)
    with pytest.warns(UserWarning, match=r"at policy step 1 and trainer\.max_steps is 1, so nothing is left to train"):
        trainer_of(tmp_path, chain, max_steps=1, limit_val_batches=0).fit(
            module, data_of(prompts), ckpt_path=tmp_path / "b.ckpt"
        )
    assert (module.policy_steps, module.skipped_steps) == (1, int(skipped))


BEFORE = """
seed_everything: 0
model:
  policy: {model: a, lora: {r: 8}}
  scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 6}}
data: {sources: [a.jsonl, b.jsonl]}
rollout: {temperature: 1.0}
rewards:
- {class_path: callbacks.FormatReward, init_args: {role: gate}}
trainer: {max_steps: 6, logger: {class_path: x.CSVLogger, init_args: {name: a}}}
ckpt_path: null
"""


def test_every_key_of_the_config_that_differs_is_named_once(
    tiny_qwen3: Path, prompts: Path, checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["maestro"]["config"] = BEFORE
    torch.save(content, checkpoint)
    module = module_of(tiny_qwen3, optimizer=adamw(3e-3))
    changes = [
        ("T_max: 6", "T_max: 12"), ("[a.jsonl, b.jsonl]", "[a.jsonl, c.jsonl]"), ("temperature: 1.0", "temperature: 0.5"),
        ("role: gate", "normalize: rank"), ("max_steps: 6", "max_steps: 8"), ("ckpt_path: null", "ckpt_path: b.ckpt"),
    ]  # fmt: skip
    module.run_config = BEFORE
    for old, new in changes:
        module.run_config = module.run_config.replace(old, new)
    with pytest.warns(UserWarning, match="checkpoint -> now") as warned:
        trainer_of(tmp_path, rewards(), max_steps=2, limit_val_batches=0).fit(
            module, data_of(prompts), ckpt_path=checkpoint
        )
    text = " ".join(str(w.message) for w in warned)
    assert text.partition("(checkpoint -> now): ")[2].split(" ")[0] == "model.scheduler.T_max:"
    for change in (
        "model.scheduler.T_max: 6 -> 12", "data.sources.1: 'b.jsonl' -> 'c.jsonl'", "rollout.temperature: 1.0 -> 0.5",
        "rewards.0.role: 'gate' -> None", "rewards.0.normalize: None -> 'rank'", "trainer.max_steps: 6 -> 8",
    ):  # fmt: skip
        assert text.count(change) == 1
    assert "goes on with this run's options" not in text
    assert "b.ckpt" not in text
    assert leaves(None) == {}
