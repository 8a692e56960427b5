"""What stands beside the weights: config, generation config, tokenizer, code of the model's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import write_whole
from maestro_pl.export.base import Base
from maestro_pl.export.merged import dtype_name
from maestro_pl.export.trained_run import TrainedRun
from maestro_pl.policy.loading import eos_token_ids, load_tokenizer, resolve_model


def tokenizer_of(run: TrainedRun, base: Base) -> Any:
    """The run's tokenizer: its own, or that of the base.

    Raises:
        UserError: it cannot be loaded.
    """
    own = run.policy.get("tokenizer")
    name = resolve_model(str(own)) if own else base.name
    try:
        return load_tokenizer(name, base.trust_remote_code)
    except UserError as error:
        advice = (
            "it is model.policy.tokenizer of the run" if own else "give --base with the folder or hub id that has it"
        )
        raise UserError(f"No tokenizer could be loaded from {name!r}: {advice}.") from error


def write_config(folder: Path, base: Base, dtype: torch.dtype, unties: bool) -> None:
    """Write ``config.json``: the base's own text, not quantised, with this dtype and the run's changes."""
    raw = base.raw
    path = folder / "config.json"
    if path.is_file() and (own := json.loads(path.read_text(encoding="utf-8"))).get("model_type") != raw.get(
        "model_type"
    ):
        raw = {**own, "use_cache": True}  # the language model of a larger one, as transformers has saved it
    raw = {key: value for key, value in raw.items() if key != "quantization_config"} | base.changes
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    raw[key] = dtype_name(dtype)
    if isinstance(text := raw.get("text_config"), dict):
        raw["text_config"] = {k: dtype_name(dtype) if k in ("dtype", "torch_dtype") else v for k, v in text.items()}
    if unties:
        raw["tie_word_embeddings"] = False
        if isinstance(text := raw.get("text_config"), dict):
            raw["text_config"] = {**text, "tie_word_embeddings": False}
    write_whole(path, json.dumps(raw, indent=2, ensure_ascii=False) + "\n")


def write_generation_config(folder: Path, base: Base, tokenizer: Any) -> None:
    """Write ``generation_config.json``: the base's, ending at every token that ended a response in the run."""
    config = base.config()
    if (path := base.file("generation_config.json")) is not None:
        raw = json.loads(path.read_text(encoding="utf-8"))
    else:
        from transformers import GenerationConfig

        raw = GenerationConfig.from_model_config(config).to_diff_dict()
    ends = eos_token_ids(tokenizer, SimpleNamespace(config=config, generation_config=SimpleNamespace(**raw)))
    if ends:
        raw["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_whole(folder / "generation_config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")


def copy_code(folder: Path, base: Base) -> None:
    """Copy the Python files of a base that brings its own code; one from the hub is named in its config."""
    if base.trust_remote_code and base.is_folder:
        for path in sorted(Path(base.name).glob("*.py")):
            shutil.copy2(path, folder / path.name)
