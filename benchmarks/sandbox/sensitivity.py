"""Experiment 3: what the anchored Conductor is sensitive to, and what it does on families and wordings it has not seen.

In two parts. What shapes the Conductor itself (its size, what it reads, how it is fitted, how many labels it has) is
measured without training, over many draws of labels (``offline``), where small differences can be seen. What only
training can show (M, scope, the warm-up) is trained, over the seeds of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sandbox.cells import Cell, Protocol
from benchmarks.sandbox.methods import anchored, references, seeded
from benchmarks.sandbox.offline import Variant, World, shares, unseen_family
from benchmarks.sandbox.runner import run_all
from benchmarks.sandbox.statistics import by_method, mean_interval, share
from maestro_pl import GradientLearner, RidgeLearner
from maestro_pl.sandbox import TASKS

BASE = "base"
DRAWS = 30
PROMPTS, RESPONSES = 24, 24


def offline_variants() -> list[Variant]:
    """The base and one change of it each."""

    def by_gradient(*sizes: int) -> dict[str, Any]:
        return {"learner": lambda: GradientLearner(fits=200), "conductor": {"hidden_sizes": list(sizes)}}

    def ridge(**options: Any) -> dict[str, Any]:
        return {"learner": lambda: RidgeLearner(**options)}

    return [
        Variant(BASE),
        Variant("by gradient: linear", **by_gradient()),
        Variant("by gradient: 32", **by_gradient(32)),
        Variant("by gradient: 256", **by_gradient(256)),
        Variant("by gradient: 2 x 256", **by_gradient(256, 256)),
        Variant("ridge of the covariances", **ridge(target="covariance")),
        Variant(
            "ridge of the covariances, softmax (tau 0.3)",
            conductor={"tau": 0.3},
            **ridge(target="covariance", mapping="softmax"),
        ),
        Variant("ridge: 3", **ridge(ridge=3.0)),
        Variant("ridge: 300", **ridge(ridge=300.0)),
        Variant("ridge: auto", **ridge(ridge="auto")),
        Variant("norm: rms", conductor={"norm": "rms"}),
        Variant("layer: middle", state="prompt, layer middle"),
        Variant("layer: first", state="prompt, layer first"),
        Variant("context: terminal", state="terminal"),
        Variant("context: terminal, pool: mean", state="terminal, pool mean"),
        Variant("context: both", state="both", conductor={"context": "both"}),
        Variant("h: the task's one-hot", state="task"),
        Variant("h: bag of the prompt's words", state="words"),
        Variant("h: noise", state="noise"),
        Variant("h: nothing", conductor={"reads": "nothing"}),
        Variant("groups of 4 (as many responses)", group=4),
        Variant("groups of 16 (as many responses)", group=16),
        Variant("normalize: none", normalize="none"),
        Variant("normalize: rank", normalize="rank"),
        Variant("normalize: minmax", normalize="minmax"),
        *(Variant(f"{n} labelled groups", responses=8 * n) for n in (8, 16, 60)),
        Variant("anchor without noise", noise=0.0),
        Variant("anchor with noise of 2 sd", noise=2.0),
    ]  # fmt: skip


def trained_variants(protocol: Protocol) -> list[Cell]:
    """What only training can show; the base is known_optimum's ``anchor 0.0625``."""
    return [
        anchored("anchor 0.0625", protocol),
        anchored("no warm-up", protocol, warmup=0),
        anchored("M = 3", protocol, module={"meta": {"every": 3}}),
        anchored("M = 6", protocol, module={"meta": {"every": 6}}),
        anchored("context: terminal", protocol, conductor={"context": "terminal"}),
        anchored(
            "context: terminal, scope: group",
            protocol,
            conductor={"context": "terminal"},
            module={"advantages": {"scope": "group"}},
        ),
    ]


def run(protocol: Protocol, seeds: list[int], folder: Path, jobs: int, quick: bool) -> list[dict[str, Any]]:
    """Both parts; without seeds, the one without training only."""
    cells = [*references(protocol), *trained_variants(protocol)]
    results = run_all(seeded(cells[:3] if quick else cells, seeds), folder / "runs.jsonl", jobs) if seeds else []
    draws, prompts, responses = (2, 10, 12) if quick else (DRAWS, PROMPTS, RESPONSES)
    train, test = World("train", prompts, responses, seed=11), World("test", prompts, responses, seed=11)
    new = World("test", prompts, responses, seed=11, new_templates=True)
    variants = [v for v in offline_variants() if v.responses // v.group <= len(train.tasks)]
    offline = [{"offline": v.name, "shares": shares(train, test, v, draws)} for v in variants[: 3 if quick else None]]
    offline.append({"offline": "new wordings", "shares": shares(train, new, variants[0], draws)})
    offline += [{"unseen": task, "shares": unseen_family(train, test, task, draws)} for task in TASKS]
    return [*results, *offline]


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the possible gain, and differences from the base."""
    trained = [entry for entry in results if "name" in entry]
    overall = by_method(trained)
    base = next(entry["shares"] for entry in results if entry.get("offline") == BASE)
    return {
        "seeds": len(overall.get("equal", ())),
        "draws": len(base),
        "offline": {
            entry["offline"]: {
                **mean_interval(entry["shares"]),
                "minus_base": mean_interval([a - b for a, b in zip(entry["shares"], base, strict=True)]),
            }
            for entry in results
            if "offline" in entry
        },
        "unseen_families": {e["unseen"]: mean_interval(e["shares"]) for e in results if "unseen" in e},
        "trained": {
            name: {
                "utility": mean_interval(values),
                **share(overall, name),
                "minus_base": share(overall, name, other="anchor 0.0625"),
            }
            for name, values in overall.items()
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = ["| without training | share of the best static gain | minus the base |", "|---|---|---|"]
    for name, row in summary["offline"].items():
        lines.append(f"| {name} | {_interval(row)} | {_interval(row['minus_base'], signed=True)} |")
    lines += ["", "| unseen family | share of its own best static gain |", "|---|---|"]
    lines += [f"| {task} | {_interval(row)} |" for task, row in summary["unseen_families"].items()]
    if not summary["trained"]:
        return "\n".join(lines)
    lines += ["", "| trained | utility | share of the oracle's gain | minus the base |", "|---|---|---|---|"]
    for name, row in summary["trained"].items():
        minus = {**row["minus_base"], "mean": row["minus_base"]["share"]}
        lines.append(
            f"| {name} | {row['utility']['mean']:.3f} | {_interval({**row, 'mean': row['share']})} | "
            f"{_interval(minus, signed=True)} |"
        )
    return "\n".join(lines)


def _interval(row: dict[str, Any], signed: bool = False) -> str:
    mean = f"{row['mean']:+.2f}" if signed else f"{row['mean']:.2f}"
    return f"{mean} [{row['low']:.2f}, {row['high']:.2f}]"
