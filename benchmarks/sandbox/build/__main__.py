"""Rebuild the sandbox's models: ``python -m benchmarks.sandbox.build [--output DIR]``.

Trains the tokenizer, warm-starts the tiny policy by supervised fine-tuning on demonstrations of mixed quality, and fits
the small preference model, each from one seed.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from benchmarks.sandbox.build.demonstrations import demonstrate
from benchmarks.sandbox.build.preference import liking, written_pair
from benchmarks.sandbox.build.tokenizer import END, PAD, train_tokenizer
from maestro_pl.sandbox import assets_path
from maestro_pl.sandbox.world import Row, rows

IGNORE = -100
BATCH = 48
USUAL_LENGTH = 28  # response tokens
Example: TypeAlias = tuple[list[int], list[int]]  # prompt and response


def main(args: list[str] | None = None) -> None:
    """Build both models into ``<output>/policy`` and ``<output>/preference``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox.build", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=assets_path(), help="folder to write to (default: the package's own)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy-steps", type=int, default=420, help="of 48 demonstrations each")
    parser.add_argument("--preference-steps", type=int, default=200, help="of 48 responses each")
    options = parser.parse_args(args)
    torch.set_num_threads(1)  # the same sums in the same order, whatever the machine
    prompts = rows("train", n_per_task=500, seed=options.seed)
    prompts += rows("train", ["arithmetic"], n_per_task=1000, seed=options.seed + 1)  # the hardest to learn
    rng = random.Random(options.seed)
    texts = [text for row in prompts for text in (row["prompt"], demonstrate(row, rng))]
    tokenizer = train_tokenizer(texts)
    torch.manual_seed(options.seed)
    policy = Qwen3ForCausalLM(_config(tokenizer, hidden=160, layers=3))
    batches = demonstration_batches(tokenizer, prompts, rng)
    _fit(policy, lambda: policy_loss(policy, next(batches)), options.policy_steps, "policy")
    _save(policy, tokenizer, options.output / "policy")
    preference = Qwen3ForSequenceClassification(_config(tokenizer, hidden=96, layers=2))
    _fit(
        preference,
        lambda: preference_loss(preference, tokenizer, rng.sample(prompts, BATCH), rng),
        options.preference_steps,
        "preference",
    )
    _save(preference, tokenizer, options.output / "preference")


def demonstration_batches(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Row], rng: random.Random
) -> Iterator[list[Example]]:
    """Batches of freshly drawn demonstrations without end, examples of like length together (less padding)."""
    while True:
        pool = []
        for row in rng.choices(prompts, k=8 * BATCH):
            response = tokenizer.encode(demonstrate(row, rng) + END, add_special_tokens=False)
            pool.append((encode_prompt(tokenizer, row["prompt"]), response))
        pool.sort(key=lambda example: len(example[0]) + len(example[1]))
        chunks = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        yield from rng.sample(chunks, len(chunks))


def policy_loss(policy: nn.Module, batch: list[Example]) -> Tensor:
    """Cross-entropy of the demonstrations, on response tokens and the end token only."""
    ids_BL, mask_BL = pad([prompt + response for prompt, response in batch], 0)
    labels_BL, _ = pad([[IGNORE] * len(prompt) + response for prompt, response in batch], IGNORE)
    logits_BLV = policy(input_ids=ids_BL, attention_mask=mask_BL).logits[:, :-1]
    total = nn.functional.cross_entropy(
        logits_BLV.flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (BATCH * USUAL_LENGTH)  # not the batch's own tokens: short responses would count more


def preference_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: list[Row], rng: random.Random
) -> Tensor:
    """Squared error of the score to what the simulated reader likes."""
    pairs = [written_pair(row, rng) for row in batch]
    sequences = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], return_dict=False
        )
        for prompt, response in pairs
    ]
    ids_BL, mask_BL = pad(sequences, tokenizer.convert_tokens_to_ids(PAD))
    target_B = torch.tensor([liking(response) for _, response in pairs])
    score_B = model(input_ids=ids_BL, attention_mask=mask_BL).logits.squeeze(-1)
    loss: Tensor = (score_B - target_B).square().mean()
    return loss


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as the chat template renders it for generation."""
    message = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return ids


def pad(sequences: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-pad to the longest sequence: int64 ids (B, L) and their mask."""
    width = max(map(len, sequences))
    ids_BL = torch.tensor([ids + [value] * (width - len(ids)) for ids in sequences])
    mask_BL = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
    return ids_BL, mask_BL


def _config(tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        intermediate_size=3 * hidden,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


def _fit(model: nn.Module, loss_of_batch: Callable[[], Tensor], steps: int, title: str) -> None:
    """AdamW with a short warm-up and a linear decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 30, (steps - i) / steps))
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"{title}: step {step}/{steps}, loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True
            )


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
