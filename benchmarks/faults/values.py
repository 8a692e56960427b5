"""Numbers that are not finite: in the loss, a gradient, a reward, a hidden state, the Conductor and the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.child import run
from benchmarks.faults.hooks import nan_loss
from benchmarks.faults.runs import FIT, STEPS, WARMUP, check_kept, config, metric_rows, versions, write
from benchmarks.faults.trial import Fault, Trial

GRADIENT = {  # a Conductor that learns by gradient
    "model.meta": {
        "signal": "maestro_pl.AnchorSignal", "learner": "gradient", "every": 1, "warmup": WARMUP,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
    }
}  # fmt: skip


def spoil(what: str, changes: dict[str, Any] | None = None) -> Callable[[Trial], None]:
    """A trial in which a callback spoils something at a random batch."""

    def trial(trial: Trial) -> None:
        # before the first step there is no moment of an optimizer to spoil, in the warm-up no gradient
        first = {"moments": WARMUP + 1, "gradient": WARMUP, "policy": WARMUP, "hidden": 0, "conductor": 1}[what]
        step = trial.random.randrange(first, WARMUP + STEPS)
        hook = {"class_path": "benchmarks.faults.hooks.SpoilAt", "init_args": {"what": what, "step": step}}
        ends(trial, config(**{**(changes or {}), "trainer.callbacks+": hook}), f"{what} at batch {step}")

    return trial


def ends(trial: Trial, content: dict[str, Any], what: str, before: Callable[[], None] | None = None) -> None:
    """Raise unless the run skips, counts and comes to its end, or ends in a sentence; what is saved is finite."""
    folder = trial.folder / "run"
    write(folder, content)
    ended = run(folder, FIT, before)
    trial.counts["went on to the end" if ended.status == 0 else "ended in a sentence"] += 1
    trial.require(not ended.is_bug, f"{what}: {ended.tail()}")
    check_kept(folder)
    if ended.status:
        trial.require(bool(ended.sentence) and ended.status in (1, 2), f"{what}: no sentence: {ended.tail()}")
        return
    trial.require(told(ended.said, folder), f"{what}: it is neither warned of nor counted: {ended.tail()}")


def told(said: str, folder: Path) -> bool:
    """Whether a warning or a column of ``metrics.csv`` says that something was not a number or did not apply."""
    rows = metric_rows(versions(folder)[0] / "metrics.csv")
    counted = any(float(row.get(name, 0)) > 0 for row in rows for name in ("policy/skipped", "conductor/nonfinite"))
    return counted or "not finite" in said or "does not apply" in said


def loss(trial: Trial) -> None:
    """The loss of one micro-batch is NaN: the step is skipped, counted and said."""
    call = trial.random.randrange(STEPS)
    ends(trial, config(), f"the loss of call {call}", lambda: nan_loss(call))


def reward(function: str, place: str = "rewards") -> Callable[[Trial], None]:
    """A trial in which one score is NaN or infinite: it does not apply, or the run ends in a sentence."""

    def trial(trial: Trial) -> None:
        own = {
            "class_path": "callbacks.FunctionReward",
            "init_args": {"name": "odd", "function": f"benchmarks.faults.rewards.{function}"},
        }
        folder = trial.folder / "run"
        write(folder, config(**{f"{place}+": own, "seed_everything": trial.seed}))
        ended = run(folder, FIT)
        trial.counts["went on to the end" if ended.status == 0 else "ended in a sentence"] += 1
        trial.require(not ended.is_bug, f"{function}: {ended.tail()}")
        check_kept(folder)
        if function != "infinite":
            trial.require(ended.status == 0, f"{function}: the run did not go on: {ended.tail()}")
        else:
            trial.require(ended.status in (1, 2), f"{function}: not noticed: {ended.tail()}")
            trial.require("odd" in ended.sentence, f"{function}: the reward is not named: {ended.tail()}")

    return trial


_MUST = "the step is skipped, counted and said, or the run ends in a sentence; what is saved is finite"
FAULTS = [
    Fault("nan-loss", f"a NaN in the loss: {_MUST}", loss, most=8),
    Fault("nan-gradient", f"an infinite gradient: {_MUST}", spoil("gradient"), most=8),
    Fault("nan-hidden", f"a NaN in a hidden state: {_MUST}", spoil("hidden"), most=8),
    Fault("nan-conductor", f"a NaN in the Conductor: {_MUST}", spoil("conductor", GRADIENT), most=8),
    Fault("nan-policy", f"a NaN in the policy's parameters: {_MUST}", spoil("policy"), most=8),
    Fault("nan-moments", f"a NaN in the optimizer's state: {_MUST}", spoil("moments"), most=8),
    Fault("nan-reward", "a score that is NaN does not apply; the run goes on", reward("nan"), most=4),
    Fault("nan-anchor", "an anchor's NaN does not apply; the run goes on", reward("nan_anchor", "anchors"), most=4),
    Fault("inf-reward", "an infinite score ends the run in a sentence with the reward's name", reward("infinite"), most=4),
]  # fmt: skip
