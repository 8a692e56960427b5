"""Tokenizers that are larger than the model's embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maestro_pl.errors import UserError
from maestro_pl.generation import NativeEngine, Sampling
from tests.support import make_model, make_policy


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path, vocab_size=200, eos_token_id=7, bos_token_id=6, pad_token_id=5)
    with pytest.raises(UserError, match=r"has 56 tokens beyond the 200 .*\(id 200\): give the model's own tokenizer"):
        make_policy(folder)


def test_an_added_token_is_refused_where_a_text_has_it(tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path, vocab_size=258, pad_token_id=None)  # the tokenizer's <pad> is 258
    with pytest.warns(UserWarning, match=r"1 added tokens that the model has no embedding for \('<pad>'\)"):
        policy = make_policy(folder)
    assert policy.pad_token_id == 257  # padding is never read, and needs a row of the embedding all the same
    prompts = [[1, 2, 3], [4]]
    logps_T = policy.token_statistics(prompts, [[5], [6]]).logps_T
    assert bool(torch.isfinite(logps_T).all())
    rollout = NativeEngine().generate(policy, prompts, 2, Sampling(max_new_tokens=3, seed=1))
    assert max(token for row in rollout.response_ids for token in row) < 258
    message = r"A text has the token '<pad>' \(id 258\), and the model has embeddings for 258 tokens"
    with pytest.raises(UserError, match=message):
        policy.token_statistics([[1, 258]], [[5]])
    with pytest.raises(UserError, match=message):
        NativeEngine().generate(policy, [[1, 258]], 2, Sampling(max_new_tokens=3, seed=1))
