"""A base in 4 and 8 bits: losses and gradients against the dequantised model, checkpoints, generation, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from maestro_pl.errors import UserError
from maestro_pl.generation import NativeEngine, Sampling
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.quantization import dequantized, quantized_kind
from tests.support import data_of, make_model, module_of, rewards, store_in_four_bits, trainer_of

PROMPTS = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [9, 8, 7], [9, 8, 7]]
RESPONSES = [[10, 11, 12], [13, 14], [15, 16, 17, 18, 19], [20]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that blocks of 64 weights, which share a scale, lie inside a row."""
    return make_model("qwen3", tmp_path_factory.mktemp("wide"), hidden_size=64, head_dim=32, intermediate_size=128)


def moved(policy: LoRAPolicy) -> LoRAPolicy:
    """Give the adapters a weight, so that they and their gradients matter."""
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.trained_parameters():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def twin(policy: LoRAPolicy, folder: Path) -> LoRAPolicy:
    """The same policy on the weights that the quantised layers stand for, in float32."""
    other = LoRAPolicy(str(folder), dtype="float32", lora=policy.lora)
    layers = dict(other.base_model.named_modules())
    for name, weight in dequantized(policy.base_model).items():
        layers[name].weight.data.copy_(weight)
    own = dict(policy.model.named_parameters())
    for name, parameter in other.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(own[name].data)
    return other


def loss_and_gradients(policy: LoRAPolicy) -> tuple[float, list[torch.Tensor]]:
    policy.train()
    logps_T = policy.token_statistics(PROMPTS, RESPONSES).logps_T
    weights_T = torch.linspace(-1, 1, len(logps_T))
    loss = (weights_T * logps_T).sum()
    return float(loss.detach()), list(torch.autograd.grad(loss, policy.trained_parameters()))


def relative(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_four_bits_compute_with_the_weights_that_they_stand_for(kind: Any, double: bool, wide: Path) -> None:
    policy = moved(LoRAPolicy(str(wide), "float32", kind, double, lora=LoRA(r=4)))
    assert quantized_kind(policy.base_model) == kind
    loss, gradients = loss_and_gradients(policy)
    expected_loss, expected = loss_and_gradients(twin(policy, wide))
    # both multiply float32 by the same float32 weights: only the order of additions differs
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-5)
    assert relative(gradients, expected) < 1e-4


def test_eight_bits_round_the_activations_too(wide: Path) -> None:
    policy = moved(LoRAPolicy(str(wide), "float32", "int8", lora=LoRA(r=4)))
    assert quantized_kind(policy.base_model) == "int8"
    _, gradients = loss_and_gradients(policy)
    _, expected = loss_and_gradients(twin(policy, wide))
    # activations are rounded to 1/127 of the largest of their token, but for the columns that LLM.int8 leaves in 16
    # bits
    assert relative(gradients, expected) < 0.02


def test_a_rollout_leaves_the_gradients_as_they_were(wide: Path) -> None:
    """In bfloat16, where bitsandbytes would repack the weights of a model in eval mode into a form without a backward."""
    policy = moved(LoRAPolicy(str(wide), "bfloat16", "nf4", lora=LoRA(r=4)))
    loss, before = loss_and_gradients(policy)
    NativeEngine().generate(policy, [PROMPTS[0], PROMPTS[2]], 2, Sampling(max_new_tokens=6, seed=1))
    again, after = loss_and_gradients(policy)
    assert again == loss
    assert relative(after, before) == 0.0
    # even the trial passes before the first loss could repack: only the dequantised model tells
    _, expected = loss_and_gradients(twin(policy, wide))
    assert relative(after, expected) < 0.1  # bfloat16, 8 bits of mantissa, through two layers and their backward


@pytest.mark.parametrize("checkpointing", [True, False])
def test_keys_and_values_are_bfloat16_and_checkpointing_is_restored(
    checkpointing: bool, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maestro_pl.generation import decoding

    policy = LoRAPolicy(str(wide), "bfloat16", "nf4", lora=LoRA(r=4), gradient_checkpointing=checkpointing).train()
    policy.eos_token_ids = list(range(0, 264, 8))  # rows end one after the other, whatever this machine draws
    before = [getattr(m, "gradient_checkpointing", None) for m in policy.modules()]
    seen: list[tuple[torch.dtype, bool]] = []

    class Watched(decoding.GroupCache):
        def keep(self, rows: torch.Tensor) -> None:
            live = [getattr(m, "gradient_checkpointing", False) for m in policy.modules()]
            seen.extend((k.dtype, any(live)) for k, v in self.row_states.values())
            seen.extend((v.dtype, any(live)) for k, v in self.row_states.values())
            super().keep(rows)

    monkeypatch.setattr(decoding.Decoding, "cache_type", Watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        NativeEngine().generate(policy, [PROMPTS[0]], 8, Sampling(max_new_tokens=40, seed=1))
    assert seen
    assert set(seen) == {(torch.bfloat16, False)}
    assert [getattr(m, "gradient_checkpointing", None) for m in policy.modules()] == before
    assert policy.training


def test_a_checkpoint_holds_adapters_only_and_loads_onto_another_base(wide: Path, tmp_path: Path) -> None:
    def trained(folder: Path, max_steps: int, ckpt: str | None = None, **policy: Any) -> tuple[L.Trainer, Any]:
        trainer = trainer_of(folder, rewards(), max_steps=max_steps, limit_val_batches=0)
        module = module_of(wide, lora=LoRA(r=4), policy_options=policy)
        trainer.fit(module, data_of(prompts), ckpt_path=ckpt)
        return trainer, module

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "word {i}", "task": "a"}}\n' for i in range(8)))
    trainer, module = trained(tmp_path / "a", 2, quantization="nf4")
    path = str(tmp_path / "four.ckpt")
    trainer.save_checkpoint(path)
    names = [n for n in torch.load(path, weights_only=True)["state_dict"] if n.startswith("policy.")]
    assert names
    assert all("lora_" in name for name in names)
    assert Path(path).stat().st_size < 400_000
    own = {n: p.detach().clone() for n, p in module.policy.named_parameters() if p.requires_grad}
    for options in ({}, {"quantization": "int8"}, {"quantization": "nf4", "double_quantization": False}):
        resumed, other = trained(tmp_path / "b", 2, path, **options)
        assert resumed.global_step == 2
        for name, parameter in other.policy.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.detach(), own[name], atol=0, rtol=0)
    _, further = trained(tmp_path / "c", 3, path)
    assert further.policy_steps == 3


def test_adapters_in_bfloat16_and_their_reference(wide: Path) -> None:
    policy = LoRAPolicy(str(wide), "bfloat16", "nf4", lora=LoRA(r=4, dtype="bfloat16"), reference="synced")
    adapters = {n: p for n, p in policy.named_parameters() if "lora_" in n}
    assert {p.dtype for p in adapters.values()} == {torch.bfloat16}
    moved(policy).sync_reference(1.0)
    policy.train()
    _, gradients = loss_and_gradients(policy)
    assert {g.dtype for g in gradients} == {torch.bfloat16}
    reference = policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    own = policy.token_statistics(PROMPTS, RESPONSES).logps_T.detach()
    torch.testing.assert_close(reference, own, atol=0.05, rtol=0.05)


def test_the_reference_is_the_base_with_the_adapters_off(wide: Path) -> None:
    policy = moved(LoRAPolicy(str(wide), "float32", "nf4", lora=LoRA(r=4)))
    reference = policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    plain = twin(policy, wide)
    expected = plain.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    torch.testing.assert_close(reference, expected, atol=1e-4, rtol=1e-4)
    stored = sum(p.numel() * p.element_size() for n, p in policy.named_parameters() if "lora_" not in n)
    assert stored < 0.5 * sum(p.numel() * p.element_size() for n, p in plain.named_parameters() if "lora_" not in n)


def test_activations_on_the_host_change_nothing(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import maestro_pl.policy.offload as offload

    options: dict[str, Any] = {"dtype": "float32", "quantization": "nf4", "gradient_checkpointing": True}
    expected = loss_and_gradients(moved(LoRAPolicy(str(wide), **options, lora=LoRA(r=4))))
    moves: list[int] = []
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        if "pin_memory" in kwargs:
            moves.append(made.numel())
        return made

    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    monkeypatch.setattr(offload.on_host.__wrapped__, "__defaults__", (1,))
    monkeypatch.setattr(offload.torch, "empty", counted)
    policy = moved(LoRAPolicy(str(wide), **options, activation_offload=True, lora=LoRA(r=4)))
    moves.clear()
    got = loss_and_gradients(policy)
    tokens = len(PROMPTS[0]) + len(PROMPTS[2]) + sum(map(len, RESPONSES))
    assert moves.count(tokens * 64) >= 2  # the input of each of two layers
    assert got[0] == expected[0]
    assert relative(got[1], expected[1]) == 0.0


def test_bad_settings_are_named(wide: Path) -> None:
    for options, part in (
        ({"quantization": "nf8"}, "expected one of none, nf4, fp4, int8"),
        ({"quantization": "nf4", "lora": None}, "lora: null trains it"),
        ({"activation_offload": True}, "gradient_checkpointing: true"),
        ({"quantization": "nf4", "model_options": {"quantization_config": {"load_in_4bit": True}}}, "give one of them"),
    ):
        with pytest.raises(UserError, match=part):
            LoRAPolicy(str(wide), **options)


def test_all_parameters_of_a_checkpoint_that_is_stored_in_four_bits_cannot_be_trained(
    wide: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    stored = store_in_four_bits(wide, tmp_path / "stored")
    assert quantized_kind(LoRAPolicy(str(stored), "bfloat16", lora=LoRA(r=4)).base_model) == "nf4"
    given = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    for folder, options in ((stored, None), (wide, given)):
        with pytest.raises(UserError, match=r"is stored quantised \(bitsandbytes\S*\), and lora: null trains all"):
            LoRAPolicy(str(folder), "float32", lora=None, model_options=options)
