"""Train with the weights that the search found, and with others: does the order hold in real runs?

Called by ``python -m benchmarks.sandbox.build.search --verify``. A run is one ``maestro-pl fit`` over all families.
Weights of a family's own are five rewards a family, each applied to that family only, under ``FixedWeights``, which
rescales over the rewards that apply.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sandbox.build.scoring import MAX_NEW_TOKENS, MAX_TOKENS, MIN_TOKENS, REWARDS
from maestro_pl.errors import UserError
from maestro_pl.sandbox.utility import TASKS

Weights = Mapping[str, float]

INIT_ARGS: dict[str, dict[str, Any]] = {
    "format": {},
    "length": {"min": MIN_TOKENS, "max": MAX_TOKENS},
    "entropy": {"direction": "maximize"},
    "perplexity": {"score": "log"},
    "preference": {"model": "sandbox", "dtype": "float32", "batch_size": 64},
}


@dataclass(frozen=True)
class Setting:
    """How the verification trains.

    Attributes:
        steps: policy steps of 8 prompts x 8 responses.
        lr: of AdamW on the adapters (LoRA of rank 16 on every linear layer).
        kl_coef: weight of the KL penalty.
        seed: of the run.
    """

    steps: int = 80
    lr: float = 1e-3
    kl_coef: float = 0.05
    seed: int = 0


def weighings(result: Mapping[str, Any]) -> dict[str, dict[str, Weights]]:
    """Names of the runs to the weights of each family: its best ones, one vector for all, equal, and each vertex."""
    equal = {name: 1 / len(REWARDS) for name in REWARDS}
    everywhere: dict[str, Weights] = {"equal": equal, "one_for_all": result["one_for_all_weights"]}
    everywhere |= {name: {other: float(other == name) for other in REWARDS} for name in REWARDS}
    best: dict[str, Weights] = {task: result["tasks"][task]["best_weights"] for task in TASKS}
    return {"best": best, **{name: dict.fromkeys(TASKS, weights) for name, weights in everywhere.items()}}


def run_config(weights: Mapping[str, Weights], setting: Setting, folder: Path, name: str) -> dict[str, Any]:
    """The config of one training run with fixed weights per family."""
    rewards: list[dict[str, Any]] = []
    for task in TASKS:
        for reward in REWARDS:
            extra = {"name": f"{reward}.{task}", "tasks": [task], "normalize": "zscore"}
            path = f"callbacks.{reward.capitalize()}Reward"
            rewards.append({"class_path": path, "init_args": {**INIT_ARGS[reward], **extra}})
    metric = {"name": "utility", "function": "maestro_pl.sandbox.true_utility", "role": "metric"}
    rewards.append({"class_path": "callbacks.FunctionReward", "init_args": metric})
    fixed = {f"{reward}.{task}": float(weights[task][reward]) for task in TASKS for reward in REWARDS}
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": name},
    }
    return {
        "seed_everything": setting.seed,
        "model": {
            "policy": {"model": "sandbox", "dtype": "float32"},
            "weigher": {"class_path": "maestro_pl.FixedWeights", "init_args": {"weights": fixed}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": setting.lr, "weight_decay": 0.0}},
            "kl": {"coef": setting.kl_coef},
        },
        "data": {"sources": [{"path": "sandbox"}], "batch_size": 8, "eval_batch_size": 64, "eval_limit": 32},
        "rollout": {"group_size": 8, "eval_group_size": 4, "max_new_tokens": MAX_NEW_TOKENS},
        "rewards": rewards,
        "trainer": {
            "max_steps": setting.steps,
            "num_sanity_val_steps": -1,
            "val_check_interval": setting.steps,
            "check_val_every_n_epoch": None,
            "logger": logger,
        },
    }


def train(weights: Mapping[str, Weights], setting: Setting, folder: Path, name: str) -> dict[str, tuple[float, float]]:
    """Run ``maestro-pl fit`` and read the true utility before and after, by family.

    Raises:
        UserError: the run ended without its table.
    """
    from maestro_pl.cli import main as maestro_pl  # the command line imports the callbacks, and they the sandbox

    folder.mkdir(parents=True, exist_ok=True)
    config = folder / f"{name}.yaml"
    # JSON is YAML
    config.write_text(json.dumps(run_config(weights, setting, folder, name), indent=2) + "\n", encoding="utf-8")
    maestro_pl(["fit", "--config", str(config)])
    tables = sorted((folder / name).glob("version_*/before_after.csv"), key=lambda path: path.stat().st_mtime)
    if not tables:
        raise UserError(f"The run in {folder / name} left no before_after.csv: see what it printed.")
    with tables[-1].open(newline="", encoding="utf-8") as lines:
        found = [row for row in csv.DictReader(lines) if row["metric"] == "reward/utility"]
    return {row["task"]: (float(row["before"]), float(row["after"])) for row in found}


def verify(result: Mapping[str, Any], setting: Setting, folder: Path) -> dict[str, dict[str, tuple[float, float]]]:
    """Train with every weighing of :func:`weighings` and print the utilities as a table."""
    outcomes = {name: train(weights, setting, folder, name) for name, weights in weighings(result).items()}
    print(f"{'true utility':14}" + "".join(f"{task:>22}" for task in TASKS))
    for name, outcome in outcomes.items():
        print(f"{name:14}" + "".join(f"{outcome[task][0]:>14.3f} > {outcome[task][1]:.3f}" for task in TASKS))
    return outcomes
