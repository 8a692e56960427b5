"""Laying ragged rows out in a rectangle, and cutting many rows into forward passes of a bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PaddedRows:
    """Prompts padded on the left, responses on the right.

    Attributes:
        ids, attention_mask, position_ids: int64 (B, P + R).
        before_T, inside_T, last_B: as in :class:`maestro_pl.policy.packing.PackedGroups`, positions in the flattened
            rectangle.
    """

    ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    before_T: Tensor
    inside_T: Tensor
    last_B: Tensor


def pad_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int, device: torch.device
) -> PaddedRows:
    """Lay out rows so that every response starts in the same column; masks come from the lengths, never from ids."""
    left, right = max(len(p) for p in prompts), max(len(r) for r in responses)
    ids = torch.full((len(prompts), left + right), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        begin, end = left - len(prompt), left + len(response)
        ids[row, begin:end] = torch.tensor([*prompt, *response], dtype=torch.long)
        mask[row, begin:end] = 1
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    inside = torch.zeros_like(mask, dtype=torch.bool)
    inside[:, left:] = mask[:, left:].bool()
    inside_T = inside.flatten().nonzero().squeeze(1)
    last_B = torch.arange(len(prompts)) * ids.shape[1] + left + torch.tensor([len(r) for r in responses]) - 1
    tensors = (ids, mask, position_ids, inside_T - 1, inside_T, last_B)
    return PaddedRows(*(tensor.to(device) for tensor in tensors))


def row_slices(prompt_lengths: list[int], response_lengths: list[int], max_tokens: int | None) -> list[slice]:
    """Consecutive rows such that each slice, padded, has at most ``max_tokens`` tokens (one row at least)."""
    if max_tokens is None:
        return [slice(0, len(prompt_lengths))]
    slices, begin, left, right = [], 0, 0, 0
    for row, (prompt, response) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        left, right = max(left, prompt), max(right, response)
        if row > begin and (row + 1 - begin) * (left + right) > max_tokens:
            slices.append(slice(begin, row))
            begin, left, right = row, prompt, response
    return [*slices, slice(begin, len(prompt_lengths))]


def greedy_slices(tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Consecutive items whose tokens add up to at most ``max_tokens`` (one item at least)."""
    slices: list[list[int]] = []
    used = 0
    for item, size in enumerate(tokens):
        if not slices or used + size > max_tokens:
            slices.append([])
            used = 0
        slices[-1].append(item)
        used += size
    return slices


def token_index(lengths_B: Tensor, rows: Sequence[int]) -> Tensor:
    """Positions in the ``_T`` tensors of the tokens of these responses, in this order."""
    ends = lengths_B.cumsum(0)
    return torch.cat([torch.arange(int(ends[row] - lengths_B[row]), int(ends[row])) for row in rows])
