"""vLLM as an engine, with tiny models in its place: what is asked, what comes back, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import maestro_pl
from maestro_pl import LoRA, LoRAPolicy, UserError, VLLMEngine, VLLMServerEngine
from maestro_pl.generation import Generation, NativeEngine, Sampling
from maestro_pl.generation.adapter_files import PREFIX, AdapterFiles
from maestro_pl.generation.agreement import agreement
from maestro_pl.generation.refusals import check_policy
from maestro_pl.generation.server_calls import Calls, Stopped
from maestro_pl.run.endpoints import Trouble
from tests.support import fake_vllm, make_policy, spread
from tests.support.fake_vllm import FakeVLLM, FakeVLLMServer

PROMPTS = [[1, 2, 3], [7, 8], [40, 41, 42, 43]]
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
DRAWN = Sampling(max_new_tokens=6, seed=5)


@pytest.fixture
def policy(tiny_qwen3: Path) -> LoRAPolicy:
    return make_policy(tiny_qwen3, std=0.3)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def servers(tiny_qwen3: Path) -> Iterator[list[FakeVLLMServer]]:
    made = [FakeVLLMServer(tiny_qwen3) for _ in range(2)]
    yield made
    for server in made:
        server.close()


def asking(*servers: FakeVLLMServer, **options: Any) -> VLLMServerEngine:
    quick = {"timeout_s": 60.0, "deadline_s": 120.0, "backoff_s": 0.02, "concurrency": 1}
    return VLLMServerEngine([server.url for server in servers], **{**quick, **options})


def assert_as_the_trainer(policy: LoRAPolicy, got: Generation, n: int, temperature: float = 1.0) -> None:
    rows = [prompt for prompt in PROMPTS for _ in range(n)]
    scored = policy.token_statistics(rows, got.response_ids, temperature=temperature).logps_T
    assert got.sampling_logps_T is not None
    torch.testing.assert_close(got.sampling_logps_T, scored, atol=1e-4, rtol=0)
    assert got.logps_T is None
    assert got.entropies_T is None


# -- in process ---------------------------------------------------------------------------------------------------------


def test_in_process_equals_native_and_every_step_is_a_new_version(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    engine = VLLMEngine()
    engine.prepare(policy, DRAWN, max_prompt_tokens=20)
    for number in (1, 2):
        got = engine.generate(policy, PROMPTS, 1, GREEDY)
        own = NativeEngine().generate(policy, PROMPTS, 1, GREEDY)
        assert (got.response_ids, got.finish_reasons) == (own.response_ids, own.finish_reasons)
        drawn = engine.generate(policy, PROMPTS, 4, replace(DRAWN, temperature=0.7))
        assert_as_the_trainer(policy, drawn, 4, 0.7)
        assert got.extra["adapter"] == drawn.extra["adapter"] == number  # what has not changed is not written again
        assert drawn.extra["difference"] < 1e-5
        spread(policy, 0.5)
    (made,) = vllm.made
    expected = {"dtype": "float32", "max_model_len": 26, "max_lora_rank": 8, "gpu_memory_utilization": 0.3}
    assert expected.items() <= made.items()
    assert made["logprobs_mode"] == "processed_logprobs"
    home = engine._files._home
    assert home is not None
    assert len(list(home.glob("maestro-*"))) == 2  # this version and the one before
    engine.close()
    assert not home.exists()
    assert vllm.llms[0].calls == ["shutdown"]


def test_in_process_repeats_itself_and_leaves_the_random_state_alone(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    engine, state = VLLMEngine(), torch.get_rng_state()
    draws = [engine.generate(policy, PROMPTS, 3, replace(DRAWN, seed=seed)).response_ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(row) for row in draws[0][:3]}) > 1  # responses of a group differ


def test_it_sleeps_between_rollouts_where_the_device_lets_it(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    vllm.sleeps = True
    engine = VLLMEngine()
    for _ in range(2):
        engine.generate(policy, PROMPTS[:1], 1, GREEDY)
    assert vllm.llms[0].calls == ["sleep", "wake", "sleep"]
    assert vllm.made[0]["enable_sleep_mode"] is True
    VLLMEngine(sleep=False).generate(policy, PROMPTS[:1], 1, GREEDY)
    assert vllm.made[1]["enable_sleep_mode"] is False


def test_in_process_ends_at_its_deadline_in_a_sentence(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    engine = VLLMEngine(deadline_s=0.3)
    vllm.slow = lambda: time.sleep(0.2)
    with pytest.raises(UserError, match=r"VLLMEngine did not finish a batch within 0.3 s: go on with --ckpt_path last"):
        engine.generate(policy, PROMPTS, 1, GREEDY)


def test_an_engine_that_hangs_is_asked_nothing_more(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    """Its rest would be waited for as well, and the sentence held back."""
    vllm.sleeps = True
    engine = VLLMEngine(deadline_s=0.3)
    vllm.slow = lambda: time.sleep(0.2)
    with pytest.raises(UserError, match=r"did not finish a batch within 0\.3 s"):
        engine.generate(policy, PROMPTS, 1, GREEDY)
    assert vllm.llms[0].calls == []
    vllm.slow = lambda: None
    engine = VLLMEngine(start_s=0.5)
    engine.prepare(policy, GREEDY)
    engine.generate(policy, PROMPTS, 1, GREEDY)
    vllm.llms[1].sleep = lambda level: time.sleep(60)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"did not go to sleep within 0\.5 s"):
        engine.generate(policy, PROMPTS, 1, GREEDY)
    assert time.monotonic() - begin < 20


def test_what_vllm_raises_is_a_sentence(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    def broken() -> None:
        raise ValueError("No available memory\nfor the cache blocks.")

    vllm.slow = broken
    with pytest.raises(
        UserError, match=r"did not finish a batch \(ValueError: No available memory for the cache blocks.\)"
    ):
        VLLMEngine().generate(policy, PROMPTS, 1, GREEDY)


def test_without_vllm_it_says_how_to_get_it(policy: LoRAPolicy) -> None:
    with pytest.raises(UserError, match=r"needs vLLM, .*pip install -e '.\[vllm\]'"):
        VLLMEngine().prepare(policy, DRAWN)


def test_a_prompt_without_room_is_refused(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    with pytest.raises(UserError, match=r"A prompt of 4 tokens and rollout.max_new_tokens=6 make more than the 9"):
        VLLMEngine(max_model_len=9).generate(policy, PROMPTS, 1, GREEDY)


# -- the known tokens ---------------------------------------------------------------------------------------------------


def test_another_model_is_caught_at_the_first_rollout(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    vllm.shift = 0.01
    with pytest.raises(UserError, match=r"disagree: known tokens are 0.01 nats apart on average, and 0.001 is allowed"):
        VLLMEngine().generate(policy, PROMPTS, 1, GREEDY)
    got = VLLMEngine(max_difference=0.02).generate(policy, PROMPTS, 1, GREEDY)
    assert got.extra["difference"] == pytest.approx(0.01, rel=1e-3)


def test_stale_adapters_are_caught_even_within_the_bound(policy: LoRAPolicy, vllm: FakeVLLM) -> None:
    vllm.stale = True
    engine = VLLMEngine(max_difference=100.0)
    engine.generate(policy, PROMPTS, 1, GREEDY)
    with torch.no_grad():
        next(p for name, p in policy.named_parameters() if "lora_B" in name).add_(1e-3)
    with pytest.raises(UserError, match="answers with the adapters of the version before"):
        engine.generate(policy, PROMPTS, 1, GREEDY)


def test_staleness_is_told_from_rounding_by_hand() -> None:
    now = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    before = now + torch.tensor([0.1, 0.0, 0.0, 0.0])
    noise = torch.tensor([0.0, 0.005, -0.005, 0.005])
    assert agreement(before + noise, now, before).stale
    fresh = agreement(now + noise, now, before)
    assert not fresh.stale
    assert fresh.difference == pytest.approx(0.00375, rel=1e-4)
    assert not agreement(before + 20 * noise, now, before).stale  # rounding of the size of the step tells nothing
    assert not agreement(now, now, now).stale
    assert not agreement(before, now, None).stale


# -- servers ------------------------------------------------------------------------------------------------------------


def test_servers_equal_native_and_share_the_requests(policy: LoRAPolicy, servers: list[FakeVLLMServer]) -> None:
    engine = asking(*servers)
    own = NativeEngine().generate(policy, PROMPTS, 1, GREEDY)
    barrier = threading.Barrier(2, timeout=60)

    def both(path: str, body: dict[str, Any]) -> None:
        if "return_token_ids" in body and barrier.n_waiting < 2 and not barrier.broken:
            barrier.wait()  # no server answers before the other was asked too
            barrier.abort()

    for server in servers:
        server.hook = lambda path, body: _quietly(both, path, body)
    got = engine.generate(policy, PROMPTS, 1, GREEDY)
    assert (got.response_ids, got.finish_reasons) == (own.response_ids, own.finish_reasons)
    assert all(any("return_token_ids" in body for _, body in server.asked) for server in servers)
    drawn = engine.generate(policy, PROMPTS, 3, DRAWN)
    assert_as_the_trainer(policy, drawn, 3)
    assert engine.generate(policy, PROMPTS, 3, DRAWN).response_ids == drawn.response_ids  # whoever draws
    assert [server.count("load_lora_adapter") for server in servers] == [1, 1]
    assert got.extra["adapter"] == 1.0
    spread(policy, 0.5)
    assert_as_the_trainer(policy, moved := engine.generate(policy, PROMPTS, 3, DRAWN), 3)
    assert moved.extra["adapter"] == 2.0
    assert all(list(server.model.models) == [engine._files.version.name] for server in servers if engine._files.version)
    engine.close()
    assert not any(server.model.models for server in servers)


def _quietly(call: Callable[..., None], *given: Any) -> None:
    try:
        call(*given)
    except threading.BrokenBarrierError:
        return


@pytest.mark.parametrize("failure", [500, 503, 429, "drop"])
def test_a_request_that_fails_is_asked_again(policy: LoRAPolicy, servers: list[FakeVLLMServer], failure: Any) -> None:
    left = [2]

    def hook(path: str, body: dict[str, Any]) -> Any:
        if "return_token_ids" in body and left[0]:
            left[0] -= 1
            return failure
        return None

    servers[0].hook = hook
    got = asking(servers[0]).generate(policy, PROMPTS, 2, DRAWN)
    assert_as_the_trainer(policy, got, 2)
    assert got.extra["retries"] == 2.0


def test_a_server_killed_in_the_middle_loses_nothing(policy: LoRAPolicy, servers: list[FakeVLLMServer]) -> None:
    """The other one does its part; when it is back it gets the adapters again."""
    first, second = servers
    back = threading.Event()

    def kill(path: str, body: dict[str, Any]) -> None:
        if "return_token_ids" in body and not back.is_set():
            back.set()
            threading.Thread(target=first.kill, daemon=True).start()
            first.closed.wait(0.2)

    first.hook = kill
    second.hook = lambda path, body: back.wait(60) and None  # not before it has died
    engine = asking(first, second)
    got = engine.generate(policy, PROMPTS, 2, DRAWN)
    assert_as_the_trainer(policy, got, 2)
    first.start(first.port)
    second.kill()
    assert engine.generate(policy, PROMPTS, 2, DRAWN).response_ids == got.response_ids
    assert first.count("load_lora_adapter") == 2


def test_the_only_server_is_waited_for(policy: LoRAPolicy, servers: list[FakeVLLMServer]) -> None:
    (server, _), killed = servers, threading.Event()

    def kill(path: str, body: dict[str, Any]) -> Any:
        if "return_token_ids" in body and not killed.is_set():
            killed.set()
            server.kill()
            threading.Timer(0.3, server.start, [server.port]).start()
            return "drop"
        return None

    server.hook = kill
    got = asking(server).generate(policy, PROMPTS, 2, DRAWN)
    assert_as_the_trainer(policy, got, 2)
    assert server.count("load_lora_adapter") == 2


def test_the_deadline_ends_the_waiting_in_a_sentence(policy: LoRAPolicy, servers: list[FakeVLLMServer]) -> None:
    first, second = servers
    second.close()
    engine = asking(first, second)
    engine.generate(policy, PROMPTS[:1], 1, GREEDY)  # it has the adapters
    last = PROMPTS[2]
    first.hook = lambda path, body: 503 if body.get("prompt") == last and body.get("n") else None
    engine.deadline_s = 2.0
    with pytest.raises(
        UserError, match=r"answered 2 of 3 prompts within .*deadline_s=2 \(.*HTTP 503.*--ckpt_path last"
    ):
        engine.generate(policy, PROMPTS, 1, replace(GREEDY, max_new_tokens=1))


def test_the_deadline_ends_a_batch_in_which_a_cancellation_is_lost(
    policy: LoRAPolicy, servers: list[FakeVLLMServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that comes as its request is cancelled: who asked goes on, and is cancelled again."""

    async def models(self: Calls) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if lost:
                raise
            lost.append(True)
        raise Stopped(Trouble("server", "busy"))

    lost: list[bool] = []
    monkeypatch.setattr(Calls, "models", models)
    with pytest.raises(UserError, match="answered 0 of 3 prompts within"):
        asking(servers[0], deadline_s=1.1).generate(policy, PROMPTS, 1, GREEDY)
    assert lost


def test_a_request_that_hangs_is_given_up_and_asked_elsewhere(
    policy: LoRAPolicy, servers: list[FakeVLLMServer]
) -> None:
    first, second = servers
    first.hook = lambda path, body: first.closed.wait(60) and None if "return_token_ids" in body else None
    engine = asking(first, second, timeout_s=0.5)
    assert_as_the_trainer(policy, engine.generate(policy, PROMPTS, 2, DRAWN), 2)


def test_a_server_with_stale_adapters_is_caught(policy: LoRAPolicy, servers: list[FakeVLLMServer]) -> None:
    servers[0].model.stale = True
    engine = asking(servers[0], max_difference=100.0)
    engine.generate(policy, PROMPTS, 1, GREEDY)
    spread(policy, 0.5)
    with pytest.raises(UserError, match="answers with the adapters of the version before"):
        engine.generate(policy, PROMPTS, 1, GREEDY)


def test_a_server_with_another_base_is_caught(
    policy: LoRAPolicy, servers: list[FakeVLLMServer], tiny_qwen3: Path, tmp_path: Path
) -> None:
    servers[1].model.shift = 0.2
    with pytest.raises(UserError, match=rf"The vLLM server at {servers[1].url} and the trainer disagree"):
        asking(servers[1]).generate(policy, PROMPTS, 1, GREEDY)


def test_an_answer_of_another_version_is_refused(policy: LoRAPolicy, servers: list[FakeVLLMServer]) -> None:
    servers[0].hook = lambda path, body: {"model": "maestro-of-old"} if "return_token_ids" in body else None
    with pytest.raises(UserError, match="answered with 'maestro-of-old': its answers are of another version"):
        asking(servers[0]).generate(policy, PROMPTS, 1, GREEDY)


def test_raw_log_probabilities_at_another_temperature_are_refused(
    policy: LoRAPolicy, servers: list[FakeVLLMServer]
) -> None:
    warm = replace(DRAWN, temperature=0.5)
    assert_as_the_trainer(policy, asking(servers[0]).generate(policy, PROMPTS, 2, warm), 2, 0.5)
    servers[1].raw = True
    with pytest.raises(UserError, match=r"rollout.temperature=0.5: start it with --logprobs-mode processed_logprobs"):
        asking(servers[1]).generate(policy, PROMPTS, 2, warm)


def test_a_server_that_loads_no_adapters_is_a_sentence(policy: LoRAPolicy, servers: list[FakeVLLMServer]) -> None:
    servers[0].hook = lambda path, body: 404 if path.endswith("load_lora_adapter") else None
    with pytest.raises(UserError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank 16"):
        asking(servers[0]).generate(policy, PROMPTS, 1, GREEDY)
    servers[1].max_model_len = 9
    with pytest.raises(UserError, match="make more than the 9 that the vLLM server at"):
        asking(servers[1]).generate(policy, PROMPTS, 1, GREEDY)


def test_the_key_is_sent_and_in_no_sentence(
    policy: LoRAPolicy, servers: list[FakeVLLMServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret-123")
    servers[0].hook = lambda path, body: 401 if path.endswith("models") else None
    with pytest.raises(UserError, match="refused a request") as raised:
        asking(servers[0]).generate(policy, PROMPTS, 1, GREEDY)
    assert "secret-123" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "expected one address or more"),
        ({"urls": ["http://a/v1", "http://a/v1"]}, "each once"),
        ({"urls": "localhost:8000"}, "expected an address such as"),
        ({"urls": "http://me:pw@a/v1"}, "holds a user name or password"),
        ({"deadline_s": 0}, "deadline_s=0: expected a number above 0"),
    ],
)
def test_server_settings_are_checked(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLLMServerEngine(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_share": 1.0}, "memory_share=1.0: expected a share"),
        ({"options": {"dtype": "auto"}}, "options holds 'dtype'"),
        ({"start_s": 0}, "start_s=0"),
    ],
)
def test_settings_in_process_are_checked(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VLLMEngine(**options)


# -- refused before the run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (None, "policy.lora is null .*leave model.policy.lora out to train adapters, or give rollout.engine=native"),
        (LoRA(r=32), r"lora.r=32 is above rollout.engine's max_lora_rank=16: .*--max-lora-rank 32"),
        (LoRA(use_dora=True), "without model.policy.lora.use_dora"),
        (LoRA(options={"bias": "all"}), "options.bias=all"),
        (LoRA(options={"lora_bias": True}), "options.lora_bias"),
        (LoRA(options={"modules_to_save": ["lm_head"]}), "options.modules_to_save"),
        (LoRA(options={"rank_pattern": {"q_proj": 64}}), "options.rank_pattern"),
        (LoRA(options={"init_lora_weights": "pissa"}), "begins by pissa, which changes the base's weights"),
        (LoRA(options={"init_lora_weights": "olora"}), "begins by olora"),
        (LoRA(options={"init_lora_weights": "loftq"}), "begins by loftq"),
        (LoRA(options={"init_lora_weights": "gaussian", "exclude_modules": "q_proj"}), None),
    ],
)
def test_adapters_that_vllm_would_read_as_others_are_refused(policy: LoRAPolicy, lora: Any, message: str) -> None:
    policy.lora = lora
    if message is None:
        check_policy(policy, "VLLMEngine", 16, None)
        return
    with pytest.raises(UserError, match=message):
        check_policy(policy, "VLLMEngine", 16, None)


@pytest.mark.parametrize(
    ("own", "theirs", "message"),
    [
        ("none", "awq", "quantization=none and .*quantization=awq: .*give quantization: null to the engine"),
        ("nf4", None, "quantization=nf4 and .*quantization=None: .*give quantization: bitsandbytes"),
        ("int8", "bitsandbytes", "quantization=int8: vLLM has no such base"),
        ("nf4", "bitsandbytes", None),
    ],
)
def test_a_base_in_another_quantization_is_refused(policy: LoRAPolicy, own: Any, theirs: Any, message: Any) -> None:
    policy.quantization = own
    if message is None:
        check_policy(policy, "VLLMEngine", 16, theirs)
        return
    with pytest.raises(UserError, match=message):
        check_policy(policy, "VLLMEngine", 16, theirs)


@pytest.mark.parametrize("filtered", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}])
def test_filters_are_refused(policy: LoRAPolicy, filtered: Any) -> None:
    with pytest.raises(UserError, match=rf"rollout.{next(iter(filtered))}=.* the correction for the engine wrong"):
        VLLMServerEngine().prepare(policy, Sampling(**filtered))


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_of_a_killed_process_are_removed_and_those_in_use_are_not(policy: LoRAPolicy, tmp_path: Path) -> None:
    alive = AdapterFiles(str(tmp_path))
    kept = alive.current(policy)
    left = tmp_path / f"{PREFIX}old-1"
    left.mkdir()
    (left / "in_use").touch()
    other = AdapterFiles(str(tmp_path))
    other.current(policy)
    assert not left.exists()
    assert (kept.folder / "adapter_model.safetensors").exists()
    assert json.loads((kept.folder / "adapter_config.json").read_text())["r"] == 4
    assert kept.name != other.version.name  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_written_is_a_sentence(policy: LoRAPolicy, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written for the engine"):
        AdapterFiles(str(tmp_path / "file" / "below")).current(policy)


def test_both_are_public_and_import_no_vllm() -> None:
    assert {"VLLMEngine", "VLLMServerEngine"} <= set(maestro_pl.__all__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert maestro_pl.VLLMEngine is VLLMEngine
