"""``trainer.strategy: fsdp``: parameters, gradients and optimizer states cut over the ranks."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.distributed.device_mesh import init_device_mesh

from maestro_pl.errors import UserError
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.sharding import gathered_value, share_like
from maestro_pl.run.ranks import broadcast_trained, count_of, gathered
from maestro_pl.training import sharded_files
from maestro_pl.training.checkpointing import KEY
from maestro_pl.training.saving import WholeFileIO

NAME = "fsdp"


class FSDP2Strategy(DDPStrategy):
    """Ranks as with DDP, and PyTorch's ``fully_shard`` on the blocks of the policy's model.

    Adapters, the Conductor and their optimizers stay whole on every rank. Checkpoints are the same single file as
    without, gathered on rank 0, or a file and the shares of every rank; both are resumed on any number of ranks, with any
    strategy.

    Args:
        sync_every_pass: average gradients after every pass of an update, so that a rank keeps its share of them only;
            false: after the last pass, with less to send and whole gradients in memory.
        sharded_checkpoints: where all parameters are trained, every rank writes its own shares of them and of the optimizer's
            states, into a folder beside the checkpoint's file; no host has to hold them all. Read by all that reads a file.
        options: of Lightning's ``DDPStrategy``, such as ``timeout``.

    Raises:
        UserError: this torch cannot write shares.
    """

    def __init__(self, sync_every_pass: bool = True, sharded_checkpoints: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.sync_every_pass, self.sharded_checkpoints = sync_every_pass, sharded_checkpoints
        self._resumed_from: str | None = None
        if sharded_checkpoints:
            sharded_files.check_supported()

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

    def teardown(self) -> None:
        """End; where an error does, leave the module where it is.

        In the middle of a pass FSDP2 has parameters gathered that it cannot move, and would raise over that error.
        """
        module = self.lightning_module
        if module is None or module.trainer.state.status != TrainerStatus.INTERRUPTED:
            super().teardown()
            return
        vars(module)["cpu"] = lambda: module
        try:
            super().teardown()
        finally:
            del vars(module)["cpu"]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the module, whole, on rank 0. Collective where what is trained is cut."""
        module: Any = self.lightning_module
        state: dict[str, Any] = (
            module.shares_state() if self.sharded_checkpoints else module.gathered_state(keep=self.is_global_zero)
        )
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """An optimizer's state as it would be without ranks, on rank 0. Collective where what is trained is cut."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        if self.sharded_checkpoints:
            return {**state, "state": {number: dict(values) for number, values in state["state"].items()}}
        whole: dict[Any, dict[str, Any]] = {}
        for number, values in state["state"].items():
            whole[number] = {}
            for name, value in values.items():
                everything = gathered_value(value)
                if self.is_global_zero:
                    # to the host one by one: the device has no room for all of them
                    whole[number][name] = everything.cpu() if everything is not value else value
        return {**state, "state": whole}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the shares first, then the file that names them. Collective where what is trained is cut."""
        parts = sharded_files.take_out(checkpoint) if self.sharded_checkpoints else {}
        if not parts:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if "://" in str(filepath):
            raise UserError(
                f"FSDP2Strategy(sharded_checkpoints=True) writes into folders of this machine, not to {filepath}."
            )
        path = Path(filepath)
        token = gathered(secrets.token_hex(4))[0]
        folder = path.with_name(f"{path.name}{sharded_files.MARK}{token}")
        try:
            sharded_files.write(folder, parts)
            seen = gathered(sorted(file.name for file in folder.iterdir()))
            own = sharded_files.checksums(folder, sharded_files.own_names(seen, self.global_rank))
            sums = {name: value for part in gathered(own) for name, value in part.items()}
            if self.is_global_zero:
                checkpoint[KEY][sharded_files.ENTRY] = {"folder": folder.name, "files": sums}
                super().save_checkpoint(checkpoint, filepath, storage_options)
        except UserError:
            if self.is_global_zero:  # what no file names would stay on a disk that may be full
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.is_global_zero:
            sharded_files.remove_others(path, folder)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file; shares of optimizers are left to :meth:`load_optimizer_state_dict`."""
        if isinstance(self.checkpoint_io, WholeFileIO):
            self.checkpoint_io.leaves_optimizers = True
        self._resumed_from = str(checkpoint_path)
        loaded: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        return loaded

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of what :meth:`optimizer_state` gave, or of what the ranks wrote. Collective."""
        folder = sharded_files.folder_of(self._resumed_from or "", checkpoint[KEY])
        if folder is not None:
            parts = sharded_files.shares_for(folder, self.optimizers)
            sharded_files.load(folder, parts, alone=False)
            sharded_files.put_back(dict(checkpoint), parts)
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
