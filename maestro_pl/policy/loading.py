"""Loading a causal LM, its tokenizer and its adapters, with a sentence where that fails."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from maestro_pl.errors import UserError
from maestro_pl.run.paths import sandbox_model
from maestro_pl.run.pretrained import NotLoaded, pretrained_model, pretrained_tokenizer

ADAPTER = "default"
REFERENCE_ADAPTER = "reference"
SANDBOX = "sandbox"

#: Ways to initialise adapters that also change the weights of the base.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class LoRA:
    """Low-rank adapters, handed to PEFT's ``LoraConfig``.

    Attributes:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r (alpha / sqrt(r) with rsLoRA).
        dropout: dropout in front of the adapters, live in the update only.
        target_modules: which linear layers; ``all-linear`` is every one but the output head.
        use_rslora: rank-stabilised scale (arXiv 2312.03732).
        use_dora: weight-decomposed adapters (arXiv 2402.09353).
        dtype: of the adapters, their gradients and their optimizer's states. ``bfloat16`` halves them and rounds small
            updates away: use it with a learning rate of 1e-4 or more.
        options: anything else that ``LoraConfig`` takes.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    options: dict[str, Any] = field(default_factory=dict)


def eos_token_ids(tokenizer: Any, base: Any) -> list[int]:
    """Every id that ends a response: the union of the tokenizer's, the model's and its generation config's."""
    ids: set[int] = set()
    for owner in (tokenizer, base.config, getattr(base, "generation_config", None)):
        eos = getattr(owner, "eos_token_id", None)
        ids.update(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    return sorted(ids)


def resolve_model(model: str) -> str:
    """The folder of the packaged policy for ``sandbox``; anything else is a hub id or folder already."""
    return str(sandbox_model("policy")) if model == SANDBOX else model


def load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """Load a tokenizer, padding on the left; a UserError names what could not be loaded."""
    try:
        tokenizer = pretrained_tokenizer(name, trust_remote_code)
    except NotLoaded as error:
        raise UserError(_not_loaded("tokenizer", name, error)) from error
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(name: str, **options: Any) -> Any:
    """Load a causal LM; a UserError names what could not be loaded. Options that are None are left out."""
    from transformers import AutoModelForCausalLM

    try:
        model = pretrained_model(
            AutoModelForCausalLM, name, **{key: value for key, value in options.items() if value is not None}
        )
    except NotLoaded as error:
        raise UserError(_not_loaded("causal language model", name, error)) from error
    model.config.use_cache = False
    return model


def checkpoint_activations(model: Any) -> None:
    """Compute the activations of every layer anew in the backward pass instead of keeping them."""
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases, which warn at the other
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _not_loaded(what: str, name: str, error: NotLoaded) -> str:
    kind = "folder" if Path(name).exists() else "hub id"
    return (
        f"No {what} could be loaded from the {kind} {name!r} ({error}): give a folder made by save_pretrained or a hub id that "
        "this machine can reach under model.policy.model."
    )


def peft_config(lora: LoRA) -> Any:
    """PEFT's own configuration of these adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
        **lora.options,
    )


def changes_base(lora: LoRA | None) -> str | None:
    """The way in which these adapters are initialised if it changes the weights of the base, or None."""
    given = {} if lora is None else lora.options
    init = str(given.get("init_lora_weights", True)).lower()
    if init.startswith(BASE_CHANGING_INITS):
        return init
    return "kasa" if given.get("kasa_config") is not None else None


def without_computed_init(lora: LoRA) -> LoRA:
    """The same adapters, not initialised from the weights beneath them."""
    if isinstance(lora.options.get("init_lora_weights"), str):
        return replace(lora, options={**lora.options, "init_lora_weights": True})
    return lora


def belongs_to(name: str, adapter: str) -> bool:
    """Whether a parameter of this name is part of an adapter, which PEFT says with one of the name's parts."""
    return adapter in name.split(".")


def with_adapters(base: Any, lora: LoRA) -> Any:
    """Put trainable adapters on a base; a UserError says what PEFT did not like."""
    from peft import get_peft_model

    try:
        model = get_peft_model(base, peft_config(lora), adapter_name=ADAPTER)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"PEFT refused these LoRA settings ({str(error).splitlines()[0]}): see model.policy.lora."
        ) from error
    cast_adapters(model, lora)
    return model


def cast_adapters(model: Any, lora: LoRA) -> None:
    """Give every adapter the dtype that is asked for; PEFT makes them float32."""
    if lora.dtype == "float32":
        return
    for name, parameter in model.named_parameters():
        if belongs_to(name, ADAPTER) or belongs_to(name, REFERENCE_ADAPTER):
            parameter.data = parameter.data.to(getattr(torch, lora.dtype))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that no optimizer can move."""
    copy = deepcopy(model).eval()
    return copy.requires_grad_(False)
