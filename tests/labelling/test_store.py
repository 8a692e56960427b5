"""Where the clicks of people are kept: nothing is lost, nobody is counted twice, and what is no file of labels is said."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from maestro_pl.errors import UserError
from maestro_pl.labelling.exchange import exported
from maestro_pl.labelling.importing import imported, labels_in
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import Click, LabelStore, choice_of

CHAT = [{"role": "user", "content": "Say *hello*"}]


def question(n: int, answers: int = 3) -> Question:
    return Question.of(
        "greet" if n % 2 else "sum", CHAT if n % 2 else f"prompt {n}", [f"{n}/{i}" for i in range(answers)]
    )


def click(n: int, rater: str = "ann", best: int | None = 1, verdict: Any = "best") -> Click:
    asked = question(n)
    return Click(asked, rater, verdict, best, tuple(asked.order(rater)), 1_700_000_000.0 + n)


def said(store: LabelStore) -> list[tuple[str, str, str, str | None]]:
    return [
        (c.question.key, c.rater, c.verdict, None if c.best is None else c.question.responses[c.best])
        for c in store.clicks()
    ]


def taken(store: LabelStore, path: Path, form: str | None = None) -> tuple[int, int]:
    """How many labels of a file were new, and how many known."""
    done = imported(store, labels_in(path, form))
    assert done.contradicting == []
    return done.new, done.known


def test_a_click_counts_once_and_can_be_taken_back(tmp_path: Path) -> None:
    store = LabelStore(tmp_path / "labels.db")
    assert store.click(click(0))
    assert not store.click(click(0, best=2))  # a key that was pressed twice
    assert store.click(click(0, "bob", None, "tie"))
    assert store.click(click(1, best=None, verdict="bad"))
    assert [c.ranks for c in store.clicks()] == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert store.answered("ann") == {question(0).key, question(1).key}
    before = store.version()
    assert store.undo("ann", [question(0).key]) == question(0).key  # of these questions only
    assert store.undo("ann", [question(0).key]) is None
    assert store.version() != before
    assert store.click(click(0, best=2))
    again = LabelStore(tmp_path / "labels.db", writes=False)
    assert said(again) == said(store)
    assert [c.best for c in again.clicks()] == [None, None, 2]


def test_several_answers_may_be_the_best(tmp_path: Path) -> None:
    store = LabelStore(tmp_path / "labels.db")
    asked = question(0, 4)
    shown = tuple(asked.order("ann"))
    store.click(Click(asked, "ann", "best", 2, shown, 1.0, also=(0,)))
    (found,) = LabelStore(tmp_path / "labels.db", writes=False).clicks()
    assert (found.best, found.also, found.bests, found.ranks) == (2, (0,), (2, 0), [0, 1, 0, 1])
    for best, also, match in (
        (2, (2,), "are \\[2\\]: expected some of \\[0, 1, 3\\]"),
        (2, (1, 0), "in their order"),
        (2, (0, 1, 3), "and not all"),
        (2, (4,), "expected some of"),
        (None, (0,), "expected some of \\[\\]"),
    ):
        with pytest.raises(UserError, match=match):
            Click(asked, "ann", "best" if best else "tie", best, shown, 1.0, also=also)
    assert choice_of([2], 4) == ("best", 2, ())
    assert choice_of([2, 3, 0, 2], 4) == ("best", 2, (0, 3))
    assert choice_of([2, 3, 0, 1], 4) == ("tie", None, ())


def _without_also(path: Path) -> None:
    """A file as version 1 has it."""
    with sqlite3.connect(path) as file:
        file.execute("ALTER TABLE clicks DROP COLUMN also")
        file.execute("PRAGMA user_version = 1")
    file.close()


def test_a_file_of_the_first_version_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "labels.db"
    store = LabelStore(path)
    for n in range(3):
        store.click(click(n))
    known = store.clicks()
    store.close()
    _without_also(path)
    reader = LabelStore(path, writes=False)  # that of a run, which changes nothing
    assert reader.clicks() == known
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone() == (1,)
    two = Click(question(3, 4), "ann", "best", 0, tuple(question(3, 4).order("ann")), 1.0, also=(3,))
    for _ in range(2):  # a page that is opened now brings it up to date, once
        writer = LabelStore(path)
        writer.click(two)
        writer.close()
    assert [(c.best, c.also) for c in reader.clicks()] == [(1, ())] * 3 + [(0, (3,))]
    _without_also(path)

    def opened(together: threading.Barrier) -> None:
        together.wait(60)
        LabelStore(path).close()

    together = threading.Barrier(3)
    with ThreadPoolExecutor(3) as people:
        for person in [people.submit(opened, together) for _ in range(3)]:
            person.result()
    assert [c.best for c in reader.clicks()] == [1, 1, 1, 0]


def test_a_question_is_known_by_its_content_alone() -> None:
    asked = Question.of("a", "p", ["x", "y"])
    assert Question.of("a", " p\r\n", ["y ", "x"]).key == asked.key
    assert Question.of("a", "q", ["x", "y"]).key != asked.key
    assert Question.of("a", "p", ["x", "z"]).key != asked.key
    orders = {tuple(Question.of("a", f"p{n}", ["x", "y"]).order("ann")) for n in range(20)}
    assert orders == {(0, 1), (1, 0)}
    for answers in (["x"], ["x", " x"], [str(n) for n in range(10)]):
        with pytest.raises(UserError, match="expected 2 to 9, all different"):
            Question.of("a", "p", answers)


def test_several_people_click_at_once(tmp_path: Path) -> None:
    """Every one of them may be the one that makes the file: they open it in the same moment, forty times."""

    def clicks(path: Path, rater: str, together: threading.Barrier) -> None:
        together.wait(60)
        own = LabelStore(path)
        for n in range(2):
            own.click(click(n, rater))
        own.close()

    for attempt in range(40):
        path, together = tmp_path / f"{attempt}.db", threading.Barrier(3)
        with ThreadPoolExecutor(3) as people:
            done = [people.submit(clicks, path, name, together) for name in ("ann", "bob", "cem")]
        for person in done:
            person.result()
        assert len(LabelStore(path).clicks()) == 6


def _click_for_ever(path: Path, told: Path) -> None:
    store = LabelStore(path)
    with told.open("w") as file:
        for n in range(100_000):
            store.click(click(n))
            file.write(f"{question(n).key}\n")
            file.flush()


def test_no_click_that_was_answered_is_lost_by_kill_9(tmp_path: Path) -> None:
    path, told = tmp_path / "labels.db", tmp_path / "told"
    for _ in range(2):
        worker = multiprocessing.get_context("fork").Process(target=_click_for_ever, args=(path, told))
        worker.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not told.exists() or told.read_text().count("\n") < 5):
            time.sleep(0.01)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        answered = told.read_text().split("\n")[:-1]
        assert len(answered) >= 5
        assert set(answered) <= LabelStore(path).answered("ann")
        told.unlink()
    assert LabelStore(path).click(click(200_000))


def test_what_is_no_file_of_labels_is_said(tmp_path: Path) -> None:
    def refused(path: Path, match: str, writes: bool = True) -> None:
        with pytest.raises(UserError, match=match):
            LabelStore(path, writes)

    refused(tmp_path / "none.db", "There is no file of labels", writes=False)
    refused(tmp_path / "none/labels.db", "in a folder that exists")
    refused(tmp_path, "expected the path of a file")
    (tmp_path / "text.db").write_text("prompt,response\n" * 400)
    refused(tmp_path / "text.db", "is damaged, or no file of labels")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE mine (x)")
    refused(tmp_path / "other.db", "of another program")
    store = LabelStore(tmp_path / "labels.db")
    for n in range(60):
        store.click(click(n))
    store.close()
    whole = (tmp_path / "labels.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.db", "damaged")
    with sqlite3.connect(tmp_path / "labels.db") as later:
        later.execute("PRAGMA user_version = 99")
    refused(tmp_path / "labels.db", "of a later maestro-pl")
    (tmp_path / "empty.db").touch()
    assert LabelStore(tmp_path / "empty.db", writes=False).clicks() == []
    assert (tmp_path / "empty.db").stat().st_size == 0  # a reader writes nothing


def test_bad_clicks_are_sentences() -> None:
    for changes, match in (
        ({"rater": "a b"}, "expected a pseudonym"),
        ({"best": 3}, "The best of 3 answers is 3"),
        ({"best": None}, "The best of 3 answers is None"),
        ({"verdict": "worst"}, "expected one of best, tie, bad"),
    ):
        with pytest.raises(UserError, match=match):
            click(0, **{"rater": "ann", **changes})


@pytest.mark.parametrize(
    ("form", "name"), [("csv", "l.csv"), ("jsonl", "l.jsonl"), ("argilla", "l.json"), ("label-studio", "l.json")]
)
@pytest.mark.parametrize("several", [False, True])
def test_labels_travel_there_and_back(tmp_path: Path, form: str, name: str, several: bool) -> None:
    store = LabelStore(tmp_path / "labels.db")
    odd = Question.of("sum", "=1+1", ["=HYPERLINK(1)", 'two, or\n"2"', "  \u05e9\u05dc\u05d5\u05dd 2", ""])
    store.add([question(9)])  # nobody has answered it
    store.click(Click(odd, "ann", "best", 0, tuple(odd.order("ann")), 1_700_000_000.0))
    for each in (click(1), click(1, "bob", None, "tie"), click(2, "bob", None, "bad")):
        store.click(each)
    count = 4
    if several:
        four = question(5, 4)
        store.click(Click(four, "ann", "best", 2, tuple(four.order("ann")), 1_700_000_001.0, also=(0, 3)))
        count = 5
    given = None if name != "l.json" else form
    assert exported(store, tmp_path / name, given) == count
    other = LabelStore(tmp_path / "other.db")
    assert taken(other, tmp_path / name, given) == (count, 0)
    assert taken(other, tmp_path / name, given) == (0, count)
    before = store.clicks()
    assert taken(store, tmp_path / name, given) == (0, count)  # the same people, by whatever id they travelled
    assert store.clicks() == before
    assert sorted(c.ranks for c in other.clicks()) == sorted(c.ranks for c in store.clicks())

    def without_people(found: LabelStore) -> list[Any]:
        return sorted((key, verdict, best or "") for key, _, verdict, best in said(found))

    assert without_people(other) == without_people(store)
    assert len({c.rater for c in other.clicks()}) == 2
    if form in ("csv", "jsonl"):
        assert sorted((c.question.key, c.rater, c.time, c.shown) for c in other.clicks()) == sorted(
            (c.question.key, c.rater, c.time, c.shown) for c in store.clicks()
        )
    with pytest.raises(UserError, match="not there yet"):
        exported(store, tmp_path / name, given)


def test_answers_of_every_letter_travel_as_csv(tmp_path: Path) -> None:
    store = LabelStore(tmp_path / "labels.db")
    letters = list('ab\r\n",;\t\x85\u2028 ')
    draws = random.Random(0)
    for n in range(60):
        texts = ["".join(draws.choices(letters, k=6)) + str(i) for i in range(3)]
        asked = Question.of("a\rb", f"p\r{n}", texts)
        also = (next(place for place in range(3) if place != n % 3),)
        store.click(Click(asked, "ann", "best", n % 3, tuple(asked.order("ann")), 1.0 + n, also=also * (n % 2)))
    long = Question.of("a", "long", ["x" * 200_000, "y"])
    store.click(Click(long, "ann", "best", 1, (0, 1), 100.0))
    assert exported(store, tmp_path / "l.csv") == 61
    other = LabelStore(tmp_path / "other.db")
    assert taken(other, tmp_path / "l.csv") == (61, 0)

    def held(each: LabelStore) -> list[Any]:
        return [(c.question, c.verdict, c.best, c.also, c.shown, c.time) for c in each.clicks()]

    assert held(other) == held(store)


def test_a_click_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.db"
    store = LabelStore(path)
    for n in range(3):
        store.click(click(n))
    with sqlite3.connect(path) as file:
        file.execute("UPDATE clicks SET also = '[5]' WHERE id = 2")
    file.close()
    with pytest.raises(UserError, match=r"labels\.db is damaged: its click 2 cannot be read \(As good as the best"):
        store.clicks()


def test_what_is_read_is_one_state_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is opened between two looks of a reader makes no sole best answer of two that tie."""
    path = tmp_path / "labels.db"
    store = LabelStore(path)
    store.click(click(0))
    store.close()
    _without_also(path)
    reader, looked = LabelStore(path, writes=False), LabelStore._form

    def look(self: LabelStore) -> int:
        form = looked(self)
        if self is reader:
            monkeypatch.setattr(LabelStore, "_form", looked)
            writer = LabelStore(path)
            writer.click(Click(question(3, 4), "ann", "best", 0, tuple(question(3, 4).order("ann")), 1.0, also=(3,)))
            writer.close()
        return form

    monkeypatch.setattr(LabelStore, "_form", look)
    assert [c.also for c in reader.clicks()] in ([()], [(), (3,)])
    assert [c.also for c in reader.clicks()] == [(), (3,)]
