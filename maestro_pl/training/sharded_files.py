"""Checkpoints of which every rank writes its share: a folder of safetensors beside the file that stays small.

What is cut over the ranks goes through ``torch.distributed.checkpoint``, so that no host ever holds all of it, into
``NAME.ckpt.shards-TOKEN/``; the rest is the usual file, which names the folder and the checksum of each of its files. The
folder is written first: whatever happens in between, ``NAME.ckpt`` and its shares belong together.
"""

from __future__ import annotations

import glob
import inspect
import shutil
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from maestro_pl.errors import UserError

ENTRY = "shards"  # of our entry of a checkpoint
MARK = ".shards-"
STATE, OPTIMIZERS = "state_dict", "optimizer_states"
BLOCK = 2**24  # bytes of a file that are read at once for its checksum


def check_supported() -> None:
    """Raise where this torch cannot write shares.

    Raises:
        UserError: saying which can.
    """
    writer = getattr(_dcp(), "HuggingFaceStorageWriter", None)
    if writer is None or "save_distributed" not in inspect.signature(writer.__init__).parameters:
        raise UserError(
            f"FSDP2Strategy(sharded_checkpoints=True) needs torch 2.9 or later, this is {torch.__version__}: upgrade it, or "
            "leave the option out, and checkpoints are gathered on rank 0."
        )


def take_out(checkpoint: dict[str, Any]) -> dict[str, DTensor]:
    """Remove from a checkpoint what is cut over the ranks, and return it by its place.

    Places are ``state_dict/NAME`` and ``optimizer_states/OPTIMIZER/PARAMETER/NAME``.
    """
    taken: dict[str, DTensor] = {}
    for name, value in list(checkpoint[STATE].items()):
        if isinstance(value, DTensor):
            taken[f"{STATE}/{name}"] = checkpoint[STATE].pop(name)
    for number, optimizer in enumerate(checkpoint.get(OPTIMIZERS, ())):
        for parameter, values in optimizer["state"].items():
            for name, value in list(values.items()):
                if isinstance(value, DTensor):
                    taken[f"{OPTIMIZERS}/{number}/{parameter}/{name}"] = values.pop(name)
    return taken


def put_back(checkpoint: dict[str, Any], parts: dict[str, Any]) -> None:
    """The inverse of :func:`take_out`."""
    for place, value in parts.items():
        top, rest = place.split("/", 1)
        if top == STATE:
            checkpoint[STATE][rest] = value
        else:
            number, parameter, name = rest.split("/", 2)
            checkpoint[OPTIMIZERS][int(number)]["state"].setdefault(int(parameter), {})[name] = value


def write(folder: Path, parts: dict[str, DTensor]) -> None:
    """Every rank writes its shares. Collective.

    Raises:
        UserError: a file cannot be written.
    """
    dcp = _dcp()
    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(parts), storage_writer=writer)
    except (OSError, dcp.CheckpointException) as error:
        raise UserError(f"The checkpoint's shares {folder} cannot be written: {_cause(error)}.") from error


def load(folder: Path, parts: dict[str, Any], alone: bool) -> None:
    """Read into tensors, whole ones or shares of any number of ranks, what a folder has under their places.

    Args:
        folder: of the shares.
        parts: tensors by place, which are overwritten.
        alone: False: all ranks read together, each its own shares. Collective.

    Raises:
        UserError: a file cannot be read, or has no such tensor.
    """
    dcp = _dcp()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # disabled, as asked
            dcp.load(parts, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        raise UserError(f"The checkpoint's shares {folder} cannot be read ({_cause(error)}).") from error


def places(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Empty tensors on the host for what a folder has under the wanted places."""
    entries = _dcp().HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        place: torch.empty(entry.size, dtype=entry.properties.dtype)
        for place, entry in entries.items()
        if wanted(place)
    }


def folder_of(path: str | Path, entry: dict[str, Any]) -> Path | None:
    """The folder of a checkpoint's shares; None where it is one file."""
    noted = entry.get(ENTRY)
    return None if noted is None else Path(path).parent / noted["folder"]


def shares_for(folder: Path, optimizers: Sequence[Any]) -> dict[str, Any]:
    """Empty shares, for each optimizer's parameters, of the states that a folder has."""
    parts: dict[str, Any] = {}
    for place, whole in places(folder, lambda place: place.startswith(f"{OPTIMIZERS}/")).items():
        number, parameter, _ = place.removeprefix(f"{OPTIMIZERS}/").split("/", 2)
        own = [p for group in optimizers[int(number)].param_groups for p in group["params"]][int(parameter)]
        parts[place] = torch.zeros_like(own, dtype=whole.dtype).detach() if whole.shape == own.shape else whole
    return parts


def fill(checkpoint: dict[str, Any], path: str | Path, entry: dict[str, Any], top: str | None = None) -> None:
    """Put the shares of a checkpoint that was read from ``path`` back, whole.

    Args:
        checkpoint: what the file holds.
        path: of the file.
        entry: ours, of the checkpoint.
        top: ``state_dict`` or ``optimizer_states``: only these; None: both.
    """
    folder = folder_of(path, entry)
    if folder is None:
        return
    parts = places(folder, lambda place: top is None or place.startswith(f"{top}/"))
    load(folder, parts, alone=True)
    put_back(checkpoint, parts)


def checksums(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """CRC-32 of these files of a folder."""
    return {name: _checksum(folder / name) for name in names}


def check(path: str | Path, entry: dict[str, Any]) -> None:
    """Refuse a checkpoint whose shares are not all there, or not what was written.

    Raises:
        UserError: naming the file.
    """
    noted = entry.get(ENTRY)
    if noted is not None and not _names_files(noted):
        raise UserError(
            f"The checkpoint {path} does not say where its shares are ({ENTRY}: {noted!r:.80}): use another one."
        )
    folder = folder_of(path, entry)
    if folder is None:
        return
    if not folder.is_dir():
        raise UserError(
            f"The checkpoint {path} is one of several ranks, and the folder of their shares, {folder}, is not there: keep "
            "the two together."
        )
    for name, expected in entry[ENTRY]["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"The checkpoint {path} lacks the file {folder / name}: use an earlier one of the run.")
        if _checksum(folder / name) != expected:
            raise UserError(
                f"The checkpoint {path} is damaged (the checksum of {folder / name} is wrong): use an earlier one of the run."
            )


def remove_others(path: Path, kept: Path | None) -> None:
    """Remove what is left of shares that the checkpoint of this name no longer has."""
    for folder in list(path.parent.glob(f"{glob.escape(path.name + MARK)}*")):
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)


def own_names(seen: Sequence[Sequence[str]], rank: int) -> list[str]:
    """The files whose checksum a rank computes.

    Args:
        seen: what each rank sees of the folder: not the same where the disk is not one, or is late to say what is on it.
        rank: of these.
    """
    names = sorted(set().union(*seen))
    seers = [[number for number, files in enumerate(seen) if name in files] for name in names]
    return [name for place, name in enumerate(names) if seers[place][place % len(seers[place])] == rank]


def _names_files(noted: Any) -> bool:
    """Whether an entry of a checkpoint, which anybody may have written, names a folder beside it and checksums."""
    folder, files = (noted.get(key) if isinstance(noted, dict) else None for key in ("folder", "files"))
    named = isinstance(folder, str) and MARK in folder and Path(folder).name == folder
    return named and isinstance(files, dict) and all(isinstance(name, str) for name in files)


def _dcp() -> Any:
    import torch.distributed.checkpoint  # half a second that most runs need not wait

    return torch.distributed.checkpoint


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def _cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]
