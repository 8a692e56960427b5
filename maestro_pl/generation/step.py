"""How a step of decoding runs: operation by operation, compiled, or as a captured CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.run.recovery import first_line, is_out_of_memory

Step: TypeAlias = Callable[[], None]
How: TypeAlias = Literal["eager", "compiled", "graph"]


def captured(step: Step) -> Step:
    """The kernels of a step as a CUDA graph, to be launched at once; nothing is computed while it is captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders pin memory in threads of their own
        step()
    replay: Step = graph.replay
    return replay


class DecodingStep:
    """Runs one program again and again, until :meth:`begin` says that shapes or memory have changed.

    The first step of a program runs operation by operation, which is also what a capture needs: libraries are set up,
    and what autocast keeps of the weights is there. Where a capture or a compilation fails, one sentence says so and all
    further steps run operation by operation.

    Args:
        how: ``eager``, ``compiled`` (torch.compile), or ``graph`` (a CUDA graph).
    """

    def __init__(self, how: How = "eager") -> None:
        self.how, self.capture = how, captured
        self.begin()

    def begin(self) -> None:
        """The next step is the first of another program."""
        self._ready: Step | None = None
        self._warm = False

    def __call__(self, step: Step) -> None:
        """Take a step; it must depend on tensors only that are the same at each call, and may change their numbers."""
        if self._ready is not None:
            self._ready()
        elif self.how == "eager" or not self._warm:
            self._warm = True
            step()
        else:
            self._first(step)

    def _first(self, step: Step) -> None:
        try:
            ready = self.capture(step) if self.how == "graph" else torch.compile(step, fullgraph=True)
            ready()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            wanted = "captured as a CUDA graph" if self.how == "graph" else "compiled"
            rank_zero_warn(
                f"A step of decoding could not be {wanted} ({first_line(error)}), so it runs operation by operation, which is "
                "slower and gives the same tokens. rollout.engine with cache: growing does not try."
            )
            self.how = "eager"
            step()
        else:
            self._ready = ready
