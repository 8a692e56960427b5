"""Commands in forked children, which are watched, hurt and killed; the parent imports everything once and runs nothing."""

from __future__ import annotations

import importlib
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

LIMIT_S = 1800.0  # of a child, on a machine however slow
BUG = 70  # exit status of a child that ends in a traceback
_EVENTS = "MAESTRO_FAULTS_EVENTS"


def preload() -> None:
    """Import what runs import, so that a child has it at once."""
    for name in (
        "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "peft", "datasets",
        "pandas", "matplotlib.pyplot", "openai", "maestro_pl.cli.run", "maestro_pl.sandbox", "callbacks",
        "benchmarks.faults.hooks",
    ):  # fmt: skip
        importlib.import_module(name)


@dataclass
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status, or minus the signal that ended it.
        said: what it printed.
        events: what it told of its progress, with the seconds since its start.
    """

    status: int
    said: str
    events: list[tuple[float, str]] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """The error that it ended in, or nothing."""
        return self.said.partition("maestro-pl: error: ")[2].split("\n")[0]

    @property
    def is_bug(self) -> bool:
        """Whether it ended in a traceback, or was ended by a signal."""
        return self.status < 0 or self.status == BUG or "Traceback (most recent call last)" in self.said

    def tail(self) -> str:
        """What it ended with, for a report."""
        return f"status {self.status}: ...{self.said.strip()[-600:]}"


class Child:
    """A forked process that runs ``work`` in ``folder``, with its output in ``output.txt`` there.

    Args:
        folder: its working folder.
        work: what it does; ``SystemExit`` gives its status.
        user: the user id that it takes, where it is not to be root.
    """

    def __init__(self, folder: Path, work: Callable[[], None], user: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / "output.txt"
        self._reader, writer = os.pipe()
        self.events: list[tuple[float, str]] = []
        self._rest, self._begun = b"", time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.pid = os.fork()
        if not self.pid:
            os.close(self._reader)
            _run(folder, work, output, writer, user)
        os.close(writer)
        os.close(output)

    def listen(self, seconds: float = LIMIT_S, until: Callable[[], bool] = bool) -> bool:
        """Read events until ``until()``; False where the child ended before, or the seconds are over."""
        end = time.monotonic() + seconds
        while not until():
            ready, _, _ = select.select([self._reader], [], [], max(0.0, end - time.monotonic()))
            content = os.read(self._reader, 65536) if ready else b""
            if not content:
                return False
            *lines, self._rest = (self._rest + content).split(b"\n")
            self.events += [(time.monotonic() - self._begun, line.decode()) for line in lines]
        return True

    def count(self, event: str) -> int:
        """How often an event was told."""
        return sum(name == event for _, name in self.events)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = LIMIT_S) -> Ended:
        """How it ended; one that does not end is killed, with status -9 and a line in what it said."""
        self.listen(seconds)
        late = ""
        if not self._ended(1.0 if self.events else seconds):
            with suppress(ProcessLookupError):
                self.kill()
            late = f"\nstill running after {seconds:g} s"
            self._ended(60.0)
        os.close(self._reader)
        said = self.output.read_text(encoding="utf-8", errors="replace")
        return Ended(self._status, said + late, self.events)

    def _ended(self, seconds: float) -> bool:
        end = time.monotonic() + max(seconds, 30.0)  # the pipe closes a moment before
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
                return True
            time.sleep(0.005)
        return False


def tell(event: str) -> None:
    """Called in a child: tell the parent how far it is."""
    number = os.environ.get(_EVENTS)
    if number:
        with suppress(OSError):
            os.write(int(number), event.encode() + b"\n")


def _run(folder: Path, work: Callable[[], None], output: int, events: int, user: int | None) -> None:
    status = BUG
    try:
        os.setpgid(0, 0)  # so that what it starts can be ended with it
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.chdir(folder)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ[_EVENTS] = str(events)
        if user is not None:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            os.environ["HOME"] = str(folder)
        work()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def command(arguments: Sequence[str], before: Callable[[], None] | None = None) -> Callable[[], None]:
    """What a child does: watch itself, do ``before``, and run a command of ``maestro-pl``."""

    def work() -> None:
        from benchmarks.faults.hooks import watch
        from maestro_pl.cli import main

        watch()
        if before is not None:
            before()
        main(list(arguments))

    return work


def run(
    folder: Path, arguments: Sequence[str], before: Callable[[], None] | None = None, user: int | None = None
) -> Ended:
    """Run a command of ``maestro-pl`` to its end."""
    return Child(folder, command(arguments, before), user).wait()


def limit_memory(gib: float) -> None:
    """Called in a child: let it take no more than this, so that a file that asks for more cannot take the machine's."""
    limit = int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@contextmanager
def serving(start: Callable[[], str], folder: Path) -> Iterator[str]:
    """A server in a child of its own; ``start`` starts it and gives its address."""

    def work() -> None:
        tell(start())
        signal.pause()

    child = Child(folder, work)
    try:
        if not child.listen(60.0, lambda: bool(child.events)):
            raise RuntimeError(f"The server did not start: {child.output.read_text()}")
        yield child.events[0][1]
    finally:
        child.kill()
        child.wait()
