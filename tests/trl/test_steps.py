"""Whole runs on scripted completions: ``GRPOTrainer.train`` against ``Trainer.fit`` with a ``MaestroModule``.

Both start from the same parameters, make two rollouts and take one or two optimizer steps on each; afterwards no
parameter may be more than 1e-6 apart.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import EqualWeights, FixedWeights, RandomWeights, Weigher
from tests.trl.reference import (
    MODULI,
    OPTIMIZERS,
    VARIANTS,
    Plan,
    furthest,
    make_policy,
    run_ours,
    run_trl,
    write_script,
)

pytestmark = pytest.mark.slow

ABSOLUTE = 1e-6


def compare(
    plan: Plan,
    variant: tuple[str, str],
    weigher: Weigher,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    least: float = 100 * ABSOLUTE,
) -> None:
    kind, tuned = variant
    folder = request.getfixturevalue(f"tiny_{kind}")
    policy, start = make_policy(folder, tuned), make_policy(folder, tuned)
    if isinstance(weigher, Conductor):
        weigher.build(policy.hidden_size, list(MODULI))
        nn.init.normal_(weigher.net[0].weight, std=0.3)
    script = write_script(policy, equal_prompts=kind == "gpt2")  # test_trl_differences.py has the others
    weights = run_ours(plan, policy, script, weigher, tmp_path)
    assert weights.skipped == 0
    model = run_trl(plan, start, script, weights, folder, tmp_path)
    assert furthest(policy, start.model) > least  # they moved by far more than they may differ
    assert furthest(policy, model) <= ABSOLUTE


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_parameters(
    variant: tuple[str, str],
    optimizer: str,
    micro_batches: int,
    updates: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    compare(Plan(optimizer, micro_batches, updates), variant, EqualWeights(), request, tmp_path)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(loss_type="grpo", micro_batches=2, updates=2, kl_coef=0.04),
        Plan("adamw_torch", loss_type="grpo", updates=2, level="sequence", clip=0.01),
        Plan(loss_type="dr_grpo", micro_batches=2, mask_truncated=True, max_grad_norm=0.05),
        Plan("adamw_torch", micro_batches=2, updates=2, kl_coef=0.04, temperature=0.7, mask_truncated=True),
        Plan(loss_type="bnpo", updates=2),
        Plan(loss_type="cispo", clip=1.1, micro_batches=2, updates=2),
        Plan(loss_type="sapo", micro_batches=2, updates=2),
        Plan(loss_type="luspo", level="sequence", micro_batches=2, updates=2, max_grad_norm=0.3),
        Plan(top_entropy=0.4, kl_coef=0.04),
        Plan(aggregation="normalize_then_sum", micro_batches=2, updates=2),
    ],
    ids=lambda p: f"{p.loss_type}-{p.level}-{p.kl_coef}-{p.top_entropy}-{p.aggregation}",
)
@pytest.mark.parametrize("variant", [("qwen3", "lora"), ("llama", "full")], ids="-".join)
def test_objectives(plan: Plan, variant: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    compare(plan, variant, EqualWeights(), request, tmp_path)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != ("gpt2", "full")], ids="-".join)
def test_default_optimizer(
    variant: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The AdamW of ``MaestroModule``'s default, where no gradient is nothing but rounding."""
    monkeypatch.setattr("tests.trl.reference.ADAM_EPS", 1e-8)
    monkeypatch.setitem(OPTIMIZERS, "adamw_torch", 1e-5)
    compare(Plan("adamw_torch", 2, 2), variant, EqualWeights(), request, tmp_path, least=20 * ABSOLUTE)


@pytest.mark.parametrize("weigher", [FixedWeights, RandomWeights, Conductor], ids=lambda w: w.__name__)
@pytest.mark.parametrize("updates", [1, 2])
def test_weights(weigher: type[Weigher], updates: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Weights of each response, against a TRL trainer whose reward function returns the weighted sum."""
    torch.manual_seed(5)
    made = FixedWeights({"x": 3.0, "y": 1.0, "z": 0.5}) if weigher is FixedWeights else weigher()
    compare(Plan("adamw_torch", 2, updates), ("qwen3", "lora"), made, request, tmp_path)
