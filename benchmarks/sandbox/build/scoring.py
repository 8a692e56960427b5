"""Sample responses in the sandbox and score them with the five rewards of its config and the true utility."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from maestro_pl.generation.engine import Sampling
from maestro_pl.generation.hf import HFEngine
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rewards.entropy import response_entropy
from maestro_pl.rewards.format import format_score
from maestro_pl.rewards.length import length_penalty
from maestro_pl.rewards.perplexity import nover_log_perplexity, reasoning_of, reference_context
from maestro_pl.rewards.preference import PairScorer
from maestro_pl.sandbox.utility import true_utility
from maestro_pl.sandbox.world import Row

REWARDS = ("format", "length", "entropy", "perplexity", "preference")
MIN_TOKENS, MAX_TOKENS = 16, 24
MAX_NEW_TOKENS = 64
SLICE = 4096  # padded tokens of one forward pass


@dataclass
class Scored:
    """B = N * G responses of the sandbox and their scores.

    Attributes:
        rows: N rows.
        group_size: G.
        responses: B texts.
        lengths_B: tokens, the end token included.
        rewards_BK: raw rewards in the order of :data:`REWARDS`; a higher one is better.
        utility_B: the true utility.
        hidden_BD: hidden state of the last response token, last layer.
        response_ids: B token lists.
        prompt_ids: N token lists.
    """

    rows: list[Row]
    group_size: int
    responses: list[str]
    lengths_B: Tensor
    rewards_BK: Tensor
    utility_B: Tensor
    response_ids: list[list[int]]
    prompt_ids: list[list[int]]

    def of(self, task: str) -> Tensor:
        """Bool (B): the responses to prompts of one task."""
        return torch.tensor([row["task"] == task for row in self.rows for _ in range(self.group_size)])


@torch.no_grad()
def sample_and_score(policy: LoRAPolicy, preference: PairScorer, rows: list[Row], n: int, seed: int = 0) -> Scored:
    """Draw ``n`` responses to each row at temperature 1 and score them."""
    prompt_ids = [encode_prompt(policy, row["prompt"]) for row in rows]
    ids = HFEngine(max_batch=256).generate(policy, prompt_ids, n, Sampling(MAX_NEW_TOKENS, seed=seed)).response_ids
    texts = [policy.decode(tokens) for tokens in ids]
    rows_B = [row for row in rows for _ in range(n)]
    prompts_B = [prompt for prompt in prompt_ids for _ in range(n)]
    lengths_B = torch.tensor([len(tokens) for tokens in ids])
    statistics = policy.token_statistics(prompts_B, ids, entropy=True, max_tokens=SLICE)
    columns = [
        torch.tensor([format_score(text) for text in texts]),
        torch.tensor([length_penalty(len(tokens), minimum=MIN_TOKENS, maximum=MAX_TOKENS) for tokens in ids]),
        response_entropy(cast(Tensor, statistics.entropies_T), lengths_B),
        -reference_log_perplexity(policy, prompts_B, texts, [row["reference"] for row in rows_B]),
        preference([row["prompt"] for row in rows_B], texts)[0],
    ]
    utility_B = torch.tensor(
        [true_utility(t, row["task"], row["subject"], row["target"]) for t, row in zip(texts, rows_B, strict=True)]
    )
    return Scored(rows, n, texts, lengths_B, torch.stack(columns, dim=1), utility_B, ids, prompt_ids)


def reference_log_perplexity(
    policy: LoRAPolicy, prompts_B: Sequence[list[int]], texts: Sequence[str], references: Sequence[str]
) -> Tensor:
    """NOVER's log-perplexity (B) of each reference after the response's reasoning, under the policy."""
    thinks = [reasoning_of(text) or "" for text in texts]
    contexts = [p + policy.encode(reference_context(t)) for p, t in zip(prompts_B, thinks, strict=True)]
    targets = [policy.encode(reference) for reference in references]
    logps_T = policy.token_statistics(contexts, targets, max_tokens=SLICE).logps_T
    parts = torch.split(logps_T, [len(target) for target in targets])
    return torch.tensor(
        [
            nover_log_perplexity(part.tolist(), len(part), len(policy.encode(think)))
            for part, think in zip(parts, thinks, strict=True)
        ]
    )


def encode_prompt(policy: LoRAPolicy, prompt: str) -> list[int]:
    """Token ids of a prompt as the chat template renders it for generation."""
    message = [{"role": "user", "content": prompt}]
    ids: list[int] = policy.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return ids
