"""Runs in float16: small gradients arrive, steps that overflow are left out and counted, and a resumed run goes on alike."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from maestro_pl.conductor.meta import Meta
from maestro_pl.errors import UserError
from maestro_pl.training import float16
from maestro_pl.training.float16 import LossScale, compute_dtypes, loss_scale_of
from tests.support import data_of, module_of, rewards, trainer_of

HALF = {"dtype": "float16"}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(10)))
    return path


class Noted(Callback):
    """What was logged after each step, and the policy's parameters before the first."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.before = [p.detach().clone() for p in module.policy.trained_parameters()]

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.rows.append({name: float(value) for name, value in module.step_metrics.items()})


def fitted(module: Any, prompts: Path, folder: Path, *more: Any, path: Any = None, **options: Any) -> Noted:
    noted = Noted()
    options = {"max_steps": 2, **options}
    trainer_of(folder, rewards(noted, *more), **options).fit(module, data_of(prompts), ckpt_path=path)
    return noted


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_in_float16_trains(tiny_qwen3: Path, prompts: Path, tmp_path: Path, mixed: bool) -> None:
    """The base in float16, or float32 under autocast, where Lightning's own scale gives way to ours."""
    torch.manual_seed(0)
    module = module_of(tiny_qwen3, policy_options={} if mixed else HALF, meta=Meta(every=1))
    plugin = MixedPrecision("16-mixed", "cpu") if mixed else None
    noted = fitted(module, prompts, tmp_path, plugins=plugin)
    assert [row["policy/loss_scale"] for row in noted.rows] == [65536.0, 65536.0]
    assert [row["policy/skipped"] for row in noted.rows] == [0.0, 0.0]
    trained = module.policy.trained_parameters()
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(bool(p.isfinite().all()) for p in trained)
    assert any(not torch.equal(p, before) for p, before in zip(trained, noted.before, strict=True))
    assert {p.dtype for p in module.weigher.parameters()} == {torch.float32}
    if plugin is not None:
        assert not plugin.scaler.is_enabled()
    assert sum("conductor/step_change" in row for row in noted.rows) == 2


@pytest.mark.parametrize("coupling", ["async", "joint"])
def test_the_scale_changes_nothing_but_what_it_saves(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, coupling: Any
) -> None:
    """It is a power of two: in float32 the parameters after two steps have the same bits with it."""
    found = []
    for scaled in (False, True):
        torch.manual_seed(1)
        module = module_of(tiny_qwen3, meta=Meta(coupling=coupling, every=1))
        if scaled:
            module.stepper.loss_scale = LossScale("cpu")
        fitted(module, prompts, tmp_path)
        found.append([p.detach() for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_step_that_overflows_is_left_out_and_counted(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = module_of(tiny_qwen3, policy_options=HALF)
    module.stepper.loss_scale = LossScale("cpu")
    module.stepper.loss_scale.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    noted = fitted(module, prompts, tmp_path)
    assert [row["policy/loss_scale"] for row in noted.rows] == [2.0**60, 2.0**59]
    assert [row["policy/skipped"] for row in noted.rows] == [1.0, 1.0]
    assert module.skipped_steps == 2
    assert all(torch.equal(p, b) for p, b in zip(module.policy.trained_parameters(), noted.before, strict=True))


def test_gradients_that_float16_loses_arrive(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    """With a loss of a millionth, float16 alone rounds the activations' gradients to zero."""
    norms = {}
    for name, options, scaled in (("float32", {}, False), ("alone", HALF, False), ("scaled", HALF, True)):
        torch.manual_seed(3)
        module = module_of(tiny_qwen3, policy_options=options)
        backward = module.manual_backward

        def tiny(loss: torch.Tensor, backward: Any = backward) -> None:
            backward(loss * 1e-6)

        module.manual_backward = tiny  # type: ignore[method-assign, assignment]
        module.stepper.loss_scale = LossScale("cpu")
        if not scaled:
            module.stepper.loss_scale.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        noted = fitted(module, prompts, tmp_path, max_steps=1)
        norms[name] = noted.rows[0]["policy/grad_norm"]
    assert norms["alone"] < 0.9 * norms["float32"]
    assert norms["scaled"] == pytest.approx(norms["float32"], rel=0.05)


def test_a_resumed_run_has_the_scale_that_it_had(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def made() -> Any:
        torch.manual_seed(4)
        module = module_of(tiny_qwen3, policy_options=HALF)
        module.stepper.loss_scale = LossScale("cpu")
        return module

    first = made()
    first.stepper.loss_scale.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    saving = ModelCheckpoint(dirpath=tmp_path / "kept", filename="end", save_last=True)
    fitted(first, prompts, tmp_path, saving, max_steps=1, enable_checkpointing=True)
    again = made()
    noted = fitted(again, prompts, tmp_path, path=tmp_path / "kept/last.ckpt", max_steps=2)
    assert [row["policy/loss_scale"] for row in noted.rows] == [2.0**59]


def test_a_second_trainer_of_a_module_does_not_scale_on_top(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module, plugins = module_of(tiny_qwen3), [MixedPrecision("16-mixed", "cpu") for _ in range(2)]
    for steps, plugin in enumerate(plugins, start=1):
        noted = fitted(module, prompts, tmp_path, plugins=plugin, max_steps=steps)
        assert [row["policy/skipped"] for row in noted.rows] == [0.0]
        assert not plugin.scaler.is_enabled()


def test_trained_parameters_in_float16_are_refused(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rounds small updates away"):
        module = module_of(tiny_qwen3, policy_options=HALF, lora=None)
    with pytest.raises(UserError, match=r"trained are in float16.*dtype: float32 and trainer.precision: 16-mixed"):
        fitted(module, prompts, tmp_path)


def test_a_card_without_bfloat16_is_told_what_to_use(tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(root_device=torch.device("cuda:0"))
    trainer = SimpleNamespace(strategy=cuda, precision="32-true", precision_plugin=None)
    monkeypatch.setattr(float16, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    module = module_of(tiny_qwen3, policy_options={"dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"The card Tesla T4 has no bfloat16.*dtype: float16.*t4.yaml"):
        loss_scale_of(trainer, module.policy)
    trainer.precision = "bf16-mixed"
    module = module_of(tiny_qwen3)
    assert compute_dtypes(trainer, module.policy) == {"float32", "bfloat16"}
    with pytest.raises(UserError, match="no bfloat16"):
        loss_scale_of(trainer, module.policy)
    monkeypatch.setattr(float16, "has_bfloat16", lambda device: True)
    assert loss_scale_of(trainer, module.policy) is None


def test_a_processor_without_bfloat16_is_said(tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=cpu, precision="32-true", precision_plugin=None)
    policies = {
        dtype: module_of(tiny_qwen3, policy_options={"dtype": dtype}).policy for dtype in ("bfloat16", "float32")
    }
    monkeypatch.setattr(float16, "has_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match=r"no instructions for bfloat16.*model.policy.dtype: float32"):
        assert loss_scale_of(trainer, policies["bfloat16"]) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss_scale_of(trainer, policies["float32"]) is None
        monkeypatch.setattr(float16, "has_bfloat16", lambda device: True)
        assert loss_scale_of(trainer, policies["bfloat16"]) is None
