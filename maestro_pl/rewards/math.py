"""Mathematical equality, judged in a child process that can be killed: sympy may hang, or eat all memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias, cast

from maestro_pl.errors import UserError

Verdict: TypeAlias = Literal["equal", "different", "no_reference", "timed_out", "failed"]

_WORKER = Path(__file__).with_name("math_worker.py")
_BOOT = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='__main__')"
)
_START_SECONDS = 120.0


def math_score(verdict: Verdict) -> float | None:
    """1 for ``equal``, 0 for ``different``, ``None`` (does not apply) where nothing was found out."""
    return {"equal": 1.0, "different": 0.0}.get(verdict)


class MathComparer:
    """Compares answers with references in one persistent child process, within a time and a memory limit.

    The process is a fresh interpreter, started by the first comparison. One that exceeds the limit is killed, and the
    next comparison starts another. It ends with :meth:`close`, with this object, with the parent's interpreter, and by
    itself when the parent was killed.

    Args:
        seconds: one comparison may take.
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
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize[..., MathComparer] | None = None

    def compare(self, answer: str, references: Sequence[str]) -> Verdict:
        """Whether the answer equals one of the references.

        Returns:
            ``equal`` or ``different`` (also where the answer holds no mathematics); ``no_reference`` where no reference
            holds any; ``timed_out``; ``failed`` where the process died or ran out of memory.
        """
        process = self._process or self._start()
        request = json.dumps([answer, list(references), self.seconds])
        reply, timed_out = _ask(process, request, self.seconds)
        if reply:
            return cast("Verdict", reply)
        self.close()
        return "timed_out" if timed_out else "failed"

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
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # an unsent request
                continue
