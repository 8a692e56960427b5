"""Our own decoding loop: one prefill a prompt, finished rows leave, and what decoding sees is kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from maestro_pl.errors import UserError, check_choice
from maestro_pl.generation.decoding import PREFILL_TOKENS, Decoding
from maestro_pl.generation.engine import Engine, Generation, Progress, Sampling
from maestro_pl.generation.fixed import FixedDecoding
from maestro_pl.generation.hf import HFEngine, decoding_mode, halve_batch
from maestro_pl.generation.step import DecodingStep, How
from maestro_pl.policy.adapters import folded_adapters
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.run.recovery import with_less

Cache: TypeAlias = Literal["auto", "growing", "static"]


class NativeEngine(Engine):
    """Samples groups with a loop of its own, and with transformers' ``generate`` where a model cannot take it.

    A prompt is read once for its whole group and its keys and values are kept once. Rows that have ended leave the
    batch. Log-probabilities, entropies and the hidden state of each response come out of decoding, so that no scoring
    pass follows. A row's draws depend on the seed and the row's number only, not on ``max_batch`` or on when other rows
    end.

    Where memory runs out, the batch is split in two and what was being decoded is decoded again, to the same tokens.

    Args:
        max_batch: responses decoded at once; None decodes all together.
        prefill_tokens: at most this many tokens of prompts in one forward pass (one prompt at least).
        cache: ``static`` keeps the shapes of a step fixed while no row leaves, so that on CUDA a step is one launch of a
            captured graph; ``growing`` reads only what has been drawn, and lets rows leave sooner. ``auto`` is static on
            CUDA, but for a model that FSDP2 has cut, which cannot be captured, and growing elsewhere. Both draw the same
            tokens.
        compile: with a static cache, and where there is no CUDA: compile the step with torch.compile, which takes a minute or
            two in the first rollout.

    Raises:
        UserError: an option has a value that it cannot have.
    """

    def __init__(
        self,
        max_batch: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        cache: Cache = "auto",
        compile: bool = False,
    ) -> None:
        check_choice("rollout.engine: cache", cache, Cache)
        if compile and cache != "static":
            raise UserError(
                f"rollout.engine: compile=true with cache={cache}: only a static cache has steps that stay alike."
            )
        if prefill_tokens < 1 or (max_batch is not None and max_batch < 1):
            raise UserError(
                f"rollout.engine: prefill_tokens={prefill_tokens}, max_batch={max_batch}: expected at least 1."
            )
        self.max_batch, self.prefill_tokens, self.cache, self.compile = max_batch, prefill_tokens, cache, compile
        self.fallback = HFEngine(max_batch)
        self.step: DecodingStep | None = None

    def generate(
        self,
        policy: LoRAPolicy,
        prompt_ids: list[list[int]],
        n: int,
        sampling: Sampling,
        progress: Progress | None = None,
        context: HiddenContext | None = None,
    ) -> Generation:
        """See :class:`maestro_pl.generation.Engine`."""
        if not policy.packs or policy.device.type == "mps":  # which has no float64 to draw with
            return self.fallback.generate(policy, prompt_ids, n, sampling, progress, context)
        owners = [prompt for prompt in range(len(prompt_ids)) for _ in range(n)]
        noise = torch.Generator().manual_seed(sampling.seed)
        uniform_BL = torch.rand(len(owners), sampling.max_new_tokens, dtype=torch.float64, generator=noise)
        parts: list[Generation] = []
        # what is folded anew in each rollout would be compiled anew; a compiler fuses PEFT's operations itself
        compiled = self.compile and policy.device.type != "cuda"
        folded = nullcontext() if compiled else folded_adapters(policy.model)
        with decoding_mode(policy), folded:
            while (begin := sum(len(part.response_ids) for part in parts)) < len(owners):

                def decode(begin: int = begin) -> Generation:
                    part = slice(begin, begin + (self.max_batch or len(owners)))
                    prompts = sorted(set(owners[part]))
                    run = self._decoding(
                        policy,
                        [prompt_ids[i] for i in prompts],
                        [prompts.index(owner) for owner in owners[part]],
                        sampling,
                        uniform_BL[part].to(policy.device),
                        context,
                        self.prefill_tokens,
                    )
                    run.report = _reporter(progress, begin, len(owners))
                    return run.generation()

                halve = partial(halve_batch, self, len(owners) - begin)
                parts.append(with_less(decode, halve))
        return _joined(parts)

    def _decoding(self, policy: LoRAPolicy, *args: Any) -> Decoding:
        how = self._how(policy)
        if how is None:
            return Decoding(policy, *args)
        if self.step is None:  # kept, so that what cannot be captured is tried once
            self.step = DecodingStep(how)
        return FixedDecoding(policy, *args, program=self.step)

    def _how(self, policy: LoRAPolicy) -> How | None:
        """How the steps of a static cache run; None: the cache grows."""
        on_cuda = policy.device.type == "cuda"
        captures = (
            on_cuda and policy.shards is None
        )  # FSDP2 lets streams of its own wait in a pass, which ends a capture
        if self.cache == "growing" or (self.cache == "auto" and not captures):
            return None
        return "graph" if captures else "compiled" if self.compile and not on_cuda else "eager"


def _reporter(progress: Progress | None, before: int, total: int) -> Any:
    return None if progress is None else lambda done: progress(before + done, total)


def _joined(parts: Sequence[Generation]) -> Generation:
    hidden = [part.hidden_BD for part in parts if part.hidden_BD is not None]
    return Generation(
        [ids for part in parts for ids in part.response_ids],
        [reason for part in parts for reason in part.finish_reasons],
        torch.cat([part.logps_T for part in parts if part.logps_T is not None]),
        torch.cat([part.entropies_T for part in parts if part.entropies_T is not None]),
        torch.cat(hidden) if hidden else None,
    )
