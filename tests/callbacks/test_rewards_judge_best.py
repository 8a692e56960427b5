"""JudgeReward that is asked once for the best of a group: what it is shown, and what its answers come to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from callbacks import JudgeReward
from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge.prompts import JudgePrompt, load_prompts, make_prompt
from maestro_pl.rollout import Choice, Rollout
from tests.support import Server, make_rollout, reward_module


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.yaml"
    entries = {
        "default": {"mode": "best", "prompt": "{prompt}|{reference}|{answers}"},
        "single": {"prompt": "{answer}"},
    }
    file.write_text(yaml.safe_dump(entries))
    return str(file)


def make_reward(server: Server, prompts: str, **options: Any) -> JudgeReward:
    quick: dict[str, Any] = {"backoff_s": 0.01, "prompts": prompts, "role": "anchor"}
    reward = JudgeReward("m", endpoint=server.url, **(quick | options))

    class Trainer:
        callbacks = [type("Writer", (Callback,), {"writes_rollout": True})(), reward]
        strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

    reward.setup(Trainer, None, "fit")  # type: ignore[arg-type]
    return reward


def ask(reward: JudgeReward, rollout: Rollout, **module: Any) -> Any:
    reward.on_train_batch_start(None, reward_module(**module), {"rollout": rollout}, 0)  # type: ignore[arg-type]
    return rollout.rewards["judge"]


def letter_of(body: dict[str, Any], text: str) -> str:
    """Under which letter the judge sees a response."""
    found = re.search(rf"<answer_([A-Z])>\n{text}\n", body["messages"][-1]["content"])
    assert found
    return found[1]


def test_one_question_a_group_and_its_letter_is_the_best(server: Server, prompts: str) -> None:
    server.answer = lambda body, number: f"Hm.\nVerdict: {letter_of(body, 'good')}"
    rollout = make_rollout(["bad", "good", "ugly", "good", "b", "c"], group_size=3, reference=["r", "s"])
    scores = ask(make_reward(server, prompts), rollout)
    assert scores.choices == [Choice((0, 1, 2), (1, 0, 1)), Choice((3, 4, 5), (0, 1, 1))]
    assert not scores.mask_B.any()
    assert len(server.bodies) == 2
    assert scores.texts["rank"] == [1, 0, 1, 0, 1, 1]
    assert float(scores.metrics["failed"].nansum()) == 0


def test_the_order_is_shuffled_and_the_same_again(server: Server, prompts: str) -> None:
    server.answer = lambda body, number: "A"
    for n in range(16):
        ask(make_reward(server, prompts), make_rollout([f"x{n}", "y", "z"], group_size=3, reference=["r"]))
    letters = {letter_of(body, "y") for body in server.bodies}
    assert letters == {"A", "B", "C"}
    again = len(server.bodies)
    ask(make_reward(server, prompts), make_rollout(["x0", "y", "z"], group_size=3, reference=["r"]))
    assert server.bodies[again]["messages"] == server.bodies[0]["messages"]


def test_both_orders_that_disagree_tie(server: Server, prompts: str) -> None:
    server.answer = lambda body, number: "Verdict: A"  # whatever comes first
    (choice,) = ask(make_reward(server, prompts, orders=2), rollout := _three()).choices
    assert sorted(choice.ranks) == [0, 0, 1]
    assert len(server.bodies) == 2
    firsts = [re.search(r"<answer_A>\n(\w)", body["messages"][-1]["content"]) for body in server.bodies]
    named = {found[1] for found in firsts if found}
    assert named == {rollout.responses[i] for i, rank in enumerate(choice.ranks) if rank == 0}


def _three() -> Rollout:
    return make_rollout(["x", "y", "z"], group_size=3, reference=["r"])


@pytest.mark.parametrize("reply", ["Verdict: none", "tie", '{"verdict": "neither"}', "Verdict: all bad"])
def test_none_is_no_difference(server: Server, prompts: str, reply: str) -> None:
    server.answer = lambda body, number: reply
    assert ask(make_reward(server, prompts), _three()).choices == [Choice((0, 1, 2), (0, 0, 0))]


def test_a_reply_that_names_no_response_is_asked_again_and_then_failed(server: Server, prompts: str) -> None:
    server.answer = lambda body, number: "Verdict: D"
    with pytest.warns(UserWarning, match="malformed"):
        scores = ask(make_reward(server, prompts), _three())
    assert scores.choices == []
    assert scores.metrics["failed"].tolist() == [1.0, 1.0, 1.0]
    assert "one letter of A, B, C, or none" in server.bodies[1]["messages"][-1]["content"]


def test_tasks_with_scores_stand_beside_those_with_choices(server: Server, prompts: str) -> None:
    server.answer = lambda body, number: "Verdict: correct" if "|" not in body["messages"][-1]["content"] else "A"
    rollout = make_rollout(["a", "b", "c", "d"], group_size=2, reference=["r", "s"], task=["single", "other"])
    scores = ask(make_reward(server, prompts), rollout)
    assert scores.mask_B.tolist() == [True, True, False, False]
    assert [choice.rows for choice in scores.choices] == [(2, 3)]


def test_only_what_is_shown_is_asked_about(server: Server, prompts: str) -> None:
    server.answer = lambda body, number: "A"
    shown = torch.tensor([True, False, True])
    scores = ask(make_reward(server, prompts), _three(), shown=lambda rollout: shown)
    assert [choice.rows for choice in scores.choices] == [(0, 2)]


def test_an_evaluation_does_not_ask(server: Server, prompts: str) -> None:
    reward, rollout = make_reward(server, prompts), _three()
    reward.on_test_batch_start(None, reward_module(), {"rollout": rollout}, 0)  # type: ignore[arg-type]
    assert server.bodies == []
    assert not rollout.rewards["judge"].mask_B.any()


def test_a_choice_is_no_reward(server: Server, prompts: str) -> None:
    with pytest.raises(UserError, match="list it under `anchors`"):
        ask(make_reward(server, prompts, role="train"), _three())


def test_the_packaged_prompts_and_bad_ones() -> None:
    (prompt,) = load_prompts("best").values()
    assert isinstance(prompt, JudgePrompt)
    assert prompt.among(3).schema["properties"]["verdict"]["enum"] == ["A", "B", "C", "none"]
    with pytest.raises(UserError, match=r"must show \{answers\}"):
        make_prompt({"mode": "best", "prompt": "{answer}"}, "here")
    with pytest.raises(UserError, match="27 responses at once"):
        prompt.among(27)
    with pytest.raises(UserError, match="orders is 3"):
        JudgeReward("m", orders=3)
