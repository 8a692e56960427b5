"""Experiment 3: what the anchored Conductor is sensitive to, and what it does on families and wordings it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.sandbox.cells import Cell, Protocol
from benchmarks.sandbox.methods import anchored, references, seeded
from benchmarks.sandbox.runner import run_all
from benchmarks.sandbox.statistics import by_method, mean_interval, share
from maestro_pl.advantages import normalize_rewards
from maestro_pl.policy import LoRAPolicy
from maestro_pl.rewards.preference import load_pair_scorer
from maestro_pl.sandbox import TASKS, policy_path, preference_path, rows
from maestro_pl.sandbox.scoring import REWARDS, sample_and_score
from maestro_pl.sandbox.search import simplex_grid, tilted_utility

BASE = "base"
BETA = 2.0


def variants(protocol: Protocol) -> list[Cell]:
    """The base and one change of it each."""
    by_gradient: dict[str, Any] = {"learner": "gradient", "learner_args": {"fits": 10, "replay": 100}}
    few, many = replace(protocol, group=4, batch=16), replace(protocol, group=16, batch=4)
    return [
        anchored(BASE, protocol, new_templates=True),
        anchored("learner: gradient, linear", protocol, **by_gradient),
        *(
            anchored(f"learner: gradient, {title}", protocol, **by_gradient, conductor={"hidden_sizes": sizes})
            for title, sizes in (("32", [32]), ("256", [256]), ("2 x 256", [256, 256]))
        ),
        anchored("target: covariance", protocol, learner_args={"target": "covariance"}),
        anchored("target: covariance, softmax", protocol, learner_args={"target": "covariance", "mapping": "softmax"},
                 conductor={"tau": 0.3}),
        anchored("forgetting: 0.95", protocol, learner_args={"forgetting": 0.95}),
        anchored("no warm-up", protocol, warmup=0),
        anchored("layer: middle", protocol, conductor={"layer": "middle"}),
        anchored("layer: first", protocol, conductor={"layer": "first"}),
        anchored("norm: rms", protocol, conductor={"norm": "rms"}),
        anchored("context: terminal", protocol, conductor={"context": "terminal"}),
        anchored("context: terminal, scope: group", protocol, conductor={"context": "terminal"}, module={"scope": "group"}),
        anchored("context: terminal, pool: mean", protocol, conductor={"context": "terminal", "pool": "mean"}),
        anchored("context: both", protocol, conductor={"context": "both"}),
        anchored("h: the task", protocol, hidden="task"),
        anchored("h: bag of words", protocol, hidden="words"),
        anchored("h: noise", protocol, hidden="noise"),
        anchored("groups of 4 (16 prompts)", few, warmup=1),
        anchored("groups of 16 (4 prompts)", many, warmup=4),
        anchored("M = 3", protocol, module={"conductor_every": 3}),
        anchored("M = 6", protocol, module={"conductor_every": 6}),
        anchored("normalize: none", protocol, normalize="none"),
        anchored("normalize: rank", protocol, normalize="rank"),
        anchored("normalize: minmax", protocol, normalize="minmax"),
    ]  # fmt: skip


def held_out_families(protocol: Protocol) -> list[Cell]:
    """The base trained on all families but one."""
    return [
        anchored(f"without {task}", protocol, tasks=tuple(other for other in TASKS if other != task)) for task in TASKS
    ]


def run(protocol: Protocol, seeds: list[int], folder: Path, jobs: int, quick: bool) -> list[dict[str, Any]]:
    """Every variant with every seed, and the families held out in turn."""
    cells = [*references(protocol), *variants(protocol), *held_out_families(protocol)]
    if quick:
        cells = [*references(protocol), variants(protocol)[0], held_out_families(protocol)[0]]
    results = run_all(seeded(cells, seeds), folder / "runs.jsonl", jobs)
    judge = StaticJudge(2, 8) if quick else StaticJudge()
    return [
        {**entry, "held_out": judge.judge(entry)} if entry["name"].startswith("without ") else entry
        for entry in results
    ]


class StaticJudge:
    """What weights are worth in a family: the share of the gain of its best vector over equal weights, by the tilt.

    Args:
        prompts: test prompts a family.
        responses: to each of them, from the untrained policy.
    """

    def __init__(self, prompts: int = 24, responses: int = 64) -> None:
        policy = LoRAPolicy(str(policy_path()), dtype="float32", lora=None)
        preference = load_pair_scorer(str(preference_path()), dtype="float32", batch_size=64)
        scored = sample_and_score(policy, preference, rows("test", n_per_task=prompts, seed=1), responses, 1)
        everywhere = torch.ones(len(scored.utility_B), dtype=torch.bool)
        columns = [
            normalize_rewards(scored.rewards_BK[:, k], everywhere, responses, "zscore") for k in range(len(REWARDS))
        ]
        self.rewards_NGK = torch.stack(columns, dim=1).view(-1, responses, len(REWARDS))
        self.utility_NG = scored.utility_B.view(-1, responses)
        self.tasks = [row["task"] for row in scored.rows]

    def utilities(self, weights_WK: torch.Tensor, task: str) -> torch.Tensor:
        """Tilted utility of each vector in the family: (W,)."""
        chosen = torch.tensor([own == task for own in self.tasks])
        scalar = torch.einsum("wk,ngk->wng", weights_WK, self.rewards_NGK[chosen])
        return tilted_utility(scalar, self.utility_NG[chosen], BETA)[0].mean(1)

    def judge(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The weights that a run gives to the family it has not seen, and their share of that family's own optimum."""
        task = entry["name"].removeprefix("without ")
        weights = [entry["test_weights"][f"{task}:{name}"] for name in REWARDS]
        grid_WK = torch.cat([simplex_grid(len(REWARDS), 10), torch.full((1, len(REWARDS)), 1 / len(REWARDS))])
        values = self.utilities(grid_WK, task)
        best, equal = float(values[:-1].max()), float(values[-1])
        own = float(self.utilities(torch.tensor([weights]), task)[0])
        return {
            "task": task,
            "weights": weights,
            "best_weights": [round(float(w), 2) for w in grid_WK[int(values[:-1].argmax())]],
            "tilted": round(own, 4),
            "share": round((own - equal) / (best - equal), 4),
        }


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the oracle's gain, differences from the base, and the two generalisations."""
    overall = by_method(results)
    methods = {
        name: {"utility": mean_interval(values), **share(overall, name), "minus_base": share(overall, name, other=BASE)}
        for name, values in overall.items()
        if not name.startswith("without ")
    }
    unseen = {}
    for name in (name for name in overall if name.startswith("without ")):
        own = [entry["held_out"] for entry in results if entry["name"] == name]
        unseen[own[0]["task"]] = {
            "share_of_its_optimum": mean_interval([row["share"] for row in own]),
            "weights": [
                round(sum(column) / len(own), 3) for column in zip(*(row["weights"] for row in own), strict=True)
            ],
            "best_weights": own[0]["best_weights"],
        }
    return {
        "seeds": len(overall[BASE]),
        "methods": methods,
        "unseen_families": unseen,
        "templates": _templates(results),
    }


def _templates(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How far the weights of the base differ between the usual wordings and new ones, and the utility under both."""
    own = [entry for entry in results if entry["name"] == BASE]
    found: dict[str, Any] = {}
    for task in TASKS:
        distances = [
            0.5
            * sum(
                abs(e["test_weights"][f"{task}:{r}"] - e["new_templates"]["test_weights"][f"{task}:{r}"])
                for r in REWARDS
            )
            for e in own
        ]
        found[task] = {
            "total_variation": mean_interval(distances),
            "utility": mean_interval([e["utility"][task] for e in own]),
            "utility_new": mean_interval([e["new_templates"]["utility"][task] for e in own]),
        }
    return found


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = ["| variant | utility | share of the oracle's gain | minus the base |", "|---|---|---|---|"]
    for name, row in summary["methods"].items():
        minus = row["minus_base"]
        lines.append(
            f"| {name} | {row['utility']['mean']:.3f} | {row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | "
            f"{minus['share']:+.2f} [{minus['low']:.2f}, {minus['high']:.2f}] |"
        )
    lines += ["", "| unseen family | share of its own optimum | weights | best weights |", "|---|---|---|---|"]
    for task, row in summary["unseen_families"].items():
        value = row["share_of_its_optimum"]
        lines.append(
            f"| {task} | {value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}] | {row['weights']} | {row['best_weights']} |"
        )
    lines += ["", "| family | weights moved by new wordings | utility | with new wordings |", "|---|---|---|---|"]
    for task, row in summary["templates"].items():
        lines.append(
            f"| {task} | {row['total_variation']['mean']:.3f} | {row['utility']['mean']:.3f} | {row['utility_new']['mean']:.3f} |"
        )
    return "\n".join(lines)
