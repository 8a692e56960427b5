"""On a CUDA card: captured decoding, NF4, NCCL, waits of an update; and every case of ``on_device.py`` on the real device."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks import MemoryProbe
from maestro_pl import KL, FSDP2Strategy, Meta
from maestro_pl.generation import Generation, NativeEngine, Sampling
from maestro_pl.generation.step import WAITED
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from tests.support import data_of, make_policy, module_of, rewards, trainer_of, write_rows

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
    pytest.mark.slow,
]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 11]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": f"word {i}", "task": "ab"[i % 2], "reference": f"four {i}"} for i in range(10)]
    write_rows(tmp_path / "prompts.jsonl", *rows)
    return tmp_path / "prompts.jsonl"


def policy_of(folder: Path, eos: list[int], **options: Any) -> LoRAPolicy:
    policy = make_policy(folder, std=0.1, **options).to("cuda").eval()
    policy.eos_token_ids = eos
    return policy


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def fit(model: Path, prompts: Path, *callbacks: Any, policy: Any = None, **run: Any) -> Any:
    """Two steps of the paper's run on the card, with its rollouts."""
    seen: list[Any] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["rollout"])

    module = module_of(
        model, optimizer=sgd, meta=Meta(every=1, optimizer=sgd), kl=KL(coef=0.1), lora=LoRA(r=4),
        policy_options=policy or {},
    )  # fmt: skip
    torch.manual_seed(0)
    options = {"accelerator": "gpu", "devices": 1, "max_steps": 2, "limit_val_batches": 0, **run}
    trainer = trainer_of(prompts.parent, [*rewards(), *callbacks, Watch()], **options)
    trainer.fit(module, data_of(prompts))
    return module, seen, trainer


def test_the_cases_of_the_pretend_device_on_the_card() -> None:
    cases = str(Path(__file__).with_name("on_device.py"))
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, cases],
        cwd=ROOT, env={**own, "MAESTRO_DEVICE": "cuda"}, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("eos", [[], list(range(0, 264, 20))], ids=["to the end", "ragged"])
@pytest.mark.parametrize(
    "asked",
    [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.9, "min_new_tokens": 4}],
    ids=["greedy", "plain", "top_k", "top_p"],
)
def test_captured_steps_give_what_the_growing_cache_gives(
    tiny_qwen3: Path, dtype: str, eos: list[int], asked: dict[str, Any]
) -> None:
    policy = policy_of(tiny_qwen3, eos, dtype=dtype)
    sampling = Sampling(max_new_tokens=80, seed=3, **asked)  # past 64, where the memory of keys doubles
    engine = NativeEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step that cannot be captured says so
        made = [engine.generate(policy, PROMPTS, 4, sampling) for _ in range(2)]  # the second captures anew
    assert engine.step is not None
    assert engine.step.how == "graph"
    assert made[0].response_ids == made[1].response_ids
    growing = NativeEngine(cache="growing").generate(policy, PROMPTS, 4, sampling)
    if dtype == "float32":
        alike(made[0], growing)
    else:  # sums in another order round otherwise, and a draw at a rounded edge falls to the neighbour
        same = sum(a == b for a, b in zip(made[0].response_ids, growing.response_ids, strict=True))
        assert same >= 6
    if eos and asked.get("temperature") != 0:
        assert len({len(ids) for ids in made[0].response_ids}) > 2


def alike(got: Generation, expected: Generation) -> None:
    assert got.response_ids == expected.response_ids
    assert got.finish_reasons == expected.finish_reasons
    for name in ("logps_T", "entropies_T", "hidden_BD"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-4, rtol=0, msg=name)


def test_the_card_draws_the_tokens_of_the_processor(tiny_qwen3: Path) -> None:
    """Random numbers are drawn on the host, so that a seed says the same on every device."""
    on_card = policy_of(tiny_qwen3, [])
    on_host = copy.deepcopy(on_card).to("cpu")
    sampling = Sampling(max_new_tokens=24, seed=1)
    got, expected = (NativeEngine().generate(policy, PROMPTS, 4, sampling) for policy in (on_card, on_host))
    assert got.response_ids == expected.response_ids
    torch.testing.assert_close(got.logps_T.cpu(), expected.logps_T, atol=1e-4, rtol=0)  # type: ignore[union-attr]


def test_nf4_trains_and_decodes_captured(tiny_qwen3: Path, prompts: Path) -> None:
    probe = MemoryProbe("always")
    options = {"quantization": "nf4", "gradient_checkpointing": True, "dtype": "bfloat16"}
    module, seen, trainer = fit(tiny_qwen3, prompts, probe, policy=options, precision="bf16-mixed")
    assert trainer.global_step == 2
    assert all(bool(parameter.isfinite().all()) for parameter in module.policy.trained_parameters())
    assert len(seen) == 2
    assert probe.report["update"] > 0
    engine = trainer.callbacks[0].engine
    assert engine.step.how == "graph"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_of_nccl_is_the_plain_run(tiny_qwen3: Path, prompts: Path, strategy: str) -> None:
    plain, rollouts, _ = fit(tiny_qwen3, prompts)
    own: Any = FSDP2Strategy() if strategy == "fsdp" else strategy
    module, again, trainer = fit(tiny_qwen3, prompts, strategy=own)
    try:
        assert "nccl" in torch.distributed.get_backend()
    finally:
        torch.distributed.destroy_process_group()
    before = module_of(tiny_qwen3, lora=LoRA(r=4)).policy.trained_parameters()
    assert any(
        not torch.equal(one.cpu(), own.cpu())
        for one, own in zip(plain.policy.trained_parameters(), before, strict=True)
    )
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in again]
    for one, other in zip(plain.policy.trained_parameters(), module.policy.trained_parameters(), strict=True):
        whole = other.full_tensor() if hasattr(other, "full_tensor") else other
        torch.testing.assert_close(whole.cpu(), one.cpu(), rtol=1e-4, atol=3e-5)
    assert trainer.global_step == 2


def test_an_update_waits_as_often_for_long_responses_as_for_short_ones(tiny_qwen3: Path, prompts: Path) -> None:
    """As torch counts it, for the whole of a step but for decoding."""
    counts = []
    for longest in (6, 24):
        stage, waits = [""], {"": 0}

        class Count(L.Callback):
            def setup(self, trainer: Any, pl_module: Any, stage: str, at: Any = stage, longest: int = longest) -> None:
                writer = trainer.callbacks[0]
                writer.sampling = type(writer.sampling)(max_new_tokens=longest)
                pl_module.clock.listeners.append(lambda name, note: at.__setitem__(0, name))

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                torch.cuda.set_sync_debug_mode("warn")

        def count(message: Any, *_: Any, at: Any = stage, waits: Any = waits, **__: Any) -> None:
            if WAITED in str(message):
                waits[at[0]] = waits.get(at[0], 0) + 1

        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("always")
            patch.setattr(warnings, "showwarning", count)
            try:
                fit(tiny_qwen3, prompts, Count())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(waits)
    print(counts)
    assert counts[0]["update"] == counts[1]["update"]
    assert counts[0]["update"] > 0
