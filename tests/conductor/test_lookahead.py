"""The lookahead signal against autograd: credits, and the meta-gradient of one unrolled policy step."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.rewards import FunctionReward
from maestro_pl import Advantages, Anchoring, Meta
from maestro_pl.algorithm.advantages import group_advantages, scalarise
from maestro_pl.algorithm.losses import segment_sum
from maestro_pl.conductor import LookaheadSignal, Observation, RidgeLearner, WeighedRollout, anchor_values
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.credits import zscores
from maestro_pl.conductor.lookahead import Cost, directional_credits, folds, held_out_gradient
from maestro_pl.errors import UserError
from maestro_pl.policy.padding import token_index
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import data_of, make_rollout, module_of, rewards, trainer_of

N, G, K = 4, 3, 2


@pytest.fixture
def policy(tiny_qwen3: Path) -> LoRAPolicy:
    made = LoRAPolicy(str(tiny_qwen3), dtype="float32")
    torch.manual_seed(3)
    for parameter in made.trained_parameters():  # as after some training: B is not zero any more
        torch.nn.init.normal_(parameter, std=0.05)
    return made


@pytest.fixture
def rollout() -> Rollout:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5, 2, 4, 4, 1, 6, 2, 3, 5, 4, 2]
    responses = [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]
    fields = {"prompt_ids": [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]], "response_ids": responses}
    return make_rollout([""] * (N * G), group_size=G, fields=fields)


HELD, CREDITED = [0, 2], [1, 3]
PASSES = [[n * G + g for g in range(G)] for n in HELD]
ROWS = [n * G + g for n in CREDITED for g in range(G)]
VALUE_B = torch.tensor([-1.0, 0.0, 1.0] + [torch.nan] * 3 + [1.0, -0.5, -0.5] + [torch.nan] * 3)


def weights_of(rollout: Rollout) -> torch.Tensor:
    return torch.full((int(rollout.lengths_B.sum()),), 1.0 / int(rollout.lengths_B.sum()))


def logps(policy: LoRAPolicy, rollout: Rollout, rows: list[int], weights_T: torch.Tensor) -> torch.Tensor:
    """sum_t weights_t log pi(y_t) of the rows, with gradient, for references of our own."""
    prompts = [rollout.prompt_ids[row // G] for row in rows]
    statistics = policy.token_statistics(prompts, [rollout.response_ids[row] for row in rows])
    chosen = weights_T[token_index(rollout.lengths_B, rows)]
    return segment_sum(chosen.double() * statistics.logps_T.double(), rollout.lengths_B[rows])


def held_out_objective(policy: LoRAPolicy, rollout: Rollout) -> torch.Tensor:
    rows = [n * G + g for n in HELD for g in range(G)]
    ones_T = torch.ones(int(rollout.lengths_B.sum()))
    return (VALUE_B[rows].double() * logps(policy, rollout, rows, ones_T)).mean()


def credits_of(policy: LoRAPolicy, rollout: Rollout, cost: Cost | None = None) -> torch.Tensor:
    cost, weights_T = cost or Cost(), weights_of(rollout)
    direction = held_out_gradient(policy, rollout, HELD, VALUE_B, PASSES, weights_T, cost)
    assert direction is not None
    return directional_credits(policy, direction, rollout, ROWS, weights_T, 0.01, 10_000, cost)


def test_the_held_out_gradient_is_that_of_autograd(policy: LoRAPolicy, rollout: Rollout) -> None:
    policy.eval()
    got = held_out_gradient(policy, rollout, HELD, VALUE_B, PASSES, weights_of(rollout), Cost())
    assert got is not None
    expected = torch.autograd.grad(held_out_objective(policy, rollout), policy.trained_parameters())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_credits_are_inner_products_of_gradients(policy: LoRAPolicy, rollout: Rollout) -> None:
    policy.eval()
    parameters = policy.trained_parameters()
    g = torch.autograd.grad(held_out_objective(policy, rollout), parameters)
    expected = []
    for row in ROWS:
        own = torch.autograd.grad(logps(policy, rollout, [row], weights_of(rollout)).sum(), parameters)
        expected.append(sum(float((a.double() * b.double()).sum()) for a, b in zip(g, own, strict=True)))
    got = credits_of(policy, rollout)
    scale = float(torch.tensor(expected).abs().max())
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-3 * scale, rtol=1e-3)


def test_the_meta_gradient_is_that_of_the_unrolled_step(policy: LoRAPolicy, rollout: Rollout) -> None:
    """d/dw of the held-out objective after one policy step on the weighed rewards, against credits times dA/dw."""
    policy.eval()
    torch.manual_seed(4)
    rewards_BK, mask_BK = torch.randn(len(ROWS), K), torch.ones(len(ROWS), K, dtype=torch.bool)
    weights_T, eta = weights_of(rollout), 1e-3
    names = [name for name, p in policy.named_parameters() if p.requires_grad]

    # unrolled: theta' = theta + eta * sum_i A_i(w) grad log pi_i, with create_graph through A only (the step is linear
    # in A)
    w_K = torch.tensor([0.3, 0.7], requires_grad=True)
    advantages_B = group_advantages(scalarise(rewards_BK, w_K.expand(len(ROWS), K), mask_BK), G)
    parameters = policy.trained_parameters()
    own = [torch.autograd.grad(logps(policy, rollout, [row], weights_T).sum(), parameters) for row in ROWS]
    stepped = {
        name: (p + eta * sum(a * grads[j] for a, grads in zip(advantages_B, own, strict=True)))
        for j, (name, p) in enumerate(zip(names, parameters, strict=True))
    }

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self) -> torch.Tensor:
            return held_out_objective(self.policy, rollout)

    after = torch.func.functional_call(Wrapped(), {f"policy.{name}": value for name, value in stepped.items()}, ())
    (unrolled_K,) = torch.autograd.grad(after, w_K)

    # ours: the credit of every response, times how its advantage depends on the weights
    credit_B = credits_of(policy, rollout)
    w_K = torch.tensor([0.3, 0.7], requires_grad=True)
    advantages_B = group_advantages(scalarise(rewards_BK, w_K.expand(len(ROWS), K), mask_BK), G)
    (ours_K,) = torch.autograd.grad((eta * credit_B * advantages_B).sum(), w_K)
    torch.testing.assert_close(ours_K, unrolled_K, atol=1e-3 * float(unrolled_K.abs().max()), rtol=1e-3)


def test_parameters_are_put_back_bit_for_bit_and_costs_counted(policy: LoRAPolicy, rollout: Rollout) -> None:
    before = copy.deepcopy([p.detach() for p in policy.trained_parameters()])
    policy.packs  # noqa: B018 (the trial passes are not part of the count)
    passes: list[int] = []
    policy.base_model.model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    policy.train()
    cost = Cost()
    credits_of(policy, rollout, cost)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trained_parameters(), strict=True))
    assert policy.training
    assert (cost.forwards, cost.backwards, cost.tokens) == (len(passes), 2, sum(passes)) == (4, 2, sum(passes))
    assert all(p.grad is None for p in policy.trained_parameters())


def test_what_learners_get_are_the_credits_on_the_groups_scale(policy: LoRAPolicy, rollout: Rollout) -> None:
    anchor_scores = [1.0, 2.0, 3.0] + [None] * 3 + [4.0, 1.0, 1.0] + [None] * 3
    rollout.rewards["anchor"] = RewardScores.from_list(RewardSpec("anchor", "anchor"), anchor_scores)
    torch.manual_seed(5)
    mask_BK = torch.ones(N * G, K, dtype=torch.bool)
    z_BK = zscores(torch.randn(N * G, K), mask_BK, G)
    weights_T = weights_of(rollout)
    update: Any = SimpleNamespace(
        pass_limit=10_000,
        token_weights=lambda _: weights_T,
        passes=lambda _, groups: [[n * G + g for g in range(G)] for n in groups],
    )
    nothing: Any = None
    zeros_B, labelled_N = torch.zeros(N * G), torch.tensor([True, False, True, False])
    weighed = WeighedRollout(rollout, z_BK, mask_BK, nothing, zeros_B, zeros_B)
    seen = Observation(nothing, policy, update, Advantages(), weighed, z_BK, torch.ones(N * G), labelled_N)
    credit = LookaheadSignal().observe(seen)
    policy.eval()
    parameters, ones_T = policy.trained_parameters(), torch.ones(int(rollout.lengths_B.sum()))
    held = [n * G + g for n in HELD for g in range(G)]
    value_B = anchor_values(rollout)
    g = torch.autograd.grad((value_B[held].double() * logps(policy, rollout, held, ones_T)).mean(), parameters)
    for group in CREDITED:
        rows = [group * G + i for i in range(G)]
        raw = []
        for row in rows:
            own = torch.autograd.grad(logps(policy, rollout, [row], weights_T).sum(), parameters)
            raw.append(sum(float((a.double() * b.double()).sum()) for a, b in zip(g, own, strict=True)))
        value = torch.tensor(raw)
        value = (value - value.mean()) / value.std()
        assert credit.value_B is not None
        torch.testing.assert_close(credit.value_B[rows], value, atol=5e-3, rtol=1e-2)
        torch.testing.assert_close(
            credit.credit_BK[rows[0]], (z_BK[rows] * value[:, None]).mean(0), atol=5e-3, rtol=1e-2
        )
    assert bool(credit.credit_BK[held].isnan().all())


def test_halves_hold_each_other_out_where_all_groups_are_labelled() -> None:
    labelled = torch.tensor([True, False, True])
    assert [(a.tolist(), b.tolist()) for a, b in folds(labelled, False)] == [
        ([True, False, True], [False, True, False])
    ]
    both = [(a.tolist(), b.tolist()) for a, b in folds(torch.ones(3, dtype=torch.bool), True)]
    assert both == [([True, False, True], [False, True, False]), ([False, True, False], [True, False, True])]


def anchor(completion: str, **_: Any) -> float:
    return float(sum(map(ord, completion)) % 5)


class Logged(L.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("conductor/")})


def test_in_a_run_it_credits_the_groups_that_are_not_labelled(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(
        tiny_qwen3,
        weigher=Conductor(action="soft", context="prompt", norm="center"),
        meta=Meta(signal=LookaheadSignal(), learner=RidgeLearner(), every=1, warmup=1),
        anchoring=Anchoring(fraction=0.5),
    )
    logged = Logged()
    chain = rewards(FunctionReward(function=anchor, name="anchor", role="anchor"))
    trainer_of(tmp_path, [*chain, logged], max_steps=4).fit(module, data_of(prompts))
    assert module.policy_steps == 4
    assert module.outer.warmup_done == 1
    assert logged.seen[0]["conductor/lookahead_backwards"] >= 1
    assert any(step.get("conductor/labelled", 0) > 0 for step in logged.seen)
    assert module.outer.labelled_groups == 2 + 4


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    import json

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(10)))
    return path


def test_it_moves_adapters_only(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(
        tiny_qwen3, weigher=Conductor(action="soft"), meta=Meta(signal=LookaheadSignal(), learner="ridge"), lora=None
    )
    chain = rewards(FunctionReward(function=anchor, name="anchor", role="anchor"))
    with pytest.raises(UserError, match=r"moves adapters, and model\.policy\.lora is null"):
        trainer_of(tmp_path, chain, max_steps=1).fit(module, data_of(prompts))
    with pytest.raises(UserError, match=r"step=0\.0"):
        LookaheadSignal(0.0)
