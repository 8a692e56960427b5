"""Groups as one flat sequence against padded rows: the same statistics, the same gradients, fewer tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_pl.generation import NativeEngine, Sampling
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.packing import Group, PackedGroups, group_rows
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import Abilities
from tests.support import make_model, make_policy

KINDS = ["tiny_qwen3", "tiny_llama", "tiny_gpt2"]
A, B, C = [1, 2, 3], [4], [5, 6, 7, 8, 9, 10]
PROMPTS = [A, A, A, B, C, C, list(C)]
RESPONSES = [[11, 12], [13, 14, 15, 257], [16], [17, 18, 19], [20, 21], [22, 23], [24, 25]]


def policy_of(folder: Path, **options: Any) -> LoRAPolicy:
    return make_policy(folder, std=0.1, **options).train()


def gradients(policy: LoRAPolicy) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    logps = policy.token_statistics(PROMPTS, RESPONSES, temperature=0.8).logps_T
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [LoRA(r=4), None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_padded(kind: str, lora: LoRA | None, checkpointing: bool, request: Any) -> None:
    policy = policy_of(request.getfixturevalue(kind), lora=lora, gradient_checkpointing=checkpointing)
    assert policy.packs
    ways = (Abilities(True, True), Abilities(False, True), Abilities(False, False))
    results = []
    for way in ways:
        policy.scorer._abilities = way
        with torch.no_grad():
            statistics = policy.token_statistics(
                PROMPTS, RESPONSES, entropy=True, context=HiddenContext("last", "mean")
            )
        results.append((statistics, gradients(policy)))
    for statistics, grads in results[1:]:
        for name in ("logps_T", "entropies_T", "hidden_BD"):
            torch.testing.assert_close(getattr(results[0][0], name), getattr(statistics, name), atol=3e-5, rtol=0)
        assert set(grads) == set(results[0][1])
        for name, gradient in grads.items():
            torch.testing.assert_close(
                results[0][1][name], gradient, atol=2e-5, rtol=1e-4, msg=f"{name} {checkpointing}"
            )


def behind_queries(own: Any) -> Any:
    """Attention as CUDA's memory-efficient kernels give it: the numbers of ``own``, heads laid out behind queries."""

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = own(*args, **kwargs)
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    return attend


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_kernels_may_lay_out_heads_as_they_like(tiny_qwen3: Path, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model packs by one kernel it packs by the other, and decodes the same."""
    made = []
    for kernel in (F.scaled_dot_product_attention, behind_queries(F.scaled_dot_product_attention)):
        monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
        policy = make_policy(tiny_qwen3, std=0.1).eval()
        assert policy.packs
        policy.eos_token_ids = []
        prompts, sampling = [[1, 2, 3], [4, 5, 6, 7, 8]], Sampling(max_new_tokens=8, seed=3)
        generation = NativeEngine(cache=cache).generate(policy, prompts, 3, sampling)
        scored = policy.token_statistics([prompts[i // 3] for i in range(6)], generation.response_ids)
        made.append((generation.response_ids, generation.logps_T, scored.logps_T))
    assert made[0][0] == made[1][0]
    torch.testing.assert_close(made[0][1:], made[1][1:])


def test_layout_by_hand() -> None:
    packed = PackedGroups([A, A, B], [[11, 12], [13], [14, 15]], torch.device("cpu"))
    assert packed.ids.tolist() == [[1, 2, 3, 11, 12, 13, 4, 14, 15]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert packed.before_T.tolist() == [2, 3, 2, 6, 7]
    assert packed.inside_T.tolist() == [3, 4, 5, 7, 8]
    assert packed.last_B.tolist() == [4, 5, 8]
    assert packed.groups == [Group(3, (2, 1)), Group(1, (2,))]
    assert [group.tokens for group in group_rows(PROMPTS, [1] * 7)] == [6, 2, 9]


@pytest.mark.parametrize("max_tokens", [1, 5, 8, 12, 1000])
def test_slices_hold_to_the_limit_and_lose_no_row(tiny_qwen3: Path, max_tokens: int) -> None:
    policy = policy_of(tiny_qwen3)
    with torch.no_grad():
        whole = policy.token_statistics(PROMPTS, RESPONSES).logps_T
        cut = policy.token_statistics(PROMPTS, RESPONSES, max_tokens=max_tokens).logps_T
    torch.testing.assert_close(whole, cut, atol=3e-5, rtol=0)
    slices = policy.scorer.slices(policy.base_model, PROMPTS, RESPONSES, max_tokens)
    assert sorted(row for rows in slices for row in rows) == list(range(7))
    for rows in slices:
        tokens = policy.scorer.tokens(policy.base_model, [PROMPTS[i] for i in rows], [RESPONSES[i] for i in rows])
        assert tokens <= max_tokens or len(rows) == 1
    if max_tokens == 1000:
        assert len(slices) == 1


# what each architecture does that a shared prompt, a plain head or padding must not get wrong
OTHERS = {
    "gemma3_text": Abilities(packs=False, plain_head=True),  # sliding windows
    "gemma2": Abilities(packs=False, plain_head=True),  # sliding windows, soft-capped attention and logits
    "mistral": Abilities(packs=False, plain_head=True),  # a sliding window
    "granite": Abilities(packs=True, plain_head=True),  # scaled logits
    "cohere": Abilities(packs=True, plain_head=True),  # scaled logits
    "bloom": Abilities(packs=False, plain_head=True),  # positions from the mask (ALiBi)
    "stablelm": Abilities(packs=False, plain_head=True),  # does not hand the layout on
    "diffllama": Abilities(packs=False, plain_head=True),  # two attentions a layer
    "rwkv": Abilities(packs=False, plain_head=True, pads=False),  # a state that padding enters
    "qwen3_moe": Abilities(packs=True, plain_head=True),
    "gpt_neox": Abilities(packs=True, plain_head=True),
    "opt": Abilities(packs=True, plain_head=True),  # calls the decoder inside its backbone
    "bart": Abilities(packs=False, plain_head=True, pads=False),  # positions are columns
}


def other(kind: str, folder: Path, **options: Any) -> LoRAPolicy:
    changes: dict[str, Any] = {"logits_scaling": 8.0} if kind == "granite" else {}
    if kind == "rwkv":
        changes = {"attention_hidden_size": 32, "context_length": 64}
    if kind == "opt":
        changes = {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.0}
    if kind == "bart":
        changes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    lora = LoRA(r=4, target_modules=["receptance"]) if kind == "rwkv" else LoRA(r=4)
    return policy_of(make_model(kind, folder / kind, **changes), lora=lora, **options).eval()


@pytest.mark.filterwarnings("ignore:.*slower, the same results.*")
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_work_or_fall_back(kind: str, tmp_path: Path) -> None:
    policy = other(kind, tmp_path)
    expected = []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            expected.append(logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)])
        got = policy.token_statistics(PROMPTS, RESPONSES).logps_T
    torch.testing.assert_close(got, torch.cat(expected), atol=5e-5, rtol=1e-5)
    assert policy.scorer.abilities(policy.base_model) == OTHERS[kind]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*slower, the same results.*")
@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind != "rwkv"])
def test_the_trial_decides_the_same_in_bfloat16(kind: str, tmp_path: Path) -> None:
    policy = other(kind, tmp_path, dtype="bfloat16")
    assert policy.scorer.abilities(policy.base_model) == OTHERS[kind]


@pytest.mark.filterwarnings("ignore:.*slower, the same results.*")
@pytest.mark.parametrize("kind", ["diffllama", "stablelm"])
def test_those_that_fall_back_decode_greedily_what_single_rows_give(kind: str, tmp_path: Path) -> None:
    policy = other(kind, tmp_path)
    prompts = [A, B, C]
    got = NativeEngine().generate(policy, prompts, 2, Sampling(max_new_tokens=5, temperature=0.0)).response_ids
    for row, response in enumerate(got):
        ids = list(prompts[row // 2])
        for token in response:
            with torch.no_grad():
                assert token == int(policy.model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


@pytest.mark.slow
def test_a_policy_can_be_pickled_into_another_process(tiny_qwen3: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_qwen3).eval()
    torch.save(policy, tmp_path / "policy.pt")
    script = (
        "import sys, torch; p = torch.load(sys.argv[1], weights_only=False); "
        "print(float(p.token_statistics([[1, 2]], [[3, 4]]).logps_T.sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "policy.pt")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    with torch.no_grad():
        expected = float(policy.token_statistics([[1, 2]], [[3, 4]]).logps_T.sum())
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-4)


def test_packing_can_be_switched_off(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, packing=False)
    assert not policy.packs
    assert policy.scorer.tokens(policy.base_model, PROMPTS, RESPONSES) == 7 * 10
    packed = policy_of(tiny_qwen3)
    assert packed.scorer.tokens(packed.base_model, PROMPTS, RESPONSES) == (3 + 7) + (1 + 3) + (6 + 6)
    torch.testing.assert_close(gradients(policy), gradients(packed), atol=2e-5, rtol=1e-4)
