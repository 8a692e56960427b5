"""What one training step logs besides its losses; the keys are those of docs/metrics.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maestro_pl.algorithm import Mean, Metrics
from maestro_pl.rollout import Rollout
from maestro_pl.run.ranks import gathered


def rollout_metrics(rollout: Rollout) -> Metrics:
    """Rewards and lengths of one rollout, over all its responses and by task, token entropy, and what its engine says."""
    metrics: Metrics = {}
    for name, scores in rollout.rewards.items():
        applicable = scores.values_B[scores.mask_B]
        if applicable.numel():
            metrics[f"reward/{name}"] = applicable.mean()
            metrics[f"reward/{name}_std"] = applicable.std(correction=0)
        for extra, values in scores.metrics.items():
            metrics[f"reward/{name}/{extra}"] = values.nanmean()
    if rollout.scalar_B is not None and not bool(rollout.scalar_B.isnan().all()):
        metrics["reward/scalar"] = rollout.scalar_B.nanmean()
    if rollout.entropies_T is not None:
        metrics["policy/entropy"] = rollout.entropies_T.mean()
    metrics |= {f"engine/{name}": value for name, value in rollout.engine.items()}
    length_B = rollout.lengths_B.float()
    cut_B = torch.tensor([reason == "length" for reason in rollout.finish_reasons]).float()
    metrics["length/mean"], metrics["length/truncated"] = length_B.mean(), cut_B.mean()
    tasks = rollout.tasks if "task" in rollout.columns else []
    for task in dict.fromkeys(tasks):
        rows_B = torch.tensor([each == task for each in tasks])
        for name, scores in rollout.rewards.items():
            applicable = scores.values_B[scores.mask_B & rows_B]
            if applicable.numel():  # a further number of a reward that is called as the task is keeps its key
                metrics.setdefault(f"reward/{task}/{name}", applicable.mean())
        metrics[f"length/{task}/mean"], metrics[f"length/{task}/truncated"] = (
            length_B[rows_B].mean(),
            cut_B[rows_B].mean(),
        )
    return metrics


def joined_metrics(metrics: Metrics, rng: dict[str, Any]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What the ranks measured as one: means over all that they are means of. Collective.

    Ranks may have seen other tasks, and so have other metrics; one that is not a :class:`Mean` counts alike on every rank
    that has it.

    Returns:
        The numbers, the same on every rank, and the random state of each rank, which travels along.
    """
    parts_of = {name: (m.total, m.count) if isinstance(m, Mean) else (m,) for name, m in metrics.items()}
    numbers = iter(_read([part for found in parts_of.values() for part in found]))
    own: dict[str, Mean | float] = {}
    for name, value in metrics.items():
        own[name] = Mean(next(numbers), next(numbers)) if isinstance(value, Mean) else next(numbers)
    parts = gathered((own, rng))
    if len(parts) == 1:
        return {name: float(value) for name, value in own.items()}, [rng]
    joined: dict[str, float] = {}
    for name in dict.fromkeys(name for values, _ in parts for name in values):
        found = [values[name] for values, _ in parts if name in values]
        means = [value if isinstance(value, Mean) else Mean(value, 1.0) for value in found]
        joined[name] = float(Mean(sum(float(m.total) for m in means), sum(float(m.count) for m in means)))
    return joined, [state for _, state in parts]


def _read(values: list[Any]) -> list[float]:
    """Numbers of the host's; it waits once for all that an accelerator has."""
    there = [value for value in values if isinstance(value, Tensor) and value.device.type != "cpu"]
    read = iter(torch.stack([value.detach().float().reshape(()) for value in there]).tolist() if there else ())
    waiting = set(map(id, there))
    return [next(read) if id(value) in waiting else float(value) for value in values]
