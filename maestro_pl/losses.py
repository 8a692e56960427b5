"""The GRPO objective over a ragged batch of response tokens. Pure functions: tensors in, loss and metrics out.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

LossType: TypeAlias = Literal["dapo", "grpo", "dr_grpo", "bnpo"]
LOSS_TYPES = get_args(LossType)


@dataclass(frozen=True)
class TokenBatch:
    """What the policy loss needs of the response tokens of one micro-batch, laid end to end.

    Attributes:
        logps_T: log-probability under the policy being trained (with gradient).
        old_logps_T: the same under the policy that sampled the responses.
        advantages_T: advantage of the response that the token belongs to.
        weights_T: share of each token in the loss, from :func:`token_weights` of the whole batch.
        ref_logps_T: log-probability under the reference, or None without a KL term.
    """

    logps_T: Tensor
    old_logps_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor
    ref_logps_T: Tensor | None = None


def token_weights(loss_type: LossType, lengths_B: Tensor, active_B: Tensor, max_new_tokens: int) -> Tensor:
    """How much each response token counts, so that the loss is ``(weights_T * per_token_loss_T).sum()``.

    The weights are those of the whole batch; cut into micro-batches they still add up to the same loss.

    Args:
        loss_type: ``grpo`` averages over the tokens of each response, then over responses (arXiv 2402.03300);
            ``bnpo`` and ``dapo`` average over all active tokens (arXiv 2503.14476; on several ranks the module turns
            ``dapo``'s count into the global one); ``dr_grpo`` divides by B times the token limit (arXiv 2503.20783).
        lengths_B: int64 response lengths, whole batch.
        active_B: bool, False for responses that do not train the policy (for instance truncated ones).
        max_new_tokens: the limit that ``dr_grpo`` divides by.

    Returns:
        float32 weights_T for all responses, 0 for those of inactive ones.
    """
    responses = lengths_B.numel()
    active_lengths_B = lengths_B * active_B
    if loss_type == "grpo":
        weight_B = 1.0 / (responses * lengths_B.clamp(min=1).double())
    elif loss_type == "dr_grpo":
        weight_B = torch.full((responses,), 1.0 / (responses * max_new_tokens), dtype=torch.double)
    else:
        tokens = int(active_lengths_B.sum())
        weight_B = torch.full((responses,), 1.0 / max(tokens, 1), dtype=torch.double)
    return (weight_B * active_B).repeat_interleave(lengths_B).float()


def grpo_loss(
    batch: TokenBatch, *, clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate with an optional KL penalty (Eq. 7; GRPO, arXiv 2402.03300, Eq. 3).

    Per token: -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl_coef * k3, with rho = pi / pi_old.

    Returns:
        The loss (a scalar with gradient), and sums over tokens of detached quantities: ``clip`` (tokens whose ratio is
        clipped on the side that matters) and ``kl`` (k3 estimate in nats).
    """
    ratio_T = torch.exp(batch.logps_T - batch.old_logps_T)
    clipped_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high)
    per_token_T = -torch.minimum(ratio_T * batch.advantages_T, clipped_T * batch.advantages_T)
    low_T = (ratio_T < 1.0 - clip_low) & (batch.advantages_T < 0)
    high_T = (ratio_T > 1.0 + clip_high) & (batch.advantages_T > 0)
    sums = {"clip": (low_T | high_T).float().sum()}
    if batch.ref_logps_T is not None:
        kl_T = k3(batch.logps_T, batch.ref_logps_T)
        per_token_T = per_token_T + kl_coef * kl_T
        sums["kl"] = kl_T.detach().sum()
    return (batch.weights_T * per_token_T).sum(), sums


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(pi || ref) from samples of pi: exp(d) - d - 1, d = ref - logp (Eq. 8)."""
    delta = ref_logps - logps
    return torch.exp(delta) - delta - 1.0


def segment_sum(values_T: Tensor, lengths_B: Tensor) -> Tensor:
    """Sum of the tokens of each response: values_T (ragged) to float values_B."""
    lengths_B = lengths_B.to(values_T.device)
    rows_T = torch.repeat_interleave(torch.arange(lengths_B.numel(), device=values_T.device), lengths_B)
    return torch.zeros(lengths_B.numel(), dtype=values_T.dtype, device=values_T.device).index_add(0, rows_T, values_T)
