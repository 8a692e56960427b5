"""Token statistics against one plain forward a row; adapters, references and what a checkpoint would hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl.errors import UserError
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.padding import pad_rows, row_slices
from maestro_pl.policy.policy import LoRAPolicy
from tests.support import make_model, make_policy

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
RESPONSES = [[11, 12], [13, 14, 15, 257], [16]]
KINDS = ["tiny_qwen3", "tiny_llama", "tiny_gpt2"]


def policy_of(folder: Path, **options: Any) -> LoRAPolicy:
    return make_policy(folder, std=0.1, **options).eval()


def one_by_one(model: Any, temperature: float = 1.0, layer: int = -1) -> tuple[list[Any], list[Any], list[Any]]:
    logps, entropies, hidden = [], [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        output = model(torch.tensor([prompt + response]), output_hidden_states=True)
        log_softmax = (output.logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        logps.append(log_softmax[torch.arange(len(response)), torch.tensor(response)])
        entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
        hidden.append(output.hidden_states[layer][0, len(prompt) :])
    return logps, entropies, hidden


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [None, 1, 14])
def test_statistics_equal_those_of_single_rows(
    kind: str, max_tokens: int | None, request: pytest.FixtureRequest
) -> None:
    policy = policy_of(request.getfixturevalue(kind))
    with torch.no_grad():
        logps, entropies, hidden = one_by_one(policy.model, 0.7)
        got = policy.token_statistics(
            PROMPTS, RESPONSES, temperature=0.7, entropy=True, context=HiddenContext(), max_tokens=max_tokens
        )
    torch.testing.assert_close(got.logps_T, torch.cat(logps), atol=2e-5, rtol=0)
    torch.testing.assert_close(got.entropies_T, torch.cat(entropies), atol=2e-5, rtol=0)
    torch.testing.assert_close(got.hidden_BD, torch.stack([h[-1] for h in hidden]), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("layer", "index"), [("first", 1), ("middle", 1), ("last", 2), (0, 0), (-1, 2)])
def test_hidden_layers_and_mean_pooling(layer: Any, index: int, tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3)
    with torch.no_grad():
        hidden = one_by_one(policy.model, layer=index)[2]
        got = policy.token_statistics(PROMPTS, RESPONSES, context=HiddenContext(layer, "mean")).hidden_BD
    torch.testing.assert_close(got, torch.stack([h.mean(0) for h in hidden]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "index"), [("last", 2), ("first", 1)])
def test_the_prompt_state_is_that_of_the_prompt_alone(
    kind: str, packing: bool, layer: Any, index: int, request: pytest.FixtureRequest
) -> None:
    policy = policy_of(request.getfixturevalue(kind), packing=packing)
    assert policy.packs is packing
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2]]  # the first two responses answer one prompt
    responses = [*RESPONSES, [17, 18]]
    with torch.no_grad():
        alone = [
            policy.model(torch.tensor([p]), output_hidden_states=True).hidden_states[index][0, -1] for p in prompts
        ]
        terminal, prompt, both = (
            policy.token_statistics(prompts, responses, context=HiddenContext(layer, "mean", place)).hidden_BD
            for place in ("terminal", "prompt", "both")
        )
        context = HiddenContext(layer, "last", "prompt")
        apart = policy.token_statistics(
            prompts, responses, context=context, max_tokens=1
        ).hidden_BD  # a group is cut up
    torch.testing.assert_close(prompt, torch.stack(alone), atol=2e-5, rtol=0)
    torch.testing.assert_close(apart, prompt, atol=2e-5, rtol=0)
    torch.testing.assert_close(both, torch.cat([prompt, terminal], dim=1), atol=2e-5, rtol=0)


def test_a_layer_that_is_not_there_is_named(tiny_qwen3: Path) -> None:
    with pytest.raises(UserError, match=r"layer=9.*0 to 2"):
        policy_of(tiny_qwen3).token_statistics(PROMPTS, RESPONSES, context=HiddenContext(9))


def test_gradients_flow_through_log_probabilities(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3)
    policy.token_statistics(PROMPTS, RESPONSES).logps_T.sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    torch.cat(one_by_one(policy.model)[0]).sum().backward()
    theirs = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    assert all("lora_" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4, rtol=1e-4)


def test_base_reference_is_the_model_as_loaded(tiny_qwen3: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = policy_of(tiny_qwen3)
    plain = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat(one_by_one(plain)[0])
    got = policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert not got.requires_grad
    assert not torch.allclose(policy.token_statistics(PROMPTS, RESPONSES).logps_T, expected, atol=1e-3)


@pytest.mark.parametrize("lora", [LoRA(r=4), None])
def test_synced_reference_moves_by_its_rate(tiny_qwen3: Path, lora: LoRA | None) -> None:
    policy = policy_of(tiny_qwen3, lora=lora, reference="synced", sync_rate=0.25)
    trained = policy.trained_parameters()
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05)
    start = dict(policy._reference_pairs())
    before = [(target.clone(), source.clone()) for target, source in start.items()]
    policy.sync_reference()
    for (target, source), (old, _) in zip(policy._reference_pairs(), before, strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * source)
    policy.sync_reference(1.0)
    with torch.no_grad():
        ours = policy.token_statistics(PROMPTS, RESPONSES).logps_T
        reference = policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    torch.testing.assert_close(ours, reference)
    assert [p is q for p, q in zip(policy.trained_parameters(), trained, strict=True)] == [True] * len(trained)


def test_a_synced_reference_starts_as_the_base_and_is_never_trained(tiny_qwen3: Path) -> None:
    policy = LoRAPolicy(str(tiny_qwen3), dtype="float32", lora=LoRA(r=4), reference="synced")
    assert not any(".reference." in n for n, p in policy.named_parameters() if p.requires_grad)
    policy.token_statistics(PROMPTS, RESPONSES, which="reference")
    assert not any(".reference." in n for n, p in policy.named_parameters() if p.requires_grad)
    assert sum(".reference." in n for n in policy.saved_names()) == sum(".default." in n for n in policy.saved_names())


def test_saved_names_hold_no_base_weights(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3)
    assert policy.saved_names() == {n for n, _ in policy.named_parameters() if "lora_" in n}
    assert len(policy_of(tiny_qwen3, lora=None).saved_names()) > 20


def test_adapters_are_float32_on_a_bfloat16_base(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, dtype="bfloat16")
    kinds = {("lora_" in n, p.dtype) for n, p in policy.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert policy.token_statistics(PROMPTS, RESPONSES).logps_T.dtype == torch.float32


def test_lora_options_reach_peft(tiny_qwen3: Path) -> None:
    policy = policy_of(
        tiny_qwen3, lora=LoRA(r=4, alpha=8, dropout=0.1, use_rslora=True, use_dora=True, target_modules=["q_proj"])
    )
    config = policy.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert config.use_rslora
    assert config.use_dora
    assert not any("k_proj.lora" in n for n, _ in policy.named_parameters())
    with pytest.raises(UserError, match="PEFT refused"):
        policy_of(tiny_qwen3, lora=LoRA(target_modules=["no_such_layer"]))


def test_end_tokens_are_the_union_of_tokenizer_and_model(tiny_qwen3: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(tiny_qwen3, tmp_path / "copy"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 10], "top_k": 1}))
    assert policy_of(folder).eos_token_ids == [10, 257]


def test_a_model_that_cannot_be_loaded_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.policy\.model"):
        LoRAPolicy("no-such-owner/no-such-model")
    with pytest.raises(UserError, match="folder"):
        LoRAPolicy(str(tmp_path))


def test_pad_rows_by_hand() -> None:
    padded = pad_rows([[1, 2], [3]], [[4], [5, 6]], 0, torch.device("cpu"))
    assert padded.ids.tolist() == [[1, 2, 4, 0], [0, 3, 5, 6]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert padded.position_ids.tolist() == [[0, 1, 2, 2], [0, 0, 1, 2]]
    assert (padded.before_T.tolist(), padded.inside_T.tolist(), padded.last_B.tolist()) == (
        [1, 5, 6],
        [2, 6, 7],
        [2, 7],
    )


def test_row_slices_by_hand() -> None:
    assert row_slices([2, 2, 8, 1], [2, 2, 2, 1], None) == [slice(0, 4)]
    assert row_slices([2, 2, 8, 1], [2, 2, 2, 1], 8) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert row_slices([5], [5], 1) == [slice(0, 1)]


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", True])
@pytest.mark.parametrize("reference", ["base", "synced"])
def test_the_reference_of_adapters_that_change_the_base_is_the_model_as_loaded(
    tiny_qwen3: Path, init: Any, reference: Any
) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.cat(one_by_one(plain)[0])
    policy = make_policy(tiny_qwen3, lora=LoRA(r=4, options={"init_lora_weights": init}), reference=reference).eval()
    own = policy.token_statistics(PROMPTS, RESPONSES).logps_T
    torch.testing.assert_close(own.detach(), expected, atol=5e-5, rtol=0)  # before the first step, the policy as well
    with torch.no_grad():
        for parameter in policy.trained_parameters():
            parameter.add_(0.05)
    got = policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
    assert not torch.allclose(policy.token_statistics(PROMPTS, RESPONSES).logps_T, expected, atol=1e-2)
    kept = {n for n in policy.saved_names() if ".reference." in n}
    assert bool(kept) == (reference == "synced")  # the first adapters are those of the base, whenever it is loaded


@pytest.mark.filterwarnings("error:Careful, disabling adapter layers")
def test_the_reference_has_the_biases_that_the_model_was_loaded_with(tmp_path: Path) -> None:
    folder = make_model("llama", tmp_path / "biased", attention_bias=True)
    policy = make_policy(folder, lora=LoRA(r=4, options={"bias": "all"})).eval()
    before = policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    biases = [p for n, p in policy.named_parameters() if n.endswith("bias") and p.requires_grad]
    assert biases
    with torch.no_grad():
        for parameter in policy.trained_parameters():
            parameter.add_(0.1)
    moved = [p.clone() for p in biases]
    after = policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    assert all(torch.equal(p, m) for p, m in zip(biases, moved, strict=True))
    assert not any("first_bias" in name for name in policy.saved_names())
    with pytest.raises(UserError, match="bias=all trains the base's own biases"):
        make_policy(folder, lora=LoRA(r=4, options={"bias": "all"}), reference="synced")


def test_a_reference_of_adapters_on_the_embedding_moves_too(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, lora=LoRA(r=4, target_modules=["embed_tokens", "q_proj"]), reference="synced")
    with torch.no_grad():
        for parameter in policy.trained_parameters():
            parameter.add_(0.05)
    policy.sync_reference(1.0)
    ours = policy.token_statistics(PROMPTS, RESPONSES).logps_T.detach()
    torch.testing.assert_close(policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T, ours)
    assert sum("reference" in n.split(".") for n in policy.saved_names()) == len(policy.trained_parameters()) == 6


def test_adapters_that_leave_no_reference_are_refused(tiny_qwen3: Path) -> None:
    with pytest.raises(UserError, match="kasa_config changes the base"):
        make_policy(tiny_qwen3, lora=LoRA(r=4, options={"kasa_config": {}}))


def test_a_router_has_no_loss_of_its_own(tmp_path: Path) -> None:
    """Mixtures of experts train on the policy's loss alone, as docs/algorithm.md says."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    found = []
    for number, coef in enumerate((0.0, 10.0)):
        folder = make_model("qwen3_moe", tmp_path / str(number), router_aux_loss_coef=coef, **experts)
        policy = make_policy(folder, std=0.1)
        policy.token_statistics([[1, 2, 3]] * 2, [[4, 5], [6, 7, 8]]).logps_T.sum().backward()
        found.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    assert found[0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    page = (Path(__file__).parents[2] / "docs/algorithm.md").read_text(encoding="utf-8")
    assert "router_aux_loss_coef" in page
