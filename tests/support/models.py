"""Tiny models, tokenizers and policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def make_tokenizer(path: Path) -> None:
    """A tokenizer whose tokens are the 256 bytes, with a chat template, an end token and a pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(path)


def make_model(kind: str, path: Path, **changes: Any) -> Path:
    """Save a two-layer model of this architecture, with its tokenizer, and return the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(path)
    small = {"vocab_size": 264, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    if kind == "gpt2":
        small |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        small |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        small |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        small |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(small | changes)))
    with torch.no_grad():  # sharper than the initialisation, so that different tokens have different probabilities
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(path)
    return path


def spread(policy: LoRAPolicy, std: float, *names: str) -> LoRAPolicy:
    """Draw the adapters' last matrices, which start at zero: as after some training, the reference is another model."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if any(part in name for part in ("lora_B", *names)) and parameter.requires_grad:
                parameter.normal_(std=std)
    return policy


def make_policy(folder: Path, *, std: float = 0.0, seed: int = 5, **options: Any) -> LoRAPolicy:
    """A policy in float32 with adapters of rank 4, drawn from this seed and moved by ``std`` away from the reference."""
    torch.manual_seed(seed)
    policy = LoRAPolicy(str(folder), **{"dtype": "float32", "lora": LoRA(r=4), **options})
    return spread(policy, std) if std else policy


def store_in_four_bits(folder: Path, to: Path) -> Path:
    """Save a model as its linear layers are in 4 bits, as published `*-bnb-4bit` checkpoints are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=four)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to
