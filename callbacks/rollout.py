"""The first callback of a batch: sample a group of responses to every prompt."""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import asdict, replace
from typing import Any, Literal, TypeAlias, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError, check_choice
from maestro_pl.generation import Engine, Generation, HFEngine, NativeEngine, Sampling
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import evaluating
from maestro_pl.rollout import Rollout
from maestro_pl.training.checkpointing import configs_compared
from maestro_pl.training.policy_module import PolicyModule

EngineName: TypeAlias = Literal["native", "hf"]
TRANSPORT = ("prompt", "prompt_text", "prompt_ids", "position")  # batch keys that are not columns of the data


class RolloutGenerator(L.Callback):
    """Writes ``batch["rollout"]``: ``group_size`` responses to every prompt, and the statistics of their tokens.

    Args:
        group_size: G, responses a prompt in training; the standard deviation of a group needs at least 2.
        eval_group_size: responses a prompt in validation, test and predict.
        max_new_tokens: limit of a response, the end-of-sequence token included.
        min_new_tokens: the end-of-sequence token is not drawn before this many tokens.
        temperature: of sampling; log-probabilities are taken at the same temperature.
        eval_temperature: in validation, test and predict; default as in training, 0 is greedy.
        top_p: nucleus; 1 keeps all.
        top_k: 0 keeps all.
        min_p: drop tokens less probable than this share of the most probable one.
        stop: strings that end a response and are cut off its text.
        seed: of sampling; default the run's ``seed_everything``. A batch's samples depend on the seed and the batch's
            number only, so a resumed run draws what the uninterrupted one would have drawn, and two evaluations of one
            run draw with the same random numbers.
        max_batch: responses decoded at once; null decodes a batch's all together.
        score_tokens: at most this many tokens in one forward pass that reads the prompts, or that fills in what the
            engine did not see: log-probabilities, entropies, hidden states.
        engine: what samples. ``native`` reads a prompt once for its group and keeps what decoding sees; for models that
            cannot take it, it is ``hf``: transformers' ``generate``, with a scoring pass after it. By class path:
            ``maestro_pl.NativeEngine`` (which cache, whether steps are compiled), ``maestro_pl.VLLMEngine`` (vLLM on the
            trainer's own card) and ``maestro_pl.VLLMServerEngine`` (vLLM servers), both with the same scoring pass
            (docs/scale.md). An engine of one's own is a :class:`maestro_pl.generation.Engine`, by class path or
            ``file.py:Class``.
    """

    writes_rollout = True

    def __init__(
        self,
        group_size: int = 8,
        eval_group_size: int = 4,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        temperature: float = 1.0,
        eval_temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: list[str] | None = None,
        seed: int | None = None,
        max_batch: int | None = None,
        score_tokens: int = 16384,
        engine: EngineName | Engine = "native",
    ) -> None:
        super().__init__()
        if group_size < 2 or eval_group_size < 1:
            raise UserError(
                f"rollout.group_size={group_size}, eval_group_size={eval_group_size}: a group-relative advantage needs "
                "at least 2 responses a prompt, an evaluation at least 1."
            )
        if isinstance(engine, str):
            check_choice("rollout.engine", engine, EngineName)
        elif not callable(getattr(engine, "generate", None)):
            raise UserError(
                f"rollout.engine={type(engine).__name__} has no method generate: expected {', '.join(get_args(EngineName))}, "
                "or a maestro_pl.generation.Engine."
            )
        elif max_batch is not None:
            raise UserError(
                f"rollout.max_batch={max_batch} is read by the engines native and hf; give {type(engine).__name__} an argument "
                "of its own under rollout.engine.init_args."
            )
        if not 0 < temperature < math.inf:
            raise UserError(f"rollout.temperature={temperature}: training samples need a temperature above 0.")
        if score_tokens < 1 or (max_batch is not None and max_batch < 1):
            raise UserError(f"rollout.score_tokens={score_tokens}, max_batch={max_batch}: expected at least 1.")
        self.group_size, self.eval_group_size = group_size, eval_group_size
        self.eval_temperature = temperature if eval_temperature is None else eval_temperature
        self.score_tokens = score_tokens
        self.seed = seed
        self._warned = False
        self.engine: Engine = make_engine(engine, max_batch, score_tokens)
        self.sampling = Sampling(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            stop=tuple(stop or ()),
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Fix the seed, and tell the module the token limit that ``dr_grpo`` divides by."""
        if not isinstance(pl_module, PolicyModule):
            raise UserError(f"RolloutGenerator samples from a PolicyModule's policy, got {type(pl_module).__name__}.")
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        pl_module.max_new_tokens = self.sampling.max_new_tokens
        shown = getattr(getattr(getattr(pl_module, "outer", None), "anchoring", None), "responses", None)
        if stage == "fit" and shown is not None and shown > self.group_size:
            rank_zero_warn(
                f"model.anchoring.responses={shown} is more than the {self.group_size} responses of a group "
                "(rollout.group_size): the anchors are shown all of them."
            )
        if isinstance(self.engine, Engine):
            limit = getattr(trainer.datamodule, "max_prompt_tokens", None)  # type: ignore[attr-defined]
            self.engine.prepare(pl_module.policy, self.sampling, limit)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the engine go of what it holds: memory, files, adapters on servers."""
        if isinstance(self.engine, Engine):
            self.engine.close()

    def state_dict(self) -> dict[str, Any]:
        """The sampling settings, to tell a resumed run where its own differ."""
        return {"group_size": self.group_size, **asdict(self.sampling), "stop": list(self.sampling.stop)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Report what was sampled differently before, unless the configs are compared; the run keeps its own settings."""
        if configs_compared(checkpoint, getattr(pl_module, "run_config", "")):
            return
        own, saved = self.state_dict(), checkpoint.get("callbacks", {}).get(self.state_key, {})
        changed = [f"rollout.{k}: {v!r} -> {own[k]!r}" for k, v in saved.items() if k in own and own[k] != v]
        if changed:
            rank_zero_warn("The checkpoint's run sampled otherwise (checkpoint -> now): " + "; ".join(changed))

    def _check_context(self, module: PolicyModule, batch: dict[str, Any]) -> None:
        limit = getattr(module.policy.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(ids) for ids in batch["prompt_ids"]) + self.sampling.max_new_tokens
        if limit is not None and longest > limit and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"A prompt and max_new_tokens make {longest} tokens, more than the {limit} positions that the model knows: "
                "lower data.max_prompt_tokens or rollout.max_new_tokens."
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Sample ``group_size`` responses to every prompt, if the module learns from them."""
        if pl_module.learns_from_rollouts:
            self._write(trainer, pl_module, batch, "train", pl_module.batches_done)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sample ``eval_group_size`` responses to every prompt."""
        self._write(trainer, pl_module, batch, "validation", batch_idx)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sample ``eval_group_size`` responses to every prompt."""
        self._write(trainer, pl_module, batch, "test", batch_idx)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sample ``eval_group_size`` responses to every prompt."""
        self._write(trainer, pl_module, batch, "predict", batch_idx)

    def _write(self, trainer: L.Trainer, module: PolicyModule, batch: dict[str, Any], stage: str, number: int) -> None:
        self._check_context(module, batch)
        training = stage == "train"
        seed = zlib.crc32(f"{self.seed}/{stage}/{number}/{trainer.global_rank}".encode())
        sampling = replace(self.sampling, seed=seed)
        if not training:
            sampling = replace(sampling, temperature=self.eval_temperature)
        size = self.group_size if training else self.eval_group_size
        # the hook runs with gradients on and without the precision plugin's autocast
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            with module.clock("rollout"):
                batch["rollout"] = self._sample(module, batch, size, sampling)
            with module.clock("scoring"):
                self._score(module, batch["rollout"])

    def _sample(self, module: PolicyModule, batch: dict[str, Any], size: int, sampling: Sampling) -> Rollout:
        policy = module.policy
        generation = self.engine.generate(
            policy,
            batch["prompt_ids"],
            size,
            sampling,
            lambda done, total: module.clock.note(f"{done}/{total} responses"),
            None if module.context is None else module.context.from_policy,
        )
        check_sampling_logps(generation, self.engine)
        return Rollout(
            prompts=list(batch["prompt"]),
            prompt_texts=list(batch["prompt_text"]),
            prompt_ids=list(batch["prompt_ids"]),
            response_ids=generation.response_ids,
            responses=[response_text(policy, ids, sampling.stop) for ids in generation.response_ids],
            finish_reasons=generation.finish_reasons,
            group_size=size,
            columns={key: list(values) for key, values in batch.items() if key not in (*TRANSPORT, "rollout")},
            temperature=sampling.temperature or 1.0,
            logps_T=generation.logps_T,
            entropies_T=generation.entropies_T,
            hidden_BD=generation.hidden_BD,
            sampling_logps_T=generation.sampling_logps_T,
            engine=dict(generation.extra),
        )

    def _score(self, module: PolicyModule, rollout: Rollout) -> None:
        """Fill in what the engine did not see, with one forward pass in eval mode."""
        asked = module.context
        if asked is not None and asked.state == "base":
            module.frozen_states.write(module.policy, rollout, asked, self.score_tokens)
        context = asked if rollout.hidden_BD is None else None
        if rollout.logps_T is not None and rollout.entropies_T is not None and context is None:
            return
        with evaluating(module.policy):
            statistics = module.policy.token_statistics(
                [ids for ids in rollout.prompt_ids for _ in range(rollout.group_size)],
                rollout.response_ids,
                temperature=rollout.temperature,
                entropy=True,
                context=context,
                max_tokens=self.score_tokens,
            )
        rollout.logps_T, rollout.entropies_T = statistics.logps_T, statistics.entropies_T
        if context is not None:
            rollout.hidden_BD = statistics.hidden_BD


def make_engine(engine: EngineName | Engine, max_batch: int | None, score_tokens: int) -> Engine:
    """An engine from its name, or the engine itself."""
    if isinstance(engine, str):
        return NativeEngine(max_batch, score_tokens) if engine == "native" else HFEngine(max_batch)
    return engine


def check_sampling_logps(generation: Generation, engine: Engine) -> None:
    """Raise where an engine's own log-probabilities are not one finite number for each sampled token.

    Raises:
        UserError: naming the engine; a correction computed from them would be wrong for every token.
    """
    logps_T = generation.sampling_logps_T
    if logps_T is None:
        return
    tokens, who = sum(map(len, generation.response_ids)), type(engine).__name__
    if logps_T.shape != (tokens,):
        raise UserError(
            f"rollout.engine={who} gave sampling_logps_T of the shape {list(logps_T.shape)} for {tokens} response tokens: "
            "expected one number a token, the responses laid end to end."
        )
    if not bool(logps_T.isfinite().all()):
        raise UserError(
            f"rollout.engine={who} gave log-probabilities that are no numbers (NaN or infinite): its model has diverged, or it "
            "filtered a token that it returned; rollout.engine=native samples with the trainer's own model."
        )


def response_text(policy: LoRAPolicy, ids: list[int], stop: tuple[str, ...]) -> str:
    """Text of a response, cut in front of the first stop string in it."""
    text = policy.decode(ids)
    cuts = [position for position in (text.find(string) for string in stop) if position >= 0]
    return text[: min(cuts)] if cuts else text
