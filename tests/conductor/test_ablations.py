"""The paper's ablations of the Conductor: what it reads, the pairwise meta-loss, joint instead of async."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from callbacks.rewards import FunctionReward
from callbacks.rollout import RolloutGenerator
from maestro_pl import Advantages, Loss, Meta
from maestro_pl.algorithm.advantages import group_advantages
from maestro_pl.algorithm.joint import JointDecision, joint_advantages
from maestro_pl.conductor import AdvantageSignal, Decisions, MetaBuffer, pairwise_loss
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import UserError
from maestro_pl.module import MaestroModule
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import Rollout
from tests.support import elevens, make_policy, module_of, quiet_trainer, sevens

GROUP = 3


def trained_conductor(**options: Any) -> Conductor:
    torch.manual_seed(0)
    made = Conductor(**options)
    made.build(4, ["x", "y"])
    torch.nn.init.normal_(made.net[-1].weight)
    torch.nn.init.normal_(made.net[-1].bias)
    return made


# -- what the Conductor reads ------------------------------------------------------------------------------------------


def test_a_conductor_that_reads_nothing_knows_only_its_bias() -> None:
    made = trained_conductor(reads="nothing")
    mask = torch.ones(3, 2, dtype=torch.bool)
    probabilities = made.probabilities(torch.randn(3, 4), mask)
    logits = made.net[-1].bias / made.tau
    torch.testing.assert_close(probabilities, logits.softmax(-1).expand(3, 2))
    probabilities[:, 0].sum().backward()
    assert float(made.net[-1].weight.grad.abs().max()) == 0
    assert float(made.net[-1].bias.grad.abs().min()) > 0


@pytest.mark.parametrize("sample", [True, False])
def test_shuffled_h_is_that_of_other_responses_and_is_what_the_buffer_keeps(sample: bool) -> None:
    made, plain = trained_conductor(reads="shuffled"), trained_conductor()
    h, mask = torch.randn(6, 4), torch.ones(6, 2, dtype=torch.bool)
    weighing = made(h, torch.zeros(6, 2), mask, sample)
    own = plain.probabilities(h, mask)
    assert not torch.allclose(weighing.probabilities_BK, own)
    torch.testing.assert_close(weighing.probabilities_BK.sort(0).values, own.sort(0).values)
    torch.testing.assert_close(plain.probabilities(weighing.h_BD, mask), weighing.probabilities_BK)
    if sample:
        torch.testing.assert_close(made.log_prob(weighing.probabilities_BK, weighing.action_B), weighing.log_prob_B)


def test_an_unknown_input_is_refused() -> None:
    with pytest.raises(UserError, match="reads='everything'"):
        Conductor(reads="everything")  # type: ignore[arg-type]


# -- the pairwise meta-loss --------------------------------------------------------------------------------------------


def test_pairwise_loss_by_hand() -> None:
    log_prob = torch.tensor([-0.5, -1.0, -0.2, -0.7, -0.1], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, 2.0])
    groups = torch.tensor([0, 0, 0, 1, 1])  # the second group has no two different advantages
    # pairs of group 0, better first: (0, 1), (0, 2), (2, 1)
    margins = [0.5, -0.3, 0.8]
    loss = pairwise_loss(log_prob, advantages, groups)
    assert float(loss) == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 3, rel=1e-6)
    loss.backward()
    slope = [1 / (1 + math.exp(m)) / 3 for m in margins]  # of -log sigmoid(m) by m, negated
    assert log_prob.grad.tolist() == pytest.approx(
        [-slope[0] - slope[1], slope[0] + slope[2], slope[1] - slope[2], 0, 0]
    )
    assert float(pairwise_loss(log_prob, torch.ones(5), groups)) == 0


def test_pairs_never_cross_batches_and_the_signal_adds_them() -> None:
    made, buffer = trained_conductor(), MetaBuffer()
    for seed in (0, 1):
        torch.manual_seed(seed)
        buffer.add(
            Decisions(
                torch.randn(4, 4),
                torch.ones(4, 2, dtype=torch.bool),
                torch.tensor([0, 1, 0, 1]),
                torch.tensor([1.0, -1.0, 0.5, -0.5]),
                torch.tensor([0, 0, 1, 1]),
                0,
            )
        )
    joined = buffer.joined()
    assert joined.group_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    log_prob = made.log_prob(made.probabilities(joined.h_BD, joined.mask_BK), joined.action_B)
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    by_hand = sum(torch.log1p(torch.exp(log_prob[j] - log_prob[i])) for i, j in pairs) / 4
    plain, _ = AdvantageSignal(0.1)(made, buffer)
    loss, metrics = AdvantageSignal(0.1, pairwise_coef=0.5)(made, buffer)
    assert float(loss) == pytest.approx(float(plain + 0.5 * by_hand), rel=1e-5)
    assert float(metrics["pairwise"]) == pytest.approx(float(by_hand), rel=1e-5)


def test_negative_coefficients_are_refused() -> None:
    with pytest.raises(UserError, match="pairwise_coef=-1"):
        AdvantageSignal(pairwise_coef=-1)


# -- joint -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize(("action", "mix_rate"), [("mix", 0.3), ("one_hot", 0.5)])
def test_joint_advantages_keep_their_value_and_have_the_slope_of_the_soft_weights(
    action: Any, mix_rate: float, scale: Any
) -> None:
    torch.manual_seed(0)
    rewards, mask = torch.randn(6, 2).double(), torch.ones(6, 2, dtype=torch.bool)
    actions, gate = torch.tensor([0, 1, 1, 0, 0, 1]), torch.tensor([1.0, 1.0, 0.5, 1.0, 0.0, 1.0]).double()
    probabilities = torch.rand(6, 2).double()
    probabilities = (probabilities / probabilities.sum(1, keepdim=True)).requires_grad_()
    scalar = torch.randn(6).double()  # whatever the gates and penalties made of it
    decision = JointDecision(actions, rewards, mask, gate, scalar)
    advantages = joint_advantages(probabilities, decision, GROUP, action, mix_rate, scale)
    torch.testing.assert_close(advantages, group_advantages(scalar, GROUP, scale))

    direction = torch.randn(6).double()
    (slope,) = torch.autograd.grad((direction * advantages).sum(), probabilities)
    share = 1 - mix_rate if action == "mix" else 1.0  # how far the weights follow the probabilities
    step = 1e-6
    for i in range(6):
        for k in range(2):
            moved = scalar.clone()
            moved[i] += step * share * float(gate[i]) * float(rewards[i, k])
            change = (
                direction * (group_advantages(moved, GROUP, scale) - group_advantages(scalar, GROUP, scale))
            ).sum()
            assert float(slope[i, k]) == pytest.approx(float(change) / step, abs=1e-4)


def test_a_single_valued_group_has_no_slope_and_no_nan() -> None:
    probabilities = torch.full((3, 2), 0.5, requires_grad=True)
    mask = torch.ones(3, 2, dtype=torch.bool)
    decision = JointDecision(torch.zeros(3).long(), torch.ones(3, 2), mask, torch.ones(3), torch.ones(3))
    joint_advantages(probabilities, decision, GROUP, "mix", 0.5).sum().backward()
    assert probabilities.grad.abs().max() == 0


class Watch(L.Callback):
    """Keeps the rollouts, the drawn actions and the gradients of every step."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rollouts.append(batch["rollout"])
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def one_joint_step(folder: Path, tmp_path: Path, **options: Any) -> tuple[MaestroModule, MaestroModule, Watch]:
    """A module after one step, a copy from before it, and what was watched."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "reference": "x"}) + "\n" for i in range(4)))
    policy = make_policy(folder, std=0.05, seed=1)
    conductor = Conductor(action="mix", mix_rate=0.4)
    conductor.build(policy.hidden_size, ["sevens", "elevens"])
    torch.nn.init.normal_(conductor.net[0].weight, std=0.3)
    signal = AdvantageSignal(options.pop("entropy_coef", 0.2))
    module = module_of(
        policy, weigher=conductor, meta=Meta(signal=signal, coupling="joint"), max_grad_norm=0, **options
    )
    before, watch = deepcopy(module), Watch()
    trainer = quiet_trainer(
        tmp_path,
        max_steps=1,
        callbacks=[
            RolloutGenerator(group_size=GROUP, max_new_tokens=6, seed=3),
            FunctionReward(function=sevens, name="sevens", normalize="zscore"),
            FunctionReward(function=elevens, name="elevens", normalize="zscore"),
            watch,
        ],
    )
    trainer.fit(module, PromptDataModule(sources=str(path), batch_size=2, show=False))
    return module, before, watch


def response(model: Any, prompt: list[int], ids: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a response's tokens and its terminal hidden state, from one unpadded row with gradient."""
    output = model(torch.tensor([prompt + ids]), output_hidden_states=True)
    logits = output.logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)], output.hidden_states[-1][0, -1]


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 1])
def test_a_joint_step_is_the_gradient_of_one_loss(tiny_qwen3: Path, tmp_path: Path, micro_batch_tokens: int) -> None:
    """The step's gradients against autograd on the whole loss, written out row by row."""
    module, before, watch = one_joint_step(tiny_qwen3, tmp_path, micro_batch_tokens=micro_batch_tokens)
    assert module.outer.updates == 1
    (rollout,) = watch.rollouts
    conductor = before.weigher
    rows = range(len(rollout))
    logps, hidden = zip(
        *(response(before.policy.model, rollout.prompt_ids[i // GROUP], rollout.response_ids[i]) for i in rows),
        strict=True,
    )
    h = torch.stack(hidden)
    h = h / (h.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    soft = ((h @ conductor.net[0].weight.T + conductor.net[0].bias) / conductor.log_tau.exp()).softmax(1)
    action = (rollout.weights_BK - 0.6 * rollout.probabilities_BK).argmax(1)
    raw = torch.stack([rollout.rewards[name].values_B for name in ("sevens", "elevens")], 1).view(-1, GROUP, 2)
    rewards = ((raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True).clamp(min=1e-9)).view(-1, 2)
    scalar = ((0.6 * soft + 0.4 * torch.eye(2)[action]) * rewards).sum(1).view(-1, GROUP)
    advantages = ((scalar - scalar.mean(1, keepdim=True)) / (scalar.std(1, keepdim=True) + 1e-4)).view(-1)
    tokens = sum(map(len, rollout.response_ids))
    policy_loss = (
        -sum((torch.exp(lp - lp.detach()) * a).sum() for lp, a in zip(logps, advantages, strict=True)) / tokens
    )
    entropy = -(soft * soft.log()).sum(1).mean()
    meta = -(advantages.detach() * soft[torch.arange(len(rows)), action].log()).mean() - 0.2 * entropy
    (policy_loss + meta).backward()
    ours = watch.gradients[0]
    theirs = {name: p.grad for name, p in before.named_parameters() if p.grad is not None}
    assert set(theirs) == set(ours)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_on_policy_and_with_equal_responses_the_weights_have_no_gradient(tiny_qwen3: Path, tmp_path: Path) -> None:
    """With the ratio at 1 the ``grpo`` loss is minus the mean advantage, which is 0 whatever the weights are."""
    _, before, watch = one_joint_step(tiny_qwen3, tmp_path, loss=Loss(type="grpo"), entropy_coef=0.0)
    (rollout,) = watch.rollouts
    conductor = before.weigher
    mask = torch.ones(len(rollout), 2, dtype=torch.bool)
    probabilities = conductor.probabilities(rollout.hidden_BD, mask)
    action = (rollout.weights_BK - 0.6 * rollout.probabilities_BK).argmax(1)
    meta = -(rollout.advantages_B * conductor.log_prob(probabilities, action)).mean()
    meta.backward()  # all that is left
    for name, parameter in conductor.named_parameters():
        torch.testing.assert_close(watch.gradients[0][f"weigher.{name}"], parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weigher": EqualWeights()}, "EqualWeights"),
        ({"weigher": Conductor(reads="shuffled")}, "its own h"),
        ({"meta": Meta(signal=AdvantageSignal(pairwise_coef=1.0), coupling="joint")}, "paper's meta-loss only"),
        ({"advantages": Advantages(aggregation="normalize_then_sum")}, "advantages must be those of a group"),
        ({"advantages": Advantages(scale="batch")}, "advantages must be those of a group"),
    ],
)
def test_joint_says_what_it_cannot_do(options: dict[str, Any], match: str) -> None:
    options = {"weigher": Conductor(), "meta": Meta(coupling="joint"), **options}
    with pytest.raises(UserError, match=match):
        module_of(LoRAPolicy(dtype="float32"), **options)
