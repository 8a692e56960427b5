"""Mathematical equality, judged in a child process that can be killed: sympy may hang, or eat all memory."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import threading
import unicodedata
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias, cast

from maestro_pl.errors import UserError
from maestro_pl.rewards.exact_match import TYPOGRAPHY

Verdict: TypeAlias = Literal["equal", "different", "no_reference", "unreadable_reference", "timed_out", "failed"]

_WORKER = Path(__file__).with_name("math_worker.py")
_OUT_OF_TIME = {-getattr(signal, name, 0) for name in ("SIGPROF", "SIGALRM")} - {0}
_BOOT = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
)
_START_SECONDS = 120.0
PATIENCE = 20.0 if hasattr(signal, "setitimer") else 1.0  # seconds of wall time for one of processor time


def math_score(verdict: Verdict) -> float | None:
    """1 for ``equal``; ``None`` (does not apply) where there is no reference to compare with; else 0.

    An answer that cannot be read, or not in time, is a wrong one: it must not do better than one that can be judged.
    """
    return None if verdict in ("no_reference", "unreadable_reference") else float(verdict == "equal")


def plain_mathematics(text: str) -> str:
    """The text with the digits and signs of every script as ASCII, and without control characters."""
    return "".join(_plain_character(character) for character in text.translate(TYPOGRAPHY).replace("`", " "))


def _plain_character(character: str) -> str:
    if character < "\x20":
        return character if character in "\t\n" else " "
    return character if character < "\x7f" else str(unicodedata.decimal(character, character))


class MathComparer:
    """Compares answers with references in one persistent child process, within a time and a memory limit.

    The process is a fresh interpreter, started by the first comparison. One that exceeds the limit is killed, and the
    next comparison starts another. It ends with :meth:`close`, with this object, with the parent's interpreter, and by
    itself when the parent was killed.

    Args:
        seconds: of processor time one comparison may take, so that a busy machine makes no answer wrong; of wall time
            :data:`PATIENCE` times as many (and no more than ``seconds`` on Windows, which has no such limit).
        megabytes: of address space the process may take, where the platform has such a limit (not on macOS or Windows).

    Raises:
        UserError: ``math-verify`` is not installed.
    """

    def __init__(self, seconds: float = 5.0, megabytes: int = 2048) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "Comparing mathematics needs the package math-verify, which is not installed: run pip install "
                "-e '.[benchmarks]'."
            )
        self.seconds, self.megabytes = seconds, megabytes
        self._unreadable: set[tuple[str, ...]] = set()  # not to be waited for again
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize[..., MathComparer] | None = None

    def compare(self, answer: str, references: Sequence[str]) -> Verdict:
        """Whether the answer equals one of the references.

        Returns:
            ``equal`` or ``different`` (also where the answer holds no mathematics); ``timed_out`` or ``failed`` where the
            answer could not be read or compared in time, within the memory, or at all; ``no_reference`` where no
            reference holds any mathematics; ``unreadable_reference`` where it holds some that cannot be read in time.
        """
        texts = tuple(plain_mathematics(text) for text in references)
        if texts in self._unreadable:
            return "unreadable_reference"
        verdict = self._asked(plain_mathematics(answer), texts)
        if verdict == "unreadable_reference":
            self._unreadable.add(texts)
        return verdict

    def _asked(self, answer: str, references: tuple[str, ...]) -> Verdict:
        wall = PATIENCE * self.seconds
        request = json.dumps([answer, references, self.seconds, wall + 1])
        for _ in range(2):  # a process that dies may have been killed for another's sake: ask once more
            process = self._process or self._start()
            state, late = _ask(process, request, wall)
            if state and state != "read":
                return cast("Verdict", state)
            reply, late_answer = _ask(process, None, wall) if state else ("", False)
            if reply:
                return cast("Verdict", reply)
            self.close()
            if late or late_answer or process.returncode in _OUT_OF_TIME:
                return "timed_out" if state else "unreadable_reference"
        return "failed" if state else "unreadable_reference"

    def close(self) -> None:
        """End the child process, if there is one."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _start(self) -> subprocess.Popen[str]:
        # no pebble.ProcessPool: multiprocessing's spawn runs the user's script again in the child, training and torch with it
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, str(_WORKER), json.dumps(sys.path), str(self.megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._process, self._finalizer = process, weakref.finalize(self, _end, process)
        reply, _ = _ask(process, None, _START_SECONDS)
        if reply != "ready":
            self.close()
            raise UserError(
                f"The process that compares mathematics did not start: see what {sys.executable} -c 'import math_verify' "
                "says."
            )
        return process


def _ask(process: subprocess.Popen[str], request: str | None, seconds: float) -> tuple[str, bool]:
    """One line of the process's output, empty where it died; and whether we killed it for its time."""
    assert process.stdin is not None
    assert process.stdout is not None
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        if request is not None:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        reply = process.stdout.readline().strip()
    except OSError:  # the pipe of a process that has died
        reply = ""
    finally:
        timer.cancel()
    return ("" if expired.is_set() else reply), expired.is_set()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()  # nothing to one that has ended: its status stays
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # an unsent request
                continue
