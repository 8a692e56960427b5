"""Folders as a run leaves them, written without a run."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

#: Texts that must never do anything where they are shown.
NASTY = (
    "<script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 2">',
    "[click](javascript:window.pwned=3) ![i](http://127.0.0.1:9/x.png)",
    "[bold]rich[/bold] [link=http://x]y[/link]",
    "\x1b[31mred\x1b[0m \u202eturned\u202c",
    "'\"><svg onload=window.pwned=4>{{ 7 * 7 }}{% raw %}",
    "$\\href{javascript:window.pwned=5}{x}$ <iframe src=javascript:window.pwned=6></iframe>",
)
TASKS = ("arithmetic", "story")
REWARDS = {"format": 0.2, "length": 0.3, "preference": 0.5}


def write_run(
    folder: Path, steps: int = 6, group_size: int = 4, nasty: bool = False, exact: bool = True, seed: int = 0
) -> Path:
    """A whole run: config, metrics, weights, evaluations, findings, and recorded responses whose rewards add up."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    bad = (lambda n: NASTY[n % len(NASTY)]) if nasty else (lambda n: "")
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(steps, bad(0))), encoding="utf-8")
    metrics = [
        {"step": s - 1, "reward/scalar": -0.5 + s / steps, "reward/format": s / steps, "reward/format_std": 0.1,
         "policy/kl": 0.01 * s}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    _write_csv(folder / "metrics.csv", metrics)
    weights = [
        {"step": s, "task": task, "reward": name, "mean": weight, "std": 0.05, "entropy": 1.0, "n": 8}
        for s in range(steps)
        for task in ("all", *TASKS)
        for name, weight in REWARDS.items()
    ]
    _write_csv(folder / "weights.csv", weights)
    evaluations = [
        {"step": s, "task": task, "metric": f"reward/{name}", "mean": s / steps, "low": s / steps - 0.1,
         "high": s / steps + 0.1, "n": 12}
        for s in (0, steps)
        for task in (*TASKS, "all")
        for name in REWARDS
    ]  # fmt: skip
    _write_csv(folder / "val_metrics.csv", evaluations)
    finding = {
        "key": "dead_groups",
        "step": 2,
        "text": f"60 % of the groups teach nothing {bad(1)}",
        "advice": "Sample more.",
    }
    (folder / "health.json").write_text(json.dumps({"healthy": False, "findings": [finding]}), encoding="utf-8")
    write_responses(folder / "rollouts.jsonl", range(1, steps + 1), group_size, nasty, exact, draw)
    return folder


def write_responses(
    path: Path,
    steps: range,
    group_size: int = 4,
    nasty: bool = False,
    exact: bool = True,
    draw: random.Random | None = None,
) -> None:
    """Append a group a task and step; the group of ``story`` at even steps is dead, one response is cut off."""
    draw = draw or random.Random(0)
    with path.open("a", encoding="utf-8") as file:
        for step in steps:
            for number, task in enumerate(TASKS):
                bad = NASTY[(step + number) % len(NASTY)] if nasty else ""
                prompt = f"{task} prompt {step} {bad}"
                dead = task == "story" and step % 2 == 0
                rows = [_record(step, number, task, prompt, i, bad, dead, draw) for i in range(group_size)]
                _finish(rows, exact)
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _record(
    step: int, number: int, task: str, prompt: str, i: int, bad: str, dead: bool, draw: random.Random
) -> dict[str, Any]:
    normal = dict.fromkeys(REWARDS, 0.0) if dead else {name: draw.gauss(0, 1) for name in REWARDS}
    texts = (f"**Answer** {i} is $x^{i}$. {bad}", "", "שלום עולם", f"word {step} " * 30)
    return {
        "step": step, "prompt": prompt, "response": texts[i % 4], "group": number, "task": task, "reference": "42",
        "finish_reason": "length" if step == 3 and i == 1 else "stop", "length": 10 + i,
        "rewards": {**{name: 10 * value for name, value in normal.items()}, "utility": 0.5}, "normalized": normal,
        "weights": dict(REWARDS), "advantage_by": "group", "noted": {"format": {"why": bad}},
    }  # fmt: skip


def _finish(rows: list[dict[str, Any]], exact: bool) -> None:
    for row in rows:
        row["reward"] = sum(row["weights"][name] * row["normalized"][name] for name in REWARDS)
    values = [row["reward"] for row in rows]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    for row in rows:
        row["advantage"] = (row["reward"] - mean) / (std + 1e-4) if std > 0 else 0.0
        if not exact:
            del row["normalized"]


def _config(steps: int, bad: str) -> dict[str, Any]:
    rewards = [{"class_path": f"callbacks.{name.title()}Reward", "init_args": {"name": name}} for name in REWARDS]
    return {
        "method": "grpo", "seed_everything": 0, "trainer": {"max_steps": 2 * steps},
        "model": {"policy": {"class_path": "maestro_pl.LoRAPolicy", "init_args": {"model": f"sandbox {bad}"}},
                  "weigher": {"class_path": "maestro_pl.Conductor"}, "meta": {"learner": "ridge"}},
        "data": {"sources": ["sandbox"], "batch_size": 2}, "rollout": {"group_size": 4}, "rewards": rewards,
    }  # fmt: skip


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
