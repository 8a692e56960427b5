"""Both engines on vLLM itself against the native engine and the trainer's own log-probabilities."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl import LoRA, LoRAPolicy, UserError, VLLMEngine, VLLMServerEngine
from maestro_pl.cli import main
from maestro_pl.generation import Engine, NativeEngine, Sampling
from maestro_pl.sandbox import rows
from tests_vllm.conftest import START_S, Server

NATIVE = Path(__file__).parents[1] / "benchmarks" / "results" / "sandbox_seeds_quickstart.json"
GREEDY = Sampling(max_new_tokens=40, temperature=0.0)


@pytest.fixture(scope="session")
def local() -> Iterator[VLLMEngine]:
    made = VLLMEngine(max_model_len=256, max_lora_rank=16, enforce_eager=True)
    yield made
    made.close()


@pytest.fixture
def policy() -> LoRAPolicy:
    torch.manual_seed(3)
    return moved(LoRAPolicy("sandbox", dtype="float32", lora=LoRA(r=16)), 0.01)


@pytest.fixture
def prompts(policy: LoRAPolicy) -> list[list[int]]:
    return [policy.encode(row["prompt"]) for row in rows("train", n_per_task=2)]


def moved(policy: LoRAPolicy, std: float) -> LoRAPolicy:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(std * torch.randn_like(parameter))
    return policy


def assert_equal_to_native(engine: Engine, policy: LoRAPolicy, prompts: list[list[int]]) -> None:
    for _ in range(3):
        got, own = (each.generate(policy, prompts, 1, GREEDY) for each in (engine, NativeEngine()))
        assert got.response_ids == own.response_ids
        assert got.finish_reasons == own.finish_reasons
        assert got.extra["difference"] < 1e-4
        for temperature in (1.0, 0.7):
            asked = Sampling(max_new_tokens=40, temperature=temperature, seed=9)
            drawn = engine.generate(policy, prompts, 4, asked)
            repeated = [prompt for prompt in prompts for _ in range(4)]
            scored = policy.token_statistics(repeated, drawn.response_ids, temperature=temperature).logps_T
            assert drawn.sampling_logps_T is not None
            assert float((drawn.sampling_logps_T - scored).abs().max()) < 1e-4
            assert len(set(map(tuple, drawn.response_ids))) > len(prompts)
        moved(policy, 0.02)


def test_in_process_equals_native(local: VLLMEngine, policy: LoRAPolicy, prompts: list[list[int]]) -> None:
    assert_equal_to_native(local, policy, prompts)


def test_stop_strings_and_the_least_number_of_tokens(
    local: VLLMEngine, policy: LoRAPolicy, prompts: list[list[int]]
) -> None:
    for asked in (
        Sampling(max_new_tokens=40, temperature=0.0, stop=("</think>",)),
        Sampling(max_new_tokens=40, min_new_tokens=30, temperature=0.0),
    ):
        got, own = (each.generate(policy, prompts, 1, asked) for each in (local, NativeEngine()))
        assert got.response_ids == own.response_ids
        assert got.finish_reasons == own.finish_reasons


def test_stale_adapters_in_process_are_caught(
    local: VLLMEngine, policy: LoRAPolicy, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    local.generate(policy, prompts, 1, GREEDY)
    old = local._files.version
    current = local._files.current

    def with_old_files(policy: LoRAPolicy) -> Any:
        new = current(policy)
        return type(new)(new.number, new.name, old.folder) if old is not None else new

    monkeypatch.setattr(local._files, "current", with_old_files)
    moved(policy, 1e-3)
    monkeypatch.setattr(local, "max_difference", 100.0)
    with pytest.raises(UserError, match="adapters of the version before"):
        local.generate(policy, prompts, 1, GREEDY)


def test_a_server_equals_native(server: Server, policy: LoRAPolicy, prompts: list[list[int]]) -> None:
    engine = VLLMServerEngine(server.url)
    assert_equal_to_native(engine, policy, prompts)
    engine.close()


def test_a_server_killed_in_the_middle_is_waited_for(
    server: Server, policy: LoRAPolicy, prompts: list[list[int]]
) -> None:
    engine = VLLMServerEngine(server.url, concurrency=1, deadline_s=START_S)
    asked = Sampling(max_new_tokens=80, seed=1)
    whole = engine.generate(policy, prompts, 4, asked)

    def restart() -> None:
        server.kill()
        server.start()

    killed = threading.Event()

    def progress(done: int, total: int) -> None:
        if not killed.is_set():
            killed.set()
            restart()

    again = engine.generate(policy, prompts, 4, asked, progress)
    assert killed.is_set()
    assert again.extra["retries"] >= 1
    assert again.response_ids == whole.response_ids
    short = VLLMServerEngine(server.url, deadline_s=2.0)
    server.kill()
    with pytest.raises(UserError, match=r"answered 0 of 8 prompts within .*deadline_s=2"):
        short.generate(policy, prompts, 1, GREEDY)


def test_the_quickstart_learns_as_with_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine = {"class_path": "maestro_pl.VLLMEngine", "init_args": {"max_model_len": 256, "enforce_eager": True}}
    run = {"default_root_dir": str(tmp_path), "enable_progress_bar": False}
    given = ["--rollout.engine", json.dumps(engine), *(f"--trainer.{key}={value}" for key, value in run.items())]
    main(["fit", "--config", "configs/quickstart.yaml", *given])
    (table,) = tmp_path.rglob("before_after.csv")
    utility = {row["task"]: row for row in read(table) if row["metric"] == "reward/utility"}
    assert all(float(row["after"]) > float(row["before"]) for row in utility.values())
    native = json.loads(NATIVE.read_text(encoding="utf-8"))["summary"]  # means of five seeds
    for when in ("before", "after"):
        assert float(utility["all"][when]) == pytest.approx(native[when]["all"], abs=0.06)
    (table,) = tmp_path.rglob("metrics.csv")
    logged = read(table)
    adapters = [float(row["engine/adapter"]) for row in logged if row.get("engine/adapter")]
    assert adapters == sorted(adapters)
    assert adapters[-1] >= 40
    assert max(abs(float(row["engine/kl"])) for row in logged if row.get("engine/kl")) < 1e-6


def read(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
