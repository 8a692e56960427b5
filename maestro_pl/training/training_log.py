"""What one training step logs besides its losses; the keys are those of docs/metrics.md."""

from __future__ import annotations

import torch

from maestro_pl.algorithm import Metrics
from maestro_pl.rollout import Rollout
from maestro_pl.run.ranks import gathered


def rollout_metrics(rollout: Rollout) -> Metrics:
    """Rewards, token entropy and lengths of one rollout."""
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
    metrics["length/mean"] = rollout.lengths_B.float().mean()
    metrics["length/truncated"] = sum(reason == "length" for reason in rollout.finish_reasons) / len(rollout)
    return metrics


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Mean of each value over the ranks that have it; ranks may have seen other tasks, and so other rewards."""
    parts = gathered(values)
    if len(parts) == 1:
        return values
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: float(torch.tensor([p[name] for p in parts if name in p]).mean()) for name in names}
