"""The clicks of raters, in one SQLite file: a click is on disk before the next question is shown."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from maestro_pl.errors import UserError
from maestro_pl.run.sqlite_log import keep_a_log

Choice: TypeAlias = Literal["left", "right", "tie"]
CHOICES = get_args(Choice)
FILE = "clicks.db"
WAIT = 30.0  # seconds for another writer
_TABLE = """CREATE TABLE IF NOT EXISTS clicks (
  id INTEGER PRIMARY KEY, rater TEXT NOT NULL, place INTEGER NOT NULL, choice TEXT, seconds REAL, at TEXT NOT NULL
)"""


@dataclass(frozen=True)
class Click:
    """What a rater chose last at one place of the plan.

    Attributes:
        choice: None where it was taken back.
        seconds: between the question's being shown and the click, as the server saw it; None where it does not know.
        at: UTC, ISO 8601.
    """

    rater: str
    place: int
    choice: str | None
    seconds: float | None
    at: str


class Clicks:
    """Every click, in the order of the clicks: none is ever changed or removed, an undo is a click too.

    Write-ahead log, one transaction a click, synchronous: neither ``kill -9`` nor a loss of power takes one back. Each
    call opens the file, so that several raters, servers and a report can use it at once.

    Args:
        path: of the file; it is made where there is none.

    Raises:
        UserError: it is no SQLite file, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as base:
            keep_a_log(base, WAIT)
            base.execute(_TABLE)

    def add(self, rater: str, place: int, choice: Choice | None, seconds: float | None = None) -> None:
        """Keep a click; with None, take back what was chosen at this place."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        with self._open() as base:
            base.execute(
                "INSERT INTO clicks (rater, place, choice, seconds, at) VALUES (?, ?, ?, ?, ?)",
                (rater, place, choice, seconds, now),
            )

    def of(self, rater: str) -> dict[int, Click]:
        """Place to what the rater chose there last, in the order of these clicks; without what was taken back."""
        return {click.place: click for click in self._newest("WHERE rater = ?", (rater,))}

    def all(self) -> list[Click]:
        """What stands, of all raters."""
        return self._newest("", ())

    def _newest(self, where: str, values: tuple[str, ...]) -> list[Click]:
        query = (
            "SELECT rater, place, choice, seconds, at FROM clicks WHERE id IN "
            f"(SELECT max(id) FROM clicks {where} GROUP BY rater, place) AND choice IS NOT NULL ORDER BY id"
        )
        with self._open() as base:
            return [Click(*row) for row in base.execute(query, values)]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            base = sqlite3.connect(self.path, timeout=WAIT)
            try:
                base.execute("PRAGMA synchronous=FULL")
                with base:  # commits, or takes everything back
                    yield base
            finally:
                base.close()
        except sqlite3.Error as error:
            raise UserError(f"{self.path} cannot be used as the file of clicks: {error}.") from error
