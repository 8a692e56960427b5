"""Operations and bytes of a step: counted by hand, by formula and by watching a model agree."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost
from benchmarks.cost import Card, Run, Shape, Stage, stages_of
from benchmarks.roofline import Counting, Pool, Round, Stages, bandwidth_of, counts_of, one_round, result_of
from benchmarks.workloads import Workload
from maestro_pl.memory.workload import model_config
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from tests.support.models import make_model

QWEN3_8B = Shape(36, 4096, 32, 8, 128, 12288, 151936, False)
# one layer of two heads: d = 4, MLP of 8, V = 10
SMALL = Shape(layers=1, hidden=4, heads=2, key_heads=1, head_size=2, intermediate=8, vocabulary=10, tied=True)
BODY = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8


def test_parameters_are_those_that_the_published_config_gives() -> None:
    shape = cost.shape_of(model_config("Qwen/Qwen3-8B"))
    assert shape == QWEN3_8B
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288
    assert shape.parameters == 36 * layer + 2 * 151936 * 4096
    assert shape.cached == 2 * 36 * 8 * 128
    sums = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288)
    assert shape.adapters(16) == 36 * 16 * sums


def test_stages_by_hand() -> None:
    run = Run(SMALL, prompts=1, group=2, prompt_tokens=3, new_tokens=2, rank=1)
    stages = stages_of(run)
    adapters = 8 + 2 * 6 + 8 + 3 * 12
    assert (SMALL.body, SMALL.head, run.adapters, run.tokens) == (BODY, 40, adapters, 7)
    pair = 2 * 2 * 2 * 2  # two products, two heads of two numbers, an addition and a multiplication
    causal = 6 + 2 * (2 * 3 + 3)  # of the prompt; of two responses that also see the prompt
    assert stages["prompt"].flops == 2 * (BODY + adapters) * 3 + 2 * 40 + pair * 6
    assert stages["decoding"].flops == 2 * (2 * (BODY + adapters + 40) + pair * 4)
    assert stages["forward"].flops == 2 * (BODY + adapters) * 7 + pair * causal + 2 * (2 * 40 * 4)
    assert stages["backward"].flops == 2 * (BODY + 2 * adapters) * 7 + 2.5 * pair * causal
    # a step of decoding: layers, adapters and head, and keys of 3 + 1 tokens copied to both rows, two bytes a number
    assert stages["decoding"].moved == 2 * (BODY + adapters + 40) + 2 * 4 * (2 * 3 + 2 * 1)
    assert stages["optimizer"].moved == 28 * adapters


def test_all_parameters_are_gathered_and_their_gradients_sent() -> None:
    run = Run(SMALL, prompts=1, group=2, prompt_tokens=3, new_tokens=2, rank=None, scorings=1, cards=4, per_machine=2)
    stages, numbers = stages_of(run), BODY + 40
    assert run.trained == numbers
    assert stages["forward"].sent == stages["scoring"].sent == numbers * 2 / 2
    assert stages["backward"].sent == numbers * 2 / 2 + 2 * numbers / 2 * 2
    assert stages["backward"].networked == 2 * (1 / 2) * 4 * numbers / 2
    assert stages["optimizer"].moved == 28 * numbers / 2
    once = stages_of(replace(run, checkpointing=True))["backward"].flops - stages["backward"].flops
    assert once == 2 * BODY * 7 + 2 * 2 * 2 * 2 * (6 + 2 * 9)


def test_quantised_weights_are_read_packed_and_moved_unpacked() -> None:
    run = Run(SMALL, rank=None, quantized=True)
    assert run.weights_read == BODY * (0.5 + 1 / 64 + 4 / (64 * 256) + 2 + 2)


def test_the_longest_bound_counts() -> None:
    card = Card("c", flops=100.0, memory=10.0, link=5.0, launch=1.0)
    stage = Stage("s", 1, flops=200.0, moved=50.0, sent=15.0, asked=2.0)
    assert stage.bounds(card) == {"products": 2.0, "memory": 5.0, "link": 3.0, "network": 0.0, "host": 2.0}
    assert (stage.seconds(card), stage.limit(card)) == (5.0, "memory")
    assert stage.seconds(card.at(0.1, 1.0)) == 20.0


def test_the_cases_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    cost.main([])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    decoding = found["all parameters, 8 x 80 GB"]["stages"]["decoding"]
    assert decoding["tokens"] == 8 * 8 * 1023
    assert found["64 machines"]["32"]["sync"] == QWEN3_8B.parameters * 2 / 50e9
    cost.main(["--card", "a100", "--rank", "0", "--prompts", "2", "--shares", "0.5", "0.5"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["a100"]["run"]["rank"] is None


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    folder = make_model("qwen3", tmp_path_factory.mktemp("model"), tie_word_embeddings=True)
    torch.manual_seed(0)
    policy = LoRAPolicy(str(folder), dtype="float32", lora=LoRA(2, 4, target_modules="all-linear"))
    return Stages(policy, [list(range(20)), list(range(30, 50))], group=3, new_tokens=4)


def test_a_forward_is_two_operations_a_parameter_and_token_and_its_attention(stages: Stages) -> None:
    """All counts by hand; the products' sum is also that of torch's own counter."""
    shape = cost.shape_of(stages.policy.base_model.config)
    linear = 2 * (32 * 32 + 32 * 16 * 2 + 32 * 32 + 3 * 32 * 64)
    adapters = 2 * 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert (shape.body, shape.adapters(2)) == (linear, adapters)
    with Counting(list(stages.policy.parameters())) as counting, torch.no_grad():
        stages.policy.token_statistics(stages.rows, stages.responses)
    tokens, sampled = 2 * 20 + 6 * 4, 6 * 4
    # prompts causal; a response's queries meet all 24 keys, under a mask: what it hides is multiplied all the same
    pairs = 2 * 20 * 21 / 2 + 6 * 4 * 24
    by_hand = 2 * (linear + adapters) * tokens + 2 * 264 * 32 * sampled + 4 * 2 * 32 * pairs
    assert counting.counts.total("flops") == by_hand
    products = sum(
        p.flops * p.count for p in counting.counts.products.values() if "dot_product" not in p.function.name()
    )
    with FlopCounterMode(display=False) as theirs, torch.no_grad():
        stages.policy.token_statistics(stages.rows, stages.responses)
    ours = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"}
    assert products == sum(n for name, n in theirs.get_flop_counts()["Global"].items() if str(name) in ours)
    assert counting.counts.total("weights") == 4 * (linear + adapters + 264 * 32)


def test_the_formulas_hold_for_every_stage(stages: Stages) -> None:
    shape = cost.shape_of(stages.policy.base_model.config)
    predicted = stages_of(Run(shape, 2, 3, 20, 4, rank=2, weight_bytes=4, scorings=1))
    found = counts_of(stages)
    for name in ("prompt", "decoding", "scoring", "forward", "backward"):
        assert found[name].total("flops") == pytest.approx(predicted[name].flops, rel=0.12)
    assert found["decoding"].operations > 0


def test_a_round_bounds_every_stage(stages: Stages) -> None:
    counts = counts_of(stages)
    products = {key: product for stage in counts.values() for key, product in stage.products.items()}
    pool = Pool(list(products.values()), "cpu")
    done = one_round(stages, pool, products, torch.rand(20_000), 64)
    options = argparse.Namespace(workload="base", device="cpu", dtype="float32", threads=1)
    result: dict[str, Any] = result_of(options, Workload("base", new_tokens=4, rank=2, group=3), stages, counts, [done])
    assert {"prompt", "decoding", "scoring", "forward", "backward", "head and loss", "update"} == set(result["stages"])
    for stage in result["stages"].values():
        assert stage["seconds"]["median"] > 0
        assert stage["bare_seconds"]["median"] > 0
        assert stage["over_bare"]["median"] > 1  # a tiny model: nearly all is what lies between the products
    assert set(cost.check(result)) == {"prompt", "decoding", "scoring", "forward", "backward"}


def test_a_product_is_not_faster_than_its_weights_are_read(stages: Stages) -> None:
    counts = counts_of(stages)["forward"]
    bare = dict.fromkeys(counts.products, 1e-9)
    slow = Round({}, bare, peak_flops=1e30, bandwidth=100.0)
    without = sum(p.count * 1e-9 for p in counts.products.values() if not p.read)
    assert slow.bound(counts, bare=True) == pytest.approx(counts.total("read") / 100.0 + without)
    fast = Round({}, bare, peak_flops=1e3, bandwidth=1e30)
    assert fast.bound(counts, bare=False) == pytest.approx(counts.total("flops") / 1e3)
    assert bandwidth_of(torch.rand(2048), "cpu") > 0


def test_a_check_holds_measured_seconds_against_the_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"prompts": 1, "group": 2, "prompt_tokens": 3, "new_tokens": 2, "rank": 1, "weight_bytes": 4}
    flops = stages_of(Run(SMALL, **run))["forward"].flops
    result = {
        "workload": "w",
        "shape": asdict(SMALL),
        "run": run,
        "peak_flops": {"median": 100.0},
        "bandwidth": {"median": 1e12},
        "stages": {"forward": {"seconds": {"median": 3 * flops / 100}, "flops": 2 * flops}},
    }
    file = tmp_path / "r.json"
    file.write_text(json.dumps(result))
    cost.main(["--check", str(file)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"w": {"seconds": {"forward": pytest.approx(3.0)}, "flops": {"forward": 2.0}}}
