"""Safetensors files written shard by shard, so that no more than one of them is in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import write_whole
from maestro_pl.export.base import INDEX

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
    """Write one safetensors file; its tensors are in memory together.

    Raises:
        RuntimeError: a tensor is not what its entry announced.
    """
    tensors = {}
    for name, entry in entries.items():
        tensor = tensors[name] = entry.make().contiguous()
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise RuntimeError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, announced was {entry}")
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
