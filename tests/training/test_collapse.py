"""A policy that has collapsed is said to have, once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from maestro_pl.training.collapse import CollapseWatch
from tests.support import data_of, module_of, rewards, trainer_of


def said(entropies: list[float], vocabulary: int = 1000) -> list[str]:
    watch = CollapseWatch(vocabulary)
    return [watch.see(entropy, step) for step, entropy in enumerate(entropies)]


def test_one_answer_and_noise_are_told_once() -> None:
    one = said([0.5, 0.005, 0.004, 0.004, 0.5, 0.001, 0.001])
    assert [bool(text) for text in one] == [False, False, True, False, False, False, False]
    assert "Step 2: the policy has collapsed: it gives one and the same response" in one[2]
    assert "0.5 nats at the beginning, 0.004 now" in one[2]
    noise = said([1.0, 6.8, 6.9])
    assert "its tokens are drawn like noise" in noise[2]


@pytest.mark.parametrize(
    "entropies",
    [
        [0.5, 0.001, 0.2, 0.001, 0.2],  # not in a row
        [0.5, 0.1, 0.05, 0.02, 0.02],  # it has learned what to say
        [0.01, 0.0001, 0.0001],  # as good as greedy from the beginning
        [6.8, 6.9, 6.9],  # it knows nothing yet
        [0.5, math.nan, math.nan],  # that is another sentence's
    ],
)
def test_what_is_no_collapse(entropies: list[float]) -> None:
    assert not any(said(entropies))


def test_a_run_says_it(tiny_qwen3: Path, tmp_path: Path) -> None:
    class Certain(L.Callback):
        """From the second batch on, as if no token had been in doubt."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if pl_module.policy_steps:
                batch["rollout"].entropies_T = torch.zeros_like(batch["rollout"].entropies_T)

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "a"}) + "\n" for i in range(8)))
    trainer = trainer_of(tmp_path, rewards(Certain()), max_steps=3, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"Step 3: the policy has collapsed: it gives one and the same response"):
        trainer.fit(module_of(tiny_qwen3), data_of(path))
