"""Meta-signals and learners as mathematics, against values worked out by hand or by brute force."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.optimize import nnls

from maestro_pl import Advantages, Anchoring
from maestro_pl.algorithm.advantages import group_advantages
from maestro_pl.algorithm.scalar_reward import joint_values
from maestro_pl.algorithm.simplex import SHRINK, best_correlating_weights, group_weights
from maestro_pl.conductor import (
    AdvantageSignal,
    AnchorSignal,
    CombinedSignal,
    Credit,
    Decisions,
    GradientLearner,
    LabelSchedule,
    MetaBuffer,
    MetaSignal,
    Observation,
    ReinforceLearner,
    RidgeLearner,
    WeighedRollout,
    anchor_values,
    make_learner,
)
from maestro_pl.conductor.closed_form import choose_penalty, fit_covariance, fit_varying
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.credits import action_advantages, clipped_loss, group_covariance, zscores
from maestro_pl.conductor.learners import mean_divergence
from maestro_pl.conductor.ridge import posterior_sd
from maestro_pl.conductor.statistics import MEMORY, RunningCorrelation, RunningScale
from maestro_pl.conductor.weighers import Weighing
from maestro_pl.errors import UserError
from maestro_pl.rollout import RewardScores, RewardSpec

NAMES = ["a", "b", "c"]


def conductor(width: int = 4, **options: Any) -> Conductor:
    made = Conductor(**options)
    made.build(width, NAMES)
    return made


def yes(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def scores(name: str, values: list[float | None], role: Any = "anchor") -> RewardScores:
    return RewardScores.from_list(RewardSpec(name, role), values)


# -- which groups are labelled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.0625, 0.02])
def test_the_share_of_labels_is_kept_without_noise(fraction: float) -> None:
    schedule = LabelSchedule(fraction, seed=3)
    total = 0
    for batch in range(300):
        total += int(schedule.draw(8, batch).sum())
        assert abs(total - fraction * 8 * (batch + 1)) <= 1


def test_labels_depend_on_seed_batch_and_rank_only() -> None:
    first, again, other = LabelSchedule(0.25, 1), LabelSchedule(0.25, 1), LabelSchedule(0.25, 2)
    torch.manual_seed(0)
    drawn = [first.draw(8, batch).tolist() for batch in range(40)]
    torch.manual_seed(5)
    assert drawn[20:] == [again.draw(8, batch).tolist() for batch in range(20, 40)]  # a resumed run
    assert drawn != [other.draw(8, batch).tolist() for batch in range(40)]
    assert drawn != [first.draw(8, batch, rank=1).tolist() for batch in range(40)]
    assert sum(map(sum, drawn)) == 80
    everywhere = torch.tensor(drawn).sum(0)
    assert int(everywhere.min()) > 3  # no place of the batch is left out


def test_without_a_fraction_one_group_a_step_is_labelled() -> None:
    assert [int(LabelSchedule().draw(5, batch).sum()) for batch in range(10)] == [1] * 10


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_share_outside_its_range_is_a_sentence(fraction: float) -> None:
    with pytest.raises(UserError, match=r"anchoring.fraction=.*share of the groups"):
        Anchoring(fraction=fraction)


def test_a_seed_below_zero_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^model\.anchoring\.seed=-3: expected at least 0\.$"):
        Anchoring(seed=-3)


# -- the anchor ------------------------------------------------------------------------------------------------------


def test_anchor_values_by_hand() -> None:
    rewards = {
        "anchor": scores("anchor", [1.0, 2.0, 3.0, None, 5.0, 5.0, 5.0, 5.0, None, None, None, None]),
        "r": scores("r", [9.0] * 12, "train"),
    }
    got = anchor_values(_rollout(rewards, 4))
    torch.testing.assert_close(got[:3], torch.tensor([-1.0, 0.0, 1.0]))
    assert got[3:].isnan().all()  # not scored; the same for all; not labelled


class _Rollout(SimpleNamespace):
    def __len__(self) -> int:
        return self.count


def _rollout(rewards: dict[str, RewardScores], group_size: int) -> Any:
    count = len(next(iter(rewards.values())).values_B)
    return _Rollout(rewards=rewards, group_size=group_size, count=count, prompts=[""] * (count // group_size))


def test_several_anchors_are_averaged_on_one_scale() -> None:
    big, small = scores("x", [0.0, 100.0, 200.0]), scores("y", [0.2, 0.1, 0.0])
    assert joint_values([big, small], 3, 3).isnan().all()  # they cancel: nothing is known
    only = scores("z", [None, None, 1.0])
    torch.testing.assert_close(joint_values([big, only], 3, 3), torch.tensor([-1.091, 0.218, 0.873]), atol=1e-3, rtol=0)


def test_covariance_by_hand() -> None:
    z = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    q = group_covariance(z, mask, torch.tensor([-1.0, 0.0, 1.0]), 3)
    torch.testing.assert_close(q, torch.tensor([[2 / 3, -1 / 2]]).expand(3, 2))
    assert group_covariance(z, mask, torch.tensor([-1.0, math.nan, math.nan]), 3).isnan().all()


def observation(z: torch.Tensor, rewards: dict[str, RewardScores], size: int, labelled: list[bool]) -> Observation:
    count = len(z)
    weighing = Weighing(torch.full_like(z, 0.5), torch.full_like(z, 0.5))
    nothing: Any = None
    zeros_B = torch.zeros(count)
    weighed = WeighedRollout(_rollout(rewards, size), z, yes(*z.shape), weighing, zeros_B, zeros_B)
    return Observation(nothing, nothing, nothing, Advantages(), weighed, z, torch.ones(count), torch.tensor(labelled))


def test_the_anchor_signal_counts_groups_without_signal() -> None:
    z = zscores(torch.tensor([[0.0, 3.0], [1.0, 2.0], [2.0, 1.0]] * 2), yes(6, 2), 3)
    rewards = {"anchor": scores("anchor", [0.0, 1.0, 2.0, 7.0, 7.0, 7.0])}
    credit = AnchorSignal().observe(observation(z, rewards, 3, [True, True]))
    torch.testing.assert_close(credit.credit_BK[:3], torch.tensor([[2 / 3, -2 / 3]]).expand(3, 2))
    assert credit.credit_BK[3:].isnan().all()
    assert credit.metrics == {"anchor_groups": 2.0, "anchor_constant": 1.0}


# -- the paper's signal in expectation -------------------------------------------------------------------------------


def test_expected_advantages_are_those_of_every_sampled_action() -> None:
    """A_i(k) replaces one response's action and leaves the rest of its group as it was."""
    torch.manual_seed(0)
    rewards, actions = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    scalar = rewards.gather(1, actions[:, None])[:, 0]
    got = action_advantages(rewards, scalar, 3, "group")
    for i, k in itertools.product(range(6), range(3)):
        changed = scalar.clone()
        changed[i] = rewards[i, k]
        torch.testing.assert_close(got[i, k], group_advantages(changed, 3)[i])
    torch.testing.assert_close(got.gather(1, actions[:, None])[:, 0], group_advantages(scalar, 3))


def test_the_expected_gradient_is_the_mean_of_the_sampled_ones() -> None:
    """Over all 3^3 joint draws of a group's actions: same mean, less variance."""
    torch.manual_seed(1)
    rewards = torch.randn(3, 3)
    logits = torch.randn(3, 3)
    pi = logits.softmax(-1)
    sampled, expected, weight = [], [], []
    for actions in itertools.product(range(3), repeat=3):
        drawn = torch.tensor(actions)
        scalar = rewards.gather(1, drawn[:, None])[:, 0]
        weight.append(float(pi.gather(1, drawn[:, None]).prod()))
        leaf = logits.clone().requires_grad_()
        log_pi = leaf.log_softmax(-1)
        (log_pi.gather(1, drawn[:, None])[:, 0] * group_advantages(scalar, 3)).sum().backward()
        sampled.append(leaf.grad)
        leaf = logits.clone().requires_grad_()
        (leaf.softmax(-1) * action_advantages(rewards, scalar, 3, "group")).sum().backward()
        expected.append(leaf.grad)
    mass = torch.tensor(weight)[:, None, None]
    mean_sampled, mean_expected = ((torch.stack(g) * mass).sum(0) for g in (sampled, expected))
    torch.testing.assert_close(mean_expected, mean_sampled, atol=1e-5, rtol=1e-4)
    spread_sampled, spread_expected = (
        float(((torch.stack(g) - mean_sampled).square() * mass).sum()) for g in (sampled, expected)
    )
    assert spread_expected < 0.7 * spread_sampled


# -- combining -------------------------------------------------------------------------------------------------------


class Given(MetaSignal):
    def __init__(self, credit: list[list[float]], value: list[float] | None = None) -> None:
        super().__init__()
        self.credit = Credit(torch.tensor(credit), None if value is None else torch.tensor(value), {"given": 1.0})

    def observe(self, seen: Observation) -> Credit:
        return self.credit


def test_a_combination_is_a_weighted_sum_over_what_is_known() -> None:
    nan = math.nan
    first, second = Given([[1.0, nan], [nan, nan]], [1.0, nan]), Given([[2.0, 4.0], [nan, nan]])
    seen: Any = SimpleNamespace(weighed=SimpleNamespace(mask_BK=torch.ones(2, 2, dtype=torch.bool)))
    credit = CombinedSignal([first, second], [3.0, 0.5]).observe(seen)
    torch.testing.assert_close(credit.credit_BK, torch.tensor([[4.0, 2.0], [nan, nan]]), equal_nan=True)
    assert credit.value_B is not None
    torch.testing.assert_close(credit.value_B, torch.tensor([3.0, nan]), equal_nan=True)
    assert CombinedSignal([AdvantageSignal(), AnchorSignal()]).uses_anchor
    assert not CombinedSignal([AdvantageSignal()]).uses_anchor
    with pytest.raises(UserError, match="1 signals and 2 coefs"):
        CombinedSignal([AdvantageSignal()], [1.0, 2.0])


# -- the gradient learners -------------------------------------------------------------------------------------------


def buffer_of(credit: torch.Tensor, action: list[int] | None = None, **more: Any) -> MetaBuffer:
    buffer, count = MetaBuffer(), len(credit)
    action_B = torch.tensor(action if action is not None else [-1] * count)
    h = more.pop("h", torch.ones(count, 4))
    buffer.add(
        Decisions(h, yes(*credit.shape), action_B, torch.zeros(count), torch.arange(count), 0, credit_BK=credit, **more)
    )
    return buffer


def test_reinforce_reads_the_credit_of_the_drawn_action_only() -> None:
    nan = math.nan
    made = conductor()
    buffer = buffer_of(torch.tensor([[2.0, 5.0, 5.0], [nan, nan, nan], [9.0, 9.0, 9.0]]), [0, 1, -1])
    loss, metrics = AnchorSignal(0.0)(made, buffer)
    assert float(loss.detach()) == pytest.approx(
        -2.0 * math.log(1 / 3)
    )  # the second is unknown, the third was not drawn
    assert set(metrics) == {"loss", "reinforce", "entropy"}
    assert AnchorSignal()(made, buffer_of(torch.full((2, 3), nan), [0, 1])) == (None, {})


def test_the_clipped_ratio_by_hand() -> None:
    now, then = torch.log(torch.tensor([0.6, 0.6, 0.2])), torch.log(torch.tensor([0.3, 0.3, 0.2]))
    loss, share = clipped_loss(now, then, torch.tensor([1.0, -1.0, 3.0]), 0.2)
    assert float(loss) == pytest.approx(-(1.2 - 2.0 + 3.0) / 3)
    assert float(share) == pytest.approx(1 / 3)


def test_at_the_drawing_conductor_the_clipped_gradient_is_reinforce() -> None:
    made, credit = conductor(), torch.tensor([[1.0, 0.0, 0.0], [0.0, -2.0, 0.0]])
    log_prob = torch.full((2,), math.log(1 / 3))
    gradients = []
    for clip in (None, 0.3):
        made.zero_grad()
        AnchorSignal(0.1)(made, buffer_of(credit, [0, 1], log_prob_B=log_prob), importance_clip=clip)[0].backward()
        gradients.append(made.net[0].bias.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_expected_loss_moves_weight_to_the_best_reward() -> None:
    made = conductor()
    buffer = buffer_of(torch.tensor([[0.5, -0.5, 0.0], [math.nan] * 3]))
    loss, _ = GradientLearner().loss(AnchorSignal(0.0), made, buffer)
    assert float(loss.detach()) == pytest.approx(0.0)  # (0.5 - 0.5 + 0) / 3, over the one known response
    loss.backward()
    torch.testing.assert_close(made.net[0].bias.grad, -torch.tensor([0.5, -0.5, 0.0]) / 3)


class FakeStepper:
    """Backward and step of a Conductor's optimizer, as a learner is handed it."""

    def __init__(self, made: Conductor, lr: float = 1.0) -> None:
        self.optimizer = torch.optim.SGD(made.parameters(), lr)
        self.losses: list[float] = []

    def __call__(self, loss: torch.Tensor) -> Any:
        self.optimizer.zero_grad()
        loss.backward()
        self.losses.append(float(loss.detach()))
        self.optimizer.step()
        return {}


def never(loss: torch.Tensor) -> Any:
    raise AssertionError("A fit in closed form steps no optimizer.")


def test_several_fits_on_one_buffer_go_on_from_each_other() -> None:
    made, signal = conductor(), AnchorSignal(0.0)
    stepper = FakeStepper(made)
    GradientLearner(fits=4).learn(made, signal, buffer_of(torch.tensor([[1.0, 0.0, -1.0]])), step=stepper, batch=0)
    assert len(stepper.losses) == 4
    assert stepper.losses == sorted(stepper.losses, reverse=True)


def test_a_trust_region_shortens_the_step() -> None:
    buffer = buffer_of(torch.tensor([[1.0, 0.0, -1.0]]))
    moved = []
    for bound in (None, 0.01):
        made, signal = conductor(), AnchorSignal(0.0)
        stepper = FakeStepper(made, lr=5.0)
        metrics = GradientLearner(trust_region=bound).learn(made, signal, buffer, step=stepper, batch=0)
        after = made.probabilities(torch.ones(1, 4), yes(1, 3)).detach()
        moved.append(mean_divergence(torch.full((1, 3), 1 / 3), after))
    assert moved[0] > 0.1
    assert 0.001 < moved[1] <= 0.01
    assert metrics["divergence"] == pytest.approx(moved[1], rel=1e-3)
    assert metrics["trust_share"] < 1


def test_divergence_by_hand() -> None:
    got = mean_divergence(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.75, 0.0]]))
    assert got == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_the_policy_sees_the_moving_average() -> None:
    made, signal = conductor(action="soft"), AnchorSignal(0.0)
    learner = GradientLearner(ema=0.75)
    learner.attach(made, signal)
    stepper = FakeStepper(made)
    for _ in range(2):
        learner.learn(made, signal, buffer_of(torch.tensor([[1.0, 0.0, -1.0]])), step=stepper, batch=0)
    h = torch.ones(1, 4)
    seen = made(h, torch.zeros(1, 3), yes(1, 3), True).weights_BK
    fast = made.probabilities(h, yes(1, 3)).detach()
    assert float(fast[0, 0]) > float(seen[0, 0]) > 1 / 3
    assert any(name.startswith("slow.") for name in made.state_dict())


@pytest.mark.slow
def test_the_entropy_controller_pulls_towards_its_target() -> None:
    buffer = buffer_of(torch.tensor([[1.0, 0.0, -1.0]]))
    shares = []
    for target in (0.5, 0.9):
        made, signal = conductor(tau_range=(0.99, 1.01)), AnchorSignal(1e-3)
        learner, stepper = GradientLearner(target_entropy=target), FakeStepper(made, lr=0.1)
        for _ in range(1500):
            metrics = learner.learn(made, signal, buffer, step=stepper, batch=0)
        shares.append(metrics["entropy_share"])
    assert shares[0] == pytest.approx(0.5, abs=0.05)
    assert shares[1] == pytest.approx(0.9, abs=0.05)
    assert learner.state_dict()["entropy_coef"] == metrics["entropy_coef"]


def test_replayed_batches_know_their_version() -> None:
    buffer = MetaBuffer()
    for version in range(3):
        buffer.add(
            Decisions(torch.ones(2, 4), yes(2, 3), torch.zeros(2).long(), torch.ones(2), torch.zeros(2).long(), version)
        )
    joined = buffer.joined()
    assert joined.version_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert joined.version == 0
    buffer.clear(keep=2)
    assert buffer.joined().version_B.tolist() == [1, 1, 2, 2]
    again = MetaBuffer()
    again.load_state_dict(buffer.state_dict())
    assert again.joined().version_B.tolist() == [1, 1, 2, 2]
    buffer.clear()
    assert not len(buffer)


# -- ridge regression ------------------------------------------------------------------------------------------------


def test_the_varying_fit_is_ridge_regression_on_products() -> None:
    torch.manual_seed(2)
    x, z, value = torch.randn(20, 5), torch.randn(20, 3), torch.randn(20)
    weight = torch.rand(20) + 0.1
    fit = fit_varying(x, z, value, weight, 7.0)
    design = torch.einsum("sk,sf->skf", z, x).flatten(1)  # primal form: K F columns
    gram = design.T @ (weight[:, None] * design) + 7.0 * torch.eye(15)
    expected = torch.linalg.solve(gram, design.T @ (weight * value)).view(3, 5)
    torch.testing.assert_close(fit.map_KF, expected, atol=1e-4, rtol=1e-3)
    covariance = fit.noise * torch.linalg.inv(gram)
    at = torch.randn(2, 5)
    for k in range(3):
        block = covariance[5 * k : 5 * k + 5, 5 * k : 5 * k + 5]
        expected_sd = (at @ block @ at.T).diagonal().sqrt()
        torch.testing.assert_close(posterior_sd(fit, at)[:, k], expected_sd, atol=1e-4, rtol=1e-3)


def test_the_covariance_fit_is_ridge_regression_of_q() -> None:
    torch.manual_seed(3)
    x, q = torch.randn(12, 4), torch.randn(12, 3)
    fit = fit_covariance(x, q, torch.ones(12), 20.0)
    expected = torch.linalg.solve(x.T @ x + 2.0 * torch.eye(4), x.T @ q).T
    torch.testing.assert_close(fit.map_KF, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("noise", "small"), [(0.05, True), (8.0, False)])
def test_the_chosen_penalty_follows_the_noise(noise: float, small: bool) -> None:
    torch.manual_seed(4)
    x, z = torch.randn(200, 4) / 2, torch.randn(200, 2)
    truth = torch.randn(2, 4)
    value = torch.einsum("sk,kf,sf->s", z, truth, x) + noise * torch.randn(200)
    penalty = choose_penalty((x @ x.T) * (z @ z.T), value[:, None])
    assert (penalty <= 3.0) is small


def simulated(contexts: int, groups: int, noise: float, seed: int = 0) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Labelled groups whose value is a context's own mix of three rewards, its hidden states, and the mixes."""
    torch.manual_seed(seed)
    mixes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])[:contexts]
    centres = 3.0 + torch.randn(contexts, 16)  # a large common part, as hidden states have
    task = torch.arange(groups) % contexts
    h = centres[task].repeat_interleave(8, 0) + 0.1 * torch.randn(groups * 8, 16)
    z = zscores(torch.randn(groups * 8, 3), yes(groups * 8, 3), 8)
    utility = (z * mixes[task].repeat_interleave(8, 0)).sum(-1)
    value = zscores((utility + noise * torch.randn(groups * 8))[:, None], yes(groups * 8, 1), 8)[:, 0]
    credit = group_covariance(z, yes(groups * 8, 3), value, 8)
    decisions = Decisions(
        h, yes(groups * 8, 3), torch.full((groups * 8,), -1), torch.zeros(groups * 8),
        torch.arange(groups).repeat_interleave(8), 0, credit_BK=credit, value_B=value, z_BK=z,
    )  # fmt: skip
    return decisions, centres, mixes


@pytest.mark.parametrize("target", ["regression", "covariance"])
def test_ridge_finds_the_mix_of_every_context(target: Any) -> None:
    decisions, centres, mixes = simulated(3, 60, noise=0.5)
    made = conductor(16, action="soft", norm="center")
    learner = RidgeLearner(target=target, ridge=10.0)
    learner.attach(made, AnchorSignal())
    made(decisions.h_BD, decisions.z_BK, decisions.mask_BK, True)  # the running centre
    made.observe_rewards(decisions.z_BK, decisions.mask_BK)
    buffer = MetaBuffer()
    buffer.add(decisions)
    metrics = learner.learn(made, AnchorSignal(), buffer, step=never, batch=1)
    assert metrics["labelled"] == (480 if target == "regression" else 60)
    weights = made(centres, torch.zeros(3, 3), yes(3, 3), False).weights_BK
    assert float((weights - mixes).abs().max()) < 0.2
    assert not any(p.requires_grad for p in made.parameters())


def test_forgetting_follows_a_change_of_mind() -> None:
    old, centres, _ = simulated(1, 40, noise=0.1)
    new, _, _ = simulated(1, 10, noise=0.1)
    new = Decisions(**{**vars(new), "value_B": new.z_BK[:, 2]})  # now the third reward is what matters
    weights = {}
    for forgetting in (1.0, 0.5):
        made, learner = conductor(16, action="soft"), RidgeLearner(forgetting=forgetting, ridge=1.0)
        learner.attach(made, AnchorSignal())
        for step, decisions in ((0, old), (10, new)):
            made.observe_rewards(decisions.z_BK, decisions.mask_BK)
            buffer = MetaBuffer()
            buffer.add(decisions)
            learner.learn(made, AnchorSignal(), buffer, step=never, batch=step)
        weights[forgetting] = made(centres[:1], torch.zeros(1, 3), yes(1, 3), False).weights_BK[0]
    assert float(weights[1.0][2]) < 0.4
    assert float(weights[0.5][2]) > 0.9


def test_the_window_keeps_the_newest_and_the_state_is_plain() -> None:
    decisions, _, _ = simulated(2, 4, noise=0.1)
    learner = RidgeLearner(window=20)
    for step in range(3):
        learner.remember(decisions, step)
    assert learner.remembered["step_B"].tolist() == [2] * 20
    assert learner.remembered["group_B"].unique().numel() == 3  # 8 + 8 + 4 responses of the last batch
    again = RidgeLearner(window=20)
    again.load_state_dict(learner.state_dict())
    for name, values in learner.remembered.items():
        torch.testing.assert_close(again.remembered[name], values)


@pytest.mark.parametrize("exploration", ["thompson", "ucb"])
def test_exploration_moves_what_is_uncertain_in_training_only(exploration: Any) -> None:
    decisions, _, _ = simulated(2, 4, noise=0.5)
    made, learner = conductor(16, action="soft"), RidgeLearner(exploration=exploration, exploration_coef=1.0)
    learner.attach(made, AnchorSignal())
    buffer = MetaBuffer()
    buffer.add(decisions)
    learner.learn(made, AnchorSignal(), buffer, step=never, batch=0)
    torch.manual_seed(0)
    h = torch.randn(2, 16)
    first, second = (made(h, torch.zeros(2, 3), yes(2, 3), True).weights_BK for _ in range(2))
    calm, again = (made(h, torch.zeros(2, 3), yes(2, 3), False).weights_BK for _ in range(2))
    assert torch.equal(calm, again)
    assert not torch.allclose(first, calm)
    assert torch.equal(first, second) is (exploration == "ucb")


# -- from estimates to weights ---------------------------------------------------------------------------------------


def test_best_correlating_weights_are_those_of_nnls() -> None:
    torch.manual_seed(5)
    for _ in range(20):
        basis, q = torch.randn(5, 8), torch.randn(5)
        c = torch.corrcoef(basis)
        system = (c + SHRINK * torch.eye(5)).double()
        root = torch.linalg.cholesky(system).T
        expected, _ = nnls(root.numpy(), torch.linalg.solve(root.T, q.double()).numpy())
        got = best_correlating_weights(q[None], c, yes(1, 5))[0]
        if expected.sum() > 1e-6:
            torch.testing.assert_close(got, torch.tensor(expected / expected.sum()).float(), atol=2e-3, rtol=1e-2)


def test_rewards_that_say_the_same_share_one_weight() -> None:
    """Softmax over covariances would praise the twins twice."""
    c = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    got = best_correlating_weights(torch.tensor([[0.5, 0.5, 0.5]]), c, yes(1, 3))[0]
    assert float(got[0] + got[1]) == pytest.approx(0.5, abs=0.02)


def test_where_nothing_helps_the_applicable_rewards_share() -> None:
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    got = best_correlating_weights(
        torch.tensor([[-1.0, -2.0, 9.0], [1.0, 9.0, -1.0], [1.0, 1.0, 1.0]]), torch.eye(3), mask
    )
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_group_weights_are_the_mean_ruler() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, False, True], [True, True, True], [True, True, True]])
    got = group_weights(weights, mask, 2)
    expected = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(got, expected)


# -- running statistics ----------------------------------------------------------------------------------------------


def test_the_running_scale_is_that_of_everything_seen() -> None:
    torch.manual_seed(6)
    x = 5.0 + torch.randn(64, 6) * torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0, 4.0])
    scale = RunningScale(6, parts=2)
    for part in x.split(16):
        scale.observe(part)
    torch.testing.assert_close(scale.mean_D, x.mean(0), atol=1e-5, rtol=1e-5)
    got = scale(x)
    assert float(got.mean().abs()) < 1e-5
    assert float(got[:, :3].square().mean()) == pytest.approx(1.0, rel=0.05)
    assert float(got[:, 3:].square().mean()) == pytest.approx(1.0, rel=0.05)


def test_one_bad_state_does_not_spoil_the_centre() -> None:
    scale = RunningScale(2)
    scale.observe(torch.tensor([[1.0, 3.0], [torch.inf, 0.0], [torch.nan, 0.0], [3.0, 5.0]]))
    assert scale.mean_D.tolist() == [2.0, 4.0]


def test_a_state_whose_square_overflows_does_not_spoil_the_spread() -> None:
    scale = RunningScale(2)
    scale.observe(torch.tensor([[1.0, 3.0], [1e30, 0.0], [3.0, 5.0]]))
    assert scale.mean_D.tolist() == [2.0, 4.0]
    assert scale.spread_P.tolist() == [1.0]


def test_correlations_stay_finite() -> None:
    running, twin = RunningCorrelation(2), RunningCorrelation(2)
    for made, bad in ((running, True), (twin, False)):
        z = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0]])
        z = z if bad else z[:2]
        made.observe(z, torch.ones_like(z).bool())
    assert running.matrix_KK.tolist() == twin.matrix_KK.tolist() == [[1, -1], [-1, 1]]
    running = RunningCorrelation(2)
    running.observe(torch.full((2, 2), torch.nan), torch.ones(2, 2).bool())
    assert running.matrix_KK.tolist() == [[1, 0], [0, 1]]
    huge = zscores(torch.tensor([[1e30, 3e38], [1.0, 1.0], [1.0, 1.0]]), torch.ones(3, 2).bool(), 3)
    running.observe(huge, torch.ones(3, 2).bool())
    torch.testing.assert_close(running.matrix_KK, torch.ones(2, 2))


def test_ridge_leaves_out_what_is_not_finite() -> None:
    decisions, _, _ = simulated(2, 4, noise=0.1)
    clean, broken = RidgeLearner(), RidgeLearner()
    clean.remember(decisions.rows(torch.arange(4, len(decisions))), 0)
    for name, value, row in (
        ("h_BD", torch.nan, 0),
        ("h_BD", torch.inf, 1),
        ("value_B", torch.inf, 2),
        ("z_BK", torch.nan, 3),
    ):
        getattr(decisions, name)[row] = value
    assert (~decisions.finite_B).nonzero().flatten().tolist() == [0, 1, 2, 3]
    broken.remember(decisions, 0)
    torch.testing.assert_close(broken.remembered["h_BD"], clean.remembered["h_BD"])
    buffer = MetaBuffer()
    buffer.add(decisions)
    assert buffer.drop_broken() == 4
    assert buffer.drop_broken() == 0
    saved = {name: getattr(decisions, name) for name in clean.remembered if name not in ("step_B", "rank_B")}
    with pytest.warns(UserWarning, match=f"4 of the {len(decisions)} responses .* are forgotten"):
        broken.load_state_dict({"remembered": {**saved, "step_B": torch.zeros(len(decisions), dtype=torch.long)}})
    torch.testing.assert_close(broken.remembered["h_BD"], clean.remembered["h_BD"])


@pytest.mark.parametrize("ridge", ["auto", 30.0])
def test_a_fit_that_overflows_is_skipped_and_said(ridge: Any) -> None:
    decisions, _, _ = simulated(2, 4, noise=0.1)
    made, learner = conductor(16, action="soft", norm="none"), RidgeLearner(ridge=ridge)
    learner.attach(made, AnchorSignal())
    buffer = MetaBuffer()
    buffer.add(decisions.rows(decisions.finite_B))
    buffer.decisions[0].h_BD[0] = 9e17
    buffer.decisions[0].z_BK[0] = 1e19
    with pytest.warns(UserWarning, match="left the Conductor as it is: the kernel of the"):
        metrics = learner.learn(made, AnchorSignal(), buffer, step=never, batch=0)
    assert metrics["skipped"] == 1
    assert all(bool(p.isfinite().all()) for p in made.parameters())


@pytest.mark.parametrize("norm", ["rms", "center", "none"])
def test_a_state_that_is_not_finite_gets_the_weights_of_no_state(norm: Any) -> None:
    made = conductor(4, action="one_hot", norm=norm, min_probability=0.0)
    with torch.no_grad():
        made.net[-1].weight.normal_()
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0], [torch.nan, 0.0, 0.0, 0.0], [torch.inf, 0.0, 0.0, 0.0]])
    weighing = made(h, torch.zeros(3, 3), yes(3, 3), True)
    assert weighing.weights_BK.isfinite().all()
    torch.testing.assert_close(weighing.probabilities_BK[1:], torch.full((2, 3), 1 / 3))


def test_a_trust_region_bounds_a_fit_in_closed_form_too() -> None:
    decisions, _, _ = simulated(3, 60, noise=0.5)
    moved = {}
    for bound in (None, 0.02):
        made = conductor(16, action="soft", norm="center", tau=0.3)
        learner = RidgeLearner(mapping="softmax", trust_region=bound)
        learner.attach(made, AnchorSignal())
        made(decisions.h_BD, decisions.z_BK, decisions.mask_BK, True)
        buffer = MetaBuffer()
        buffer.add(decisions)
        learner.learn(made, AnchorSignal(), buffer, step=never, batch=0)
        moved[bound] = mean_divergence(
            torch.full((480, 3), 1 / 3), made.probabilities(decisions.h_BD, decisions.mask_BK)
        )
    assert moved[None] > 0.05
    assert 0.001 < moved[0.02] <= 0.02


def test_a_reward_of_some_tasks_is_fitted_on_their_groups() -> None:
    torch.manual_seed(8)
    x, q = torch.randn(12, 4), torch.randn(12, 2)
    known = torch.ones(12, 2, dtype=torch.bool)
    known[6:, 1] = False
    fit = fit_covariance(x, q, torch.ones(12), 20.0, known)
    torch.testing.assert_close(fit.map_KF[:1], fit_covariance(x, q[:, :1], torch.ones(12), 20.0).map_KF)
    torch.testing.assert_close(fit.map_KF[1:], fit_covariance(x[:6], q[:6, 1:], torch.ones(6), 20.0).map_KF)
    alone = [fit_covariance(x[:count], q[:count, k : k + 1], torch.ones(count), 20.0) for k, count in ((0, 12), (1, 6))]
    sd_BK = posterior_sd(fit, x)  # what is known of few groups is known less well
    torch.testing.assert_close(sd_BK, torch.cat([posterior_sd(own, x) for own in alone], 1))
    assert fit.noise == pytest.approx((12 * alone[0].noise + 6 * alone[1].noise) / 18)
    known[:, 1] = False
    prior_B = fit_covariance(x, q, torch.ones(12), 20.0, known).covariance(x)[:, 1, 1]
    torch.testing.assert_close(prior_B, x.square().sum(1) / (20.0 / 10) * alone[0].noise)


def test_old_responses_fade() -> None:
    scale = RunningScale(1)
    scale.observe(torch.zeros(MEMORY, 1))
    scale.observe(torch.ones(MEMORY, 1))
    assert float(scale.mean_D) == pytest.approx(0.5)
    scale.observe(torch.ones(MEMORY, 1))
    assert float(scale.mean_D) == pytest.approx(0.75)


def test_the_running_correlation_is_that_of_pairs_that_applied() -> None:
    torch.manual_seed(7)
    z = torch.randn(100, 3)
    z[:, 1] = 0.6 * z[:, 0] + 0.8 * z[:, 1]
    mask = yes(100, 3)
    mask[:50, 1] = False
    z = torch.where(mask, z, torch.zeros_like(z))
    running = RunningCorrelation(3)
    torch.testing.assert_close(running.matrix_KK, torch.eye(3))
    for part, applies in zip(z.split(20), mask.split(20), strict=True):
        running.observe(part, applies)
    expected = (z[50:, 0] * z[50:, 1]).mean() / (z[:, 0].square().mean() * z[50:, 1].square().mean()).sqrt()
    assert float(running.matrix_KK[0, 1]) == pytest.approx(float(expected), rel=1e-4)
    assert running.matrix_KK.diagonal().tolist() == [1.0, 1.0, 1.0]


# -- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learner", "options", "signal", "message"),
    [
        ("reinforce", {"action": "soft"}, AnchorSignal(), "action: soft"),
        ("gradient", {"action": "soft"}, AdvantageSignal(), "actions: expected"),
        ("ridge", {"action": "mix"}, AdvantageSignal(), "actions: expected"),
        ("ridge", {"action": "soft", "hidden_sizes": [8]}, AnchorSignal(), "one linear layer"),
        ("ridge", {"action": "soft"}, AdvantageSignal(actions="expected"), "give target: covariance"),
        ("gradient", {"action": "mix"}, CombinedSignal([AdvantageSignal(), AnchorSignal()]), "actions: expected"),
    ],
)
def test_learner_conductor_and_signal_must_fit(learner: Any, options: Any, signal: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_learner(learner).attach(conductor(**options), signal)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_learner("sgd"), "reinforce, gradient, ridge"),
        (lambda: RidgeLearner(ridge=0.0), "ridge=0.0"),
        (lambda: RidgeLearner(forgetting=0.0), "forgetting=0.0"),
        (lambda: RidgeLearner(trust_region=0.1), "mapping: softmax"),
        (lambda: RidgeLearner(ema=0.5), "mapping: softmax"),
        (lambda: RidgeLearner(target="x"), "target='x'"),
        (lambda: ReinforceLearner(importance_clip=2.0), "importance_clip=2.0"),
        (lambda: GradientLearner(target_entropy=1.5), "target_entropy=1.5"),
        (lambda: GradientLearner(fits=0), "fits=0"),
        (lambda: GradientLearner(trust_region=0.0), "trust_region=0.0"),
        (lambda: GradientLearner(ema=1.0), "ema=1.0"),
        (lambda: AdvantageSignal(actions="x"), "actions='x'"),
        (lambda: AnchorSignal(-1.0), "entropy_coef=-1.0"),
        (lambda: Conductor(context="x"), "context='x'"),
        (lambda: Conductor(norm="x"), "norm='x'"),
    ],
)
def test_bad_values_are_sentences(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_defaults_by_name() -> None:
    kinds = [type(make_learner(name)) for name in ("reinforce", "gradient", "ridge")]  # type: ignore[arg-type]
    assert kinds == [ReinforceLearner, GradientLearner, RidgeLearner]
    learner = RidgeLearner(window=7)
    assert make_learner(learner) is learner
