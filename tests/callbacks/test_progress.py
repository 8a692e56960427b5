"""``StageProgressBar``: the lines of a log file, the heartbeat of a long stage, and the live bar."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import pytest
import rich
import torch
from rich.console import Console
from rich.text import Text

from callbacks.progress import Progress, RewardFigures, StageProgressBar, duration
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from maestro_pl.training.clock import StageClock


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(bar: StageProgressBar, max_steps: int = 100, **metrics: float) -> tuple[Any, Any, Clock]:
    clock = Clock()
    bar._clock, bar._spoken = clock, clock.now
    trainer = SimpleNamespace(
        max_steps=max_steps,
        global_step=0,
        is_global_zero=True,
        sanity_checking=False,
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        num_val_batches=[2],
        num_sanity_val_batches=[1],
        num_test_batches=[3],
        num_predict_batches=[3],
    )
    module = SimpleNamespace(clock=StageClock(), policy_steps=0)
    bar.setup(trainer, module, "fit")
    return trainer, module, clock


def rollout(tasks: list[str], length: int = 4, **rewards: tuple[str, list[float | None]]) -> Rollout:
    """Groups of one response, a response a task; each reward has its role and its scores."""
    scores = {name: RewardScores.from_list(RewardSpec(name, role), given) for name, (role, given) in rewards.items()}
    count = len(tasks)
    columns = {"task": tasks, "reference": [None] * count}
    ids = [[1] * length] * count
    return Rollout(["p"] * count, ["p"] * count, [[1]] * count, ids, ["r"] * count, ["stop"] * count, 1, columns,
                   rewards=scores)  # fmt: skip


def batch(reward: float = 0.5, length: int = 4) -> dict[str, Any]:
    made = rollout(["a", "a"], length, form=("train", [reward, None]))
    made.scalar_B = torch.tensor([-1.0, 1.0])  # of normalised rewards, whose mean says nothing
    return {"rollout": made}


def step(bar: StageProgressBar, trainer: Any, module: Any) -> None:
    module.policy_steps += 1
    bar.on_train_batch_end(trainer, module, None, batch(), 0)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text="", **kwargs: said.append(text))
    return said


def test_a_line_by_hand(lines: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, clock = make(bar, **{"train/loss": -0.0123, "time/rollout": 3.21, "time/update": 0.5})
    bar.on_train_start(trainer, module)
    clock.now += 6
    step(bar, trainer, module)
    bar.teardown(trainer, module, "fit")
    assert lines == [
        "train: 100 steps",
        "train 1/100  form 0.5  tokens 4  loss -0.0123  rollout 3.2s update 0.5s  9:54 min left",
    ]


def test_the_first_steps_then_one_line_an_interval_and_the_last(lines: list[str]) -> None:
    bar = StageProgressBar(every_s=10, first_steps=2, live=False)
    trainer, module, clock = make(bar, max_steps=9)
    bar.on_train_start(trainer, module)
    for _ in range(9):
        clock.now += 4
        step(bar, trainer, module)
    bar.teardown(trainer, module, "fit")
    assert [line.split()[1] for line in lines[1:]] == ["1/9", "2/9", "5/9", "8/9", "9/9"]


def test_a_resumed_run_counts_its_pace_from_where_it_began(lines: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, clock = make(bar)
    module.policy_steps = 50
    bar.on_train_start(trainer, module)
    clock.now += 2
    step(bar, trainer, module)
    bar.teardown(trainer, module, "fit")
    assert lines[-1].endswith("1:38 min left")  # 49 steps of 2 s


def test_silence_is_broken_with_stage_note_and_time(lines: list[str]) -> None:
    bar = StageProgressBar(heartbeat_s=20, live=False)
    _trainer, module, clock = make(bar)
    bar.progress = Progress("train", 3, 100, stage_since=clock.now)
    with module.clock("rollout"):
        module.clock.note("32/64 responses")
        clock.now += 19
        bar._break_silence()
        assert lines == []
        bar._break_silence(tick=1.0)  # the next look would come too late
        clock.now += 10
        bar._break_silence()
        clock.now += 10
        bar._break_silence()
    assert lines == ["train 3/100  rollout 32/64 responses, 19 s", "train 3/100  rollout 32/64 responses, 39 s"]
    clock.now += 25
    bar._break_silence()
    assert lines[-1] == "train 3/100  between stages, 25 s"


def test_heartbeat_thread_speaks_from_inside_a_stage_and_ends(lines: list[str]) -> None:
    bar = StageProgressBar(heartbeat_s=0.05, live=False)
    trainer, module, _ = make(bar)
    bar._clock = time.monotonic
    bar.on_train_start(trainer, module)
    thread = bar._beat
    assert thread is not None
    with module.clock("rewards"):
        end = time.monotonic() + 60
        while sum("rewards" in line for line in lines) < 3 and time.monotonic() < end:
            time.sleep(0.01)  # the main thread is busy, as inside generate
    bar.on_train_end(trainer, module)
    assert not thread.is_alive()
    assert sum("rewards" in line for line in lines) >= 3


def test_validation_inside_fit_is_shown_and_the_training_comes_back(lines: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, _clock = make(bar)
    bar.on_train_start(trainer, module)
    step(bar, trainer, module)
    bar.on_validation_start(trainer, module)
    bar.on_validation_batch_end(trainer, module, None, batch(), 0)
    assert lines[-1].startswith("validate 1/2  form 0.5")
    bar.on_validation_end(trainer, module)
    assert bar.progress.position() == "train 1/100"
    assert bar._beat is not None  # the training goes on
    bar.teardown(trainer, module, "fit")
    assert module.clock.listeners == []


def test_the_check_before_training_is_named(lines: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, _ = make(bar)
    trainer.sanity_checking = True
    bar.on_validation_start(trainer, module)
    assert lines == ["check: 1 batches"]
    bar.on_validation_end(trainer, module)
    assert bar._beat is None


def warm(bar: StageProgressBar, trainer: Any, module: Any) -> None:
    module.warmup = (module.warmup[0] + 1, module.warmup[1])
    bar.on_train_batch_end(trainer, module, None, batch(), 0)


def test_the_warm_up_is_counted_before_the_steps(lines: list[str]) -> None:
    bar = StageProgressBar(first_steps=2, every_s=100, live=False)
    trainer, module, clock = make(bar, max_steps=60)
    module.warmup = (0, 2)
    bar.on_train_start(trainer, module)
    assert bar.progress.position() == "warm-up 0/2"
    for go in (warm, warm, step, step, step):
        clock.now += 4
        go(bar, trainer, module)
    bar.teardown(trainer, module, "fit")
    assert lines == [
        "warm-up: 2 batches",
        "warm-up 1/2  form 0.5  tokens 4  4 s left",
        "warm-up 2/2  form 0.5  tokens 4",
        "train: 60 steps",
        "train 1/60  form 0.5  tokens 4  3:56 min left",  # the warm-up's seconds are not part of the pace
        "train 2/60  form 0.5  tokens 4  3:52 min left",
    ]


@pytest.mark.parametrize(
    ("done", "begun", "said"),
    [
        (1, "warm-up 1/3", ["warm-up: 3 batches", "warm-up 2/3", "warm-up 3/3", "train: 9 steps", "train 1/9"]),
        (3, "train 0/9", ["train: 9 steps", "train 1/9", "train 2/9", "train 3/9"]),
    ],
)
def test_a_run_resumed_in_or_after_its_warm_up(lines: list[str], done: int, begun: str, said: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, _clock = make(bar, max_steps=9)
    module.warmup = (done, 3)
    bar.on_train_start(trainer, module)
    assert bar.progress.position() == begun
    for _ in range(3):
        (warm if module.warmup[0] < 3 else step)(bar, trainer, module)
    bar.teardown(trainer, module, "fit")
    assert [line.split("  ")[0] for line in lines] == said


def test_a_validation_inside_the_warm_up_goes_back_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    bar = StageProgressBar()
    trainer, module, _clock = make(bar)
    module.warmup = (0, 2)
    bar.on_train_start(trainer, module)
    display = bar._display
    shown = []
    for go in (warm, warm, step):
        go(bar, trainer, module)
        bar.on_validation_start(trainer, module)
        bar.on_validation_end(trainer, module)
        with console.capture() as capture:
            console.print(bar)
        shown.append(Text.from_ansi(capture.get()).plain.split()[:2])
    assert shown == [["warm-up", "1/2"], ["train", "0/100"], ["train", "1/100"]]
    assert bar._display is display  # one live bar throughout
    bar.on_train_end(trainer, module)


@pytest.mark.parametrize("kind", ["test", "predict"])
def test_evaluation_batches(kind: str, lines: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, _ = make(bar)
    getattr(bar, f"on_{kind}_start")(trainer, module)
    getattr(bar, f"on_{kind}_batch_end")(trainer, module, None, batch(length=7), 0)
    getattr(bar, f"on_{kind}_end")(trainer, module)
    assert lines[1].startswith(f"{kind} 1/3  form 0.5  tokens 7")


def test_other_ranks_are_silent(lines: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, _ = make(bar)
    trainer.is_global_zero = False
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    step(bar, trainer, module)
    assert lines == []
    assert bar._beat is None


def test_the_live_bar_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    bar = StageProgressBar()
    trainer, module, clock = make(bar, **{"train/loss": -0.0123})
    bar.on_train_start(trainer, module)
    assert bar._display is not None
    assert bar._beat is None  # the live bar moves by itself
    clock.now += 6
    step(bar, trainer, module)
    with module.clock("rollout"):
        module.clock.note("32/64 responses")
        clock.now += 3
        with console.capture() as capture:
            console.print(bar)
    bar.on_train_end(trainer, module)
    assert bar._display is None
    plain = Console(width=80, force_terminal=False)
    with plain.capture() as capture:
        bar.progress.stage, bar.progress.note = "rollout", "32/64 responses"
        plain.print(bar)
    first, second = capture.get().splitlines()
    assert first.startswith("train 1/100 ")
    assert first.rstrip().endswith("min left")
    assert len(first) == 80
    assert second.split()[:3] == ["rollout", "32/64", "responses,"]
    assert "form 0.5  tokens 4  loss -0.0123" in second


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (187, "3:07 min"), (7505, "2:05 h")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_raw_means_of_the_rewards_where_nothing_else_judges() -> None:
    made = rollout(["a", "b"], good=("train", [0.2, 0.6]), b_only=("train", [None, -3.0]), gate=("gate", [1.0, 0.0]))
    assert RewardFigures().of(made) == {"good": pytest.approx(0.4), "b_only": -3.0, "gate": 0.5}


def test_metrics_stand_for_the_rewards_and_anchors_beside_them() -> None:
    figures = RewardFigures()
    train = ("train", [0.1, 0.1])
    both = rollout(["a", "a"], good=train, judge=("anchor", [None, 0.9]), em=("metric", [1.0, 0.0]))
    assert list(figures.of(both).items()) == [("em", 0.5), ("judge", pytest.approx(0.9))]
    unlabelled = rollout(["a", "a"], good=train, judge=("anchor", [None, None]), em=("metric", [0.0, 0.0]))
    assert figures.of(unlabelled) == {"em": 0.0}  # nothing is repeated from the step before
    alone = rollout(["a", "a"], good=train, judge=("anchor", [None, 0.9]))
    assert list(RewardFigures().of(alone)) == ["judge", "good"]  # an anchor says little of a batch
    unmeasured = rollout(["a", "a"], good=train, em=("metric", [None, None]))
    assert figures.of(unmeasured) == {"good": pytest.approx(0.1)}


def test_a_metric_has_a_number_for_each_of_up_to_four_tasks() -> None:
    figures = RewardFigures()
    assert figures.of(rollout(["b", "b"], em=("metric", [1.0, 0.0]))) == {"em": 0.5}
    assert list(figures.of(rollout(["b", "a", "a"], em=("metric", [1.0, 0.0, 0.5]))).items()) == [
        ("em/a", 0.25), ("em/b", 1.0),
    ]  # fmt: skip
    assert figures.of(rollout(["b"], em=("metric", [0.25]))) == {"em/b": 0.25}  # a task that is absent is left out
    own = rollout(["a", "b"], em=("metric", [1.0, None]), chrf=("metric", [None, 0.5]))
    assert RewardFigures().of(own) == {"em": 1.0, "chrf": 0.5}
    five = figures.of(rollout(list("abcde"), em=("metric", [1.0, 0.0, 0.0, 0.0, 0.0])))
    assert five == {"em": pytest.approx(0.2)}


def test_the_tasks_of_a_metric_stand_behind_its_name() -> None:
    numbers = {"em/gsm8k": 0.5, "em/tombench": -1e-9, "judge": 0.25, "tokens": 48.33}
    assert Progress(numbers=numbers).figures() == "em gsm8k 0.5, tombench 0  judge 0.25  tokens 48.3"


def test_there_are_never_more_than_six_numbers() -> None:
    scores = {f"m{i}": ("metric", [0.1 * i, 0.0]) for i in range(8)}
    assert list(RewardFigures().of(rollout(["a", "b"], **scores))) == [f"m{i}" for i in range(6)]
    two = {f"m{i}": ("metric", [0.0] * 4) for i in range(2)}
    assert list(RewardFigures().of(rollout(list("abcd"), **two))) == ["m0", "m1"]


def test_a_reward_called_as_another_number_keeps_its_own_place(lines: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, _clock = make(bar, **{"train/loss": 2.0})
    bar.on_train_start(trainer, module)
    module.policy_steps = 1
    made = rollout(["a"], length=4, loss=("train", [0.5]), tokens=("train", [0.25]))
    bar.on_train_batch_end(trainer, module, None, {"rollout": made}, 0)
    bar.teardown(trainer, module, "fit")
    assert lines[-1].startswith("train 1/100  reward loss 0.5, tokens 0.25  tokens 4  loss 2")


def test_a_batch_without_a_rollout_has_its_loss_only(lines: list[str]) -> None:
    bar = StageProgressBar(live=False)
    trainer, module, _clock = make(bar, **{"train/loss": 2.0})
    bar.on_train_start(trainer, module)
    module.policy_steps = 1
    bar.on_train_batch_end(trainer, module, None, {"prompt": ["a"]}, 0)
    bar.teardown(trainer, module, "fit")
    assert lines[-1].startswith("train 1/100  loss 2  0 s left")
