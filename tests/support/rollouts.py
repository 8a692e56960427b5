"""Rollouts without a policy, and a reward that scores one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from callbacks.rewards import Reward
from maestro_pl.rollout import RewardScores, Rollout
from maestro_pl.training.clock import StageClock


def make_rollout(
    responses: list[str], *, group_size: int = 1, fields: dict[str, Any] | None = None, **columns: list[Any]
) -> Rollout:
    """A rollout of these texts, their tokens their bytes; ``fields`` are set over it before it is made."""
    count = len(responses) // group_size
    prompts = [f"prompt {n}" for n in range(count)]
    made: dict[str, Any] = {
        "prompts": prompts,
        "prompt_texts": prompts,
        "prompt_ids": [[n] for n in range(count)],
        "response_ids": [list(text.encode()) for text in responses],
        "responses": responses,
        "finish_reasons": ["stop"] * len(responses),
        "group_size": group_size,
        "columns": {"reference": [None] * count, "task": ["a"] * count, **columns},
    }
    return Rollout(**{**made, **(fields or {})})


def reward_module(**attributes: Any) -> Any:
    """What a reward asks of a MaestroModule; what it logs is in ``logged``."""
    logged: dict[str, float] = {}

    def log(name: str, value: float, **options: Any) -> None:
        logged[name] = value

    return SimpleNamespace(
        **{
            "clock": StageClock(),
            "policy": SimpleNamespace(encode=lambda text: list(text.encode())),
            "labelled": lambda rollout: torch.ones(len(rollout.prompts), dtype=torch.bool),
            "shown": lambda rollout: None,
            "log": log,
            "logged": logged,
            "evaluation": [],
            "device": torch.device("cpu"),
            **attributes,
        }
    )


def run(reward: Reward, rollout: Rollout, **attributes: Any) -> RewardScores:
    """The scores of a training batch; ``attributes`` are of the module."""
    reward.on_train_batch_start(None, reward_module(**attributes), {"rollout": rollout}, 0)  # type: ignore[arg-type]
    return rollout.rewards[reward.name]


def given(reward: Reward, rollout: Rollout) -> list[float | None]:
    """Scores as a list, None where the reward does not apply."""
    return listed(run(reward, rollout))


def listed(scores: RewardScores) -> list[float | None]:
    """Scores as a list, None where they are masked."""
    return [value if ok else None for value, ok in zip(scores.values_B.tolist(), scores.mask_B.tolist(), strict=True)]
