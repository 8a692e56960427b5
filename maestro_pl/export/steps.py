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
from maestro_pl.export.average import average_runs
from maestro_pl.export.base import Base, find_base
from maestro_pl.export.card import card
from maestro_pl.export.check import (
    LogProbabilityDifference,
    Pair,
    check_model_weights,
    examples,
    log_probabilities,
    log_probability_difference,
)
from maestro_pl.export.files import copy_code, tokenizer_of, write_config, write_generation_config
from maestro_pl.export.merged import Rounding, check_finite, dtype_name, trained_model, write_merged, write_with_peft
from maestro_pl.export.place import CARD, CheckFailed, check_output, making
from maestro_pl.export.plan import Plan, check_fits, make_plan
from maestro_pl.export.shards import MAX_SHARD_SIZE, split_into_shards
from maestro_pl.export.trained_run import TrainedRun, read_trained_run
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
        average: runs whose average is exported instead (rewarded soups, arXiv 2306.04488).
        shares: of these runs; default: the same for all.
    """

    run: str | None
    to: Kind
    checkpoint: str = "last"
    output: str | None = None
    overwrite: bool = False
    dtype: str | None = None
    base: str | None = None
    max_shard_size: str = MAX_SHARD_SIZE
    average: Sequence[str] | None = None
    shares: Sequence[float] | None = None


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
    runs = _runs(request)
    for one in runs:
        _check_adapters(one)
    run = runs[0] if request.average is None else average_runs(runs, request.shares, any_base=request.base is not None)
    if request.to == "adapter":
        check_has_adapter(run)
    base = find_base(run, request.base)
    if request.to == "merged" and base.quantized is not None:
        raise UserError(
            f"The base {base.name} is itself quantised ({base.quantized}), and adapters are merged into 16-bit weights only: "
            "give --base with the 16-bit original."
        )
    output = Path(request.output) if request.output else run.folder / "export" / request.to
    reads = [*(one.checkpoint.parent for one in runs), *([Path(base.name)] if base.is_folder else [])]
    check_output(output, request.overwrite, run.folder, reads)
    for place, one in enumerate(runs):
        share = f", share {run.soup[place][1]:.3g}" if run.soup else ""
        say(f"Run:        {one.folder}, {one.checkpoint.name}, {one.steps} policy steps{share}")
    skeleton = base.skeleton(run.lora)
    check_fits(skeleton, run.lora, run.state, base)
    with making(output) as folder:
        if request.to == "adapter":
            _adapter(folder, run, base, skeleton, say)
        else:
            plan = make_plan(base, skeleton, run.lora, run.state)
            _merged(folder, run, base, plan, request, say)
    say(f"Written to  {output}")
    return output


def _runs(request: Request) -> list[TrainedRun]:
    """The run, or those that are averaged."""
    if request.average is None:
        if request.run is None or request.shares is not None:
            raise UserError("export takes RUN, or --average RUN RUN ... with --shares: give one of them.")
        return [read_trained_run(request.run, request.checkpoint)]
    if request.run is not None:
        raise UserError(f"export got the run {request.run!r} beside --average: name every run behind --average.")
    if request.output is None:
        raise UserError("--average belongs to no run's folder: give --output DIR.")
    return [read_trained_run(run, request.checkpoint) for run in request.average]


def _check_adapters(run: TrainedRun) -> None:
    """Refuse adapters that are not finite: the log-probabilities alone do not show them where attention hides a NaN."""
    for name, tensor in run.state.items() if run.lora is not None else ():
        check_finite(name, tensor, f"{run.checkpoint} is of a run that broke; give an earlier checkpoint")


def _adapter(folder: Path, run: TrainedRun, base: Base, skeleton: Any, say: Say) -> None:
    from peft import PeftModel

    tokenizer = tokenizer_of(run, base)
    say(f"Base:       {base.name}, {len(run.state)} tensors of adapters beside it")
    write_adapter(folder, run, base, skeleton)
    tokenizer.save_pretrained(folder)
    pairs = examples(run, tokenizer)
    model = trained_model(base, run.lora, run.state, run.dtype)
    trained_T, base_T = log_probabilities(model, pairs), _without_adapters(model, run, pairs)
    del model
    gc.collect()
    model = PeftModel.from_pretrained(base.load(run.dtype), folder).eval()
    # the same products in the same order, so that 16 bits are no excuse
    difference = log_probability_difference(trained_T, log_probabilities(model, pairs), torch.float32, base_T)
    _check_difference(difference, say)
    write_whole(folder / CARD, card(run, base, "adapter", dtype_name(run.dtype), [_sentence(difference)], tokenizer))


def _merged(folder: Path, run: TrainedRun, base: Base, plan: Plan, request: Request, say: Say) -> None:
    dtype: torch.dtype = getattr(torch, request.dtype) if request.dtype else base.dtype
    name = dtype_name(dtype)
    tokenizer = tokenizer_of(run, base)
    say(f"Base:       {base.name}, {dtype_name(base.dtype)} on disk, {name} is written")
    rounding, unties = _write_model_weights(folder, run, base, plan, request, dtype, say)
    write_config(folder, base, dtype, unties)
    write_generation_config(folder, base, tokenizer)
    tokenizer.save_pretrained(folder)
    copy_code(folder, base)
    difference = _compare_merged(folder, run, base, plan, dtype, tokenizer, say)
    sentences = [_sentence(difference)]
    if rounding is not None:
        sentences.append(
            f"Rounding to {name}: its error in the weights is {rounding.share:.1%} of the size of the update."
        )
    if difference.learned is not None and difference.mean > MUCH_LOST * difference.learned:
        say(f"            What was learned is small beside {name}: --dtype float32 or --to adapter keeps all of it.")
    write_whole(folder / CARD, card(run, base, "merged", name, sentences, tokenizer))


def _write_model_weights(
    folder: Path, run: TrainedRun, base: Base, plan: Plan, request: Request, dtype: torch.dtype, say: Say
) -> tuple[Rounding | None, bool]:
    """Tensor by tensor where the plan allows it; what rounding did, and whether the embeddings part."""
    if plan.reason is not None:
        say(f"Merged:     in memory, by PEFT and transformers, because {plan.reason}")
        return None, write_with_peft(folder, run, base, dtype, request.max_shard_size)
    rounding = write_merged(folder, base, plan, None if request.dtype is None else dtype, request.max_shard_size)
    say(f"Merged:     {len(plan.edits)} of {len(base.stored)} tensors, one after the other, in float32")
    say(f"Rounding:   its error in the weights is {rounding.share:.1%} of the size of the update")
    return rounding, plan.unties


def _compare_merged(
    folder: Path, run: TrainedRun, base: Base, plan: Plan, dtype: torch.dtype, tokenizer: Any, say: Say
) -> LogProbabilityDifference:
    """One model in memory at a time: the run's policy, then what was written."""
    pairs = examples(run, tokenizer)
    model = trained_model(base, run.lora, run.state, dtype)
    trained_T, base_T = log_probabilities(model, pairs), _without_adapters(model, run, pairs)
    if plan.reason is None:
        tensors = check_model_weights(model, folder, base, plan)
        say(f"Check:      {tensors} tensors are those of the run, read again from the files")
    del model
    gc.collect()
    model = load_model(str(folder), dtype=dtype, trust_remote_code=base.trust_remote_code).eval()
    difference = log_probability_difference(trained_T, log_probabilities(model, pairs), dtype, base_T)
    if plan.reason is not None and difference.learned is not None and difference.mean >= difference.learned > 0:
        # no tensor was compared on this path, and a merge that lost everything would differ by as much
        raise CheckFailed(
            f"What was written differs from the run's policy by as much as training moved it: {difference}. Give --dtype "
            "float32, or --to adapter."
        )
    _check_difference(difference, say)
    return difference


def _without_adapters(model: Any, run: TrainedRun, pairs: Sequence[Pair]) -> Tensor | None:
    """What the base alone says, where the adapters can be switched off."""
    if run.lora is None or run.lora.options.get("bias", "none") != "none":
        return None
    with model.disable_adapter():
        return log_probabilities(model, pairs)


def _check_difference(difference: LogProbabilityDifference, say: Say) -> None:
    if not difference.holds:
        raise CheckFailed(f"What was written is not what the run trained: {difference}.")
    say(f"Check:      {difference}")


def _sentence(difference: LogProbabilityDifference) -> str:
    return f"Read again and compared with the policy of the run: {difference}."
