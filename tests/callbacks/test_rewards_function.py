"""FunctionReward: three styles of functions, what they may return, and every sentence it raises."""

import asyncio
import functools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import FunctionReward
from maestro_pl.errors import UserError
from maestro_pl.rollout import RewardScores, Rollout
from tests.support import make_rollout, reward_module
from tests.support import run as run_reward

CHAT = [{"role": "user", "content": "Name a fruit."}]


def two_prompts(**columns: list[Any]) -> Rollout:
    """Two prompts, a string and a chat, with two responses each."""
    fields = {
        "prompts": ["What is 2+2?", CHAT],
        "prompt_texts": ["<u>What is 2+2?", "<u>Name a fruit."],
        "response_ids": [[10], [11, 12], [13], [14]],
        "finish_reasons": ["stop", "length", "stop", "stop"],
    }
    columns = {"reference": ["4", None], "task": ["sums", "fruits"], **columns}
    return make_rollout(["4", "five", "apple", "stone"], group_size=2, fields=fields, **columns)


def run(function: str | Callable[..., Any], rollout: Rollout | None = None, **options: Any) -> RewardScores:
    reward = FunctionReward(function, **options)
    return run_reward(reward, rollout or two_prompts(), policy_steps=7)


# -- TRL --------------------------------------------------------------------------------------------------------------


def test_trl_gets_lists_as_trl_hands_them_over() -> None:
    seen: dict[str, Any] = {}

    def length(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [1.0, 2.0, 3.0, 4.0]

    scores = run(length, two_prompts(hint=["a", "b"]))
    assert scores.values_B.tolist() == [1, 2, 3, 4]
    assert scores.spec.name == "length"
    assert seen["prompts"] == ["What is 2+2?", "What is 2+2?", CHAT, CHAT]
    assert seen["completions"] == [
        "4",
        "five",
        [{"role": "assistant", "content": "apple"}],
        [{"role": "assistant", "content": "stone"}],
    ]
    assert seen["reference"] == ["4", "4", None, None]
    assert seen["task"] == ["sums", "sums", "fruits", "fruits"]
    assert seen["hint"] == ["a", "a", "b", "b"]
    assert seen["completion_ids"] == [[10], [11, 12], [13], [14]]
    assert seen["trainer_state"].global_step == 7


def test_trl_gets_only_what_it_takes_and_only_its_tasks() -> None:
    def starts(completions: list[str], hint: list[str]) -> list[float]:
        assert hint == ["a", "a"]
        return [float(c == "4") for c in completions]

    scores = run(starts, two_prompts(hint=["a", "b"]), tasks=["sums"])
    assert scores.values_B.tolist() == [1, 0, 0, 0]
    assert scores.mask_B.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "returned",
    [
        [1, None, True, math.nan],
        torch.tensor([1.0, math.nan, 1.0, math.nan]),
        [{"score": 1, "n": 3}, None, {"reward": True}, {"score": None}],
    ],
)
def test_trl_none_and_nan_do_not_apply(returned: Any) -> None:
    scores = run(lambda completions: returned)
    assert scores.mask_B.tolist() == [True, False, True, False]
    assert scores.values_B.tolist() == [1, 0, 1, 0]


def test_trl_dict_of_lists_gives_metrics() -> None:
    def judge(completions: list[str]) -> dict[str, Any]:
        further = {"words": [1, 2, None, 4], "why": ["a", "b", "c", "d"], "judge": "tiny", "seconds": 0.5}
        return {"score": [1, 0, 1, 0], **further}

    scores = run(judge)
    assert scores.values_B.tolist() == [1, 0, 1, 0]
    assert set(scores.metrics) == {"words", "seconds"}
    assert scores.metrics["seconds"].tolist() == [0.5] * 4  # one number for the batch is every response's
    assert scores.metrics["words"][[0, 1, 3]].tolist() == [1, 2, 4]
    assert math.isnan(scores.metrics["words"][2])


# -- one response -----------------------------------------------------------------------------------------------------


def test_one_response_is_filled_by_argument_name() -> None:
    calls: list[dict[str, Any]] = []

    def check(
        prompt: Any,
        completion: str,
        answer: str | None,
        response: str,
        prompt_text: str,
        completion_ids: list[int],
        finish_reason: str,
        task: str,
        hint: str,
        weight: float = 0.5,
    ) -> float:
        calls.append({key: value for key, value in locals().items() if key != "calls"})
        return weight if answer == completion else 0.0

    scores = run(check, two_prompts(hint=["a", "b"]))
    assert scores.values_B.tolist() == [0.5, 0, 0, 0]
    assert calls[1] == {
        "prompt": "What is 2+2?",
        "completion": "five",
        "answer": "4",
        "response": "five",
        "prompt_text": "<u>What is 2+2?",
        "completion_ids": [11, 12],
        "finish_reason": "length",
        "task": "sums",
        "hint": "a",
        "weight": 0.5,
    }
    assert calls[2]["prompt"] == CHAT
    assert calls[2]["completion"] == "apple"
    assert calls[2]["answer"] is None


def test_an_answer_column_goes_before_the_reference() -> None:
    scores = run(lambda completion, answer: completion == answer, two_prompts(answer=["five", "stone"]))
    assert scores.values_B.tolist() == [0, 1, 0, 1]


def test_columns_and_kwargs_fill_arguments() -> None:
    def check(completion: str, truth: str | None, scale: float) -> float:
        return scale * (completion == truth)

    scores = run(check, columns={"truth": "reference"}, kwargs={"scale": 3})
    assert scores.values_B.tolist() == [3, 0, 0, 0]
    bound = run(check, two_prompts(scale=[5, 5]), columns={"truth": "reference"}, kwargs={"scale": 2})
    assert bound.values_B.tolist() == [2, 0, 0, 0]  # what is bound goes before a column of that name


def test_positional_only_partial_and_callable_objects() -> None:
    class Scorer:
        def __call__(self, completion: str) -> float:
            return 2.0 * len(completion)

    def positional(completion: str, factor: float = 1.0, /) -> float:
        return factor * len(completion)

    assert run(positional).values_B.tolist() == [1, 4, 5, 5]
    assert run(Scorer()).values_B.tolist() == [2, 8, 10, 10]
    halved = run(functools.partial(lambda completion, factor: factor * len(completion), factor=0.5))
    assert halved.values_B.tolist() == [0.5, 2, 2.5, 2.5]
    assert halved.spec.name == "function"


def test_dict_of_one_response_gives_metrics() -> None:
    def check(completion: str) -> dict[str, Any]:
        return {"reward": len(completion), "vowels": sum(c in "aeiou" for c in completion), "note": "x", "list": [1]}

    scores = run(check)
    assert scores.values_B.tolist() == [1, 4, 5, 5]
    assert set(scores.metrics) == {"vowels"}
    assert scores.metrics["vowels"].tolist() == [0, 2, 2, 2]


def test_coroutines_run_together_even_inside_a_running_loop() -> None:
    running: list[int] = []

    async def judge(completion: str) -> float:
        running.append(len(running))
        await asyncio.sleep(0.01)
        assert len(running) == 4  # all four had started before the first went on
        return len(completion)

    async def notebook() -> RewardScores:
        return run(judge)

    assert asyncio.run(notebook()).values_B.tolist() == [1, 4, 5, 5]


def test_a_coroutine_of_trl_style() -> None:
    async def judge(completions: list[Any]) -> list[float]:
        await asyncio.sleep(0)
        return [float(i) for i in range(len(completions))]

    assert run(judge).values_B.tolist() == [0, 1, 2, 3]


# -- verl -------------------------------------------------------------------------------------------------------------


def test_verl_gets_its_four_arguments_and_needs_a_ground_truth() -> None:
    calls: list[tuple[Any, ...]] = []

    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
        calls.append((data_source, solution_str, ground_truth, extra_info["hint"]))
        return {"score": float(solution_str == ground_truth), "acc": True, "pred": solution_str}

    scores = run(compute_score, two_prompts(hint=["a", "b"]))
    assert calls == [("sums", "4", "4", "a"), ("sums", "five", "4", "a")]
    assert scores.values_B.tolist() == [1, 0, 0, 0]
    assert scores.mask_B.tolist() == [True, True, False, False]
    assert scores.metrics["acc"][:2].tolist() == [1, 1]
    assert set(scores.metrics) == {"acc"}


def test_verl_reads_the_columns_of_its_own_data_sets() -> None:
    rollout = two_prompts(
        data_source=["gsm", "gsm"],
        reward_model=[{"ground_truth": "five"}, {"ground_truth": "stone"}],
        extra_info=[{"index": 0}, {"index": 1}],
    )

    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> float:
        assert data_source == "gsm"
        return extra_info["index"] + 10 * (solution_str == ground_truth)

    assert run(compute_score, rollout).values_B.tolist() == [0, 10, 1, 11]
    assert run(compute_score, rollout, columns={"ground_truth": "reference"}).mask_B.tolist() == [
        True,
        True,
        False,
        False,
    ]


# -- names and imports ------------------------------------------------------------------------------------------------


def test_a_function_of_a_file_and_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("CALLS = []\ndef short(completion):\n    return -len(completion)\n")
    assert run(f"{tmp_path}/my_rewards.py:short").values_B.tolist() == [-1, -4, -5, -5]
    monkeypatch.chdir(tmp_path)
    assert run("my_rewards.py:short").spec.name == "short"
    one, two = FunctionReward("my_rewards.py:short"), FunctionReward("./my_rewards.py:short", name="again")
    assert one.function is two.function  # one module for one file
    monkeypatch.syspath_prepend(tmp_path)
    assert run("my_rewards.short", name="x").values_B.tolist() == [-1, -4, -5, -5]
    monkeypatch.delitem(sys.modules, "my_rewards")


def test_imports_that_fail_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_rewards.py").write_text("def f(completion):\n    return 1\nX = 3\nclass C: pass\n")
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "raising_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target, sentence in {
        "f": "neither of the two forms",
        "rewards.txt:f": "neither of the two forms",
        f"{tmp_path}/none.py:f": r"none.py' of a reward function is not there",
        f"{tmp_path}/bad_rewards.py:g": rf"g': {tmp_path}/bad_rewards\.py has no 'g'; its functions are \['f'\]",
        f"{tmp_path}/bad_rewards.py:X": "is a int, not a function",
        f"{tmp_path}/bad_rewards.py:C": "is a class",
        f"{tmp_path}/raising_rewards.py:f": r"zero \(.*/raising_rewards\.py:1\)",
        f"{tmp_path}/broken_rewards.py:f": "failed: ModuleNotFoundError: No module named 'nothing_of_that_name'",
        "bad_rewards.g": "bad_rewards has no 'g'",
        "no_such_package.rewards.f": "there is no module 'no_such_package': install it, or name a file",
        "broken_rewards.f": "importing broken_rewards failed: No module named 'nothing_of_that_name'",
        "raising_rewards.f": "importing raising_rewards failed: ZeroDivisionError",
    }.items():
        with pytest.raises(UserError, match=sentence):
            FunctionReward(target)


def test_styles_are_told_apart_or_asked_for() -> None:
    assert FunctionReward(lambda prompts: [0]).style == "trl"
    assert FunctionReward(lambda response, **rest: 0).style == "per_response"
    assert FunctionReward(lambda solution_str, ground_truth: 0).style == "verl"
    with pytest.raises(UserError, match=r"takes \(text\), which tells no style of reward function"):
        FunctionReward(lambda text: 0)
    with pytest.raises(UserError, match=r"tells no style"):
        FunctionReward(lambda **everything: 0)
    everything = run(lambda **everything: [float(len(c)) for c in everything["completions"]], style="trl")
    assert everything.values_B.tolist() == [1, 4, 1, 1]
    with pytest.raises(UserError, match="style is 'TRL', expected one of auto, trl, per_response, verl"):
        FunctionReward(lambda completion: 0, style="TRL")  # type: ignore[arg-type]


def test_names_the_function_does_not_take() -> None:
    with pytest.raises(UserError, match=r"kwargs names \['scale'\], which .* does not take; it takes \['completion'\]"):
        FunctionReward(lambda completion: 0, kwargs={"scale": 1})
    with pytest.raises(UserError, match=r"columns names \['truth'\]"):
        FunctionReward(lambda completion: 0, columns={"truth": "reference"})
    with pytest.raises(UserError, match="is a int, not a function"):
        FunctionReward(3)  # type: ignore[arg-type]


# -- what goes wrong in a call ----------------------------------------------------------------------------------------


def test_a_missing_argument_names_the_columns_there_are() -> None:
    sentence = (
        r"needs an argument 'solution', which is neither a column of the data \(\['hint', 'reference', 'task'\]\)"
    )
    for function in (lambda completion, solution: 0, lambda completions, solution: [0]):
        with pytest.raises(UserError, match=sentence):
            run(function, two_prompts(hint=["a", "b"]))
    with pytest.raises(UserError, match="no column 'hint'"):
        run(lambda completion, solution: 0, columns={"solution": "hint"})


def test_an_exception_names_reward_row_and_place() -> None:
    def fragile(completion: str) -> float:
        return {"4": 1.0, "five": 2.0}[completion]

    with pytest.raises(
        UserError, match=r"Reward 'fragile': .*fragile raised KeyError: 'apple' \(.*\.py:\d+\)"
    ) as caught:
        run(fragile)
    assert "response 2 of the batch (prompt 'Name a fruit.', response 'apple')" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)

    async def later(completion: str) -> float:
        await asyncio.sleep(0)
        return fragile(completion)

    with pytest.raises(UserError, match="raised KeyError: 'apple'") as caught:
        run(later)
    assert "response 2 of the batch" in str(caught.value)

    def batch(completions: list[Any]) -> list[float]:
        raise RuntimeError("no server")

    with pytest.raises(UserError, match=r"raised RuntimeError: no server .* for 4 responses, the first response 0"):
        run(batch)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda completions: [1.0, 2.0], "returned 2 values for 4 responses"),
        (lambda completions: 1.0, "returned a float for 4 responses: return a list"),
        (lambda completions: None, "returned a NoneType for 4 responses"),
        (lambda completions: {"score": [1.0]}, "key 'score', returned 1 values for 4 responses"),
        (
            lambda completions: {"other": [1.0] * 4},
            r"a dict with \['other'\] for response 0 .* under 'score' or 'reward'",
        ),
        (lambda completion: "good", r"Reward 'function' returned 'good' \(str\) for response 0 of the batch"),
        (lambda completion: math.inf, r"returned inf \(float\) for response 0 .*must be finite"),
        (lambda completion: [1.0], r"returned \[1.0\] \(list\) for response 0"),
        (lambda completion: {"points": 1}, r"a dict with \['points'\] for response 0"),
        (lambda completion: {"score": 1, "n": math.inf}, r"metric 'n', returned inf"),
    ],
)
def test_returns_that_cannot_be_used(function: Callable[..., Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(function)


# -- the documentation ------------------------------------------------------------------------------------------------


def test_the_examples_of_the_documentation_run() -> None:
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    functions, novelty = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    space: dict[str, Any] = {}
    exec(functions + novelty, space)
    rollout = two_prompts()
    rollout.prompts, rollout.responses = ["p", "q"], ["please", "4", "x", "x"]
    assert run(space["polite"], rollout).values_B.tolist() == [1, 0, 0, 0]
    assert run(space["lengths"], rollout).values_B.tolist() == [-6, -1, -1, -1]
    assert run(space["compute_score"], rollout).values_B.tolist() == [0, 1, 0, 0]
    reward = space["NoveltyReward"](name="novelty", tasks=["sums", "fruits"])
    reward.on_train_batch_start(None, reward_module(), {"rollout": rollout}, 0)
    assert rollout.rewards["novelty"].values_B.tolist() == [1, 1, 0, 0]
