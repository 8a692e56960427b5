"""Equal weights, the paper's signal and an anchor's, on SmolLM2-135M-Instruct and four real tasks, scored by held-out anchors.

    python -m benchmarks.real_model --root FOLDER_WITH_THE_FILES --model FOLDER_OF_SMOLLM2 --seeds 3 --steps 60 --jobs 2

The run is configs/real/smollm2.yaml; only the weigher and what it learns from differ between the methods, and ``base``
is the model before training. Every method and seed is a cell of a `maestro-pl experiment`, so that the same command
goes on where it was stopped. The anchors (configs/anchors/real.yaml) are not among the rewards: ``equal`` and ``paper``
never read them. Each task's anchor on the test split, and every method minus ``equal`` on the same prompts, are printed
and written to benchmarks/results/real_model.json with two 95 % intervals: the bootstrap over prompts and seeds of
`maestro-pl compare`, and the t interval of the differences of equal seeds. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from maestro_pl.cli.compare import comparison_of
from maestro_pl.evaluation.compare_runs import Run, read_runs
from maestro_pl.evaluation.records import write_whole
from maestro_pl.experiment.grid import read_grid
from maestro_pl.run.paths import config_path

RESULTS = Path(__file__).parent / "results"
BASELINE = "equal"
CONDUCTOR = "maestro_pl.Conductor"

#: Method to what it changes in configs/real/smollm2.yaml: dotted keys, as on the command line.
METHODS: dict[str, dict[str, Any]] = {
    "base": {},  # not trained
    "equal": {"model.weigher": "maestro_pl.EqualWeights"},
    "paper": {
        "model.weigher": {"class_path": CONDUCTOR, "init_args": {"action": "mix"}},
        "model.meta.signal": "maestro_pl.AdvantageSignal",
    },
    "anchor": {
        "model.weigher": {
            "class_path": CONDUCTOR,
            "init_args": {"action": "soft", "context": "prompt", "norm": "center"},
        },
        "model.meta.signal": "maestro_pl.AnchorSignal",
        "model.meta.learner": "ridge",
        "model.meta.every": 1,
        "model.anchoring.fraction": 0.5,  # these anchors are programs, and the run is short
        "model.meta.warmup": 2,
    },
}


def anchors(tasks: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The anchors of configs/anchors/real.yaml, each a callback for one task; those of some tasks only."""
    listed: list[dict[str, Any]] = yaml.safe_load(config_path("anchors/real.yaml").read_text(encoding="utf-8"))
    return [anchor for anchor in listed if tasks is None or anchor["init_args"]["tasks"][0] in tasks]


def anchor_of_task(tasks: Sequence[str] | None = None) -> dict[str, str]:
    """Task to the metric that holds its anchor."""
    return {a["init_args"]["tasks"][0]: f"reward/{a['init_args']['name']}" for a in anchors(tasks)}


def grid(options: argparse.Namespace) -> dict[str, Any]:
    """The experiment: an axis of methods and one of seeds, which are of the sampling, the adapters and the prompts' order."""
    config = config_path("real/smollm2.yaml").resolve()
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    rewards = written["rewards"]
    sources = [source for source in written["data"]["sources"] if source["path"] in options.tasks]
    own = dict(pair.lstrip("-").split("=", 1) for pair in options.set)
    methods: dict[str, Any] = {name: {"args": METHODS[name]} for name in options.methods}
    if "base" in methods:
        methods["base"]["stages"] = ["test"]
    return {
        "name": "real_model",
        "stages": ["fit", "test"],
        "common": {
            "config": str(config),
            "rewards": [*rewards, *anchors(options.tasks)],
            "args": {
                "data.sources": sources,
                "data.root": str(options.root.resolve()),
                "data.eval_limit": options.eval_limit,
                "data.show": False,
                "model.policy.model": str(options.model),
                "trainer.max_steps": options.steps,
                **{key: yaml.safe_load(value) for key, value in own.items()},
            },
        },
        "axes": {
            "method": methods,
            "seed": {
                str(seed): {"args": {"seed_everything": seed, "data.seed": seed}} for seed in range(options.seeds)
            },
        },
    }


def run_cells(grid: dict[str, Any], folder: Path, jobs: int, split: str = "test") -> list[Run]:
    """Bring every cell of an experiment to its end; those that have been there are not run again.

    The file's name is that of what is in it, and the cells are read by their own names, so that others may run other cells
    of the same folder at once.

    Returns:
        A run for each level of the axis ``method``, with its seeds.
    """
    text = yaml.safe_dump(grid, sort_keys=False)
    path = folder / f"grid-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    command = [sys.executable, "-m", "maestro_pl", "experiment", str(path), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([*command, "--jobs", str(jobs)], check=True, env=environment)
    cells: dict[str, list[str]] = {}
    for cell in read_grid(path).cells:
        cells.setdefault(str(cell.levels["method"]), []).append(str(folder / "cells" / cell.name))
    return read_runs([f"{method}={','.join(folders)}" for method, folders in cells.items()], split)[0]


def task_means(run: Run, task: str, metric: str) -> list[float]:
    """The anchor's mean over the prompts of a task, for each seed."""
    rows = [place for place, (of, _) in enumerate(run.keys_N) if of == task]
    return [float(mean) for mean in np.nanmean(run.matrix(metric)[rows], axis=0)]


def seed_interval(values: Sequence[float], baseline: Sequence[float]) -> list[float] | None:
    """The 95 % t interval of the mean difference of equal seeds; None of fewer than two."""
    from scipy.stats import t

    difference_S = np.subtract(values, baseline)
    if len(difference_S) < 2:
        return None
    half = float(t.ppf(0.975, len(difference_S) - 1) * difference_S.std(ddof=1) / len(difference_S) ** 0.5)
    return [round(float(difference_S.mean()) - half, 4), round(float(difference_S.mean()) + half, 4)]


def summarise(runs: Sequence[Run], chosen: Sequence[str] | None = None) -> dict[str, Any]:
    """Per task: each method's anchor on the test split, and what it is above equal weights."""
    tasks = anchor_of_task(chosen)
    made = comparison_of(runs, list(tasks.values()), BASELINE)
    means = {(row.run, row.task): row for row in made.means if tasks.get(row.task) == row.metric}
    above = {(row.run, row.task): row for row in made.differences if tasks.get(row.task) == row.metric}
    summary: dict[str, Any] = {}
    for task, metric in tasks.items():
        by_seed = {run.name: task_means(run, task, metric) for run in runs}
        summary[task] = {
            name: entry_of(means[name, task], above.get((name, task)), by_seed[name], by_seed[BASELINE])
            for name in by_seed
        }
    return summary


def entry_of(mean: Any, above: Any, values: list[float], baseline: list[float]) -> dict[str, Any]:
    """A method on a task: its mean, by seed, and above the baseline."""
    kept = ("mean", "low", "high", "n", "seeds")
    entry: dict[str, Any] = {k: _rounded(v) for k, v in asdict(mean).items() if k in kept}
    entry["by_seed"] = [round(value, 4) for value in values]
    if above is not None:
        numbers = ("difference", "low", "high", "p", "p_holm", "n")
        entry["minus_equal"] = {k: _rounded(v) for k, v in asdict(above).items() if k in numbers}
        entry["minus_equal"]["seed_interval"] = seed_interval(values, baseline)
    return entry


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def show(summary: dict[str, Any]) -> None:
    """One line a task and method."""
    for task, methods in summary.items():
        for name, entry in methods.items():
            line = f"{task:12} {name:8} {entry['mean']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]"
            if "minus_equal" in entry:
                above = entry["minus_equal"]
                line += f"  minus equal {above['difference']:+.4f} [{above['low']:+.4f}, {above['high']:+.4f}]"
                line += f"  over seeds {above['seed_interval']}"
            print(line, flush=True)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--root", type=Path, required=True, help="folder with gsm8k/, emobench/, nover/ and ssgen/")
    made.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--tasks", nargs="+", choices=list(anchor_of_task()), default=list(anchor_of_task()))
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--steps", type=int, default=60, help="policy steps")
    made.add_argument("--eval-limit", type=int, default=32, help="test prompts of each task")
    made.add_argument("--jobs", type=int, default=1, help="runs at once, of one thread each")
    made.add_argument("--folder", type=Path, default=Path("runs/real_model"))
    made.add_argument("--output", type=Path, default=RESULTS / "real_model.json")
    made.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of every run")
    return made


def main(args: list[str] | None = None) -> None:
    """Run the cells that are left, and compare all."""
    options = parser().parse_args(args)
    runs = run_cells(grid(options), options.folder, options.jobs)
    if len(runs) < 2 or BASELINE not in {run.name for run in runs}:
        print(json.dumps({"methods": [run.name for run in runs], "compared": False}))
        return
    summary = summarise(runs, options.tasks)
    show(summary)
    settings = {
        "steps": options.steps,
        "seeds": options.seeds,
        "eval_limit": options.eval_limit,
        "tasks": options.tasks,
    }
    settings["set"] = options.set
    result = {"settings": settings, "tasks": summary}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
