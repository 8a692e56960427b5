"""The worst step first: what a run needs at most, measured before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import lightning as L
import rich
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from callbacks.rollout import RolloutGenerator
from maestro_pl.algorithm.losses import RolloutTokens
from maestro_pl.errors import OutOfMemory, UserError, check_choice
from maestro_pl.memory.estimate import GIB
from maestro_pl.memory.live import LiveTensors
from maestro_pl.module import MaestroModule
from maestro_pl.policy.scoring import evaluating
from maestro_pl.policy.sharding import own_share
from maestro_pl.rollout import Rollout
from maestro_pl.run.random_state import rng_state, set_rng_state
from maestro_pl.run.recovery import is_out_of_memory
from maestro_pl.training.checkpointing import group_options

When: TypeAlias = Literal["gpu", "always", "never"]


class MemoryProbe(L.Callback):
    """Runs the worst step that the run can meet before its first one, and reports the peak of memory.

    The longest training prompt, ``rollout.max_new_tokens`` tokens to each of a full batch of groups, one pass of the
    update over as many groups as ``model.micro_batch_tokens`` allows, and a step of the optimizer. Nothing of it stays:
    parameters, optimizer, random state and counters are put back. Where memory runs out, smaller pieces are tried (see
    ``rollout.max_batch``, ``model.micro_batch_tokens``); where none fits, the run ends before it has cost anything,
    with what to change. Rewards are not run: models that they load come on top.

    On a GPU it also logs ``memory/allocated_gib`` and ``memory/reserved_gib``, the peaks of each step.

    Args:
        when: ``gpu``: on GPUs only; ``always``: on a CPU too, where the bytes of live tensors are counted; ``never``.

    Attributes:
        report: of the last probe: peaks in bytes by phase, the estimate beside them, prompt and response tokens.
    """

    def __init__(self, when: When = "gpu") -> None:
        super().__init__()
        check_choice("MemoryProbe when", when, When)
        self.when = when
        self.report: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the worst step."""
        on_gpu = pl_module.device.type == "cuda"
        if self.when == "never" or (self.when == "gpu" and not on_gpu) or not isinstance(pl_module, MaestroModule):
            return
        rollout = next((c for c in trainer.callbacks if isinstance(c, RolloutGenerator)), None)  # type: ignore[attr-defined]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if rollout is None or not hasattr(data, "prompts"):
            return
        longest = max(len(prompt.ids) for prompt in data.prompts("train"))
        try:
            self.report = probe(pl_module, rollout, longest, data.batch_size)
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
                raise
            message = str(error).splitlines()[0]
            raise UserError(
                f"The worst step of this run (prompts of {longest} tokens, responses of {rollout.sampling.max_new_tokens}) "
                f"does not fit into memory: {message} {self._advice(pl_module, rollout, longest, data.batch_size)}"
            ) from error
        _show(self.report)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the peak of this step, its rollout included, and begin to watch the next."""
        if pl_module.device.type == "cuda":
            pl_module.log("memory/allocated_gib", torch.cuda.max_memory_allocated(pl_module.device) / GIB, batch_size=1)
            pl_module.log("memory/reserved_gib", torch.cuda.max_memory_reserved(pl_module.device) / GIB, batch_size=1)
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    @staticmethod
    def _advice(module: MaestroModule, rollout: RolloutGenerator, longest: int, batch: int) -> str:
        from maestro_pl.memory.advice import to_fit

        workload = _workload(module, rollout, longest, batch)
        card = 8.0
        if module.device.type == "cuda":
            card = torch.cuda.get_device_properties(module.device).total_memory / GIB
        try:
            chosen, _ = to_fit(workload, card)
        except Exception as error:  # an estimate is a help, and must not hide what went wrong
            return f"(No estimate could be made: {error})"
        if not chosen:
            return "By the estimate it should: see whether other programs use the device."
        return f"For {card:.0f} GiB, change: " + "; ".join(map(str, chosen)) + "."


def probe(module: MaestroModule, rollout: RolloutGenerator, longest: int, batch: int) -> dict[str, Any]:
    """Run one rollout and one update of the largest size, and put everything back.

    Args:
        module: about to be trained, its optimizers made.
        rollout: samples for it.
        longest: tokens of the longest prompt.
        batch: prompts a step.

    Returns:
        ``rollout``, ``scoring`` (with a KL term) and ``update``: peaks in bytes; ``reserved`` on a GPU; ``estimate``:
            the same
        phases; and the sizes.
    """
    from maestro_pl.memory.estimate import estimate

    new = rollout.sampling.max_new_tokens
    limit = getattr(module.policy.base_model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:  # what lies beyond is the run's own concern, of which it warns
        new = min(new, limit - 1)
        longest = min(longest, limit - new)
    peaks: dict[str, int] = {}
    with _untouched(module), _peaks(module, peaks) as phase:
        drawn = _longest(module, rollout, longest, new, batch)
        _make_states(module)
        with phase("update"):
            _update(module, drawn)
        module.policy.whole()
        if module.inner.kl.coef > 0:
            with phase("scoring"), module.trainer.precision_plugin.forward_context():
                module.inner.scored_logps(drawn, "reference")
        # last, because in a run the gradients of the step before are still there
        with phase("rollout"), torch.no_grad(), module.trainer.precision_plugin.forward_context():
            seen = None if module.context is None else module.context.from_policy
            full = replace(rollout.sampling, max_new_tokens=new, min_new_tokens=new, stop=(), seed=0)
            rollout.engine.generate(module.policy, drawn.prompt_ids, rollout.group_size, full, None, seen)
    try:
        found = estimate(_workload(module, rollout, longest, batch))
        estimated = {name: found.peak_of(name) for name in found.phases}
    except Exception as error:  # an estimate is a help: what was measured counts
        rank_zero_warn(f"No estimate of the memory could be made ({error}); the run goes on.")
        estimated = {}
    return {
        **peaks,
        "estimate": estimated,
        "prompt_tokens": longest,
        "response_tokens": new,
        "groups": batch,
        "group_size": rollout.group_size,
        "max_batch": getattr(rollout.engine, "max_batch", None),
        "micro_batch_tokens": module.micro_batch_tokens,
    }


def _longest(module: MaestroModule, rollout: RolloutGenerator, longest: int, new: int, batch: int) -> Rollout:
    """A batch in which every prompt and every response has full length; random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = module.policy.base_model.config.get_text_config().vocab_size
    rows = batch * rollout.group_size
    return Rollout(
        prompts=[""] * batch,
        prompt_texts=[""] * batch,
        prompt_ids=torch.randint(vocabulary, (batch, longest), generator=generator).tolist(),
        response_ids=torch.randint(vocabulary, (rows, new), generator=generator).tolist(),
        responses=[""] * rows,
        finish_reasons=["length"] * rows,
        group_size=rollout.group_size,
        columns={},
        temperature=rollout.sampling.temperature,
    )


def _make_states(module: MaestroModule) -> None:
    """Let the policy's optimizer make its states, which it does in its first step.

    Paged states lie in host memory, and bitsandbytes never gives them back: they are left to the run.
    """
    optimizer: Any = module.trainer.optimizers[0]
    if optimizer.state or type(optimizer).__name__.startswith("Paged"):
        return
    for parameter in module.policy.trained_parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def _update(module: MaestroModule, drawn: Rollout) -> None:
    """Forward and backward of the first pass, of whole groups where the run never cuts one."""
    lengths_B, inner = drawn.lengths_B, module.inner
    advantages_B = torch.ones(len(drawn), device=module.device)
    advantages_B[::2] = -1.0
    weights_T = torch.full((int(lengths_B.sum()),), 1.0 / int(lengths_B.sum()), device=module.device)
    tokens = RolloutTokens(
        advantages_B.repeat_interleave(lengths_B.to(module.device)),
        weights_T,
        ref_logps_T=torch.zeros_like(weights_T) if inner.kl.in_loss else None,
    )
    everything = list(range(len(drawn.prompts)))

    def first() -> list[int]:
        return sorted({row // drawn.group_size for row in inner.passes(drawn, everything)[0]})

    with module.trainer.precision_plugin.forward_context():
        module.stepper.within_memory(
            lambda: inner.accumulate(drawn, first(), tokens), lambda: inner.pass_tokens(drawn, first())
        )


@contextmanager
def _untouched(module: MaestroModule) -> Iterator[None]:
    """Put parameters, gradients, optimizer, random state and modes back at the end."""
    optimizer: Any = module.trainer.optimizers[0]
    fresh = not optimizer.state
    options = group_options(optimizer)
    parameters = module.policy.trained_parameters()
    kept = [own_share(parameter).detach().to("cpu", copy=True) for parameter in parameters]
    random = rng_state()
    try:
        with evaluating(module.policy):
            yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                own_share(parameter).copy_(before)
                parameter.grad = None
        module.policy.cut()
        module.policy.whole()
        if fresh:
            optimizer.state.clear()
        for group, before_options in zip(optimizer.param_groups, options, strict=True):
            group.update(before_options)
        set_rng_state(random)
        module.clock.pop_seconds()
        if module.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _peaks(module: MaestroModule, peaks: dict[str, int]) -> Iterator[Any]:
    """A context for each phase, which writes its peak in bytes: of the allocator on a GPU, else of the live tensors."""
    device = module.device
    with ExitStack() as stack:
        live: LiveTensors | None = None
        if device.type != "cuda":
            optimizers: Any = module.trainer.optimizers
            states = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
            live = stack.enter_context(LiveTensors([*_storages(module), *states]))

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            if live is not None:
                live.reset_peak()
                yield
                peaks[name] = live.peak
                return
            torch.cuda.reset_peak_memory_stats(device)
            yield
            peaks[name] = torch.cuda.max_memory_allocated(device)
            peaks["reserved"] = max(peaks.get("reserved", 0), torch.cuda.max_memory_reserved(device))

        yield phase


def _storages(module: MaestroModule) -> list[Tensor]:
    """Parameters and buffers, and what bitsandbytes keeps beside a quantised weight."""
    found: list[Any] = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        for owner in (parameter, state, getattr(state, "state2", None)):
            found += [value for value in vars(owner).values() if isinstance(value, Tensor)] if owner is not None else []
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _workload(module: MaestroModule, rollout: RolloutGenerator, longest: int, batch: int) -> Any:
    from maestro_pl.memory.workload import workload_of_run

    return workload_of_run(module, rollout.group_size, longest, rollout.sampling, rollout.engine, batch)


@rank_zero_only
def _show(report: dict[str, Any]) -> None:
    phases = [name for name in ("rollout", "scoring", "update") if name in report]
    measured = ", ".join(
        f"{name} {report[name] / GIB:.2f} GiB"
        + (f" (estimated {report['estimate'][name] / GIB:.2f})" if name in report["estimate"] else "")
        for name in phases
    )
    reserved = f"; reserved {report['reserved'] / GIB:.2f} GiB" if "reserved" in report else ""
    rich.print(
        f"The worst step ({report['groups']} x {report['group_size']} responses, {report['prompt_tokens']} + "
        f"{report['response_tokens']} tokens) at its peak: {measured}{reserved}."
    )
