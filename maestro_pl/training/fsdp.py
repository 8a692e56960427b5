"""``trainer.strategy: fsdp``: parameters, gradients and optimizer states cut over the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import init_device_mesh

from maestro_pl.errors import UserError
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.sharding import gathered_value, share_like
from maestro_pl.run.ranks import broadcast_trained, count_of

NAME = "fsdp"


class FSDP2Strategy(DDPStrategy):
    """Ranks as with DDP, and PyTorch's ``fully_shard`` on the blocks of the policy's model.

    Adapters, the Conductor and their optimizers stay whole on every rank. Checkpoints are the same single file as
    without: gathered on rank 0, and resumed on any number of ranks, with any strategy.

    Args:
        sync_every_pass: average gradients after every pass of an update, so that a rank keeps its share of them only;
            false: after the last pass, with less to send and whole gradients in memory.
        options: of Lightning's ``DDPStrategy``, such as ``timeout``.
    """

    def __init__(self, sync_every_pass: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.sync_every_pass = sync_every_pass

    @property
    def _policy(self) -> LoRAPolicy:
        policy: LoRAPolicy = self.lightning_module.policy  # type: ignore[union-attr, assignment]
        return policy

    def model_to_device(self) -> None:
        """Move what is not cut; the rest is moved block by block while it is cut, so that no device holds all of it."""
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or self._policy.shards is not None:
            super().model_to_device()

    def configure_ddp(self) -> None:
        """Cut the policy; whoever trained it before, all ranks begin with what rank 0 has."""
        module: Any = self.lightning_module
        if self._policy.shards is None:
            broadcast_trained(module, self.root_device)
            mesh = init_device_mesh(self.root_device.type, (count_of(),))
            mixed = module.trainer.precision == "bf16-mixed" and self._policy.lora is None
            self._policy.shard(mesh, torch.bfloat16 if mixed else None, self.sync_every_pass)
            module.to(self.root_device)
        self._policy.cut()

    def setup(self, trainer: Any) -> None:
        """Set up, and gather the parameters for all that comes before the first update."""
        super().setup(trainer)
        self._policy.whole()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the module, whole, on rank 0. Collective where what is trained is cut."""
        state: dict[str, Any] = self.lightning_module.gathered_state(keep=self.is_global_zero)  # type: ignore[union-attr, operator, assignment]
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """An optimizer's state as it would be without ranks, on rank 0. Collective where what is trained is cut."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        whole: dict[Any, dict[str, Any]] = {}
        for number, values in state["state"].items():
            whole[number] = {}
            for name, value in values.items():
                everything = gathered_value(value)
                if self.is_global_zero:
                    # to the host one by one: the device has no room for all of them
                    whole[number][name] = everything.cpu() if everything is not value else value
        return {**state, "state": whole}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of what :meth:`optimizer_state` gave."""
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {
                number: {name: share_like(value, parameters[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            states.append({**saved, "state": shares})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})


def strategy_of(given: Any) -> Any:
    """The strategy that a config means by ``fsdp``; anything else as it is."""
    return FSDP2Strategy() if given == NAME else given


def check_sharding(trainer: Any, policy: LoRAPolicy) -> None:
    """Raise where parameters cannot be cut over the ranks.

    Raises:
        UserError: naming the setting that cannot be combined.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise UserError(
            f"trainer.strategy is Lightning's {type(strategy).__name__}, which cuts the whole module and averages its "
            f"gradients itself: give `--trainer.strategy {NAME}` on the command line, maestro_pl.FSDP2Strategy() in Python."
        )
    if not isinstance(strategy, FSDP2Strategy):
        return
    if policy.quantization != "none" or policy.stored_quantization is not None:
        raise UserError(
            f"trainer.strategy={NAME} cuts parameters, and the base is quantised "
            f"({policy.stored_quantization or policy.quantization}): give policy.quantization: none and a 16-bit model, or "
            "leave the strategy out."
        )
    if policy.activation_offload:
        raise UserError(
            f"trainer.strategy={NAME} frees parameters that model.policy.activation_offload would move to the host: leave one "
            "of them out."
        )
    if trainer.precision == "16-mixed":
        raise UserError(
            f"trainer.strategy={NAME} keeps no loss scale over the ranks, which trainer.precision=16-mixed needs: give "
            "bf16-mixed or 32-true."
        )
