"""What callbacks, rewards and libraries do to the global generators changes nothing of the run's own draws."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from callbacks.rewards import FunctionReward
from maestro_pl import Meta
from tests.support import data_of, module_of, rewards, sevens, trainer_of

HOOKS = (
    "setup", "on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_train_start", "on_train_epoch_start",
    "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end",
    "on_validation_start", "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end",
    "on_validation_end", "on_save_checkpoint",
)  # fmt: skip


def disturb(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


class Disturbs(L.Callback):
    """Seeds every global generator anew in every hook."""

    def __init__(self, seed: int) -> None:
        self.called: set[str] = set()
        for name in HOOKS:
            setattr(self, name, lambda *_, name=name, **__: (self.called.add(name), disturb(seed))[1])


def disturbing(completion: str, **_: Any) -> float:
    disturb(len(completion))
    return sevens(completion) + 1e-3 * random.random()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(10)))
    return path


def fitted(
    model: Path, prompts: Path, folder: Path, steps: int, seed: int | None = None, checkpoint: Path | None = None
) -> dict[str, torch.Tensor]:
    """What a run comes to whose dropout and Conductor draw, with a validation after each step, several passes each."""
    chain = [FunctionReward(disturbing, name="sevens", normalize="zscore"), rewards()[1]]
    observers = [] if seed is None else [Disturbs(seed)]
    module = module_of(model, meta=Meta(every=2), micro_batch_tokens=48)
    trainer = trainer_of(
        folder, [*chain, *observers], max_steps=steps, val_check_interval=1, limit_val_batches=1, num_sanity_val_steps=1
    )
    disturb(seed or 7)
    trainer.fit(module, data_of(prompts), ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"step-{steps}.ckpt")
    for observer in observers:
        left_out = {"on_sanity_check_start", "on_sanity_check_end"} if checkpoint else set()
        assert set(HOOKS) - left_out <= observer.called
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=0, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_generators_that_others_seed_change_nothing_with_validations_between_and_on_resume(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    alone = fitted(tiny_qwen3, prompts, tmp_path, 3)
    same(alone, fitted(tiny_qwen3, prompts, tmp_path, 3, seed=11))
    fitted(tiny_qwen3, prompts, tmp_path, 2, seed=12)
    same(alone, fitted(tiny_qwen3, prompts, tmp_path, 3, seed=13, checkpoint=tmp_path / "step-2.ckpt"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")  # and what the run draws does depend on its seed
    other = fitted(tiny_qwen3, prompts, tmp_path, 3)
    assert any(not torch.equal(value, other[name]) for name, value in alone.items())
