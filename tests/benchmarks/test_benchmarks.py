"""The speed benchmarks run, give their keys, and give both sides the same work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import conductor_overhead, levers, limit, trl_side_by_side
from benchmarks.conductor_growth import growth
from benchmarks.workloads import WORKLOADS, Workload, make_ours, model_folder, prompt_texts

TINY = "--quick --size-hidden 32 --size-layers 2 --size-vocabulary 256 --size-new-tokens 8".split(" ")  # noqa: SIM905
SMALL = {"hidden": 32, "layers": 2, "vocabulary": 256, "new_tokens": 8}


def tiny(name: str) -> Workload:
    return replace(WORKLOADS[name], **SMALL)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def in_process(arguments: list[str], folder: Path, threads: int, **changed: object) -> dict[str, Any]:
    """A child of the comparison without the price of a new process."""
    child = trl_side_by_side.child_arguments(arguments, folder, threads, **changed)
    return trl_side_by_side.run_sides(trl_side_by_side.parse(child))


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["base", "ragged"])
def test_side_by_side_reports_the_same_work(
    workload: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(trl_side_by_side, "in_child", in_process)
    memory = iter(
        [(1.0, 1.0), (1.0, 5.0)] * 3
    )  # the peak of a shared process says nothing: before the steps, after them
    monkeypatch.setattr(trl_side_by_side, "memory_mib", lambda device: next(memory))
    trl_side_by_side.main(["--workload", workload, *TINY, "--dtype", "float32"])
    result = last_line(capsys)
    assert result["workload"] == workload
    keys = {"ratio_wall", "ratio_cpu", "tokens_per_s_ours", "tokens_per_s_trl", "peak_rss_ratio", "stages"}
    assert keys <= set(result)
    sampled = result["sampled_tokens"]["1"]
    if workload == "base":
        assert sampled["ours"] == sampled["trl"] == 2 * 4 * 8 * 8
    else:
        assert 0 < sampled["trl"] < 2 * 4 * 8 * 8
        assert 0 < sampled["ours"] < 2 * 4 * 8 * 8
    assert result["ratio_cpu"]["1"]["min"] > 0
    assert result["peak_rss"]["ours_above_start_mib"] == 4.0


@pytest.mark.slow
def test_a_child_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    run = trl_side_by_side.in_child(TINY, tmp_path, 1, dtype="float32", only="ours", warmup=0, rounds=1)
    assert run["ours"]["tokens"] == [4 * 8 * 8]
    assert run["mib"] > 50


@pytest.mark.slow
def test_trl_is_stepped_as_its_own_train_does(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    workload = tiny("base")
    folder = model_folder(workload, tmp_path / "model")
    trained = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        side = trl_side_by_side.TRLSide(workload, folder, prompt_texts(workload, folder, 2), "float32", "cpu")
        trainer, step = side.trainer, side.trainer.training_step

        def seeded(*args: Any, step: Any = step) -> torch.Tensor:
            torch.manual_seed(1)
            loss: torch.Tensor = step(*args)
            return loss

        trainer.training_step = seeded
        if by_hand:
            side.prepare()
            side.step()
            side.step()
        else:
            trainer.train()
        trained.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert any(bool(p.any()) for p in trained[0][1::2]), "the second factors of the adapters begin at zero"
    for hand, own in zip(*trained, strict=True):
        torch.testing.assert_close(hand, own, rtol=0, atol=0)


def test_both_sides_read_the_same_prompts(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    workload = tiny("base")
    folder = model_folder(workload, tmp_path / "model")
    texts = prompt_texts(workload, folder, 1)
    trl = trl_side_by_side.TRLSide(workload, folder, texts, "float32", "cpu")
    ours = make_ours(workload, folder, texts, "float32", "cpu")
    prompts = [row["prompt"] for row in next(iter(trl.trainer.get_train_dataloader()))]
    assert prompts == [text for text in texts for _ in range(workload.group)]
    (step,) = ours.steps
    assert trl.trainer._tokenize_prompts(texts)[0] == step["prompt_ids"]
    assert {len(ids) for ids in step["prompt_ids"]} == {workload.prompt_tokens}
    theirs = {n: p.shape for n, p in trl.trainer.model.named_parameters() if p.requires_grad}
    assert theirs == {n: p.shape for n, p in ours.policy.model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_conductor_overhead_counts_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    conductor_overhead.main(TINY)
    result = last_line(capsys)
    assert result["extra_forwards"] == 0
    assert result["tokens"]["conductor"] == result["tokens"]["equal"] == 2 * 3 * 4 * 8 * 8
    assert {"overhead_pct", "extra_decode_calls", "conductor_share_pct"} <= set(result)
    assert result["conductor_share_pct"]["median"] > result["equal_share_pct"]["median"]
    assert result["alone"]["d=576"]["parameters"] == 576 * 5 + 5 + 1
    assert set(result["alone"]["d=4096"]) == {"parameters", "weigh_ms", "update_ms"}


def test_the_growth_of_the_conductors_cost(capsys: pytest.CaptureFixture[str]) -> None:
    conductor_overhead.main(["--grid", "--quick"])
    result = last_line(capsys)
    assert {(row["d"], row["K"], row["B"]) for row in result["weigh"]} == {(576, 2, 16)}
    assert [(row["shared"], row["W"]) for row in result["fit"]] == [(1, 32), (1, 64), (8, 32), (8, 64)]
    assert {row["form"] for row in result["fit"]} == {"kernel"}
    assert all(row["ms"] > 0 for row in result["fit"])
    numbers = (
        576 * 4 + 2 * 4 + 4 + 2 * 4 + 2 + 8 + 8
    )  # bytes of a remembered response: h, z, value, credit, mask, group, step
    assert result["fit"][1]["remembered_mib"] == round(64 * numbers / 2**20, 2)
    assert growth({"W": 10, "ms": 1.0}, {"W": 100, "ms": 1000.0}) == 3.0


def test_limit_gives_the_ratio_of_step_and_parts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    limit.main([*TINY, "--out", str(tmp_path / "limit.json")])
    result = last_line(capsys)
    assert result == json.loads((tmp_path / "limit.json").read_text(encoding="utf-8"))
    assert result["ratio"] > 0
    assert result["tokens"]["step"] == result["tokens"]["parts"] == 2 * 4 * 8 * 8


@pytest.mark.slow
def test_levers_are_switched_off_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    levers.main([*TINY, "--dtype", "float32"])
    result = last_line(capsys)
    assert set(result["cost_decode"]) == set(result["cost_update"]) == set(levers.WAYS) - {"all"}
    assert all(found["min"] > 0 for found in result["cost_decode"].values())


def test_a_missing_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAESTRO_SMOLLM2", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"No model in .*nowhere: give the folder"):
        trl_side_by_side.main(["--workload", "smollm2"])
