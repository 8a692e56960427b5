"""Every stage of a step over what this machine's matrix products and memory reach at the same shapes.

Called by ``python -m benchmarks.limit --roofline``. Each stage is run once while its matrix products (``mm``, ``addmm``,
``bmm``, ``scaled_dot_product_attention``, forward and backward) are noted with shapes, strides and dtype. Then, in turn in
every round: the stages; each noted product alone, on numbers that mean nothing; one large product; one stream through as
many bytes as the model has. Two bounds come of it:

- ``over_bare``: measured seconds over the sum of the bare products, none faster than its weights, keys and values can be
  read: the limit at these shapes, 1 where nothing but products costs time;
- ``over_peak``: measured seconds over the same sum with every product at the speed of the large one: the limit of the
  machine, whatever the shapes.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cost import shape_of
from benchmarks.workloads import (
    Workload,
    chosen_workload,
    device_name,
    measured,
    model_folder,
    prompt_texts,
    show_table,
    spread,
)
from maestro_pl.generation import NativeEngine, Sampling
from maestro_pl.policy.head import token_logps
from maestro_pl.policy.loading import LoRA, resolve_model
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import evaluating

SANDBOX = Workload(
    "sandbox", prompts=8, group=8, prompt_tokens=24, new_tokens=80, rank=16
)  # as configs/quickstart.yaml
LEAST_SECONDS, MOST_CALLS = 2e-3, 50  # of one bare product in one round
PLAIN = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}  # which arguments are multiplied
ATTENTION = "_scaled_dot_product"


class Operand(NamedTuple):
    """A tensor without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        return (
            1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) if 0 not in self.size else 1
        )

    @property
    def bytes(self) -> int:
        """Of its distinct elements."""
        sizes = [n for n, step in zip(self.size, self.stride, strict=True) if step]
        return torch.Size(sizes).numel() * self.dtype.itemsize


@dataclass
class Product:
    """A matrix product that was asked for ``count`` times.

    Attributes:
        function: of aten.
        arguments, options: its arguments, with an :class:`Operand` for each tensor.
        flops: operations, an addition and a multiplication each.
        weights: bytes of parameters that it reads.
        cache: bytes of keys and values that it reads.
        count: of calls.
    """

    function: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    flops: float
    weights: int
    cache: int
    count: int = 0

    @property
    def read(self) -> int:
        """Bytes that have to come from memory."""
        return self.weights + self.cache


@dataclass
class Counts:
    """The products of a stage, by what is asked for, and the number of all operations."""

    products: dict[Hashable, Product] = field(default_factory=dict)
    operations: int = 0

    def __sub__(self, other: Counts) -> Counts:
        left = {
            key: replace(product, count=product.count - (other.products[key].count if key in other.products else 0))
            for key, product in self.products.items()
        }
        return Counts({k: p for k, p in left.items() if p.count > 0}, self.operations - other.operations)

    def total(self, name: str) -> float:
        """Sum of ``flops``, ``weights``, ``cache`` or ``read`` over all calls."""
        return sum(getattr(product, name) * product.count for product in self.products.values())


class Counting(TorchDispatchMode):
    """Notes every matrix product under it.

    Args:
        weights: what counts as parameters.
    """

    def __init__(self, weights: Iterator[torch.Tensor] | list[torch.Tensor] = ()) -> None:  # type: ignore[assignment]
        super().__init__()
        self.counts = Counts()
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.counts.operations += not func.is_view
        if name in PLAIN or name.startswith(ATTENTION):
            self._note(name, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        noted = tuple(_noted(a) for a in args)
        options = tuple(sorted((k, _noted(v)) for k, v in kwargs.items()))
        weights = cache = 0
        if name in PLAIN:
            left, right = (args[i] for i in PLAIN[name])
            flops = 2.0 * left.numel() * right.shape[-1]
            for operand in (left, right):
                if operand.untyped_storage().data_ptr() in self._weights:
                    weights += _noted(operand).bytes
            if name in ("bmm", "baddbmm"):
                cache = _noted(right).bytes
        else:
            backward = "backward" in name
            query, key, value = args[backward : backward + 3]
            flops = attention_flops(func, args, kwargs, query, key, value, backward)
            cache = _noted(key).bytes + _noted(value).bytes
        key_of = (func, noted, options, weights)
        found = self.counts.products.setdefault(key_of, Product(func, noted, options, flops, weights, cache))
        found.count += 1


def attention_flops(func: Any, args: Any, kwargs: Any, query: Any, key: Any, value: Any, backward: bool) -> float:
    """Operations of a fused attention; of causal ones only what a query sees."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    rows, heads, queries, size = query.shape
    keys, width = key.shape[2], value.shape[-1]
    pairs = queries * (queries + 1) / 2 if given.get("is_causal") and queries == keys else queries * keys
    return float(2 * rows * heads * pairs * ((3 * size + 2 * width) if backward else size + width))


def _noted(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Operand(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(value) if isinstance(value, list) else value


class Pool:
    """Numbers for operands: products read them from here, so that none has to be made while it is timed."""

    def __init__(self, products: list[Product], device: str) -> None:
        self.device = device
        spans: dict[torch.dtype, int] = {}
        for product in products:
            own: dict[torch.dtype, int] = {}
            for operand in _operands(product):
                own[operand.dtype] = own.get(operand.dtype, 0) + operand.span
            for dtype, span in own.items():
                spans[dtype] = max(spans.get(dtype, 0), span)
        self.numbers = {dtype: self._filled(span, dtype) for dtype, span in spans.items()}

    def _filled(self, span: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return torch.rand(span, device=self.device).to(dtype)
        return torch.ones(span, device=self.device, dtype=dtype)

    def call(self, product: Product) -> Callable[[], Any]:
        """The product, ready to be asked for."""
        taken: dict[torch.dtype, int] = {}

        def made(value: Any) -> Any:
            if not isinstance(value, Operand):
                return value
            begin = taken.get(value.dtype, 0)
            taken[value.dtype] = begin + value.span
            return self.numbers[value.dtype].as_strided(value.size, value.stride, begin)

        args = [made(a) for a in product.arguments]
        options = {name: made(value) for name, value in product.options}
        return lambda: product.function(*args, **options)


def _operands(product: Product) -> Iterator[Operand]:
    for value in (*product.arguments, *(value for _, value in product.options)):
        if isinstance(value, Operand):
            yield value


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call, of as many in a row as are needed to tell."""
    clock = "wall" if device == "cuda" else "cpu"

    def run(times: int) -> float:
        def several() -> None:
            for _ in range(times):
                call()

        return float(getattr(measured(device, several)[0], clock)) / times

    once = run(1)
    times = min(MOST_CALLS, int(LEAST_SECONDS / max(once, 1e-9)) + 1)
    return min(once, run(times))


class Stages:
    """The stages of one step on one batch.

    Args:
        policy: to run.
        prompts: token ids.
        group: G.
        new_tokens: of every response.
    """

    def __init__(self, policy: LoRAPolicy, prompts: list[list[int]], group: int, new_tokens: int) -> None:
        self.policy, self.prompts, self.group, self.new_tokens = policy, prompts, group, new_tokens
        self.engine = NativeEngine()
        self.rows = [prompt for prompt in prompts for _ in range(group)]
        self.responses: list[list[int]] = self.generate(new_tokens)
        head = policy.base_model.get_output_embeddings()
        sampled = len(self.rows) * new_tokens
        hidden = torch.randn(sampled, policy.hidden_size, device=policy.device, dtype=head.weight.dtype)
        self.hidden_TD, self.head = hidden.requires_grad_(), head
        self.targets_T = torch.tensor([i for row in self.responses for i in row], device=policy.device)

    def generate(self, new_tokens: int) -> list[list[int]]:
        """Responses of this length."""
        sampling = Sampling(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        with torch.no_grad():
            return self.engine.generate(self.policy, self.prompts, self.group, sampling).response_ids

    def score(self) -> None:
        """One pass without gradient, as for a reference."""
        with torch.no_grad(), evaluating(self.policy):
            self.policy.token_statistics(self.rows, self.responses, entropy=True)

    def forward(self) -> torch.Tensor:
        """The update's forward pass, head and all."""
        return self.policy.token_statistics(self.rows, self.responses).logps_T

    def head_and_loss(self) -> None:
        """The head alone, and its gradient."""
        token_logps(self.hidden_TD, self.head, self.targets_T)[0].sum().backward()
        self.hidden_TD.grad = None

    def through(self, around: Callable[[str, Callable[[], Any]], Any]) -> None:
        """Every part once, each under ``around(name, call)``, which returns what the call returns."""
        around("prompt", lambda: self.generate(1))
        around("sampling", lambda: self.generate(self.new_tokens))
        around("scoring", self.score)
        self.policy.train()
        logps = around("forward", self.forward)
        around("backward", lambda: logps.sum().backward())
        self.policy.zero_grad(set_to_none=True)
        around("head and loss", self.head_and_loss)


def counts_of(stages: Stages) -> dict[str, Counts]:
    """The products of every stage; decoding is sampling without the prompt pass."""
    found: dict[str, Counts] = {}

    def around(name: str, call: Callable[[], Any]) -> Any:
        with Counting(list(stages.policy.parameters())) as counting:
            result = call()
        found[name] = counting.counts
        return result

    stages.through(around)
    found["decoding"] = found["sampling"] - found["prompt"]
    return {name: found[name] for name in STAGES}


STAGES = ("prompt", "decoding", "scoring", "forward", "backward", "head and loss")


@dataclass
class Round:
    """Seconds of every stage, of every bare product, and what the machine reached."""

    stages: dict[str, float]
    bare: dict[Hashable, float]
    peak_flops: float
    bandwidth: float

    def bound(self, counts: Counts, bare: bool) -> float:
        """Least seconds of a stage: its products, none faster than its weights, keys and values can be read."""
        return sum(
            product.count
            * max(self.bare[key] if bare else product.flops / self.peak_flops, product.read / self.bandwidth)
            for key, product in counts.products.items()
        )


def one_round(
    stages: Stages, pool: Pool, products: dict[Hashable, Product], streamed: torch.Tensor, size: int
) -> Round:
    """Stages, bare products, the large product and the stream, one after the other."""
    device = stages.policy.device.type
    clock = "wall" if device == "cuda" else "cpu"
    seconds: dict[str, float] = {}

    def around(name: str, call: Callable[[], Any]) -> Any:
        taken, result = measured(device, call)
        seconds[name] = float(getattr(taken, clock))
        return result

    stages.through(around)
    seconds["decoding"] = seconds["sampling"] - seconds["prompt"]
    with torch.no_grad():
        bare = {key: seconds_of(pool.call(product), device) for key, product in products.items()}
        square = torch.rand(size, size, device=device, dtype=streamed.dtype)
        peak = 2 * size**3 / seconds_of(lambda: square @ square, device)
        return Round({name: seconds[name] for name in STAGES}, bare, peak, bandwidth_of(streamed, device))


def bandwidth_of(streamed: torch.Tensor, device: str) -> float:
    """Bytes a second of the fastest way to read (or copy) so many numbers."""
    half = len(streamed) // 2
    matrix, vector = streamed[: len(streamed) // 256 * 256].view(-1, 256), streamed[:256]
    size = streamed.dtype.itemsize
    ways: list[tuple[int, Callable[[], Any]]] = [
        (len(streamed) * size, lambda: streamed.sum()),
        (matrix.numel() * size, lambda: matrix @ vector),
        (2 * half * size, lambda: streamed[:half].copy_(streamed[half : 2 * half])),
    ]
    return max(moved / seconds_of(way, device) for moved, way in ways)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def roofline(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the rounds; the JSON object."""
    workload = _workload(options)
    source = resolve_model("sandbox") if workload.name == "sandbox" else str(model_folder(workload, folder / "model"))
    with _seeded(0):
        lora = LoRA(workload.rank, 2 * workload.rank, target_modules="all-linear")
        policy = LoRAPolicy(source, dtype=options.dtype, lora=lora).to(options.device)
        prompts = _prompts(workload, policy, Path(source))
        stages = Stages(policy, prompts, workload.group, workload.new_tokens)
        counts = counts_of(stages)
        products = {key: product for stage in counts.values() for key, product in stage.products.items()}
        pool = Pool(list(products.values()), options.device)
        numbers = sum(parameter.numel() for parameter in policy.base_model.parameters())
        dtype = getattr(torch, options.dtype)
        streamed = torch.rand(numbers, device=options.device).to(dtype)
        size = 8192 if options.device == "cuda" else 1024
        rounds = [one_round(stages, pool, products, streamed, size) for _ in range(options.warmup + options.rounds)]
    return result_of(options, workload, stages, counts, rounds[options.warmup :])


def _workload(options: argparse.Namespace) -> Workload:
    if options.workload != SANDBOX.name:
        return chosen_workload(options)
    sizes = {name: getattr(options, f"size_{name}") for name in ("prompts", "group", "prompt_tokens", "new_tokens")}
    return replace(SANDBOX, **{name: value for name, value in sizes.items() if value is not None})


def _prompts(workload: Workload, policy: LoRAPolicy, folder: Path) -> list[list[int]]:
    if workload.model is not None:
        return [policy.encode(text) for text in prompt_texts(workload, folder, 1)]
    draw = random.Random(0)
    last = policy.base_model.get_input_embeddings().weight.shape[0]
    return [[draw.randrange(2, last) for _ in range(workload.prompt_tokens)] for _ in range(workload.prompts)]


def result_of(
    options: argparse.Namespace, workload: Workload, stages: Stages, counts: dict[str, Counts], rounds: list[Round]
) -> dict[str, Any]:
    """The JSON object."""
    policy = stages.policy
    steps = {"decoding": workload.new_tokens - 1}
    found: dict[str, Any] = {}
    combined = {**{name: (name,) for name in STAGES}, "update": ("forward", "backward")}
    for name, parts in combined.items():
        taken = [sum(r.stages[part] for part in parts) for r in rounds]
        bare, peak = ([sum(r.bound(counts[part], way) for part in parts) for r in rounds] for way in (True, False))
        found[name] = {
            **{what: sum(counts[part].total(what) for part in parts) for what in ("flops", "weights", "cache")},
            "operations": sum(counts[part].operations for part in parts) / steps.get(name, 1),
            "seconds": spread(taken, 5),
            "bare_seconds": spread(bare, 5),
            "peak_seconds": spread(peak, 5),
            "over_bare": spread([a / b for a, b in zip(taken, bare, strict=True)]),
            "over_peak": spread([a / b for a, b in zip(taken, peak, strict=True)]),
        }
    lengths = [len(prompt) for prompt in stages.prompts]
    run = {"prompts": len(lengths), "group": workload.group, "prompt_tokens": round(statistics.fmean(lengths))}
    run |= {"new_tokens": workload.new_tokens, "rank": workload.rank, "scorings": 1}
    itemsize = getattr(torch, options.dtype).itemsize
    return {
        "workload": workload.name,
        "device": device_name(options.device),
        "dtype": options.dtype,
        "threads": options.threads,
        "rounds": len(rounds),
        "shape": asdict(shape_of(policy.base_model.config)),
        "run": run | {"weight_bytes": itemsize},
        "peak_flops": spread([r.peak_flops for r in rounds], 0),
        "bandwidth": spread([r.bandwidth for r in rounds], 0),
        "stages": found,
    }


def show(result: dict[str, Any]) -> None:
    """A table for people."""

    def ratio(values: dict[str, float]) -> str:
        return "{median:.2f} ({min:.2f} to {max:.2f})".format(**values)

    rows = [
        (
            name,
            f"{stage['flops'] / 1e9:.2f}",
            f"{stage['weights'] / 1e6:.0f} + {stage['cache'] / 1e6:.0f}",
            f"{stage['seconds']['median']:.3f}",
            ratio(stage["over_bare"]),
            ratio(stage["over_peak"]),
        )
        for name, stage in result["stages"].items()
    ]
    title = (
        f"{result['workload']} in {result['dtype']} on {result['device']}: {result['peak_flops']['median'] / 1e9:.1f} GFLOP/s, "
        f"{result['bandwidth']['median'] / 1e9:.1f} GB/s"
    )
    show_table(title, ("stage", "GFLOP", "MB of weights + keys", "seconds", "over bare", "over peak"), rows)
