"""``rollouts.jsonl`` says all that went into a scalar reward and an advantage: both are computed again from it alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.records import ResponseRecorder
from callbacks.rewards import FunctionReward
from maestro_pl import KL, Advantages, Anchoring, Meta
from maestro_pl.algorithm.advantages import Weighed, advantages_of, apply_gate, normalize_rewards, scalarise
from maestro_pl.conductor import AnchorSignal, GradientLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import FixedWeights
from maestro_pl.data import PromptDataModule
from tests.support import elevens, module_of, rewards, sevens, trainer_of


def thirds(completion: str, **_: Any) -> float:
    return (sum(map(ord, completion)) % 4) / 3


def halves(completion: str, **_: Any) -> float:
    return float(len(completion) % 2)


def some(completion: str, **_: Any) -> float | None:
    return None if sum(map(ord, completion)) % 3 == 0 else sevens(completion)


def of(function: Any, **options: Any) -> FunctionReward:
    return FunctionReward(function=function, **options)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(12)))
    return path


def recorded(folder: Path, model: Path, prompts: Path, chain: list[Any], **options: Any) -> list[list[dict[str, Any]]]:
    """The lines of two steps of training, by step."""
    recorder = ResponseRecorder(every_n_steps=1)
    trainer = trainer_of(folder, [*chain, recorder], max_steps=2, limit_val_batches=0)
    trainer.fit(module_of(model, **options), PromptDataModule(sources=str(prompts), batch_size=3, show=False))
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    steps = sorted({row["step"] for row in rows})
    return [[row for row in rows if row["step"] == step] for step in steps]


def tensor(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)


def weighed_of(rows: list[dict[str, Any]]) -> Weighed:
    names = list(rows[0]["weights"])
    rewards_BK = torch.stack([tensor([row["normalized"].get(name) for row in rows]) for name in names], dim=1)
    weights_BK = torch.stack([tensor([row["weights"][name] for row in rows]) for name in names], dim=1)
    return Weighed(rewards_BK.nan_to_num(), weights_BK, ~rewards_BK.isnan())


def recomputed_scalar(rows: list[dict[str, Any]], size: int) -> Tensor:
    scalar_B = scalarise(*weighed_of(rows)[:3])
    anchored = torch.tensor(["anchor" in row for row in rows])
    if bool(anchored.any()):
        share = next(row["anchor"]["share"] for row in rows if "anchor" in row)
        value_B = tensor([row["anchor"]["value"] if "anchor" in row else None for row in rows])
        z_B = normalize_rewards(scalar_B.nan_to_num(), ~scalar_B.isnan(), size, "zscore")
        scalar_B = torch.where(anchored, (1.0 - share) * z_B + share * value_B, scalar_B)
    for name in rows[0].get("gates", {}):
        scalar_B = apply_gate(scalar_B, tensor([row["gates"][name] for row in rows]), size)
    scalar_B[torch.tensor([row.get("skipped", False) for row in rows])] = math.nan
    return scalar_B - tensor([row.get("kl", 0.0) for row in rows])


def recomputed_advantage(rows: list[dict[str, Any]], scalar_B: Tensor, size: int) -> Tensor:
    by, first = rows[0]["advantage_by"], rows[0]
    own_scale = by not in ("group", "batch", "none")
    settings = Advantages(
        aggregation=by if own_scale else "sum_then_normalize",
        scale="group" if own_scale else by,
        min_consensus=first.get("min_consensus", 0.0),
        consensus_scale=first.get("consensus_scale", False),
    )
    told_B = torch.tensor(["anchor" in row for row in rows])
    closed_B = torch.tensor([min(row.get("gates", {}).values(), default=1.0) < 1 for row in rows])
    parts = weighed_of(rows)._replace(kept_B=told_B | closed_B)
    gain_B = tensor([row.get("gain", 1.0) for row in rows])
    return gain_B * advantages_of(scalar_B, size, settings, parts)


def anchored(**anchoring: Any) -> dict[str, Any]:
    meta = Meta(signal=AnchorSignal(), learner=GradientLearner(), warmup=1)
    return {"weigher": Conductor(action="soft"), "meta": meta, "anchoring": Anchoring(fraction=0.5, **anchoring)}


class Doubled(FixedWeights):
    """A weigher that also has a word on the size of the advantages."""

    gain = 2.0


CONFIGS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "z-scores and ranks": (rewards(), {}),
    "weights of the group": (rewards(), {"advantages": Advantages(scope="group", scale="none")}),
    "two gates": (
        rewards(of(thirds, name="thirds", role="gate"), of(halves, name="halves", role="gate")),
        {"advantages": Advantages(scale="batch")},
    ),
    "hybrid with an anchor on half of the groups": (
        rewards(of(some, name="gold", role="anchor"), of(halves, name="halves", role="gate")),
        anchored(hybrid=0.3),
    ),
    "labels alone": (
        rewards(of(some, name="gold", role="anchor")),
        anchored(hybrid=1.0, unlabelled="skipped"),
    ),
    "rewards that do not apply": (
        [of(some, name="some", normalize="zscore"), of(some, name="too"), of(lambda completion: None, name="never")],
        {},
    ),
    "gdpo": (
        [of(some, name="some"), of(elevens, name="elevens", tasks=["a"])],
        {"advantages": Advantages(aggregation="normalize_then_sum")},
    ),
    "mo_grpo": (rewards(), {"advantages": Advantages(aggregation="mo_grpo")}),
    "dvao, and responses without consensus": (
        [of(some, name="some"), of(elevens, name="elevens"), of(thirds, name="open", role="gate")],
        {
            "advantages": Advantages(aggregation="dvao", min_consensus=0.5, consensus_scale=True),
            "weigher": Doubled({"some": 1.0, "elevens": 2.0}),
        },
    ),
    "shrunk where nothing but rewards is known": (
        [
            of(thirds, name="thirds", normalize="zscore"),
            of(elevens, name="elevens", normalize="zscore"),
            of(halves, name="halves", role="gate"),
            of(some, name="gold", role="anchor"),
        ],
        {
            "weigher": Conductor(action="soft", context="prompt", norm="center"),
            "meta": Meta(signal=AnchorSignal(), learner="ridge", warmup=1, every=1),
            "anchoring": Anchoring(fraction=0.5, shrink=True, hybrid=0.3),
            "advantages": Advantages(min_consensus=0.5),
        },
    ),
    "a penalty in the reward": (rewards(), {"kl": KL(coef=0.1, place="reward")}),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*applied to 0:UserWarning")
def test_scalar_and_advantage_are_computed_again_from_the_file(
    name: str, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    chain, options = CONFIGS[name]
    options = {**options, "weigher": options.get("weigher", Conductor())}
    steps = recorded(tmp_path, tiny_qwen3, prompts, chain, **options)
    assert [len(rows) for rows in steps][-2:] == [12, 12]
    for rows in steps:
        size = sum(row["group"] == 0 for row in rows)
        assert [row["group"] for row in rows] == [n for n in range(3) for _ in range(size)]
        scalar_B = recomputed_scalar(rows, size)
        assert torch.equal(scalar_B.nan_to_num(-99.0), tensor([row["reward"] for row in rows]).nan_to_num(-99.0))
        advantages_B = recomputed_advantage(rows, scalar_B, size)
        assert torch.equal(advantages_B, tensor([row["advantage"] for row in rows]))
    last = steps[-1]
    held = {key for row in last for key in row}
    assert ("gates" in held) == any(reward.role == "gate" for reward in chain)
    assert ("anchor" in held) == ("anchoring" in options)
    assert ("skipped" in held) == (name == "labels alone")
    assert ("kl" in held) == ("kl" in options)
    assert ("gain" in held) == name.startswith(("dvao", "shrunk"))
    assert {"min_consensus", "consensus_scale"} <= held or not name.startswith("dvao")
    if name != "labels alone":
        assert any(row["advantage"] for row in last)  # there is something to compute


def test_the_sum_by_hand(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    chain = [of(sevens, name="sevens", normalize="zscore"), of(thirds, name="open", role="gate")]
    chain.insert(1, of(elevens, name="elevens"))
    weigher = FixedWeights({"sevens": 0.75, "elevens": 0.25})
    (rows, _) = recorded(tmp_path, tiny_qwen3, prompts, chain, weigher=weigher)
    group = [row for row in rows if row["group"] == 1]
    raw = [row["rewards"]["sevens"] for row in group]
    for row in group:
        z = (row["rewards"]["sevens"] - mean(raw)) / stdev(raw) if len(set(raw)) > 1 else 0.0
        assert row["normalized"] == pytest.approx({"sevens": z, "elevens": row["rewards"]["elevens"]}, abs=1e-5)
    sums = [0.75 * row["normalized"]["sevens"] + 0.25 * row["normalized"]["elevens"] for row in group]
    floor = min(0.0, *sums)
    expected = [g * r + (1 - g) * floor for r, g in zip(sums, (row["gates"]["open"] for row in group), strict=True)]
    assert [row["reward"] for row in group] == pytest.approx(expected, abs=1e-5)
