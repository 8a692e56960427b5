"""The Conductor, the weighers that do not learn, and the paper's meta-loss, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from maestro_pl.algorithm.simplex import action_weights
from maestro_pl.conductor import AdvantageSignal, Decisions, MetaBuffer, meta_loss
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import EqualWeights, FixedWeights, RandomWeights
from maestro_pl.errors import UserError

NAMES = ["a", "b", "c"]


def conductor(**options: object) -> Conductor:
    made = Conductor(**options)
    made.build(4, NAMES)
    return made


def set_logits(made: Conductor, logits: list[float]) -> None:
    """A Conductor whose logits do not depend on h."""
    with torch.no_grad():
        made.net[-1].bias.copy_(torch.tensor(logits))


def test_it_starts_from_equal_weights_whatever_h_is() -> None:
    weighing = conductor()(torch.randn(5, 4), torch.zeros(5, 3), torch.ones(5, 3, dtype=torch.bool), False)
    torch.testing.assert_close(weighing.weights_BK, torch.full((5, 3), 1 / 3))
    assert weighing.action_B is None


def test_probabilities_by_hand() -> None:
    made = conductor(norm="none", tau=2.0, min_probability=0.0)
    with torch.no_grad():
        made.net[0].weight.copy_(torch.eye(3, 4))
    h = torch.tensor([[2.0, 0.0, -2.0, 9.0]])
    scaled = torch.tensor([[math.exp(1.0), 1.0, math.exp(-1.0)]])
    torch.testing.assert_close(made.probabilities(h, torch.ones(1, 3, dtype=torch.bool)), scaled / scaled.sum())


def test_rms_norm_makes_the_scale_of_h_irrelevant() -> None:
    made = conductor()
    torch.nn.init.normal_(made.net[0].weight)
    h, mask = torch.randn(3, 4), torch.ones(3, 3, dtype=torch.bool)
    torch.testing.assert_close(made.probabilities(h, mask), made.probabilities(1000 * h, mask), atol=1e-4, rtol=1e-4)


def test_floor_is_enforced_and_renormalised() -> None:
    made = conductor(min_probability=0.1)
    set_logits(made, [100.0, 0.0, 0.0])
    got = made.probabilities(torch.zeros(1, 4), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.1, 0.1]]) / 1.2)


def test_rewards_that_do_not_apply_get_nothing() -> None:
    made = conductor(action="mix")
    mask = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    for sample in (False, True):
        weighing = made(torch.randn(3, 4), torch.zeros(3, 3), mask, sample)
        assert (weighing.weights_BK[~mask] == 0).all()
        torch.testing.assert_close(weighing.weights_BK.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert weighing.action_B is not None
    assert int(weighing.action_B[0]) != 1
    assert int(weighing.action_B[1]) == 1


def test_each_response_draws_its_own_action_with_its_probability() -> None:
    torch.manual_seed(0)
    made = conductor()
    set_logits(made, [math.log(6.0), math.log(3.0), 0.0])
    rows = 20000
    weighing = made(torch.zeros(rows, 4), torch.zeros(rows, 3), torch.ones(rows, 3, dtype=torch.bool), True)
    assert weighing.action_B is not None
    assert weighing.log_prob_B is not None
    shares = torch.bincount(weighing.action_B, minlength=3) / rows
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.015, rtol=0)  # four standard errors
    first = int(weighing.action_B[0])
    assert weighing.log_prob_B[0].item() == pytest.approx(math.log([0.6, 0.3, 0.1][first]), rel=1e-5)
    torch.testing.assert_close(weighing.weights_BK[0], torch.eye(3)[first])


def test_action_weights() -> None:
    probabilities, action = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([1])
    assert action_weights(probabilities, action, "one_hot", 0.25).tolist() == [[0.0, 1.0, 0.0]]
    torch.testing.assert_close(action_weights(probabilities, action, "mix", 0.25), torch.tensor([[0.375, 0.475, 0.15]]))


def test_meta_loss_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    log_prob = torch.tensor([math.log(0.5), math.log(0.75)])
    loss, metrics = meta_loss(log_prob, torch.tensor([1.0, -2.0]), probabilities, 0.1)
    entropy = (math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 2
    reinforce = -(math.log(0.5) - 2 * math.log(0.75)) / 2
    assert float(loss) == pytest.approx(reinforce - 0.1 * entropy, abs=1e-6)
    assert float(metrics["entropy"]) == pytest.approx(entropy, rel=1e-6)


def test_the_meta_signal_raises_actions_with_positive_advantage() -> None:
    made = conductor()
    buffer = MetaBuffer()
    h, mask = torch.randn(6, 4), torch.ones(6, 3, dtype=torch.bool)
    actions = torch.tensor([0, 0, 1, 1, 2, 2])
    buffer.add(Decisions(h[:3], mask[:3], actions[:3], torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3).long(), 0))
    buffer.add(Decisions(h[3:], mask[3:], actions[3:], torch.tensor([0.0, -1.0, -1.0]), torch.zeros(3).long(), 0))
    optimizer = torch.optim.SGD(made.parameters(), lr=1.0)
    loss, _ = AdvantageSignal(0.0)(made, buffer)
    loss.backward()
    optimizer.step()
    mean = made.probabilities(torch.zeros(1, 4), mask[:1])[0]
    assert mean[0] > 1 / 3 > mean[2]


def test_buffer_state_survives_a_round_trip() -> None:
    buffer, again = MetaBuffer(), MetaBuffer()
    buffer.add(
        Decisions(
            torch.randn(2, 4),
            torch.ones(2, 3, dtype=torch.bool),
            torch.tensor([0, 1]),
            torch.randn(2),
            torch.arange(2),
            7,
        )
    )
    again.load_state_dict(buffer.state_dict())
    assert len(again) == 1
    assert again.joined().version == 7
    torch.testing.assert_close(again.joined().h_BD, buffer.joined().h_BD)
    again.clear()
    with pytest.raises(UserError, match="meta-buffer is empty"):
        again.joined()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau=0.0"),
        ({"tau": 20.0}, "tau_range"),
        ({"mix_rate": 0.0}, "mix_rate=0.0"),
        ({"min_probability": 1.0}, "min_probability=1.0"),
        ({"hidden_sizes": [0]}, "hidden_sizes"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Conductor(**options)


def test_a_floor_that_leaves_no_choice_is_refused() -> None:
    with pytest.raises(UserError, match=r"keep it below 0.3333"):
        conductor(min_probability=0.4)


def test_mlp_and_tau_bounds() -> None:
    made = conductor(hidden_sizes=[8, 5])
    assert [m.out_features for m in made.net if isinstance(m, torch.nn.Linear)] == [8, 5, 3]
    with torch.no_grad():
        made.log_tau.fill_(9.0)
    assert float(made.tau) == pytest.approx(10.0)
    made.constrain_()
    assert float(made.log_tau) == pytest.approx(math.log(10.0))


def test_equal_fixed_and_random_weights() -> None:
    mask = torch.tensor([[True, True, True], [True, False, True]])
    rewards = torch.zeros(2, 3)
    equal = EqualWeights()
    equal.build(4, NAMES)
    torch.testing.assert_close(
        equal(None, rewards, mask, True).weights_BK, torch.tensor([[1 / 3] * 3, [0.5, 0.0, 0.5]])
    )
    fixed = FixedWeights({"c": 6, "a": 2, "b": 2})
    fixed.build(4, NAMES)
    torch.testing.assert_close(
        fixed(None, rewards, mask, True).weights_BK, torch.tensor([[0.2, 0.2, 0.6], [0.25, 0.0, 0.75]])
    )
    rand = RandomWeights()
    rand.build(4, NAMES)
    drawn = rand(None, torch.zeros(4000, 3), mask[:1].expand(4000, 3), True).weights_BK
    torch.testing.assert_close(drawn.sum(1), torch.ones(4000))
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    assert float(drawn[:, 0].var()) == pytest.approx(1 / 18, abs=0.005)  # Dirichlet(1, 1, 1)
    torch.testing.assert_close(
        rand(None, rewards, mask, False).weights_BK, equal(None, rewards, mask, False).weights_BK
    )


def test_fixed_weights_must_name_the_rewards() -> None:
    with pytest.raises(UserError, match=r"\['a', 'b'\].*\['a', 'b', 'c'\]"):
        FixedWeights({"a": 1, "b": 1}).build(4, NAMES)
    with pytest.raises(UserError, match="not all zero"):
        FixedWeights({"a": 0.0})
    with pytest.raises(UserError, match="finite weight"):
        FixedWeights({"a": -1.0, "b": 2.0})
