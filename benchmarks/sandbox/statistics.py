"""Shares of the oracle's gain, with paired intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

Table = Mapping[str, Sequence[float]]  # method to one utility a seed, in the order of the seeds


def ratio_interval(
    gain: Sequence[float], whole: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """mean(gain) / mean(whole) and its interval: the paired t interval of gain - ratio * whole (delta method).

    Args:
        gain: one number a seed.
        whole: one number a seed, of the same seeds.
        confidence: of the interval.

    Returns:
        Ratio, low and high; the interval is (-inf, inf) with fewer than two seeds.
    """
    a, b = np.asarray(gain, dtype=float), np.asarray(whole, dtype=float)
    ratio = float(a.mean() / b.mean())
    if len(a) < 2:
        return ratio, -math.inf, math.inf
    error = float((a - ratio * b).std(ddof=1) / math.sqrt(len(a)) / abs(b.mean()))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(a) - 1)) * error
    return ratio, ratio - half, ratio + half


def share(
    table: Table, method: str, base: str = "equal", best: str = "oracle", other: str | None = None
) -> dict[str, float]:
    """Share of the oracle's gain over equal weights, or, with ``other``, the difference of two methods' shares."""
    zero, top = np.asarray(table[base]), np.asarray(table[best])
    against = zero if other is None else np.asarray(table[other])
    ratio, low, high = ratio_interval(list(np.asarray(table[method]) - against), list(top - zero))
    return {"share": round(ratio, 4), "low": round(low, 4), "high": round(high, 4)}


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """Mean over seeds with its t interval."""
    mean, low, high = ratio_interval(values, [1.0] * len(values), confidence)
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}


def by_method(results: Sequence[dict[str, Any]], task: str = "all") -> dict[str, list[float]]:
    """Utilities of each method, seed by seed."""
    rows: dict[str, dict[int, float]] = {}
    for entry in results:
        rows.setdefault(entry["name"], {})[entry["seed"]] = entry["utility"][task]
    return {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in rows.items()}
