"""Our decoding loop against transformers' ``generate`` and against a scoring pass: the same tokens, the same statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from maestro_pl.errors import UserError
from maestro_pl.generation import HFEngine, NativeEngine, Sampling
from maestro_pl.generation.cache import GroupCache
from maestro_pl.generation.hf import decoding_mode
from maestro_pl.generation.sampler import Sampler, invert_cdf
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.padding import pad_rows
from maestro_pl.policy.policy import LoRAPolicy
from tests.support import make_model, make_policy


@pytest.fixture(autouse=True, params=[0, 30, 10_000], ids=["apart", "copied late", "copied"])
def copy_below(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with the prompts' keys kept once, copied to the rows when few are left, and copied at once."""
    original = GroupCache.__init__
    monkeypatch.setattr(GroupCache, "__init__", lambda self, *args: original(self, *args, copy_below=request.param))


KINDS = ["tiny_qwen3", "tiny_llama", "tiny_gpt2"]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 11]
N = 6


def policy_of(folder: Path, eos: list[int] | None = None, **options: Any) -> LoRAPolicy:
    policy = make_policy(folder, std=0.1, **options).eval()
    if eos is not None:
        policy.eos_token_ids = eos
    return policy


class Inverted(LogitsProcessor):
    """Makes greedy ``generate`` draw the token that the same uniform numbers give our sampler."""

    def __init__(self, uniform_BL: torch.Tensor, temperature: float, prompt_width: int) -> None:
        self.uniform_BL, self.temperature, self.prompt_width = uniform_BL, temperature, prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_width
        chosen = invert_cdf((scores / self.temperature).softmax(-1), self.uniform_BL[:, step])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_tokens_equal_those_of_generate_with_the_same_random_numbers(
    kind: str, request: pytest.FixtureRequest
) -> None:
    policy = policy_of(request.getfixturevalue(kind), eos=list(range(0, 264, 12)))
    sampling = Sampling(max_new_tokens=16, temperature=0.8, seed=4)
    ours = NativeEngine().generate(policy, PROMPTS, N, sampling).response_ids
    rows = pad_rows([p for p in PROMPTS for _ in range(N)], [[]] * (len(PROMPTS) * N), 0, policy.device)
    uniform = torch.rand(len(PROMPTS) * N, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    width = rows.ids.shape[1]
    with decoding_mode(policy):
        whole = policy.model.generate(
            input_ids=rows.ids,
            attention_mask=rows.attention_mask,
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=policy.eos_token_ids,
            pad_token_id=258,
            logits_processor=LogitsProcessorList([Inverted(uniform, 0.8, width)]),
        )[:, width:].tolist()
    assert len({len(ids) for ids in ours}) > 3  # rows left at different steps
    for mine, theirs in zip(ours, whole, strict=True):
        assert mine == theirs[: len(mine)]
        assert set(theirs[len(mine) :]) <= {258}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_those_of_generate(kind: str, request: pytest.FixtureRequest) -> None:
    policy = policy_of(request.getfixturevalue(kind), eos=list(range(0, 264, 20)))
    sampling = Sampling(max_new_tokens=40, temperature=0.0, min_new_tokens=3)
    ours, theirs = (engine.generate(policy, PROMPTS, 2, sampling) for engine in (NativeEngine(), HFEngine()))
    assert ours.response_ids == theirs.response_ids
    assert ours.finish_reasons == theirs.finish_reasons


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "context",
    [
        HiddenContext(),
        HiddenContext("first", "mean"),
        HiddenContext("last", "mean"),
        *(
            HiddenContext(layer, pool, place)
            for place in ("prompt", "both")
            for layer in ("first", "last")
            for pool in ("last", "mean")
        ),
    ],
    ids=lambda context: f"{context.layer}-{context.pool}-{context.place}",
)
def test_what_decoding_saw_equals_a_scoring_pass(
    kind: str, context: HiddenContext, request: pytest.FixtureRequest
) -> None:
    policy = policy_of(request.getfixturevalue(kind), eos=list(range(0, 264, 12)))
    got = NativeEngine().generate(policy, PROMPTS, N, Sampling(max_new_tokens=16, temperature=0.8), context=context)
    assert set(got.finish_reasons) == {"stop", "length"}
    prompts = [prompt for prompt in PROMPTS for _ in range(N)]
    with torch.no_grad():
        scored = policy.token_statistics(prompts, got.response_ids, temperature=0.8, entropy=True, context=context)
    torch.testing.assert_close(got.logps_T, scored.logps_T, atol=3e-5, rtol=0)
    torch.testing.assert_close(got.entropies_T, scored.entropies_T, atol=3e-5, rtol=0)
    torch.testing.assert_close(got.hidden_BD, scored.hidden_BD, atol=3e-5, rtol=0)


@pytest.mark.parametrize("max_batch", [1, 4, 7, 12])
def test_a_row_draws_the_same_in_any_batch(tiny_qwen3: Path, max_batch: int) -> None:
    policy = policy_of(tiny_qwen3, eos=list(range(0, 264, 12)))
    sampling = Sampling(max_new_tokens=80, seed=9)  # longer than the cache's first room
    together, apart = (
        NativeEngine(size).generate(policy, PROMPTS, N, sampling, context=HiddenContext()) for size in (None, max_batch)
    )
    assert together.response_ids == apart.response_ids
    assert together.finish_reasons == apart.finish_reasons
    torch.testing.assert_close(together.logps_T, apart.logps_T, atol=3e-5, rtol=0)
    torch.testing.assert_close(together.hidden_BD, apart.hidden_BD, atol=3e-5, rtol=0)


def test_a_prompt_is_read_once_and_finished_rows_leave(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3, eos=list(range(0, 264, 4)))
    tokens: list[int] = []
    policy.base_model.model.register_forward_hook(
        lambda module, args, kwargs, output: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    policy.packs  # noqa: B018 (the trial passes are not part of the count)
    tokens.clear()
    got = NativeEngine().generate(policy, PROMPTS, 32, Sampling(max_new_tokens=30, seed=1))
    assert tokens[0] == sum(map(len, PROMPTS))
    longest = max(map(len, got.response_ids))
    assert len(tokens) == longest  # the last token of a row is drawn and not read
    assert tokens[1:] == sorted(tokens[1:], reverse=True)
    assert sum(tokens[1:]) < 1.2 * sum(map(len, got.response_ids)) < 0.6 * 96 * longest


def test_models_that_cannot_take_it_use_generate(tmp_path: Path) -> None:
    policy = policy_of(make_model("gemma3_text", tmp_path / "gemma3"))
    assert not policy.packs  # sliding windows
    ours, theirs = (
        engine.generate(policy, PROMPTS, 2, Sampling(max_new_tokens=6, seed=3))
        for engine in (NativeEngine(), HFEngine())
    )
    assert ours.response_ids == theirs.response_ids


@pytest.mark.slow
def test_tokens_are_drawn_with_their_probabilities() -> None:
    torch.manual_seed(0)
    for vocabulary in (7, 256, 300, 1000):
        probabilities = (torch.randn(vocabulary) * 2).softmax(0)
        probabilities[3] = 0.0
        uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        drawn = invert_cdf(probabilities.expand(200_000, -1) * 17.0, uniform)
        counts = torch.bincount(drawn, minlength=vocabulary) / 200_000
        torch.testing.assert_close(counts, probabilities / probabilities.sum(), atol=2e-5, rtol=0)
        assert counts[3] == 0


def test_the_ends_of_the_distribution_are_never_a_token_without_mass() -> None:
    mass = torch.zeros(3, 600)
    mass[:, [5, 300, 599]] = torch.tensor([1e-30, 1.0, 1e-12])
    mass[2, [5, 599]] = 0.0
    almost_one = torch.nextafter(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    assert invert_cdf(mass, almost_one.expand(3)).tolist() == [599, 599, 300]
    assert invert_cdf(mass, torch.zeros(3, dtype=torch.float64)).tolist() == [5, 5, 300]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 1}])
def test_a_suppressed_end_token_leaves_the_others_their_mass(options: dict[str, Any]) -> None:
    logits = torch.full((1, 300), -20.0)
    logits[0, 7], logits[0, 257] = 5.0, 10.0
    sampling = Sampling(max_new_tokens=4, min_new_tokens=2, temperature=0.04, **options)
    sampler = Sampler(sampling, [257, 10**6], torch.full((1, 4), 0.5, dtype=torch.float64))
    assert sampler.draw(logits, torch.tensor([0]), 0).tokens.tolist() == [7]


def test_logits_that_are_not_numbers_are_a_sentence(tiny_qwen3: Path) -> None:
    policy = policy_of(tiny_qwen3)
    policy.packs  # noqa: B018
    with torch.no_grad():
        policy.trained_parameters()[0].fill_(torch.nan)
    with pytest.raises(UserError, match="not numbers"):
        NativeEngine().generate(policy, PROMPTS, 2, Sampling(max_new_tokens=4))
