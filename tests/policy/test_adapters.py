"""Folded LoRA layers against PEFT's forward, and everything that must be left to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl.policy.adapters import folded_adapters
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from tests.support import make_model, make_policy, spread

IDS = torch.tensor([[1, 2, 3, 4, 5]])


def policy_of(folder: Path, lora: LoRA, dtype: str = "float32", **options: Any) -> LoRAPolicy:
    return spread(make_policy(folder, lora=lora, dtype=dtype, **options), 0.1, "lora_embedding_A").eval()


def folded_layers(policy: LoRAPolicy) -> int:
    return sum("forward" in vars(module) for module in policy.model.modules())


@pytest.mark.parametrize("kind", ["tiny_qwen3", "tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
@torch.no_grad()
def test_folded_layers_compute_what_peft_computes(kind: str, dtype: str, tolerance: float, request: Any) -> None:
    policy = policy_of(request.getfixturevalue(kind), LoRA(r=4, alpha=12), dtype)
    expected = policy.model(IDS).logits.float()
    with folded_adapters(policy.model):
        assert folded_layers(policy) > 5
        got = policy.model(IDS).logits.float()
    assert folded_layers(policy) == 0
    assert float((got - expected).norm() / expected.norm()) < tolerance
    torch.testing.assert_close(policy.model(IDS).logits.float(), expected, atol=0, rtol=0)


@torch.no_grad()
def test_under_autocast(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, LoRA(r=4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = policy.model(IDS).logits.float()
        with folded_adapters(policy.model):
            got = policy.model(IDS).logits.float()
    assert float((got - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("lora", [LoRA(r=4, use_dora=True), LoRA(r=4, options={"lora_bias": True})])
@torch.no_grad()
def test_more_than_plain_lora_is_left_to_peft(lora: LoRA, tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, lora)
    with folded_adapters(policy.model):
        assert folded_layers(policy) == 0


@torch.no_grad()
def test_disabled_adapters_stay_disabled(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, LoRA(r=4))
    with policy.model.disable_adapter():
        expected = policy.model(IDS).logits
        with folded_adapters(policy.model):
            torch.testing.assert_close(policy.model(IDS).logits, expected)


@torch.no_grad()
def test_it_sees_the_weights_of_the_moment_and_is_undone_after_an_error(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, LoRA(r=4))
    with pytest.raises(KeyError), folded_adapters(policy.model):
        raise KeyError
    assert folded_layers(policy) == 0
    for parameter in policy.trained_parameters():
        parameter.add_(0.05)
    expected = policy.model(IDS).logits
    with folded_adapters(policy.model):
        torch.testing.assert_close(policy.model(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_base_on_four_bits(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    folder = make_model("qwen3", tmp_path, hidden_size=64, head_dim=32)  # blocks of 64 weights share a scale

    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    policy = policy_of(folder, LoRA(r=4), model_options={"quantization_config": quantized})
    assert policy.packs
    with torch.no_grad():
        expected = policy.model(IDS).logits
        with folded_adapters(policy.model):
            assert folded_layers(policy) > 5
            torch.testing.assert_close(policy.model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
