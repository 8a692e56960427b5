"""Half precision: a loss that is scaled so that small gradients are not rounded to zero, and cards that have no bfloat16.

float16 has gradients down to 6e-8 and activations up to 65,504, bfloat16 the range of float32. The adapters, their
gradients and the optimizer stay in float32; what is scaled are the gradients on the way to them.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError
from maestro_pl.policy.policy import LoRAPolicy

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class LossScale:
    """The factor of the loss in float16: halved where a gradient overflows, doubled after 2,000 steps without.

    PyTorch's GradScaler with its defaults. The steps themselves are the stepper's, which counts those that it leaves out.

    Args:
        device_type: where the parameters are.
    """

    def __init__(self, device_type: str) -> None:
        self.scaler = torch.amp.GradScaler(device_type)

    @property
    def value(self) -> float:
        """The factor at the moment."""
        return float(self.scaler.get_scale())

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the factor."""
        scaled: torch.Tensor = self.scaler.scale(loss)
        return scaled

    def unscale(self, optimizers: list[Any]) -> None:
        """Divide the gradients of these optimizers by the factor; those without one are left out."""
        for optimizer in optimizers:
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                self.scaler.unscale_(optimizer)

    def update(self) -> None:
        """After a step, or one that was left out: the factor of the next."""
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The factor, and the steps since it changed."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; of a run that was not in float16 there are none."""
        if state:
            self.scaler.load_state_dict(state)


def loss_scale_of(trainer: Any, policy: LoRAPolicy) -> LossScale | None:
    """The loss scale of a run that computes in float16, which is then the only one; None for all others.

    Raises:
        UserError: parameters would be trained in float16, or the card has no bfloat16 and the run computes in it.
    """
    device, dtypes = trainer.strategy.root_device, compute_dtypes(trainer, policy)
    if device.type == "cuda" and "bfloat16" in dtypes and not has_bfloat16(device):
        raise UserError(
            f"The card {torch.cuda.get_device_name(device)} has no bfloat16, in which this run computes: give "
            "model.policy.dtype: float16 and, if it is set, trainer.precision: 16-mixed (configs/hardware/t4.yaml)."
        )
    if device.type == "cpu" and "bfloat16" in dtypes and not has_bfloat16(device):
        rank_zero_warn(
            "This processor has no instructions for bfloat16, in which this run computes: matrix products take tens of "
            "times as long as in float32. Give model.policy.dtype: float32 and, if it is set, trainer.precision: 32-true."
        )
    if any(p.dtype == torch.float16 for p in policy.trained_parameters()):
        raise UserError(
            "The parameters that are trained are in float16, which rounds their updates to nothing: with policy.lora: null "
            "give policy.dtype: float32 and trainer.precision: 16-mixed."
        )
    if "float16" not in dtypes:
        return None
    if isinstance(trainer.precision_plugin, MixedPrecision):  # one scale, and the steps that it skips are counted
        trainer.precision_plugin.scaler = torch.amp.GradScaler(device.type, enabled=False)
    return LossScale(device.type)


def compute_dtypes(trainer: Any, policy: LoRAPolicy) -> set[str]:
    """In what the policy's layers compute: names of dtypes."""
    found = {str(p.dtype).removeprefix("torch.") for p in policy.model.parameters() if p.is_floating_point()}
    if policy.compute_dtype is not None:
        found.add(policy.compute_dtype)
    return found | {{"16-mixed": "float16", "bf16-mixed": "bfloat16"}.get(trainer.precision, "float32")}


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA card or the processor computes in bfloat16 itself; others are slower in it than in float32."""
    if device.type == "cpu":
        asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # builds without oneDNN cannot say
        return asked is None or bool(asked())
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
