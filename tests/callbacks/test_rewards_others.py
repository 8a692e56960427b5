"""Code of others in a reward: what it may change, raise, return and how long it may take."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from callbacks import FunctionReward, Reward
from callbacks.records import records
from maestro_pl.errors import UserError
from maestro_pl.rollout import Rollout
from maestro_pl.run.event_loop import run_together
from maestro_pl.run.others import Raised, Terminated, TimeLimit, within
from tests.support import given, listed, make_rollout, reward_module, run

CHAT = [{"role": "user", "content": "Name a fruit."}]


def rollout_of_four(**columns: Any) -> Rollout:
    """A text prompt and a chat prompt, two responses each."""
    fields = {"prompts": ["2+2?", [dict(CHAT[0])]], "prompt_texts": ["<u>2+2?", "<u>Name a fruit."]}
    given = {"reference": ["4", "apple"], "task": ["sums", "fruits"], **columns}
    return make_rollout(["4", "five", "apple", "stone"], group_size=2, fields=fields, **given)


# -- what it gets is a copy -------------------------------------------------------------------------------------------


def batch(prompts: Any, completions: Any, completion_ids: Any, info: Any, reference: Any, **_: Any) -> list[float]:
    for ids in completion_ids:
        ids.append(99)
    prompts[2][0]["content"] = completions[3][0]["content"] = "changed"
    info[0].pop("n")
    prompts.clear()
    reference.clear()
    return [1.0, 2.0, 3.0, 4.0]


def one(prompt: Any, completion: str, completion_ids: list[int], info: dict[str, Any]) -> float:
    completion_ids.append(99)
    if isinstance(prompt, list):
        prompt[0]["content"] = "changed"
    return float(info.pop("n"))  # the next response of the group has it again


def compute_score(solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    return float(extra_info["info"].pop("n"))


def score_all(solution_strs: Any, ground_truths: Any, extra_infos: Any) -> list[float]:
    return [float(extra["info"].pop("n")) for extra in extra_infos]


def of_queries(queries: Any, prompts: Any, labels: Any, info: Any) -> list[float]:
    return [float(values.pop("n")) for values in info]


class Eater(Reward):
    def score(self, rollout: Rollout, rows: list[int], pl_module: Any) -> list[float]:
        rows.reverse()
        rollout.response_ids[0].append(99)
        rollout.responses.clear()
        rollout.columns["info"][0].pop("n")
        rollout.columns.pop("task")
        rollout.prompts[1][0]["content"] = "changed"  # type: ignore[index]
        assert rollout.logps_T is not None
        rollout.logps_T.zero_()
        return [1.0] * 4


@pytest.mark.parametrize("function", [batch, one, compute_score, score_all, of_queries, None])
def test_what_a_reward_changes_stays_with_it(function: Callable[..., Any] | None) -> None:
    rollout = rollout_of_four(info=[{"n": 5}, {"n": 6}])
    rollout.logps_T = torch.ones(15)
    ids = [list(ids) for ids in rollout.response_ids]
    run(Eater() if function is None else FunctionReward(function), rollout, policy_steps=0)
    assert rollout.response_ids == ids
    assert rollout.prompts == ["2+2?", CHAT]
    assert rollout.responses == ["4", "five", "apple", "stone"]
    assert rollout.columns == {
        "info": [{"n": 5}, {"n": 6}], "reference": ["4", "apple"], "task": ["sums", "fruits"],
    }  # fmt: skip
    assert rollout.logps_T.tolist() == [1] * 15
    (scores,) = rollout.rewards.values()
    if function in (one, compute_score, score_all, of_queries):
        assert scores.values_B.tolist() == [5, 5, 6, 6]


# -- random state and working folder ----------------------------------------------------------------------------------


def test_draws_of_a_reward_change_nothing_of_the_run_and_differ_by_batch(tmp_path: Path) -> None:
    def draws(completions: list[Any]) -> list[float]:
        os.chdir(tmp_path)
        return [random.random(), float(np.random.sample()), float(torch.rand(())), 0.0]  # noqa: NPY002

    def batch_of(number: int) -> list[float]:
        rollout = rollout_of_four()
        module = reward_module(policy_steps=0, batches_done=number)
        reward.on_train_batch_start(None, module, {"rollout": rollout}, 0)  # type: ignore[arg-type]
        return rollout.rewards["draws"].values_B.tolist()

    reward, folder = FunctionReward(draws), os.getcwd()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = (random.random(), np.random.sample(), torch.rand(()).item())  # noqa: NPY002
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    first, second = batch_of(0), batch_of(1)
    assert os.getcwd() == folder
    assert (random.random(), np.random.sample(), torch.rand(()).item()) == expected  # noqa: NPY002
    assert first != second
    random.random()
    assert batch_of(1) == second  # a resumed run's batch draws what the uninterrupted one's did


# -- what it raises ---------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., Any]:
    def bad(completion: str) -> float:
        raise error

    return bad


def raising_later(error: BaseException) -> Callable[..., Any]:
    async def bad(completion: str) -> float:
        await asyncio.sleep(0)
        raise error

    return bad


def raising_batch(error: BaseException) -> Callable[..., Any]:
    def bad(completions: list[Any]) -> list[float]:
        raise error

    return bad


ERRORS = [
    (SystemExit("no API key"), "SystemExit: no API key"),
    (SystemExit(0), "SystemExit: 0"),
    (SystemExit(), "SystemExit "),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit(), "GeneratorExit"),
    (ImportError("no nltk"), "ImportError: no nltk"),
    (MemoryError("all gone"), "MemoryError: all gone"),
    (RecursionError("deep"), "RecursionError: deep"),
    (KeyError("apple"), "KeyError: 'apple'"),
    (StopIteration("x"), "StopIteration: x"),
    (TimeoutError(), "TimeoutError "),
    (BaseException("bare"), "BaseException: bare"),
    (OSError(28, "No space left on device"), r"OSError: \[Errno 28\] No space left on device"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "UnicodeDecodeError: 'utf-8'"),
    (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
]


@pytest.mark.parametrize("make", [raising, raising_batch, raising_later])
@pytest.mark.parametrize(
    ("error", "sentence"), ERRORS, ids=lambda value: None if isinstance(value, str) else repr(value)
)
def test_whatever_a_function_raises_names_it(make: Callable[..., Any], error: BaseException, sentence: str) -> None:
    place = r"test_rewards_others\.py:\d+"
    if make is raising_later and isinstance(error, StopIteration):
        sentence, place = "RuntimeError: coroutine raised StopIteration", ""  # Python's own
    with pytest.raises(UserError, match=rf"Reward 'bad': .*bad raised {sentence}.*{place}") as caught:
        run(FunctionReward(make(error)), rollout_of_four(), policy_steps=0)
    assert "response 0 of the batch (prompt '2+2?', response '4')" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "sentence"), ERRORS, ids=lambda value: None if isinstance(value, str) else repr(value)
)
def test_whatever_a_class_raises_names_it(error: BaseException, sentence: str) -> None:
    class Bad(Reward):
        def score(self, rollout: Rollout, rows: list[int], pl_module: Any) -> list[float]:
            raise error

    with pytest.raises(UserError, match=rf"Reward 'bad': .*Bad.score raised {sentence}.* for 4 responses, the first"):
        run(Bad(), rollout_of_four())


def test_a_cancelled_coroutine_is_no_result() -> None:
    async def bad(completion: str) -> float:
        raise asyncio.CancelledError

    with pytest.raises(UserError, match="bad raised CancelledError"):
        run(FunctionReward(bad), rollout_of_four())


@pytest.fixture
def foreground() -> Iterator[None]:
    """A process that was started in the background of a shell ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_of_the_user_stays_one() -> None:
    def slow(completion: str) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return 0.0

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(FunctionReward(slow), rollout_of_four())
    assert signal.getsignal(signal.SIGINT) is handler


# -- on_error ---------------------------------------------------------------------------------------------------------


def test_skipped_errors_do_not_apply_are_counted_and_said_once() -> None:
    def fragile(completion: str) -> float:
        return {"4": 1.0, "stone": 0.5}[completion]

    reward = FunctionReward(fragile, on_error="skip")
    with pytest.warns(
        UserWarning, match=r"fragile raised KeyError: 'five' .* left out .*reward/fragile/errors"
    ) as said:
        scores = run(reward, rollout_of_four())
    assert listed(scores) == [1.0, None, None, 0.5]
    assert scores.metrics["errors"].tolist() == [0, 1, 1, 0]
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert listed(run(reward, rollout_of_four())) == [1.0, None, None, 0.5]


def test_skipped_batches_and_coroutines_and_exits_that_are_not_skipped() -> None:
    batch_reward = FunctionReward(raising_batch(ValueError("x")), on_error="skip")
    later = FunctionReward(raising_later(ValueError("x")), on_error="skip")
    for reward in (batch_reward, later):
        with pytest.warns(UserWarning, match="raised ValueError: x"):
            scores = run(reward, rollout_of_four(), policy_steps=0)
        assert listed(scores) == [None] * 4
        assert scores.metrics["errors"].tolist() == [1] * 4
    with pytest.raises(UserError, match="SystemExit: no API key"):
        run(FunctionReward(raising(SystemExit("no API key")), on_error="skip"), rollout_of_four())
    fine = run(FunctionReward(lambda completion: 1.0, on_error="skip"), rollout_of_four())
    assert fine.metrics["errors"].tolist() == [0] * 4


def test_options_that_cannot_be_used() -> None:
    with pytest.raises(UserError, match="on_error is 'zero', expected one of stop, skip"):
        FunctionReward(lambda completion: 0, on_error="zero")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="timeout is 0, expected seconds above 0, or null"):
        FunctionReward(lambda completion: 0, timeout=0)
    assert FunctionReward(lambda completion: 0).call_timeout == 600


# -- a call that does not come back -----------------------------------------------------------------------------------


def sleeps(completion: str) -> float:
    time.sleep(600 if completion == "4" else 0)
    return 1.0


def spins(completion: str) -> float:
    while completion == "4":
        try:
            completion.upper()
        except Exception:
            continue
    return 1.0


def waits(completion: str) -> float:
    if completion == "4":
        threading.Event().wait()
    return 1.0


async def awaits(completion: str) -> float:
    if completion == "4":
        await asyncio.sleep(600)
    return 1.0


@pytest.mark.parametrize("function", [sleeps, spins, waits, awaits])
def test_a_call_that_does_not_come_back_ends_in_a_sentence(function: Callable[..., Any]) -> None:
    sentence = rf"{function.__name__} did not come back within 0.2 s for response 0 of the batch"
    with pytest.raises(UserError, match=sentence):
        run(FunctionReward(function, timeout=0.2), rollout_of_four())
    with pytest.warns(UserWarning, match=sentence):
        scores = run(FunctionReward(function, timeout=0.2, on_error="skip"), rollout_of_four())
    # coroutines run together: the others had their time
    assert listed(scores) == ([None, 1, 1, 1] if function is awaits else [None] * 4)


def test_sigterm_ends_a_hung_call_after_its_grace() -> None:
    with pytest.raises(Terminated, match=r"0\.05"):
        within(lambda: time.sleep(600), None, lambda: True, grace=0.05)
    assert within(lambda: 3, None, lambda: True, grace=600) == 3
    trainer = SimpleNamespace(received_sigterm=True)
    reward = FunctionReward(sleeps)
    reward._trainer = trainer
    assert reward.stopping()


def test_limits_nest_and_leave_nothing_behind() -> None:
    with pytest.raises(TimeLimit, match=r"0\.1"):
        within(lambda: within(lambda: time.sleep(600), 0.1), 600)
    with pytest.raises(TimeLimit, match=r"0\.1"):
        within(lambda: within(lambda: time.sleep(600), 600), 0.1)
    os.kill(os.getpid(), signal.SIGUSR2)  # a late signal: nobody waits for it, and the process goes on
    assert within(lambda: 5, 600) == 5


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_reaches_a_coroutine_that_hangs() -> None:
    seen: list[Any] = []

    async def hangs(completion: Any) -> float:
        seen.append(completion)
        if len(seen) == 1:  # one Ctrl-C for the batch
            threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()
        await asyncio.sleep(600)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run(FunctionReward(hangs, timeout=None), rollout_of_four())
    assert run_together([asyncio.sleep(0, 3)]) == [3]  # the loop goes on


# -- one event loop ---------------------------------------------------------------------------------------------------


def test_what_binds_itself_to_a_loop_works_in_every_step() -> None:
    lock, limit, loops = asyncio.Lock(), asyncio.Semaphore(2), set()

    async def judge(completion: str) -> float:
        async with lock:
            await asyncio.sleep(0)
        async with limit:
            await asyncio.sleep(0)
        loops.add(id(asyncio.get_running_loop()))
        return 1.0

    reward = FunctionReward(judge)
    for _ in range(3):
        assert given(reward, rollout_of_four()) == [1.0] * 4
    assert given(FunctionReward(judge, name="other"), rollout_of_four()) == [1.0] * 4
    assert len(loops) == 1


def test_a_blocked_loop_is_replaced() -> None:
    release = threading.Event()

    async def blocks() -> None:
        release.wait()

    async def fine() -> int:
        return 3

    with pytest.raises(TimeLimit):
        within(lambda: run_together([blocks()]), 0.2)
    assert run_together([fine()]) == [3]
    release.set()


def test_exits_in_a_coroutine_leave_the_loop_alive() -> None:
    async def exits() -> None:
        raise SystemExit(1)

    async def fine() -> int:
        return 3

    (raised, three) = run_together([exits(), fine()])
    assert isinstance(raised, Raised)
    assert isinstance(raised.error, SystemExit)
    assert three == 3
    assert run_together([fine()]) == [3]


# -- what it returns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        lambda: (value for value in [1, 0.5, None, True]),
        lambda: iter([1, 0.5, None, True]),
        lambda: torch.tensor([[1.0], [0.5], [math.nan], [1.0]]),
        lambda: np.array([[1.0], [0.5], [math.nan], [1.0]]),
        lambda: [Fraction(1), Fraction(1, 2), None, Fraction(1)],
        lambda: {"score": torch.tensor([[1.0], [0.5], [math.nan], [1.0]])},
    ],
)
def test_generators_columns_and_fractions(returned: Callable[[], Any]) -> None:
    class Given(Reward):
        def score(self, rollout: Rollout, rows: list[int], pl_module: Any) -> Any:
            return returned()

    scores = run(FunctionReward(lambda completions: returned()), rollout_of_four(), policy_steps=0)
    assert listed(scores) == [1, 0.5, None, 1]
    if not isinstance(returned(), dict):
        assert given(Given(), rollout_of_four()) == [1, 0.5, None, 1]


def test_fractions_of_one_response() -> None:
    assert given(FunctionReward(lambda completion: Fraction(len(completion), 2)), rollout_of_four()) == [
        0.5,
        2,
        2.5,
        2.5,
    ]


def test_a_generator_function_that_yields_scores() -> None:
    def each(completions: list[Any]) -> Any:
        yield from (1.0, 2.0, 3.0, 4.0)

    assert run(FunctionReward(each), rollout_of_four(), policy_steps=0).values_B.tolist() == [1, 2, 3, 4]


# -- styles -----------------------------------------------------------------------------------------------------------


def trainer_with(callbacks: list[Any]) -> Any:
    """A Trainer's state in the middle of its second epoch."""
    progress = SimpleNamespace(current=SimpleNamespace(completed=3))
    return SimpleNamespace(
        num_training_batches=6, current_epoch=1, max_steps=20, max_epochs=-1, is_global_zero=True, global_rank=0,
        received_sigterm=False, fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        callbacks=callbacks,
    )  # fmt: skip


def test_trl_logs_and_its_trainer_state() -> None:
    seen: dict[str, Any] = {}

    def score(completions: Any, log_extra: Any, log_metric: Any, trainer_state: Any) -> list[float]:
        seen["state"] = trainer_state
        log_metric("accuracy", 0.25)
        log_metric("accuracy", 0.75)
        log_extra("words", [1, 2, None, 4])
        log_extra("verdict", ["a", "b", "c", None])
        return [1.0] * len(completions)

    trainer = trainer_with([])
    rollout, module = rollout_of_four(), reward_module(policy_steps=9)
    FunctionReward(score).on_train_batch_start(trainer, module, {"rollout": rollout}, 0)
    state, scores = seen["state"], rollout.rewards["score"]
    assert (state.global_step, state.max_steps, state.epoch) == (9, 20, 1.5)
    assert scores.metrics["accuracy"].tolist() == [0.5] * 4
    assert scores.metrics["words"][[0, 1, 3]].tolist() == [1, 2, 4]
    assert [row["noted"]["score"]["verdict"] for row in records(rollout)] == ["a", "b", "c", None]
    with pytest.raises(UserError, match="logged 1 values as 'x' for 4 responses"):
        run(FunctionReward(lambda completions, log_extra: log_extra("x", [1])), rollout_of_four(), policy_steps=0)


def test_chat_rewards_on_text_prompts() -> None:
    def last(completions: Any, prompts: Any) -> list[float]:
        assert prompts[0][-1] == {"role": "user", "content": "2+2?"}
        return [float(len(completion[0]["content"])) for completion in completions]

    def text(completion: str) -> float:
        return float(completion[-1]["content"] == "4")  # type: ignore[index]

    with pytest.raises(UserError, match="give completions: messages"):
        run(
            FunctionReward(lambda completions: [c[0]["content"] for c in completions]),
            rollout_of_four(),
            policy_steps=0,
        )
    got = run(FunctionReward(last, completions="messages"), rollout_of_four(), policy_steps=0)
    assert got.values_B.tolist() == [1, 4, 5, 5]
    assert given(FunctionReward(text, completions="messages"), rollout_of_four()) == [1, 0, 0, 0]
    with pytest.raises(UserError, match="give completions: text"):
        run(FunctionReward(lambda completions: [c.upper() for c in completions]), rollout_of_four(), policy_steps=0)
    lengths = run(
        FunctionReward(lambda completions: [len(c) for c in completions], completions="text"),
        rollout_of_four(),
        policy_steps=0,
    )
    assert lengths.values_B.tolist() == [1, 4, 5, 5]


def test_verifiers_functions() -> None:
    def correct(completion: Any, answer: str, state: dict[str, Any], parser: Any, info: Any) -> float:
        assert completion[-1] == {"role": "assistant", "content": parser.parse_answer(completion)}
        assert state["answer"] == answer == info["reference"]
        assert state["prompt"][-1]["role"] == "user"
        return float(parser.parse_answer(completion) == answer)

    def no_parser(completion: Any, state: dict[str, Any]) -> float:
        return float(completion[-1]["content"] == state["answer"])

    with pytest.raises(UserError, match="of verifiers says so with style: verifiers"):
        run(FunctionReward(no_parser), rollout_of_four())
    assert given(FunctionReward(no_parser, style="verifiers"), rollout_of_four()) == [1, 0, 1, 0]
    reward = FunctionReward(correct)
    assert reward.style == "verifiers"
    assert given(reward, rollout_of_four()) == [1, 0, 1, 0]


def test_functions_of_token_ids_are_trls() -> None:
    def soft_overlong_punishment_reward(completion_ids: Any, **kwargs: Any) -> list[float]:
        return [-float(len(ids) > 4) for ids in completion_ids]

    reward = FunctionReward(soft_overlong_punishment_reward)
    assert reward.style == "trl"
    assert run(reward, rollout_of_four(), policy_steps=0).values_B.tolist() == [0, 0, -1, -1]
    with pytest.raises(UserError, match="of one response says so with style: per_response"):
        run(FunctionReward(lambda completion_ids: len(completion_ids)), rollout_of_four(), policy_steps=0)


@pytest.mark.parametrize("name", ["predict_str", "model_output", "solution_str"])
def test_verl_by_its_other_names(name: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def compute_score({name}, ground_truth, **kwargs):\n    return {name} == ground_truth", space)
    reward = FunctionReward(space["compute_score"])
    assert reward.style == "verl"
    assert given(reward, rollout_of_four(reference=["4", None])) == [1, 0, None, None]


def test_verl_batched_leaves_out_what_has_no_truth() -> None:
    def compute_score(data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any) -> list[Any]:
        assert data_sources == ["sums"] * 2
        return [{"score": s == g, "n": len(s)} for s, g in zip(solution_strs, ground_truths, strict=True)]

    scores = run(FunctionReward(compute_score), rollout_of_four(reference=["4", None]), policy_steps=0)
    assert listed(scores) == [1, 0, None, None]
    assert scores.metrics["n"][:2].tolist() == [1, 4]


def test_openrlhf() -> None:
    def reward_func(queries: list[str], prompts: list[str], labels: list[str], **kwargs: Any) -> dict[str, Any]:
        assert queries[1] == "<u>2+2?five"
        assert prompts[1] == "<u>2+2?"
        right = torch.tensor([float(q.endswith(label)) for q, label in zip(queries, labels, strict=True)])
        return {"rewards": right, "scores": right / 2, "extra_logs": {"size": torch.tensor([1.0, 2, 3, 4])}}

    scores = run(FunctionReward(reward_func), rollout_of_four(), policy_steps=0)
    assert listed(scores) == [1, 0, 1, 0]
    assert scores.metrics["scores"].tolist() == [0.5, 0, 0.5, 0]
    assert scores.metrics["size"].tolist() == [1, 2, 3, 4]


# -- found by name ----------------------------------------------------------------------------------------------------


def test_a_reward_file_imports_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "far"
    folder.mkdir()
    (folder / "far_rewards.py").write_text("from far_neighbour import V\ndef f(completion):\n    return V\n")
    (folder / "far_neighbour.py").write_text("V = 2.0\n")
    (tmp_path / "near_rewards.py").write_text("def ident(completion):\n    return 3.0\n")
    (tmp_path / "bye_rewards.py").write_text("import sys\nsys.exit('no key')\n")
    (tmp_path / "bye_quietly.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert given(FunctionReward("far/far_rewards.py:f"), rollout_of_four()) == [2.0] * 4
    assert given(FunctionReward("near_rewards.ident"), rollout_of_four()) == [3.0] * 4
    with pytest.raises(UserError, match=r"bye_rewards\.py' failed: SystemExit: no key"):
        FunctionReward("bye_rewards.py:f")
    with pytest.raises(UserError, match="importing bye_quietly failed: SystemExit: 0"):
        FunctionReward("bye_quietly.f")
    for name in ("far_neighbour", "near_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# -- rewards that wait are under way together -------------------------------------------------------------------------


def batch_of(rewards: list[Any], seconds: dict[str, float] | None = None) -> dict[str, list[float | None]]:
    """The scores of a training batch, in the order of the columns; ``seconds`` gets those of the clock."""
    rollout, module = rollout_of_four(), reward_module(policy_steps=0)
    trainer = trainer_with(rewards)
    for reward in rewards:
        reward.on_train_batch_start(trainer, module, {"rollout": rollout}, 0)
    if seconds is not None:
        seconds.update(module.clock.seconds)
    return {name: listed(scores) for name, scores in rollout.rewards.items()}


def waiting(kind: str, mine: threading.Event, other: threading.Event) -> Any:
    """A reward that comes back when the other has begun."""

    def meet(completions: list[Any]) -> list[float]:
        mine.set()
        assert other.wait(5), "the other has not begun"
        return [float(len(text)) for text in ("a", "bb", "ccc", "dddd")]

    async def meet_later(completions: list[Any]) -> list[float]:
        mine.set()
        while not other.is_set():
            await asyncio.sleep(0.001)
        return [1.0, 2.0, 3.0, 4.0]

    class Meets(Reward):
        waits = True

        def score(self, rollout: Rollout, rows: list[int], pl_module: Any) -> list[float]:
            assert not torch.is_grad_enabled()
            return meet([])

    made = {
        "thread": lambda: FunctionReward(meet, waits=True, name="first"),
        "coroutine": lambda: FunctionReward(meet_later, name="first", timeout=20),
        "class": lambda: Meets(name="first"),
    }
    return made[kind]()


@pytest.mark.parametrize("first", ["thread", "coroutine", "class"])
@pytest.mark.parametrize("second", ["thread", "coroutine", "class"])
def test_rewards_that_wait_are_under_way_together(first: str, second: str) -> None:
    one, two = threading.Event(), threading.Event()
    rewards = [waiting(first, one, two), FunctionReward(ids, name="between"), waiting(second, two, one)]
    rewards[2].name = "last"
    seconds: dict[str, float] = {}
    scores = batch_of(rewards, seconds=seconds)
    assert list(scores) == ["first", "between", "last"]
    assert scores["first"] == scores["last"] == [1, 2, 3, 4]
    assert {"rewards", "reward/first", "reward/between", "reward/last"} == set(seconds)


def ids(completion_ids: list[list[int]]) -> list[float]:
    return [float(sum(row)) for row in completion_ids]


def test_what_computes_goes_on_while_another_waits_and_in_order() -> None:
    computed, order = threading.Event(), []

    def slow(completion: str) -> float:
        assert computed.wait(5), "nothing was computed meanwhile"
        return 1.0

    def computes(name: str) -> FunctionReward:
        def score(completions: list[Any]) -> list[float]:
            order.append(name)
            if name == "b":
                computed.set()
            return [2.0] * 4

        return FunctionReward(score, name=name)

    scores = batch_of([computes("a"), FunctionReward(slow, waits=True), computes("b")])
    assert (list(scores), order) == (["a", "slow", "b"], ["a", "b"])


def test_the_order_is_the_same_on_a_rank_without_rows_for_what_waits() -> None:
    """What rewards exchange between the ranks must meet its like."""
    orders = []
    for tasks in (None, ["absent"]):
        order: list[str] = []

        class Mine(Reward):
            def score(self, rollout: Rollout, rows: list[int], pl_module: Any) -> list[float]:
                order.append(self.name)  # noqa: B023
                return [0.0] * len(rows)

        def ours(completions: list[Any]) -> list[float]:
            order.append("ours")  # noqa: B023
            return [0.0] * len(completions)

        batch_of([FunctionReward(waiting_one, waits=True, tasks=tasks), Mine(name="mine"), FunctionReward(ours)])
        orders.append(order)
    assert orders[0] == orders[1]


def waiting_one(completion: str) -> float:
    return 1.0


class OnTopOfOurs(FunctionReward):
    """As it could be written before rewards waited: it reads what the one before it has scored."""

    def score(self, rollout: Rollout, rows: list[int], pl_module: Any) -> Any:
        before = rollout.rewards["ids"].values_B
        return [float(before[row]) + 1 for row in rows], {}


def test_a_class_on_top_of_one_that_waits_still_reads_those_before_it() -> None:
    async def answers(completion: str) -> float:
        return 1.0

    scores = batch_of([FunctionReward(ids), OnTopOfOurs(answers, name="on_top"), FunctionReward(answers)])
    assert scores["on_top"] == [value + 1 for value in scores["ids"] if value is not None]


def test_rewards_that_wait_leave_the_random_state_and_what_computes_as_they_are() -> None:
    def draws(completion: str) -> float:
        return random.random() + float(torch.rand(()))

    async def answers(completion: str) -> float:
        await asyncio.sleep(0)
        return float(len(completion))

    def ends_elsewhere(completion: str) -> float:
        random.seed(3)  # it should not
        return 1.0

    alone = batch_of([FunctionReward(draws)])
    torch.manual_seed(5)
    random.seed(5)
    expected, numbers, folder = torch.rand(3), random.random(), os.getcwd()
    torch.manual_seed(5)
    random.seed(5)
    scores = batch_of([FunctionReward(answers), FunctionReward(draws), FunctionReward(ends_elsewhere, waits=True)])
    assert (torch.rand(3).tolist(), random.random(), os.getcwd()) == (expected.tolist(), numbers, folder)
    assert scores["answers"] == [1, 4, 5, 5]
    without = batch_of([FunctionReward(answers), FunctionReward(draws)])
    assert without["draws"] == alone["draws"]


def test_the_first_error_of_the_list_is_shown_and_the_others_are_cancelled() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def endless(completion: str) -> float:
        begun.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 0.0

    def wrong(completion: str) -> float:
        assert begun.wait(5)
        raise ValueError("the first of the list")

    def wrong_at_once(completion: str) -> float:
        raise ValueError("the first of the clock")

    rewards = [
        FunctionReward(wrong, waits=True),
        FunctionReward(wrong_at_once, waits=True),
        FunctionReward(endless, timeout=None),
    ]
    state = random.getstate()
    with pytest.raises(UserError, match=r"Reward 'wrong': .* raised ValueError: the first of the list"):
        batch_of(rewards)
    assert cancelled.wait(5)
    assert random.getstate() == state

    begun.clear()
    cancelled.clear()
    with pytest.raises(UserError, match=r"Reward 'wrong': .* raised ValueError: the first of the list"):
        batch_of([FunctionReward(wrong), FunctionReward(endless, timeout=None)])  # one that computes
    assert cancelled.wait(5)


def test_an_error_between_two_rewards_ends_what_is_under_way() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def endless(completion: str) -> float:
        begun.set()
        try:
            await asyncio.sleep(600)
        finally:
            cancelled.set()
        return 0.0

    state, folder = random.getstate(), os.getcwd()
    rewards = [FunctionReward(ids, name="first"), FunctionReward(endless, timeout=None)]
    trainer, module, rollout = trainer_with(rewards), reward_module(policy_steps=0), rollout_of_four()
    rewards[0].on_train_batch_start(trainer, module, {"rollout": rollout}, 0)
    assert begun.wait(5)
    for reward in rewards:  # as Lightning does, whichever callback raised
        reward.on_exception(trainer, module, KeyError())
    assert cancelled.wait(5)
    assert (random.getstate(), os.getcwd()) == (state, folder)


def test_limits_and_skipped_errors_of_rewards_that_wait() -> None:
    release = threading.Event()

    def hangs(completion: str) -> float:
        release.wait(60)
        return 1.0

    skipped = FunctionReward(hangs, waits=True, timeout=0.05, on_error="skip")
    fine = FunctionReward(ids, name="fine")
    with pytest.warns(UserWarning, match="'hangs': .* did not come back within 0.05 s"):
        scores = batch_of([skipped, fine])
    assert scores["hangs"] == [None] * 4
    with pytest.raises(UserError, match=r"did not come back within 0.05 s"):
        batch_of([FunctionReward(hangs, waits=True, timeout=0.05), fine])
    release.set()


@pytest.mark.usefixtures("foreground")
def test_a_signal_ends_the_wait_for_a_reward() -> None:
    begun = threading.Event()

    async def endless(completion: str) -> float:
        begun.set()
        await asyncio.sleep(60)
        return 0.0

    def presses() -> None:
        assert begun.wait(5)
        os.kill(os.getpid(), signal.SIGINT)

    def computes(completion: str) -> float:
        threading.Thread(target=presses).start()
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        batch_of([FunctionReward(computes), FunctionReward(endless, timeout=None)])


def test_which_rewards_wait() -> None:
    async def later(completion: str) -> float:
        return 0.0

    class Asks:
        async def __call__(self, completion: str) -> float:
            return 0.0

    assert FunctionReward(later).waits
    assert FunctionReward(Asks(), name="asks").waits
    assert not FunctionReward(later, waits=False).waits
    assert not FunctionReward(ids).waits
