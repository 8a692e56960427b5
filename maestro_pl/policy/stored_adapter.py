"""A folder or hub id that holds adapters of PEFT and no model: what they stand on, and how training goes on from them."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from maestro_pl.errors import UserError
from maestro_pl.policy.loading import ADAPTER, LoRA, belongs_to

CONFIG = "adapter_config.json"

#: Fields of ``LoraConfig`` that are ours by another name, or say nothing of the adapters.
NAMED = {
    "r": "r",
    "lora_alpha": "alpha",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
OTHERS = (
    "lora_dropout", "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config",
)  # fmt: skip


@dataclass(frozen=True)
class StoredAdapter:
    """Adapters of PEFT as they were saved.

    Attributes:
        name: the folder or hub id.
        base: that of the model they were trained on.
        settings: the fields of ``LoraConfig`` that differ from its defaults.
    """

    name: str
    base: str
    settings: dict[str, Any]

    def lora(self, given: LoRA) -> LoRA:
        """These adapters as settings of ours; dropout and dtype, which are of the training alone, are the given ones."""
        own = {ours: self.settings[theirs] for theirs, ours in NAMED.items() if theirs in self.settings}
        options = {name: value for name, value in self.settings.items() if name not in NAMED}
        plain = LoRA(**{"r": 8, "alpha": 8, **own}, options=options)  # 8 and 8 are PEFT's defaults
        plain.dropout, plain.dtype = given.dropout, given.dtype
        return plain

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was saved beside them."""
        from transformers.utils import cached_file

        try:
            return cached_file(self.name, "tokenizer_config.json") is not None
        except (OSError, ValueError):
            return False

    def load_into(self, model: Any) -> None:
        """Give the adapters of a model, made with :meth:`lora`, the stored weights.

        Raises:
            UserError: the weights cannot be read, or are not those of these adapters.
        """
        from peft import load_peft_weights, set_peft_model_state_dict

        try:
            weights = load_peft_weights(self.name, device="cpu")
            result = set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
        except Exception as error:  # of whatever kind: files of every state are read here
            raise UserError(
                f"The adapters {self.name!r} cannot be read ({_first_line(error)}): save them again."
            ) from error
        own = [name for name, _ in model.named_parameters() if belongs_to(name, ADAPTER)]
        missing, unknown = sorted(set(own) & set(result.missing_keys)), sorted(result.unexpected_keys)
        if missing or unknown or not weights:
            example = f"without {missing[0]}" if missing else f"with {unknown[0]}" if unknown else "empty"
            raise UserError(
                f"The weights of the adapters {self.name!r} are not those of their {CONFIG} ({example}): save them again, or "
                "merge them into their base first."
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
            raise UserError(
                f"The adapters {self.name!r} hold values that are not finite: take an earlier save of them."
            )


def stored_adapter(name: str) -> StoredAdapter | None:
    """What a folder or hub id says of its adapters, or None where it holds a model.

    Raises:
        UserError: they are no LoRA adapters, or do not say what they stand on.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(name, CONFIG)
    except (OSError, ValueError):
        return None
    if path is None:
        return None
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}): save the adapters again.") from error
    if not isinstance(stored, dict) or stored.get("peft_type") != "LORA":
        kind = stored.get("peft_type") if isinstance(stored, dict) else type(stored).__name__
        raise UserError(
            f"model.policy.model={name!r} holds adapters of the kind {kind}, and only LoRA's can be trained on: merge them "
            "into their base first and give the merged model."
        )
    base = str(stored.get("base_model_name_or_path") or "")
    beside = Path(name) / base
    if base and not Path(base).exists() and beside.is_dir():
        base = str(beside)
    if not base:
        raise UserError(f"{path} does not say which model the adapters stand on: give it as base_model_name_or_path.")
    return StoredAdapter(name, base, _differing(stored))


def _differing(stored: dict[str, Any]) -> dict[str, Any]:
    from peft import LoraConfig

    differing = {}
    for field in fields(LoraConfig):
        if field.name not in stored or field.name in OTHERS:
            continue
        default = field.default if field.default is not MISSING else None
        if field.default_factory is not MISSING:
            made = field.default_factory()
            default = made if isinstance(made, (dict, list, set)) else asdict(made)
        value = stored[field.name]
        if value != default and not (not value and not default and value is not False):
            differing[field.name] = (
                sorted(value) if field.name == "target_modules" and isinstance(value, list) else value
            )
    return differing


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".")
