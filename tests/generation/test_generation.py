"""The engine's contract: what is sampled, where a response ends, and that nothing else is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.rollout import RolloutGenerator, response_text
from maestro_pl.errors import UserError
from maestro_pl.generation import Engine, HFEngine, NativeEngine, Sampling
from maestro_pl.policy.loading import LoRA
from tests.support import make_policy

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


@pytest.fixture(params=[HFEngine, NativeEngine])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param()


@pytest.mark.parametrize("kind", ["tiny_qwen3", "tiny_llama", "tiny_gpt2"])
def test_greedy_equals_argmax_of_plain_forwards(kind: str, engine: Engine, request: pytest.FixtureRequest) -> None:
    policy = make_policy(request.getfixturevalue(kind)).eval()
    got = engine.generate(policy, PROMPTS, 1, Sampling(max_new_tokens=6, temperature=0.0))
    for prompt, response in zip(PROMPTS, got.response_ids, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] not in policy.eos_token_ids):
            with torch.no_grad():
                ids.append(int(policy.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert response == ids[len(prompt) :]


def test_a_seed_repeats_and_leaves_the_global_state_alone(tiny_qwen3: Path, engine: Engine) -> None:
    policy = make_policy(tiny_qwen3)
    state = torch.get_rng_state()
    first, again, other = (
        engine.generate(policy, PROMPTS, 3, Sampling(max_new_tokens=8, seed=s)).response_ids for s in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == 6
    assert len({tuple(r) for r in first}) > 1


def test_lengths_come_from_what_was_sampled_also_where_padding_is_an_end_token(
    tiny_qwen3: Path, engine: Engine
) -> None:
    policy = make_policy(tiny_qwen3)
    policy.eos_token_ids = list(range(0, 264, 8))  # one token in eight ends a response
    policy.tokenizer.pad_token_id = 8  # padding looks like an end token
    got = engine.generate(policy, PROMPTS, 16, Sampling(max_new_tokens=12, seed=0))
    assert {"stop", "length"} == set(got.finish_reasons)
    for ids, reason in zip(got.response_ids, got.finish_reasons, strict=True):
        ends = [i for i, token in enumerate(ids) if token % 8 == 0]
        assert ends == ([len(ids) - 1] if reason == "stop" else [])
        assert reason == "stop" or len(ids) == 12


def test_stop_strings_end_a_response_and_leave_its_text(tiny_qwen3: Path, engine: Engine) -> None:
    policy = make_policy(tiny_qwen3)
    sampling = Sampling(max_new_tokens=24, stop=("a", "e", "i", "Q"), seed=0)
    got = engine.generate(policy, PROMPTS, 12, sampling)
    assert "stop" in got.finish_reasons
    for ids, reason in zip(got.response_ids, got.finish_reasons, strict=True):
        text = policy.decode(ids)
        if reason == "stop" and ids[-1] not in policy.eos_token_ids:
            assert text[-1] in "aeiQ"
            assert not set("aeiQ") & set(text[:-1])
        assert not set("aeiQ") & set(response_text(policy, ids, sampling.stop))


def test_generation_defaults_of_the_model_do_not_leak(tiny_qwen3: Path, engine: Engine) -> None:
    policy = make_policy(tiny_qwen3)
    policy.base_model.generation_config.top_k = 1
    policy.base_model.generation_config.repetition_penalty = 9.0
    plain = make_policy(tiny_qwen3)
    sampling = Sampling(max_new_tokens=8, seed=3)
    assert (
        engine.generate(policy, PROMPTS, 4, sampling).response_ids
        == engine.generate(plain, PROMPTS, 4, sampling).response_ids
    )
    assert policy.base_model.generation_config.top_k == 1


def test_sampling_is_in_eval_mode_and_every_mode_is_restored(tiny_qwen3: Path, engine: Engine) -> None:
    policy = make_policy(tiny_qwen3, std=1.0, lora=LoRA(r=4, dropout=0.9), gradient_checkpointing=True)
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    policy.train()
    modes = [m.training for m in policy.modules()]
    checkpointing = [getattr(m, "gradient_checkpointing", None) for m in policy.modules()]
    assert True in checkpointing
    trained = engine.generate(policy, PROMPTS, 1, sampling).response_ids
    assert [m.training for m in policy.modules()] == modes
    assert [getattr(m, "gradient_checkpointing", None) for m in policy.modules()] == checkpointing
    assert trained == engine.generate(policy.eval(), PROMPTS, 1, sampling).response_ids


def test_min_new_tokens_and_batches_and_progress(tiny_qwen3: Path) -> None:
    policy = make_policy(tiny_qwen3)
    policy.eos_token_ids = list(range(0, 264, 2))
    seen: list[tuple[int, int]] = []
    got = HFEngine(max_batch=3).generate(
        policy,
        PROMPTS,
        4,
        Sampling(max_new_tokens=9, min_new_tokens=5, seed=0),
        lambda done, total: seen.append((done, total)),
    )
    assert len(got.response_ids) == 8
    assert min(len(ids) for ids in got.response_ids) > 5
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_top_k_top_p_and_min_p_restrict_what_is_sampled(tiny_qwen3: Path, engine: Engine) -> None:
    policy = make_policy(tiny_qwen3).eval()
    with torch.no_grad():
        probabilities = policy.model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    ranked = probabilities.argsort(descending=True).tolist()
    nucleus = ranked[: int((probabilities[ranked].cumsum(0) < 0.3).sum()) + 1]
    likely = {i for i, p in enumerate(probabilities.tolist()) if p >= 0.5 * probabilities.max()}
    for options, allowed in (({"top_k": 3}, set(ranked[:3])), ({"top_p": 0.3}, set(nucleus)), ({"min_p": 0.5}, likely)):
        got = engine.generate(policy, PROMPTS[:1], 64, Sampling(max_new_tokens=1, seed=0, **options))
        assert {ids[0] for ids in got.response_ids} <= allowed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "rollout.max_new_tokens=0: expected at least 1"),
        ({"min_new_tokens": 500}, "rollout.min_new_tokens=500"),
        ({"temperature": 0.0}, "above 0"),
        ({"top_p": 0.0}, "rollout.top_p=0.0"),
        ({"top_k": -1}, "rollout.top_k=-1"),
        ({"min_p": 1.0}, "rollout.min_p=1.0"),
        ({"stop": [""]}, "not empty"),
        ({"group_size": 1}, "at least 2"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"engine": "vllm"}, "rollout.engine='vllm'"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"engine": object()}, "rollout.engine=object has no method generate: expected native, hf"),
        ({"engine": Engine(), "max_batch": 4}, "rollout.max_batch=4 is read by the engines native and hf"),
    ],
)
def test_bad_sampling_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RolloutGenerator(**options)
