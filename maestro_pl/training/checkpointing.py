"""What a checkpoint holds besides parameters and optimizers, and the checks when it is loaded. Plain types only."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
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
    run_config: str
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


def check_file(path: str, resume: bool = False) -> None:
    """Refuse a file that is no whole checkpoint of ours before anything is built from it.

    Args:
        path: the file.
        resume: whether training goes on from it, which takes more than its parameters.

    Raises:
        UserError: there is none, bytes of it are damaged, entries are missing, or another program wrote it.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no checkpoint {path!r}: give the path of a .ckpt file, or `last`.")
    status = file.stat()
    _check_archive(path, status.st_mtime_ns, status.st_size)
    saved = read_plain(path)
    if KEY not in saved:
        raise UserError(f"{path} has no 'maestro' entry, so maestro_pl did not write it: give a checkpoint of a run.")
    entry = saved[KEY] if isinstance(saved[KEY], dict) else {}
    missing = [name for name in _ENTRIES if name not in entry]
    missing += ["format"] if not isinstance(entry.get("format", 0), int) else []
    missing += [name for name in (*_TOP, *(_TO_RESUME if resume else ())) if name not in saved]
    if missing:
        hint = " (saved with save_weights_only?)" if missing == list(_TO_RESUME) else ""
        raise UserError(f"The checkpoint {path} has no entry {', '.join(map(repr, missing))}{hint}: use another one.")


_TOP = ("state_dict", "pytorch-lightning_version")
_ENTRIES = ("format", "module", "rewards", "settings", "optimizers", "rng")
_TO_RESUME = ("optimizer_states", "lr_schedulers")


@lru_cache(maxsize=8)  # the same file is asked for more than once at the start of a run
def _check_archive(path: str, mtime_ns: int, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch compresses nothing: what would become larger than the file is not unpacked
            if sum(e.file_size for e in entries) > size or any(e.compress_type for e in entries):
                raise UserError(f"{path} is an archive of another program, and no checkpoint of maestro_pl.")
            damaged = archive.testzip() is not None
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"{path!r} is not a checkpoint, or only a part of one.") from error
    if damaged:
        raise UserError(f"The checkpoint {path} is damaged (a checksum is wrong): use an earlier one of the run.")


def read_plain(path: str) -> dict[str, Any]:
    """The content of a checkpoint, of plain values and tensors only; the tensors are read when they are used.

    Raises:
        UserError: it holds something else, which could be code.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a file of somebody else's can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(
            f"{path} is no checkpoint of plain values and tensors, so it is not opened ({reason})."
        ) from error
    if not isinstance(saved, dict):
        raise UserError(f"{path} has no 'maestro' entry, so maestro_pl did not write it: give a checkpoint of a run.")
    return saved


def config_of(path: str) -> str | None:
    """The config of the run that wrote a checkpoint, as YAML; None where it carries none.

    Raises:
        UserError: it is no whole checkpoint of ours.
    """
    check_file(path)
    config = read_plain(path)[KEY].get("config")
    return config if isinstance(config, str) and config else None


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
        **({"config": module.run_config} if module.run_config else {}),
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
    try:
        module.load_training_state(saved)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The checkpoint's counters and buffers cannot be read ({error!r}): use another one."
        ) from error
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
