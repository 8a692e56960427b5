"""Experiment 1: does the Conductor find weights that are known to be best, and what does it need for that?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sandbox.cells import Protocol
from benchmarks.sandbox.methods import known_optimum, seeded
from benchmarks.sandbox.runner import run_all
from benchmarks.sandbox.statistics import by_method, mean_interval, share
from maestro_pl.sandbox import TASKS

#: The comparisons that the experiment was made for: a method, the one it is held against, and the families in one row.
COMPARED = (
    ("anchor 0.0625", "anchor 0.0625 no context"),
    ("anchor 0.0625", "labels 0.0625"),
    ("anchor 0.02", "labels 0.02"),
    ("hybrid 0.0625", "labels 0.0625"),
    ("hybrid 0.02", "labels 0.02"),
    ("hybrid 0.0625", "anchor 0.0625"),
    ("anchor 0.0625", "one static vector"),
    ("anchor 0.0625", "paper"),
    ("lookahead 0.0625", "anchor 0.0625"),
    ("anchor 0.0625", "oracle"),
)


def run(
    protocol: Protocol, seeds: list[int], folder: Path, jobs: int, quick: bool, methods: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Every method with every seed, or the chosen methods beside equal and oracle; the first four where it must be quick.

    Raises:
        ValueError: a chosen method does not exist; the sentence lists those that do.
    """
    cells = known_optimum(protocol)
    if methods is not None:
        unknown = sorted(set(methods) - {cell.name for cell in cells})
        if unknown:
            raise ValueError(f"no method {unknown}; known_optimum has {[cell.name for cell in cells]}")
        cells = [cell for cell in cells if cell.name in ("equal", "oracle", *methods)]
    return run_all(seeded(cells[:4] if quick else cells, seeds), folder / "runs.jsonl", jobs)


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Utilities, shares of the oracle's gain with intervals, and the comparisons."""
    overall = by_method(results)
    tables = {task: by_method(results, task) for task in TASKS}
    methods = {}
    for name, values in overall.items():
        own = [entry for entry in results if entry["name"] == name]
        methods[name] = {
            "utility": mean_interval(values),
            **share(overall, name),
            "tasks": {task: mean_interval(table[name]) for task, table in tables.items()},
            "below_equal": {
                task: mean_interval([a - b for a, b in zip(table[name], table["equal"], strict=True)])
                for task, table in tables.items()
            },
            "labelled_groups": own[0]["labelled_groups"],
            "groups": own[0]["groups"],
            "tokens": round(sum(entry["tokens"] for entry in own) / len(own)),
        }
    differences = {
        f"{first} - {second}": share(overall, first, other=second)
        for first, second in COMPARED
        if first in overall and second in overall
    }
    return {"seeds": len(overall["equal"]), "methods": methods, "differences": differences}


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        "| method | labelled groups | utility | share of the oracle's gain | " + " | ".join(TASKS) + " |",
        "|---|---|---|---|" + "---|" * len(TASKS),
    ]
    for name, row in summary["methods"].items():
        tasks = " | ".join(f"{row['tasks'][task]['mean']:.3f}" for task in TASKS)
        lines.append(
            f"| {name} | {row['labelled_groups'] or '-'} | {row['utility']['mean']:.3f} | "
            f"{row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | {tasks} |"
        )
    lines += ["", "| difference | of shares |", "|---|---|"]
    for name, row in summary["differences"].items():
        lines.append(f"| {name} | {row['share']:+.2f} [{row['low']:.2f}, {row['high']:.2f}] |")
    return "\n".join(lines)
