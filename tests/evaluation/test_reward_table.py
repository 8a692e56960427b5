"""The table of the rewards at the start of a run."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import ExactMatchReward, FormatReward, FunctionReward, RewardTable
from maestro_pl.evaluation.reward_table import never_applied, reward_row, reward_table
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import make_rollout, reward_module


def scores_of(*values: float | None) -> RewardScores:
    return RewardScores.from_list(RewardSpec("mine", "train", "zscore"), values)


def test_a_row_counts_responses_and_groups() -> None:
    # groups of three: told apart; all the same; one score only; none
    scores = scores_of(0, 1, 2, 3, 3, 3, 5, None, None, None, None, None)
    row = reward_row(scores, 3, range(12), ["a"])
    assert (row.n, row.applied, row.groups, row.told_apart) == (12, 7, 2, 1)
    assert row.mean == pytest.approx(17 / 7)
    assert row.std == pytest.approx((57 / 7 - (17 / 7) ** 2) ** 0.5)
    table = reward_table([row, reward_row(scores_of(None, None), 2, range(2))])
    assert table.startswith("reward")
    cells = [" ".join(line.split()) for line in table.splitlines()]
    assert cells[1:] == ["mine train zscore a 7 of 12 2.43 1.5 1 of 2", "mine train zscore all 0 of 2 - - -"]


def test_large_scores_with_one_mean_are_told_apart() -> None:
    row = reward_row(scores_of(1e8, 1e8 + 8), 2, range(2))
    assert (row.told_apart, row.std) == (1, 4)


def test_the_sentence_of_a_reward_that_applies_to_nothing() -> None:
    row = reward_row(scores_of(None, None), 2, range(2))
    sentence = never_applied(row, "no row has the column 'reference'")
    assert sentence is not None
    assert sentence.startswith(
        "Reward 'mine' applied to 0 of the first 2 responses, because no row has the column 'reference'."
    )
    assert str(never_applied(row, None)).startswith("Reward 'mine' applied to 0 of the first 2 responses. ")
    assert never_applied(reward_row(scores_of(None, 1), 2, range(2)), None) is None
    assert never_applied(reward_row(scores_of(None, None), 2, []), None) is None  # no row of its tasks: not asked


def batch_of(callbacks: list[Any], rollout: Rollout) -> None:
    trainer: Any = SimpleNamespace(
        callbacks=callbacks, is_global_zero=True, global_rank=0, received_sigterm=False, num_training_batches=1,
        current_epoch=0, max_steps=1, max_epochs=-1,
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(completed=0)))
        ),
    )  # fmt: skip
    module = reward_module(policy_steps=0)
    for callback in callbacks:
        callback.on_train_batch_start(trainer, module, {"rollout": rollout}, 0)


def forgot(completion: str) -> None:
    len(completion)


def answered(completions: list[str], reference: list[str | None]) -> list[float | None]:
    return [None if a is None else 1.0 for a in reference]


def compute_score(solution_str: str, ground_truth: str) -> float:
    return 1.0


def test_each_reward_that_applies_to_nothing_is_said_once_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [
        FormatReward(),
        ExactMatchReward(),
        *(FunctionReward(function) for function in (forgot, answered, compute_score)),
        FunctionReward(lambda completion: None, name="elsewhere", tasks=["b"]),
        RewardTable(),
    ]
    with pytest.warns(UserWarning, match="applied to 0") as said:
        batch_of(callbacks, make_rollout(["x", "y", "z", "w"], group_size=2))
    texts = [str(warning.message) for warning in said]
    assert [text.split("'")[1] for text in texts] == ["exact_match", "forgot", "answered", "compute_score"]
    for place in (0, 2, 3):
        assert "0 of the first 4 responses, because no row has the column 'reference'" in texts[place]
    assert "forgot returned None for every one of them (does it end with `return`?)" in texts[1]
    printed = capsys.readouterr().out
    assert printed.startswith("Rewards on the first 4 responses:\nreward ")
    assert len(printed.splitlines()) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch_of(callbacks, make_rollout(["x", "y"], group_size=2))
    with pytest.warns(UserWarning, match="'elsewhere' applied to 0 of the first 2 responses"):
        batch_of(callbacks, make_rollout(["x", "y"], group_size=2, task=["b"]))
    assert capsys.readouterr().out == ""


def test_a_reward_that_applies_to_some_is_not_warned_of() -> None:
    rollout = make_rollout(["4", "5", "x", "y"], group_size=2, reference=["4", None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch_of([ExactMatchReward(), RewardTable()], rollout)
