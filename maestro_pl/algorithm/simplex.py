"""Weights on the simplex: of an action, of estimates, of any numbers of at least 0. Pure functions."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Action: TypeAlias = Literal["one_hot", "mix", "soft"]

SHRINK = 0.05  # added to the diagonal of the correlations: they are estimates
SWEEPS = 60  # of coordinate descent


def best_correlating_weights(covariance_BK: Tensor, correlation_KK: Tensor, mask_BK: Tensor) -> Tensor:
    """The weights whose weighed reward correlates best with the value (Eq. 13).

    Of z-scored rewards with correlations C and covariances q with the value, the combination w of at least 0 that
    correlates best with the value is, up to its scale, the one that minimises w' C w / 2 - w' q; found by coordinate
    descent.

    Args:
        covariance_BK: float q.
        correlation_KK: C.
        mask_BK: bool, which rewards apply.

    Returns:
        weights_BK, at least 0 and adding up to 1 over the applicable rewards; equal ones where no reward helps.
    """
    device = covariance_BK.device
    # small, and each sweep is looked at: on the host, which would wait for an accelerator every time
    covariance_BK, correlation_KK, mask_BK = covariance_BK.float().cpu(), correlation_KK.cpu(), mask_BK.cpu()
    system_KK = correlation_KK + SHRINK * torch.eye(len(correlation_KK))
    weights_BK = torch.zeros_like(covariance_BK)
    for _ in range(SWEEPS):
        before_BK = weights_BK.clone()
        for k in range(covariance_BK.shape[1]):
            slack_B = covariance_BK[:, k] - weights_BK @ system_KK[:, k]
            weights_BK[:, k] = (weights_BK[:, k] + slack_B / system_KK[k, k]).clamp(min=0.0) * mask_BK[:, k]
        if bool((weights_BK - before_BK).abs().max() <= 1e-6 * weights_BK.max()):
            break
    total_B1 = weights_BK.sum(1, keepdim=True)
    equal_BK = mask_BK.float() / mask_BK.sum(1, keepdim=True).clamp(min=1)
    return torch.where(total_B1 > 1e-8, weights_BK / total_B1.clamp(min=1e-8), equal_BK).to(device)


def on_simplex(weights_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """Drop the rewards that do not apply and rescale the rest to add up to 1.

    Where every applicable weight is 0, the applicable rewards share equally; where none applies, the row is 0.
    """
    kept_BK = torch.where(mask_BK, weights_BK, torch.zeros_like(weights_BK))
    empty_B1 = kept_BK.sum(-1, keepdim=True) <= 0
    kept_BK = torch.where(empty_B1, mask_BK.to(kept_BK.dtype), kept_BK)
    return kept_BK / kept_BK.sum(-1, keepdim=True).clamp(min=torch.finfo(kept_BK.dtype).tiny)


def action_weights(probabilities_BK: Tensor, action_B: Tensor, action: Action, mix_rate: float) -> Tensor:
    """w(h, a): the weights that an action stands for (Eq. 3): ``one_hot`` is e_a, ``mix`` leans pi(.|h) towards it."""
    emphasis_BK = torch.nn.functional.one_hot(action_B, probabilities_BK.shape[-1]).to(probabilities_BK.dtype)
    if action == "one_hot":
        return emphasis_BK
    return (1.0 - mix_rate) * probabilities_BK + mix_rate * emphasis_BK


def group_weights(weights_BK: Tensor, mask_BK: Tensor, group_size: int) -> Tensor:
    """Each response weighed by the mean weights of its group, rescaled over the rewards that apply to it."""
    mean_NK = weights_BK.view(-1, group_size, weights_BK.shape[1]).mean(1)
    return on_simplex(mean_NK.repeat_interleave(group_size, 0), mask_BK)
