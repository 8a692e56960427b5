"""The sandbox's experiments, one command each.

    python -m benchmarks.sandbox --experiment known_optimum --seeds 5 --jobs 2

Every run is kept in ``<folder>/runs.jsonl``, so that a stopped experiment goes on where it was and experiments share
runs. The tables are printed as Markdown, the numbers of every run are written to
``benchmarks/results/sandbox_<experiment>.json``, and the last line of output is one JSON object. ``--quick`` runs a
small version of the same in under three minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.sandbox import known_optimum, sensitivity, static_search
from benchmarks.sandbox.cells import Protocol
from benchmarks.sandbox.runner import take_over

RESULTS = Path(__file__).parents[1] / "results"
EXPERIMENTS: dict[str, Any] = {
    "known_optimum": known_optimum,
    "static_search": static_search,
    "sensitivity": sensitivity,
}
QUICK = Protocol(steps=3, batch=4, eval_prompts=4, eval_group=2)


def main(args: list[str] | None = None) -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sandbox", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", choices=list(EXPERIMENTS), required=True)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method; 0: what needs no training")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", help="of known_optimum: these only; equal and oracle are always run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/sandbox_experiments"))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/sandbox_<experiment>.json")
    parser.add_argument("--known", type=Path, help="a results file whose runs are taken over and not run again")
    parser.add_argument("--quick", action="store_true", help="a few steps of a few methods, two seeds")
    options = parser.parse_args(args)
    if options.methods is not None and options.experiment != "known_optimum":
        parser.error("--methods chooses among known_optimum's methods; leave it out for the other experiments")
    chosen = {} if options.methods is None else {"methods": options.methods}
    experiment = EXPERIMENTS[options.experiment]
    count = 2 if options.quick else options.seeds
    seeds = list(range(options.first_seed, options.first_seed + count))
    protocol = QUICK if options.quick else Protocol()
    if options.known is not None:
        take_over(options.known, options.folder / "runs.jsonl")
    name = f"{options.experiment}{'_quick' if options.quick else ''}"
    results = experiment.run(protocol, seeds, options.folder, options.jobs, options.quick, **chosen)
    summary = experiment.summarise(results)
    output = options.output or (options.folder if options.quick else RESULTS) / f"sandbox_{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(to_json(summary, results), encoding="utf-8")
    print(experiment.table(summary))
    print(f"written to {output}")
    print(json.dumps({"experiment": options.experiment, **summary}))


def to_json(summary: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Summary and runs, a line a run."""
    runs = ",\n".join(json.dumps(entry) for entry in results)
    return f'{{"summary": {json.dumps(summary)},\n"runs": [\n{runs}\n]}}\n'


if __name__ == "__main__":
    main()
