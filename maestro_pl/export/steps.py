"""An export from beginning to end: read, check that it fits, write, reload, compare, and only then take its name."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import write_whole
from maestro_pl.export.adapter import check_has_adapter, write_adapter
from maestro_pl.export.base import Base, find_base
from maestro_pl.export.card import card
from maestro_pl.export.check import Difference, Pair, check_weights, difference_of, examples, log_probabilities
from maestro_pl.export.files import copy_code, tokenizer_of, write_config, write_generation_config
from maestro_pl.export.merged import Rounding, dtype_name, trained_model, write_merged, write_with_peft
from maestro_pl.export.place import CARD, CheckFailed, check_output, making
from maestro_pl.export.plan import Plan, check_fits, make_plan
from maestro_pl.export.shards import MAX_SHARD_SIZE, split_into_shards
from maestro_pl.export.source import Source, read_source
from maestro_pl.policy.loading import load_model

Kind: TypeAlias = Literal["adapter", "merged"]
Say: TypeAlias = Callable[[str], None]

#: What PEFT warns of and is seen to here: tied weights part where one of them was trained.
HANDLED = (
    r"Model (has|with) `tie_word_embeddings=True`",
    r"Input and output embeddings are no longer tied",
    r"fan_in_fan_out",
)
MUCH_LOST = 0.25  # of what training moved, where the user is told what keeps all of it


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        run: a run's folder, or a checkpoint inside one.
        to: ``adapter`` or ``merged``.
        checkpoint: ``last``, ``best`` or a path.
        output: the folder to write; default: ``export/<to>`` in the run's folder.
        overwrite: replace an earlier export.
        dtype: of merged weights; default: what each has on disk.
        base: hub id or folder in place of the config's.
        max_shard_size: of a file of merged weights.
    """

    run: str
    to: Kind
    checkpoint: str = "last"
    output: str | None = None
    overwrite: bool = False
    dtype: str | None = None
    base: str | None = None
    max_shard_size: str = MAX_SHARD_SIZE


def export_run(request: Request, say: Say = print) -> Path:
    """Export a run; returns the folder that was written.

    Args:
        request: what is asked for.
        say: takes a line on each thing done.

    Raises:
        UserError: the run, the base or the folder cannot be used; nothing was written.
        CheckFailed: what was written is not what was trained; it is kept under another name.
    """
    with warnings.catch_warnings():
        for handled in HANDLED:
            warnings.filterwarnings("ignore", message=handled)
        return _export(request, say)


def _export(request: Request, say: Say) -> Path:
    if request.to == "adapter" and request.dtype is not None:
        raise UserError(
            f"--dtype {request.dtype} is of merged weights; adapters keep the dtype that they were trained in."
        )
    split_into_shards({}, request.max_shard_size)  # before anything is written
    source = read_source(request.run, request.checkpoint)
    if request.to == "adapter":
        check_has_adapter(source)
    base = find_base(source, request.base)
    if request.to == "merged" and base.quantized is not None:
        raise UserError(
            f"The base {base.name} is itself quantised ({base.quantized}), and adapters are merged into 16-bit weights only: "
            "give --base with the 16-bit original."
        )
    output = Path(request.output) if request.output else source.folder / "export" / request.to
    reads = [source.checkpoint.parent, *([Path(base.name)] if base.is_folder else [])]
    check_output(output, request.overwrite, source.folder, reads)
    say(f"Run:        {source.folder}, {source.checkpoint.name}, {source.steps} policy steps")
    skeleton = base.skeleton(source.lora)
    check_fits(skeleton, source.lora, source.state, base)
    with making(output) as folder:
        if request.to == "adapter":
            _adapter(folder, source, base, skeleton, say)
        else:
            plan = make_plan(base, skeleton, source.lora, source.state)
            _merged(folder, source, base, plan, request, say)
    say(f"Written to  {output}")
    return output


def _adapter(folder: Path, source: Source, base: Base, skeleton: Any, say: Say) -> None:
    from peft import PeftModel

    tokenizer = tokenizer_of(source, base)
    say(f"Base:       {base.name}, {len(source.state)} tensors of adapters beside it")
    write_adapter(folder, source, base, skeleton)
    tokenizer.save_pretrained(folder)
    pairs = examples(source, tokenizer)
    model = trained_model(base, source.lora, source.state, source.dtype)
    trained_T, base_T = log_probabilities(model, pairs), _without_adapters(model, source, pairs)
    del model
    gc.collect()
    model = PeftModel.from_pretrained(base.load(source.dtype), folder).eval()
    # the same products in the same order, so that 16 bits are no excuse
    difference = difference_of(trained_T, log_probabilities(model, pairs), torch.float32, base_T)
    _judge(difference, say)
    write_whole(
        folder / CARD, card(source, base, "adapter", dtype_name(source.dtype), [_sentence(difference)], tokenizer)
    )


def _merged(folder: Path, source: Source, base: Base, plan: Plan, request: Request, say: Say) -> None:
    dtype: torch.dtype = getattr(torch, request.dtype) if request.dtype else base.dtype
    name = dtype_name(dtype)
    tokenizer = tokenizer_of(source, base)
    say(f"Base:       {base.name}, {dtype_name(base.dtype)} on disk, {name} is written")
    rounding, unties = _write_weights(folder, source, base, plan, request, dtype, say)
    write_config(folder, base, dtype, unties)
    write_generation_config(folder, base, tokenizer)
    tokenizer.save_pretrained(folder)
    copy_code(folder, base)
    difference = _compare_merged(folder, source, base, plan, dtype, tokenizer, say)
    sentences = [_sentence(difference)]
    if rounding is not None:
        sentences.append(
            f"Rounding to {name}: its error in the weights is {rounding.share:.1%} of the size of the update."
        )
    if difference.learned is not None and difference.mean > MUCH_LOST * difference.learned:
        say(f"            What was learned is small beside {name}: --dtype float32 or --to adapter keeps all of it.")
    write_whole(folder / CARD, card(source, base, "merged", name, sentences, tokenizer))


def _write_weights(
    folder: Path, source: Source, base: Base, plan: Plan, request: Request, dtype: torch.dtype, say: Say
) -> tuple[Rounding | None, bool]:
    """Tensor by tensor where the plan allows it; what rounding did, and whether the embeddings part."""
    if plan.reason is not None:
        say(f"Merged:     in memory, by PEFT and transformers, because {plan.reason}")
        return None, write_with_peft(folder, source, base, dtype, request.max_shard_size)
    rounding = write_merged(folder, base, plan, None if request.dtype is None else dtype, request.max_shard_size)
    say(f"Merged:     {len(plan.edits)} of {len(base.stored)} tensors, one after the other, in float32")
    say(f"Rounding:   its error in the weights is {rounding.share:.1%} of the size of the update")
    return rounding, plan.unties


def _compare_merged(
    folder: Path, source: Source, base: Base, plan: Plan, dtype: torch.dtype, tokenizer: Any, say: Say
) -> Difference:
    """One model in memory at a time: the run's policy, then what was written."""
    pairs = examples(source, tokenizer)
    model = trained_model(base, source.lora, source.state, dtype)
    trained_T, base_T = log_probabilities(model, pairs), _without_adapters(model, source, pairs)
    if plan.reason is None:
        say(
            f"Check:      {check_weights(model, folder, base, plan)} tensors are those of the run, read again from the files"
        )
    del model
    gc.collect()
    model = load_model(str(folder), dtype=dtype, trust_remote_code=base.trust_remote_code).eval()
    difference = difference_of(trained_T, log_probabilities(model, pairs), dtype, base_T)
    if plan.reason is not None and difference.learned is not None and difference.mean >= difference.learned > 0:
        # no tensor was compared on this path, and a merge that lost everything would differ by as much
        raise CheckFailed(
            f"What was written differs from the run's policy by as much as training moved it: {difference}. Give --dtype "
            "float32, or --to adapter."
        )
    _judge(difference, say)
    return difference


def _without_adapters(model: Any, source: Source, pairs: Sequence[Pair]) -> Tensor | None:
    """What the base alone says, where the adapters can be switched off."""
    if source.lora is None or source.lora.options.get("bias", "none") != "none":
        return None
    with model.disable_adapter():
        return log_probabilities(model, pairs)


def _judge(difference: Difference, say: Say) -> None:
    if not difference.holds:
        raise CheckFailed(f"What was written is not what the run trained: {difference}.")
    say(f"Check:      {difference}")


def _sentence(difference: Difference) -> str:
    return f"Read again and compared with the policy of the run: {difference}."
