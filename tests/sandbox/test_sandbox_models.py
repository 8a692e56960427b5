"""The models shipped with the sandbox, and the numbers that make it a bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.sandbox.build.report import Models, family_numbers, load_models, probe_accuracy
from benchmarks.sandbox.build.scoring import MAX_TOKENS, MIN_TOKENS, REWARDS, Scored, sample_and_score
from benchmarks.sandbox.build.search import STATIC_WEIGHTS, simplex_grid, tilted_utility
from maestro_pl.sandbox import TASKS, policy_path, preference_path, rows


@pytest.fixture(scope="module")
def models() -> Models:
    return load_models()


@pytest.fixture(scope="module")
def scored(models: Models) -> Scored:
    return sample_and_score(models.policy, models.preference, rows("validation", n_per_task=12, seed=7), 8, seed=7)


def test_assets_are_small() -> None:
    weights = [*policy_path().glob("*.safetensors"), *preference_path().glob("*.safetensors")]
    assert len(weights) == 2
    assert sum(path.stat().st_size for path in weights) <= 8 * 2**20


def test_policy_loads_as_any_other() -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6


def test_tokenizer_keeps_the_tags_and_drops_the_end() -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    text = "<think>4 plus 5 is 9</think><answer>9 apples</answer>"
    ids = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<think>", "4"]
    assert tokenizer.decode(tokenizer.encode("Zürich, 日本!")) == "Zürich, 日本!"


def test_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>a</think>"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>a</think><|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_every_family_leaves_room_to_learn(scored: Scored) -> None:
    for task, numbers in family_numbers(scored).items():
        assert 0.15 <= numbers["utility"] <= 0.65, task
        assert 0.45 <= numbers["format"] <= 0.85, task
        assert numbers["spread"] >= 0.8, task
        assert numbers["truncated"] <= 0.05, task


def test_rewards_help_here_and_hurt_there(scored: Scored) -> None:
    table = family_numbers(scored)
    correlation = {task: numbers["correlation"] for task, numbers in table.items()}
    assert all(correlation[task]["format"] > 0 for task in TASKS)
    for name, helps, hurts in (
        ("length", "reply", "explain"),
        ("entropy", "brainstorm", "arithmetic"),
        ("perplexity", "explain", "brainstorm"),
        ("preference", "brainstorm", "arithmetic"),
    ):
        assert correlation[helps][name] > 0.15, name
        assert correlation[hurts][name] < -0.15, name


def test_preference_model_likes_length(models: Models) -> None:
    short, long = (
        "<think>a</think><answer>9</answer>",
        ("<think>a</think><answer>Tom has 9 golden apples, like a wild river, a sweet dream, a misty harbour</answer>"),
    )
    scores, cut = models.preference(["How many?"] * 2, [short, long])
    assert scores[1] > scores[0] + 0.3
    assert not cut.any()


def test_probe_accuracy_by_hand() -> None:
    # the sign of the only feature is the label, in the groups it is fitted on and in the others
    hidden = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])
    assert probe_accuracy(hidden, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])) == 1.0
    assert probe_accuracy(hidden, torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1])) == 0.0


def test_simplex_grid() -> None:
    assert len(simplex_grid(5, 10)) == 1001
    assert sorted(simplex_grid(2, 2).tolist()) == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    assert torch.allclose(simplex_grid(5, 10).sum(1), torch.ones(1001))


def test_tilted_utility_by_hand() -> None:
    # two responses: z-scores are +-1/sqrt(2), so beta = sqrt(2) * ln(3) / 2 gives odds of 3
    beta = 2**0.5 * torch.log(torch.tensor(3.0)).item() / 2
    utility, kl = tilted_utility(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[1.0, 0.0]]), beta)
    assert utility.item() == pytest.approx(0.75, abs=1e-4)
    expected_kl = 0.75 * torch.log(torch.tensor(1.5)).item() + 0.25 * torch.log(torch.tensor(0.5)).item()
    assert kl.item() == pytest.approx(expected_kl, abs=1e-4)


def test_static_weights_file() -> None:
    result = json.loads(STATIC_WEIGHTS.read_text())
    assert tuple(result["rewards"]) == REWARDS
    assert set(result["tasks"]) == set(TASKS)
    for task, numbers in result["tasks"].items():
        assert sum(numbers["best_weights"].values()) == pytest.approx(1.0), task
        assert numbers["best"] > 1.3 * numbers["equal"], task


def test_config_is_the_world_of_the_search() -> None:
    config = Path(__file__).parents[2] / "configs" / "rewards" / "sandbox.yaml"
    listed: dict[str, dict[str, Any]] = {
        entry["class_path"]: entry["init_args"] for entry in yaml.safe_load(config.read_text())
    }
    assert list(listed) == [f"callbacks.{name.capitalize()}Reward" for name in (*REWARDS, "function")]
    assert (listed["callbacks.LengthReward"]["min"], listed["callbacks.LengthReward"]["max"]) == (
        MIN_TOKENS,
        MAX_TOKENS,
    )
    assert listed["callbacks.EntropyReward"]["direction"] == "maximize"
    assert listed["callbacks.PerplexityReward"]["score"] == "log"
    assert listed["callbacks.FunctionReward"]["role"] == "metric"
