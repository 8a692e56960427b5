"""Studies without people: files of answers, and raters of known skill."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from maestro_pl.study.answers import read_systems
from maestro_pl.study.plan import Study, new_study
from maestro_pl.study.store import Click


def write_answers(path: Path, texts: Mapping[tuple[str, str], str], rewards: Mapping[str, float] | None = None) -> Path:
    """A file of answers: (task, prompt) to the answer, all with the same rewards."""
    rows = [
        {"task": task, "prompt": prompt, "reference": None, "response": text, "rewards": dict(rewards or {})}
        for (task, prompt), text in texts.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def study_of(
    folder: Path,
    systems: int = 2,
    prompts: int = 20,
    tasks: Sequence[str] = ("story",),
    raters: int = 3,
    **options: Any,
) -> Study:
    """A study whose systems answer with their own name."""
    files = [
        write_answers(
            folder / f"{'ABCDE'[number]}.jsonl",
            {
                (task, f"{task} prompt {n}"): f"{'ABCDE'[number]} {task} {n}"
                for task in tasks
                for n in range(prompts + 3)
            },
        )
        for number in range(systems)
    ]
    settings = {"per_task": prompts, "raters": raters, "votes": None, "checks": None, "seed": 0, **options}
    return new_study(read_systems([str(file) for file in files]), **settings)


def clicks_of(
    study: Study,
    strengths: Sequence[float],
    seed: int = 0,
    ties: float = 0.0,
    careless: Sequence[str] = (),
    prompt_spread: float = 0.0,
    rater_spread: float = 0.0,
) -> list[Click]:
    """What raters click who prefer by Bradley-Terry.

    Args:
        study: the plan.
        strengths: of the systems, log-odds.
        seed: of the draws.
        ties: the share of "no difference", whatever is shown.
        careless: raters who click at random, at checks too.
        prompt_spread: standard deviation of what each prompt adds to a strength.
        rater_spread: the same of each rater.
    """
    draw = random.Random(seed)
    of_prompt = [[draw.gauss(0, prompt_spread) for _ in strengths] for _ in study.prompts]
    clicks = []
    for rater in study.raters:
        of_rater = [draw.gauss(0, rater_spread) for _ in strengths]
        for place, item in enumerate(rater.items):
            known = [s + p + r for s, p, r in zip(strengths, of_prompt[item.prompt], of_rater, strict=True)]
            if rater.name in careless:
                choice = draw.choice(["left", "right", "tie"])
            elif item.check is not None:
                choice = item.check
            elif draw.random() < ties:
                choice = "tie"
            else:
                choice = "left" if draw.random() < 1 / (1 + exp(known[item.right] - known[item.left])) else "right"
            clicks.append(Click(rater.name, place, choice, 5.0 + place, "2026-01-01T00:00:00+00:00"))
    return clicks
