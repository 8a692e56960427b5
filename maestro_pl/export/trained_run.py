"""The run that is exported: its config, its checkpoint, and the trained part of its policy."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.policy.loading import REFERENCE_ADAPTER, LoRA, belongs_to
from maestro_pl.run.paths import last_checkpoint
from maestro_pl.run.yaml_files import read_yaml
from maestro_pl.training import sharded_files
from maestro_pl.training.checkpointing import KEY, check_file

POLICY = "policy.model."
DEFAULT_MODEL, DEFAULT_DTYPE = "sandbox", "bfloat16"


@dataclass(frozen=True)
class TrainedRun:
    """A run and one of its checkpoints.

    Attributes:
        folder: the run's folder.
        checkpoint: the file.
        config: the run's saved config.
        saved: what the checkpoint says of the run besides its parameters
            (``maestro_pl.training.checkpointing.collect``).
        state: the trained parameters by their name in ``LoRAPolicy.model``; a synced reference is left out.
        soup: folders and shares of the runs that this one is the average of; empty where it is one that was trained.
    """

    folder: Path
    checkpoint: Path
    config: dict[str, Any]
    saved: dict[str, Any]
    state: dict[str, Tensor]
    soup: tuple[tuple[str, float], ...] = ()

    @property
    def policy(self) -> dict[str, Any]:
        """The arguments of the run's policy, as far as the config holds them."""
        given = (self.config.get("model") or {}).get("policy") or {}
        arguments = dict(given.get("init_args", {}) if "class_path" in given else given)
        settings = self.saved.get("settings", {})
        if "policy.base" in settings:  # the run went on from stored adapters, which have settings of their own
            prefix = "policy.lora."
            arguments |= {"model": settings["policy.base"], "tokenizer": settings["policy.tokenizer"]}
            arguments["lora"] = {
                name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)
            }
        return arguments

    @property
    def lora(self) -> LoRA | None:
        """The adapters; None for a run that trained the whole model.

        Raises:
            UserError: the config has settings of adapters that this version does not know.
        """
        given = self.policy.get("lora", {})
        if given is None:
            return None
        known = {field.name for field in fields(LoRA)}
        unknown = sorted(set(given) - known - {"dtype"})  # the checkpoint's tensors have it
        if unknown:
            raise UserError(
                f"{self.folder / 'config.yaml'} has model.policy.lora.{unknown[0]}, which this version does not know: export "
                "with the version that trained the run."
            )
        return LoRA(**{name: value for name, value in given.items() if name in known})

    @property
    def dtype(self) -> torch.dtype:
        """What the base was computed in."""
        dtype: torch.dtype = getattr(torch, str(self.policy.get("dtype") or DEFAULT_DTYPE))
        return dtype

    @property
    def quantization(self) -> str | None:
        """How the base was stored in the run where it was quantised, such as ``nf4``."""
        kind = self.policy.get("quantization", "none")
        if kind not in (None, "none"):
            return str(kind)
        options = self.policy.get("model_options") or {}
        asked = {**(options.get("quantization_config") or {}), **options}
        if asked.get("load_in_4bit"):
            return str(asked.get("bnb_4bit_quant_type", "fp4"))
        return "int8" if asked.get("load_in_8bit") else str(asked["quant_method"]) if "quant_method" in asked else None

    @property
    def steps(self) -> int:
        """Policy steps behind the checkpoint."""
        return int(self.saved["policy_steps"])


def read_trained_run(run: str, which: str = "last") -> TrainedRun:
    """Read a run's config and one of its checkpoints.

    Args:
        run: the run's folder, or a checkpoint inside it.
        which: ``last``, ``best`` (by what the run's ModelCheckpoint monitors), or the path of a checkpoint.

    Raises:
        UserError: there is no such run or checkpoint, or one of its files cannot be read.
    """
    path = Path(run)
    if not path.exists():
        raise UserError(
            f"There is no run {run!r}: give a run's folder, such as runs/NAME/version_0, or a checkpoint in it."
        )
    if path.is_file() and which != "last":
        raise UserError(f"{run} is a checkpoint already: leave --checkpoint {which} out, or give the run's folder.")
    checkpoint = path if path.is_file() else find_checkpoint(path, which)
    folder = path if (path / "config.yaml").is_file() else checkpoint.resolve().parents[1]
    content = read_checkpoint(checkpoint)
    sharded_files.fill(content, checkpoint, content[KEY], sharded_files.STATE)
    config = _read_config(folder / "config.yaml", checkpoint)
    state = {
        name.removeprefix(POLICY): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(POLICY) and not belongs_to(name, REFERENCE_ADAPTER)
    }
    if not state:
        raise UserError(f"{checkpoint} holds no parameters of a policy: give the checkpoint of a `maestro-pl fit`.")
    return TrainedRun(folder, checkpoint, config, content[KEY], state)


def find_checkpoint(folder: Path, which: str) -> Path:
    """The ``last`` or ``best`` checkpoint of a run, or the one with this path, from here or from the run's folder.

    Raises:
        UserError: there is none.
    """
    if which == "last":
        try:
            return last_checkpoint(folder)
        except UserError as error:
            raise UserError(
                f"There is no last checkpoint in {folder}{_others(folder)}: give --checkpoint PATH, or the folder of a run "
                "that saved one."
            ) from error
    if which == "best":
        return _best(folder)
    for candidate in (Path(which), folder / which, folder / "checkpoints" / which):
        if candidate.is_file():
            return candidate
    raise UserError(f"--checkpoint {which}: there is no such file{_others(folder)}; give last, best or a path.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a whole checkpoint of ours; tensors are read from the file when they are used.

    Raises:
        UserError: it is damaged, or another program wrote it.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a checkpoint, or only a part of one: give another with --checkpoint.")
    try:
        check_file(str(path))
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a checkpoint of maestro_pl ({first_line(error)}).") from error
    return content


def _best(folder: Path) -> Path:
    """What a ``ModelCheckpoint`` with a ``monitor`` calls the best, as the newest checkpoint remembers it."""
    found = _checkpoints(folder)
    if not found:
        raise UserError(f"There is no checkpoint in {folder}: give the folder of a run that saved one.")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    for state in read_checkpoint(newest).get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("monitor") and state.get("best_model_path"):
            best = Path(state["best_model_path"])
            for candidate in (newest.parent / best.name, best):
                if candidate.is_file():
                    return candidate
            raise UserError(f"The best checkpoint of {folder}, {best}, is gone: give --checkpoint last or a path.")
    raise UserError(
        f"--checkpoint best: {folder} has watched no metric. Give --checkpoint last or a path; a run knows its best one with a "
        "lightning.pytorch.callbacks.ModelCheckpoint that has a `monitor` under trainer.callbacks."
    )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted([*folder.glob("checkpoints/*.ckpt"), *folder.glob("*.ckpt")])


def _others(folder: Path) -> str:
    names = [path.name for path in _checkpoints(folder)]
    return f" (there is {', '.join(names[:4])})" if names else ""


def _read_config(path: Path, checkpoint: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path, f"{path}, the run's config,")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so the settings behind {checkpoint} are unknown: give the folder of a `maestro-pl fit`."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: it is the run's config, as `maestro-pl fit` writes it.")
    return content


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
