"""Log-probabilities and entropies from hidden states, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**24  # of logits held at once: 64 MiB in float32, three times over while they are worked on


def token_logps(
    hidden_TD: Tensor,
    head: nn.Linear,
    targets_T: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    softcap: float | None = None,
    sizes_only: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under softmax(head(hidden) / temperature), and the entropy of that distribution.

    Tokens go through the head in chunks. The gradient with respect to the hidden state is worked out while a chunk's
    probabilities are at hand, (onehot - p) W / temperature, and kept instead of the logits: (T, D) and not (T, V), and
    no second projection. A trained head (full-parameter training) has its logits recomputed in the backward.

    Args:
        hidden_TD: hidden states that predict the targets.
        head: the output projection, V x D.
        targets_T: int64 token ids.
        temperature: logits are divided by it.
        entropy: also give the entropies, without gradient.
        softcap: logits pass through softcap * tanh(. / softcap) first, as in Gemma 2.
        sizes_only: only what is allocated is asked for, as by ``maestro_pl.memory``: the chunks between the second and the
            last, which allocate what the second does, are left out, and the values are wrong.
        chunk_elements: logits held at once.

    Returns:
        float32 logps_T (with gradient) and float32 entropies_T in nats or None.
    """
    hidden_TD = hidden_TD.to(head.weight.dtype)
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_TD, weight = hidden_TD.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    parts = _parts(len(targets_T), max(1, chunk_elements // weight.shape[0]), sizes_only)
    apply: Any = _TokenLogps.apply
    with torch.autocast(hidden_TD.device.type, enabled=False):
        logps_T, entropies_T = apply(hidden_TD, weight, bias, targets_T, temperature, entropy, softcap, parts)
    return logps_T, entropies_T if entropy else None


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        entropy: bool,
        softcap: float | None,
        parts: list[slice],
    ) -> tuple[Tensor, Tensor]:
        tokens = len(targets_T)
        logps_T = torch.empty(tokens, dtype=torch.float32, device=hidden_TD.device)
        entropies_T = torch.empty(tokens if entropy else 0, dtype=torch.float32, device=hidden_TD.device)
        slopes_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        for part in parts:
            logits, slope = _logits(hidden_TD[part], weight_VD, bias_V, temperature, softcap, slopes_TD is not None)
            log_z = torch.logsumexp(logits, -1, keepdim=True)
            target = targets_T[part].unsqueeze(1)
            logps_T[part] = (logits.gather(1, target) - log_z).squeeze(1)
            if entropy:
                probabilities = torch.exp(logits - log_z)
                entropies_T[part] = log_z.squeeze(1) - torch.linalg.vecdot(probabilities, logits)
            if slopes_TD is not None:
                slopes_TD[part] = _slope(logits, log_z, target, slope, temperature).to(weight_VD.dtype) @ weight_VD
        ctx.settings = temperature, softcap, parts
        trained = ctx.needs_input_grad[1] or (bias_V is not None and ctx.needs_input_grad[2])
        ctx.save_for_backward(slopes_TD, *((hidden_TD, weight_VD, bias_V, targets_T) if trained else ()))
        ctx.mark_non_differentiable(entropies_T)
        return logps_T, entropies_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_T = grads[0]
        slopes_TD, *kept = ctx.saved_tensors
        grad_hidden = None if slopes_TD is None else (slopes_TD * grad_T.unsqueeze(1)).to(slopes_TD.dtype)
        grad_weight = grad_bias = None
        if kept:
            hidden_TD, weight_VD, bias_V, targets_T = kept
            temperature, softcap, parts = ctx.settings
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
            for part in parts:
                logits, slope = _logits(hidden_TD[part], weight_VD, bias_V, temperature, softcap, True)
                log_z = torch.logsumexp(logits, -1, keepdim=True)
                slopes = _slope(logits, log_z, targets_T[part].unsqueeze(1), slope, temperature)
                slopes = (slopes * grad_T[part].unsqueeze(1)).to(weight_VD.dtype)
                grad_weight += slopes.t() @ hidden_TD[part]
                if grad_bias is not None:
                    grad_bias += slopes.sum(0)
            grad_weight = grad_weight.to(weight_VD.dtype)
            grad_bias = None if bias_V is None or grad_bias is None else grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _parts(tokens: int, rows: int, sizes_only: bool) -> list[slice]:
    """The chunks, or of many the first two and the last: the second finds what the first left, and so do all after it."""
    parts = [slice(begin, begin + rows) for begin in range(0, tokens, rows)]
    return [*parts[:2], parts[-1]] if sizes_only and len(parts) > 3 else parts


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """float32 logits over temperature, and the derivative of the softcap where one is needed."""
    logits = F.linear(hidden, weight, bias).float()
    derivative = None
    if softcap is not None:
        bent = torch.tanh(logits / softcap)
        logits = bent * softcap
        derivative = 1 - bent.square() if slope else None
    return (logits if temperature == 1.0 else logits.div_(temperature)), derivative


def _slope(logits: Tensor, log_z: Tensor, target: Tensor, derivative: Tensor | None, temperature: float) -> Tensor:
    """Derivative of logp(target) by the raw logits: (onehot - p) / temperature; overwrites ``logits``."""
    slope = logits.sub_(log_z).exp_().neg_()
    slope.scatter_add_(1, target, torch.ones_like(target, dtype=slope.dtype))
    if temperature != 1.0:
        slope.div_(temperature)
    return slope if derivative is None else slope.mul_(derivative)
