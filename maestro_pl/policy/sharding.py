"""A policy whose parameters are cut over the ranks (PyTorch's FSDP2), and whole wherever they are only read.

In an update every rank holds its share of each parameter, and the blocks of the model are gathered one after the other, in
the forward pass and again in the backward. Everything else (rollouts, scoring, evaluation) finds whole parameters: they
are gathered once after the optimizer's step, so that no rank waits for another while it samples or scores, however many
tokens it has.

With adapters only the frozen base is cut; adapters are small, and every rank keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from maestro_pl.errors import UserError
from maestro_pl.run.ranks import gathered

Result = TypeVar("Result")
PASS = "call_inside"  # the method of a model that counts as its forward pass


class Shards:
    """The shares of this rank, and whether the models are whole at the moment.

    Args:
        models: transformers models without their adapters; the first is the policy's, a frozen reference may follow.
        kept: parameters that every rank keeps whole.
        mesh: all ranks, in one dimension.
        gathered_dtype: in what parameters are gathered; None: in their own. Gradients are averaged in float32.
        sync_every_pass: average the gradients after every pass of an update, so that only shares of them are kept; else
            after the last, with less to send and whole gradients in memory.

    Raises:
        UserError: a model whose blocks are not known.
    """

    def __init__(
        self,
        models: Sequence[Any],
        kept: set[nn.Parameter],
        mesh: DeviceMesh,
        gathered_dtype: torch.dtype | None = None,
        sync_every_pass: bool = True,
    ) -> None:
        mixed = MixedPrecisionPolicy(param_dtype=gathered_dtype, reduce_dtype=torch.float32 if gathered_dtype else None)
        self.models: list[Any] = list(models)
        self.sync_every_pass = sync_every_pass
        for model in self.models:
            for module in (*blocks(model), model):
                fully_shard(module, mesh=mesh, ignored_params=kept, mp_policy=mixed)
            setattr(model, PASS, _called)
            register_fsdp_forward_method(model, PASS)
            model.call_inside(tuple)  # which model is the outermost is settled by what is called first
        self.is_whole = True
        self.cut()
        self.trained = [parameter for parameter in self.models[0].parameters() if parameter.requires_grad]

    @property
    def trains_shares(self) -> bool:
        """Whether what is trained is cut; with adapters it is not."""
        return any(isinstance(parameter, DTensor) for parameter in self.trained)

    def whole(self) -> None:
        """Gather every parameter and keep it. Collective, and nothing where they are whole."""
        if self.is_whole:
            return
        for model in self.models:
            model.set_reshard_after_forward(False)
            model.set_reshard_after_backward(False)  # of a gradient by adapters, outside an update
            for module in _cut_modules(model):
                module.unshard()
        self.is_whole = True

    def cut(self) -> None:
        """Keep this rank's share of every parameter."""
        if not self.is_whole:
            return
        for model in self.models:
            model.set_reshard_after_forward(True)
            model.set_reshard_after_forward(False, recurse=False)  # the backward begins with it
            model.set_reshard_after_backward(True)
            for module in _cut_modules(model):
                module.reshard()
        self.is_whole = False

    def call(self, model: Any, compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Compute what needs the embedding and the head of a model beside its blocks.

        Args:
            model: one of those that are cut.
            compute: gives tensors; the backward begins at them.
        """
        result: tuple[Any, ...] = model.call_inside(compute)
        return result

    def passes(self, own: int) -> Iterator[bool]:
        """Of the passes that the ranks make together, whether this rank has work in each: its own come first. Collective."""
        count = max(gathered(own))
        for number in range(1, count + 1):
            self.models[0].set_requires_gradient_sync(self.sync_every_pass or number == count)
            yield number <= own


def blocks(model: Any) -> list[nn.Module]:
    """The transformer blocks of a model.

    Raises:
        UserError: it does not say which of its modules they are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    found = [module for module in found if not any(module is not other and _holds(other, module) for other in found)]
    if not found:
        raise UserError(
            f"trainer.strategy=fsdp cuts a model at its transformer blocks, and {type(model).__name__} names none "
            "(_no_split_modules): use another model, or trainer.strategy auto."
        )
    return found


def gathered_value(value: Any) -> Any:
    """A tensor whole; anything else, and a tensor that is not cut, as it is. Collective for what is cut."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def share_like(value: Any, parameter: Any) -> Any:
    """This rank's share of a whole tensor that belongs to a parameter which is cut; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if isinstance(value, DTensor):  # is cut already
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def own_share(tensor: Tensor) -> Tensor:
    """What of a tensor this rank holds: all of it where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _called(compute: Callable[[], Result]) -> Result:
    return compute()


def _cut_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())
