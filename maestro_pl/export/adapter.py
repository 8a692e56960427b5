"""The adapters alone, in PEFT's own format."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.export.base import Base
from maestro_pl.export.trained_run import TrainedRun
from maestro_pl.policy.loading import ADAPTER, changes_base

ADAPTER_FILE = "adapter_model.safetensors"


def check_has_adapter(run: TrainedRun) -> None:
    """Refuse a run whose training does not fit into adapters beside a plain base.

    Raises:
        UserError: saying why.
    """
    if run.lora is None:
        raise UserError(f"{run.folder} trained the whole model (lora: null), so there is no adapter: give --to merged.")
    if (init := changes_base(run.lora)) is not None:
        raise UserError(
            f"The adapters of {run.folder} were initialised by {init}, which changes the base's weights: beside the plain "
            "base they mean something else. Give --to merged."
        )


def write_adapter(folder: Path, run: TrainedRun, base: Base, skeleton: Any) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: where to.
        run: its config and checkpoint.
        base: what the adapters stand on; its address goes into the config.
        skeleton: the base and its adapters without weights, which knows PEFT's names for what is saved.
    """
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(
        skeleton, state_dict=run.state, adapter_name=ADAPTER, save_embedding_layers=False
    )
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / ADAPTER_FILE, {"format": "pt"}
    )
    config = deepcopy(skeleton.peft_config[ADAPTER])
    config.base_model_name_or_path = base.address
    config.revision = base.options.get("revision")
    config.inference_mode = True
    config.save_pretrained(str(folder))
