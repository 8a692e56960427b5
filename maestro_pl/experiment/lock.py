"""A cell belongs to one scheduler at a time."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from maestro_pl.errors import UserError

TRIES, PAUSE = 4, 0.05  # whoever asks for the state of a grid holds a lock for an instant


class CellLock:
    """An exclusive lock on a file that names its holder.

    The operating system gives the lock up when its holder and the holder's child are gone, however they ended, so on
    one machine a lock is never stale. A scheduler passes ``fileno()`` to its child: as long as an orphan trains on, its
    cell is taken. Machines that share a folder over a network may not see each other's locks; there the holder's name
    counts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def fileno(self) -> int:
        """The descriptor that a child inherits."""
        return int(self._file.fileno())

    def acquire(self) -> bool:
        """Take the lock; False where another process has it.

        Raises:
            UserError: the file system has no locks, or the lock names a process of another machine.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        if not _locked(file, fcntl.LOCK_EX, TRIES):
            file.close()
            return False
        other = _holder(file)
        if other is not None and other["host"] != socket.gethostname():
            file.close()
            raise UserError(
                f"{self.path} names process {other['pid']} on {other['host']}: if it no longer runs there, remove the file."
            )
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}, file)
        file.flush()
        self._file = file
        return True

    def release(self) -> None:
        """Give the lock up; the file stays, empty, so that nobody locks a file that another has removed."""
        self._file.truncate(0)
        self._file.close()
        self._file = None

    def __enter__(self) -> CellLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self.release()


def holder(path: Path) -> str | None:
    """Who holds the lock, as ``process 12 on host``; None where nobody does."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        other = _holder(file)
        free = _locked(file, fcntl.LOCK_SH, 1)
    named = f"process {other['pid']} on {other['host']}" if other else "a process that has just started"
    return named if not free or (other is not None and other["host"] != socket.gethostname()) else None


def _locked(file: Any, kind: int, tries: int) -> bool:
    for attempt in range(tries):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(PAUSE if attempt + 1 < tries else 0)
        except OSError as error:
            raise UserError(
                f"{file.name} cannot be locked ({error.strerror}): give --out a folder on a file system with locks."
            ) from error
    return False


def _holder(file: Any) -> dict[str, Any] | None:
    file.seek(0)
    text = file.read()
    try:
        content = json.loads(text) if text.strip() else None
    except json.JSONDecodeError:  # cut off while it was written, or written by hand
        return None
    return content if isinstance(content, dict) and {"pid", "host"} <= content.keys() else None
