"""What vLLM would do otherwise than the trainer without saying so: refused before a run begins."""

from __future__ import annotations

from typing import Any

from maestro_pl.errors import UserError
from maestro_pl.generation.engine import Sampling
from maestro_pl.policy.loading import LoRA, changes_base
from maestro_pl.policy.policy import LoRAPolicy

#: Options of ``LoraConfig`` that decide where adapters are and how they begin, which their file shows by itself.
_SHOWN_BY_THE_FILE = (
    "init_lora_weights",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "lora_bias",
)
#: Bases that vLLM stores as bitsandbytes does when the trainer loads them.
_SAME_BASE = {"nf4": "bitsandbytes"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


def check_policy(policy: LoRAPolicy, who: str, max_lora_rank: int, quantization: str | None) -> None:
    """Refuse adapters and bases that the engine would read as something else.

    Args:
        policy: the trainer's.
        who: the engine.
        max_lora_rank: that it is started with.
        quantization: of its base, by vLLM's name.

    Raises:
        UserError: says what, and what to change.
    """
    lora = policy.lora
    if lora is None:
        raise UserError(
            f"rollout.engine={who} loads adapters, and model.policy.lora is null (all parameters are trained), so it would "
            "sample from the base as it was: leave model.policy.lora out to train adapters, or give rollout.engine=native."
        )
    if lora.r > max_lora_rank:
        raise UserError(
            f"model.policy.lora.r={lora.r} is above rollout.engine's max_lora_rank={max_lora_rank}: start vLLM with "
            f"--max-lora-rank {next((r for r in RANKS if r >= lora.r), lora.r)} and give the same number under "
            "rollout.engine.init_args, or lower r."
        )
    if (what := _not_plain(lora)) is not None:
        raise UserError(
            f"rollout.engine={who} would sample without model.policy.lora.{what}: vLLM reads plain LoRA only. Leave it out, or "
            "give rollout.engine=native."
        )
    if (init := changes_base(lora)) is not None:
        raise UserError(
            f"model.policy.lora begins by {init}, which changes the base's weights, and rollout.engine={who} has the plain "
            "base: leave init_lora_weights out, or give rollout.engine=native."
        )
    _check_base(policy, who, quantization)


def _not_plain(lora: LoRA) -> str | None:
    """The first setting that a file of plain LoRA does not show."""
    options: dict[str, Any] = dict(lora.options)
    if lora.use_dora or options.get("use_dora"):
        return "use_dora"
    if options.get("bias", "none") != "none":
        return f"options.bias={options['bias']}"
    if options.get("lora_bias"):
        return "options.lora_bias"
    rest = [name for name, value in options.items() if value and name not in _SHOWN_BY_THE_FILE]
    return f"options.{rest[0]}" if rest else None


def _check_base(policy: LoRAPolicy, who: str, quantization: str | None) -> None:
    own = str(policy.quantization)
    if own == "none" and quantization is None:
        return
    expected = _SAME_BASE.get(own)
    if own != "none" and expected is None:
        raise UserError(
            f"model.policy.quantization={own}: vLLM has no such base, so rollout.engine={who} would sample from another model; "
            "give quantization: nf4 or none, or rollout.engine=native."
        )
    if quantization != expected:
        raise UserError(
            f"model.policy.quantization={own} and rollout.engine.init_args.quantization={quantization}: {who} would sample "
            f"from another base than the trained one; give quantization: {expected or 'null'} to the engine (and start servers "
            "so)."
        )


def check_sampling(sampling: Sampling, who: str) -> None:
    """Refuse filters: the log-probabilities that vLLM gives with them are those of what is left.

    Raises:
        UserError: names the filter.
    """
    for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if (value := getattr(sampling, name)) != off:
            raise UserError(
                f"rollout.{name}={value} with rollout.engine={who}: its log-probabilities would be those of what the filter "
                f"leaves, and the correction for the engine wrong; give {name}: {off:g}, or rollout.engine=native."
            )


def check_lengths(prompt_ids: list[list[int]], sampling: Sampling, limit: int | None, who: str) -> None:
    """Refuse a prompt that leaves no room for its response.

    Raises:
        UserError: names the longest, and the limit.
    """
    longest = max(map(len, prompt_ids), default=0)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise UserError(
            f"A prompt of {longest} tokens and rollout.max_new_tokens={sampling.max_new_tokens} make more than the {limit} "
            f"that {who} takes (max_model_len): raise it, or lower data.max_prompt_tokens or rollout.max_new_tokens."
        )
