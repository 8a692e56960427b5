"""A pretend accelerator: tensors that claim the device ``pretend:0`` while their numbers are on the CPU.

It shows what otherwise only a real accelerator shows: operands on two devices, which raise, and reads that make the
host wait for the device, which are counted. What is computed is what the CPU computes.

The device is the process's for good (:func:`register`), so it belongs into a process of its own: ``tests/pretend/``.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.support.waits import BY_INDEX, aten, waits

NAME = "pretend"
BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default}
#: Where a CPU tensor of no dimension does not pass for a number.
WITHOUT_NUMBERS = {aten.cat.default, aten.stack.default, aten.index_copy.default, aten.index_add.default}
#: What torch calls with Python's dispatch left out (``torch.tensor``), and factories that would resize an empty result.
BY_KERNEL = (aten.copy_.default, aten.arange.default, aten.arange.start, aten.arange.start_step)
#: What autocast computes in its lower precision, and what in float32, of those that models use; as on CUDA.
LOWERED = (
    aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.linear.default, aten.matmul.default,
    aten.scaled_dot_product_attention.default,
)  # fmt: skip
RAISED = (
    aten.softmax.int, aten.log_softmax.int, aten.layer_norm.default, aten.exp.default, aten.log.default, aten.sum.default,
)  # fmt: skip
OURS = ("/maestro_pl/", "/callbacks/")


class Asked:
    """What has been asked of the device.

    Attributes:
        stage: what the run is doing, as its :class:`maestro_pl.training.clock.StageClock` says.
        operations: how many of each stage.
        waits: reads that made the host wait, by stage, what it was, and the line of ours that asked for it.
    """

    def __init__(self) -> None:
        self.stage = ""
        self.operations: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str, str]] = Counter()

    def listen(self, stage: str, note: str) -> None:
        """A listener of a stage clock."""
        self.stage = stage

    def wait(self, what: str) -> None:
        """Count one."""
        self.waits[self.stage, what, caller()] += 1

    def waits_of(self, stage: str, place: str = "") -> int:
        """Waits of one stage, or of those lines of it whose file and function contain this text."""
        return sum(n for (where, _, line), n in self.waits.items() if where == stage and place in line)

    def clear(self) -> None:
        """Count from zero."""
        self.operations.clear()
        self.waits.clear()


asked = Asked()


def caller() -> str:
    """The innermost line of maestro_pl or callbacks in progress, as ``file:line function``."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for part in OURS:
            if part in name and "/tests/" not in name and "/site-packages/" not in name:
                return f"{part[1:]}{name.split(part)[-1]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class Pretended(torch.Tensor):
    """A tensor on the pretend device; ``inner`` has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    @property
    def data(self) -> torch.Tensor:
        """As of any tensor; setting it sets the numbers too."""
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, new)
        self.inner = new.inner

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_made_of_others(op):  # which autograd takes apart, and tensors of inference mode have none
            return op.decompose(*args, **(kwargs or {}))
        return call(op, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {NAME}:0"

    def __reduce_ex__(self, protocol: Any) -> Any:
        asked.wait("pickled")
        return self.inner.__reduce_ex__(protocol)  # a checkpoint is read on the CPU

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            made = Pretended(self.inner.clone()).requires_grad_(self.requires_grad)
            made.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "inner"})
            memo[id(self)] = made
        return memo[id(self)]

    def tolist(self) -> Any:
        """Numbers of the host's."""
        asked.wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        """Refused, as for a tensor on CUDA."""
        raise TypeError(f"can't convert a {NAME}:0 tensor to numpy, at {caller()}: use Tensor.cpu()")


def call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operation whose operands, or whose result, are on the pretend device."""
    asked.operations[asked.stage] += 1
    tensors = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    if ours and len(ours) < len(tensors):
        check_devices(op, args, tensors)
    to = kwargs.get("device")
    here = bool(ours) if to is None else torch.device(to).type == NAME
    leaves_device = op is aten._to_copy.default and not here and bool(ours)
    if op is aten.copy_.default:
        leaves_device = not isinstance(args[0], Pretended)
    if leaves_device and not kwargs.get("non_blocking", False):
        asked.wait("to the CPU")
    elif ours and waits(op, args, kwargs):
        asked.wait(str(op))
    result = op(*_mapped(_inner, args), **{name: _mapped(_inner, value) for name, value in kwargs.items()})
    if op is aten.copy_.default:
        return args[0]
    wrappers = {id(tensor.inner): tensor for tensor in ours}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in wrappers:  # in place
            return wrappers[id(value)]
        if not here:
            return value
        if value.is_inference() == torch.is_inference_mode_enabled():
            return Pretended(value)
        with torch.inference_mode(value.is_inference()):  # a view of a parameter is none of inference's
            return Pretended(value)

    return _mapped(wrapped, result)


@cache
def _is_made_of_others(op: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"))


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Operations take and give tensors, numbers and lists of them; torch's own tree_map is half of a run's time."""
    return type(value)([_mapped(change, part) for part in value]) if isinstance(value, (list, tuple)) else change(value)


def check_devices(op: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Raise where CUDA would, for an operation on tensors of both devices.

    CPU tensors of no dimension pass for numbers, and indices on the CPU are moved, for which the host need not wait.
    """
    if op in BETWEEN_DEVICES:
        return
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
    if op in BY_INDEX and isinstance(args[0], Pretended):
        indices = {id(leaf) for leaf in _leaves(args[1])}
        strangers = [tensor for tensor in strangers if id(tensor) not in indices]
    written = op._schema.name.endswith("_") and not isinstance(args[0], Pretended)
    indexed = op in BY_INDEX and not isinstance(args[0], Pretended)
    if written or indexed or any(tensor.dim() > 0 or op in WITHOUT_NUMBERS for tensor in strangers):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in strangers)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {op} at {caller()} got tensors on {NAME}:0 and on the CPU "
            f"(shapes {shapes})."
        )


def _inner(value: Any) -> Any:
    if isinstance(value, Pretended):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    return call(op, args, kwargs)


def _cast(op: Any, lower: bool, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(NAME) if lower else torch.float32

    def cast(value: Any) -> Any:
        floats = isinstance(value, Pretended) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return value.to(dtype) if floats else value

    with torch.autocast(NAME, enabled=False):
        return op(*_mapped(cast, args), **{name: cast(value) for name, value in kwargs.items()})


def _swapping(apply: Callable[..., Any]) -> Callable[..., Any]:
    """``Module._apply`` that swaps tensors, so that tied parameters stay tied; what loads models must not swap."""

    def swapped(self: Any, *args: Any, **options: Any) -> Any:
        before = torch.__future__.get_swap_module_params_on_conversion()  # it calls itself for the parts of a module
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(self, *args, **options)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return swapped


_libraries: list[torch.library.Library] = []


def register() -> None:
    """Make the device known to this process, for good."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if _libraries:
        return
    _setup_privateuseone_for_python_backend(NAME)
    module: Any = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    everything, kernels = (
        torch.library.Library("_", "IMPL", "PrivateUse1"),
        torch.library.Library("aten", "IMPL", "PrivateUse1"),
    )
    everything.fallback(lambda op, *args, **kwargs: call(op, args, kwargs))
    for op in BY_KERNEL:
        kernels.impl(op.name(), partial(_kernel, op))
    through, casts = (torch.library.Library(space, "IMPL", "AutocastPrivateUse1") for space in ("_", "aten"))
    through.fallback(torch.library.fallthrough_kernel)
    for op in (*LOWERED, *RAISED):
        casts.impl(op.name(), partial(_cast, op, op in LOWERED))
    _libraries.extend((everything, kernels, through, casts))  # they last as long as these objects
    torch.nn.Module._apply = _swapping(torch.nn.Module._apply)  # type: ignore[method-assign]


class PretendAccelerator(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to do."""

    def teardown(self) -> None:
        """Nothing to do."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """None are kept."""
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """There is one."""
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """It."""
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """It is, where it is registered."""
        return bool(_libraries)

    @staticmethod
    def name() -> str:
        """As torch calls it."""
        return NAME


class PretendStrategy(SingleDeviceStrategy):
    """A run on the device, as a config can name it (``trainer.strategy``)."""

    def __init__(self) -> None:
        super().__init__(torch.device(NAME, 0), accelerator=PretendAccelerator())
