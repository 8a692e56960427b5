"""What a checkpoint holds besides parameters and optimizers, and the checks when it is loaded. Plain types only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError
from maestro_pl.rollout import RewardSpec

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

KEY = "maestro"
FORMAT = 1


def collect(module: MaestroModule) -> dict[str, Any]:
    """Everything of a run's state that is neither a parameter nor an optimizer."""
    return {
        "format": FORMAT,
        "rewards": [[s.name, s.role, s.normalize, s.pass_at_k] for s in module.reward_specs],
        "settings": settings(module),
        "policy_steps": module.policy_steps,
        "conductor_updates": module.conductor_updates,
        "buffer": module.buffer.state_dict(),
        "rng": rng_state(),
    }


def settings(module: MaestroModule) -> dict[str, Any]:
    """The settings that shape training, as plain values, to be compared when a run is resumed."""
    lora = module.policy.lora
    return {
        "policy.model": module.policy.name_or_path,
        "policy.lora": None if lora is None else f"r={lora.r}, alpha={lora.alpha}, targets={lora.target_modules}",
        "policy.reference": module.policy.reference,
        "weigher": type(module.weigher).__name__,
        "meta_signal": type(module.meta_signal).__name__,
        **{
            name: getattr(module, name)
            for name in (
                "conductor_every", "loss_type", "clip_low", "clip_high", "kl_coef", "kl_in", "advantage_scale",
                "updates_per_rollout", "max_grad_norm", "mask_truncated",
            )
        },
    }  # fmt: skip


def restore(module: MaestroModule, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Check a checkpoint against the module, take its counters and buffer back, and return its random state.

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
    specs = [RewardSpec(*fields) for fields in saved["rewards"]]
    if not module.weigher.reward_names:  # loaded outside a Trainer
        module.build(specs)
    names = [spec.name for spec in specs if spec.role == "train"]
    if names != module.weight_names:
        raise UserError(
            f"The checkpoint weighs the rewards {names}, this run {module.weight_names}: use the same reward set in the "
            "same order."
        )
    _report_differences(saved["settings"], settings(module))
    _check_keys(set(checkpoint["state_dict"]), set(module.state_dict()))
    module.policy_steps = saved["policy_steps"]
    module.conductor_updates = saved["conductor_updates"]
    module.buffer.load_state_dict(saved["buffer"], module.device)
    rng: dict[str, Any] = saved["rng"]
    return rng


def _report_differences(saved: dict[str, Any], current: dict[str, Any]) -> None:
    changed = [f"{k}: {saved.get(k)!r} -> {v!r}" for k, v in current.items() if saved.get(k) != v]
    if changed:
        rank_zero_warn(
            "The checkpoint was made with other settings; this run goes on with its own (checkpoint -> now): "
            + "; ".join(changed)
        )


def _check_keys(saved: set[str], current: set[str]) -> None:
    missing, unexpected = sorted(current - saved), sorted(saved - current)
    if missing or unexpected:
        raise UserError(
            f"The checkpoint does not fit this policy and weigher: {len(missing)} parameters are missing from it "
            f"(first: {missing[:1]}), {len(unexpected)} are unknown here (first: {unexpected[:1]}). Use the same model, "
            "LoRA targets and weigher as the run it comes from."
        )


def rng_state() -> dict[str, Any]:
    """Torch's random state: what LoRA dropout and the Conductor's actions draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Take back what :func:`rng_state` gave."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
