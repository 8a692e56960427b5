"""Paired statistics of two runs on the same prompts: pure functions on arrays.

Shapes: ``_P`` prompts, ``_S`` seeds of a run. NaN marks a metric that does not apply.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from maestro_pl.errors import UserError

TestName: TypeAlias = Literal["auto", "mcnemar", "wilcoxon", "sign"]
CHUNK = 2_000_000  # numbers of a block of resamples held at once


@dataclass(frozen=True)
class Mean:
    """The mean of one run: its interval is over prompts and seeds.

    Attributes:
        n: prompts to which the metric applies.
        seeds: of the run in which it applies to some prompt.
        seed_sd: standard deviation of their means; None with one such seed.
    """

    run: str
    metric: str
    task: str
    mean: float
    low: float
    high: float
    n: int
    seeds: int
    seed_sd: float | None


@dataclass(frozen=True)
class SeedMean:
    """The mean of one seed of a run.

    Attributes:
        seed: that its evaluation says it was made with, or its place among the run's seeds where two say the same.
        n: prompts to which the metric applies.
    """

    run: str
    seed: int
    metric: str
    task: str
    mean: float
    n: int


@dataclass(frozen=True)
class Difference:
    """``run`` minus ``baseline`` on the prompts that both have.

    Attributes:
        n: pairs.
        unpaired: prompts to which the metric applies in only one of the two.
        p: of ``test``, two-sided.
        p_holm: corrected for all comparisons of this metric, see ``holm``.
        effect: Cohen's d_z, the mean of the differences over their standard deviation; None where that is 0.
        better: prompts where the run is higher; ``worse`` lower; ``ties`` neither.
    """

    run: str
    baseline: str
    metric: str
    task: str
    difference: float
    low: float
    high: float
    n: int
    unpaired: int
    test: str
    p: float
    p_holm: float
    effect: float | None
    better: int
    worse: int
    ties: int


def mean_of(
    run: str, metric: str, task: str, values_NS: Any, resamples: int, seed: int, confidence: float
) -> Mean | None:
    """The mean over prompts and seeds; None where the metric applies to no prompt."""
    applies_N = ~np.isnan(values_NS).all(axis=1)
    values_NS = values_NS[applies_N]
    if not len(values_NS):
        return None
    point = float(seed_means(values_NS).mean())
    draws = bootstrap_means(values_NS, None, resamples, _generator(seed, task, metric))
    low, high = _interval(draws, confidence, point)
    means_S = np.nanmean(values_NS[:, ~np.isnan(values_NS).all(axis=0)], axis=0)
    count = len(means_S)
    spread = float(means_S.std(ddof=1)) if count > 1 else None
    return Mean(run, metric, task, point, low, high, len(values_NS), count, spread)


def means_of_seeds(run: str, seeds: Sequence[int], metric: str, task: str, values_NS: Any) -> list[SeedMean]:
    """The mean over prompts of each seed by itself; a seed in which the metric applies to no prompt has none."""
    applied_S = (~np.isnan(values_NS)).sum(axis=0)
    return [
        SeedMean(run, seed, metric, task, float(np.nanmean(values_NS[:, place])), int(applied_S[place]))
        for place, seed in enumerate(seeds)
        if applied_S[place]
    ]


def difference_of(
    names: tuple[str, str],
    metric: str,
    task: str,
    values_NS: Any,
    baseline_NS: Any,
    test: TestName,
    resamples: int,
    seed: int,
    confidence: float,
) -> Difference | None:
    """Compare two runs on one task; None where no prompt has both.

    Args:
        names: of the run and of the baseline.
        metric: its name.
        task: its name.
        values_NS: of the run; the rows are the same prompts as those of ``baseline_NS``.
        baseline_NS: of the baseline, which may have another number of seeds.
        test: ``auto`` takes McNemar where every value of both runs is 0 or 1, and Wilcoxon otherwise.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        confidence: of the interval.

    Raises:
        UserError: McNemar is asked for and the values are not 0 and 1.
    """
    has_N, baseline_has_N = ~np.isnan(values_NS).all(axis=1), ~np.isnan(baseline_NS).all(axis=1)
    both_N = has_N & baseline_has_N
    if not both_N.any():
        return None
    values_NS, baseline_NS = values_NS[both_N], baseline_NS[both_N]
    values_N, baseline_N = seed_means(values_NS), seed_means(baseline_NS)
    difference_N = values_N - baseline_N
    point = float(difference_N.mean())
    draws = bootstrap_means(values_NS, baseline_NS, resamples, _generator(seed, task, metric))
    low, high = _interval(draws, confidence, point)
    used, p = paired_test(values_N, baseline_N, test)
    difference_N = settled(difference_N)
    spread = float(difference_N.std(ddof=1)) if len(difference_N) > 1 else 0.0
    return Difference(
        *names,
        metric=metric,
        task=task,
        difference=point,
        low=low,
        high=high,
        n=int(both_N.sum()),
        unpaired=int((has_N ^ baseline_has_N).sum()),
        test=used,
        p=p,
        p_holm=p,
        effect=point / spread if spread > 0 else None,
        better=int((difference_N > 0).sum()),
        worse=int((difference_N < 0).sum()),
        ties=int((difference_N == 0).sum()),
    )


def seed_means(values_NS: Any) -> Any:
    """The mean of each prompt over the seeds in which the metric applies to it."""
    return np.nanmean(values_NS, axis=1)


def settled(difference_N: Any) -> Any:
    """The differences, 0 where they are nothing but rounding, so that equal means count as ties."""
    return np.where(np.abs(difference_N) <= 1e-12, 0.0, difference_N)


def bootstrap_means(values_NS: Any, baseline_NS: Any | None, resamples: int, generator: np.random.Generator) -> Any:
    """Bootstrap draws of the mean, or of the difference of two paired means.

    Hierarchical: every draw takes P prompts with replacement, the same for both runs, and S seeds with replacement,
    independently for each run, since the seeds of two runs have nothing in common. With one seed only prompts are
    drawn.

    Args:
        values_NS: of the run; every row has a value.
        baseline_NS: of the other run, or None.
        resamples: draws.
        generator: of the draws.

    Returns:
        ``resamples`` numbers; NaN for a draw of prompts and seeds that has no value at all.
    """
    prompts = len(values_NS)
    block = max(1, CHUNK // prompts)
    draws = []
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        weights_RN = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=count).astype(np.float64)
        drawn = _weighted(values_NS, weights_RN, generator)
        draws.append(drawn if baseline_NS is None else drawn - _weighted(baseline_NS, weights_RN, generator))
    return np.concatenate(draws)


def _weighted(values_NS: Any, weights_RN: Any, generator: np.random.Generator) -> Any:
    """Means over prompts of the means over seeds, of the drawn seeds in which a value is there."""
    seeds = values_NS.shape[1]
    if seeds == 1:
        return weights_RN @ values_NS[:, 0] / weights_RN.sum(axis=1)
    weights_RS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(weights_RN)).astype(np.float64)
    has_NS = ~np.isnan(values_NS)
    if has_NS.all():  # the mean of means is one bilinear form
        return ((weights_RN @ values_NS) * weights_RS).sum(axis=1) / (weights_RN.sum(axis=1) * seeds)
    filled_NS = np.where(has_NS, values_NS, 0.0)
    means = []
    for weights_N, weights_S in zip(weights_RN, weights_RS, strict=True):
        total_N = has_NS @ weights_S
        seen = (total_N > 0) * weights_N
        sums = seen @ ((filled_NS @ weights_S) / np.maximum(total_N, 1))
        means.append(sums / seen.sum() if seen.any() else np.nan)
    return np.array(means)


def paired_test(values_N: Any, baseline_N: Any, test: TestName = "auto") -> tuple[str, float]:
    """The name of the test and its two-sided p-value.

    - ``mcnemar``: exact, for values that are 0 or 1: a binomial test of the discordant pairs.
    - ``wilcoxon``: signed ranks of the differences, zeros left out; exact for few pairs without ties.
    - ``sign``: a binomial test of how many differences are positive, ties left out.

    Raises:
        UserError: McNemar is asked for and the values are not 0 and 1.
    """
    binary = bool(np.isin(values_N, (0, 1)).all() and np.isin(baseline_N, (0, 1)).all())
    if test == "mcnemar" and not binary:
        raise UserError("--test mcnemar needs values of 0 and 1 (one seed a run); take wilcoxon or sign.")
    difference_N = settled(values_N - baseline_N)
    better, worse = int((difference_N > 0).sum()), int((difference_N < 0).sum())
    if test == "mcnemar" or (test == "auto" and binary):
        from statsmodels.stats.contingency_tables import mcnemar  # type: ignore[import-untyped]

        ones, others = values_N > 0.5, baseline_N > 0.5
        table = [[int((ones & others).sum()), better], [worse, int((~ones & ~others).sum())]]
        return "mcnemar", float(mcnemar(table, exact=True).pvalue)
    if better + worse == 0:
        return "sign" if test == "sign" else "wilcoxon", 1.0
    if test == "sign":
        from scipy.stats import binomtest

        return "sign", float(binomtest(better, better + worse).pvalue)
    from scipy.stats import wilcoxon

    return "wilcoxon", float(wilcoxon(difference_N[difference_N != 0]).pvalue)


def holm(rows: Sequence[Difference], all_tasks: str = "all") -> list[Difference]:
    """The rows with ``p_holm``.

    A family is all comparisons of one metric, over tasks and over pairs of runs. The rows over all tasks are a family
    of their own, over the pairs, since they repeat what the tasks say.
    """
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

    out = list(rows)
    for family in dict.fromkeys((row.metric, row.task == all_tasks) for row in rows):
        places = [i for i, row in enumerate(rows) if (row.metric, row.task == all_tasks) == family]
        corrected = multipletests([rows[i].p for i in places], method="holm")[1]
        for i, p in zip(places, corrected, strict=True):
            out[i] = replace(rows[i], p_holm=float(p))
    return out


def _interval(draws: Any, confidence: float, point: float) -> tuple[float, float]:
    low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return (point, point) if high - low <= 1e-12 else (float(low), float(high))


def _generator(seed: int, task: str, metric: str) -> np.random.Generator:
    """The draws of a task and metric do not depend on what else is compared."""
    return np.random.default_rng([seed, zlib.crc32(f"{task}\0{metric}".encode())])
