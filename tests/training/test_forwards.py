"""How often the model runs in a training step, and on how many tokens: nothing is computed twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.rewards import FunctionReward
from maestro_pl import KL
from maestro_pl.conductor.weighers import EqualWeights
from tests.support import constant, data_of, module_of, rewards, trainer_of


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}" * (i + 1), "task": "a"}) + "\n" for i in range(10)))
    return path


class Forwards(L.Callback):
    """Counts the tokens of every pass through the backbone, with and without gradient, and the entropies made."""

    def __init__(self) -> None:
        self.sampling: list[int] = []
        self.training: list[int] = []
        self.lengths: list[list[int]] = []
        self.prompts: list[int] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert pl_module.policy.packs  # the trial passes are not part of the count

        def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            (self.training if torch.is_grad_enabled() else self.sampling).append(kwargs["input_ids"].numel())

        pl_module.policy.base_model.model.register_forward_hook(note, with_kwargs=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.lengths.append([len(ids) for ids in batch["rollout"].response_ids])
        self.prompts.append(sum(len(ids) for ids in batch["rollout"].prompt_ids))


def counted(folder: Path, prompts: Path, tmp_path: Path, chain: Any = None, **options: Any) -> Forwards:
    counts = Forwards()
    trainer = trainer_of(tmp_path, [*(chain or rewards()), counts], max_steps=2, limit_val_batches=0)
    trainer.fit(module_of(folder, **options), data_of(prompts))
    return counts


def test_without_kl_and_with_one_update_there_is_no_scoring_pass(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    counts = counted(tiny_qwen3, prompts, tmp_path, weigher=EqualWeights())
    decoding = sum(max(lengths) for lengths in counts.lengths)  # one prefill, and a pass for every token but the last
    assert len(counts.sampling) == decoding
    assert counts.training == [p + sum(n) for p, n in zip(counts.prompts, counts.lengths, strict=True)]


def test_the_conductor_costs_one_read_of_the_last_token(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    counts = counted(tiny_qwen3, prompts, tmp_path)
    assert len(counts.sampling) == sum(max(lengths) + 1 for lengths in counts.lengths)
    assert len(counts.training) == 2


@pytest.mark.parametrize(("options", "scoring"), [({"kl": KL(coef=0.1)}, 1), ({"kl": KL(coef=0.1, place="reward")}, 2)])
def test_kl_costs_one_pass_of_the_reference_and_in_the_reward_one_of_the_policy(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, options: dict[str, Any], scoring: int
) -> None:
    counts = counted(tiny_qwen3, prompts, tmp_path, weigher=EqualWeights(), **options)
    decoding = sum(max(lengths) for lengths in counts.lengths)
    assert len(counts.sampling) == decoding + 2 * scoring


def test_a_second_update_costs_one_pass_and_no_scoring(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    counts = counted(tiny_qwen3, prompts, tmp_path, weigher=EqualWeights(), updates_per_rollout=2)
    assert len(counts.sampling) == sum(max(lengths) for lengths in counts.lengths)
    assert len(counts.training) == 4


def test_groups_without_signal_are_not_computed(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    chain = [FunctionReward(function=constant, name="constant")]
    assert counted(tiny_qwen3, prompts, tmp_path, chain, weigher=EqualWeights()).training == []


def test_the_update_makes_no_entropies(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestro_pl.policy import scoring

    asked: list[bool] = []
    original = scoring.token_logps
    monkeypatch.setattr(scoring, "token_logps", lambda *a: asked.append(a[4]) or original(*a))
    counted(tiny_qwen3, prompts, tmp_path, kl=KL(coef=0.1))
    assert asked
    assert not any(asked)
