"""The entropy reward: how spread the policy's next-token distributions were along a response."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

EntropyReduction: TypeAlias = Literal["mean", "sum"]
EntropyDirection: TypeAlias = Literal["minimize", "maximize"]


def response_entropy(entropies_T: Tensor, lengths_B: Tensor, reduction: EntropyReduction = "mean") -> Tensor:
    """Mean or sum of the token entropies of each response.

    Args:
        entropies_T: token entropies in nats, the responses laid end to end.
        lengths_B: int64 number of tokens of each response; they add up to T.
        reduction: ``mean`` over the tokens, or their ``sum`` (the trajectory form of EM-RL, arXiv 2505.15134).

    Returns:
        float32 (B) on the device of ``entropies_T``; NaN for a response without tokens.
    """
    lengths_B = lengths_B.to(entropies_T.device)
    rows_B = torch.arange(len(lengths_B), device=entropies_T.device)
    rows_T = torch.repeat_interleave(rows_B, lengths_B, output_size=len(entropies_T))
    total_B = entropies_T.new_zeros(len(lengths_B), dtype=torch.float32).index_add(0, rows_T, entropies_T.float())
    total_B = torch.where(lengths_B > 0, total_B, torch.full_like(total_B, torch.nan))
    return total_B / lengths_B if reduction == "mean" else total_B
