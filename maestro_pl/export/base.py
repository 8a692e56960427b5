"""The base model of a run as it lies on disk or on the hub: its config, its safetensors files, and a model without weights."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.export.trained_run import DEFAULT_MODEL, TrainedRun, first_line
from maestro_pl.policy.loading import LoRA, load_model, resolve_model, with_adapters, without_computed_init

HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "token")  # of from_pretrained: where files are
FILE_OPTIONS = ("variant", "use_safetensors")  # which of them
OTHER_OPTIONS = (
    "dtype",
    "torch_dtype",
    "quantization_config",
    "attn_implementation",
)  # say nothing of the model itself
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: where it is, and what its header says; ``dtype`` is None for an exotic one."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Base:
    """A base model that has been found, and not loaded.

    Attributes:
        name: hub id or folder, as ``from_pretrained`` takes it.
        options: the run's options of ``from_pretrained`` that say where its files are.
        changes: attributes of the config that the run's options of ``from_pretrained`` change.
        trust_remote_code: passed to transformers.
        raw: its ``config.json``.
        stored: its tensors by name; empty where there are no safetensors files.
    """

    name: str
    options: dict[str, Any]
    changes: dict[str, Any]
    trust_remote_code: bool
    raw: dict[str, Any]
    stored: dict[str, Stored] = field(repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether it lies on this machine, and is no hub id."""
        return Path(self.name).is_dir()

    @property
    def address(self) -> str:
        """Where other programs find it: a hub id, or a folder by its whole path."""
        return str(Path(self.name).resolve()) if self.is_folder else self.name

    @property
    def quantized(self) -> str | None:
        """How its files are quantised, or None."""
        config = self.raw.get("quantization_config") or (self.raw.get("text_config") or {}).get("quantization_config")
        return None if not config else str(config.get("quant_method", "an unnamed method"))

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of most of its bytes on disk; without safetensors files, what its config says."""
        sizes: dict[torch.dtype, int] = {}
        for stored in self.stored.values():
            if stored.dtype is not None and stored.dtype.is_floating_point:
                count = torch.Size(stored.shape).numel() * stored.dtype.itemsize
                sizes[stored.dtype] = sizes.get(stored.dtype, 0) + count
        if sizes:
            return max(sizes, key=lambda dtype: sizes[dtype])
        named = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        dtype: torch.dtype = getattr(torch, str(named))
        return dtype

    def read(self, name: str) -> Tensor:
        """One tensor of its files."""
        with safe_open(self.stored[name].path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def file(self, name: str) -> Path | None:
        """The path of one of its files, fetched from the hub if need be; None where it has no such file."""
        return _file(self.name, name, self.options)

    def config(self) -> Any:
        """Its config, with the changes that the run's options make."""
        from transformers import AutoConfig

        places = {key: value for key, value in self.options.items() if key in HUB_OPTIONS}
        try:
            config = AutoConfig.from_pretrained(self.name, trust_remote_code=self.trust_remote_code, **places)
        except (OSError, ValueError) as error:
            raise UserError(
                f"The config of the base model {self.name!r} cannot be used ({first_line(error)})."
            ) from error
        for name, value in self.changes.items():
            setattr(config, name, value)
        return config

    def load(self, dtype: torch.dtype) -> Any:
        """The model on the CPU, as the run loaded it but never quantised by its options."""
        options = {**self.options, **self.changes}
        return load_model(self.name, dtype=dtype, trust_remote_code=self.trust_remote_code, **options).eval()

    def skeleton(self, lora: LoRA | None) -> Any:
        """The model and its adapters without any memory for weights: names, shapes, scales and ties."""
        from transformers import AutoModelForCausalLM

        config = deepcopy(self.config())
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
            return model if lora is None else with_adapters(model, without_computed_init(lora))


def find_base(run: TrainedRun, override: str | None = None) -> Base:
    """Find the base of a run, without loading it.

    Args:
        run: its config and checkpoint.
        override: a hub id or folder in place of the config's, where the base has moved.

    Raises:
        UserError: it cannot be found.
    """
    policy = run.policy
    name = resolve_model(override or str(policy.get("model", DEFAULT_MODEL)))
    trust = bool(policy.get("trust_remote_code", False))
    given = policy.get("model_options") or {}
    places = () if override else HUB_OPTIONS  # a revision is one of the config's own base
    options = {key: given[key] for key in (*places, *FILE_OPTIONS) if given.get(key) is not None}
    path = _file(name, "config.json", options)
    if path is None:
        raise UserError(
            f"The base model {name!r} was not found: there is no such folder with a config.json, and no hub that this machine "
            "can reach has it. Give --base FOLDER or --base HUB_ID."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({first_line(error)}): fetch the base model again.") from error
    base = Base(name, options, {}, trust, raw, _stored(name, options))
    own = [key for key in given if key not in (*HUB_OPTIONS, *FILE_OPTIONS, *OTHER_OPTIONS)]
    config = base.config() if own else None
    return replace(base, changes={key: given[key] for key in own if hasattr(config, key)})


def _stored(name: str, options: dict[str, Any]) -> dict[str, Stored]:
    if any(key in options for key in FILE_OPTIONS):
        return {}
    if (single := _file(name, WEIGHTS, options)) is not None:
        paths = [single]
    elif (index := _file(name, INDEX, options)) is not None:
        shards = dict.fromkeys(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = []
        for shard in shards:
            path = _file(name, shard, options)
            if path is None:
                raise UserError(f"The base model {name!r} lacks {shard}, which its index names: fetch it again.")
            paths.append(path)
    else:
        return {}
    return {key: stored for path in paths for key, stored in _header(path).items()}


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return {
                key: Stored(path, tuple(part.get_shape()), DTYPES.get(part.get_dtype())) for key, part in slices.items()
            }
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch the base model again.") from error


def _file(name: str, file: str, options: dict[str, Any]) -> Path | None:
    from transformers.utils import cached_file

    places = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    try:
        found = cached_file(name, file, **places)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)
