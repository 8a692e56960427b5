"""How the Conductor's cost grows with the policy's width d, the rewards K, the responses B, and the labelled responses W.

Called by ``python -m benchmarks.conductor_overhead --grid``. The Conductor alone, on drawn numbers: ``weigh_ms`` is what
weighing a training batch of B responses takes (``norm: center``, ``action: soft``), ``fit_ms`` one fit of
``RidgeLearner`` on W labelled responses, of which ``shared`` have the same context (1: the Conductor reads each response;
8: it reads the prompts), ``form`` the form in which it was solved, ``fit_mib`` the memory that it takes beyond what was
there before, and ``remembered_mib`` what is kept between fits (and in every checkpoint). ``growth`` is the exponent of
the time from one size to the next: 1 linear, 3 cubic. Times are processor time of one thread on the CPU, wall time on
cuda.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import measured, memory_mib
from maestro_pl.conductor import Decisions, MetaBuffer, RidgeLearner
from maestro_pl.conductor.conductor import Conductor

WIDTHS, REWARDS, ROWS = (576, 2048, 4096, 8192), (2, 5, 20), (16, 128, 1024)
WINDOWS = (100, 300, 1000, 3000, 10_000)
GROUP = 8
SHARED = (1, GROUP)


def grid(
    device: str,
    widths: Sequence[int] = WIDTHS,
    rewards: Sequence[int] = REWARDS,
    rows: Sequence[int] = ROWS,
    windows: Sequence[int] = WINDOWS,
    times: int = 3,
) -> dict[str, Any]:
    """Measure every combination; a fit of many responses is measured once.

    Returns:
        ``weigh``: rows ``{d, K, B, ms}``; ``fit``: rows ``{d, K, shared, W, form, ms, mib, remembered_mib, growth}``.
    """
    weigh = [
        {"d": width, "K": count, "B": batch, "ms": weigh_ms(device, width, count, batch, times)}
        for width, count, batch in product(widths, rewards, rows)
    ]
    fits = []
    for width, count, shared in product(widths, rewards, SHARED):
        found = [fit_cost(device, width, count, window, shared, times if window <= 1000 else 1) for window in windows]
        growths = [None, *(growth(one, two) for one, two in pairwise(found))]
        fits += [{**cost, "growth": exponent} for cost, exponent in zip(found, growths, strict=True)]
    return {"weigh": weigh, "fit": fits}


def growth(smaller: dict[str, Any], larger: dict[str, Any]) -> float:
    """The exponent p of time ~ W^p between two fits."""
    return round(math.log(larger["ms"] / smaller["ms"]) / math.log(larger["W"] / smaller["W"]), 2)


def made(device: str, width: int, rewards: int) -> Conductor:
    """A soft Conductor that centres what it reads."""
    conductor = Conductor(action="soft", norm="center")
    conductor.build(width, [f"reward_{k}" for k in range(rewards)])
    return conductor.to(device)


def weigh_ms(device: str, width: int, rewards: int, rows: int, times: int) -> float:
    """Milliseconds to weigh a training batch."""
    conductor = made(device, width, rewards)
    h_BD, scores_BK = torch.randn(rows, width, device=device), torch.randn(rows, rewards, device=device)
    mask_BK = torch.ones(rows, rewards, dtype=torch.bool, device=device)

    def weigh() -> Any:
        with torch.no_grad():
            return conductor(h_BD, scores_BK, mask_BK, True)

    weigh()
    return milliseconds(device, weigh, times)


def fit_cost(device: str, width: int, rewards: int, window: int, shared: int, times: int) -> dict[str, Any]:
    """One fit on a full window."""
    conductor, learner = made(device, width, rewards), RidgeLearner(window=window)
    conductor.be_fitted(learner.mapping, covariances=False)
    buffer = MetaBuffer()
    buffer.add(labelled(device, width, rewards, window, shared))
    learner.remember(buffer.joined(), 1)
    buffer.clear(0)
    kept = sum(values.numel() * values.element_size() for values in learner.remembered.values())
    forget_peak(device)
    before, _ = memory_mib(device)
    forms: list[Any] = []
    ms = milliseconds(device, lambda: forms.append(getattr(learner.fit(conductor), "form", None)), times)
    _, peak = memory_mib(device)
    return {
        "d": width, "K": rewards, "shared": shared, "W": window, "form": forms[-1], "ms": ms,
        "mib": round(max(peak - before, 0.0), 1), "remembered_mib": round(kept / 2**20, 2),
    }  # fmt: skip


def labelled(device: str, width: int, rewards: int, count: int, shared: int) -> Decisions:
    """Drawn decisions whose values depend on the rewards."""
    z_BK = torch.randn(count, rewards, device=device)
    return Decisions(
        torch.randn(math.ceil(count / shared), width, device=device).repeat_interleave(shared, 0)[:count],
        torch.ones(count, rewards, dtype=torch.bool, device=device),
        torch.full((count,), -1, device=device),
        torch.zeros(count, device=device),
        torch.arange(count, device=device) // GROUP,
        0,
        credit_BK=z_BK.clone(),
        value_B=z_BK[:, 0] + 0.5 * torch.randn(count, device=device),
        z_BK=z_BK,
    )


def milliseconds(device: str, action: Callable[[], Any], times: int) -> float:
    """Median over some calls."""
    clock = "wall" if device == "cuda" else "cpu"
    return round(1000 * statistics.median(getattr(measured(device, action)[0], clock) for _ in range(times)), 3)


def forget_peak(device: str) -> None:
    """Let the peak of memory begin anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (reset := Path("/proc/self/clear_refs")).exists():
        reset.write_text("5")
