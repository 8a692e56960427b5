"""A policy without weights: the run's own code on fake tensors, to see what it would allocate.

The model is built from its config alone, its adapters are PEFT's, and the forward and backward passes are those of the
update; only the numbers are missing. What is followed are the sizes of storages, so that the peak of an 8B model is
found in about a second on a laptop, and follows every change of the code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maestro_pl.errors import UserError
from maestro_pl.generation.cache import GroupCache
from maestro_pl.memory.live import LiveTensors
from maestro_pl.policy import attention
from maestro_pl.policy.head import token_logps
from maestro_pl.policy.loading import (
    ADAPTER,
    REFERENCE_ADAPTER,
    LoRA,
    belongs_to,
    cast_adapters,
    changes_base,
    checkpoint_activations,
    peft_config,
    without_computed_init,
)
from maestro_pl.policy.offload import LEAST_BYTES
from maestro_pl.policy.policy import ReferenceKind
from maestro_pl.policy.quantization import DType, Quantization
from maestro_pl.policy.scoring import Abilities, Scorer
from maestro_pl.policy.sharding import blocks

T = TypeVar("T")

SHORT = (2, 3)  # layers of the models that are followed in place of a long one
KEPT = 16  # shadows that are kept for the next estimate
BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale, and scales that share one, in bitsandbytes


@dataclass(frozen=True)
class ModelSetting:
    """What of a policy decides its memory; see :class:`maestro_pl.policy.policy.LoRAPolicy` for the words.

    Attributes:
        config: transformers' config of the base.
        autocast: of the trainer: ``bf16-mixed``.
        trust_remote_code: build models whose code comes with their config.
        device: ``cuda`` or ``cpu``, which PEFT treats differently under autocast.
    """

    config: Any
    dtype: DType = "bfloat16"
    quantization: Quantization = "none"
    double_quantization: bool = True
    compute_dtype: DType | None = None
    lora: LoRA | None = field(default_factory=LoRA)
    reference: ReferenceKind = "base"
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    packing: bool = True
    autocast: bool = True
    trust_remote_code: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class UpdatePass:
    """Bytes of one forward and backward pass of the update, beside what lasts.

    Attributes:
        kept: what the forward leaves for the backward on the device.
        forward: the most at once in the forward.
        backward: the most at once in the backward.
        host: what activation offload keeps in host memory.
    """

    kept: int
    forward: int
    backward: int
    host: int = 0

    @property
    def peak(self) -> int:
        """The most at once."""
        return max(self.forward, self.backward)


def _once(follow: Callable[..., T]) -> Callable[..., T]:
    """Follow a pass of the same sizes once: the estimates of one run differ in few of them."""

    @wraps(follow)
    def known(self: Shadow, *sizes: Any) -> T:
        key = (follow.__name__, str(sizes))
        if key not in self.passes:
            self.passes[key] = follow(self, *sizes)
        found: T = self.passes[key]
        return found

    return known


class Shadow:
    """A policy on fake tensors.

    Args:
        setting: of the policy.
        whole: follow every layer, also where all are alike.

    Attributes:
        base_bytes, adapter_bytes, reference_bytes: of what lasts.
        block_bytes, rest_bytes: of the base's largest transformer block, and of what is in none (embedding, head).
        trained: parameters that the optimizer steps.
        trained_bytes: of them, and so of their gradients.
        largest_layer: bytes of the largest quantised layer, dequantised; 0 where nothing is quantised.
        packs: whether a prompt is read once for its responses.
        passes: what was followed, by kind and sizes.
    """

    largest_layer: int
    block_bytes: int
    rest_bytes: int
    packs: bool

    def __init__(self, setting: ModelSetting, whole: bool = False) -> None:
        self.setting = setting
        self.passes: dict[tuple[str, str], Any] = {}
        # bytes grow by the same from layer to layer, so two short models tell what a long one of equal layers needs
        self._short = None if whole else _short(setting)
        if self._short is not None:
            few, more = self._short
            for name in ("base_bytes", "adapter_bytes", "reference_bytes", "trained", "trained_bytes"):
                setattr(self, name, self._extended(getattr(few, name), getattr(more, name)))
            self.packs, self.largest_layer = more.packs, more.largest_layer
            self.block_bytes, self.rest_bytes = more.block_bytes, more.rest_bytes
            return
        self.mode = FakeTensorMode()
        model = _built(setting)
        names = {id(p): name for name, p in model.named_parameters()}
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.trained_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self.adapter_bytes = self.reference_bytes = 0
        for parameter in model.parameters():
            if belongs_to(names[id(parameter)], ADAPTER):
                self.adapter_bytes += parameter.numel() * parameter.element_size()
            elif belongs_to(names[id(parameter)], REFERENCE_ADAPTER):
                self.reference_bytes += parameter.numel() * parameter.element_size()
        with self.mode:
            _faked(model, setting)
        stored = sum(t.untyped_storage().nbytes() for t in _distinct([*model.parameters(), *model.buffers()]))
        self.base_bytes = stored - self.adapter_bytes - self.reference_bytes
        if setting.lora is None:
            self.reference_bytes = self.base_bytes
        width = getattr(torch, setting.compute_dtype or setting.dtype).itemsize
        self.largest_layer = max(
            (m.sizes[0] * m.sizes[1] * width for m in model.modules() if isinstance(m, _Quantized)), default=0
        )
        self.model = model
        self.base: Any = model if setting.lora is None else model.get_base_model()
        sizes = [_bytes_of_base(block) for block in blocks(self.base)] if _has_blocks(self.base) else []
        self.block_bytes = max(sizes, default=self.base_bytes)
        self.rest_bytes = _bytes_of_base(self.base) - sum(sizes)
        self.scorer = Scorer(self.base, 0, setting.packing)
        self.packs = self.scorer.packing
        self.scorer._abilities = Abilities(self.packs, True, True)
        self.scorer.sizes_only = True  # a long pass goes through the head in a hundred chunks that are alike

    @_once
    def update(self, prompts: int, prompt: int, group: int, response: int) -> UpdatePass:
        """One pass of the update over groups, gradients of earlier passes being there."""
        if self._short is not None:
            few, more = (shadow.update(prompts, prompt, group, response) for shadow in self._short)
            return UpdatePass(*(self._extended(getattr(few, n), getattr(more, n)) for n in vars(few)))
        rows = [[1] * prompt for _ in range(prompts) for _ in range(group)]
        self.model.train()
        with self.mode:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            known = [*self.model.parameters(), *self.model.buffers()]
            known += [p.grad for p in self.model.parameters() if p.grad is not None]
        host = _Host(known)
        with self._running(known) as live:
            start = live.bytes
            with host if self.setting.activation_offload else nullcontext():
                logps_T = self._logps(rows, group, response)
            kept, forward = live.bytes - start, live.peak - start
            live.reset_peak()
            torch.autograd.backward(logps_T.sum())
            backward = live.peak - start
        for parameter in self.model.parameters():
            parameter.grad = None
        return UpdatePass(kept, forward, backward, host.bytes)

    @_once
    def scoring(self, prompts: int, prompt: int, group: int, response: int) -> int:
        """The most at once while rows are scored without gradient."""
        if self._short is not None:
            return self._extended(*(shadow.scoring(prompts, prompt, group, response) for shadow in self._short))
        rows = [[1] * prompt for _ in range(prompts) for _ in range(group)]
        self.model.eval()
        with self._running([*self.model.parameters(), *self.model.buffers()]) as live, torch.no_grad():
            start = live.bytes
            self._logps(rows, group, response)
            return int(live.peak - start)

    @_once
    def prefill(self, lengths: list[int]) -> tuple[int, int]:
        """Bytes of the keys and values of prompts read in one pass, and of the rest that was there at once."""
        if self._short is not None:
            (states, rest), (more_states, more_rest) = (shadow.prefill(lengths) for shadow in self._short)
            return self._extended(states, more_states), self._extended(rest, more_rest)
        self.model.eval()
        with self._running([*self.model.parameters(), *self.model.buffers()]) as live, torch.no_grad():
            start = live.bytes
            tokens = sum(lengths)
            ids = torch.ones(1, tokens, dtype=torch.long)
            positions = torch.arange(tokens).unsqueeze(0)
            if not self.packs:
                output = self._backbone(ids, positions)
                kept = 0
            else:
                cache = GroupCache(lengths, list(range(len(lengths))), 1)
                cache.begin_prefill(list(range(len(lengths))))
                output = self.scorer.backbone(
                    self.base, input_ids=ids, position_ids=positions, attention_mask=attention.no_mask(ids.device),
                    layout=cache,
                )  # fmt: skip
                kept = sum(t.untyped_storage().nbytes() for pair in cache.prompt_states.values() for t in pair)
            del output
            return kept, live.peak - start - kept

    def _extended(self, few: int, more: int) -> int:
        layers = int(self.setting.config.get_text_config().num_hidden_layers)
        return few + (more - few) * (layers - SHORT[0]) // (SHORT[1] - SHORT[0])

    @property
    def state_bytes(self) -> int:
        """Bytes of the keys and values of one token, over all layers."""
        config = self.setting.config.get_text_config()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return int(2 * config.num_hidden_layers * key_heads * size * getattr(torch, self.setting.dtype).itemsize)

    @contextmanager
    def _running(self, known: list[Tensor]) -> Iterator[LiveTensors]:
        with ExitStack() as stack:
            stack.enter_context(self.mode)
            stack.enter_context(_autocast(self.setting))
            live = stack.enter_context(LiveTensors(known))
            yield live

    def _logps(self, prompts: list[list[int]], group: int, response: int) -> Tensor:
        if self.packs:
            # each prompt is one object, so that rows of a group are known for one
            rows = [prompts[i // group * group] for i in range(len(prompts))]
            responses = [[1] * response for _ in rows]
            distinct = [[1 + i // group, *row[1:]] for i, row in enumerate(rows)]
            return self.scorer.score(self.base, distinct, responses).logps_T
        count, width = len(prompts), len(prompts[0]) + response
        hidden = self._backbone(
            torch.ones(count, width, dtype=torch.long), torch.arange(width).unsqueeze(0).expand(count, -1)
        ).last_hidden_state
        places = torch.arange(count * response)
        targets = torch.ones(count * response, dtype=torch.long)
        head = self.base.get_output_embeddings()
        return token_logps(hidden.flatten(0, 1)[places], head, targets, sizes_only=self.scorer.sizes_only)[0]

    def _backbone(self, ids: Tensor, positions: Tensor) -> Any:
        return self.scorer.backbone(self.base, input_ids=ids, position_ids=positions)


_known: dict[str, Shadow] = {}


def shadow_of(setting: ModelSetting) -> Shadow:
    """The shadow of a setting, with all that was followed before: estimates differ in few sizes."""
    key = str(setting)
    _known[key] = shadow = _known.pop(key, None) or Shadow(setting)  # the newest stands last
    while len(_known) > KEPT:
        del _known[next(iter(_known))]
    return shadow


def _short(setting: ModelSetting) -> list[Shadow] | None:
    """Two models of few layers that tell what the long one needs, or None where its layers are not all alike."""
    config = setting.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [None])
    if config.num_hidden_layers <= SHORT[1] or len(kinds) > 1 or not _alike(setting.lora):
        return None
    short = [replace(setting, config=_shortened(setting.config, count)) for count in SHORT]
    few, more, whole = (_weights(part) for part in (*short, setting))
    if (whole - few) * (SHORT[1] - SHORT[0]) != (more - few) * (config.num_hidden_layers - SHORT[0]):
        return None  # some layers have experts, say
    return [Shadow(part, whole=True) for part in short]


def _alike(lora: LoRA | None) -> bool:
    """Whether every layer gets the same adapters."""
    if lora is None:
        return True
    targets = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    return not lora.options and not any(sign.isdigit() for target in targets for sign in target)


def _has_blocks(base: Any) -> bool:
    return bool(getattr(base, "_no_split_modules", None))


def _bytes_of_base(module: nn.Module) -> int:
    """Bytes of the parameters under a module that belong to no adapter."""
    adapters = (ADAPTER, REFERENCE_ADAPTER)
    own = [p for name, p in module.named_parameters() if not any(belongs_to(name, adapter) for adapter in adapters)]
    return sum(p.numel() * p.element_size() for p in own)


_counted: dict[str, int] = {}


def _weights(setting: ModelSetting) -> int:
    """Parameters of the model alone; the settings that are tried for one run share its config, which is counted once."""
    key = f"{setting.trust_remote_code} {setting.config}"
    if key not in _counted:
        with torch.device("meta"):
            _counted[key] = sum(parameter.numel() for parameter in _base(setting).parameters())
    return _counted[key]


def _shortened(config: Any, layers: int) -> Any:
    short = deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]
    return short


class _Quantized(nn.Module):
    """Marks the stand-ins of quantised layers."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Of the weight."""
        owner: Any = self
        return owner.out_features, owner.in_features


class _FourBit(torch.autograd.Function):
    """What a 4-bit product allocates: its weight, dequantised, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        ctx.shape = out_features, x.shape[-1]
        return F.linear(x, torch.empty(ctx.shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.matmul(grads[0], torch.empty(ctx.shape, dtype=grads[0].dtype)), None, None


class _EightBit(torch.autograd.Function):
    """What LLM.int8 allocates: the activations in 16 and 8 bits, sums in 32; in the backward the weight, dequantised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        ctx.shape, ctx.dtype, ctx.kept = (out_features, x.shape[-1]), x.dtype, x
        rounded = torch.empty(x.shape, dtype=torch.float16).to(torch.int8)
        sums = torch.empty((*x.shape[:-1], out_features), dtype=torch.int32)
        del rounded
        return sums.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight = torch.empty(ctx.shape, dtype=ctx.dtype)
        return torch.matmul(grads[0].to(ctx.dtype), weight), None, None


def _stand_ins() -> tuple[Any, Any]:
    """Classes that PEFT takes for bitsandbytes' layers."""
    import bitsandbytes as bnb

    class FourBit(bnb.nn.Linear4bit, _Quantized):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            apply, compute = cast(Any, _FourBit.apply), cast(Any, self.compute_dtype)
            out: Tensor = apply(x.to(compute), self.out_features, self.bias)
            return out.to(x.dtype)

    class EightBit(bnb.nn.Linear8bitLt, _Quantized):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            apply: Any = _EightBit.apply
            out: Tensor = apply(x, self.out_features, self.bias)
            return out

    return FourBit, EightBit


def _base(setting: ModelSetting) -> Any:
    """The model that a config describes, on the default device."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(
            setting.config, dtype=getattr(torch, setting.dtype), trust_remote_code=setting.trust_remote_code
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"The model's config makes no causal language model ({error}).") from error


def _built(setting: ModelSetting) -> Any:
    """The model on the meta device, adapters included."""
    with torch.device("meta"):
        model = _base(setting)
        if setting.quantization != "none":
            _replace_linears(model, setting)
        if setting.gradient_checkpointing:
            checkpoint_activations(model)
        model.config.use_cache = False
        if setting.lora is None:
            return model
        from peft import get_peft_model

        try:
            lora = without_computed_init(setting.lora)
            adapted = get_peft_model(model, peft_config(lora), adapter_name=ADAPTER)
        except (ValueError, TypeError) as error:
            raise UserError(f"PEFT refused these LoRA settings ({str(error).splitlines()[0]}).") from error
        if setting.reference == "synced" or changes_base(setting.lora) is not None:
            adapted.add_adapter(REFERENCE_ADAPTER, peft_config(lora))
            adapted.set_adapter(ADAPTER)
            for name, parameter in adapted.named_parameters():
                if belongs_to(name, REFERENCE_ADAPTER):
                    parameter.requires_grad_(False)
        cast_adapters(adapted, setting.lora)
        return adapted


def _replace_linears(model: Any, setting: ModelSetting) -> None:
    four, eight = _stand_ins()
    head = model.get_output_embeddings()
    compute = getattr(torch, setting.compute_dtype or setting.dtype)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        sizes = module.in_features, module.out_features, module.bias is not None
        if setting.quantization == "int8":
            made = eight(*sizes, has_fp16_weights=False, threshold=6.0)
        else:
            made = four(
                *sizes, compute, compress_statistics=setting.double_quantization, quant_type=setting.quantization
            )
        model.set_submodule(name, made.requires_grad_(False))
    model.is_loaded_in_4bit = setting.quantization in ("nf4", "fp4")
    model.is_loaded_in_8bit = setting.quantization == "int8"
    logging.getLogger("peft").setLevel(logging.ERROR)


def _faked(model: nn.Module, setting: ModelSetting) -> None:
    """Turn tensors on the meta device into fake ones; call it under a FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(module, _Quantized) and name == "weight":
                for part, tensor in _stored(module.sizes, setting):
                    module.register_buffer(f"stored_{part}", tensor, persistent=False)
                module._parameters[name] = None
                continue
            if id(parameter) not in made:
                tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _stored(sizes: tuple[int, int], setting: ModelSetting) -> list[tuple[str, Tensor]]:
    """The tensors in which bitsandbytes keeps a quantised weight."""
    rows, weights = sizes[0], sizes[0] * sizes[1]
    if setting.quantization == "int8":
        return [("codes", torch.empty(weights, dtype=torch.int8)), ("scales", torch.empty(rows))]
    scales = -(-weights // BLOCK)
    stored = [("codes", torch.empty(-(-weights // 2), dtype=torch.uint8)), ("map", torch.empty(16))]
    if not setting.double_quantization:
        return [*stored, ("scales", torch.empty(scales))]
    stored += [("scales", torch.empty(scales, dtype=torch.uint8)), ("nested", torch.empty(-(-scales // NESTED_BLOCK)))]
    return [*stored, ("nested_map", torch.empty(256))]


class _Host:
    """Stands for activation offload: what it would move leaves the device, and comes back as new tensors."""

    def __init__(self, known: list[Tensor]) -> None:
        self.bytes = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        if size < LEAST_BYTES or tensor.untyped_storage()._cdata in self.known:
            return tensor
        self.bytes += size
        return tuple(tensor.shape), tensor.dtype

    def _unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.empty(packed[0], dtype=packed[1])

    def __enter__(self) -> None:
        self.hooks.__enter__()

    def __exit__(self, *args: Any) -> None:
        self.hooks.__exit__(*args)


@contextmanager
def _autocast(setting: ModelSetting) -> Iterator[None]:
    """Autocast of the fake CPU; for a GPU also its flag, which decides whether PEFT casts activations to float32."""
    if not setting.autocast:
        yield
        return
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", setting.device == "cuda")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())
