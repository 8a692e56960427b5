"""TRL's own trainer on the tiny models of conftest.py, and batches for both sides: shared by tests/trl/.

Nothing here computes a number that is compared: TRL's numbers come from ``trl.GRPOTrainer``, ours from maestro_pl.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from callbacks.rollout import RolloutGenerator
from maestro_pl import KL, Advantages, Loss
from maestro_pl.conductor.weighers import Weigher
from maestro_pl.generation import Generation
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests import support
from tests.support import module_of, quiet_trainer

if importlib.util.find_spec("trl") is None:  # it is imported where it is used: that takes a second
    pytest.skip("TRL 1.16 needs Python 3.11", allow_module_level=True)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func, which scripts the completions

Ids = list[int]
KINDS = ("qwen3", "llama", "gpt2")
VARIANTS = [(kind, tuned) for kind in KINDS for tuned in ("lora", "full")]


def make_policy(folder: Path, tuned: str, seed: int = 1, dropout: float = 0.0, packing: bool = True) -> LoRAPolicy:
    """Our policy in float32, its adapters away from their start so that the reference is another model."""
    lora = LoRA(r=4, alpha=8, dropout=dropout) if tuned == "lora" else None
    return support.make_policy(folder, std=0.05, seed=seed, lora=lora, packing=packing)


def make_trainer(
    policy: LoRAPolicy,
    folder: Path,
    output_dir: Path,
    *,
    rewards: Sequence[Callable[..., list[float | None]]] = (),
    rollout: Callable[..., dict[str, Any]] | None = None,
    prompts: Sequence[str] = ("a", "b"),
    **options: Any,
) -> Any:
    """A ``trl.GRPOTrainer`` on the CPU in fp32 whose model starts from the policy's parameters."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    _prepare_imports()
    settings: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "shuffle_dataset": False,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
    }
    lora = policy.lora
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        list(rewards) or [lambda completions, **_: [0.0] * len(completions)],
        GRPOConfig(str(output_dir), **(settings | options)),
        Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=None
        if lora is None
        else LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        ),
        rollout_func=rollout,
    )
    trainer.model.load_state_dict(deepcopy(policy.model.state_dict()))
    trainer.model.train()
    return trainer


@functools.cache
def _prepare_imports() -> None:
    for name in ("trl", "transformers.trainer"):
        logging.getLogger(name).setLevel(logging.ERROR)
    gc.freeze()  # every run of TRL collects garbage: keep it from walking over all that was imported


@dataclass
class Batch:
    """Whole groups of responses, one prompt a row."""

    prompts: list[Ids]
    responses: list[Ids]
    truncated: list[bool]

    @property
    def lengths_B(self) -> Tensor:
        return torch.tensor([len(ids) for ids in self.responses])

    def prompt_rectangle(self) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the left as TRL pads."""
        width = max(len(ids) for ids in self.prompts)
        ids = torch.tensor([[258] * (width - len(p)) + p for p in self.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in self.prompts])
        return ids, mask

    def response_rectangle(self) -> tuple[Tensor, Tensor]:
        """Ids and mask, padded on the right as TRL pads."""
        width = max(len(ids) for ids in self.responses)
        ids = torch.tensor([r + [258] * (width - len(r)) for r in self.responses])
        return ids, torch.arange(width) < self.lengths_B.unsqueeze(1)

    def rectangle(self, values_T: Tensor) -> Tensor:
        """Ragged token values as a (B, R) rectangle with zeros."""
        mask = self.response_rectangle()[1]
        return torch.zeros(mask.shape, dtype=values_T.dtype).masked_scatter(mask, values_T)


def draw_batch(
    rng: torch.Generator, *, equal_prompts: bool = False, groups: int = 3, size: int = 4, longest: int = 12
) -> Batch:
    """Random ragged groups; about a third of the responses are truncated."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    def ids(length: int) -> Ids:
        return torch.randint(0, 256, (length,), generator=rng).tolist()

    prompts = [ids(5 if equal_prompts else integer(2, 9)) for _ in range(groups)]
    rows = groups * size
    responses = [ids(integer(1, longest)) for _ in range(rows)]
    truncated = [integer(0, 2) == 0 for _ in range(rows)]
    return Batch([prompts[row // size] for row in range(rows)], responses, truncated)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name, taken off the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# -- whole runs on scripted completions
# ----------------------------------------------------------------------------------

PROMPTS, ROLLOUTS, LIMIT = 2, 2, 9  # of a run
END = 257  # the end-of-sequence token of conftest.py
MODULI = {"x": 7, "y": 11, "z": 5}
# AdamW's first steps are lr * g / (|g| + eps). With its own eps of 1e-8 a gradient that is zero but for rounding
# (GPT-2's key biases: softmax does not see them) would move its parameter by a full lr in a direction that rounding
# chose.
ADAM_EPS = 1e-3
OPTIMIZERS = {"sgd": 2e-2, "adamw_torch": 2e-3}  # TRL's names, and learning rates


@dataclass
class Script:
    """The responses to every prompt, in the order in which they are asked for."""

    texts: list[str]
    batches: list[Batch]
    group: int
    answers: dict[tuple[int, ...], list[Ids]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for batch in self.batches:
            for prompt, response in zip(batch.prompts, batch.responses, strict=True):
                self.answers.setdefault(tuple(prompt), []).append(response)

    def groups(self, prompts: list[Ids]) -> list[Ids]:
        return [response for prompt in prompts for response in self.answers[tuple(prompt)]]


def write_script(policy: LoRAPolicy, group: int = 4, equal_prompts: bool = False) -> Script:
    """Prompts as texts, for TRL's data set and ours, and random responses of at most ``LIMIT`` tokens, some truncated."""
    rng = torch.Generator().manual_seed(11)
    texts = ["one a", "two b", "thr c", "fou d"] if equal_prompts else ["one", "a longer prompt", "three", "4!"]
    batches = []
    for rollout in range(ROLLOUTS):
        batch = draw_batch(rng, groups=PROMPTS, size=group, longest=LIMIT - 1)
        here = texts[rollout * PROMPTS : (rollout + 1) * PROMPTS]
        batch.prompts = [policy.encode(text) for text in here for _ in range(group)]
        batch.responses = [r if cut else [*r, END] for r, cut in zip(batch.responses, batch.truncated, strict=True)]
        assert {True, False} == set(batch.truncated)
        batches.append(batch)
    responses = [tuple(r) for batch in batches for r in batch.responses]
    assert len(set(responses)) == len(responses)  # weights are handed over by response
    return Script(texts, batches, group)


class ScriptedEngine:
    """Answers with the script; sees no statistics."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def generate(self, policy: Any, prompt_ids: list[Ids], n: int, *args: Any, **kwargs: Any) -> Generation:
        ids = self.script.groups(prompt_ids)
        assert len(ids) == n * len(prompt_ids)
        return Generation(ids, ["stop" if r[-1] == END else "length" for r in ids])


def score(ids: Ids, name: str) -> float:
    return float(sum(ids) % MODULI[name]) / MODULI[name]


class ScriptedReward(L.Callback):
    def __init__(self, name: str) -> None:
        self.spec = RewardSpec(name)

    @property
    def state_key(self) -> str:
        return self.spec.name

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rollout: Rollout = batch["rollout"]
        scores = [score(ids, self.spec.name) for ids in rollout.response_ids]
        rollout.rewards[self.spec.name] = RewardScores.from_list(self.spec, scores)


class Weights(L.Callback):
    """Keeps the weights that each response got, and how many steps moved nothing."""

    def __init__(self) -> None:
        self.of_response: dict[tuple[int, ...], list[float]] = {}
        self.skipped = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rollout: Rollout = batch["rollout"]
        for ids, weights in zip(rollout.response_ids, rollout.weights_BK.tolist(), strict=True):
            self.of_response[tuple(ids)] = weights
        self.skipped = pl_module.skipped_steps


class Prompts(L.LightningDataModule):
    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script

    def train_dataloader(self) -> Any:
        batches = []
        for rollout in range(ROLLOUTS):
            texts = self.script.texts[rollout * PROMPTS : (rollout + 1) * PROMPTS]
            ids = self.script.batches[rollout].prompts[:: self.script.group]
            columns = {"reference": [None] * PROMPTS, "task": ["t"] * PROMPTS}
            batches.append({"prompt": texts, "prompt_text": texts, "prompt_ids": ids, **columns})
        return torch.utils.data.DataLoader(batches, batch_size=None)


@dataclass(frozen=True)
class Plan:
    """What both runs are told."""

    optimizer: str = "sgd"
    micro_batches: int = 1
    updates: int = 1
    loss_type: str = "dapo"
    level: str = "token"
    kl_coef: float = 0.0
    mask_truncated: bool = False
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    clip: float = 0.2
    aggregation: str = "sum_then_normalize"
    top_entropy: float = 1.0


def run_ours(plan: Plan, policy: LoRAPolicy, script: Script, weigher: Weigher, folder: Path) -> Weights:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if plan.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=OPTIMIZERS["sgd"])
        return torch.optim.AdamW(parameters, lr=OPTIMIZERS["adamw_torch"], eps=ADAM_EPS, weight_decay=0.0)

    module = module_of(
        policy,
        weigher=weigher,
        optimizer=optimizer,
        loss=Loss(
            type=plan.loss_type,
            importance_level=plan.level,
            clip_low=min(plan.clip, 0.2),
            clip_high=plan.clip,
            top_entropy=plan.top_entropy,
            mask_truncated=plan.mask_truncated,
        ),
        kl=KL(coef=plan.kl_coef),
        advantages=Advantages(aggregation=plan.aggregation),
        updates_per_rollout=plan.updates,
        max_grad_norm=plan.max_grad_norm,
        micro_batch_tokens=1 if plan.micro_batches > 1 else 10_000,
    )
    generator = RolloutGenerator(group_size=script.group, max_new_tokens=LIMIT, temperature=plan.temperature)
    generator.engine = ScriptedEngine(script)
    weights = Weights()
    chain = [generator, *(ScriptedReward(name) for name in MODULI), weights]
    quiet_trainer(folder, max_steps=ROLLOUTS, callbacks=chain).fit(module, Prompts(script))
    assert module.policy_steps == ROLLOUTS
    return weights


def run_trl(plan: Plan, policy: LoRAPolicy, script: Script, weights: Weights, model: Path, folder: Path) -> nn.Module:
    """TRL on one reward function, the weighted sum; or on all of them with their common weights."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [policy.encode(text) for text in prompts]
        return {"prompt_ids": ids, "completion_ids": script.groups(ids[:: script.group]), "logprobs": None}

    def weighted_sum(completion_ids: list[Ids], **_: Any) -> list[float]:
        return [
            sum(w * score(ids, name) for w, name in zip(weights.of_response[tuple(ids)], MODULI, strict=True))
            for ids in completion_ids
        ]

    def column(name: str) -> Any:
        return lambda completion_ids, **_: [score(ids, name) for ids in completion_ids]

    options: dict[str, Any] = {}
    rewards = [weighted_sum]
    if len({tuple(row) for row in weights.of_response.values()}) == 1:
        rewards, options["reward_weights"] = [column(name) for name in MODULI], next(iter(weights.of_response.values()))
    trainer = make_trainer(
        policy,
        model,
        folder,
        rewards=rewards,
        rollout=rollout,
        prompts=script.texts,
        optim=plan.optimizer,
        learning_rate=OPTIMIZERS[plan.optimizer],
        adam_epsilon=ADAM_EPS,
        weight_decay=0.0,
        max_steps=ROLLOUTS * plan.updates,
        num_iterations=plan.updates,
        per_device_train_batch_size=PROMPTS * script.group // plan.micro_batches,
        gradient_accumulation_steps=plan.micro_batches,
        num_generations=script.group,
        max_completion_length=LIMIT,
        loss_type=plan.loss_type,
        importance_sampling_level=plan.level,
        epsilon=min(plan.clip, 0.2),
        epsilon_high=plan.clip,
        beta=plan.kl_coef,
        use_bias_correction_kl=True,
        multi_objective_aggregation=plan.aggregation,
        top_entropy_quantile=plan.top_entropy,
        mask_truncated_completions=plan.mask_truncated,
        max_grad_norm=plan.max_grad_norm,
        temperature=plan.temperature,
        **options,
    )
    trainer.train()
    assert trainer.state.global_step == ROLLOUTS * plan.updates
    return trainer.model


def furthest(policy: LoRAPolicy, model: nn.Module) -> float:
    """The largest difference of a trained parameter."""
    others = dict(model.named_parameters())
    trained = [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]
    return max(float((p.detach() - others[name].detach()).abs().max()) for name, p in trained)
