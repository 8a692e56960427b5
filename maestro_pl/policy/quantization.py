"""A base in 4 or 8 bits: bitsandbytes through transformers' ``BitsAndBytesConfig``, under PEFT's adapters."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from maestro_pl.errors import UserError, check_choice

Quantization: TypeAlias = Literal["none", "nf4", "fp4", "int8"]
DType: TypeAlias = Literal["bfloat16", "float32", "float16"]


def loading_options(
    kind: Quantization, compute_dtype: torch.dtype, double: bool, given: dict[str, Any]
) -> dict[str, Any]:
    """What ``from_pretrained`` needs to quantise the linear layers of a base while it loads them.

    The output head, the embeddings and the norms keep the base's dtype. On a GPU each process loads onto its own
    device.

    Args:
        kind: ``nf4`` and ``fp4`` are 4 bits a weight (QLoRA, arXiv 2305.14314), ``int8`` is LLM.int8 (arXiv
            2208.07339).
        compute_dtype: the 4-bit layers dequantise to this and compute in it.
        double: quantise the scales of the 4-bit blocks too, which saves 0.4 bits a weight.
        given: the user's own options, which may not quantise as well.

    Raises:
        UserError: an unknown kind, two quantisations, or no bitsandbytes.
    """
    check_choice("model.policy.quantization", kind, Quantization)
    if kind == "none":
        return {}
    if "quantization_config" in given:
        raise UserError(
            f"model.policy.quantization={kind} and model_options.quantization_config both quantise the base: give one of them."
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.policy.quantization={kind} needs the package bitsandbytes, which is not installed here."
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    options: dict[str, Any] = {"quantization_config": config}
    if torch.cuda.is_available() and "device_map" not in given:
        rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or torch.cuda.current_device()
        options["device_map"] = {"": int(rank) % torch.cuda.device_count()}
    return options


def quantized_kind(base: Any) -> Quantization:
    """How the linear layers of a loaded base are stored."""
    if getattr(base, "is_loaded_in_8bit", False):
        return "int8"
    if getattr(base, "is_loaded_in_4bit", False):
        kinds = {str(m.weight.quant_type) for m in base.modules() if type(m).__name__ == "Linear4bit"}
        return "fp4" if kinds == {"fp4"} else "nf4"
    return "none"


def stored_quantization(base: Any) -> str | None:
    """How the weights of a loaded base are quantised, by whatever method, or None."""
    quantizer = getattr(base, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if method is not None:
        return str(getattr(method, "value", method))
    kind = quantized_kind(base)
    return None if kind == "none" else kind


def keep_differentiable(base: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    It repacks at the first evaluation, in place, and its forward on repacked weights has no backward: after one
    rollout, no gradient would reach the layers below.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def dequantized(base: Any) -> dict[str, torch.Tensor]:
    """The weights that the quantised linear layers of a base stand for, in float32, by the name of the layer."""
    import bitsandbytes as bnb

    weights = {}
    for name, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weights[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            state = module.state if module.state.CB is not None else module.weight
            weights[name] = state.CB.float() * (state.SCB.float() / 127.0).unsqueeze(1)
    return weights
