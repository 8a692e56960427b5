"""A judge's replies on disk, keyed by everything that was asked: SQLite, for several processes at once."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError

_TABLE = "CREATE TABLE IF NOT EXISTS judge_replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"


def content_key(*parts: Any) -> str:
    """sha256 over everything that decides a reply, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class JudgeCache:
    """Replies by key. Each is committed when it comes in, so a run that is killed loses none.

    A cache that breaks during a run is left alone with a warning: the run goes on without it.

    Args:
        path: the SQLite file; it and its folder are made where they are missing.

    Raises:
        UserError: the file is something else, damaged, or cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._broken = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connect()
            self._connection.execute("SELECT key, reply FROM judge_replies LIMIT 1").fetchall()
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"The judge's cache {path!r} cannot be used ({error}): delete it if it is a damaged cache, or give "
                "another path."
            ) from error

    def get(self, key: str) -> str | None:
        """The reply stored under a key, or None."""
        rows = self._execute("SELECT reply FROM judge_replies WHERE key = ?", (key,))
        return str(rows[0][0]) if rows else None

    def put(self, key: str, reply: str) -> None:
        """Store a reply; where another process was first, its reply stays."""
        self._execute("INSERT OR IGNORE INTO judge_replies VALUES (?, ?)", (key, reply))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _connect(self) -> None:
        self._owner = os.getpid()
        self._connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        self._connection.execute(_TABLE)

    def _execute(self, statement: str, values: tuple[str, ...]) -> list[Any]:
        if self._broken:
            return []
        with self._lock:
            try:
                if self._owner != os.getpid():  # a connection must not cross a fork
                    self._connect()
                return self._connection.execute(statement, values).fetchall()
            except (sqlite3.Error, UnicodeEncodeError) as error:
                if isinstance(error, UnicodeEncodeError):  # half a surrogate pair: this one reply is not stored
                    return []
                self._broken = True
                rank_zero_warn(
                    f"The judge's cache {str(self.path)!r} failed ({error}): the run goes on without it.",
                    category=UserWarning,
                )
                return []
