"""How a step of decoding runs: operation by operation, compiled, or as a captured CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.run.recovery import first_line, is_out_of_memory

Step: TypeAlias = Callable[[], None]
How: TypeAlias = Literal["eager", "compiled", "graph"]
WAITED = "called a synchronizing CUDA operation"  # torch's words


def captured(step: Step) -> Step:
    """The kernels of a step as a CUDA graph of the current device; nothing is computed while it is captured."""
    graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    own = _stream_of(torch.cuda.current_device())
    try:
        # loaders pin memory in threads of their own
        with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
            step()
    except BaseException:
        torch.cuda.set_stream(outside)  # torch leaves its own stream current where the end of a capture fails
        raise
    replay: Step = graph.replay
    return replay


@cache
def _stream_of(device: int) -> torch.cuda.Stream:
    """One stream a device for all captures: a matrix product's workspace is kept for each stream that it has run on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def takes_waiting(step: Step) -> bool:
    """Take a step on CUDA; whether the host had to wait for the device in it, as far as torch can tell."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return any(WAITED in str(warning.message) for warning in said)


class DecodingStep:
    """Runs one program again and again, until :meth:`begin` says that shapes or memory have changed.

    The first step of a program runs operation by operation, which is also what a capture needs: libraries are set up,
    and what autocast keeps of the weights is there. A step that waits for the device is not captured: until torch 2.12 a
    capture that fails leaves the allocator of memory in it. Where a capture or a compilation fails, one sentence says so and
    all further steps run operation by operation.

    Args:
        how: ``eager``, ``compiled`` (torch.compile), or ``graph`` (a CUDA graph).
    """

    def __init__(self, how: How = "eager") -> None:
        self.how, self.capture, self.takes_waiting = how, captured, takes_waiting
        self.begin()

    def begin(self) -> None:
        """The next step is the first of another program."""
        self._ready: Step | None = None
        self._warm = False

    def __call__(self, step: Step) -> None:
        """Take a step; it must depend on tensors only that are the same at each call, and may change their numbers."""
        if self._ready is not None:
            self._ready()
        elif self.how == "eager":
            step()
        elif not self._warm:
            self._warm = True
            self._warm_up(step)
        else:
            self._first(step)

    def _warm_up(self, step: Step) -> None:
        if self.how != "graph":
            step()
        elif self.takes_waiting(step):
            self._give_up("the host waits for the device in it")

    def _first(self, step: Step) -> None:
        try:
            ready = self.capture(step) if self.how == "graph" else torch.compile(step, fullgraph=True)
            ready()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._give_up(first_line(error))
            step()
        else:
            self._ready = ready

    def _give_up(self, reason: str) -> None:
        wanted = "captured as a CUDA graph" if self.how == "graph" else "compiled"
        rank_zero_warn(
            f"A step of decoding could not be {wanted} ({reason}), so it runs operation by operation, which is "
            "slower and gives the same tokens. rollout.engine with cache: growing does not try."
        )
        self.how = "eager"
