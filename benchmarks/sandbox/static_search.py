"""Experiment 2: does any static vector, tuned exhaustively, do what the Conductor does, and what does the search cost?

Two searches. One vector for all families, and one for each family: both rank all 1,001 vectors of the grid by the
tilted distribution of sampled responses (``python -m benchmarks.sandbox.build.search``), and then train with the best
candidates on seeds that the comparison does not use. The winners of that are compared with the Conductor on the
comparison's seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.sandbox.build.scoring import sample_and_score
from benchmarks.sandbox.build.search import search
from benchmarks.sandbox.cells import Cell, Protocol, Weights
from benchmarks.sandbox.methods import anchored, references, seeded
from benchmarks.sandbox.runner import run_all
from benchmarks.sandbox.statistics import by_method, mean_interval, share
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rewards.preference import load_pair_scorer
from maestro_pl.sandbox import TASKS, policy_path, preference_path, rows

BETAS = (1.0, 2.0, 4.0)  # strengths of the tilt: how far training will go is not known before it
PROMPTS, RESPONSES = 32, 64  # of each family that the grid is ranked on, and to each of them
TUNING_SEEDS = (200,)
Candidates = list[tuple[dict[str, float], Weights]]  # one vector for all families, and one a family


def grid_search(folder: Path, prompts: int = PROMPTS, responses: int = RESPONSES) -> dict[str, Any]:
    """Rank the whole grid at every strength of the tilt; kept in ``<folder>/search_<prompts>x<responses>.json``."""
    path = folder / f"search_{prompts}x{responses}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    policy = LoRAPolicy(str(policy_path()), dtype="float32", lora=None)
    preference = load_pair_scorer(str(preference_path()), dtype="float32", batch_size=64)
    scored = sample_and_score(policy, preference, rows("train", n_per_task=prompts, seed=0), responses, 0)
    found: dict[str, Any] = {
        "vectors": 1001,
        "responses": len(scored.responses),
        "tokens": int(scored.lengths_B.sum()),
        "rankings": {str(beta): search(scored, "zscore", 10, beta) for beta in BETAS},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def candidates(found: dict[str, Any]) -> Candidates:
    """The best vectors at every strength."""
    return [
        (ranking["one_for_all_weights"], {task: row["best_weights"] for task, row in ranking["tasks"].items()})
        for ranking in found["rankings"].values()
    ]


def tuning_cells(protocol: Protocol, tried: Candidates) -> list[Cell]:
    """Runs of the search: every candidate on the tuning seeds."""
    made = [Cell(f"tune all {i}", 0, protocol, weigher="static", weights={"all": w}) for i, (w, _) in enumerate(tried)]
    made += [Cell(f"tune task {i}", 0, protocol, weigher="static", weights=w) for i, (_, w) in enumerate(tried)]
    return [replace(cell, seed=seed) for cell in made for seed in TUNING_SEEDS]


def tuned(results: Sequence[dict[str, Any]], tried: Candidates, protocol: Protocol) -> list[Cell]:
    """The winners of the tuning runs, as cells of the comparison; each family's winner is chosen for itself."""
    scores = by_method(results)
    best_all = max(range(len(tried)), key=lambda i: sum(scores[f"tune all {i}"]))
    per_task = {}
    for task in TASKS:
        own = by_method(results, task)
        per_task[task] = tried[max(range(len(tried)), key=lambda i: sum(own[f"tune task {i}"]))][1][task]
    return [
        Cell("one vector, tuned", 0, protocol, weigher="static", weights={"all": tried[best_all][0]}),
        Cell("one a family, tuned", 0, protocol, weigher="static", weights=per_task),
    ]


def run(protocol: Protocol, seeds: list[int], folder: Path, jobs: int, quick: bool) -> list[dict[str, Any]]:
    """Search, tune, compare."""
    found = grid_search(folder, 2, 8) if quick else grid_search(folder)
    tried = candidates(found)
    path = folder / "runs.jsonl"
    tuning = run_all(tuning_cells(protocol, tried[:1] if quick else tried), path, jobs)
    compared = [*references(protocol), anchored("anchor 0.0625", protocol)]
    compared += tuned(tuning, tried[:1] if quick else tried, protocol)
    results = run_all(seeded(compared, seeds), path, jobs)
    return [
        {**entry, "search": {k: found[k] for k in ("vectors", "responses", "tokens")}} for entry in [*tuning, *results]
    ]


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Utilities, shares and what every method cost, its search included."""
    compared = [entry for entry in results if not entry["name"].startswith("tune ")]
    tuning = [entry for entry in results if entry["name"].startswith("tune ")]
    overall = by_method(compared)
    protocol, searched = results[0]["cell"]["protocol"], results[0]["search"]
    tested = protocol["eval_prompts"] * protocol["eval_group"] * len(TASKS)
    cost = {
        "vectors ranked": searched["vectors"],
        "responses sampled and labelled for the ranking": searched["responses"],
        "tokens sampled for the ranking": searched["tokens"],
        "training runs": len(tuning),
        "tokens sampled in them": sum(entry["tokens"] for entry in tuning),
        "responses labelled to choose among them": len(tuning) * tested,
    }
    methods = {}
    for name, values in overall.items():
        own = [entry for entry in compared if entry["name"] == name]
        methods[name] = {
            "utility": mean_interval(values),
            **share(overall, name),
            "tasks": {task: mean_interval(by_method(compared, task)[name]) for task in TASKS},
            "labelled_groups": own[0]["labelled_groups"],
            "tokens": round(sum(entry["tokens"] for entry in own) / len(own)),
            "weights": own[0]["cell"]["weights"],
        }
    others = [name for name in methods if name not in ("equal", "anchor 0.0625")]
    differences = {
        f"anchor 0.0625 - {name}": share(overall, "anchor 0.0625", other=name)
        for name in others
        if "anchor 0.0625" in overall
    }
    return {"seeds": len(overall["equal"]), "search": cost, "methods": methods, "differences": differences}


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "| method | utility | share of the oracle's gain | " + " | ".join(TASKS) + " |",
        "|---|---|---|" + "---|" * len(TASKS),
    ]
    for name, row in summary["methods"].items():
        tasks = " | ".join(f"{row['tasks'][task]['mean']:.3f}" for task in TASKS)
        lines.append(
            f"| {name} | {row['utility']['mean']:.3f} | {row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | {tasks} |"
        )
    lines += ["", "| difference | of shares |", "|---|---|"]
    lines += [
        f"| {name} | {row['share']:+.2f} [{row['low']:.2f}, {row['high']:.2f}] |"
        for name, row in summary["differences"].items()
    ]
    lines += ["", "| the search | |", "|---|---|", *(f"| {k} | {v:,} |" for k, v in summary["search"].items())]
    return "\n".join(lines)
