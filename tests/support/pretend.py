"""A pretend accelerator: tensors that claim the device ``pretend:0`` while their numbers are on the CPU.

It shows what otherwise only a real accelerator shows: operands on two devices, which raise, and reads that make the
host wait for the device, which are counted. What is computed is what the CPU computes.

The device is the process's for good (:func:`register`), so it belongs into a process of its own: ``tests/pretend/``.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._pytree import tree_leaves, tree_map

from tests.support.waits import BY_INDEX, aten, waits

NAME = "pretend"
BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default}
#: Where a CPU tensor of no dimension does not pass for a number.
WITHOUT_NUMBERS = {aten.cat.default, aten.stack.default, aten.index_copy.default, aten.index_add.default}
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

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
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
    result = op(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if op is aten.copy_.default:
        return args[0]
    wrappers = {id(tensor.inner): tensor for tensor in ours}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in wrappers:  # in place
            return wrappers[id(value)]
        return Pretended(value) if here else value

    return tree_map(wrapped, result)


def check_devices(op: Any, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Raise where CUDA would, for an operation on tensors of both devices.

    CPU tensors of no dimension pass for numbers, and indices on the CPU are moved, for which the host need not wait.
    """
    if op in BETWEEN_DEVICES:
        return
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
    if op in BY_INDEX and isinstance(args[0], Pretended):
        indices = {id(leaf) for leaf in tree_leaves(args[1])}
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


def _through_the_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A factory whose kernel resizes an empty result, which a wrapper cannot; the result is moved instead."""

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == NAME:
            return make(*args, **options).to(NAME)
        return make(*args, device=device, **options)

    return made


def _swapping(apply: Callable[..., Any]) -> Callable[..., Any]:
    """``Module._apply`` that swaps tensors, so that tied parameters stay tied; what loads models must not swap."""

    def swapped(self: Any, *args: Any, **options: Any) -> Any:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(self, *args, **options)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return swapped


_library: list[torch.library.Library] = []


def register() -> None:
    """Make the device known to this process, for good."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if _library:
        return
    _setup_privateuseone_for_python_backend(NAME)
    module: Any = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    library = torch.library.Library("_", "IMPL", "PrivateUse1")
    library.fallback(lambda op, *args, **kwargs: call(op, args, kwargs))
    _library.append(library)  # it lasts as long as this object
    for name in ("tensor", "as_tensor", "arange"):
        setattr(torch, name, _through_the_cpu(getattr(torch, name)))
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
        return bool(_library)

    @staticmethod
    def name() -> str:
        """As torch calls it."""
        return NAME


class PretendStrategy(SingleDeviceStrategy):
    """A run on the device, as a config can name it (``trainer.strategy``)."""

    def __init__(self) -> None:
        super().__init__(torch.device(NAME, 0), accelerator=PretendAccelerator())
