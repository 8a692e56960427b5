"""A shorter way through LoRA layers while nothing is learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor


@contextmanager
def folded_adapters(model: Any) -> Iterator[None]:
    """Compute plain LoRA layers as base(x) + (x A) (s B) in the base's own precision, for the length of the block.

    PEFT casts, drops out, multiplies, scales and adds in float32, one small operation each, which is most of a decoding
    step of a small model. Here the scale is folded into B and the sum into the product. Only for evaluation without
    gradients; layers that are more than plain LoRA (DoRA, biases, several adapters, merged weights) keep PEFT's
    forward.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("folded_adapters writes in place: use it under torch.no_grad().")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and _is_plain(module)]
    for layer in layers:
        layer.forward = _Folded(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


class _Folded:
    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.base = layer.base_layer
        name = layer.active_adapters[0]
        self.a, self.b = layer.lora_A[name].weight, layer.lora_B[name].weight
        self.scale = layer.scaling[name]
        self.factors: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.base(x, *args, **kwargs)
        if self.factors is None:
            self.factors = self.a.t().to(out.dtype), (self.b * self.scale).t().to(out.dtype).contiguous()
        down, up = self.factors
        if x.dtype != out.dtype:
            x = x.to(out.dtype)
        out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down, up)
        return out


def _is_plain(layer: Any) -> bool:
    names = layer.active_adapters
    return (
        len(names) == 1
        and names[0] in layer.lora_A
        and "forward" not in vars(layer)
        and not (layer.disable_adapters or layer.merged)
        and not getattr(layer, "lora_variant", {}).get(names[0])
        and not getattr(layer, "lora_bias", {}).get(names[0], False)
        and type(layer).__name__ in ("Linear", "Linear4bit", "Linear8bitLt")
    )
