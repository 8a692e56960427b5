"""Memory that runs out in the middle of a run: the same work in smaller pieces, to the same result."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl import KL, Loss
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.errors import UserError
from maestro_pl.generation import HFEngine, NativeEngine, Sampling
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.passes import pass_tokens, row_batches
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.run.recovery import is_out_of_memory, with_less
from maestro_pl.sft import SFTModule
from tests.support import data_of, module_of, rewards, trainer_of

ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i} " * (1 + i % 3), "task": "a", "reference": f"answer {i}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Scarce:
    """A device on which a pass of the policy over more than ``limit`` tokens fails, in the forward or in the backward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int, gradients: bool, late: bool = False) -> None:
        self.limit, self.failures, self.tokens = limit, 0, []
        from maestro_pl.policy.scoring import Scorer

        score = Scorer.score

        def scored(scorer: Any, base: Any, prompts: Any, responses: Any, **asked: Any) -> Any:
            tokens = scorer.tokens(base, prompts, responses)
            if torch.is_grad_enabled() is gradients and tokens > self.limit:
                self.failures += 1
                if not late:
                    raise ERRORS[self.failures % len(ERRORS)]
                statistics = score(scorer, base, prompts, responses, **asked)
                statistics.logps_T.register_hook(self.fail)
                return statistics
            if torch.is_grad_enabled() is gradients:
                self.tokens.append(tokens)
            return score(scorer, base, prompts, responses, **asked)

        monkeypatch.setattr(Scorer, "score", scored)

    @staticmethod
    def fail(gradient: torch.Tensor) -> None:
        raise ERRORS[0]


def parameters_after(folder: Path, prompts: Path, tmp_path: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    trainer = trainer_of(tmp_path, rewards(), max_steps=2, limit_val_batches=0)
    module = module_of(folder, lora=LoRA(r=4, **options.pop("adapters", {})), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data_of(prompts))
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}, module


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("options", [{}, {"kl": KL(coef=0.1), "updates_per_rollout": 2}, {"loss": Loss(type="luspo")}])
@pytest.mark.parametrize("kind", ["tiny_qwen3", "tiny_gpt2"])  # packed, and padded
def test_an_update_begins_anew_with_half_the_tokens_and_comes_to_the_same(
    kind: str, options: Any, late: bool, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    folder = request.getfixturevalue(kind)
    expected, _ = parameters_after(folder, prompts, tmp_path, **options)
    scarce = Scarce(monkeypatch, 55, gradients=True, late=late)
    got, module = parameters_after(folder, prompts, tmp_path, **options)
    assert scarce.failures >= 1
    assert max(scarce.tokens) <= 55
    assert module.micro_batch_tokens < 16384
    assert module.skipped_steps == 0
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=2e-4)


@pytest.mark.slow
def test_it_is_found_once_and_said(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce = Scarce(monkeypatch, 55, gradients=True)
    trainer = trainer_of(tmp_path, rewards(), max_steps=4, limit_val_batches=0)
    module = module_of(tiny_qwen3, weigher=EqualWeights())
    with pytest.warns(
        UserWarning, match=r"Memory ran out in an update of \d+ tokens a pass .*micro_batch_tokens="
    ) as seen:
        trainer.fit(module, data_of(prompts))
    said = [w for w in seen if "Memory ran out" in str(w.message)]
    assert len(said) == scarce.failures <= 3  # not once a step
    assert trainer.global_step == 4


@pytest.mark.slow
def test_one_response_that_does_not_fit_ends_the_run_in_a_sentence(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scarce(monkeypatch, 3, gradients=True)
    with pytest.raises(UserError, match=r"nothing smaller is left.*maestro-pl estimate"):
        parameters_after(tiny_qwen3, prompts, tmp_path)


@pytest.mark.slow
def test_the_reference_is_scored_in_smaller_passes(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"kl": KL(coef=0.1, place="reward")}
    expected, _ = parameters_after(tiny_qwen3, prompts, tmp_path, **options)
    scarce = Scarce(monkeypatch, 55, gradients=False)
    got, module = parameters_after(tiny_qwen3, prompts, tmp_path, **options)
    assert scarce.failures >= 1
    assert module.policy.score_limit < 16384
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=2e-4)


def test_supervised_training_recovers_too(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> tuple[dict[str, Any], SFTModule]:
        torch.manual_seed(11)
        policy = LoRAPolicy(str(tiny_qwen3), dtype="float32", lora=LoRA(r=4))
        module = SFTModule(policy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer_of(tmp_path, [], max_steps=2, limit_val_batches=0).fit(module, data_of(prompts))
        return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}, module

    expected, _ = trained()
    scarce = Scarce(monkeypatch, 120, gradients=True)
    got, module = trained()
    assert scarce.failures >= 1
    assert module.micro_batch_tokens < 16384
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=2e-4)


def test_generation_splits_the_batch_and_draws_the_same_tokens(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestro_pl.generation import decoding

    policy = LoRAPolicy(str(tiny_qwen3), dtype="float32", lora=LoRA(r=4))
    asked = (policy, [[1, 2, 3], [7, 8], [9, 9, 9, 9]], 4, Sampling(max_new_tokens=12, seed=5))
    expected = NativeEngine().generate(*asked)
    attend, failures = decoding.GroupCache.attend, []

    def scarce(cache: Any, layer: int, query: Any, key: Any, *rest: Any) -> Any:
        if cache._prefilling is None and cache.drawn > 4 and len(cache.owners) > 3:  # in the middle of decoding
            failures.append(len(cache.owners))
            raise ERRORS[len(failures) % 3]
        return attend(cache, layer, query, key, *rest)

    monkeypatch.setattr(decoding.GroupCache, "attend", scarce)
    engine = NativeEngine()
    with pytest.warns(UserWarning, match="rollout.max_batch="):
        got = engine.generate(*asked)
    assert failures
    assert engine.max_batch is not None
    assert engine.max_batch <= 6
    assert got.response_ids == expected.response_ids
    assert got.finish_reasons == expected.finish_reasons
    torch.testing.assert_close(got.logps_T, expected.logps_T, atol=1e-5, rtol=1e-5)


def test_generate_of_transformers_splits_the_batch_too(tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = LoRAPolicy(str(tiny_qwen3), dtype="float32", lora=LoRA(r=4))
    generate = type(policy.model).generate

    def scarce(model: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 2:
            raise ERRORS[0]
        return generate(model, **kwargs)

    monkeypatch.setattr(type(policy.model), "generate", scarce)
    engine = HFEngine()
    with pytest.warns(UserWarning, match="rollout.max_batch=2"):
        got = engine.generate(policy, [[1, 2, 3], [7, 8]], 4, Sampling(max_new_tokens=5, temperature=0.0))
    monkeypatch.undo()
    assert (
        got.response_ids
        == HFEngine().generate(policy, [[1, 2, 3], [7, 8]], 4, Sampling(5, temperature=0.0)).response_ids
    )


def test_a_single_response_too_many_is_said(tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maestro_pl.generation import decoding

    def never(*_: Any) -> Any:
        raise ERRORS[0]

    monkeypatch.setattr(decoding.GroupCache, "attend", never)
    policy = LoRAPolicy(str(tiny_qwen3), dtype="float32", lora=LoRA(r=4))
    vars(policy.scorer)["_abilities"] = None
    monkeypatch.setattr(type(policy), "packs", True)
    with pytest.raises(UserError, match=r"a single response was sampled.*max_new_tokens"):
        NativeEngine().generate(policy, [[1, 2]], 2, Sampling(max_new_tokens=4, seed=0))


def test_only_memory_errors_are_taken_for_it() -> None:
    assert all(is_out_of_memory(error) for error in ERRORS)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))

    def broken() -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        with_less(broken, lambda message: pytest.fail("must not be tried again"))


def test_the_random_state_is_that_of_the_first_attempt() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    attempts: list[torch.Tensor] = []

    def draw() -> torch.Tensor:
        attempts.append(torch.rand(3))
        if len(attempts) < 3:
            raise ERRORS[0]
        return attempts[-1]

    assert torch.equal(with_less(draw, lambda message: None), expected)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 7, 20, 33, 64, 200])
def test_passes_hold_every_row_once_and_keep_the_limit(packed: bool, max_tokens: int) -> None:
    generator = torch.Generator().manual_seed(max_tokens)
    prompts = torch.randint(1, 12, (5,), generator=generator).tolist()
    responses = torch.randint(1, 15, (5, 4), generator=generator).tolist()
    wanted = [0, 2, 3, 4]
    passes = row_batches(prompts, responses, wanted, max_tokens, packed)
    assert sorted(row for rows in passes for row in rows) == [n * 4 + g for n in wanted for g in range(4)]
    for rows in passes:
        tokens = pass_tokens(prompts, responses, rows, packed)
        assert tokens <= max_tokens or len(rows) == 1
        for n in {row // 4 for row in rows}:  # cut only where it must be
            whole = pass_tokens(prompts, responses, [n * 4 + g for g in range(4)], packed)
            assert len([row for row in rows if row // 4 == n]) == 4 or whole > max_tokens
    kept = row_batches(prompts, responses, wanted, max_tokens, packed, whole_groups=True)
    assert all(len([r for r in rows if r // 4 == n]) == 4 for rows in kept for n in {r // 4 for r in rows})
