"""Brings the cells of a grid to their end, each in child processes, several at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from maestro_pl.errors import UserError
from maestro_pl.experiment.cell import CellFolder, Missing, last_lines
from maestro_pl.experiment.grid import Cell
from maestro_pl.experiment.lock import CellLock, holder

COMMAND = (sys.executable, "-m", "maestro_pl")
GRACE = 60.0  # seconds that a stopped child has to save its checkpoint
ERROR = "maestro-pl: error: "  # what a command's error begins with; further lines of it are indented
DEVICES = "CUDA_VISIBLE_DEVICES"
Say: TypeAlias = Callable[[str], None]


@dataclass
class Outcome:
    """What became of a cell: ``done``, ``failed``, ``stopped``, or ``elsewhere`` where another scheduler has it."""

    folder: CellFolder
    outcome: str
    seconds: float = 0.0
    stage: str = ""
    reason: str = ""


@dataclass
class Scheduler:
    """Runs cells.

    Of several cells at once, each sees its share of the GPUs; where there are fewer than jobs, they take turns.

    Args:
        config_of: gives the whole config of a cell, which is written when the cell starts for the first time; a
            ``UserError`` fails the cell.
        jobs: cells at once.
        command: what a stage's arguments are appended to.
        say: takes each line of progress.
        grace: seconds that a child has to end after SIGTERM.
    """

    config_of: Callable[[Cell], str]
    jobs: int = 1
    command: Sequence[str] = COMMAND
    say: Say = print
    grace: float = GRACE
    _stop: threading.Event = field(default_factory=threading.Event)
    _children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _shares: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)

    def run(self, folders: Sequence[CellFolder]) -> list[Outcome]:
        """Run the cells that are not done, in order.

        Returns:
            What became of each; of the cells not begun before Ctrl-C, nothing.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM, after the children have ended.
        """
        outcomes: list[Outcome] = []
        begun = time.monotonic()
        for share in shares(devices() if self.jobs > 1 else [], self.jobs):
            self._shares.put(share)
        with ThreadPoolExecutor(self.jobs) as pool, _sigterm_as_ctrl_c():
            waiting: set[Future[Outcome]] = set()
            left = iter(folders)

            def told(outcome: Outcome) -> None:
                outcomes.append(outcome)
                self.say(self._line(outcomes, len(folders), time.monotonic() - begun))

            try:
                while True:
                    # configs are made here, one at a time and when they are needed: there may be thousands
                    while len(waiting) < self.jobs and (folder := next(left, None)) is not None:
                        try:
                            waiting.add(pool.submit(self._run_cell, folder, self.config_of(folder.cell)))
                        except UserError as error:
                            told(Outcome(folder, "failed", stage="its config", reason=str(error)))
                    if not waiting:
                        break
                    finished, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in finished:
                        told(future.result())
            except BaseException:
                self._end_children(waiting)
                raise
        return outcomes

    def _line(self, outcomes: Sequence[Outcome], total: int, seconds: float) -> str:
        last = outcomes[-1]
        text = {
            "done": f"done in {duration(last.seconds)}",
            "failed": f"FAILED in {last.stage} after {duration(last.seconds)}: {last.reason}",
            "elsewhere": f"left to {last.reason}",
            "stopped": "stopped",
        }[last.outcome]
        left = total - len(outcomes)
        rest = f"; about {duration(seconds / len(outcomes) * left)} left" if left else ""
        return f"[{len(outcomes)}/{total}] {last.folder.cell.name}: {text}{rest}"

    def _run_cell(self, folder: CellFolder, config: str) -> Outcome:
        begun = time.monotonic()
        if self._stop.is_set():
            return Outcome(folder, "stopped")
        share = self._shares.get()  # there are as many as threads
        try:
            return self._run_stages(folder, config, share, begun)
        finally:
            self._shares.put(share)

    def _run_stages(self, folder: CellFolder, config: str, share: str | None, begun: float) -> Outcome:
        with CellLock(folder.lock) as lock:
            if not lock.acquire():
                return Outcome(folder, "elsewhere", reason=holder(folder.lock) or "another process")
            folder.begin(config)
            for stage in folder.left():  # none, if another scheduler has just finished the cell
                reason = self._run_stage(folder, stage, lock, share)
                if self._stop.is_set():
                    return Outcome(folder, "stopped", time.monotonic() - begun, stage)
                if reason:
                    return Outcome(folder, "failed", time.monotonic() - begun, stage, reason)
        return Outcome(folder, "done", time.monotonic() - begun)

    def _run_stage(self, folder: CellFolder, stage: str, lock: CellLock, share: str | None) -> str:
        """Run one command; the reason why it failed, or nothing."""
        entry: dict[str, Any] = {"stage": stage, "started": time.time()}
        try:
            arguments = folder.arguments(stage)
        except Missing as error:
            folder.add({**entry, "ended": time.time(), "status": None, "outcome": "failed", "reason": str(error)})
            return str(error)
        status = self._call([*self.command, *arguments], folder.log(stage), lock, share)
        reason = "" if status == 0 else _reason(status, folder.log(stage))
        outcome = "done" if status == 0 else "stopped" if self._stop.is_set() else "failed"
        folder.add(
            {**entry, "ended": time.time(), "status": status, "outcome": outcome, "reason": reason}
            | {"arguments": arguments, "folder": _version(arguments)}
        )
        return reason

    def _call(self, command: Sequence[str], log: Path, lock: CellLock, share: str | None) -> int:
        """Run a command in a session of its own, so that Ctrl-C reaches the scheduler and nobody else."""
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            with self._guard:
                if self._stop.is_set():
                    return 130
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment(share),
                    start_new_session=True,
                    pass_fds=(lock.fileno(),),
                )
                self._children[child.pid] = child
            status = child.wait()
        with self._guard:
            del self._children[child.pid]
        return status

    def _environment(self, share: str | None) -> dict[str, str]:
        affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        threads = max(1, cores // self.jobs)
        own = {} if share is None else {DEVICES: share}
        return {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **os.environ, **own}

    def _end_children(self, waiting: set[Future[Outcome]]) -> None:
        """SIGTERM, on which a fit saves where it is; after the grace, or a second Ctrl-C, SIGKILL."""
        for future in waiting:
            future.cancel()
        with self._guard:
            self._stop.set()
            children = list(self._children.values())
        for child in children:
            _signal(child, signal.SIGTERM)
        if children:
            self.say(f"Stopping {len(children)} run{'s' if len(children) > 1 else ''}; Ctrl-C again kills.")
        try:
            deadline = time.monotonic() + self.grace
            for child in children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for child in children:
                _signal(child, signal.SIGKILL)


def devices() -> list[str]:
    """The GPUs that this process may use: those of ``CUDA_VISIBLE_DEVICES``, else all that ``nvidia-smi`` lists."""
    given = os.environ.get(DEVICES)
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # no NVIDIA driver, or one that does not answer
        return []
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [str(number) for number, _ in enumerate(line for line in lines if line.startswith("GPU "))]


def shares(names: Sequence[str], jobs: int) -> list[str | None]:
    """What each of the jobs sees of the GPUs: neighbours, as evenly as can be; None where there are none to share."""
    if not names:
        return [None] * jobs
    if len(names) < jobs:
        return [names[job % len(names)] for job in range(jobs)]
    bounds = [job * len(names) // jobs for job in range(jobs + 1)]
    return [",".join(names[start:end]) for start, end in itertools.pairwise(bounds)]


def failures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What failed: the cell, its log, and the log's last lines."""
    for outcome in outcomes:
        if outcome.outcome == "failed":
            log = outcome.folder.log(outcome.stage)
            yield f"{outcome.folder.cell.name} failed in {outcome.stage}: {outcome.reason}\n  log: {log}"
            yield from (f"  | {line}" for line in last_lines(log))


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _reason(status: int, log: Path) -> str:
    if status < 0:
        hint = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}"
    lines = last_lines(log, 200)
    heads = [place for place, line in enumerate(lines) if line.startswith(ERROR)]
    if not heads:
        return f"exit status {status}"
    further = itertools.takewhile(lambda line: line.startswith("  "), lines[heads[-1] + 1 :])
    return " ".join([lines[heads[-1]].removeprefix(ERROR), *(line.strip() for line in further)])


def _version(arguments: Sequence[str]) -> str:
    return next(a.partition("=")[2] for a in arguments if a.startswith("--trainer.logger.version="))


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGINT both raise KeyboardInterrupt; the latter also where a shell's `&` had it ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_jobs(jobs: int) -> int:
    """Raise unless at least one cell runs at a time.

    Raises:
        UserError: it is below 1.
    """
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: expected at least 1.")
    return jobs
