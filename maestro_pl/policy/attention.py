"""One attention function for rows that share a prompt, reached through transformers' attention interface.

A forward pass over groups is one flat sequence of tokens, (1, T): projections, MLPs and adapters see every token once
and no padding. Only attention must know which token belongs to which response; a :class:`Layout`, handed to the model
as the keyword argument ``layout``, does that part. Without a layout the function is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

GROUPED = "grouped_sdpa"
# anything else that a model hands to its attention changes what the attention must compute
REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


class Layout(Protocol):
    """Knows which tokens of a flat sequence attend to which."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the layer.
            query: (1, heads, T, head size).
            key: (1, key heads, T, head size).
            value: as the key.
            scale: of the scores; None is 1 / sqrt(head size).
            dropout: probability with which an attention weight is dropped.

        Returns:
            (1, T, heads, head size).
        """
        ...


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that a layout does not do."""


def install(model: Any) -> bool:
    """Let a transformers model take ``layout=`` where its attention goes through the attention interface.

    Returns:
        Whether it could be done; sliding windows, linear-attention layers and any attention but SDPA are left alone.
    """
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        windowed = set(layer_types) != {"full_attention"}
    else:
        windowed = getattr(config, "sliding_window", None) is not None
    own = config._attn_implementation
    if own == GROUPED:
        return True
    if windowed or own != "sdpa" or not model._can_set_attn_implementation():
        return False
    for module in (model, *model.modules()):
        module_config: Any = getattr(module, "config", None)
        if getattr(module_config, "_attn_implementation", None) == own:
            module_config._attn_implementation_internal = GROUPED
    return True


def _grouped_or(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if layout is None:
            result: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **kwargs)
            return result
        asked = [name for name in REFUSED if kwargs.get(name) is not None]
        if asked:
            raise UnsupportedAttentionError(f"{type(module).__name__} asks for {', '.join(asked)}")
        out = layout.attend(
            module.layer_idx, query, key, value, kwargs.get("scaling"), float(kwargs.get("dropout") or 0.0)
        )
        return out, None

    return forward


# at import, so that a policy that was pickled finds it
AttentionInterface.register(GROUPED, _grouped_or(AttentionInterface._global_mapping["sdpa"]))
AttentionMaskInterface.register(GROUPED, AttentionMaskInterface._global_mapping["sdpa"])


def no_mask(device: torch.device) -> Tensor:
    """An attention mask that transformers takes as given and that :class:`Layout` never reads."""
    return torch.zeros(1, 1, 1, 1, device=device)


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float) -> Tensor:
    """Causal attention in which the last query is the last key: (B, heads, R, D) on (B, key heads, L, D), L >= R."""
    rows, heads, queries, size = query.shape
    keys = key.shape[2]
    if queries == keys:
        grouped = heads != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    # heads that share a key head become further queries: no kernel is fast with a mask and grouped heads
    shared = heads // key.shape[1]
    out = F.scaled_dot_product_attention(
        query.reshape(rows, -1, shared * queries, size),
        key,
        value,
        attn_mask=mask.repeat(shared, 1),
        dropout_p=dropout,
        scale=scale,
    )
    return out.reshape(rows, heads, queries, -1)  # some kernels lay heads out behind queries
