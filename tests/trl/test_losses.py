"""Losses and gradients of 252 random settings against TRL's ``GRPOTrainer._compute_loss``, in fp32 on the CPU.

Both sides start from the same ids. TRL pads, runs its own forward pass and loss; ours is
``LoRAPolicy.token_statistics``, ``token_weights``, ``high_entropy`` and ``grpo_loss``, put together as
``MaestroModule`` does, with prompts packed and padded.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from maestro_pl import KL, Loss
from maestro_pl.algorithm.losses import TokenBatch, grpo_loss, high_entropy, token_weights
from maestro_pl.algorithm.mismatch import mismatch_correction
from maestro_pl.algorithm.settings import ImportanceLevel, LossType, Mismatch
from maestro_pl.policy.policy import LoRAPolicy
from tests.trl.reference import VARIANTS, Batch, draw_batch, gradients, make_policy, make_trainer

pytestmark = pytest.mark.slow

RELATIVE = 1e-5
# A loss is a sum of terms of either sign, on both sides of float32 terms: where they cancel, what is left is compared
# with one rounding of the sum of their sizes (``cispo``'s terms are log-probabilities, ten times the others).
ROUNDING = 1.2e-7
MAX_NEW_TOKENS = 13
PER_VARIANT = 42
TEMPERATURES = (1.0, 0.7)
LOSS_TYPES = get_args(LossType)
CASES = tuple(itertools.product(LOSS_TYPES, get_args(ImportanceLevel)))


@dataclass(frozen=True)
class Setting:
    """One point of the settings; ``seed`` draws its batch."""

    loss_type: str
    level: str
    clip_low: float
    clip_high: float
    delta: float | None
    sapo_temperatures: tuple[float, float]
    kl_coef: float
    kl_unbiased: bool
    mask_truncated: bool
    top_entropy: float
    on_policy: bool
    temperature: float
    seed: int


@functools.cache
def draw_settings(variant: int) -> tuple[Setting, ...]:
    """Every loss type at both levels three times, the rest at random."""
    rng = torch.Generator().manual_seed(variant)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=rng))

    def chance(p: float = 0.5) -> bool:
        return uniform(0, 1) < p

    settings = []
    for number in range(PER_VARIANT):
        loss_type, level = CASES[number % len(CASES)]
        clip_high = uniform(1.05, 1.5) if loss_type == "cispo" else uniform(0.1, 0.4)
        settings.append(
            Setting(
                loss_type=loss_type,
                level=level,
                clip_low=uniform(0.1, 0.3),
                clip_high=clip_high,
                delta=uniform(1.05, 1.4) if chance() else None,
                sapo_temperatures=(uniform(0.5, 2.0), uniform(0.5, 2.0)),
                kl_coef=0.04 if chance() else 0.0,
                kl_unbiased=chance(),
                mask_truncated=chance(),
                top_entropy=uniform(0.2, 0.9) if chance() else 1.0,
                on_policy=chance(0.2),
                temperature=TEMPERATURES[number // len(CASES) % 2],
                seed=1000 * variant + number,
            )
        )
    return tuple(settings)


@dataclass
class Given:
    """What both sides are given: a batch, advantages, and log-probabilities under the old policy and the reference."""

    batch: Batch
    advantages_B: Tensor
    old_logps_T: Tensor | None
    ref_logps_T: Tensor | None
    correction_T: Tensor | None = None


def draw_given(setting: Setting, policy: LoRAPolicy, equal_prompts: bool) -> Given:
    rng = torch.Generator().manual_seed(setting.seed)
    batch = draw_batch(rng, equal_prompts=equal_prompts)
    advantages_B = torch.randn(len(batch.responses), generator=rng)
    advantages_B[4] = 0.0
    with torch.no_grad():
        logps_T = policy.token_statistics(batch.prompts, batch.responses, temperature=setting.temperature).logps_T
    old_T = logps_T + 0.25 * torch.randn(logps_T.shape, generator=rng)
    ref_T = logps_T + 0.25 * torch.randn(logps_T.shape, generator=rng)
    return Given(batch, advantages_B, None if setting.on_policy else old_T, ref_T if setting.kl_coef else None)


def ours(setting: Setting, policy: LoRAPolicy, given: Given) -> tuple[Tensor, dict[str, Tensor], float]:
    """Loss, gradients, and the sum of the sizes of the loss's terms."""
    batch, lengths_B = given.batch, given.batch.lengths_B
    active_B = torch.ones(len(lengths_B), dtype=torch.bool)
    if setting.mask_truncated:
        active_B = ~torch.tensor(batch.truncated)
    statistics = policy.token_statistics(
        batch.prompts, batch.responses, temperature=setting.temperature, entropy=setting.top_entropy < 1
    )
    chosen_T = None
    if statistics.entropies_T is not None:
        chosen_T = high_entropy(statistics.entropies_T, active_B.repeat_interleave(lengths_B), setting.top_entropy)
    advantages_T = given.advantages_B.repeat_interleave(lengths_B)
    weights_T = token_weights(setting.loss_type, lengths_B, active_B, MAX_NEW_TOKENS)
    loss, _ = grpo_loss(
        TokenBatch(
            statistics.logps_T,
            statistics.logps_T.detach() if given.old_logps_T is None else given.old_logps_T,
            advantages_T,
            weights_T,
            given.ref_logps_T,
            lengths_B,
            chosen_T,
            given.correction_T,
        ),
        loss=Loss(
            type=setting.loss_type,
            importance_level=setting.level,
            clip_low=setting.clip_low,
            clip_high=setting.clip_high,
            delta=setting.delta,
            sapo_temperatures=setting.sapo_temperatures,
        ),
        kl=KL(coef=setting.kl_coef, unbiased=setting.kl_unbiased),
    )
    loss.backward()
    sizes_T = weights_T * advantages_T.abs()
    if setting.loss_type == "cispo":
        sizes_T = sizes_T * statistics.logps_T.detach().abs()
    return loss.detach(), gradients(policy.model), float(sizes_T.sum())


def theirs(setting: Setting, trainer: Any, given: Given) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.loss_type = setting.loss_type
    trainer.importance_sampling_level = setting.level
    trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta = setting.clip_low, setting.clip_high, setting.delta
    trainer.args.sapo_temperature_pos, trainer.args.sapo_temperature_neg = setting.sapo_temperatures
    trainer.beta, trainer.args.use_bias_correction_kl = setting.kl_coef, setting.kl_unbiased
    trainer.top_entropy_quantile = setting.top_entropy
    trainer.current_gradient_accumulation_steps = 1
    prompt_ids, prompt_mask = given.batch.prompt_rectangle()
    completion_ids, mask = given.batch.response_rectangle()
    if setting.mask_truncated:  # as _generate_and_score_completions does
        mask = mask & ~torch.tensor(given.batch.truncated).unsqueeze(1)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": mask.int(),
        "advantages": given.advantages_B,
        "num_items_in_batch": mask.sum(),
    }
    if given.old_logps_T is not None:
        inputs["old_per_token_logps"] = given.batch.rectangle(given.old_logps_T)
    if given.ref_logps_T is not None:
        inputs["ref_per_token_logps"] = given.batch.rectangle(given.ref_logps_T)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def assert_same(
    setting: Setting, loss: Tensor, mine: dict[str, Tensor], size: float, expected: Tensor, other: dict[str, Tensor]
) -> None:
    """Losses, whole gradients, and the gradients of every parameter that has a share in the whole."""
    assert float((loss - expected).abs()) <= RELATIVE * float(expected.abs()) + ROUNDING * size, setting
    assert mine.keys() == other.keys(), setting
    whole = torch.cat([g.flatten() for g in other.values()])
    error = torch.cat([(mine[name] - other[name]).flatten() for name in other])
    assert float(error.norm()) <= RELATIVE * float(whole.norm()), setting
    for name, gradient in other.items():
        if float(gradient.norm()) > 1e-3 * float(whole.norm()):
            difference = float((mine[name] - gradient).norm())
            assert difference <= RELATIVE * float(gradient.norm()), (name, setting)


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=["-".join(v) for v in VARIANTS])
def test_loss_and_gradients(variant: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    kind, tuned = VARIANTS[variant]
    folder = request.getfixturevalue(f"tiny_{kind}")
    policy, padding_policy = (make_policy(folder, tuned, packing=packing).train() for packing in (True, False))
    trainers = {
        t: make_trainer(policy, folder, tmp_path, temperature=t, max_completion_length=MAX_NEW_TOKENS)
        for t in TEMPERATURES
    }
    moved = 0
    for setting in draw_settings(variant):
        # TRL gives GPT-2 no position ids: prompts of one length (test_trl_differences.py has the others)
        given = draw_given(setting, policy, equal_prompts=kind == "gpt2")
        expected, other = theirs(setting, trainers[setting.temperature], given)
        for scorer in (policy, padding_policy):
            assert_same(setting, *ours(setting, scorer, given), expected, other)
        moved += max(float(gradient.norm()) for gradient in other.values()) > 1e-3
    assert moved == PER_VARIANT  # no setting was compared at a gradient of nothing


def test_settings_cover_the_options() -> None:
    settings = [s for variant in range(len(VARIANTS)) for s in draw_settings(variant)]
    assert len(set(settings)) == len(settings) == 252
    for loss_type, level in CASES:
        here = [s for s in settings if (s.loss_type, s.level) == (loss_type, level)]
        for value in (
            lambda s: s.delta is None,
            lambda s: s.kl_coef > 0,
            lambda s: s.kl_coef > 0 and s.kl_unbiased,
            lambda s: s.mask_truncated,
            lambda s: s.top_entropy < 1,
            lambda s: s.on_policy,
        ):
            assert {value(s) for s in here} == {True, False}, (loss_type, level)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_response_truncated(loss_type: str, tiny_qwen3: Path, tmp_path: Path) -> None:
    setting = Setting(loss_type, "token", 0.2, 0.2, None, (1.0, 1.05), 0.04, True, True, 0.5, False, 1.0, 7)
    policy = make_policy(tiny_qwen3, "lora")
    given = draw_given(setting, policy, equal_prompts=False)
    given.batch.truncated = [True] * len(given.batch.responses)
    trainer = make_trainer(policy, tiny_qwen3, tmp_path, max_completion_length=MAX_NEW_TOKENS)
    for loss, found in (ours(setting, policy, given)[:2], theirs(setting, trainer, given)):
        assert float(loss) == 0.0
        assert all(not g.any() for g in found.values())


@pytest.mark.parametrize("mode", [kind for kind in get_args(Mismatch) if kind != "none"])
def test_the_correction_for_an_engine(mode: Any, tiny_qwen3: Path, tmp_path: Path) -> None:
    """TRL's formulas of ``_generate_and_score_completions`` in its rectangle, then its loss."""
    setting = Setting("grpo", "token", 0.2, 0.2, None, (1.0, 1.05), 0.04, False, False, 1.0, False, 1.0, 11)
    policy = make_policy(tiny_qwen3, "lora").train()
    given = draw_given(setting, policy, equal_prompts=False)
    assert given.old_logps_T is not None
    spread_T = 0.7 * torch.randn(given.old_logps_T.shape, generator=torch.Generator().manual_seed(3))
    correction_T, _ = mismatch_correction(
        given.old_logps_T, given.old_logps_T - spread_T, given.batch.lengths_B, mode, 1.5
    )
    assert correction_T is not None
    difference = given.batch.rectangle(spread_T)
    ratio = torch.exp(difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference)
    ratio = ratio.clamp(max=1.5) if mode.endswith("truncate") else ratio.masked_fill(ratio > 1.5, 0.0)
    assert 0 < int((correction_T == (1.5 if mode.endswith("truncate") else 0.0)).sum()) < len(correction_T)

    trainer = make_trainer(policy, tiny_qwen3, tmp_path, max_completion_length=MAX_NEW_TOKENS)
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: compute(model, {**inputs, "importance_sampling_ratio": ratio})
    expected, other = theirs(setting, trainer, given)
    given.correction_T = correction_T
    assert_same(setting, *ours(setting, policy, given), expected, other)
