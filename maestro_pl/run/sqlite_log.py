"""An SQLite file that several processes read and write at once."""

from __future__ import annotations

import sqlite3
import time


def keep_a_log(connection: sqlite3.Connection, patience: float) -> None:
    """Let readers and a writer work beside each other, and a committed row survive a power cut.

    The change to a write-ahead log takes the whole file for a moment, and SQLite's own timeout does not wait for that
    one: two that open a new file together would see one of them fail.

    Args:
        connection: outside a transaction.
        patience: seconds to wait for others.

    Raises:
        sqlite3.Error: the file is not to be had in that time, or cannot be used.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")
