"""What a checkpoint holds besides parameters and optimizers, and the checks when it is loaded. Plain types only."""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError, printable
from maestro_pl.rollout import RewardSpec
from maestro_pl.run.random_state import rng_state
from maestro_pl.training import sharded_files

KEY = "maestro"
FORMAT = 1


class Checkpointed(Protocol):
    """What is asked of the module whose run is saved and gone on with."""

    reward_specs: list[RewardSpec]
    run_config: str
    own_rng: dict[str, Any] | None
    rngs: list[dict[str, Any]]

    @property
    def trainer(self) -> Any:
        """Lightning's trainer."""

    def optimizer_parts(self) -> list[tuple[Any, Any, Any]]:
        """Parameters, optimizer and scheduler of everything that is trained."""

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
    if sharded_files.ENTRY in entry:
        _check_shares(path, status.st_mtime_ns, status.st_size)


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
            damaged = _is_damaged(archive)
    except _UNREADABLE as error:  # no directory at the end of the file
        raise UserError(f"{path!r} is not a checkpoint, or only a part of one.") from error
    if damaged:
        raise UserError(f"The checkpoint {path} is damaged (a checksum is wrong): use an earlier one of the run.")


@lru_cache(maxsize=8)
def _check_shares(path: str, mtime_ns: int, size: int) -> None:
    sharded_files.check(path, read_plain(path)[KEY])


_UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, UnicodeDecodeError)


def _is_damaged(archive: zipfile.ZipFile) -> bool:
    """Whether bytes of an archive whose directory is whole are not those that were written: of an entry or its header."""
    try:
        return archive.testzip() is not None
    except _UNREADABLE:
        return True


def read_plain(path: str) -> dict[str, Any]:
    """The content of a checkpoint, of plain values and tensors only; the tensors are read when they are used.

    Raises:
        UserError: it holds something else, which could be code.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a file of somebody else's can raise anything
        held = re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error))  # below a page of torch's own advice
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"it holds {held[1]}" if held else printable(first)[:120]
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
        "schedulers": [make_scheduler is not None for _, _, make_scheduler in module.optimizer_parts()],
        **module.training_state(),
        "rng": module.rngs[0] if module.rngs else rng_state() if module.own_rng is None else module.own_rng,
        "rngs": list(module.rngs),
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
    if configs_compared(checkpoint, module.run_config):
        _report_differences(leaves(saved["config"]), leaves(module.run_config))
    else:  # made in Python: what the module knows of itself
        _report_differences(
            {**saved["settings"], **_by_name(specs)}, {**module.settings(), **_by_name(module.reward_specs)}
        )
    if sharded_files.ENTRY in saved and not any(name.startswith("policy.") for name in checkpoint["state_dict"]):
        raise UserError(
            f"The checkpoint's parameters lie in the folder {saved[sharded_files.ENTRY]['folder']} beside it, as each rank "
            "wrote its own: give it to a Trainer or a command as ckpt_path, which reads both, or export it."
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


def configs_compared(checkpoint: dict[str, Any], run_config: str) -> bool:
    """Whether checkpoint and run both know their whole config, so that every key that differs is named from there."""
    return bool(leaves(checkpoint.get(KEY, {}).get("config"))) and bool(leaves(run_config))


#: The keys of a config that a run obeys; the others say where it comes from.
_OBEYED = ("seed_everything", "method", "model", "data", "rollout", "rewards", "anchors", "metrics", "trainer")


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # without libyaml some hundred times slower


@lru_cache(maxsize=4)
def leaves(config: str | None) -> dict[str, Any]:
    """Every value of a config by its dotted key, of the keys that a run obeys; empty where there is no config.

    A class path is a value too, and the entries of a list are numbered.
    """
    content = yaml.load(config, _LOADER) if config else None
    found: dict[str, Any] = {}

    def walk(key: str, value: Any) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if not pairs or value in ({}, []):
            found[key] = value
        for name, entry in pairs:
            walk(f"{key}.{name}", entry)

    for key in _OBEYED:
        if isinstance(content, dict) and content.get(key) is not None:
            walk(key, content[key])
    return {key.replace(".init_args.", "."): value for key, value in found.items()}


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


def reapply_options(
    optimizers: Sequence[Any], configured: list[list[dict[str, Any]]], scheduled: list[bool], report: bool = True
) -> None:
    """Let the config decide again, where Lightning has restored the checkpoint's options with the optimizer's state.

    Options that a scheduler moves are left to :func:`go_on_with_schedule`. Differences are reported, unless the configs
    were compared already.
    """
    for optimizer, groups, has_scheduler in zip(optimizers, configured, scheduled, strict=False):
        for group, options in zip(optimizer.param_groups, groups, strict=True):
            own = {k: v for k, v in options.items() if not (has_scheduler and k in _SCHEDULED)}
            changed = [f"{k}: {group.get(k)!r} -> {v!r}" for k, v in own.items() if group.get(k) != v]
            if changed and report:
                rank_zero_warn(f"{type(optimizer).__name__} goes on with this run's options: " + "; ".join(changed))
            group.update(own)


_SCHEDULED = ("lr", "initial_lr", "momentum", "betas", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")


def go_on_with_schedule(
    name: str, scheduler: Any, configured: list[dict[str, Any]], saved: dict[str, Any] | None, steps: int
) -> None:
    """Bring a new scheduler to the step that the checkpoint reached, by this run's own settings.

    Where the checkpoint's schedule is the same, its state is taken, to the bit. Where it differs, or the checkpoint has
    none, the schedule is the one that this run would have had from its beginning, which is said.

    Args:
        name: the key of the config, for messages.
        scheduler: new, on an optimizer that has been restored.
        configured: the options of the optimizer's groups as they were with the scheduler at its beginning.
        saved: the checkpoint's state of this scheduler, if it has one.
        steps: how often it was stepped.

    Raises:
        UserError: the schedule is shorter than what is done already.
    """
    groups = scheduler.optimizer.param_groups
    restored = [{key: group[key] for key in _SCHEDULED if key in group} for group in groups]
    for group, options in zip(groups, configured, strict=True):
        group.update({key: value for key, value in options.items() if key in _SCHEDULED})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch does not see that the optimizer was stepped before the checkpoint
            for _ in range(steps):
                scheduler.step()
    except ValueError as error:
        raise UserError(
            f"{name} cannot go on from step {steps}: {error}. Give a longer schedule, or start a new run."
        ) from error
    if saved is not None and _alike(scheduler.state_dict(), saved):
        scheduler.load_state_dict(saved)
        for group, options in zip(groups, restored, strict=True):
            group.update(options)
        return
    rates = [f"{old.get('lr')!r} -> {group['lr']!r}" for old, group in zip(restored, groups, strict=True)]
    rank_zero_warn(
        f"{name} is not the checkpoint's: from step {steps} on the learning rate follows this run's schedule "
        f"(checkpoint -> now: {', '.join(dict.fromkeys(rates))})."
    )


def _alike(one: Any, other: Any) -> bool:
    """Equality, of floats up to rounding."""
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-15)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


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
        found = [(missing, "missing from it"), (unexpected, "unknown here")]
        said = [f"{len(names)} parameters are {what} (first: {names[0]})" for names, what in found if names]
        raise UserError(
            f"The checkpoint does not fit this policy and weigher: {', '.join(said)}. Use the same model, LoRA targets and "
            "weigher as the run it comes from."
        )
