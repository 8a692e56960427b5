"""The engine that runs everywhere: transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from maestro_pl.errors import OutOfMemory
from maestro_pl.generation.engine import Engine, Generation, Progress, Sampling
from maestro_pl.generation.sampler import StopStrings
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.padding import pad_rows
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import evaluating
from maestro_pl.rollout import FinishReason
from maestro_pl.run.recovery import with_less


class HFEngine(Engine):
    """Samples with transformers' ``generate``, prompts padded on the left.

    Where memory runs out, the batch is split in two and what was being decoded is drawn anew; rows share their random
    numbers here, so these are other draws than the whole batch would have given.

    Args:
        max_batch: responses decoded at once; None decodes all together.
    """

    def __init__(self, max_batch: int | None = None) -> None:
        self.max_batch = max_batch

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
        rows = [prompt for prompt in prompt_ids for _ in range(n)]
        most = len(rows) if policy.pads else n  # rows of one prompt need no padding
        ids: list[list[int]] = []
        reasons: list[FinishReason] = []
        with decoding_mode(policy), seeded(sampling.seed, policy.device):
            while len(ids) < len(rows):

                def decode(begin: int = len(ids)) -> list[tuple[list[int], FinishReason]]:
                    size = min(self.max_batch or most, most)
                    if not policy.pads:
                        size = min(size, n - begin % n)
                    return _decode(policy, rows[begin : begin + size], sampling)

                for response, reason in with_less(decode, partial(halve_batch, self, min(most, len(rows) - len(ids)))):
                    ids.append(response)
                    reasons.append(reason)
                if progress is not None:
                    progress(len(ids), len(rows))
        return Generation(ids, reasons)


def halve_batch(engine: Any, rows: int, message: str) -> None:
    """Let an engine decode half as many responses at once from now on.

    Args:
        engine: has ``max_batch``.
        rows: that it was decoding, or would have without ``max_batch``.
        message: of the error.

    Raises:
        OutOfMemory: one response alone did not fit.
    """
    decoding = min(engine.max_batch or rows, rows)
    if decoding <= 1:
        raise OutOfMemory(
            f"Memory ran out while a single response was sampled ({message}): lower rollout.max_new_tokens or "
            "data.max_prompt_tokens, or see `maestro-pl estimate`."
        )
    engine.max_batch = decoding // 2
    rank_zero_warn(
        f"Memory ran out while {decoding} responses were sampled at once ({message}). They are sampled again, and from now on "
        f"{engine.max_batch} at once: give rollout.max_batch={engine.max_batch} to begin with that."
    )


def _decode(policy: LoRAPolicy, rows: list[list[int]], sampling: Sampling) -> list[tuple[list[int], FinishReason]]:
    padded = pad_rows(rows, [[] for _ in rows], policy.pad_token_id, policy.device)
    prompt_width = padded.ids.shape[1]
    ends = _ResponseEnds(policy, sampling, prompt_width, len(rows))
    sequences = policy.model.generate(
        input_ids=padded.ids,
        attention_mask=padded.attention_mask,
        generation_config=_config(policy, sampling),
        stopping_criteria=StoppingCriteriaList([ends]),
    )
    responses: list[tuple[list[int], FinishReason]] = []
    for row, length in zip(sequences[:, prompt_width:].tolist(), ends.lengths_B.tolist(), strict=True):
        responses.append((row[:length], "stop") if length else (row[: sampling.max_new_tokens], "length"))
    return responses


class _ResponseEnds(StoppingCriteria):  # type: ignore[misc]
    """Notes the length at which each row ended, so that padding is never mistaken for an end-of-sequence token."""

    def __init__(self, policy: LoRAPolicy, sampling: Sampling, prompt_width: int, rows: int) -> None:
        self.prompt_width = prompt_width
        self.eos = torch.tensor(policy.eos_token_ids, device=policy.device)
        self.lengths_B = torch.zeros(rows, dtype=torch.long, device=policy.device)  # 0: still going
        self.stop = StopStrings(policy.tokenizer, sampling.stop)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done_B = torch.isin(input_ids[:, -1], self.eos)
        if self.stop:
            done_B = done_B | self.stop.ends(input_ids[:, self.prompt_width :])
        fresh_B = done_B & (self.lengths_B == 0)
        self.lengths_B.masked_fill_(fresh_B, input_ids.shape[1] - self.prompt_width)
        return self.lengths_B > 0


def _config(policy: LoRAPolicy, sampling: Sampling) -> GenerationConfig:
    greedy = sampling.temperature == 0
    chosen: dict[str, Any] = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if not greedy:
        chosen |= {"top_k": sampling.top_k, "min_p": sampling.min_p or None}
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        eos_token_id=policy.eos_token_ids or None,
        pad_token_id=policy.pad_token_id,
        use_cache=True,
        **chosen,
    )


@contextmanager
def decoding_mode(policy: LoRAPolicy) -> Iterator[None]:
    """Eval mode, cache on, checkpointing off, no generation defaults of the model's own; all restored afterwards."""
    base = policy.base_model
    checkpointing = [m for m in policy.model.modules() if getattr(m, "gradient_checkpointing", False)]
    # transformers fills what a config leaves unset from the model's own (a top_k or repetition penalty from the hub)
    kept_config, base.generation_config = base.generation_config, GenerationConfig()
    for module in checkpointing:
        module.gradient_checkpointing = False
    try:
        with torch.no_grad(), evaluating(policy):
            yield
    finally:
        base.generation_config = kept_config
        for module in checkpointing:
            module.gradient_checkpointing = True


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with this seed and put the global random state back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
