"""What is asked, and what the clicks teach while they are made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maestro_pl.conductor.ridge import RidgeLearner
from maestro_pl.labelling.questions import Asked, Group, chosen_questions
from maestro_pl.labelling.store import Click, LabelStore
from maestro_pl.labelling.teaching import Teaching

LIKED = {"a": 0, "b": 1}  # the reward that people go by


def groups(count: int) -> list[Group]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for n in range(count):
        task = "ab"[n % 2]
        z_GK = torch.randn(8, 3, generator=draw)
        x_F = torch.tensor([task == "a", task == "b", 0.5]).float()
        mask_GK = torch.ones(8, 3, dtype=torch.bool)
        made.append(Group(task, f"p{n}", [f"{n}/{i}" for i in range(8)], z_GK, mask_GK, x_F.expand(8, 3), n // 8))
    return made


def answered(each: Asked, sampled: list[Group], rater: str = "ann") -> Click:
    z_S = sampled[each.group].z_GK[list(each.rows), LIKED[each.question.task]]
    return Click(each.question, rater, "best", int(z_S.argmax()), tuple(each.question.order(rater)), 1.0)


def test_questions_cover_tasks_and_show_different_answers() -> None:
    sampled = groups(10)
    sampled[0].responses[:] = ["same"] * 7 + [" same\n"]
    sampled[1].responses[:] = ["x", "x", "x", "y", "x", "x", "x", "x"]
    asked = chosen_questions(sampled, 6, 4)
    assert [each.question.task for each in asked] == ["a", "b"] * 3
    assert [each.group for each in asked] == [2, 1, 4, 3, 6, 5]  # the first has nothing to choose
    assert set(asked[1].question.responses) == {"x", "y"}
    for each in asked:
        texts = [sampled[each.group].responses[row] for row in each.rows]
        assert texts == list(each.question.responses)
    assert {len(each.question.responses) for each in asked} == {2, 4}
    assert len(chosen_questions(sampled, 40, 4)) == 9


def test_clicks_teach_the_weights_and_are_foretold(tmp_path: Path) -> None:
    sampled = groups(40)
    asked = chosen_questions(sampled, 40, 4)
    learner = RidgeLearner(target="choice")
    teaching = Teaching(sampled, asked, ["x", "y", "z"], learner, learner.constant)
    store = LabelStore(tmp_path / "labels.db")
    start = teaching.progress([])
    assert [w.mean for task in start.tasks for w in task.weights] == pytest.approx([1 / 3] * 6)
    assert (start.clicks, start.tried, start.still) == (0, 0, False)
    for each in asked[:-1]:
        store.click(answered(each, sampled))
    store.click(Click(asked[-1].question, "ann", "tie", None, tuple(range(4)), 1.0))
    seen = teaching.progress(store.clicks())
    assert (seen.clicks, seen.tried) == (40, 39)
    assert seen.chance == pytest.approx(39 / 4)
    assert seen.predicted > 2 * seen.chance
    for task in seen.tasks:
        liked = task.weights[LIKED[task.name]]
        assert liked.mean == max(weight.mean for weight in task.weights) > 0.5
        assert liked.low < liked.mean < liked.high or liked.high == liked.mean
        assert not task.against
    assert seen.tasks[0].answered == 20

    # what was learned click by click is what is learned at once, and what is taken back is forgotten
    again = Teaching(sampled, asked, ["x", "y", "z"], learner, learner.constant)
    for _ in range(3):
        store.undo("ann", [each.question.key for each in asked])
    assert again.progress(store.clicks()) == teaching.progress(store.clicks())
    assert teaching.progress(store.clicks()).clicks == 37


def test_one_of_several_best_answers_is_foretold() -> None:
    sampled = groups(12)
    asked = chosen_questions(sampled, 12, 4)
    learner = RidgeLearner(target="choice")
    teaching = Teaching(sampled, asked, ["x", "y", "z"], learner, learner.constant)
    clicks = [
        Click(each.question, "ann", "best", 1, tuple(range(4)), 1.0, n, also=(0, 2)) for n, each in enumerate(asked)
    ]
    seen = teaching.progress(clicks)
    assert (seen.tried, seen.chance) == (12, pytest.approx(9))
    alone = teaching.progress([Click(c.question, "ann", "best", 1, c.shown, 1.0, c.number + 100) for c in clicks])
    assert alone.chance == pytest.approx(3)
    # the first click tells three from one: its likelihood is that of ranks with ties
    fit = teaching.fit(clicks[:1])
    assert fit is not None
    group, rows = sampled[asked[0].group], list(asked[0].rows)
    score_S = ((group.x_GF[rows] @ fit.map_KF.T) * group.z_GK[rows]).sum(1)
    assert float(score_S[[0, 1, 2]].mean()) > float(score_S[3])


def test_clicks_against_every_reward_are_said() -> None:
    sampled = groups(30)
    for group in sampled:
        group.z_GK[:] = group.z_GK[:, :1]  # all rewards say the same
    asked = chosen_questions(sampled, 30, 4)
    learner = RidgeLearner(target="choice", ridge=1.0)
    teaching = Teaching(sampled, asked, ["x", "y", "z"], learner, learner.constant)
    clicks = []
    for n, each in enumerate(asked):
        worst = int(sampled[each.group].z_GK[list(each.rows), 0].argmin())
        clicks.append(Click(each.question, "ann", "best", worst, tuple(range(4)), 1.0, n + 1))
    assert [task.against for task in teaching.progress(clicks).tasks] == [True, True]
