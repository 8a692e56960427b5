"""Going on after memory has run out: the same work again, in smaller pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from maestro_pl.run.random_state import rng_state, set_rng_state
from maestro_pl.run.ranks import gathered

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_oom_error(error):
        return True
    return isinstance(error, RuntimeError) and "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def with_less(run: Callable[[], Result], shrink: Callable[[str], None], all_ranks: bool = False) -> Result:
    """Run; whenever memory runs out, shrink the work and run it all again from the same random state.

    Args:
        run: the work; it must begin anew each time it is called.
        shrink: told the first line of the error; makes the work's pieces smaller, or raises where they cannot be.
        all_ranks: where memory runs out on one rank, all of them shrink and begin anew; ``run`` must not wait for others.
    """
    while True:
        state = rng_state()
        message, result = "", []
        try:
            result.append(run())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = first_line(error)
        messages = [text for text in (gathered(message) if all_ranks else [message]) if text]
        if not messages:
            return result[0]
        # only here, where nothing holds the frames of the error, can their tensors be freed
        result.clear()
        garbage_collection_cuda()
        shrink(messages[0])
        set_rng_state(state)
