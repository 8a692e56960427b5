"""Means over prompts with bootstrap intervals, per task: what ``validate`` and ``test`` report."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import PromptKey, PromptRecords, PromptValue
from maestro_pl.rollout import Rollout
from maestro_pl.run.ranks import gathered

ALL = "all"
_APART = 1 << 40  # more prompts than a rank evaluates


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
        super().__init__(sync_on_compute=False)  # names and texts are no tensors: `compute` gathers them itself
        self.confidence, self.resamples, self.seed = confidence, resamples, seed
        self.records = PromptRecords()
        self._metrics: dict[str, None] = {}  # in the order in which they were first seen, also before a reset
        self._texts: dict[int, str] = {}
        self._entries: list[PromptValue] = []

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
        self._metrics |= dict.fromkeys(values)
        seen = len(self._entries)
        places = (
            [-1 - seen - i for i in range(len(tasks_N))] if places_N is None else [int(place) for place in places_N]
        )
        keys = [None] * len(tasks_N) if keys_N is None else [key.number for key in keys_N]
        self._texts |= {key.number: key.text for key in keys_N or ()}
        for name, values_N in values.items():
            columns = zip(tasks_N, places, values_N.double().tolist(), keys, strict=True)
            self._entries += [PromptValue(task, name, place, value, key) for task, place, value, key in columns]

    def compute(self) -> list[dict[str, Any]]:
        """One row ``{task, metric, mean, low, high, n}`` per task and metric; task ``all`` is over every prompt.

        Collective.
        """
        ranks = gathered((self._entries, self._metrics, self._texts))
        entries = _first_of_each_place([part for part, _, _ in ranks])
        if len(ranks) > 1:  # in the order that one rank would have had: the resamples are drawn by it
            entries.sort(key=lambda entry: entry.place)
        metrics = list(dict.fromkeys(name for _, names, _ in ranks for name in names))
        texts = {key: text for _, _, part in ranks for key, text in part.items()}
        self.records = PromptRecords([entry for entry in entries if entry.key is not None], metrics, texts)
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        for entry in entries:
            if not math.isnan(entry.value):
                values[entry.task, entry.metric].append(entry.value)
                values[ALL, entry.metric].append(entry.value)
        tasks = [*sorted({entry.task for entry in entries}), ALL]
        return [
            self._row(task, metric, values[task, metric])
            for task in tasks
            for metric in metrics
            if (task, metric) in values
        ]

    def reset(self) -> None:
        """Forget the prompts; ``records`` stays until the next table."""
        super().reset()
        self._entries, self._texts = [], {}

    def _row(self, task: str, metric: str, values: list[float]) -> dict[str, Any]:
        numbers = torch.tensor(values, dtype=torch.float64)
        low, high = bootstrap_interval(numbers.numpy(), self.confidence, self.resamples, self.seed)
        mean = float(numbers.mean())
        return {"task": task, "metric": metric, "mean": mean, "low": low, "high": high, "n": len(values)}


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


def _first_of_each_place(ranks: list[list[PromptValue]]) -> list[PromptValue]:
    """The entries of all ranks, without repetitions of (task, metric, place); places below 0 are a rank's own."""
    first: dict[tuple[str, str, int], PromptValue] = {}
    for rank, entries in enumerate(ranks):
        for entry in entries:
            own = entry if entry.place >= 0 else entry._replace(place=entry.place - rank * _APART)
            first.setdefault((own.task, own.metric, own.place), own)
    return list(first.values())
