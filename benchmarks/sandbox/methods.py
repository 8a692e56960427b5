"""The methods that the experiments compare, each as a cell."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from benchmarks.sandbox.build.scoring import REWARDS
from benchmarks.sandbox.build.search import STATIC_WEIGHTS
from benchmarks.sandbox.cells import Cell, Protocol, Weights

#: The Conductor that reads the prompt's last state, fitted in closed form on labelled groups.
ANCHORED: dict[str, Any] = {
    "weigher": "conductor",
    "conductor": {"action": "soft", "context": "prompt", "norm": "center"},
    "signal": "anchor",
    "learner": "ridge",
    "module": {"meta": {"every": 1}},
    "labels": 0.0625,
    "noise": 1.0,
    "warmup": 3,
}


def searched() -> dict[str, Any]:
    """What `python -m benchmarks.sandbox.build.search` found."""
    found: dict[str, Any] = json.loads(STATIC_WEIGHTS.read_text(encoding="utf-8"))
    return found


def oracle_weights() -> Weights:
    """The best static weights of each family."""
    return {task: row["best_weights"] for task, row in searched()["tasks"].items()}


def anchored(name: str, protocol: Protocol, **changes: Any) -> Cell:
    """The anchored Conductor; ``conductor``, ``module`` and ``learner_args`` are merged into its own."""
    merged = {key: {**ANCHORED.get(key, {}), **value} for key, value in changes.items() if isinstance(value, dict)}
    return Cell(name, 0, protocol, **{**ANCHORED, **changes, **merged})


def references(protocol: Protocol) -> list[Cell]:
    """Equal weights and the oracle, between which every score lies."""
    return [Cell("equal", 0, protocol), Cell("oracle", 0, protocol, weigher="static", weights=oracle_weights())]


def labels_alone(name: str, protocol: Protocol, labels: float, noise: float = 1.0) -> Cell:
    """The anchor's labels as the reward of the labelled groups; the others train nothing."""
    return Cell(
        name, 0, protocol, labels=labels, noise=noise, module={"anchoring": {"hybrid": 1.0, "unlabelled": "skipped"}}
    )


def known_optimum(protocol: Protocol) -> list[Cell]:
    """Everything that the first experiment compares."""
    single = {"all": searched()["one_for_all_weights"]}
    return [
        *references(protocol),
        anchored("anchor 0.0625", protocol),
        labels_alone("labels 0.0625", protocol, 0.0625),
        anchored("anchor 0.0625 no context", protocol, conductor={"reads": "nothing"}),
        anchored("anchor 0.02", protocol, labels=0.02, warmup=1),
        labels_alone("labels 0.02", protocol, 0.02),
        anchored("hybrid 0.0625", protocol, module={"anchoring": {"hybrid": 0.5}}),
        anchored("hybrid 0.02", protocol, labels=0.02, warmup=1, module={"anchoring": {"hybrid": 0.5}}),
        Cell("paper", 0, protocol, weigher="conductor", conductor={"action": "mix"}),
        Cell("random", 0, protocol, weigher="random"),
        Cell("one static vector", 0, protocol, weigher="static", weights=single),
        Cell("GDPO", 0, protocol, module={"advantages": {"aggregation": "normalize_then_sum"}}),
        Cell("MO-GRPO", 0, protocol, module={"advantages": {"scale": "none"}}),
        anchored("anchor 0.25", protocol, labels=0.25),
        anchored("anchor 1", protocol, labels=1.0),
        anchored("anchor 0.0625, noise 0", protocol, noise=0.0),
        anchored("anchor 0.0625, noise 2", protocol, noise=2.0),
        anchored("lookahead 0.0625", protocol, signal="lookahead"),
    ]


def seeded(cells: list[Cell], seeds: list[int]) -> list[Cell]:
    """Every cell with every seed, seed by seed, so that a stopped experiment has whole seeds."""
    return [replace(cell, seed=seed) for seed in seeds for cell in cells]


__all__ = ["ANCHORED", "REWARDS", "anchored", "known_optimum", "labels_alone", "oracle_weights", "references", "seeded"]
