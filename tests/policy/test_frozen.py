"""The context of the frozen base: what it reads, how often, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl import KL, Meta
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.errors import UserError
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.frozen import FrozenStates
from tests.support import data_of, make_policy, make_rollout, module_of, rewards, trainer_of

PROMPT = HiddenContext(place="prompt", state="base")
IDS = [[5, 6, 7], [8, 9]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "a"}) + "\n" for i in range(10)))
    return path


def base_of(context: str, **options: Any) -> Conductor:
    return Conductor(norm="center", context=context, state="base", **options)


@pytest.mark.parametrize("lora", ["adapters", None])
def test_the_base_does_not_move_with_the_policy(tiny_qwen3: Path, lora: Any) -> None:
    options = {} if lora else {"lora": None}
    policy = make_policy(tiny_qwen3, **options)
    before = FrozenStates().of_prompts(policy, IDS, PROMPT, 64)
    own = policy.token_statistics(IDS, [[1], [1]], context=HiddenContext(place="prompt")).hidden_BD
    torch.testing.assert_close(before, own.detach(), atol=2e-5, rtol=0)  # nothing was trained yet
    with torch.no_grad():
        for parameter in policy.trained_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(FrozenStates().of_prompts(policy, IDS, PROMPT, 64), before, atol=2e-5, rtol=0)
    moved = policy.token_statistics(IDS, [[1], [1]], context=HiddenContext(place="prompt")).hidden_BD
    assert float((moved - before).abs().max()) > 1e-2


def test_every_prompt_of_a_run_is_read_once(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(tiny_qwen3, weigher=base_of("prompt"))
    asked: list[int] = []
    score = module.policy.token_statistics

    def counted(prompt_ids: Any, *args: Any, **options: Any) -> Any:
        if options.get("which") == "base":
            asked.append(len(prompt_ids))
        return score(prompt_ids, *args, **options)

    module.policy.token_statistics = counted
    data = data_of(prompts)
    trainer = trainer_of(tmp_path, rewards(), max_steps=7, limit_val_batches=0)
    trainer.fit(module, data)  # two a step: more than twice through them
    count = len(data.rows["train"])
    assert 2 * count < 7 * 2
    assert sum(asked) == module.frozen_states.read == len(module.frozen_states) == count
    assert module.step_metrics["conductor/prompts_read"] == count


def test_a_checkpoint_brings_the_states_back(tiny_qwen3: Path) -> None:
    policy, kept = make_policy(tiny_qwen3), FrozenStates()
    first = kept.of_prompts(policy, IDS, PROMPT, 64)
    again = FrozenStates()
    again.load_state_dict(kept.state_dict())
    policy.token_statistics = None  # type: ignore[assignment]  # nothing is read
    assert torch.equal(again.of_prompts(policy, IDS, PROMPT, 64), first)
    assert again.read == 2


def test_states_of_another_layer_are_forgotten(tiny_qwen3: Path) -> None:
    policy, kept = make_policy(tiny_qwen3), FrozenStates()
    kept.of_prompts(policy, IDS, PROMPT, 64)
    other = kept.of_prompts(policy, IDS, HiddenContext("first", place="prompt", state="base"), 64)
    expected = policy.token_statistics(IDS, [[1], [1]], context=HiddenContext("first", place="prompt")).hidden_BD
    torch.testing.assert_close(other, expected.detach(), atol=2e-5, rtol=0)


def test_what_is_kept_is_bounded_and_what_was_forgotten_is_read_again(tiny_qwen3: Path) -> None:
    policy = make_policy(tiny_qwen3)
    kept = FrozenStates(most_bytes=4 * policy.hidden_size)
    kept.of_prompts(policy, IDS, PROMPT, 64)
    assert (len(kept), kept.read) == (1, 2)
    kept.of_prompts(policy, IDS[1:], PROMPT, 64)  # the newest is there
    assert kept.read == 2
    kept.of_prompts(policy, IDS[:1], PROMPT, 64)
    assert kept.read == 3


def test_whole_responses_are_read_with_the_reference(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(tiny_qwen3, weigher=base_of("terminal"), kl=KL(coef=0.1))
    asked: list[str] = []
    score = module.policy.token_statistics

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(options.get("which", "policy"))
        return score(*args, **options)

    module.policy.token_statistics = counted
    rollout = make_rollout(["ab", "c", "de", "f"], group_size=2, fields={"prompt_ids": [[3], [4]]})
    module.frozen_states.write(module.policy, rollout, module.context, 64)
    logps_T = module.inner.scored_logps(rollout, "reference")
    assert asked == ["base"]
    rollout.ref_logps_T = None
    module.trainer = trainer_of(tmp_path, rewards())
    torch.testing.assert_close(module.inner.scored_logps(rollout, "reference"), logps_T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"lora": None}, {}])
def test_beside_a_synced_reference_the_base_is_without_adapters_or_not_there(tiny_qwen3: Path, options: Any) -> None:
    policy = make_policy(tiny_qwen3, std=0.3, reference="synced", **options)
    if options:
        with pytest.raises(UserError, match="reference: synced moves the other copy"):
            policy.check_base()
        return
    plain = make_policy(tiny_qwen3)
    expected = FrozenStates().of_prompts(plain, IDS, PROMPT, 64)
    policy.sync_reference(1.0)
    torch.testing.assert_close(FrozenStates().of_prompts(policy, IDS, PROMPT, 64), expected, atol=2e-5, rtol=0)


def test_a_joint_run_reads_the_policy(tiny_qwen3: Path) -> None:
    with pytest.raises(UserError, match="give state: policy"):
        module_of(tiny_qwen3, weigher=Conductor(state="base"), meta=Meta(coupling="joint"))
