"""A generated world whose best trade-offs are known, and the tiny policy that lives in it."""

from __future__ import annotations

from pathlib import Path

from maestro_pl.run.paths import sandbox_model
from maestro_pl.sandbox.utility import TASKS, noisy_utility, simulated_choice, true_utility
from maestro_pl.sandbox.world import rows

__all__ = ["TASKS", "noisy_utility", "policy_path", "preference_path", "rows", "simulated_choice", "true_utility"]


def assets_path() -> Path:
    """The folder of the shipped models."""
    return sandbox_model("policy").parent


def policy_path() -> Path:
    """The folder of the tiny policy, for ``AutoModelForCausalLM.from_pretrained``."""
    return sandbox_model("policy")


def preference_path() -> Path:
    """The folder of the small preference model, for ``AutoModelForSequenceClassification.from_pretrained``."""
    return sandbox_model("preference")
