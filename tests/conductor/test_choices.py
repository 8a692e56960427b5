"""Labels by choice: their likelihood, its derivatives and the most probable coefficients, against values worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import brentq

from callbacks.rewards import BestOfAnchor, FunctionReward
from maestro_pl import Anchoring, Meta
from maestro_pl.conductor import AnchorSignal, Decisions, GradientLearner, MetaBuffer, RidgeLearner
from maestro_pl.conductor.choices import (
    LOGIT,
    Problem,
    choice_log_likelihood,
    choice_probabilities,
    fit_choices,
    spread_rows,
    stages_of,
)
from maestro_pl.conductor.closed_form import fit_varying
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.labels import LabelCounts, LabelScale, choice_ranks, tells_apart
from maestro_pl.conductor.ridge import posterior_sd
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import UserError
from maestro_pl.rollout import Choice, RewardScores, RewardSpec, Rollout
from maestro_pl.sandbox import simulated_choice, true_utility
from tests.support import make_rollout, module_of, rewards, run, trainer_of

NAMES = ["a", "b", "c"]


def ranked(*ranks: int, **options: Any) -> Any:
    rank_B = torch.tensor(ranks)
    return stages_of(rank_B, torch.zeros_like(rank_B), torch.ones(len(ranks)), **options)


def log_of(scores: list[float], *ranks: int, **options: Any) -> float:
    return float(choice_log_likelihood(torch.tensor(scores, dtype=torch.float64), ranked(*ranks, **options)))


# -- the likelihood --------------------------------------------------------------------------------------------------


def test_the_best_of_several_is_a_softmax() -> None:
    raised = [math.exp(LOGIT * s) for s in (0.5, -1.0, 2.0)]
    assert log_of([0.5, -1.0, 2.0], 1, 1, 0) == pytest.approx(math.log(raised[2] / sum(raised)))
    assert log_of([0.5, -1.0, 2.0], 0, -1, 1) == pytest.approx(-math.log(1 + math.exp(LOGIT * 1.5)))  # -1: not shown


def test_a_tie_is_the_mean_of_those_that_tie() -> None:
    alone = [log_of([0.5, -1.0, 2.0], *ranks) for ranks in ((0, 1, 1), (1, 1, 0))]
    assert log_of([0.5, -1.0, 2.0], 0, 1, 0) == pytest.approx(sum(alone) / 2)


def test_a_ranking_is_one_choice_after_the_other() -> None:
    first = log_of([0.5, -1.0, 2.0], 1, 1, 0)
    second = log_of([0.5, -1.0], 0, 1)
    assert log_of([0.5, -1.0, 2.0], 1, 2, 0) == pytest.approx(first + second)


def test_rankings_of_three_are_a_distribution() -> None:
    total = sum(math.exp(log_of([0.3, -0.2, 1.0], *ranks)) for ranks in itertools.permutations(range(3)))
    assert total == pytest.approx(1.0)


def test_all_bad_says_nothing() -> None:
    assert len(ranked(0, 0, 0)) == 0
    assert log_of([0.5, -1.0, 2.0], 0, 0, 0) == 0.0


def test_pairs_are_a_bradley_terry_model() -> None:
    def pair(better: float, worse: float) -> float:
        return -math.log(1 + math.exp(-LOGIT * (better - worse)))

    assert log_of([0.5, -1.0, 2.0], 1, 1, 0, pairs=True) == pytest.approx(pair(2.0, 0.5) + pair(2.0, -1.0))


def test_the_gradient_is_what_was_chosen_less_what_was_likely() -> None:
    scores = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    stages = ranked(0, 1, 0)
    choice_log_likelihood(scores, stages).backward()
    likely = choice_probabilities(scores.detach(), stages)
    torch.testing.assert_close(scores.grad, LOGIT * (torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64) - likely))


def test_likelihoods_of_far_scores_stay_finite() -> None:
    assert math.isfinite(log_of([900.0, -900.0], 1, 0))


def test_newtons_derivatives_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    design = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    value = torch.randn(8, generator=generator, dtype=torch.float64)
    rank = torch.tensor([1, 0, 1, 2, 0, 0, -1, -1])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    weight = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    stages = stages_of(rank, group, weight)
    rated = (rank < 0) * weight
    problem = Problem(design, value, rated, 0.1 * design.sum(1), stages)
    theta = torch.randn(3, generator=generator, dtype=torch.float64)
    gradient, hessian = problem.derivatives(theta, 3.0)
    at = lambda t: problem.loss(t, 3.0)  # noqa: E731
    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(at, theta))
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(at, theta))


# -- the most probable coefficients ----------------------------------------------------------------------------------


def test_the_map_of_one_pair_by_hand() -> None:
    """One reward, one feature, z = +1 and -1, the first is better: ridge theta = 2 c / (1 + exp(2 c theta))."""
    x, z = torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])
    fit = fit_choices(x, z, torch.zeros(2), torch.tensor([0, 1]), torch.zeros(2).long(), torch.ones(2), 3.0)
    expected = brentq(lambda t: 3.0 * t - 2 * LOGIT / (1 + math.exp(2 * LOGIT * t)), 0.0, 5.0)
    assert float(fit.map_KF) == pytest.approx(expected, rel=1e-5)
    p = 1 / (1 + math.exp(-2 * LOGIT * expected))
    sd = (3.0 + LOGIT**2 * 4 * p * (1 - p)) ** -0.5
    assert float(posterior_sd(fit, torch.ones(1, 1))) == pytest.approx(sd, rel=1e-5)


def test_around_a_prior_mean_the_pull_is_less() -> None:
    x, z = torch.ones(2, 1), torch.tensor([[1.0], [-1.0]])
    rank, group = torch.tensor([0, 1]), torch.zeros(2).long()
    fit = fit_choices(x, z, torch.zeros(2), rank, group, torch.ones(2), 3.0, prior_mean=0.2)
    expected = brentq(lambda t: 3.0 * t - 2 * LOGIT / (1 + math.exp(2 * LOGIT * (0.2 + t))), 0.0, 5.0)
    assert float(fit.map_KF) == pytest.approx(expected, rel=1e-5)


def test_with_ratings_alone_it_is_the_ridge_regression() -> None:
    torch.manual_seed(0)
    x, z, value = torch.randn(12, 4), torch.randn(12, 2), torch.randn(12)
    weight = torch.linspace(0.5, 1.0, 12)
    rank, group = torch.full((12,), -1), torch.arange(12)
    got = fit_choices(x, z, value, rank, group, weight, 7.0)
    expected = fit_varying(x, z, value, weight, 7.0)
    torch.testing.assert_close(got.map_KF, expected.map_KF, atol=1e-5, rtol=1e-4)
    at = torch.randn(3, 4)
    unit = posterior_sd(expected, at) / expected.noise**0.5  # there the noise is estimated, here it is 1
    torch.testing.assert_close(posterior_sd(got, at), unit, atol=1e-4, rtol=1e-3)


def test_directions_that_were_not_fitted_keep_the_priors_variance() -> None:
    x, z = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0], [-1.0]])
    fit = fit_choices(x, z, torch.zeros(2), torch.tensor([0, 1]), torch.zeros(2).long(), torch.ones(2), 4.0)
    torch.testing.assert_close(posterior_sd(fit, torch.tensor([[0.0, 1.0]])), torch.tensor([[0.5]]))


def chosen(made: Conductor, count: int, looks: float = 0.5, seed: int = 0) -> MetaBuffer:
    """Groups of 4 in two contexts: in the first the reward `a` is right, in the second `b`; the best is named."""
    generator = torch.Generator().manual_seed(seed)
    buffer = MetaBuffer()
    group_B = torch.arange(count).repeat_interleave(4)
    kind_B = group_B % 2
    h_BD = torch.nn.functional.one_hot(kind_B, 8).float() * 3 + 0.1 * torch.randn(len(group_B), 8, generator=generator)
    z_BK = torch.randn(len(group_B), 3, generator=generator)
    true_B = torch.where(kind_B == 0, z_BK[:, 0], z_BK[:, 1]) + looks * torch.randn(len(group_B), generator=generator)
    best_N = true_B.view(-1, 4).argmax(1)
    rank_B = torch.ones(count, 4, dtype=torch.long).scatter(1, best_N.unsqueeze(1), 0).flatten()
    mask_BK = torch.ones_like(z_BK, dtype=torch.bool)
    made.observe_rewards(z_BK, mask_BK)
    made(h_BD, z_BK, mask_BK, True)  # the running centre
    nothing = torch.full((len(group_B),), torch.nan)
    buffer.add(
        Decisions(
            h_BD, mask_BK, torch.full_like(group_B, -1), torch.zeros(len(group_B)), group_B, 0,
            credit_BK=torch.full_like(z_BK, torch.nan), value_B=nothing, z_BK=z_BK, rank_BJ=rank_B.unsqueeze(1),
        )
    )  # fmt: skip
    return buffer


@pytest.mark.parametrize("target", ["choice", "pairs"])
@pytest.mark.parametrize("ridge", ["auto", 10.0])
def test_choices_find_the_mix_of_every_context(target: Any, ridge: Any) -> None:
    made, learner = Conductor(action="soft", norm="center"), RidgeLearner(target=target, ridge=ridge)
    made.build(8, NAMES)
    learner.attach(made, AnchorSignal())
    metrics = learner.learn(made, AnchorSignal(), chosen(made, 40), step=lambda loss: {}, batch=0)
    assert (metrics["choices"], metrics["labelled"]) == (40, 160)
    weights = made.probabilities(3 * torch.eye(8)[:2], torch.ones(2, 3, dtype=torch.bool))
    assert float(weights[0, 0]) > 0.7
    assert float(weights[1, 1]) > 0.7


def test_half_of_a_choice_is_forgotten_and_the_state_is_plain() -> None:
    made, learner = Conductor(action="soft", norm="center"), RidgeLearner(target="choice", window=10)
    made.build(8, NAMES)
    learner.attach(made, AnchorSignal())
    learner.remember(chosen(made, 5).joined(), 1)
    assert learner.remembered["group_B"].unique(return_counts=True)[1].tolist() == [4, 4]
    again = RidgeLearner(target="choice", window=10)
    again.load_state_dict(learner.state_dict())
    torch.testing.assert_close(again.fit(made).map_KF, learner.fit(made).map_KF)  # type: ignore[union-attr]


@pytest.mark.parametrize(("window", "kept"), [(8, [4, 4]), (7, [4]), (4, [4])])
def test_a_choice_that_is_wholly_in_the_window_is_kept(window: int, kept: list[int]) -> None:
    made, learner = Conductor(action="soft", norm="center"), RidgeLearner(target="choice", window=window)
    made.build(8, NAMES)
    learner.attach(made, AnchorSignal())
    learner.remember(chosen(made, 5).joined(), 1)
    assert learner.remembered["group_B"].unique(return_counts=True)[1].tolist() == kept


def test_a_window_that_holds_no_choice_is_refused() -> None:
    made, learner = Conductor(action="soft", norm="center"), RidgeLearner(target="choice", window=3)
    made.build(8, NAMES)
    learner.attach(made, AnchorSignal())
    with pytest.raises(UserError, match="window=3 is too small for a choice among 4 responses: give at least 4"):
        learner.remember(chosen(made, 5).joined(), 1)


def test_equations_without_a_solution_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(_: object) -> None:
        torch.linalg.cholesky(torch.zeros(2, 2))

    made, learner = Conductor(action="soft", norm="center"), RidgeLearner(target="choice", ridge=1e-30)
    made.build(8, NAMES)
    learner.attach(made, AnchorSignal())
    monkeypatch.setattr(learner, "_fit_remembered", singular)
    with pytest.warns(UserWarning, match="with ridge=1e-30 the equations of what it remembers have no solution"):
        assert learner.fit(made) is None


def test_a_checkpoint_of_before_has_ratings_only() -> None:
    made, learner = Conductor(action="soft", norm="center"), RidgeLearner(target="choice")
    made.build(8, NAMES)
    learner.attach(made, AnchorSignal())
    learner.remember(chosen(made, 4).joined(), 1)
    old = {name: values for name, values in learner.remembered.items() if name not in ("rank_B", "task_B")}
    learner.load_state_dict({"remembered": old})
    assert learner.remembered["rank_B"].tolist() == [-1] * 16


def test_a_prior_mean_gives_equal_weights_where_nothing_is_known() -> None:
    made, learner = Conductor(action="soft", norm="center"), RidgeLearner(target="choice", prior_mean=0.1, constant=0.3)
    made.build(8, NAMES)
    learner.attach(made, AnchorSignal())
    buffer = chosen(made, 40)
    learner.learn(made, AnchorSignal(), buffer, step=lambda loss: {}, batch=0)
    x = made.features(3 * torch.eye(8)[:1])
    assert float(x[0, -1]) == pytest.approx(0.3)
    fit = learner.fit(made)
    torch.testing.assert_close(made.net(made.inputs(3 * torch.eye(8)[:1])), x @ fit.map_KF.T)  # type: ignore[union-attr]
    empty = fit_varying(torch.randn(2, 9), torch.zeros(2, 3), torch.zeros(2), torch.ones(2), 30.0)
    assert float(empty.map_KF.abs().max()) == 0.0  # and the mean is what is added to it


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_the_widest_pair_is_shown_first_and_then_what_scatters_most() -> None:
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [0.1, 0.0], [0.0, 1.0]])
    assert spread_rows(z, 2) == [1, 2]
    assert spread_rows(z, 3) == [1, 2, 4]
    assert spread_rows(z, 9) == [0, 1, 2, 3, 4]
    assert len(spread_rows(torch.zeros(5, 2), 3)) == 3


def test_the_scatter_is_that_of_every_subset() -> None:
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)).double()
    pair = max(itertools.combinations(range(6), 2), key=lambda p: float((z[p[0]] - z[p[1]]).norm()))

    def scatter(rows: list[int]) -> float:
        centred = z[rows] - z[rows].mean(0)
        return float(torch.logdet(torch.eye(3).double() + 0.05 * centred.T @ centred))

    third = max((i for i in range(6) if i not in pair), key=lambda i: scatter([*pair, i]))
    assert spread_rows(z, 3) == sorted([*pair, third])


def anchored(values: list[float | None], choices: list[Choice] = (), size: int = 4) -> Rollout:  # type: ignore[assignment]
    rollout = make_rollout([str(i) for i in range(len(values))], group_size=size, task=["a", "b"])
    spec = RewardSpec("anchor", "anchor")
    rollout.rewards["anchor"] = RewardScores.from_list(spec, values, choices=list(choices))
    return rollout


def test_labels_of_a_part_share_one_deviation() -> None:
    scale = LabelScale()
    got = scale.values(anchored([1.0, 3.0, None, None, 0.0, 8.0, None, None]))
    squares = 2 * 1.0 + 2 * 16.0
    expected = torch.tensor([-1.0, 1.0, math.nan, math.nan, -4.0, 4.0, math.nan, math.nan]) / (squares / 2) ** 0.5
    torch.testing.assert_close(got, expected, equal_nan=True)
    again = LabelScale()
    again.load_state_dict(scale.state_dict())
    later = again.values(anchored([1.0, 3.0, None, None, 5.0, 5.0, None, None]))
    expected = torch.tensor([-1.0, 1.0] + [math.nan] * 6) / ((squares + 2.0) / 4) ** 0.5
    torch.testing.assert_close(later, expected, equal_nan=True)


def test_rewards_are_centred_over_what_was_rated() -> None:
    learner = RidgeLearner()
    z = torch.tensor([[1.0], [0.5], [-0.5], [-1.0]] * 2)
    value = torch.tensor([1.0, math.nan, -1.0, math.nan, 0.5, 0.5, -0.5, -0.5])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    decisions = Decisions(
        torch.randn(8, 2),
        torch.ones(8, 1).bool(),
        torch.full((8,), -1),
        torch.zeros(8),
        group,
        0,
        value_B=value,
        z_BK=z,
    )
    learner.remember(decisions, 0)
    torch.testing.assert_close(learner.remembered["z_BK"][:, 0], torch.tensor([0.75, -0.75, 1.0, 0.5, -0.5, -1.0]))


# -- how an anchor chooses -------------------------------------------------------------------------------------------


def test_a_choice_in_places() -> None:
    assert Choice.of([4, 6, 7], [[1]]).ranks == (1, 0, 1)
    assert Choice.of([4, 6, 7], [[2], [0, 1]]).ranks == (1, 1, 0)
    assert Choice.of([4, 6, 7]).ranks == (0, 0, 0)
    for rows, ranks in (((1,), (0,)), ((1, 1), (0, 1)), ((1, 2), (0,)), ((1, 2), (0, -1))):
        with pytest.raises(UserError, match="at least two different rows"):
            Choice(rows, ranks)


def test_several_choices_of_a_group_have_columns_of_their_own() -> None:
    choices = [Choice((0, 1), (0, 1)), Choice((2, 3), (1, 0)), Choice((4, 5, 6), (0, 0, 0))]
    ranks = choice_ranks(anchored([None] * 8, choices))
    assert ranks.T.tolist() == [[0, 1, -1, -1, 0, 0, 0, -1], [-1, -1, 1, 0, -1, -1, -1, -1]]
    assert tells_apart(ranks, 4).tolist() == [True, False]  # all alike tells nothing


@pytest.mark.parametrize(
    ("result", "ranks"),
    [
        (1, [1, 0, 1]),
        ({0, 2}, [0, 1, 0]),
        ([2, 0], [1, 2, 0]),
        ([{0, 1}, 2], [0, 0, 1]),
        (None, [0, 0, 0]),
        ([], [0, 0, 0]),
    ],
)
def test_what_a_function_may_return(result: Any, ranks: list[int]) -> None:
    seen: list[Any] = []

    def choose(prompt: str, responses: list[str], extra: int) -> Any:
        seen.append((prompt, responses, extra))
        return result

    rollout = make_rollout(["x", "y", "z"], group_size=3, extra=[7])
    scores = run(BestOfAnchor(choose), rollout)
    assert seen == [("prompt 0", ["x", "y", "z"], 7)]
    assert not scores.mask_B.any()
    assert scores.choices == [Choice((0, 1, 2), tuple(ranks))]
    assert scores.texts["rank"] == ranks


@pytest.mark.parametrize("result", [3, -1, "0", True, [0, 0], [0.5]])
def test_what_it_must_not_return(result: Any) -> None:
    with pytest.raises(UserError, match="expected the place of the best"):
        run(BestOfAnchor(lambda responses: result), make_rollout(["x", "y", "z"], group_size=3))


def test_errors_of_the_function_are_sentences() -> None:
    with pytest.raises(UserError, match="which is no column"):
        run(BestOfAnchor(lambda responses, nowhere: 0), make_rollout(["x", "y"], group_size=2))
    with pytest.raises(UserError, match="ZeroDivisionError"):
        run(BestOfAnchor(lambda responses: 1 // 0), make_rollout(["x", "y"], group_size=2))


def test_only_anchors_compare() -> None:
    class Wrong(FunctionReward):
        def score(self, rollout: Rollout, rows: list[int], pl_module: Any) -> Any:
            self.compare(rollout, Choice.of(rows, [[0]]))

    Wrong.__module__ = "callbacks.test"
    with pytest.raises(UserError, match="which only an anchor can"):
        run(Wrong(lambda completion: 0.0, name="w"), make_rollout(["x", "y"], group_size=2))
    with pytest.raises(UserError, match="responses to one prompt"):
        run(Wrong(lambda completion: 0.0, name="w", role="anchor"), make_rollout(["x", "y"], group_size=1))


def test_the_simulated_person_errs_anew_at_each_look() -> None:
    good = "<think>x</think><answer>5</answer>"
    shown = [good, "<think>x</think><answer>90</answer>"]
    asked: dict[str, Any] = {"task": "arithmetic", "subject": "", "target": 5}
    assert true_utility(good, **asked) > true_utility(shown[1], **asked)
    assert simulated_choice(shown, **asked, prompt="p", noise=0.0) == 0
    looks = [simulated_choice(shown, **asked, prompt="p", noise=3.0, seed=seed) for seed in range(60)]
    assert 0 < sum(looks) < 60
    assert looks == [simulated_choice(shown, **asked, prompt="p", noise=3.0, seed=seed) for seed in range(60)]


# -- in a run --------------------------------------------------------------------------------------------------------


def longest(responses: list[str]) -> int:
    return max(range(len(responses)), key=lambda i: sum(map(ord, responses[i])) % 5)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"word {i}", "task": "ab"[i % 2], "split": "train" if i < 8 else "validation"} for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def soft() -> Conductor:
    return Conductor(action="soft", norm="center", context="prompt")


def fit(tmp_path: Path, folder: Path, prompts: Path, anchors: list[Any], **options: Any) -> Any:
    module = module_of(folder, weigher=soft(), **options)
    torch.manual_seed(0)
    data = PromptDataModule(sources=str(prompts), batch_size=2, show=False)
    trainer = trainer_of(tmp_path, rewards(*anchors), max_steps=2, limit_val_batches=0)
    trainer.fit(module, data)
    return module


def test_a_run_learns_from_choices_and_ratings(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fives(completion: str) -> float:
        return float(sum(map(ord, completion)) % 5)

    shown: list[int] = []

    def choose(responses: list[str]) -> int:
        shown.append(len(responses))
        return longest(responses)

    rated = FunctionReward(function=fives, name="rated", role="anchor", tasks=["b"])
    module = fit(
        tmp_path,
        tiny_qwen3,
        prompts,
        [BestOfAnchor(choose, tasks=["a"]), rated],
        meta=Meta(signal=AnchorSignal(), learner=RidgeLearner(target="choice"), every=1, warmup=2),
        anchoring=Anchoring(fraction=1.0, responses=3),
    )
    counts = module.outer.counts.tasks
    assert counts["a"].choices == counts["a"].asked == len(shown)
    assert counts["a"].ratings == 0
    assert counts["b"].choices == 0
    assert counts["b"].ratings == 3 * counts["b"].asked
    assert set(shown) == {3}
    assert module.step_metrics["anchor/choices"] == len(shown)
    known = module.outer.learner.remembered["rank_B"]
    assert int((known >= 0).sum()) == 3 * len(shown)
    out = capsys.readouterr().out
    assert out.count("labels by task") == 2
    assert "choices" in out
    (header,) = [line for line in out.splitlines() if "groups" in line and "ratings" in line]
    assert header.split()[3:] == ["groups", "asked", "told", "apart", "ratings", "choices"]
    assert math.isfinite(module.step_metrics["conductor/context_drift"])


@pytest.mark.parametrize("learner", [RidgeLearner(), GradientLearner()])
def test_a_learner_of_scores_refuses_choices(tiny_qwen3: Path, prompts: Path, tmp_path: Path, learner: Any) -> None:
    with pytest.raises(UserError, match="target: choice"):
        fit(tmp_path, tiny_qwen3, prompts, [BestOfAnchor(longest)], meta=Meta(AnchorSignal(), learner, warmup=1))


def test_an_anchor_before_the_rewards_cannot_be_shown_a_spread(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    module = module_of(
        tiny_qwen3,
        weigher=soft(),
        meta=Meta(AnchorSignal(), RidgeLearner(target="choice")),
        anchoring=Anchoring(fraction=1.0, responses=2),
    )
    trainer = trainer_of(tmp_path, [BestOfAnchor(longest), *rewards()], max_steps=1, limit_val_batches=0)
    with pytest.raises(UserError, match="list the anchors after the rewards"):
        trainer.fit(module, PromptDataModule(sources=str(prompts), batch_size=2, show=False))


def test_counts_survive_a_round_trip() -> None:
    counts = LabelCounts()
    rollout = anchored([1.0, 2.0, None, None] + [None] * 4, [Choice((4, 5), (0, 1))])
    counts.add(rollout, torch.tensor([True, True]), torch.tensor([True, False]))
    again = LabelCounts()
    again.load_state_dict(counts.state_dict())
    assert (again.tasks["a"].ratings, again.tasks["b"].choices, again.choices) == (2, 1, 1)
    assert again.without == ["b"]
    assert again.unknown("c")
    assert not again.unknown("a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RidgeLearner(prior_mean=0.1, target="covariance"), "the prior is one of coefficients"),
        (lambda: RidgeLearner(constant=0.0), "a constant above 0"),
        (lambda: Anchoring(responses=1), "at least 2 responses"),
        (lambda: Anchoring(shown="x"), "spread, random"),  # type: ignore[arg-type]
        (lambda: Anchoring(unlabelled_tasks="x"), "equal, weighed, skipped"),  # type: ignore[arg-type]
        (lambda: BestOfAnchor(longest, timeout=0), "seconds above 0"),
    ],
)
def test_bad_values_are_sentences(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
