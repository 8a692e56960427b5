"""What a checkpoint holds besides parameters and optimizers, and the checks when it is loaded. Plain types only."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError
from maestro_pl.rollout import RewardSpec
from maestro_pl.run.random_state import rng_state

KEY = "maestro"
FORMAT = 1


class Checkpointed(Protocol):
    """What is asked of the module whose run is saved and gone on with."""

    reward_specs: list[RewardSpec]
    own_rng: dict[str, Any] | None

    @property
    def trainer(self) -> Any:
        """Lightning's trainer."""

    def settings(self) -> dict[str, Any]:
        """The settings that shape training, as plain values."""

    def training_state(self) -> dict[str, Any]:
        """Counters and buffers, as plain values and tensors."""

    def load_training_state(self, saved: dict[str, Any]) -> None:
        """Take them back."""

    def check_settings(self, saved: dict[str, Any]) -> None:
        """Raise where a checkpoint made with these settings cannot serve this run."""

    def check_rewards(self, saved: list[RewardSpec]) -> None:
        """Raise where a checkpoint made with these rewards cannot serve this run."""

    def state_dict(self) -> dict[str, Any]:
        """The parameters that a checkpoint holds."""


def check_file(path: str) -> None:
    """Refuse a file that is no whole checkpoint of ours before anything is built from it.

    Raises:
        UserError: bytes of it are damaged, or another program wrote it.
    """
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:
            raise UserError(f"The checkpoint {path} is damaged (a checksum is wrong): use an earlier one of the run.")
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(saved, dict) or KEY not in saved:
        raise UserError(f"{path} has no 'maestro' entry, so maestro_pl did not write it: give a checkpoint of a run.")


def collect(module: Checkpointed) -> dict[str, Any]:
    """Everything of a run's state that is neither a parameter nor an optimizer."""
    return {
        "format": FORMAT,
        "module": type(module).__name__,
        "rewards": [[s.name, s.role, s.normalize, s.pass_at_k] for s in module.reward_specs],
        "settings": module.settings(),
        "optimizers": [type(optimizer).__name__ for optimizer in module.trainer.optimizers],
        **module.training_state(),
        "rng": rng_state() if module.own_rng is None else module.own_rng,
    }


def restore(module: Checkpointed, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Check a checkpoint against the module, take its counters and buffer back, and return our entry.

    Raises:
        UserError: it is no checkpoint of ours, or its parameters or rewards are not those of this module.
    """
    if KEY not in checkpoint:
        raise UserError(
            "This checkpoint was not written by maestro_pl (no 'maestro' entry): give one from a run's folder."
        )
    saved = checkpoint[KEY]
    if saved["format"] > FORMAT:
        raise UserError(
            f"The checkpoint has format {saved['format']}, newer than this version reads ({FORMAT}): upgrade."
        )
    if saved["module"] != type(module).__name__:
        raise UserError(
            f"The checkpoint is one of {saved['module']}, this run trains a {type(module).__name__}: give the --method "
            "of the run that it comes from, or leave --ckpt_path out."
        )
    specs = [RewardSpec(*fields) for fields in saved["rewards"]]
    module.check_rewards(specs)
    module.check_settings(saved["settings"])
    _report_differences(
        {**saved["settings"], **_by_name(specs)}, {**module.settings(), **_by_name(module.reward_specs)}
    )
    _check_parameters(checkpoint["state_dict"], module.state_dict())
    module.load_training_state(saved)
    entry: dict[str, Any] = saved
    return entry


def check_optimizers(saved: dict[str, Any], optimizers: Sequence[Any]) -> None:
    """Refuse to load the state of one optimizer into another.

    Raises:
        UserError: the checkpoint's optimizers are not those of this run.
    """
    names = [type(optimizer).__name__ for optimizer in optimizers]
    if saved["optimizers"] != names:
        raise UserError(
            f"The checkpoint was made with the optimizers {saved['optimizers']}, this run has {names}: resume with the same "
            "ones, or start a new run."
        )


def group_options(optimizer: Any) -> list[dict[str, Any]]:
    """The options of each parameter group (learning rate, weight decay, ...), without the parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def reapply_options(optimizers: Sequence[Any], configured: list[list[dict[str, Any]]], scheduled: list[bool]) -> None:
    """Let the config decide again, where Lightning has restored the checkpoint's options with the optimizer's state.

    A scheduled learning rate stays where the scheduler's state has brought it. Differences are reported.
    """
    for optimizer, groups, has_scheduler in zip(optimizers, configured, scheduled, strict=False):
        for group, options in zip(optimizer.param_groups, groups, strict=True):
            own = {k: v for k, v in options.items() if not (has_scheduler and k in ("lr", "initial_lr"))}
            changed = [f"{k}: {group.get(k)!r} -> {v!r}" for k, v in own.items() if group.get(k) != v]
            if changed:
                rank_zero_warn(f"{type(optimizer).__name__} goes on with this run's options: " + "; ".join(changed))
            group.update(own)


def _by_name(specs: Sequence[RewardSpec]) -> dict[str, Any]:
    return {f"reward {spec.name}": f"role {spec.role}, normalize {spec.normalize}" for spec in specs}


def _report_differences(saved: dict[str, Any], current: dict[str, Any]) -> None:
    keys = [*saved, *(key for key in current if key not in saved)]
    changed = [f"{k}: {saved.get(k)!r} -> {current.get(k)!r}" for k in keys if saved.get(k) != current.get(k)]
    if changed:
        rank_zero_warn(
            "The checkpoint was made with other settings; this run goes on with its own (checkpoint -> now): "
            + "; ".join(changed)
        )


def _check_parameters(saved_state: dict[str, Any], state: dict[str, Any]) -> None:
    saved, current = set(saved_state), set(state)
    missing, unexpected = sorted(current - saved), sorted(saved - current)
    for name in sorted(saved & current):
        if saved_state[name].shape != state[name].shape:
            raise UserError(
                f"The checkpoint does not fit: {name} has the shape {tuple(saved_state[name].shape)} in it and "
                f"{tuple(state[name].shape)} here. Use the LoRA rank and the weigher of the run it comes from."
            )
    if missing or unexpected:
        raise UserError(
            f"The checkpoint does not fit this policy and weigher: {len(missing)} parameters are missing from it "
            f"(first: {missing[:1]}), {len(unexpected)} are unknown here (first: {unexpected[:1]}). Use the same model, "
            "LoRA targets and weigher as the run it comes from."
        )
