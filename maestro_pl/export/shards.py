"""Safetensors files written tensor by tensor, so that no more than one of them is in memory.

The format: 8 bytes with the length of a JSON header (little endian), the header with each tensor's dtype, shape and
place, then the bytes of all tensors (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import write_whole
from maestro_pl.export.base import DTYPES, INDEX

NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its shape and dtype, and how to get it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(folder: Path, entries: Mapping[str, Entry], max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write ``model.safetensors``, or several shards and their index."""
    split = split_into_shards(entries, max_shard_size)
    for name, tensors in split.filename_to_tensors.items():
        write_file(folder / name, {tensor: entries[tensor] for tensor in tensors})
    if split.is_sharded:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries.values())},
            "weight_map": dict(sorted(split.tensor_to_filename.items())),
        }
        write_whole(folder / INDEX, json.dumps(index, indent=2))


def split_into_shards(entries: Mapping[str, Entry], max_shard_size: str) -> StateDictSplit:
    """Which tensor goes into which file, in their order.

    Raises:
        UserError: the size is none.
    """
    try:
        return split_state_dict_into_shards_factory(
            dict(entries),
            get_storage_size=lambda entry: entry.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise UserError(f"--max_shard_size {max_shard_size}: expected a size such as 5GB or 500MB.") from error


def write_file(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write one safetensors file.

    Raises:
        RuntimeError: a tensor is not what its entry announced.
    """
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))  # so that all of them are aligned
    header = _header(order, entries)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            entry, tensor = entries[name], entries[name].make()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise RuntimeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {entry}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _header(order: Sequence[str], entries: Mapping[str, Entry]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        entry = entries[name]
        content[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.nbytes],
        }
        place += entry.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)
