"""The store room of labels: one SQLite file, in which each click is a transaction of its own."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from maestro_pl.errors import UserError, check_choice
from maestro_pl.labelling.questions import Question
from maestro_pl.run.sqlite_log import keep_a_log

Verdict: TypeAlias = Literal["best", "tie", "bad"]
MARK = 0x4D504C4C  # SQLite's application_id of our files
VERSION = 2  # 1 had no `also`
EARLIER = 2048  # responses of earlier batches that a run still takes labels for
PATIENCE = 30.0  # seconds that a click waits for the click of another process
_TABLES = """
CREATE TABLE questions (
    key TEXT PRIMARY KEY, task TEXT NOT NULL, prompt TEXT NOT NULL, responses TEXT NOT NULL
);
CREATE TABLE clicks (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL REFERENCES questions (key), rater TEXT NOT NULL,
    time REAL NOT NULL, shown TEXT NOT NULL, verdict TEXT NOT NULL, best INTEGER, undone REAL,
    also TEXT NOT NULL DEFAULT '[]'
);
CREATE UNIQUE INDEX standing ON clicks (key, rater) WHERE undone IS NULL;
"""


@dataclass(frozen=True)
class Click:
    """What somebody said about a question.

    Attributes:
        question: that was asked.
        rater: a pseudonym.
        verdict: ``best``: one answer is, or some; ``tie``: no difference that counts; ``bad``: all are.
        best: place of the best in ``question.responses``; None without one.
        shown: places of the answers in the order in which they were shown.
        time: when, in seconds since 1970.
        number: of the click in its file, in the order of time; 0: not in a file yet.
        also: places of those that are as good as the best, in their order; never all others, which is a ``tie``.

    Raises:
        UserError: an unknown verdict, a best one that is none of the answers, or a name that cannot be used.
    """

    question: Question
    rater: str
    verdict: Verdict
    best: int | None
    shown: tuple[int, ...]
    time: float
    number: int = 0
    also: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check it."""
        check_choice("the choice", self.verdict, Verdict)
        check_rater(self.rater)
        count = len(self.question.responses)
        if (self.best is not None) != (self.verdict == "best") or self.best not in (None, *range(count)):
            raise UserError(f"The best of {count} answers is {self.best!r} with the choice {self.verdict!r}.")
        others = [place for place in range(count) if self.best is not None and place != self.best]
        if self.also and not (set(self.also) < set(others) and list(self.also) == sorted(set(self.also))):
            raise UserError(
                f"As good as the best, {self.best!r} of {count} answers, are {list(self.also)}: expected some of {others} in "
                "their order, and not all."
            )
        if sorted(self.shown) != list(range(count)):
            raise UserError(f"{count} answers were shown in the order {list(self.shown)}: expected each place once.")

    @property
    def bests(self) -> tuple[int, ...]:
        """Places of the best answer and of those that are as good; none without a best one."""
        return () if self.best is None else (self.best, *self.also)

    @property
    def ranks(self) -> list[int]:
        """The answers' ranks, 0 for the best ones; all equal where nothing tells them apart."""
        return [int(self.best is not None and place not in self.bests) for place in range(len(self.question.responses))]


def choice_of(places: Sequence[int], count: int) -> tuple[Verdict, int | None, tuple[int, ...]]:
    """Verdict, best and also of a click that calls these answers the best, the first one foremost.

    Args:
        places: of answers, at least one; all of them are no difference.
        count: how many answers there are.
    """
    if len(set(places)) == count:
        return "tie", None, ()
    return "best", places[0], tuple(sorted(set(places) - {places[0]}))


def check_rater(name: str) -> None:
    """Raise where a pseudonym cannot be used.

    Raises:
        UserError: it has other signs than letters, digits, ``_``, ``-``, ``.``, or more than 40.
    """
    if not re.fullmatch(r"[\w.\-]{1,40}", name):
        raise UserError(f"rater {name!r:.80}: expected a pseudonym of letters, digits, '_', '-' and '.', at most 40.")


class LabelStore:
    """The clicks of one file.

    Several threads and processes may use it at once. A click that was answered for is on the disk, whatever happens next.

    Args:
        path: of the file; made where it is not there, an empty one is a new one.
        writes: False opens it for reading only, and never makes it.

    Raises:
        UserError: the file is not there, damaged, of another program or a later version, or its folder cannot be written.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(path).expanduser(), writes
        self._lock = threading.Lock()
        if self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise UserError(f"labels {path}: expected the path of a file in a folder that exists.")
        if not writes and not self.path.exists():
            raise UserError(
                f"There is no file of labels {path}: `maestro-pl label --labels {path}` makes it, or give an empty file."
            )
        with self._sentences():
            self._connection = self._connected()
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def add(self, questions: Sequence[Question]) -> None:
        """Keep questions, so that they are exported before anybody has answered; those that are there stay."""
        with self._transaction() as run:
            for question in questions:
                self._add(run, question)

    def click(self, *clicks: Click) -> int:
        """Keep clicks, all or none of them.

        Returns:
            How many are new; of a person's answers to one question the one that stands already does (a key pressed twice).
        """
        new = 0
        with self._transaction() as run:
            for click in clicks:
                self._add(run, click.question)
                values = (click.question.key, click.rater, click.time or time.time(), json.dumps(click.shown),
                          click.verdict, click.best, json.dumps(click.also))  # fmt: skip
                done = run.execute(
                    "INSERT OR IGNORE INTO clicks (key, rater, time, shown, verdict, best, also) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
                new += done.rowcount
        return new

    def undo(self, rater: str, among: Sequence[str]) -> str | None:
        """Take this person's newest click on one of these questions back; the question's key, None where there is none.

        What was taken back stays in the file, marked.
        """
        wanted = set(among)
        with self._transaction() as run:
            rows = run.execute(
                "SELECT id, key FROM clicks WHERE rater = ? AND undone IS NULL ORDER BY id DESC", (rater,)
            )
            found = next((row for row in rows.fetchall() if row[1] in wanted), None)
            if found is None:
                return None
            run.execute("UPDATE clicks SET undone = ? WHERE id = ?", (time.time(), found[0]))
            return str(found[1])

    def clicks(self) -> list[Click]:
        """Every click that stands, the oldest first."""
        with self._sentences(), self._lock, self._one_look():
            # a reader leaves an older file as it is, until a writer comes
            also = "c.also" if self._form() > 1 else "'[]'"
            rows = self._connection.execute(
                f"SELECT q.task, q.prompt, q.responses, c.rater, c.verdict, c.best, c.shown, c.time, c.id, {also} "
                "FROM clicks c JOIN questions q ON q.key = c.key WHERE c.undone IS NULL ORDER BY c.id"
            ).fetchall()
        found = []
        for row in rows:
            try:
                asked = Question(row[0], json.loads(row[1]), tuple(json.loads(row[2])))
                shown, alike = tuple(json.loads(row[6])), tuple(json.loads(row[9]))
                found.append(Click(asked, row[3], row[4], row[5], shown, row[7], row[8], alike))
            except (UserError, ValueError, TypeError) as error:
                raise UserError(
                    f"The file of labels {self.path} is damaged: its click {row[8]} cannot be read ({error}). Take a copy that "
                    "was kept of it."
                ) from error
        return found

    def questions(self) -> list[Question]:
        """Every question, answered or not."""
        with self._sentences(), self._lock:
            rows = self._connection.execute("SELECT task, prompt, responses FROM questions ORDER BY rowid").fetchall()
            return [Question(task, json.loads(prompt), tuple(json.loads(answers))) for task, prompt, answers in rows]

    def answered(self, rater: str) -> set[str]:
        """Keys of the questions that this person's answer stands for."""
        with self._sentences(), self._lock:
            rows = self._connection.execute("SELECT key FROM clicks WHERE rater = ? AND undone IS NULL", (rater,))
            return {str(key) for (key,) in rows.fetchall()}

    def raters(self) -> list[str]:
        """Everybody who has clicked, whether or not a click of theirs stands."""
        with self._sentences(), self._lock:
            return [str(name) for (name,) in self._connection.execute("SELECT DISTINCT rater FROM clicks").fetchall()]

    def version(self) -> tuple[int, int]:
        """Changes with every click and undo."""
        with self._sentences(), self._lock:
            newest, undone = self._connection.execute("SELECT max(id), count(undone) FROM clicks").fetchone()
            return int(newest or 0), int(undone)

    # -- its parts ---------------------------------------------------------------------------------------------------

    def _connected(self) -> sqlite3.Connection:
        if self.writes:
            return sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        # beside a reader SQLite keeps two small files; in a folder that is not ours the file is read as it lies there
        how = "ro" if os.access(self.path.absolute().parent, os.W_OK) else "ro&immutable=1"
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={how}", uri=True, timeout=0.5, isolation_level=None,
            check_same_thread=False,
        )  # fmt: skip

    def _prepare(self) -> None:
        """Check that the file is ours, and make the tables of a new one."""
        run = self._connection
        ours = self._is_ours()
        if self.writes:
            keep_a_log(run, PATIENCE)
        elif not ours:  # an empty file holds no labels
            run.close()
            self._connection = run = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        if ours and (self._form() == VERSION or not self.writes):
            return
        run.execute("BEGIN IMMEDIATE")
        try:
            if self._is_ours():  # of an earlier version, unless somebody else was quicker
                if self._form() < VERSION:
                    run.execute("ALTER TABLE clicks ADD COLUMN also TEXT NOT NULL DEFAULT '[]'")
                    run.execute(f"PRAGMA user_version = {VERSION}")
            else:
                for statement in _TABLES.split(";\n"):
                    run.execute(statement)
                run.execute(f"PRAGMA application_id = {MARK}")
                run.execute(f"PRAGMA user_version = {VERSION}")
        except BaseException:
            run.execute("ROLLBACK")
            raise
        run.execute("COMMIT")

    def _form(self) -> int:
        """The version of the file's tables."""
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _is_ours(self) -> bool:
        """Whether the file holds labels; False: it is empty.

        Raises:
            UserError: it holds something else, or labels of a later version.
        """
        run = self._connection
        inside = run.in_transaction
        if not inside:
            run.execute("BEGIN")  # one look: another process may be making the tables
        try:
            mark, version = (run.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
            ours = mark == MARK and version <= VERSION
            check = run.execute("PRAGMA quick_check(1)").fetchone()[0] if ours else "ok"
            tables = run.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        finally:
            if not inside:
                run.execute("COMMIT")
        if ours:
            if check != "ok":
                raise UserError(
                    f"The file of labels {self.path} is damaged ({check}): take a copy that was kept of it."
                )
            return True
        if mark == MARK:
            raise UserError(f"{self.path} holds labels of a later maestro-pl (version {version}): update this one.")
        if mark or tables:
            raise UserError(
                f"{self.path} is an SQLite file of another program, and no file of labels: give another path."
            )
        return False

    @staticmethod
    def _add(run: sqlite3.Connection, question: Question) -> None:
        values = (question.key, question.task, json.dumps(question.prompt), json.dumps(question.responses))
        run.execute("INSERT OR IGNORE INTO questions VALUES (?, ?, ?, ?)", values)

    @contextmanager
    def _one_look(self) -> Iterator[None]:
        """What is read sees one state of the file, whatever others write meanwhile."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("COMMIT")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._sentences(), self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            what = "is damaged, or no file of labels" if type(error) is sqlite3.DatabaseError else "cannot be used"
            raise UserError(
                f"The file of labels {self.path} {what} ({error}): give another path, or a copy that was kept of it."
            ) from error
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"The file of labels {self.path} is damaged: {error}.") from error
