"""Trained: a context that does not drift, labels by choice, and what happens where nothing is known or nothing helps.

    python -m benchmarks.sandbox.trust --part context --seeds 15 --first-seed 1 --jobs 2
    python -m benchmarks.sandbox.trust --part choices --seeds 10 --first-seed 1 --jobs 2
    python -m benchmarks.sandbox.trust --part against --seeds 10 --first-seed 1 --jobs 2
    python -m benchmarks.sandbox.trust --part unseen --seeds 5 --first-seed 1 --jobs 2
    python -m benchmarks.sandbox.trust --part choices --known benchmarks/results/sandbox_trust_runs.json   # go on from these

Every run is kept in ``<folder>/runs.jsonl``, seed by seed, so that a stopped experiment goes on where it was and parts
share runs. After each seed a row a run is in ``benchmarks/results/sandbox_trust_<part>.csv``; the table is printed as
Markdown. ``--quick`` runs a few steps. The protocol (seeds, 60 steps, labels, score) is fixed here before a run.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.sandbox.cells import Cell, Protocol
from benchmarks.sandbox.methods import anchored, references, seeded
from benchmarks.sandbox.runner import hand_on, run_all, take_over
from benchmarks.sandbox.statistics import mean_interval, share
from maestro_pl.sandbox import TASKS

RESULTS = Path(__file__).parents[1] / "results"
BELOW = 0.02  # of utility: a family below equal weights by more counts
PRIOR = {"prior_mean": 0.1, "constant": 0.1**0.5}
BASE = {"state": "base"}
QUICK = Protocol(steps=3, batch=4, eval_prompts=4, eval_group=2)


def of_groups(groups: int, protocol: Protocol) -> dict[str, Any]:
    """So many labelled groups, of which as many whole batches as fit (three at most) are the warm-up's."""
    return {"labels": groups / protocol.groups, "warmup": min(3, groups // protocol.batch)}


def context(protocol: Protocol) -> list[Cell]:
    """The policy's state or the base's, with and without the prior, 30 (6.25 %) and 10 (2 %) labelled groups."""
    cells = references(protocol)
    for groups in (30, 10):
        for state in ("policy", "base"):
            for prior in ({}, PRIOR):
                name = f"{state}, {groups} groups{', prior' if prior else ''}"
                options = {"conductor": {"state": state}, "learner_args": prior, **of_groups(groups, protocol)}
                cells.append(anchored(name, protocol, **options))
        for hybrid in (0.0, 1.0):
            anchoring = {"shrink": True, "hybrid": hybrid}
            name = f"base, {groups} groups, shrunk{', hybrid' if hybrid else ''}"
            options = {"conductor": BASE, "module": {"anchoring": anchoring}, **of_groups(groups, protocol)}
            cells.append(anchored(name, protocol, **options))
    return cells


def choices(protocol: Protocol) -> list[Cell]:
    """10 to 80 choices of the best of 4, against 240 ratings, of all 8 and of the 4 that differ most."""

    def labelled(name: str, groups: int, responses: int | None, **options: Any) -> Cell:
        module = {"anchoring": {"responses": responses}} if responses else {}
        options = {"conductor": BASE, **of_groups(groups, protocol), **options}
        return anchored(name, protocol, module=module, **options)

    cells = references(protocol)
    for count in (10, 20, 40, 80):
        choice = {"anchor": "choices", "learner_args": {"target": "choice"}}
        cells.append(labelled(f"{count} choices of 4", count, 4, **choice))
    # as `maestro-pl label` asks them: all about what the policy answers before its first step
    first = {"anchor": "choices", "learner_args": {"target": "choice"}, "warmup": 40 // protocol.batch}
    cells.append(labelled("40 choices of 4, all first", 40, 4, **first))
    for count in (20, 40):
        prior = {"anchor": "choices", "learner_args": {"target": "choice", **PRIOR}}
        cells.append(labelled(f"{count} choices of 4, prior", count, 4, **prior))
    cells.append(labelled("40 choices of 8", 40, None, anchor="choices", learner_args={"target": "choice"}))
    cells.append(labelled("40 choices of 4, Bradley-Terry", 40, 4, anchor="choices", learner_args={"target": "pairs"}))
    cells.append(labelled("240 ratings", 30, None))
    cells.append(labelled("240 ratings by spread", 60, 4))
    cells.append(labelled("40 ratings by spread", 10, 4))
    return cells


def against(protocol: Protocol) -> list[Cell]:
    """Two rewards that go against the anchor; ``start`` is the untrained policy."""
    protocol = replace(protocol, steps=min(protocol.steps, 40))
    common = {"tasks": ("explain",), "rewards": "against"}
    learned = {"conductor": BASE, "labels": 0.5, "warmup": 3, **common}
    return [
        Cell("start", 0, replace(protocol, steps=1, lr=1e-12), **common),
        Cell("equal", 0, protocol, **common),
        anchored("anchored", protocol, **learned),
        anchored("anchored, hybrid", protocol, module={"anchoring": {"hybrid": 0.5}}, **learned),
    ]


def unseen(protocol: Protocol) -> list[Cell]:
    """A family that the anchor does not know, weighed equally or by what was learned elsewhere; and new wordings."""
    cells = [replace(cell, new_templates=True) for cell in references(protocol)]
    cells.append(anchored("all labelled", protocol, conductor=BASE, new_templates=True))
    for task in TASKS:
        known = tuple(other for other in TASKS if other != task)
        for how in ("equal", "weighed"):
            options = {"labelled_tasks": known, "module": {"anchoring": {"unlabelled_tasks": how}}}
            cells.append(anchored(f"without {task}, {how}", protocol, conductor=BASE, **options))
    return cells


PARTS = {"context": context, "choices": choices, "against": against, "unseen": unseen}


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a run."""
    rows = []
    for entry in results:
        labels = entry.get("labels", {}).values()
        rows.append(
            {
                "name": entry["name"],
                "seed": entry["seed"],
                **{f"utility_{task}": entry["utility"].get(task, "") for task in ("all", *TASKS)},
                "utility_new_wordings": (entry["new_templates"] or {"utility": {"all": ""}})["utility"]["all"],
                "length": entry["length"],
                "labelled_groups": entry["labelled_groups"],
                "ratings": sum(row["ratings"] for row in labels),
                "choices": sum(row["choices"] for row in labels),
                "context_drift": entry.get("context_drift", math.nan),
                "unhelped": " ".join(entry.get("unhelped", ())),
                "tokens": entry["tokens"],
                "seconds": entry["seconds"],
            }
        )
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each method: utility, share of the oracle's gain, the worst family's distance from equal weights, and seeds below."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["name"], {})[row["seed"]] = row
    overall = {name: [own[seed]["utility_all"] for seed in sorted(own)] for name, own in by.items()}
    found = {}
    for name, own in by.items():
        worst = []
        for seed, row in sorted(own.items()):
            base = by["equal"].get(seed)
            tasks = [task for task in TASKS if row[f"utility_{task}"] != ""]
            if base is not None:
                worst.append(min(row[f"utility_{task}"] - base[f"utility_{task}"] for task in tasks))
        found[name] = {
            "seeds": len(own),
            "utility": mean_interval(overall[name]),
            "length": mean_interval([row["length"] for row in own.values()]),
            "labels": max(row["ratings"] + row["choices"] for row in own.values()),
            "worst_family": mean_interval(worst) if worst else {},
            "seeds_below": sum(value < -BELOW for value in worst),
            "drift": mean_interval(
                [row["context_drift"] for row in own.values() if row["context_drift"] == row["context_drift"]]
            )
            if any(row["context_drift"] == row["context_drift"] for row in own.values())
            else {},
            **(share(overall, name) if "oracle" in overall else {}),
        }
    return found


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| method | labels | utility | share of the oracle's gain | worst family less equal | seeds below | length |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        part = f"{row['share']:.2f}" if "share" in row else "-"
        if "share" in row and row["low"] > -math.inf:  # one seed has no interval
            part += f" [{row['low']:.2f}, {row['high']:.2f}]"
        worst = f"{row['worst_family']['mean']:+.3f}" if row["worst_family"] else "-"
        lines.append(
            f"| {name} | {row['labels'] or '-'} | {row['utility']['mean']:.3f} | {part} | {worst} | "
            f"{row['seeds_below']} of {row['seeds']} | {row['length']['mean']:.0f} |"
        )
    return "\n".join(lines)


def _without_infinity(value: Any) -> Any:
    """An interval that nothing bounds is null: JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _without_infinity(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value


def main(args: list[str] | None = None) -> None:
    """Run one part, seed by seed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sandbox.trust",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=list(PARTS), required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--methods", nargs="+", help="these only, and equal and oracle beside them")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/sandbox_experiments"))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/sandbox_trust_<part>.csv")
    parser.add_argument("--known", type=Path, help="earlier runs (JSON): not run again, and those that come are added")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few methods, into the folder")
    options = parser.parse_args(args)
    cells = PARTS[options.part](QUICK if options.quick else Protocol())
    if options.methods is not None:
        unknown = sorted(set(options.methods) - {cell.name for cell in cells})
        if unknown:
            parser.error(f"no method {unknown} in this part; it has {[cell.name for cell in cells]}")
        cells = [cell for cell in cells if cell.name in ("equal", "oracle", "start", *options.methods)]
    cells = cells[:4] if options.quick else cells
    name = f"sandbox_trust_{options.part}.csv"
    output = options.output or (options.folder / f"quick_{name}" if options.quick else RESULTS / name)
    results: list[dict[str, Any]] = []
    kept = options.folder / "runs.jsonl"
    if options.known is not None and options.known.is_file():
        take_over(options.known, kept)
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        results += run_all(seeded(cells, [seed]), kept, options.jobs)
        write(output, rows_of(results))
        if options.known is not None:
            hand_on(kept, options.known)
    summary = summarise(rows_of(results))
    print(table(summary))
    print(f"written to {output}")
    print(json.dumps(_without_infinity({"part": options.part, "methods": summary})))


if __name__ == "__main__":
    main()
