"""Ways to weigh five conflicting rewards, on SmolLM2-135M-Instruct and four real tasks, by a score that none of them is.

    python -m benchmarks.real_conflict --part headroom --root FOLDER_WITH_THE_FILES --model FOLDER_OF_SMOLLM2 --jobs 2
    python -m benchmarks.real_conflict --part compare --root FOLDER_WITH_THE_FILES --model FOLDER_OF_SMOLLM2 --jobs 2
    python -m benchmarks.real_conflict --part hindsight --root FOLDER_WITH_THE_FILES --model FOLDER_OF_SMOLLM2

The run is configs/real/four_tasks.yaml. ``headroom`` trains with each reward alone and with equal weights and looks at the
validation prompts: the best of each task are the weights of ``static``, which ``compare`` tries beside the rest on the
test prompts, and the room that there is. ``hindsight`` trains nothing: it fits the weights of ``static`` to the score of all
responses that the runs of ``compare`` have recorded, of training prompts all, one vector a task. Every method and seed is a
cell of a `maestro-pl experiment`, so that the same command goes on where it was stopped. Each task's quality, and every
method minus equal weights on the same prompts, with two 95 % intervals (see :mod:`benchmarks.real_model`), are printed and
written to benchmarks/results/. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.real_labels import fitted_on_all, read_groups, score
from benchmarks.real_model import entry_of, run_cells, show, task_means
from benchmarks.real_tasks import PROMPTS, write_rows
from maestro_pl.cli.compare import comparison_of
from maestro_pl.errors import UserError
from maestro_pl.evaluation.compare_runs import Run
from maestro_pl.run.paths import config_path

RESULTS = Path(__file__).parent / "results"
CONFIG = "real/four_tasks.yaml"
TASKS = tuple(PROMPTS)
QUALITY = "reward/quality"
BASELINE = "equal"
HEADROOM_SEED = 100  # none of the seeds that are compared
LABELS = {"model.meta.warmup": 2, "model.anchoring.fraction": 0.15, "model.anchoring.responses": 4}  # 8 + 34 groups
EARLY = {"model.meta.warmup": 6, "model.anchoring.fraction": 0.075, "model.anchoring.responses": 4}  # 24 + 18 groups

_CONDUCTOR = {
    "model.weigher": {
        "class_path": "maestro_pl.Conductor",
        "init_args": {"action": "soft", "context": "prompt", "state": "base", "norm": "center"},
    },
    "model.meta.signal": "maestro_pl.AnchorSignal",
    "model.meta.every": 1,
}
_RATES = {
    "class_path": "callbacks.FunctionReward",
    "init_args": {"name": "anchor", "role": "anchor", "function": "benchmarks.real_anchors.quality"},
}
_CHOOSES = {
    "class_path": "callbacks.BestOfAnchor",
    "init_args": {"name": "anchor", "function": "benchmarks.real_anchors.best"},
}

_SCORE = {  # what the answers are worth; no reward reads it
    "class_path": "callbacks.FunctionReward",
    "init_args": {"name": "quality", "function": "benchmarks.real_anchors.quality"},
}

#: Method to a level of the experiment: what it changes in the config.
METHODS: dict[str, dict[str, Any]] = {
    "base": {"stages": ["test"]},  # not trained
    "equal": {"args": {"model.weigher": "maestro_pl.EqualWeights"}},
    "GDPO": {
        "args": {
            "model.weigher": "maestro_pl.EqualWeights",
            "model.advantages.aggregation": "normalize_then_sum",
        }
    },
    "paper": {
        "args": {
            "model.weigher": {"class_path": "maestro_pl.Conductor", "init_args": {"action": "mix"}},
            "model.meta.signal": "maestro_pl.AdvantageSignal",
        }
    },
    "ratings": {"args": {**_CONDUCTOR, **LABELS, "model.meta.learner": "ridge"}, "anchors": [_RATES]},
    "hybrid": {  # labelled groups are trained on what they were rated, the others as with ratings
        "args": {**_CONDUCTOR, **LABELS, "model.anchoring.hybrid": 1.0, "model.meta.learner": "ridge"},
        "anchors": [_RATES],
    },
    "shrunk": {  # and the advantages of the others are shrunk to how well their rewards are expected to follow the anchor
        "args": {
            **_CONDUCTOR,
            **LABELS,
            "model.anchoring.hybrid": 1.0,
            "model.anchoring.shrink": True,
            "model.meta.learner": "ridge",
        },
        "anchors": [_RATES],
    },
    "shrunk_weights": {  # the same without training on labels
        "args": {**_CONDUCTOR, **LABELS, "model.anchoring.shrink": True, "model.meta.learner": "ridge"},
        "anchors": [_RATES],
    },
    "warm": {"args": {**_CONDUCTOR, **EARLY, "model.meta.learner": "ridge"}, "anchors": [_RATES]},
    "choices": {
        "args": {
            **_CONDUCTOR,
            **LABELS,
            "model.meta.learner": {"class_path": "maestro_pl.RidgeLearner", "init_args": {"target": "choice"}},
        },
        "anchors": [_CHOOSES],
    },
    "labels": {  # the same number of labelled groups, whole ones, and nothing else is trained on
        "args": {
            "model.weigher": "maestro_pl.EqualWeights",
            "model.anchoring.fraction": 42 / 240,
            "model.anchoring.hybrid": 1.0,
            "model.anchoring.unlabelled": "skipped",
        },
        "anchors": [_RATES],
    },
    "static": {},  # what the search for headroom found
}


def rewards() -> list[dict[str, Any]]:
    """Those of the config."""
    listed: list[dict[str, Any]] = yaml.safe_load(config_path(CONFIG).read_text(encoding="utf-8"))["rewards"]
    return listed


def static(weights: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The level of an experiment whose weights are fixed, for each task its own; no weight is none."""
    split, fixed = [], {}
    for task, row in weights.items():
        for reward in rewards():
            name = reward["init_args"]["name"]
            if row.get(name, 0.0) > 0:
                own = {**reward["init_args"], "name": f"{name}.{task}", "tasks": [task]}
                split.append({**reward, "init_args": own})
                fixed[f"{name}.{task}"] = row[name]
    weigher = {"class_path": "maestro_pl.FixedWeights", "init_args": {"weights": fixed}}
    return {"args": {"model.weigher": weigher}, "rewards": split}


def candidates() -> dict[str, dict[str, Any]]:
    """Each reward alone, and all alike."""
    names = [reward["init_args"]["name"] for reward in rewards()]
    return {BASELINE: METHODS[BASELINE]} | {name: {"args": {"model.weigher": _only(name, names)}} for name in names}


def _only(name: str, names: Sequence[str]) -> dict[str, Any]:
    weights = {other: float(other == name) for other in names}
    return {"class_path": "maestro_pl.FixedWeights", "init_args": {"weights": weights}}


def grid(options: argparse.Namespace, levels: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The experiment: an axis of methods and one of seeds, which are of the sampling, the adapters and the prompts' order."""
    first = options.first_seed
    seeds = [HEADROOM_SEED] if options.part == "headroom" else list(range(first, first + options.seeds))
    own = dict(pair.lstrip("-").split("=", 1) for pair in options.set)
    return {
        "name": f"real_{options.part}",
        "stages": ["fit", "validate" if options.part == "headroom" else "test"],
        "common": {
            "config": str(config_path(CONFIG).resolve()),
            "metrics": [_SCORE],
            "args": {
                "data.root": str(options.folder.resolve()),
                "data.show": False,
                "model.policy.model": str(options.model),
                "trainer.max_steps": options.steps,
                "trainer.limit_val_batches": 1.0 if options.part == "headroom" else 0,
                "trainer.check_val_every_n_epoch": None,
                "trainer.val_check_interval": 100_000,  # at the end only
                **{key: yaml.safe_load(value) for key, value in own.items()},
            },
        },
        "axes": {
            "method": levels,
            "seed": {str(seed): {"args": {"seed_everything": seed, "data.seed": seed}} for seed in seeds},
        },
    }


def run(options: argparse.Namespace, levels: dict[str, dict[str, Any]]) -> list[Run]:
    """Bring every cell to its end; those that have been there are not run again."""
    folder = options.folder / options.part
    write_rows(options.root, options.folder / "tasks.jsonl")
    split = "validation" if options.part == "headroom" else "test"
    return run_cells(grid(options, levels), folder, options.jobs, split)


def found_headroom(runs: Sequence[Run]) -> dict[str, Any]:
    """Per task: the quality of each candidate on validation prompts, and the best."""
    names = [reward["init_args"]["name"] for reward in rewards()]
    quality = {task: {run.name: round(task_means(run, task, QUALITY)[0], 4) for run in runs} for task in TASKS}
    best = {task: max(row, key=lambda name, row=row: row[name]) for task, row in quality.items()}  # type: ignore[misc]
    weights = {
        task: dict.fromkeys(names, 1.0) if name_of == BASELINE else {name_of: 1.0} for task, name_of in best.items()
    }
    return {"quality": quality, "best": best, "weights": weights}


def hindsight(folder: Path) -> dict[str, Any]:
    """Per task: the weights of which the weighed reward goes along best with the quality of what runs below have recorded."""
    groups = read_groups([folder], QUALITY.removeprefix("reward/"))
    if absent := sorted(set(TASKS) - set(groups.tasks)):
        raise UserError(f"The runs below {folder} have recorded no group of {', '.join(absent)}: let them record more.")
    weights_NK = fitted_on_all(groups)
    first = {task: groups.tasks.index(task) for task in TASKS}
    return {
        "groups": dict(Counter(groups.tasks)),
        "correlation": {task: round(value, 4) for task, value in score(groups, weights_NK, range(len(groups.tasks))).items()},
        "weights": {
            task: {name: round(float(weight), 4) for name, weight in zip(groups.names, weights_NK[n], strict=True)}
            for task, n in first.items()
        },
    }  # fmt: skip


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Per task: each method's quality on the test split, and what it is above equal weights."""
    made = comparison_of(runs, [QUALITY], BASELINE)
    means = {(row.run, row.task): row for row in made.means}
    above = {(row.run, row.task): row for row in made.differences}
    summary: dict[str, Any] = {}
    for task in TASKS:
        by_seed = {run.name: task_means(run, task, QUALITY) for run in runs}
        summary[task] = {
            name: entry_of(means[name, task], above.get((name, task)), by_seed[name], by_seed[BASELINE])
            for name in by_seed
        }
    return summary


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--part", choices=["headroom", "hindsight", "compare"], required=True)
    made.add_argument("--root", type=Path, required=True, help="folder with ssgen/ and nover/")
    made.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder")
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--steps", type=int, default=60, help="policy steps")
    made.add_argument("--jobs", type=int, default=1, help="runs at once, of one thread each")
    made.add_argument("--folder", type=Path, default=Path("runs/real_conflict"))
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    made.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of every run")
    return made


def main(args: list[str] | None = None) -> None:
    """Run the cells that are left, and compare all."""
    options = parser().parse_args(args)
    options.output.mkdir(parents=True, exist_ok=True)
    headroom = options.output / "real_conflict_headroom.json"
    settings = {"steps": options.steps, "set": options.set}
    if options.part == "headroom":
        result = {"settings": {**settings, "seed": HEADROOM_SEED}, **found_headroom(run(options, candidates()))}
        headroom.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    elif options.part == "hindsight":
        result = hindsight(options.folder / "compare")
        headroom.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    else:
        levels = {name: METHODS[name] for name in options.methods}
        if "static" in levels:
            if not headroom.is_file():
                raise UserError(
                    f"{headroom} is not there: run --part headroom or hindsight first, or leave static out of --methods."
                )
            levels["static"] = static(json.loads(headroom.read_text(encoding="utf-8"))["weights"])
        runs = run(options, levels)
        if BASELINE not in levels:
            print(json.dumps({"methods": [each.name for each in runs], "compared": False}))
            return
        summary = summarise(runs)
        show(summary)
        seeds = list(range(options.first_seed, options.first_seed + options.seeds))
        result = {"settings": {**settings, "seeds": seeds}, "tasks": summary}
        (options.output / "real_conflict.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
