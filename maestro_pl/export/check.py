"""Whether what was written is what was trained: its weights one by one, and log-probabilities of a few responses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from maestro_pl.data.messages import is_chat
from maestro_pl.data.rendering import PromptRenderer
from maestro_pl.export.base import Base
from maestro_pl.export.place import CheckFailed
from maestro_pl.export.plan import PEFT_PREFIX, Plan
from maestro_pl.export.trained_run import TrainedRun
from maestro_pl.policy.loading import ADAPTER

Pair: TypeAlias = tuple[list[int], list[int]]  # token ids of a prompt and of its continuation
Factors: TypeAlias = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r) and the scale of an update

RECORDED, PROMPT_TOKENS, RESPONSE_TOKENS = 4, 256, 64
TEXTS = (
    ("Name three colours of the rainbow.", "Red, green and violet."),
    (
        "Why is the sky blue?",
        "Air scatters short waves of light more than long ones, so blue reaches us from everywhere.",
    ),
    ("Write a line of Python that adds one to x.", "x += 1"),
    ("Translate into French: Good morning, how are you?", "Bonjour, comment allez-vous ?"),
)

#: Mean difference of log-probabilities, in nats, that rounding explains.
#:
#: 16 bits round merged weights once, and activations at other places than beside adapters. Runs of SmolLM2-135M give 0.044 to
#: 0.053 in bfloat16 and 0.006 to 0.007 in float16, which is eight times finer; a weight matrix set to zero gives 0.5. So three
#: times the first, and an eighth of that. In float32 only the order of sums differs: 4e-6, where one of 210 adapters left out
#: gives 4e-4.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
LARGEST = 20.0  # the largest difference of a token may be this many times the mean one: improbable tokens move most


@dataclass(frozen=True)
class LogProbabilityDifference:
    """Per token, how far the log-probabilities of two models are apart.

    Attributes:
        tokens: how many were compared.
        mean: absolute difference.
        largest: absolute difference.
        tolerance: of the mean.
        learned: what training itself moved them by in the mean, where that is known.
    """

    tokens: int
    mean: float
    largest: float
    tolerance: float
    learned: float | None = None

    @property
    def holds(self) -> bool:
        """Whether both are within their tolerance."""
        return self.mean <= self.tolerance and self.largest <= LARGEST * self.tolerance

    def __str__(self) -> str:
        learned = "" if self.learned is None else f"; training moved them by {self.learned:.1e}"
        return (
            f"log-probabilities of {self.tokens} tokens differ by {self.mean:.1e} in the mean and {self.largest:.1e} at most "
            f"(tolerance {self.tolerance:.1e} and {LARGEST * self.tolerance:.1e}{learned})"
        )


def log_probability_difference(
    trained_T: Tensor, written_T: Tensor, dtype: torch.dtype, base_T: Tensor | None = None
) -> LogProbabilityDifference:
    """Compare two models' log-probabilities of the same tokens.

    Args:
        trained_T: those of the run's policy.
        written_T: those of what was written.
        dtype: that both compute in; decides the tolerance.
        base_T: those of the base, for the size of what was learned.
    """
    apart_T = (trained_T - written_T).abs().nan_to_num(nan=float("inf"))
    learned = None if base_T is None else float((trained_T - base_T).abs().mean())
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    return LogProbabilityDifference(len(apart_T), float(apart_T.mean()), float(apart_T.max()), tolerance, learned)


def examples(run: TrainedRun, tokenizer: Any) -> list[Pair]:
    """The last different prompts that the run has recorded, each with a response, or a few of ours where it recorded none."""
    data = run.config.get("data") or {}
    renderer = PromptRenderer(tokenizer, data.get("system_prompt") or "", data.get("chat_template_kwargs") or {})
    pairs = _recorded(run.folder / "rollouts.jsonl") or list(TEXTS)
    prompts = renderer.encode([renderer.text(prompt) for prompt, _ in pairs])
    responses = renderer.encode([response for _, response in pairs])
    return [(p[-PROMPT_TOKENS:], r[:RESPONSE_TOKENS]) for p, r in zip(prompts, responses, strict=True) if p and r]


def _recorded(path: Path) -> list[tuple[Any, str]]:
    if not path.is_file():
        return []
    last: dict[str, tuple[Any, str]] = {}
    for line in path.read_bytes().split(b"\n"):
        try:  # a killed run's last line may be cut off, and a disk may have damaged others: examples are what is whole
            row = json.loads(line)
            prompt, response = row["prompt"], row["response"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        chat = is_chat(prompt) and all(isinstance(m.get("role"), str) and "content" in m for m in prompt)
        if isinstance(response, str) and (isinstance(prompt, str) or chat):
            last[json.dumps(prompt, sort_keys=True)] = (prompt, response)
    return [pair for pair in last.values() if pair[1].strip()][-RECORDED:]


@torch.no_grad()
def log_probabilities(model: Any, pairs: Sequence[Pair]) -> Tensor:
    """float32 log-probability of every continuation token (T,), one unpadded row after the other."""
    longest = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT_TOKENS + RESPONSE_TOKENS
    )
    parts = []
    for prompt, response in pairs:
        ids = torch.tensor([[*prompt, *response][-longest:]])
        logits_TV = model(input_ids=ids, use_cache=False).logits[0, -len(response) - 1 : -1].float()
        parts.append(logits_TV.log_softmax(-1).gather(-1, ids[0, -len(response) :, None]).squeeze(-1))
    return torch.cat(parts)


def check_model_weights(model: Any, folder: Path, base: Base, plan: Plan) -> int:
    """Compare every written tensor with what the run's policy computes with; how many were compared.

    Args:
        model: the policy, in the dtype that was written, adapters unmerged.
        folder: what was written.
        base: what the policy was loaded from.
        plan: what was to be written.

    Raises:
        CheckFailed: a tensor is missing, a copied one is another, or a merged one is further away than rounding
            explains.
    """
    expected = dict(_expected(model))
    compared, missing = 0, set(plan.sources(base))
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                missing.discard(name)
                if name not in expected:  # what the base's files hold beside the language model
                    continue
                weight, update = expected[name]
                written = file.get_tensor(name)
                on_disk = base.stored[name].dtype if name in base.stored else base.dtype
                if written.shape != weight.shape or not _is_close(written, weight, update, on_disk):
                    raise CheckFailed(f"{name} in {path.name} is not the run's: the export is wrong.")
                compared += 1
    if missing:
        raise CheckFailed(f"{min(missing)} was not written: the export is wrong.")
    return compared


def _expected(model: Any) -> Iterator[tuple[str, tuple[Tensor, Factors | None]]]:
    """Name of each parameter in the base's files, its value under the adapters, and the factors of the update on it."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, kind = name.rpartition(".base_layer.")
        key = f"{module}.{kind}" if module else name
        layer = layers.get(module) if kind == "weight" else None
        update = None
        if layer is not None and ADAPTER in layer.lora_A:
            update = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
        yield key.removeprefix(PEFT_PREFIX), (parameter, update)


def _is_close(written: Tensor, weight: Tensor, factors: Factors | None, on_disk: torch.dtype | None) -> bool:
    if factors is None:
        return torch.equal(written.to(weight.dtype), weight)
    a, b, scale = factors
    merged = weight.float() + (b.float() @ a.float()) * scale
    limits = max(torch.finfo(written.dtype), torch.finfo(weight.dtype), key=lambda info: info.eps)
    room = limits.eps * merged.abs() + limits.tiny * limits.eps
    if on_disk is not None and torch.finfo(on_disk).eps < limits.eps:
        room += limits.eps * weight.float().abs()  # the policy's weight was rounded when it was loaded
    return bool(((written.float() - merged).abs() <= room).all())
