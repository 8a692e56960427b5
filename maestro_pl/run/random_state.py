"""Torch's random state, kept and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """Torch's random state: what LoRA dropout and the Conductor's actions draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Take back what :func:`rng_state` gave."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextmanager
def kept_rng(moved_on: bool = False) -> Iterator[None]:
    """Put the random state back at the end, whatever was drawn inside.

    Args:
        moved_on: by one draw, so that what is drawn inside is not the same the next time.
    """
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)
        if moved_on:
            for device in ["cpu", *(f"cuda:{i}" for i in range(len(before.get("cuda", ()))))]:
                torch.rand(1, device=device)


def seeded_state(seed: int) -> dict[str, Any]:
    """The random state that ``torch.manual_seed`` makes; the present one stays."""
    with kept_rng():
        torch.manual_seed(seed)
        return rng_state()


def rng_of_rank(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """A random state of this rank's own, made from one that all ranks share; that of rank 0 is the shared one."""
    if rank == 0:
        return state
    shared = torch.Generator()
    shared.set_state(state["cpu"].cpu())
    seeds = torch.randint(2**62, (rank,), generator=shared)
    own: dict[str, Any] = {"cpu": torch.Generator().manual_seed(int(seeds[-1])).get_state()}
    if "cuda" in state and torch.cuda.is_available():
        own["cuda"] = [_on_cuda(int(seeds[-1]), number) for number in range(len(state["cuda"]))]
    return own


def rng_of_resumed(saved: dict[str, Any], rank: int) -> dict[str, Any]:
    """The random state with which a rank goes on: its own of the checkpoint, or one made from rank 0's."""
    states: list[dict[str, Any]] = saved.get("rngs") or [saved["rng"]]
    return states[rank] if rank < len(states) else rng_of_rank(states[0], rank)


def _on_cuda(seed: int, device: int) -> torch.Tensor:
    return torch.Generator(device=f"cuda:{device}").manual_seed(seed).get_state()
