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
