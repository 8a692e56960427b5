"""Rewarded soups: several runs of one base averaged into one, without training (Rame et al. 2023, arXiv 2306.04488)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.export.trained_run import DEFAULT_MODEL, TrainedRun
from maestro_pl.policy.loading import ADAPTER, LoRA, changes_base

FACTORS = tuple(f".lora_{factor}.{ADAPTER}.weight" for factor in "AB")


def average_runs(
    runs: Sequence[TrainedRun], shares: Sequence[float] | None = None, any_base: bool = False
) -> TrainedRun:
    """Theta = sum_k lambda_k theta_k of several runs, as one run.

    Of adapters it is the updates that are averaged, sum_k lambda_k s_k B_k A_k, exactly: the factors are stacked, so the
    rank is the sum of the runs' ranks. (Averaged one by one, factors of different runs would be multiplied with each
    other.) Of fully trained models it is the parameters.

    Args:
        runs: at least two, of one base and the same target modules; the config is that of the first.
        shares: lambda, at least 0, rescaled to add up to 1; None: the same for all.
        any_base: do not compare the names of the bases.

    Raises:
        UserError: the runs or shares cannot be averaged.
    """
    weights = _shares(len(runs), shares)
    first, names = runs[0], [str(run.folder) for run in runs]
    for run in runs[1:]:
        _check_alike(first, run, any_base)
    soup = tuple(zip(names, weights, strict=True))
    saved = {**first.saved, "policy_steps": sum(run.steps for run in runs)}
    if first.lora is None:
        state = {name: _mean([run.state[name] for run in runs], weights) for name in first.state}
        return replace(first, state=state, saved=saved, soup=soup)
    loras = [_plain(run) for run in runs]
    rank = sum(lora.r for lora in loras)
    whole = replace(loras[0], r=rank, alpha=rank, use_rslora=False, dropout=0.0)  # a scale of 1
    scales = [weight * _scale(lora) for weight, lora in zip(weights, loras, strict=True)]
    state = {name: _stacked(name, [run.state[name] for run in runs], scales) for name in first.state}
    return replace(first, state=state, soup=soup, **_with_lora(first, saved, whole))


def _shares(count: int, shares: Sequence[float] | None) -> list[float]:
    if count < 2:
        raise UserError(f"--average got {count} run(s): give at least two.")
    given = [1.0] * count if shares is None else list(shares)
    if len(given) != count or not all(0 <= share < math.inf for share in given) or not 0 < sum(given) < math.inf:
        raise UserError(
            f"--shares {given} with {count} runs: give each a number of at least 0, not all zero, and a finite sum."
        )
    return [share / sum(given) for share in given]


def _check_alike(first: TrainedRun, run: TrainedRun, any_base: bool) -> None:
    bases = [str(one.policy.get("model") or DEFAULT_MODEL) for one in (first, run)]
    if bases[0] != bases[1] and not any_base:
        raise UserError(
            f"{first.folder} was trained on {bases[0]} and {run.folder} on {bases[1]}: average runs of one base, or give "
            "--base where both names mean it."
        )
    if (first.lora is None) != (run.lora is None):
        raise UserError(
            f"One of {first.folder} and {run.folder} trained adapters, the other the whole model: average alike runs."
        )
    if differing := sorted(set(first.state) ^ set(run.state)):
        raise UserError(
            f"{first.folder} and {run.folder} did not train the same layers ({differing[0]} is in one only): average runs with "
            "the same target_modules."
        )
    for name, tensor in first.state.items():
        other = run.state[name].shape
        here = [size for axis, size in enumerate(tensor.shape) if axis != _rank_axis(name)]
        if here != [size for axis, size in enumerate(other) if axis != _rank_axis(name)]:
            raise UserError(
                f"{name} has the shape {tuple(tensor.shape)} in {first.folder} and {tuple(other)} in {run.folder}: average "
                "runs of one base."
            )


def _rank_axis(name: str) -> int | None:
    """Along which a factor may differ from run to run."""
    return next((axis for axis, ending in enumerate(FACTORS) if name.endswith(ending)), None)


def _plain(run: TrainedRun) -> LoRA:
    """The adapters, if B A is all that they are."""
    lora = run.lora
    assert lora is not None
    other = next((name for name in sorted(run.state) if not name.endswith(FACTORS)), None)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if lora.options.get(key)]
    init = changes_base(lora)
    reason = "they are DoRA" if lora.use_dora else f"{other} was trained beside them" if other else None
    reason = reason or (f"they have a {patterns[0]}" if patterns else f"{init} changed their base" if init else None)
    if reason is not None:
        raise UserError(
            f"The adapters of {run.folder} are not plain LoRA ({reason}): export each run with --to merged, and average those."
        )
    return lora


def _scale(lora: LoRA) -> float:
    return lora.alpha / math.sqrt(lora.r) if lora.use_rslora else lora.alpha / lora.r


def _stacked(name: str, factors: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """All A one below the other; all B side by side, each times its share and scale. Float32, so that nothing is rounded."""
    if name.endswith(FACTORS[0]):
        return torch.cat([factor.float() for factor in factors])
    return torch.cat([factor.float() * scale for factor, scale in zip(factors, scales, strict=True)], dim=1)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True))
    return torch.as_tensor(total).to(tensors[0].dtype)


def _with_lora(run: TrainedRun, saved: dict[str, Any], lora: LoRA) -> dict[str, Any]:
    """Config and saved settings of a run with other adapters."""
    config = deepcopy(run.config)
    policy = config.setdefault("model", {}).setdefault("policy", {})
    arguments = policy.setdefault("init_args", {}) if "class_path" in policy else policy
    arguments["lora"] = asdict(lora)
    settings = dict(saved.get("settings", {}))
    if "policy.base" in settings:  # see TrainedRun.policy
        settings |= {f"policy.lora.{name}": value for name, value in asdict(lora).items()}
    return {"config": config, "saved": {**saved, "settings": settings}}
