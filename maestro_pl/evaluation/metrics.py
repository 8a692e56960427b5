"""Means over prompts with bootstrap intervals, per task: what ``validate`` and ``test`` report."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import PromptKey, PromptRecords
from maestro_pl.rollout import Rollout
from maestro_pl.run.ranks import gathered, names_of_all_ranks

ALL = "all"


class EvaluationTable(Metric):
    """Collects one value a prompt for every metric, and gives means with intervals per task and over all prompts.

    The prompt is the unit of resampling, since the responses of a group are not independent. Values are NaN where a
    metric does not apply to a prompt.

    Args:
        confidence: of the intervals.
        resamples: of the percentile bootstrap.
        seed: of the bootstrap, so that a table can be made again.

    Attributes:
        records: the values of every prompt behind the last table; empty where the prompts' keys were not given.
    """

    full_state_update = False

    def __init__(self, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> None:
        super().__init__()
        self.confidence, self.resamples, self.seed = confidence, resamples, seed
        self.task_names: list[str] = []
        self.metric_names: list[str] = []
        self.records = PromptRecords()
        self._texts: dict[int, str] = {}
        self.add_state("entries", default=[], dist_reduce_fx="cat")  # rows of (task, metric, place, value, key)
        self.entries: list[Tensor] | Tensor

    def update(
        self,
        tasks_N: list[str],
        values: dict[str, Tensor],
        places_N: list[int] | None = None,
        keys_N: list[PromptKey] | None = None,
    ) -> None:
        """Add N prompts.

        Args:
            tasks_N: the task of each prompt.
            values: for every metric a float tensor of N values.
            places_N: where each prompt stands in the data; a prompt that two ranks were given, to make their batches
                equal, then counts once. Default: all different.
            keys_N: what each prompt is called in every run, for ``records``.

        Raises:
            UserError: a task is called ``all``, the name of the row over every task.
        """
        if ALL in tasks_N:
            raise UserError(
                f"A task is called {ALL!r}, the name of the row over all tasks: rename it under data.sources."
            )
        self.task_names += [task for task in dict.fromkeys(tasks_N) if task not in self.task_names]
        self.metric_names += [name for name in values if name not in self.metric_names]
        assert isinstance(self.entries, list)
        seen = sum(len(entry) for entry in self.entries)
        places = torch.tensor([-1 - seen - i for i in range(len(tasks_N))] if places_N is None else places_N)
        tasks = torch.tensor([_stable_id(task) for task in tasks_N])
        keys = torch.tensor([-1] * len(tasks_N) if keys_N is None else [key.number for key in keys_N])
        self._texts |= {key.number: key.text for key in keys_N or ()}
        for name, values_N in values.items():
            metric = torch.full_like(tasks, _stable_id(name))
            columns = (tasks, metric, places, values_N.cpu(), keys)
            self.entries.append(torch.stack([column.double() for column in columns], dim=1).to(self.device))

    def compute(self) -> list[dict[str, Any]]:
        """One row ``{task, metric, mean, low, high, n}`` per task and metric; task ``all`` is over every prompt."""
        rows: list[dict[str, Any]] = []
        joined = self.entries if isinstance(self.entries, Tensor) else torch.cat([torch.zeros(0, 5), *self.entries])
        entries = _first_of_each_place(joined.cpu().double())
        tasks, metrics = sorted(names_of_all_ranks(self.task_names)), names_of_all_ranks(self.metric_names)
        self._keep_records(entries, tasks, metrics)
        for task in [*tasks, ALL]:
            for metric in metrics:
                chosen = entries[:, 1] == _stable_id(metric)
                if task != ALL:
                    chosen &= entries[:, 0] == _stable_id(task)
                values = entries[chosen, 3]
                values = values[~values.isnan()]
                if len(values):
                    low, high = bootstrap_interval(values.numpy(), self.confidence, self.resamples, self.seed)
                    rows.append(
                        {"task": task, "metric": metric, "mean": float(values.mean()), "low": low, "high": high}
                        | {"n": len(values)}
                    )
        return rows

    def reset(self) -> None:
        """Forget the prompts; ``records`` stays until the next table."""
        super().reset()
        self._texts = {}

    def _keep_records(self, entries: Tensor, tasks: list[str], metrics: list[str]) -> None:
        texts = {key: text for part in gathered(self._texts) for key, text in part.items()}
        self.records = PromptRecords(
            entries[entries[:, 4] >= 0],
            {_stable_id(task): task for task in tasks},
            {_stable_id(metric): metric for metric in metrics},
            texts,
        )


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
    verifiable = sum(scores.spec.pass_at_k for scores in rollout.rewards.values())
    for name, scores in rollout.rewards.items():
        masked = torch.where(scores.mask_B, scores.values_B.double(), torch.nan)
        values[f"reward/{name}"] = masked.view(-1, size).nanmean(1)
        for extra, numbers in scores.metrics.items():
            values[f"reward/{name}/{extra}"] = numbers.double().view(-1, size).nanmean(1)
        if scores.spec.pass_at_k:
            own = "" if verifiable == 1 else f"/{name}"
            values |= {f"{key}{own}": numbers for key, numbers in pass_at_k_values(masked.view(-1, size)).items()}
    if rollout.weights_BK is not None:
        judged_B1 = rollout.weights_BK.sum(1, keepdim=True) > 0  # a response without any reward has no weights
        weights_BK = torch.where(judged_B1, rollout.weights_BK, torch.nan)
        for index, name in enumerate(rollout.weight_names):
            values[f"weights/{name}"] = weights_BK[:, index].view(-1, size).nanmean(1)
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


def _stable_id(name: str) -> int:
    """The same number on every rank, whatever it has seen so far; exact in float64."""
    return zlib.crc32(name.encode())


def _first_of_each_place(entries: Tensor) -> Tensor:
    """Drop repetitions of (task, metric, place)."""
    kept = {tuple(row[:3]): i for i, row in reversed(list(enumerate(entries.tolist())))}
    return entries[sorted(kept.values())]
