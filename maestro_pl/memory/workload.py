"""The workload of a parsed config, or of a run that is about to begin."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from maestro_pl.errors import UserError
from maestro_pl.memory.estimate import OptimizerMemory, Workload, optimizer_memory
from maestro_pl.memory.shadow import ModelSetting
from maestro_pl.policy.loading import LoRA, resolve_model
from maestro_pl.policy.quantization import Quantization
from maestro_pl.policy.stored_adapter import StoredAdapter, stored_adapter

PUBLISHED = Path(__file__).parent / "published.json"
DEFAULT_PROMPT = 512  # tokens assumed where a config sets no limit


def model_config(name: str, trust_remote_code: bool = False) -> Any:
    """The config of a model: one of the published ones that come with the package, or that of a folder or hub id.

    Raises:
        UserError: it is in none of them.
    """
    from transformers import AutoConfig

    name = resolve_model(name)
    if (adapter := _adapters(name)) is not None:
        name = resolve_model(adapter.base)
    published = _published()
    if name in published and not Path(name).exists():
        return AutoConfig.for_model(**published[name])
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The config of {name!r} could not be read ({str(error).strip().splitlines()[0]}): give a folder with a "
            f"config.json, a hub id that this machine can reach, or one of {', '.join(published)}."
        ) from error


def _published() -> dict[str, Any]:
    known: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return known


def _adapters(name: str) -> StoredAdapter | None:
    """The adapters that a folder or hub id holds; no published model is asked about, for the hub may be out of reach."""
    return None if name in _published() and not Path(name).exists() else stored_adapter(name)


def workload_of(config: dict[str, Any], device: str = "cuda") -> Workload:
    """The workload that a whole config of ``maestro-pl fit`` (``--print_config``) describes.

    Args:
        config: plain values.
        device: that it will run on.
    """
    model, rollout, data = config["model"], config["rollout"], config["data"]
    policy = model["policy"].get("init_args", model["policy"])
    options = policy.get("model_options") or {}
    lora = policy.get("lora")
    adapter = _adapters(resolve_model(policy["model"]))
    if adapter is not None and lora is not None:
        lora = asdict(adapter.lora(LoRA(**lora)))
    base = model_config(policy["model"], policy.get("trust_remote_code", False))
    method = config.get("method", "grpo")
    if policy["quantization"] != "none" and lora is None:
        raise UserError(
            f"model.policy.quantization={policy['quantization']} needs adapters: `fit` refuses lora: null with it."
        )
    setting = ModelSetting(
        trust_remote_code=policy.get("trust_remote_code", False),
        config=base,
        dtype=policy["dtype"],
        quantization=_quantization(policy["quantization"], options.get("quantization_config"), base),
        double_quantization=policy["double_quantization"],
        compute_dtype=policy.get("compute_dtype"),
        lora=None if lora is None else LoRA(**lora),
        reference=policy["reference"] if adapter is None else "synced",  # a second set of adapters all the same
        gradient_checkpointing=policy["gradient_checkpointing"],
        activation_offload=policy["activation_offload"],
        packing=policy["packing"],
        autocast=str(config["trainer"]["precision"]) == "bf16-mixed",
        device=device,
    )
    optimizer = model.get("optimizer")
    known = isinstance(optimizer, dict) and "class_path" in optimizer
    return Workload(
        setting,
        optimizer_memory(optimizer["class_path"], optimizer.get("init_args")) if known else OptimizerMemory(),
        batch_size=data["batch_size"],
        group_size=rollout["group_size"] if method == "grpo" else 1,
        max_prompt_tokens=data.get("max_prompt_tokens") or DEFAULT_PROMPT,
        max_new_tokens=rollout["max_new_tokens"],
        max_batch=rollout.get("max_batch"),
        score_tokens=rollout["score_tokens"],
        micro_batch_tokens=model["micro_batch_tokens"],
        scores_reference=bool((model.get("kl") or {}).get("coef")),
        eval_batch_size=data.get("eval_batch_size") or data["batch_size"],
        eval_group_size=rollout["eval_group_size"],
        native=rollout["engine"] == "native",
        **_of_vllm(rollout["engine"]),
        whole_groups=(model.get("meta") or {}).get("coupling") == "joint",
        keeps_reference=method == "grpo",
        ranks=_cut_over(config["trainer"], setting),
        uncounted=tuple(
            reward["class_path"].rsplit(".", 1)[-1]
            for key in ("rewards", "anchors", "metrics")
            for reward in config.get(key) or []
            if (reward.get("init_args") or {}).get("model") not in (None, "policy", "reference")
            and "Judge" not in reward["class_path"]
        ),
    )


def _of_vllm(engine: Any) -> dict[str, Any]:
    """What vLLM holds of the card, by the engine of a config."""
    path, given = (engine, {}) if isinstance(engine, str) else (engine["class_path"], engine.get("init_args") or {})
    name = path.rsplit(".", 1)[-1]
    if name == "VLLMServerEngine":
        return {"elsewhere": True}
    if name == "VLLMEngine":
        return {"vllm_share": float(given.get("memory_share", 0.3)), "vllm_sleeps": bool(given.get("sleep", True))}
    return {}


def workload_of_run(
    module: Any, group_size: int, max_prompt_tokens: int, sampling: Any, engine: Any, batch: int
) -> Workload:
    """The workload of a module that is about to be trained.

    Args:
        module: a :class:`maestro_pl.module.MaestroModule` with its optimizers.
        group_size: G.
        max_prompt_tokens: of the longest prompt.
        sampling: of the rollout.
        engine: with ``max_batch`` and, where it has one, ``prefill_tokens``.
        batch: prompts a step.
    """
    policy = module.policy
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    setting = ModelSetting(
        config=policy.base_model.config,
        dtype=names[policy.base_model.get_input_embeddings().weight.dtype],  # type: ignore[arg-type]
        quantization=policy.quantization,
        double_quantization=policy.double_quantization,
        compute_dtype=policy.compute_dtype,
        lora=policy.lora,
        reference=policy.reference,
        gradient_checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in policy.base_model.modules()),
        activation_offload=policy.activation_offload,
        packing=policy.packs,
        autocast=str(module.trainer.precision) == "bf16-mixed",
        device=policy.device.type,
    )
    optimizer = module.trainer.optimizers[0]
    return Workload(
        setting,
        optimizer_memory(type(optimizer).__name__, dict(optimizer.param_groups[0])),
        batch_size=batch,
        group_size=group_size,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=sampling.max_new_tokens,
        max_batch=getattr(engine, "max_batch", None),
        native=hasattr(engine, "prefill_tokens"),
        whole_groups=module.inner.whole_groups,
        score_tokens=getattr(engine, "prefill_tokens", 16384),
        micro_batch_tokens=module.micro_batch_tokens,
        scores_reference=module.inner.kl.coef > 0,
        ranks=1 if policy.shards is None else module.trainer.world_size,
    )


def _cut_over(trainer: dict[str, Any], setting: ModelSetting) -> int:
    """Ranks over which the parameters are cut; 1 where every rank has all of them.

    Raises:
        UserError: the number of ranks is not known, or what is set cannot be cut.
    """
    strategy = trainer.get("strategy")
    name = strategy.get("class_path", "") if isinstance(strategy, dict) else strategy
    if name != "fsdp" and not str(name).endswith("FSDP2Strategy"):
        return 1
    if setting.quantization != "none" or setting.activation_offload:
        what = "activation_offload" if setting.activation_offload else f"quantization={setting.quantization}"
        raise UserError(f"trainer.strategy=fsdp and model.policy.{what} cannot be combined: `fit` refuses them too.")
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    count = str(len(devices) if isinstance(devices, list) else devices)
    if not count.isdigit() or int(count) < 1:
        raise UserError(
            f"trainer.devices={devices!r}: with trainer.strategy=fsdp give the number of devices, --devices 8."
        )
    return int(count) * int(nodes)


def _quantization(kind: Quantization, options: Any, config: Any) -> Quantization:
    """Also where ``model_options`` or the model itself quantise."""
    given = options or getattr(config, "quantization_config", None) or {}
    given = given if isinstance(given, dict) else vars(given)
    if kind == "none" and given.get("load_in_4bit"):
        return "fp4" if given.get("bnb_4bit_quant_type") == "fp4" else "nf4"
    return "int8" if kind == "none" and given.get("load_in_8bit") else kind
