"""Can the sandbox be learnt, and does the quickstart improve it? The same run over several seeds, utility before and after.

    python -m benchmarks.sandbox_seeds --setting quickstart --seeds 5
    python -m benchmarks.sandbox_seeds --setting best_static --seeds 5

``quickstart`` is configs/quickstart.yaml as it stands. ``best_static`` is the same run with the best static weights of
each family (benchmarks/sandbox/build/static_weights.json) in place of its weigher. Each seed's true utility per family
is printed and written to benchmarks/results/sandbox_seeds_<setting>.json; the last line of output is one JSON object. A seed
whose run in ``--folder`` came to its end is not run again, if it was run by the same command.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.sandbox.build.search import STATIC_WEIGHTS
from benchmarks.sandbox.build.verify import Setting, run_config, weighings
from maestro_pl.run.paths import config_path

RESULTS = Path(__file__).parent / "results"


def command(setting: str, seed: int, folder: Path, extra: list[str]) -> list[str]:
    """The command line of one run; only the weigher and its rewards differ between the settings."""
    base = [sys.executable, "-m", "maestro_pl", "fit", "--config", str(config_path("quickstart.yaml"))]
    if setting == "best_static":
        found = json.loads(STATIC_WEIGHTS.read_text(encoding="utf-8"))
        whole = run_config(weighings(found)["best"], Setting(), folder, setting)
        overlay = {"model": {"weigher": whole["model"]["weigher"]}, "rewards": whole["rewards"]}
        path = folder / f"{setting}.yaml"
        path.write_text(json.dumps(overlay, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
        base += ["--config", str(path)]
    name = f"{setting}_{seed}"
    return [
        *base,
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        f"--trainer.logger.save_dir={folder}",
        f"--trainer.logger.name={name}",
        *extra,
    ]


def run(setting: str, seed: int, folder: Path, extra: list[str]) -> dict[str, dict[str, float]]:
    """One run; task to the true utility and the share of good formats, before and after."""
    asked, made = command(setting, seed, folder, extra), folder / f"{setting}_{seed}"
    done = folder / f"{setting}_{seed}.json"  # of a run that came to its end
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == asked[1:]:
        print(f"seed {seed}: taken from {made}", flush=True)
    else:
        with (folder / f"{setting}_{seed}.log").open("w", encoding="utf-8") as log:
            subprocess.run(asked, check=True, stdout=log, stderr=subprocess.STDOUT)
        done.write_text(json.dumps(asked[1:]) + "\n", encoding="utf-8")
    table = max(made.glob("version_*/before_after.csv"), key=lambda path: path.stat().st_mtime)
    outcome: dict[str, dict[str, float]] = {}
    with table.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row["metric"] in ("reward/utility", "length/mean"):
                name = row["metric"].split("/")[0].replace("reward", "utility")
                values = {f"{name}_before": float(row["before"]), f"{name}_after": float(row["after"])}
                outcome.setdefault(row["task"], {}).update({k: round(v, 4) for k, v in values.items()})
    return outcome


def summarise(setting: str, runs: dict[int, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Per task: in how many seeds the utility rose, and its mean before and after."""
    tasks = list(next(iter(runs.values())))
    rows = {task: [outcome[task] for outcome in runs.values()] for task in tasks}
    return {
        "setting": setting,
        "seeds": len(runs),
        "risen": {t: sum(r["utility_after"] > r["utility_before"] for r in rs) for t, rs in rows.items()},
        "before": {t: round(sum(r["utility_before"] for r in rs) / len(rs), 4) for t, rs in rows.items()},
        "after": {t: round(sum(r["utility_after"] for r in rs) / len(rs), 4) for t, rs in rows.items()},
    }


def main(args: list[str] | None = None) -> None:
    """Run the seeds one after another and report each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=["quickstart", "best_static"], default="quickstart")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/sandbox_seeds"))
    parser.add_argument(
        "--output", type=Path, help="results file; default: benchmarks/results/sandbox_seeds_SETTING.json"
    )
    options, extra = parser.parse_known_args(args)
    options.folder.mkdir(parents=True, exist_ok=True)
    runs: dict[int, dict[str, dict[str, float]]] = {}
    for seed in range(options.seeds):
        runs[seed] = run(options.setting, seed, options.folder, extra)
        pairs = (f"{t} {r['utility_before']:.3f} > {r['utility_after']:.3f}" for t, r in runs[seed].items())
        print(f"seed {seed}: " + "  ".join(pairs), flush=True)
    summary = summarise(options.setting, runs)
    output = options.output or RESULTS / f"sandbox_seeds_{options.setting}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"summary": summary, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
