"""The trained model as one: adapters merged into the weights of the base, or the whole model that was trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maestro_pl.errors import UserError
from maestro_pl.export.base import Base
from maestro_pl.export.plan import Edit, Plan
from maestro_pl.export.shards import MAX_SHARD_SIZE, Entry, write_shards
from maestro_pl.export.trained_run import TrainedRun, first_line
from maestro_pl.policy.loading import LoRA, with_adapters


@dataclass
class Rounding:
    """How much of an update is lost where the merged weights are rounded.

    Attributes:
        lost: sum of the squares of what rounding changed.
        update: sum of the squares of what training changed.
    """

    lost: float = 0.0
    update: float = 0.0

    def add(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Count one weight: of the base, merged in float32, and as it is written."""
        self.lost += float((rounded.float() - exact).square().sum(dtype=torch.float64))
        self.update += float((exact - before.float()).square().sum(dtype=torch.float64))

    @property
    def share(self) -> float:
        """|rounded - exact| / |exact - base| over all changed weights: at 1 the error is as large as the update."""
        return math.sqrt(self.lost / self.update) if self.update else 0.0


def write_merged(
    folder: Path, base: Base, plan: Plan, dtype: torch.dtype | None, max_shard_size: str = MAX_SHARD_SIZE
) -> Rounding:
    """Write the weights, one file of them in memory at a time; sums and products in float32, one rounding.

    Args:
        folder: where to.
        base: read from its files.
        plan: what becomes of each tensor.
        dtype: of all floating tensors; None keeps that of each on disk.
        max_shard_size: of a file.

    Raises:
        UserError: a merged weight is not finite in this dtype.
    """
    rounding = Rounding()
    entries: dict[str, Entry] = {}
    for name, source in plan.sources(base).items():
        stored = base.stored[source]
        assert stored.dtype is not None  # the plan has seen to it
        out = dtype if dtype is not None and stored.dtype.is_floating_point else stored.dtype
        make = partial(_make, name, partial(base.read, source), plan.edits.get(name), out, rounding)
        entries[name] = Entry(stored.shape, out, make)
    write_shards(folder, entries, max_shard_size)
    return rounding


def _make(name: str, read: Callable[[], Tensor], edit: Edit | None, dtype: torch.dtype, rounding: Rounding) -> Tensor:
    before = read()
    if edit is None:
        copied = before.to(dtype)
        if copied.dtype != before.dtype and bool(before.isfinite().all()):
            check_finite(name, copied, "give --dtype bfloat16")
        return copied
    exact = edit(before)
    check_finite(name, exact, "the checkpoint is of a run that broke; give an earlier one")
    rounded = exact.to(dtype)
    check_finite(name, rounded, "give --dtype bfloat16")
    rounding.add(before, exact, rounded)
    return rounded


def check_finite(name: str, tensor: Tensor, advice: str) -> None:
    """Raise where a value is NaN or infinite.

    Args:
        name: of the tensor.
        tensor: the one to check.
        advice: what to do, for the sentence.

    Raises:
        UserError: naming the tensor.
    """
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{name} has values that are not finite in {dtype_name(tensor.dtype)}: {advice}.")


def trained_model(base: Base, lora: LoRA | None, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The run's policy on the CPU: the base in this dtype with its adapters beside it, or with all parameters replaced.

    Adapters compute in float32, as PEFT has them compute wherever they are loaded.

    Raises:
        UserError: the base cannot be loaded.
    """
    model = base.load(dtype)
    if lora is not None:
        model = with_adapters(model, lora)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
        _untie(model)
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"{unexpected[0]} passed the check of names and has no place in the model")
    return model.eval().requires_grad_(False)


def write_with_peft(
    folder: Path, run: TrainedRun, base: Base, dtype: torch.dtype, max_shard_size: str = MAX_SHARD_SIZE
) -> bool:
    """Merge in memory, for what is more than plain adapters or stands under other names; whether the embeddings untie.

    Raises:
        UserError: PEFT cannot merge these adapters.
    """
    model = trained_model(base, run.lora, run.state, dtype)
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    if run.lora is not None:
        try:
            model = model.merge_and_unload()
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(
                f"PEFT cannot merge these adapters ({first_line(error)}): export them with --to adapter."
            ) from error
    model = model.to(dtype)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, "give an earlier checkpoint, or --dtype bfloat16")
    head = model.get_output_embeddings()
    unties = tied and head is not None and head.weight is not model.get_input_embeddings().weight
    if unties:
        _set_tied(model.config, False)
        model.tie_weights()  # learns from the config that nothing is tied
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return unties


def _untie(model: Any) -> None:
    """Give the output head a weight of its own where adapters stand on it or on the embedding.

    Merging would otherwise change both, and the run computes with one of them changed.
    """
    inner = model.get_base_model()
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    if head is None or not (_is_wrapped(head) or _is_wrapped(embedding)):
        return
    own, other = _inner(head), _inner(embedding)
    if own.weight is other.weight:
        own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)


def _is_wrapped(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _inner(module: Any) -> Any:
    return module.get_base_layer() if _is_wrapped(module) else module


def _set_tied(config: Any, tied: bool) -> None:
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = tied


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
