"""Keys that were once spelled otherwise, and TRL's names for what is a key here."""

from __future__ import annotations

from collections.abc import Collection

#: A key as it was -> as it is.
FORMER = {
    "model.meta_signal": "model.meta.signal",
    "model.learner": "model.meta.learner",
    "model.conductor_every": "model.meta.every",
    "model.conductor_warmup_steps": "model.meta.warmup",
    "model.coupling": "model.meta.coupling",
    "model.conductor_optimizer": "model.meta.optimizer",
    "model.conductor_scheduler": "model.meta.scheduler",
    "model.anchor_fraction": "model.anchoring.fraction",
    "model.anchor_seed": "model.anchoring.seed",
    "model.hybrid": "model.anchoring.hybrid",
    "model.unlabelled": "model.anchoring.unlabelled",
    "model.scope": "model.advantages.scope",
    "model.aggregation": "model.advantages.aggregation",
    "model.advantage_scale": "model.advantages.scale",
    "model.loss_type": "model.loss.type",
    "model.importance_level": "model.loss.importance_level",
    "model.clip_low": "model.loss.clip_low",
    "model.clip_high": "model.loss.clip_high",
    "model.delta": "model.loss.delta",
    "model.sapo_temperatures": "model.loss.sapo_temperatures",
    "model.top_entropy": "model.loss.top_entropy",
    "model.mask_truncated": "model.loss.mask_truncated",
    "model.kl_coef": "model.kl.coef",
    "model.kl_in": "model.kl.place",
    "model.kl_unbiased": "model.kl.unbiased",
}

#: An argument of TRL's ``GRPOConfig`` or ``GRPOTrainer`` -> the key here, and what differs, or nothing.
TRL = {
    "beta": ("model.kl.coef", ""),
    "bf16": ("trainer.precision", "bf16-mixed"),
    "delta": ("model.loss.delta", ""),
    "epsilon": ("model.loss.clip_low", ""),
    "epsilon_high": ("model.loss.clip_high", ""),
    "eval_steps": ("trainer.val_check_interval", ""),
    "gradient_accumulation_steps": (
        "model.micro_batch_tokens",
        "tokens a pass; data.batch_size prompts are one step whatever it is",
    ),
    "gradient_checkpointing": ("model.policy.gradient_checkpointing", ""),
    "importance_sampling_level": ("model.loss.importance_level", ""),
    "learning_rate": ("model.optimizer.init_args.lr", ""),
    "logging_steps": ("trainer.log_every_n_steps", ""),
    "loss_type": ("model.loss.type", ""),
    "lr": ("model.optimizer.init_args.lr", ""),
    "lr_scheduler_type": ("model.scheduler", "a class path"),
    "mask_truncated_completions": ("model.loss.mask_truncated", ""),
    "max_completion_length": ("rollout.max_new_tokens", ""),
    "max_prompt_length": ("data.max_prompt_tokens", ""),
    "max_steps": ("trainer.max_steps", ""),
    "model_name_or_path": ("model.policy.model", ""),
    "multi_objective_aggregation": ("model.advantages.aggregation", ""),
    "num_generations": ("rollout.group_size", ""),
    "num_generations_eval": ("rollout.eval_group_size", ""),
    "num_iterations": ("model.updates_per_rollout", ""),
    "num_train_epochs": ("trainer.max_epochs", "with trainer.max_steps: -1"),
    "per_device_eval_batch_size": ("data.eval_batch_size", "prompts, where TRL counts responses"),
    "per_device_train_batch_size": ("data.batch_size", "prompts, where TRL counts responses"),
    "ref_model_mixup_alpha": ("model.policy.sync_rate", "with model.policy.reference: synced"),
    "ref_model_sync_steps": ("model.policy.sync_every", "with model.policy.reference: synced"),
    "reward_funcs": ("rewards", "a list of callbacks; callbacks.FunctionReward takes a function"),
    "reward_weights": ("model.weigher", "maestro_pl.FixedWeights"),
    "scale_rewards": ("model.advantages.scale", ""),
    "seed": ("seed_everything", ""),
    "sync_ref_model": ("model.policy.reference", "synced"),
    "temperature": ("rollout.temperature", ""),
    "top_entropy_quantile": ("model.loss.top_entropy", ""),
    "top_k": ("rollout.top_k", ""),
    "top_p": ("rollout.top_p", ""),
    "train_dataset": ("data.sources", ""),
    "use_vllm": ("rollout.engine", "maestro_pl.VLLMEngine, or maestro_pl.VLLMServerEngine for servers"),
    "vllm_gpu_memory_utilization": ("rollout.engine", "maestro_pl.VLLMEngine, with memory_share"),
    "vllm_importance_sampling_clip_max": ("model.loss.mismatch_cap", ""),
    "vllm_importance_sampling_mode": ("model.loss.mismatch", ""),
    "vllm_max_model_length": ("rollout.engine", "maestro_pl.VLLMEngine, with max_model_len"),
    "vllm_mode": ("rollout.engine", "maestro_pl.VLLMEngine for colocate, maestro_pl.VLLMServerEngine for server"),
    "vllm_server_base_url": ("rollout.engine", "maestro_pl.VLLMServerEngine, with urls"),
}


def renamed(name: str, known: Collection[str], prefix: str = "") -> str:
    """What to write in place of a key that is a former one or TRL's, to be put behind its name; or nothing.

    Args:
        name: the key as it was given, such as ``model.kl_coef``, ``kl_coef`` or ``model.meta_signal.init_args.actions``.
        known: the keys that exist; a name whose successor is not among them (of another method) is not answered.
        prefix: of the key in the answer, ``--`` for an option.
    """
    for old, new in FORMER.items():
        if _exists(new, known) and (name in (old, old.rpartition(".")[2]) or name.startswith(f"{old}.")):
            inner = name.removeprefix(old) if name.startswith(old) else ""
            return f": it is {prefix}{new}{inner} now"
    branch, _, leaf = name.rpartition(".")
    key, differs = TRL.get(leaf, ("", ""))
    if "." not in branch and _exists(key, known):
        return f": TRL's {leaf} is {prefix}{key} here" + (f" ({differs})" if differs else "")
    return ""


def _exists(key: str, known: Collection[str]) -> bool:
    """Whether there is such a key; what a class takes (``model.policy.dtype``) is not listed, the class is."""
    branch = key.rpartition(".")[0]
    return key in known or ("." in branch and branch in known)
