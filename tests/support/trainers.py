"""Modules, trainers and data of a run of a few steps on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.rewards import FunctionReward
from callbacks.rollout import RolloutGenerator
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.meta import Meta
from maestro_pl.data import PromptDataModule
from maestro_pl.module import MaestroModule
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import Rollout


def sevens(completion: str, **_: Any) -> float:
    return float(sum(map(ord, completion)) % 7)


def elevens(completion: str, **_: Any) -> float:
    return float(sum(map(ord, completion)) % 11)


def constant(completion: str, **_: Any) -> float:
    return 1.0


def rewards(*extra: Any) -> list[Any]:
    return [
        FunctionReward(function=sevens, name="sevens", normalize="zscore"),
        FunctionReward(function=elevens, name="elevens", normalize="rank"),
        *extra,
    ]


def module_of(policy: Path | LoRAPolicy, **options: Any) -> MaestroModule:
    """A module with this policy, or with one that is made of the model in this folder."""
    if not isinstance(policy, LoRAPolicy):
        torch.manual_seed(11)
        given = {"dtype": "float32", **options.pop("policy_options", {})}
        policy = LoRAPolicy(str(policy), lora=options.pop("lora", LoRA(r=4, dropout=0.1)), **given)
    options.setdefault("optimizer", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0))
    meta = options.pop("meta", Meta())
    if meta.optimizer is Meta.optimizer:
        meta = replace(meta, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-1))
    weigher = options.pop("weigher", None) or Conductor()
    return MaestroModule(policy, weigher, meta, **options)


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    """A Trainer on the CPU that shows and saves nothing."""
    quiet = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**quiet, **options})


def trainer_of(folder: Path, callbacks: list[Any], **options: Any) -> L.Trainer:
    """A Trainer that generates groups of four short responses in front of these callbacks."""
    generator = RolloutGenerator(
        group_size=4,
        eval_group_size=2,
        max_new_tokens=6,
        seed=options.pop("seed", 0),
        engine=options.pop("engine", "native"),
    )
    run = {"max_epochs": -1, "use_distributed_sampler": False, "num_sanity_val_steps": 0, **options}
    return quiet_trainer(folder, callbacks=[generator, *callbacks], **run)


class Watch(L.Callback):
    """Keeps every training rollout, the policy's adapters before each batch, and what was logged."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.adapters: list[list[torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.adapters.append([p.detach().clone() for p in pl_module.policy.trained_parameters()])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rollouts.append(batch["rollout"])
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def watched_fit(
    tmp_path: Path, folder: Path, prompts: Path, chain: list[Any], steps: int = 3, **options: Any
) -> tuple[MaestroModule, Watch]:
    """A module of the policy in this folder, trained for some steps on two prompts each, and who watched it."""
    watch, module = Watch(), module_of(folder, **options)
    torch.manual_seed(0)
    data = PromptDataModule(sources=str(prompts), batch_size=2, show=False)
    trainer_of(tmp_path, [*chain, watch], max_steps=steps, limit_val_batches=0).fit(module, data)
    return module, watch


def data_of(prompts: Path, **options: Any) -> PromptDataModule:
    return PromptDataModule(sources=str(prompts), fractions=[0.6, 0.2, 0.2], batch_size=2, show=False, **options)
