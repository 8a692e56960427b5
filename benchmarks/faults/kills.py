"""kill -9 at random moments, in every stage of a run; going on comes to what the uninterrupted run came to."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from benchmarks.chat_server import Server
from benchmarks.faults.child import Child, Ended, command, serving
from benchmarks.faults.runs import (
    FIT,
    WARMUP,
    check_kept,
    check_same,
    config,
    differs,
    finish,
    judged,
    state_of,
    uninterrupted,
    verdict,
    versions,
    write,
)
from benchmarks.faults.trial import Fault, NotHeld, Trial

ANSWER_S = 0.02  # what the judge takes for one reply, so that there is a moment to be killed in


def kill_in(stage: str, warm_up: bool = False) -> Any:
    """A trial that kills a run at a random moment of one of its stages, of any step."""

    def trial(trial: Trial) -> None:
        server = serving(lambda: judge_server(), trial.folder / "server") if stage == "rewards" else None
        with server or nullcontext("") as url:
            content = config(**({"rewards+": judged(url)} if url else {}))
            reference = uninterrupted(trial, f"whole-{'judged' if url else 'plain'}", content)
            folder = trial.folder / "run"
            write(folder, content)
            ended = killed(trial, reference, folder, stage, warm_up)
            trial.require(ended.status in (0, -signal.SIGKILL), f"the child ended by itself: {ended.tail()}")
            check_kept(folder)
            finish(folder)
            check_same(reference, folder)

    return trial


def killed(trial: Trial, reference: Path, folder: Path, stage: str, warm_up: bool) -> Ended:
    """Run until one of the uninterrupted run's moments in this stage, and kill.

    Counts as ``landed`` where the child was still in that stage.
    """
    events = json.loads((reference / "events.json").read_text(encoding="utf-8"))
    moments = [(begin, end - begin) for (begin, name), (end, _) in pairwise(events) if name == stage]
    updates = [begin for begin, name in events if name == "update"]
    if warm_up:
        moments = [moment for moment in moments if moment[0] <= updates[WARMUP - 1]]
    number = trial.random.randrange(len(moments))
    child = Child(folder, command(FIT))
    if child.listen(until=lambda: child.count(stage) > number):
        time.sleep(trial.random.uniform(0, moments[number][1]))
        child.listen(0.0, lambda: False)
        with suppress(ProcessLookupError):
            child.kill()
    ended = child.wait()
    trial.counts["landed"] += bool(ended.status == -signal.SIGKILL and ended.events[-1][1] == stage)
    trial.counts["with a checkpoint"] += bool(list(folder.rglob("*.ckpt")))
    return ended


def judge_server() -> str:
    """Start the judge, in a child."""
    server = Server()

    def answer(body: dict[str, Any], number: int) -> str:
        time.sleep(ANSWER_S)
        return verdict(body)

    server.answer = answer
    return server.url


def experiment(trial: Trial) -> None:
    """Kill a grid of two runs at once: the whole of it, its scheduler alone, or one of the runs; then start it again."""
    content = config(**{"rewards": config()["rewards"][:2]})
    grid = {
        "name": "grid",
        "stages": ["fit"],
        "common": {"config": "run.yaml"},
        "axes": {"seed": [0, 1]},
    }
    expected = {}
    for seed in (0, 1):
        (whole,) = versions(uninterrupted(trial, f"whole-seed{seed}", {**content, "seed_everything": seed}))
        expected[seed] = state_of(whole / "checkpoints/last.ckpt")
    folder = trial.folder / "grid"
    write(folder, content)
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    arguments = ["experiment", "grid.yaml", "--out", "out", "--jobs", "2"]
    child = Child(folder, command(arguments))
    victim = trial.random.choice(("all of it", "the scheduler", "one run"))
    _wait_for(lambda: len(list(folder.glob("out/cells/*/fit-0/config.yaml"))) == 2 or not _alive(child.pid))
    time.sleep(trial.random.uniform(0, 4.0))
    trial.counts[victim] += 1
    pids = _children(child.pid)
    for pid in {"all of it": [child.pid, *pids], "the scheduler": [child.pid], "one run": pids[:1]}[victim]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ended = child.wait()
    trial.require(not ended.is_bug or ended.status == -signal.SIGKILL, f"the scheduler ended with {ended.tail()}")
    _wait_for(lambda: not any(map(_alive, pids)))  # orphans end their cells
    check_kept(folder)
    again = Child(folder, command(arguments)).wait()
    trial.require(again.status == 0, f"the second start ended with {again.tail()}")
    for seed, state in expected.items():
        (cell,) = folder.glob(f"out/cells/*seed{seed}*")
        fits = sorted(cell.glob("fit-*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        if difference := differs(state, state_of(fits[-1])):
            raise NotHeld(f"cell {cell.name} differs from the uninterrupted run: {difference}")


def _wait_for(condition: Any, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise NotHeld("the grid did not come so far in time")
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            main = file.read().split()
    except OSError:
        return []
    found = {int(each) for each in main}
    for task in Path(f"/proc/{pid}/task").iterdir():  # the scheduler's threads start the runs
        with suppress(OSError):
            found |= {int(each) for each in (task / "children").read_text(encoding="ascii").split()}
    return sorted(found)


_SAME = "going on comes to the rows, responses and tensors of the uninterrupted run, bit for bit"
FAULTS = [
    Fault("kill-rollout", f"kill -9 in a rollout: {_SAME}", kill_in("rollout")),
    Fault("kill-update", f"kill -9 in an update: {_SAME}", kill_in("update")),
    Fault("kill-warm-up", f"kill -9 in the Conductor's warm-up: {_SAME}", kill_in("rollout", warm_up=True)),
    Fault(
        "kill-save", f"kill -9 while a checkpoint is written: {_SAME}, and no half file has its name", kill_in("save")
    ),
    Fault("kill-judge", f"kill -9 while a judge is asked: {_SAME}", kill_in("rewards")),
    Fault(
        "kill-experiment",
        "kill -9 of `experiment --jobs 2`, of its scheduler or of a run: a second start brings every cell to the same end",
        experiment,
        share=0.2,
    ),
]
