"""Decoding with fixed shapes: the tokens of the growing cache, steps that ask nothing of the host, and captured ones."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from maestro_pl.errors import UserError
from maestro_pl.generation import Generation, NativeEngine, Sampling
from maestro_pl.generation import step as step_module
from maestro_pl.generation.cache import GroupCache
from maestro_pl.generation.fixed import FixedDecoding, StaticGroupCache
from maestro_pl.generation.step import DecodingStep, Step, captured, takes_waiting
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from tests.support import make_policy
from tests.support.waits import waits

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 11]
N = 6


def policy_of(folder: Path, eos: list[int]) -> LoRAPolicy:
    policy = make_policy(folder, std=0.1).eval()
    policy.eos_token_ids = eos
    return policy


def static(how: str = "eager", capture: Callable[[Step], Step] | None = None) -> NativeEngine:
    engine = NativeEngine(cache="static")
    engine.step = DecodingStep(how)  # type: ignore[arg-type]
    engine.step.capture = capture or engine.step.capture
    engine.step.takes_waiting = lambda step: bool(step())  # type: ignore[func-returns-value]
    return engine


def alike(got: Generation, expected: Generation) -> None:
    assert got.response_ids == expected.response_ids
    assert got.finish_reasons == expected.finish_reasons
    for name in ("logps_T", "entropies_T", "hidden_BD"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=3e-5, rtol=0, msg=name)


class Recorder(TorchDispatchMode):
    """Stands in for a CUDA graph: notes the operations of a step and does them again on the same tensors.

    Numbers that the host made of tensors would be those of the capture, and what waits cannot be captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(op, args, kwargs):
            raise RuntimeError(f"{op} cannot be captured")
        result = op(*args, **kwargs)
        self.calls.append((op, args, kwargs, result))
        return result

    def replay(self) -> None:
        made: dict[int, Tensor] = {}

        def current(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for op, args, kwargs, result in self.calls:
            again = op(*tree_map(current, args), **tree_map(current, kwargs))
            for old, new in zip(tensors(result), tensors(again), strict=True):
                made[id(old)] = new


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def recorded(seen: list[tuple[int, int]]) -> Callable[[Step], Step]:
    """A capture; as on CUDA, it computes nothing that stays."""

    def capture(step: Step) -> Step:
        decoding = step.__self__  # type: ignore[attr-defined]
        own = [value for value in vars(decoding).values() if isinstance(value, Tensor)]
        own += [part for pair in decoding.cache.row_states.values() for part in pair]
        before = [value.clone() for value in own]
        recorder = Recorder()
        with recorder:
            step()
        for value, kept in zip(own, before, strict=True):
            value.copy_(kept)
        seen.append((len(decoding.rows_A), decoding.cache.room))
        return recorder.replay

    return capture


CONTEXTS = [HiddenContext(), HiddenContext("first", "mean"), HiddenContext("last", "last", "both")]


@pytest.mark.parametrize("copy_below", [0, 30, 10_000], ids=["apart", "copied late", "copied"])
@pytest.mark.parametrize("context", CONTEXTS, ids=["h", "first mean", "both"])
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_what_is_drawn_and_seen_is_that_of_the_growing_cache(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch, how: str, context: HiddenContext, copy_below: int
) -> None:
    original = GroupCache.__init__
    monkeypatch.setattr(GroupCache, "__init__", lambda self, *args: original(self, *args, copy_below=copy_below))
    policy = policy_of(tiny_qwen3, list(range(0, 264, 40)))
    sampling = Sampling(max_new_tokens=80, temperature=0.8, seed=3)  # longer than the first room
    expected = NativeEngine().generate(policy, PROMPTS, N, sampling, context=context)
    captures: list[tuple[int, int]] = []
    got = static(how, recorded(captures)).generate(policy, PROMPTS, N, sampling, context=context)
    alike(got, expected)
    assert len({len(ids) for ids in got.response_ids}) > 5
    if how == "graph":
        rows, rooms = zip(*captures, strict=True)
        assert rows[0] == len(PROMPTS) * N
        assert all(2 * after <= before for before, after in pairwise(sorted(set(rows), reverse=True)))
        assert len(set(rows)) > 1  # rows leave, at least half of them together
        assert any(before == after for before, after in pairwise(rows))  # more room alone is another program, too
        assert rooms == (64,) * rooms.count(64) + (80,) * rooms.count(80)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "min_new_tokens": 3},
        {"top_p": 0.8, "top_k": 50, "min_p": 0.01, "min_new_tokens": 20},
        {"stop": ("a", "~~")},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=["greedy", "truncated", "strings", "one", "two"],
)
@pytest.mark.parametrize("context", [None, HiddenContext()], ids=["no h", "h"])
def test_every_way_of_sampling_draws_the_same(
    kind: str, options: dict[str, Any], context: HiddenContext | None, request: pytest.FixtureRequest
) -> None:
    policy = policy_of(request.getfixturevalue(kind), list(range(0, 264, 20)))
    sampling = Sampling(**{"max_new_tokens": 24, "seed": 2, **options})
    alike(*(engine.generate(policy, PROMPTS, 4, sampling, context=context) for engine in (static(), NativeEngine())))


def test_the_host_waits_once_in_a_few_steps_and_never_in_a_step(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tiny_qwen3, [])
    policy.packs  # noqa: B018 (which is tried once)
    looks, taken = [], []
    own, take = Tensor.tolist, FixedDecoding._step

    def step(self: FixedDecoding) -> None:
        taken.append(len(looks))
        with Recorder():  # which raises where a step waits
            take(self)
        assert taken[-1] == len(looks)

    monkeypatch.setattr(Tensor, "tolist", lambda self: (looks.append(1), own(self))[1])
    monkeypatch.setattr(FixedDecoding, "_step", step)
    made = static().generate(policy, PROMPTS, N, Sampling(max_new_tokens=64, seed=3), context=HiddenContext())
    assert {len(ids) for ids in made.response_ids} == {64}
    assert len(taken) == 64
    assert len(looks) <= 64 / FixedDecoding.look_every + 8  # a few at the beginning and the end


def test_rows_leave_in_parts_and_few_steps_are_taken_in_vain(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, list(range(0, 264, 4)))
    rows: list[int] = []
    policy.base_model.model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    policy.packs  # noqa: B018
    rows.clear()
    got = static().generate(policy, PROMPTS, 32, Sampling(max_new_tokens=30, seed=1))
    longest = max(map(len, got.response_ids))
    assert rows[0] == sum(map(len, PROMPTS))
    assert len(rows) < longest + FixedDecoding.look_every
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert sum(rows[1:]) < 0.75 * 96 * longest


def test_what_cannot_be_captured_is_said_once_and_runs_operation_by_operation(
    tiny_qwen3: Path, recwarn: pytest.WarningsRecorder
) -> None:
    policy = policy_of(tiny_qwen3, list(range(0, 264, 20)))
    tried = []

    def never(step: Step) -> Step:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    engine, sampling = static("graph", never), Sampling(max_new_tokens=16, seed=3)
    for _ in range(2):
        got = engine.generate(policy, PROMPTS, N, sampling, context=HiddenContext())
    alike(got, NativeEngine().generate(policy, PROMPTS, N, sampling, context=HiddenContext()))
    said = [str(warning.message) for warning in recwarn if "captured" in str(warning.message)]
    assert len(said) == len(tried) == 1
    assert "captured as a CUDA graph (operation not permitted when stream is capturing), so it runs" in said[0]


def test_a_step_that_waits_is_not_captured(tiny_qwen3: Path, recwarn: pytest.WarningsRecorder) -> None:
    policy = policy_of(tiny_qwen3, list(range(0, 264, 20)))
    tried: list[tuple[int, int]] = []
    engine, sampling = static("graph", recorded(tried)), Sampling(max_new_tokens=16, seed=3)
    assert engine.step is not None
    engine.step.takes_waiting = lambda step: step() is None
    for _ in range(2):
        got = engine.generate(policy, PROMPTS, N, sampling, context=HiddenContext())
    alike(got, NativeEngine().generate(policy, PROMPTS, N, sampling, context=HiddenContext()))
    assert not tried
    said = [str(warning.message) for warning in recwarn if "captured" in str(warning.message)]
    assert len(said) == 1
    assert "(the host waits for the device in it), so it runs operation by operation" in said[0]


def test_a_captured_step_lets_go_of_its_memory_before_there_is_more_room(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, engine, held = policy_of(tiny_qwen3, []), static("graph", lambda step: step), []
    make_room = StaticGroupCache.make_room

    def watched(self: StaticGroupCache, tokens: int) -> None:
        assert engine.step is not None
        held.append(engine.step._ready is not None)
        make_room(self, tokens)

    monkeypatch.setattr(StaticGroupCache, "make_room", watched)
    engine.generate(policy, PROMPTS[:1], 2, Sampling(max_new_tokens=70, seed=3))
    assert held == [False, False]


@pytest.mark.parametrize("waits", [True, False])
def test_what_torch_says_of_a_wait_is_seen_and_its_mode_put_back(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    modes = ["as it was"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        warnings.warn("another one", UserWarning, stacklevel=1)
        if waits:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)

    assert takes_waiting(step) is waits
    assert modes == ["as it was", "warn", "as it was"]


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["outside"]

    class Graph:
        """Torch's: what fails at its end leaves its stream the current one."""

        def __init__(self, graph: Any, stream: str, capture_error_mode: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            current.append(self.stream)

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(step_module, "_stream_of", lambda device: f"own of {device}")
    with pytest.raises(RuntimeError, match="previous error during capture"):
        captured(lambda: None)
    assert current == ["outside", "own of 1", "outside"]


def test_memory_that_runs_out_in_a_capture_halves_the_batch(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, list(range(0, 264, 20)))
    whole = len(PROMPTS) * N

    def scarce(step: Step) -> Step:
        if len(step.__self__.lengths_B) > whole // 2:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step

    engine, sampling = static("graph", scarce), Sampling(max_new_tokens=16, seed=3)
    with pytest.warns(UserWarning, match="sampled again, and from now on 9 at once"):
        got = engine.generate(policy, PROMPTS, N, sampling)
    caches = [found for found in gc.get_objects() if type(found) is StaticGroupCache]
    assert not caches  # neither the error nor a step holds one
    assert got.response_ids == NativeEngine().generate(policy, PROMPTS, N, sampling).response_ids


@pytest.mark.slow
def test_a_step_compiles_in_one_piece(
    tiny_qwen3: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Followed as a whole and run by torch's own operations, so that no C++ compiler is needed here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    policy = policy_of(tiny_qwen3, [])
    sampling = Sampling(max_new_tokens=12, seed=3)
    engine = NativeEngine(cache="static", compile=True)
    got = engine.generate(policy, PROMPTS, N, sampling, context=HiddenContext())
    alike(got, NativeEngine().generate(policy, PROMPTS, N, sampling, context=HiddenContext()))
    assert engine.step is not None
    assert engine.step.how == "compiled"
    assert not [w for w in recwarn if "could not be" in str(w.message)]


@pytest.mark.parametrize(
    ("cache", "compiled", "device", "cut", "how"),
    [
        ("auto", False, "cuda", False, "graph"),
        ("auto", False, "cuda", True, None),
        ("auto", False, "cpu", False, None),
        ("growing", False, "cuda", False, None),
        ("static", False, "cuda", True, "eager"),
        ("static", True, "cuda", False, "graph"),
        ("static", True, "cpu", False, "compiled"),
        ("static", False, "cpu", True, "eager"),
    ],
)
def test_which_steps_are_captured(cache: Any, compiled: bool, device: str, cut: bool, how: str | None) -> None:
    policy: Any = SimpleNamespace(device=torch.device(device), shards=object() if cut else None)
    assert NativeEngine(cache=cache, compile=compiled)._how(policy) == how


def test_a_cpu_keeps_the_growing_cache_and_options_that_do_not_fit_are_refused(tiny_qwen3: Path) -> None:
    engine = NativeEngine()
    engine.generate(policy_of(tiny_qwen3, []), PROMPTS, 2, Sampling(max_new_tokens=3))
    assert engine.step is None
    with pytest.raises(UserError, match="cache='fixed': expected one of"):
        NativeEngine(cache="fixed")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="compile=true with cache=auto"):
        NativeEngine(compile=True)
    with pytest.raises(UserError, match="max_batch=0"):
        NativeEngine(max_batch=0)
