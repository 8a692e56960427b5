"""Means over prompts with bootstrap intervals, per task: what ``validate`` and ``test`` report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from maestro_pl.rollout import Rollout

ALL = "all"


class EvaluationTable(Metric):
    """Collects one value a prompt for every metric, and gives means with intervals per task and over all prompts.

    The prompt is the unit of resampling, since the responses of a group are not independent. Values are NaN where a
    metric does not apply to a prompt.

    Args:
        confidence: of the intervals.
        resamples: of the percentile bootstrap.
        seed: of the bootstrap, so that a table can be made again.
    """

    full_state_update = False

    def __init__(self, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> None:
        super().__init__()
        self.confidence, self.resamples, self.seed = confidence, resamples, seed
        self.task_names: list[str] = []
        self.metric_names: list[str] = []
        self.add_state("entries", default=[], dist_reduce_fx="cat")  # rows of (task, metric, value)
        self.entries: list[Tensor] | Tensor

    def update(self, tasks_N: list[str], values: dict[str, Tensor]) -> None:
        """Add N prompts: the task of each, and for every metric a float tensor of N values."""
        task_ids = torch.tensor([_index(self.task_names, task) for task in tasks_N], dtype=torch.float64)
        for name, values_N in values.items():
            metric_ids = torch.full_like(task_ids, _index(self.metric_names, name))
            assert isinstance(self.entries, list)
            self.entries.append(torch.stack([task_ids, metric_ids, values_N.double().cpu()], dim=1))

    def compute(self) -> list[dict[str, Any]]:
        """One row ``{task, metric, mean, low, high, n}`` per task and metric; task ``all`` is over every prompt."""
        rows: list[dict[str, Any]] = []
        entries = torch.cat(self.entries) if isinstance(self.entries, list) and self.entries else torch.zeros(0, 3)
        for task in [*sorted(self.task_names), ALL]:
            for metric_id, metric in enumerate(self.metric_names):
                chosen = entries[:, 1] == metric_id
                if task != ALL:
                    chosen &= entries[:, 0] == self.task_names.index(task)
                values = entries[chosen, 2]
                values = values[~values.isnan()]
                if len(values):
                    low, high = bootstrap_interval(values.numpy(), self.confidence, self.resamples, self.seed)
                    rows.append(
                        {"task": task, "metric": metric, "mean": float(values.mean()), "low": low, "high": high}
                        | {"n": len(values)}
                    )
        return rows


def bootstrap_interval(values: Any, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; a point where all values are equal or there is only one."""
    if len(values) < 2 or float(np.ptp(values)) == 0.0:
        return float(values[0]), float(values[0])
    from scipy.stats import bootstrap

    result = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def rollout_values(rollout: Rollout) -> dict[str, Tensor]:
    """What one rollout says of each of its N prompts: the mean over the group of every reward, weight and length."""
    size = rollout.group_size
    values: dict[str, Tensor] = {}
    for name, scores in rollout.rewards.items():
        masked = torch.where(scores.mask_B, scores.values_B.double(), torch.nan)
        values[f"reward/{name}"] = masked.view(-1, size).nanmean(1)
        if scores.spec.pass_at_k:
            values |= pass_at_k_values(masked.view(-1, size))
    if rollout.weights_BK is not None:
        for index, name in enumerate(rollout.weight_names):
            values[f"weights/{name}"] = rollout.weights_BK[:, index].view(-1, size).mean(1)
    values["length/mean"] = rollout.lengths_B.double().view(-1, size).mean(1)
    truncated_B = torch.tensor([float(reason == "length") for reason in rollout.finish_reasons])
    values["length/truncated"] = truncated_B.view(-1, size).mean(1)
    return values


def pass_at_k_values(correct_NG: Tensor) -> dict[str, Tensor]:
    """Unbiased pass@k of each prompt for k = 1, 2, 4, ... up to G (Chen et al. 2021, arXiv 2107.03374).

    Args:
        correct_NG: 1 correct, 0 not, NaN where it does not apply (the whole prompt is then NaN).
    """
    size = correct_NG.shape[1]
    values = {}
    k = 1
    while k <= size:
        values[f"pass@{k}"] = torch.tensor(
            [math.nan if row.isnan().any() else pass_at_k(size, int((row > 0.5).sum()), k) for row in correct_NG]
        )
        k *= 2
    return values


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k responses, drawn from n of which ``correct`` are right, is right."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _index(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)
