"""Labels by choice without training: which response is best, against ratings, on prompts that were looked at and fresh ones.

    python -m benchmarks.sandbox.offline_choices --draws 30 --worlds 11 12

The protocol is that of :mod:`benchmarks.sandbox.offline`, the score the share of the best static gain. A row a draw is
written to ``benchmarks/results/sandbox_offline_choices.csv`` after each variant; those that the file has are not drawn
again. The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import maestro_pl
from benchmarks.sandbox.offline import Variant, World, family_shares
from benchmarks.sandbox.statistics import mean_interval
from maestro_pl.sandbox import TASKS

RESULTS = Path(__file__).parents[1] / "results" / "sandbox_offline_choices.csv"
FIELDS = ("world", "kind", "groups", "judgements", "draw", "all", *TASKS)
PROMPTS = RESPONSES = 24
BELOW = -0.02  # of its own gain: under equal weights


def choosing(**options: Any) -> Any:
    """The learner of choices."""
    return maestro_pl.RidgeLearner(**{"target": "choice", **options})


def pairing() -> Any:
    """The Bradley-Terry baseline."""
    return maestro_pl.RidgeLearner(target="pairs")


def with_prior() -> Any:
    """The learner of choices with the prior."""
    return choosing(prior_mean=0.1, constant=0.1**0.5)


def rating_with_prior() -> Any:
    """The learner of ratings with the prior."""
    return maestro_pl.RidgeLearner(prior_mean=0.1, constant=0.1**0.5)


#: Kinds of labels, and how many judgements a group takes.
KINDS: dict[str, tuple[Variant, int]] = {
    "ratings, all 8": (Variant(""), 8),
    "ratings, all 8, prior": (Variant("", learner=rating_with_prior), 8),
    "ratings, 4 by spread": (Variant("", shown=4), 4),
    "best of 8": (Variant("", learner=choosing, label="best"), 1),
    "best of 4 by spread": (Variant("", learner=choosing, label="best", shown=4), 1),
    "best of 4 by spread, prior": (Variant("", learner=with_prior, label="best", shown=4), 1),
    "best of 4 at random": (Variant("", learner=choosing, label="best", shown=4, by="random"), 1),
    "pair, the widest": (Variant("", learner=choosing, label="best", shown=2), 1),
    "pair at random": (Variant("", learner=choosing, label="best", shown=2, by="random"), 1),
    "ranking of 3": (Variant("", learner=choosing, label="ranking", shown=3), 2),
    "best of 4 by spread, Bradley-Terry": (Variant("", learner=pairing, label="best", shown=4), 1),
}
COUNTS = (10, 20, 40, 80, 160, 240)


def variants(most_groups: int) -> list[tuple[str, int, Variant]]:
    """Kind, judgements, and what is drawn; those that need more groups than there are are left out."""
    found = []
    for kind, (variant, each) in KINDS.items():
        for count in COUNTS:
            groups = count // each
            if count % each == 0 and 2 <= groups <= most_groups:
                found.append((kind, count, replace(variant, name=kind, responses=groups * variant.group)))
    return found


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(worlds: Sequence[int], draws: int, path: Path, prompts: int = PROMPTS, responses: int = RESPONSES) -> None:
    """Every variant on every world, each draw once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {(row["world"], row["kind"], row["judgements"]) for row in read(path)}
    for seed in worlds:
        missing = [v for v in variants(prompts * len(TASKS)) if (str(seed), v[0], str(v[1])) not in known]
        if not missing:
            continue
        train, test = (World(split, prompts, responses, seed=seed) for split in ("train", "test"))
        for kind, count, variant in missing:
            rows = family_shares(train, test, variant, draws)
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS)
                if file.tell() == 0:
                    writer.writeheader()
                common = {
                    "world": seed,
                    "kind": kind,
                    "groups": variant.responses // variant.group,
                    "judgements": count,
                }
                for draw, row in enumerate(rows):
                    writer.writerow({**common, "draw": draw, **{k: round(v, 4) for k, v in row.items()}})
            print(f"world {seed}, {kind}, {count}: {mean_interval([row['all'] for row in rows])}", flush=True)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Mean share by kind and judgements, worlds side by side, and in how many draws some family is below equal weights."""
    worlds = sorted({row["world"] for row in rows})
    lines = [f"| judgements | {' | '.join(map(str, COUNTS))} |", "|---|" + "---|" * len(COUNTS)]
    for kind in KINDS:
        cells = []
        for count in COUNTS:
            parts = []
            for world in worlds:
                own = [r for r in rows if (r["world"], r["kind"], r["judgements"]) == (world, kind, str(count))]
                if own:
                    below = sum(min(float(r[task]) for task in TASKS) < BELOW for r in own) / len(own)
                    parts.append(f"{sum(float(r['all']) for r in own) / len(own):.2f} ({below:.2f})")
            cells.append(" / ".join(parts) or "-")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Draw what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[11, 12])
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="few prompts, responses and draws, into --output")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    size = {"prompts": 4, "responses": 10} if options.quick else {}
    run(options.worlds, 2 if options.quick else options.draws, options.output, **size)
    print(table(read(options.output)))


if __name__ == "__main__":
    main()
