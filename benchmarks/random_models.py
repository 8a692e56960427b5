"""Policies with random weights, made from a config: published shapes without a download, quantised layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from maestro_pl.policy.policy import LoRAPolicy


class RandomPolicy(LoRAPolicy):
    """A :class:`LoRAPolicy` on a base of random weights.

    Args:
        config: transformers' config of the base.
        device: on which it is made; only one layer at a time is there in 16 bits.
        kwargs: of :class:`LoRAPolicy`; the tokenizer is the sandbox's unless one is given.
    """

    def __init__(self, config: Any, device: str = "cpu", **kwargs: Any) -> None:
        vars(self)["shape"] = (config, device)
        super().__init__("sandbox", **kwargs)

    def load_base(self, **options: Any) -> Any:
        """The random base."""
        config, device = vars(self)["shape"]
        return random_base(config, options["dtype"], options.get("quantization_config"), device)


@torch.no_grad()
def random_base(config: Any, dtype: torch.dtype, quantization: Any, device: str) -> Any:
    """A causal LM of this config on ``device``, its linear layers quantised if ``quantization`` is a BitsAndBytesConfig."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator(device=device).manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantization is not None:
        from transformers.integrations import replace_with_bnb_linear

        model = replace_with_bnb_linear(model, ["lm_head"], quantization)
        model.is_loaded_in_8bit = bool(quantization.load_in_8bit)
        model.is_loaded_in_4bit = bool(quantization.load_in_4bit)
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in made:
                width = dtype if type(parameter) is not nn.Parameter else parameter.dtype
                values = torch.randn(parameter.shape, dtype=width, device=device, generator=generator) * 0.02
                values = values + 1 if parameter.dim() == 1 and name == "weight" else values
                made[id(parameter)] = _like(parameter, values, module, device)
            module._parameters[name] = made[id(parameter)]
        if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            _refill(model, module, config, device)
    model.config.use_cache = False
    return model.eval()


def _like(parameter: Any, values: torch.Tensor, module: nn.Module, device: str) -> Any:
    """A parameter of the same class on the device; those of bitsandbytes quantise on the way."""
    import bitsandbytes as bnb

    if isinstance(parameter, bnb.nn.Params4bit):
        made = bnb.nn.Params4bit(
            values, requires_grad=False, compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type, quant_storage=parameter.quant_storage, module=module,
        )  # fmt: skip
        return made.to(device)
    if isinstance(parameter, bnb.nn.Int8Params):
        return bnb.nn.Int8Params(values.half(), requires_grad=False, has_fp16_weights=False).to(device)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _refill(model: nn.Module, module: nn.Module, config: Any, device: str) -> None:
    """Make a module without parameters anew, for its computed buffers (rotary frequencies)."""
    name = next(n for n, m in model.named_modules() if m is module)
    owner: Any = type(module)
    model.set_submodule(name, owner(config=config).to(device))
