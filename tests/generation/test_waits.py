"""How often decoding makes the host wait for the device, and how many operations it asks for: counted, not timed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maestro_pl.generation import Generation, HFEngine, NativeEngine, Sampling
from maestro_pl.generation.cache import GroupCache
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from tests.support import make_policy
from tests.support.waits import waits

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 11]
N, LONGEST = 6, 32


class Asked(TorchDispatchMode):
    """Counts operations, and those among them that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.waits = 0, Counter[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if waits(op, args, kwargs or {}):
            self.waits[str(op)] += 1
        return op(*args, **(kwargs or {}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A counter; ``tolist`` reads CPU tensors without an operation."""
    counter, own = Asked(), torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        counter.waits["tolist"] += 1
        return own(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    return counter


def policy_of(folder: Path, eos: list[int]) -> LoRAPolicy:
    policy = make_policy(folder, std=0.1).eval()
    policy.eos_token_ids = eos
    assert policy.packs  # which is tried once
    return policy


def generated(engine: Any, policy: LoRAPolicy, asked: Asked, context: HiddenContext | None = None) -> Generation:
    with asked:
        made: Generation = engine.generate(
            policy, PROMPTS, N, Sampling(max_new_tokens=LONGEST, seed=3), context=context
        )
    return made


@pytest.mark.parametrize("copy_below", [0, 10_000], ids=["apart", "copied"])
@pytest.mark.parametrize(
    "context",
    [None, HiddenContext(), HiddenContext(pool="mean"), HiddenContext(place="both")],
    ids=["no h", "h", "mean h", "both"],
)
def test_a_step_makes_the_host_wait_once(
    tiny_qwen3: Path,
    asked: Asked,
    monkeypatch: pytest.MonkeyPatch,
    context: HiddenContext | None,
    copy_below: int,
) -> None:
    """Once after each draw; beyond that a few times where rows leave, and at the beginning and the end."""
    policy = policy_of(tiny_qwen3, list(range(0, 264, 20)))
    original, leavings = GroupCache.__init__, []
    keep = GroupCache.keep
    monkeypatch.setattr(GroupCache, "__init__", lambda self, *args: original(self, *args, copy_below=copy_below))
    monkeypatch.setattr(GroupCache, "keep", lambda self, rows: (leavings.append(len(rows)), keep(self, rows))[1])
    made = generated(NativeEngine(), policy, asked, context)
    lengths = [len(ids) for ids in made.response_ids]
    assert len(leavings) >= 3
    assert len(set(lengths)) > 3
    assert asked.waits["tolist"] >= max(lengths)  # the counter counts
    assert sum(asked.waits.values()) <= max(lengths) + 4 * len(leavings) + 12
    assert sum(asked.waits.values()) < sum(lengths)


def test_a_step_asks_for_no_more_operations_than_transformers_own(
    tiny_qwen3: Path, tiny_llama: Path, asked: Asked
) -> None:
    for folder in (tiny_qwen3, tiny_llama):
        policy = policy_of(folder, [])
        counts = []
        for engine in (NativeEngine(), HFEngine()):
            asked.operations = 0
            made = generated(engine, policy, asked)
            assert {len(ids) for ids in made.response_ids} == {LONGEST}
            counts.append(asked.operations)
        ours, theirs = counts
        assert ours <= theirs
