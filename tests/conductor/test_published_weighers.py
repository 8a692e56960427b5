"""Every published way of weighing against values worked out by hand: docs/weighers.md has the formulas."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from maestro_pl.algorithm.hypervolume import hypervolume, hypervolume_gain, pareto_front
from maestro_pl.conductor.adaptive import CTWAWeights, SAWWeights, ScheduledWeights, SharedWeights, group_covariances
from maestro_pl.conductor.influence import GradientWeights
from maestro_pl.conductor.progress import DynaOptWeights, HypervolumeWeights
from maestro_pl.conductor.weighers import Scored, Seen, Weigher
from maestro_pl.errors import UserError

AB = ["a", "b"]
BOTH = torch.ones(4, 2, dtype=torch.bool)


def built(weigher: Any, names: list[str] | None = None) -> Any:
    weigher.build(4, names or AB)
    return weigher


def given(weigher: Weigher, mask_BK: Tensor = BOTH) -> list[float]:
    """The weights of the first response."""
    weights: list[float] = weigher(None, torch.zeros(mask_BK.shape), mask_BK, True).weights_BK[0].tolist()
    return weights


def scored(raw: list[list[float]], mask_BK: Tensor | None = None, size: int = 4, step: int = 0) -> Scored:
    raw_BK = torch.tensor(raw)
    return Scored(raw_BK, torch.ones_like(raw_BK).bool() if mask_BK is None else mask_BK, size, step)


def seen(batch: Scored, advantages: list[float]) -> Seen:
    weighed = SimpleNamespace(advantages_B=torch.tensor(advantages), rewards_BK=batch.raw_BK, mask_BK=batch.mask_BK)
    return Seen(batch, weighed, None, None)  # type: ignore[arg-type]


# -- a plan
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "step", "share"),
    [
        ("linear", 0, 1.0), ("linear", 10, 1.0), ("linear", 15, 0.75), ("linear", 20, 0.5), ("linear", 99, 0.5),
        ("cosine", 15, 0.75), ("cosine", 12, 1.0 - 0.5 * 0.5 * (1 - math.cos(0.2 * math.pi))),
    ],
)  # fmt: skip
def test_a_schedule_by_hand(shape: Any, step: int, share: float) -> None:
    weigher = built(ScheduledWeights({20: {"a": 3.0, "b": 3.0}, 10: {"a": 2.0, "b": 0.0}}, shape))
    weigher.prepare(scored([[0.0, 0.0]] * 4, step=step))
    assert given(weigher) == pytest.approx([share, 1 - share])


def test_a_schedule_is_rescaled_over_what_applies_and_saved() -> None:
    weigher = built(
        ScheduledWeights({0: {"a": 1.0, "b": 1.0, "c": 2.0}, 4: {"a": 1.0, "b": 0.0, "c": 0.0}}), ["a", "b", "c"]
    )
    weigher.prepare(scored([[0.0] * 3] * 4, step=2))  # 0.625, 0.125, 0.25
    assert given(weigher, torch.tensor([[True, True, False]])) == pytest.approx([0.625 / 0.75, 0.125 / 0.75, 0.0])
    other = built(ScheduledWeights(weigher.points), ["a", "b", "c"])
    other.load_state_dict(weigher.state_dict())
    assert given(other, torch.ones(1, 3).bool()) == pytest.approx([0.625, 0.125, 0.25])


# -- SAW
# -------------------------------------------------------------------------------------------------------------


def test_saw_by_hand() -> None:
    weigher = built(SAWWeights())
    assert given(weigher) == [0.5, 0.5]
    weigher.prepare(scored([[1.0, 10.0], [3.0, 10.0], [1.0, 14.0], [3.0, 14.0]]))
    spread = math.sqrt(4 / 3)  # of the first reward, whose mean is 2; the second has twice that, at a mean of 12
    first, second = spread / 2, 2 * spread / 12
    assert given(weigher) == pytest.approx([first / (first + second), second / (first + second)])
    assert given(weigher) == pytest.approx([0.75, 0.25])


def test_saw_with_an_offset_and_a_mask() -> None:
    weigher = built(SAWWeights({"a": 2.0, "b": 0.0}))
    mask_BK = torch.tensor([[True, True]] * 3 + [[True, False]])
    weigher.prepare(scored([[1.0, 1.0], [3.0, 2.0], [1.0, 3.0], [3.0, 99.0]], mask_BK))
    first, second = math.sqrt(4 / 3) / 4, 1.0 / 2.0
    assert given(weigher) == pytest.approx([first / (first + second), second / (first + second)])


def test_saw_keeps_its_weights_where_nothing_varies() -> None:
    weigher = built(SAWWeights())
    weigher.prepare(scored([[1.0, 5.0], [3.0, 5.0], [1.0, 5.0], [3.0, 5.0]]))
    assert given(weigher) == [1.0, 0.0]
    weigher.prepare(scored([[2.0, 5.0]] * 4))
    assert given(weigher) == [1.0, 0.0]


def test_saw_says_once_whose_mean_it_cannot_divide_by() -> None:
    """A reward around 0 has all the weight, whatever it varies by."""
    weigher = built(SAWWeights())
    around_0 = scored([[1.0, -1.0], [3.0, 1.1], [1.0, -1.0], [3.0, 1.0]])
    with pytest.warns(UserWarning, match=r"values above and below 0 of b \(from -1\).*offsets"):
        weigher.prepare(around_0)
    assert given(weigher)[1] > 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weigher.prepare(around_0)
        built(SAWWeights({"a": 0.0, "b": 1.0})).prepare(around_0)
        built(SAWWeights()).prepare(scored([[-1.0, 0.0], [-3.0, 2.0]]))  # all on one side


# -- CTWA
# ------------------------------------------------------------------------------------------------------------


def test_covariances_by_hand() -> None:
    raw_BK = torch.tensor([[0.0, 5.0], [2.0, 1.0], [0.0, 1.0], [2.0, 9.0], *[[7.0, 7.0]] * 4])
    mask_BK = torch.tensor([[True, True], [True, True], [True, True], [True, False], *[[True, False]] * 4])
    value_B = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, 2.0, 3.0, 4.0])
    total_K, groups_K = group_covariances(raw_BK, mask_BK, value_B, 4)
    # reward 1: +-1 times +-1 in the first group, constant in the second; reward 2: (8/3)(-2/3), (-4/3)(4/3), (-4/3)(-2/3)
    assert total_K.tolist() == pytest.approx([1.0, (-16 / 9 - 16 / 9 + 8 / 9) / 3])
    assert groups_K.tolist() == [2, 1]


def test_ctwa_by_hand() -> None:
    weigher = built(CTWAWeights(targets={"a": 0.5, "b": 0.5}, lr=2.0, ema=0.25))
    batch = scored([[0.0, 1.0], [2.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    logged = weigher.observe(seen(batch, [-1.0, 1.0, -1.0, 1.0]))  # covariances 1 and 0
    assert {name: float(value) for name, value in logged.items()} == {"covariance/a": 1.0, "covariance/b": 0.0}
    raised = math.exp(2.0 * 0.5)  # the first is above its target
    assert given(weigher) == pytest.approx([1 / (1 + raised), raised / (1 + raised)])
    weigher.observe(seen(batch, [1.0, -1.0, 1.0, -1.0]))  # -1 and 0: means 0.75 - 0.25 = 0.5 and 0
    assert weigher.mean_K.tolist() == pytest.approx([0.5, 0.0])
    assert given(weigher) == pytest.approx([1 / (1 + raised**2), raised**2 / (1 + raised**2)])


def test_ctwa_with_correlations_has_no_unit() -> None:
    for unit in (1.0, 1000.0):
        weigher = built(CTWAWeights(statistic="correlation"))
        weigher.observe(seen(scored([[0.0, unit], [unit, 0.0], [0.0, unit], [unit, 0.0]]), [-2.0, 2.0, -2.0, 2.0]))
        assert weigher.mean_K.tolist() == pytest.approx([1.0, -1.0])


def test_a_correlation_is_of_what_varies() -> None:
    rows, values = [[0.0, 3.0], [1.0, 3.0], [2.0, 5.0], [3.0, 4.0]], [0.0, 1.0, 2.0, 9.0]
    mask_BK = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    weigher = built(CTWAWeights(statistic="correlation", ema=1.0))
    weigher.observe(
        seen(scored(rows, mask_BK), values)
    )  # the first follows where it applies; the second is one value there
    assert weigher.mean_K.tolist() == pytest.approx([1.0, 0.0])
    assert weigher.seen_K.tolist() == [1.0, 0.0]
    still = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 1.0]])
    weigher.observe(seen(scored(still.tolist()), [0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 1.0]))
    # of the second group alone: covariance 2/4 over the spreads, sqrt(4/4) sqrt(2/4)
    assert weigher.mean_K.tolist() == pytest.approx([0.5 / math.sqrt(0.5), 0.25 / math.sqrt(0.25 * 0.5)])


def test_a_weight_that_has_fallen_far_can_rise_again() -> None:
    weigher = built(SharedWeights())
    weigher.multiply(torch.tensor([0.0, 1000.0]))
    assert weigher.weights_K.tolist() == [0.0, 1.0]
    tiny = math.log(torch.finfo(torch.float32).tiny)
    weigher.multiply(torch.tensor([-tiny, 0.0]))  # all of the way back, and no more
    assert weigher.weights_K.tolist() == pytest.approx([0.5, 0.5])


def test_ctwa_does_not_judge_a_reward_that_never_applied() -> None:
    weigher = built(CTWAWeights())
    mask_BK = torch.tensor([[True, False]] * 4)
    weigher.observe(seen(scored([[1.0, 0.0]] * 4, mask_BK), [1.0, -1.0, 0.0, 0.0]))
    assert given(weigher)[0] == pytest.approx(1 / (1 + math.exp(-0.05 * 0.1)))  # raised; the other stayed


def test_what_ctwa_remembers_goes_on() -> None:
    first = built(CTWAWeights(lr=1.0))
    batch = seen(scored([[0.0, 1.0], [2.0, 1.0], [0.0, 0.0], [2.0, 0.0]]), [-1.0, 1.0, -1.0, 1.0])
    first.observe(batch)
    second = built(CTWAWeights(lr=1.0))
    second.load_state_dict(first.state_dict())
    first.observe(batch)
    second.observe(batch)
    assert given(first) == given(second)


# -- hypervolume
# -----------------------------------------------------------------------------------------------------


def test_hypervolumes_by_hand() -> None:
    assert hypervolume([(2.0, 1.0), (1.0, 3.0), (1.0, 1.0)], (0.0, 0.0)) == pytest.approx(2 + 3 - 1)
    assert hypervolume([(2.0, 1.0), (-1.0, 3.0)], (0.0, 0.0)) == pytest.approx(2.0)
    assert hypervolume([(1.0, 1.0, 2.0), (2.0, 1.0, 1.0), (1.0, 2.0, 1.0)], (0.0, 0.0, 0.0)) == pytest.approx(4.0)
    assert hypervolume_gain((3.0, 2.0), [(2.0, 1.0), (1.0, 3.0)], (0.0, 0.0)) == pytest.approx(6 + 3 - 2 - 4)
    assert hypervolume_gain((1.0, 1.0), [(2.0, 1.0)], (0.0, 0.0)) == 0.0
    assert pareto_front([(1.0, 1.0), (2.0, 1.0), (2.0, 1.0), (1.0, 3.0)]) == [(2.0, 1.0), (1.0, 3.0)]


def test_the_hypervolume_of_drawn_points_is_that_of_counting() -> None:
    points = [tuple(row) for row in torch.randint(0, 4, (9, 3), generator=torch.Generator().manual_seed(1)).tolist()]
    cells = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    covered = sum(any(x < p[0] and y < p[1] and z < p[2] for p in points) for x, y, z in cells)
    assert hypervolume(points, (0, 0, 0)) == covered


def test_the_factor_of_a_hypervolume() -> None:
    weigher = built(HypervolumeWeights(scales={"a": 2.0, "b": 1.0}))
    assert weigher.gain == 1.0
    weigher.validated(torch.tensor([2.0, 0.5]))  # the reference
    assert weigher.gain == 1.0
    weigher.validated(torch.tensor([3.0, 1.0]))  # 0.5 x 0.5 above it
    assert weigher.gain == pytest.approx(0.5 + 1.5 * math.tanh(0.25))
    weigher.validated(torch.tensor([2.5, 0.9]))  # dominated
    assert weigher.gain == 0.5
    weigher.validated(torch.tensor([2.0, 9.0]))  # better in one, and equal to the reference in the other
    assert weigher.gain == 0.5
    other = built(HypervolumeWeights(scales={"a": 2.0, "b": 1.0}))
    other.load_state_dict(weigher.state_dict())
    other.validated(torch.tensor([4.0, 1.0]))  # 1 x 0.5, of which 0.25 was known
    assert other.gain == pytest.approx(0.5 + 1.5 * math.tanh(0.25))
    assert given(other) == [0.5, 0.5]


def test_a_validation_without_a_mean_is_left_out() -> None:
    weigher = built(HypervolumeWeights())
    for means in ((-7.0, 0.1), (-6.0, 0.2)):
        weigher.validated(torch.tensor(means))
    gain, points_MK = weigher.gain, weigher.points_MK.clone()
    with pytest.warns(UserWarning, match="leaves a validation out: a applied to none"):
        weigher.validated(torch.tensor([torch.nan, 0.9]))
    assert weigher.gain == gain
    assert torch.equal(weigher.points_MK.nan_to_num(9.0), points_MK.nan_to_num(9.0))


# -- bandits
# ---------------------------------------------------------------------------------------------------------


def test_exp3_by_hand() -> None:
    weigher = built(DynaOptWeights(step=0.5, gamma=0.3))
    assert weigher.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    weigher.validated(torch.tensor([0.0, 0.0]))
    arm = int(weigher.arm)
    raised = [0.5, 0.5]
    if arm < 2:
        raised[arm] += 0.5
    assert given(weigher) == pytest.approx([value / sum(raised) for value in raised])
    weigher.validated(torch.tensor([1.0, 3.0]))  # one payoff is its own quantiles: 0.5
    expected = [1.0] * 3
    expected[arm] = math.exp(0.3 * 0.5 / (1 / 3 * 3))
    assert weigher.probabilities().tolist() == pytest.approx([0.7 * u / sum(expected) + 0.1 for u in expected])
    assert float(weigher.payoffs_M[0]) == 2.0


def test_a_bandit_finds_the_arm_that_pays() -> None:
    for contextual in (False, True):
        weigher = built(DynaOptWeights(step=0.05, gamma=0.2, contextual=contextual, seed=3))
        weigher.validated(torch.zeros(2))
        mean = 0.0
        for _ in range(60):
            mean += 1.0 if int(weigher.arm) == 1 else -1.0
            weigher.validated(torch.full((2,), mean))
        assert float(weigher.probabilities()[1]) > 0.6
        assert given(weigher)[1] > 0.6


def test_a_bandit_is_paid_by_what_it_knows() -> None:
    weigher = built(DynaOptWeights())
    for means in ((-7.0, 0.1), (torch.nan, 0.2), (torch.nan, torch.nan), (-6.0, 0.4)):
        weigher.validated(torch.tensor(means))
    # 0.1 of the one that has two means, nothing, and the mean of 1 (since the first validation) and 0.2
    assert weigher.payoffs_M[:3].tolist() == pytest.approx([0.1, 0.6, math.nan], nan_ok=True, abs=1e-6)
    assert weigher.before_K.tolist() == pytest.approx([-6.0, 0.4])


def test_a_contextual_bandit_leaves_an_arm_that_harms() -> None:
    for seed in range(10):
        weigher = built(DynaOptWeights(contextual=True, seed=seed))
        weigher.validated(torch.zeros(2))
        first, mean, drawn = int(weigher.arm), 0.0, []
        for _ in range(30):
            mean += -1.0 if int(weigher.arm) == first else 1.0
            weigher.validated(torch.full((2,), mean))
            drawn.append(int(weigher.arm))
        assert drawn.count(first) < 10


def test_draws_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def arms(weigher: DynaOptWeights) -> list[int]:
        found = []
        for step in range(12):
            weigher.validated(torch.full((2,), float(step)))
            found.append(int(weigher.arm))
        return found

    by_seed = []
    for seed in ("1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        by_seed.append(arms(built(DynaOptWeights(gamma=1.0))))
        assert by_seed[-1] == arms(built(DynaOptWeights(gamma=1.0, seed=int(seed))))
    assert by_seed[0] != by_seed[1]
    saved = built(DynaOptWeights(gamma=1.0)).state_dict()  # of seed 2
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    resumed = built(DynaOptWeights(gamma=1.0))
    resumed.load_state_dict(saved)
    assert arms(resumed) == by_seed[1]


def test_a_bandit_goes_on_as_if_it_had_not_stopped() -> None:
    straight, stopped = built(DynaOptWeights(contextual=True)), built(DynaOptWeights(contextual=True))
    means = torch.rand(8, 2, generator=torch.Generator().manual_seed(0))
    for mean_K in means:
        straight.validated(mean_K)
    for mean_K in means[:4]:
        stopped.validated(mean_K)
    resumed = built(DynaOptWeights(contextual=True))
    resumed.load_state_dict(stopped.state_dict())
    for mean_K in means[4:]:
        resumed.validated(mean_K)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, equal_nan=True)


# -- what cannot be used
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SharedWeights({"a": 0.0, "b": 1.0}), "expected a finite weight above 0"),
        (lambda: ScheduledWeights({}), "give at least one"),
        (lambda: ScheduledWeights({-1: {"a": 1.0}}), r"the steps \[-1\]"),
        (lambda: ScheduledWeights({0: {"a": 0.0, "b": 0.0}}), "not all zero"),
        (lambda: ScheduledWeights({0: {"a": 1.0}}, "step"), "expected one of linear, cosine"),  # type: ignore[arg-type]
        (
            lambda: built(ScheduledWeights({0: {"a": 1.0}})),
            r"points\[0\] names \['a'\], and the rewards with role 'train'",
        ),
        (lambda: built(SAWWeights({"z": 1.0})), r"SAWWeights offsets names \['z'\]"),
        (lambda: CTWAWeights(ema=0.0), "a share in"),
        (lambda: built(CTWAWeights({"a": 0.1})), "CTWAWeights targets names"),
        (lambda: HypervolumeWeights(scales=0.0), "expected finite numbers above 0"),
        (lambda: built(HypervolumeWeights(), [str(k) for k in range(9)]), "at most 8"),
        (lambda: DynaOptWeights(gamma=0.0), "a share in"),
        (lambda: GradientWeights(every=0), "at least 1"),
        (lambda: built(GradientWeights()).check(SimpleNamespace(lora=None)), "moves adapters along a gradient"),
    ],
)
def test_bad_values_are_sentences(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_the_pages_own_weigher_weighs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "weighers.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], scope)
    mask_BK = torch.tensor([[True, True], [False, True], [False, False]])
    weights_BK = built(scope["Mine"]())(None, torch.zeros(3, 2), mask_BK, True).weights_BK
    assert weights_BK.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
