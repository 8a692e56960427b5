"""What a child changes in itself: it tells where it is, and some of its numbers and files are spoiled."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks.faults.child import tell
from maestro_pl.training.clock import StageClock
from maestro_pl.training.saving import WholeFileIO
from maestro_pl.training.update import PolicyUpdate


def watch() -> None:
    """Tell the parent of each stage of a step (``rollout``, ``rewards``, ``update``), and of each save and its end."""
    made, saved = StageClock.__init__, WholeFileIO.save_checkpoint

    def noted(self: StageClock) -> None:
        made(self)
        self.listeners.append(lambda stage, note: None if note else tell(stage or "between"))

    def told(self: WholeFileIO, *args: Any, **kwargs: Any) -> None:
        tell("save")
        saved(self, *args, **kwargs)
        tell("saved")

    StageClock.__init__ = noted  # type: ignore[method-assign]
    WholeFileIO.save_checkpoint = told  # type: ignore[method-assign]


def spoiled(function: Callable[..., Any], call: int, spoil: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function whose ``call``-th result, from 0, is spoiled."""
    calls = iter(range(10**9))

    def hurt(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return spoil(result) if next(calls) == call else result

    return hurt


def nan_loss(call: int) -> None:
    """The loss of one micro-batch is NaN."""
    PolicyUpdate.loss_of = spoiled(  # type: ignore[method-assign]
        PolicyUpdate.loss_of, call, lambda result: (result[0] * float("nan"), *result[1:])
    )


class SpoilAt(Callback):
    """Spoils something when the run begins its ``step``-th batch, from 0: see the methods."""

    def __init__(self, what: str, step: int) -> None:
        self.what, self.step = what, step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Spoil it."""
        if pl_module.batches_done == self.step:
            getattr(self, self.what)(trainer, pl_module, batch)

    def gradient(self, trainer: Any, module: Any, batch: Any) -> None:
        """One gradient of the policy is infinite in this step."""
        parameter = next(p for p in module.policy.parameters() if p.requires_grad)
        handle: list[Any] = []

        def hurt(gradient: torch.Tensor) -> torch.Tensor:
            handle[0].remove()
            return torch.full_like(gradient, float("inf"))

        handle.append(parameter.register_hook(hurt))

    def hidden(self, trainer: Any, module: Any, batch: Any) -> None:
        """The hidden state of one response is NaN."""
        batch["rollout"].hidden_BD[0] = float("nan")

    def conductor(self, trainer: Any, module: Any, batch: Any) -> None:
        """A parameter of the Conductor is NaN from here on."""
        next(p for p in module.weigher.parameters() if p.requires_grad).data.flatten()[0] = float("nan")

    def policy(self, trainer: Any, module: Any, batch: Any) -> None:
        """A parameter of the policy is NaN from here on."""
        next(p for p in module.policy.parameters() if p.requires_grad).data.flatten()[0] = float("nan")

    def moments(self, trainer: Any, module: Any, batch: Any) -> None:
        """A moment of the policy's optimizer is NaN from here on."""
        for state in trainer.optimizers[0].state.values():
            state["exp_avg"].flatten()[0] = float("nan")
            return


class Grows(Callback):
    """Tells the parent of resident memory (KiB), open files and threads after some of the steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell."""
        if pl_module.policy_steps in self.steps:
            with open("/proc/self/statm", encoding="ascii") as file:
                pages = int(file.read().split()[1])
            kib, files = pages * os.sysconf("SC_PAGE_SIZE") // 1024, len(os.listdir("/proc/self/fd"))
            tell(f"grows {pl_module.policy_steps} {kib} {files} {threading.active_count()}")
