"""Drawing the next token of every row, and seeing whether it ends the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from maestro_pl.generation.engine import Sampling

BLOCK = 256  # tokens of the vocabulary that are summed before the sums are accumulated


@dataclass
class Drawn:
    """Tokens of A rows, their log-probabilities and the entropies in nats, both at the sampling temperature."""

    tokens: Tensor
    logps: Tensor
    entropies: Tensor


class Sampler:
    """Draws tokens by inverting the cumulative distribution at given uniform numbers.

    Args:
        sampling: how to draw.
        eos_token_ids: not drawn before ``min_new_tokens``.
        uniform_BL: float64 in [0, 1), one number for every row and step.
    """

    def __init__(self, sampling: Sampling, eos_token_ids: Sequence[int], uniform_BL: Tensor) -> None:
        self.sampling, self.uniform_BL = sampling, uniform_BL
        self.eos = torch.tensor(list(eos_token_ids), device=uniform_BL.device)
        self.early_V: Tensor | None = None  # True for tokens that end a response
        self.warpers: list[Any] = []  # in the order of `generate`
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self.warpers.append(MinPLogitsWarper(sampling.min_p))

    def draw(self, logits_AV: Tensor, rows_A: Tensor, step: int | Tensor) -> Drawn:
        """Draw token number ``step`` of these rows from float32 logits, which are overwritten.

        A step on the device, int64 of the shape (1,), leaves the host without a look at it.
        """
        greedy = self.sampling.temperature == 0
        if not greedy and self.sampling.temperature != 1:
            logits_AV.div_(self.sampling.temperature)
        top = logits_AV.amax(-1, keepdim=True)
        mass_AV = torch.exp(logits_AV - top)
        total = mass_AV.sum(-1, keepdim=True)
        log_z = top + total.log()
        entropies = log_z.squeeze(1) - torch.linalg.vecdot(mass_AV, logits_AV) / total.squeeze(1)
        scores = logits_AV
        early = step < self.sampling.min_new_tokens
        if len(self.eos) and (early if isinstance(step, int) else self.sampling.min_new_tokens):
            if self.early_V is None:
                self.early_V = torch.isin(torch.arange(logits_AV.shape[1], device=scores.device), self.eos)
            scores = scores.masked_fill(self.early_V & early, -torch.inf)
        if greedy:
            tokens = scores.argmax(-1)
        else:
            for warper in self.warpers:
                scores = warper(None, scores)
            if scores is not logits_AV:
                mass_AV = torch.exp(scores - scores.amax(-1, keepdim=True))
            tokens = invert_cdf(mass_AV, self.uniform_BL[rows_A, step])
        logps = (logits_AV.gather(1, tokens.unsqueeze(1)) - log_z).squeeze(1)
        return Drawn(tokens, logps, entropies)


def invert_cdf(mass_AV: Tensor, uniform_A: Tensor) -> Tensor:
    """The token at which the cumulated mass passes ``uniform`` of the whole.

    Sums of blocks are accumulated first and the chosen block after them, in float64: one pass over the vocabulary, and
    tails that a float32 sum of all tokens would swallow keep their share.

    Args:
        mass_AV: float, not negative, not normalised.
        uniform_A: float64 in [0, 1).

    Returns:
        int64 tokens_A; never one without mass.
    """
    vocabulary = mass_AV.shape[1]
    whole = vocabulary // BLOCK * BLOCK
    sums = mass_AV[:, :whole].view(len(mass_AV), -1, BLOCK).sum(-1)
    if whole < vocabulary:
        sums = torch.cat([sums, mass_AV[:, whole:].sum(-1, keepdim=True)], dim=1)
    blocks = sums.double()
    passed = blocks.cumsum(1)
    target = uniform_A.unsqueeze(1) * passed[:, -1:]
    block = _first_above(passed, target, blocks)
    left = target - (passed - blocks).gather(1, block)
    ids = block * BLOCK + torch.arange(BLOCK, device=mass_AV.device)
    inside = mass_AV.gather(1, ids.clamp(max=vocabulary - 1)).double().masked_fill(ids >= vocabulary, 0.0)
    return (block * BLOCK + _first_above(inside.cumsum(1), left, inside)).squeeze(1)


def _first_above(passed: Tensor, target: Tensor, mass: Tensor) -> Tensor:
    """First place whose cumulated mass is above the target; rounding at the end gives the last place with any mass."""
    places = torch.arange(mass.shape[1], device=mass.device)
    last = torch.where(mass > 0, places, 0).amax(1, keepdim=True)
    return torch.minimum(torch.searchsorted(passed, target, right=True), last)


class StopStrings:
    """Finds stop strings at the end of responses.

    Not transformers' StopStringCriteria: it finds "a" in the name of a special token such as <pad>.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # a character of a stop string is at most four byte tokens; the rest is room for a token that begins earlier
        self.tail = 4 * max((len(string) for string in self.strings), default=0) + 4

    def __bool__(self) -> bool:
        return bool(self.strings)

    def ends(self, response_ids: Tensor) -> Tensor:
        """Bool, one a row of int64 (rows, tokens so far): whether a stop string stands near its end."""
        tails = self.tokenizer.batch_decode(response_ids[:, -self.tail :], skip_special_tokens=True)
        found = [any(string in text for string in self.strings) for text in tails]
        return torch.tensor(found, device=response_ids.device)
