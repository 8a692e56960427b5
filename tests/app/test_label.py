"""The labelling page in a real browser: by keyboard alone, on a phone, with texts that must not act."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl.app.label import Labelling, LiveLabelling, label_app
from maestro_pl.app.notebook import Frame
from maestro_pl.app.serving import bound, running, serve
from maestro_pl.conductor.ridge import RidgeLearner
from maestro_pl.errors import UserError
from maestro_pl.labelling.live import LiveQuestions
from maestro_pl.labelling.questions import Group, chosen_questions
from maestro_pl.labelling.store import Click, LabelStore
from maestro_pl.labelling.teaching import Teaching
from maestro_pl.report.run_files import RunFiles
from tests.support.browser import chromium, page_of
from tests.support.run_folders import NASTY, write_responses, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def labelling(folder: Path, count: int = 10) -> Labelling:
    """Questions with every kind of text: nasty, empty, right to left, mathematics, 3,000 tokens."""
    texts = [*NASTY, "", "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", r"$\frac{a^2}{b}$", "word " * 3000]
    draw = torch.Generator().manual_seed(0)
    groups = []
    for n in range(count):
        responses = [f"{texts[(4 * n + i) % len(texts)]} {i}" if i else texts[n % len(texts)] for i in range(4)]
        z_GK, mask_GK = torch.randn(4, 2, generator=draw), torch.ones(4, 2, dtype=torch.bool)
        x_GF = torch.tensor([1.0, 0.5]).expand(4, 2)
        groups.append(Group(NASTY[n % 2], f"{NASTY[n % len(NASTY)]} {n}", responses, z_GK, mask_GK, x_GF))
    asked = chosen_questions(groups, count, 4)
    assert len(asked) == count
    learner = RidgeLearner(target="choice")
    teaching = Teaching(groups, asked, ["<b>one</b>", "two"], learner, learner.constant)
    return Labelling(asked, LabelStore(folder / "labels.db"), teaching, "ann", ["maestro-pl", "fit", "<x y>"])


def pressed(page: Any, key: str, done: int, count: int = 10) -> None:
    page.keyboard.press(key)
    page.locator("#question [role=status]", has_text=f"{done} of {count}").wait_for()


def test_ten_questions_by_keyboard_and_one_taken_back(browser: Any, tmp_path: Path) -> None:
    asked = labelling(tmp_path)
    with running(label_app(asked)) as address, page_of(browser, width=360, height=740) as page:
        page.goto(address)
        page.locator("#side h2").wait_for()
        for n, key in enumerate(["1", "2", "3", "4", "0", "x", "1", "2", "3"], 1):
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), n
            assert page.locator("main script, main iframe, main img, main a[href^=javascript]").count() == 0
            pressed(page, key, n)
        last = page.locator("#question").get_attribute("data-question")
        pressed(page, "u", 8)
        assert page.locator("#question").get_attribute("data-question") != last
        page.keyboard.press("5")  # there is no fifth answer
        pressed(page, "4", 9)
        pressed(page, "1", 10)
        assert "maestro-pl fit '<x y>'" in page.locator("#question pre").inner_text()
        page.locator("#side p", has_text="10 clicks of 1 person").wait_for()
        page.reload()
        page.locator("#question [role=status]", has_text="10 of 10").wait_for()
    clicks = asked.store.clicks()
    assert len(clicks) == 10
    assert [click.verdict for click in clicks].count("best") == 8
    keys = list(asked.questions)
    by_key = {click.question.key: click for click in clicks}
    ninth = by_key[keys[8]]
    assert ninth.best == ninth.shown[3]  # what was chosen after it was taken back, as it was shown


def test_answers_that_are_as_good_as_the_best(browser: Any, tmp_path: Path) -> None:
    asked = labelling(tmp_path)
    with running(label_app(asked)) as address, page_of(browser, width=360, height=740) as page:
        page.goto(address)
        page.keyboard.press("a")
        for _ in range(2):
            page.keyboard.down("d")  # held down, and the keyboard repeats it
        page.keyboard.up("d")
        assert page.locator("[name=also]:checked").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        pressed(page, "2", 1)  # the second is best, the first and the fourth as good
        assert page.locator("[name=also]:checked").count() == 0  # another question
        page.locator("label.check", has_text="as good").nth(2).click()
        pressed(page, "3", 2)  # the best one may be ticked as well
        for key in "bcd":
            page.keyboard.press(key)
        pressed(page, "1", 3)  # all as good: no difference
        page.keyboard.press("b")
        page.keyboard.press("b")  # taken back
        pressed(page, "1", 4)
        page.keyboard.press("b")
        pressed(page, "0", 5)
    said = {click.question.key: click for click in asked.store.clicks()}
    clicks = [said[key] for key in list(asked.questions)[:5]]
    assert [click.verdict for click in clicks] == ["best", "best", "tie", "best", "tie"]
    shown = clicks[0].shown
    assert (clicks[0].best, clicks[0].also) == (shown[1], tuple(sorted([shown[0], shown[3]])))
    assert [click.bests for click in clicks[1:]] == [(clicks[1].shown[2],), (), (clicks[3].shown[0],), ()]


def test_what_is_no_answer_is_a_sentence(tmp_path: Path) -> None:
    asked = labelling(tmp_path)
    key = next(iter(asked.questions))
    for choice, also, match in (
        ("5", [], "choice='5': expected a number from 1 to 4, 0, or x"),
        ("2", ["1", "7"], "with also='7': expected numbers from 1 to 4"),
        ("0", ["1"], "choice='0' with also='1'"),
    ):
        with pytest.raises(UserError, match=match):
            asked.answer(key, "ann", choice, also)
    with pytest.raises(UserError, match="There is no question"):
        asked.answer("none", "ann", "1")
    assert asked.store.clicks() == []


def test_two_people_answer_at_once_and_a_held_key_answers_once(browser: Any, tmp_path: Path) -> None:
    asked = labelling(tmp_path)
    with running(label_app(asked)) as address, page_of(browser) as ann, page_of(browser) as bob:
        ann.goto(f"{address}/label?rater=ann")
        bob.goto(f"{address}/label?rater=bob")
        for n in (1, 2):
            pressed(ann, "1", n)
            pressed(bob, "2", n)
        ann.keyboard.down("3")
        for _ in range(5):
            ann.keyboard.down("3")  # the keyboard repeats it
        ann.keyboard.up("3")
        ann.locator("#question [role=status]", has_text="3 of 10").wait_for()
        time.sleep(0.3)
        ann.locator("#side p", has_text="5 clicks of 2 people").wait_for()
    clicks = asked.store.clicks()
    assert [sum(click.rater == rater for click in clicks) for rater in ("ann", "bob")] == [3, 2]


def test_forty_questions_by_keyboard_wait_for_no_fit(browser: Any, tmp_path: Path) -> None:
    """Each key is one request, and its answer does not wait for what the clicks teach: that is held back to the end."""
    asked = labelling(tmp_path, 40)
    held, learn = threading.Event(), asked.teaching.progress

    def progress(clicks: Any) -> Any:
        assert held.wait(1200)  # of a machine with much else to do
        return learn(clicks)

    asked.teaching.progress = progress  # type: ignore[method-assign]
    sent: list[str] = []
    took = []
    with running(label_app(asked)) as address, page_of(browser) as page:
        page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
        page.goto(address)
        for n in range(1, 41):
            start = time.perf_counter()
            pressed(page, "12340x"[n % 6], n, 40)
            took.append(1000 * (time.perf_counter() - start))
            if n % 13 == 0:  # taken back by key, and answered otherwise
                pressed(page, "u", n - 1, 40)
                pressed(page, "2", n, 40)
        assert page.locator("#side h2").count() == 0
        held.set()
        page.locator("#side p", has_text="40 clicks of 1 person").wait_for()
        assert len([url for url in sent if "/click?" in url]) == 43
        assert len([url for url in sent if "/undo?" in url]) == 3
        assert len(sent) == 46
    print(f"milliseconds from key to next question: median {statistics.median(took):.0f}, largest {max(took):.0f}")
    assert len(asked.store.clicks()) == 40
    assert {click.rater for click in asked.store.clicks()} == {"ann"}


def test_answers_of_every_kind_can_be_read_and_chosen(browser: Any, tmp_path: Path) -> None:
    texts = [
        "word " * 3000 + "end",
        "",
        "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
        r"So $\frac{a^2}{b}$. " + NASTY[0],
    ]
    group = Group("a", "p", texts, torch.randn(4, 2), torch.ones(4, 2).bool(), torch.ones(4, 2))
    asked = chosen_questions([group], 1, 4)
    learner = RidgeLearner(target="choice")
    teaching = Teaching([group], asked, ["one", "two"], learner, learner.constant)
    one = Labelling(asked, LabelStore(tmp_path / "labels.db"), teaching, "ann")
    with running(label_app(one)) as address, page_of(browser, width=360, height=740) as page:
        page.goto(address)
        long = page.locator(".answer .markdown", has_text="end")
        box = long.bounding_box()
        assert box["height"] < 740  # it scrolls by itself, so that the others stay near
        assert long.evaluate("e => e.scrollHeight > 2 * e.clientHeight && e.tabIndex === 0")
        assert page.locator(".answer .empty").inner_text() == "(empty)"
        assert page.locator(".answer math mfrac").count() == 1
        right = page.locator(".answer .markdown", has_text="\u05e9")
        assert right.evaluate("e => getComputedStyle(e).direction") == "rtl"
        assert page.locator(".answer", has_text="<script>").count() == 1
        place = page.locator(".answer", has=page.locator(".empty")).get_attribute("aria-label")
        page.keyboard.press(place.split()[-1])
        page.locator("#question [role=status]", has_text="1 of 1").wait_for()
    (click,) = one.store.clicks()
    assert click.question.responses[click.best or 0] == ""


def _serve(folder: Path, port: int, hang: str) -> None:
    """A server of its own process, which may stop in the middle of its second click for ever."""
    asked = labelling(folder)
    real, seen = asked.store.click, [0]

    def click(click: Click) -> bool:
        seen[0] += 1
        if hang == "before" and seen[0] == 2:
            (folder / "hangs").touch()
            time.sleep(600)
        done = real(click)
        if hang == "after" and seen[0] == 2:
            (folder / "hangs").touch()
            time.sleep(600)
        return done

    asked.store.click = click  # type: ignore[method-assign]
    serve(lambda token: label_app(asked, token), port=port)


@contextmanager
def server(folder: Path, port: int, hang: str = "") -> Iterator[None]:
    """The server; ends by kill -9."""
    (folder / "hangs").unlink(missing_ok=True)
    fresh = multiprocessing.get_context("forkserver")  # one process that has loaded everything, and no thread of ours
    fresh.set_forkserver_preload([__name__])
    child = fresh.Process(target=_serve, args=(folder, port, hang), daemon=True)
    child.start()
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()


def test_kill_9_between_and_during_clicks_loses_nothing(browser: Any, tmp_path: Path) -> None:
    with bound("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    page = browser.new_page()
    page.set_default_timeout(60_000)

    def hung(key: str) -> None:
        page.keyboard.press(key)
        while not (tmp_path / "hangs").exists():
            page.wait_for_timeout(20)

    def told() -> None:
        page.locator("[data-status]", has_text="The server does not answer").wait_for()

    with server(tmp_path, port, "before"):
        page.goto(f"http://127.0.0.1:{port}")
        pressed(page, "1", 1)
        hung("2")
    told()  # killed before the click was kept: the page shows its question still
    assert len(LabelStore(tmp_path / "labels.db").clicks()) == 1
    page.keyboard.press("2")  # nobody is there
    told()
    with server(tmp_path, port, "after"):
        pressed(page, "3", 2)  # the page goes on, without being loaded anew
        page.locator("[data-status]:empty").wait_for(state="attached")  # and what went wrong is over
        hung("1")
    told()  # killed after it was kept and before the answer came
    assert len(LabelStore(tmp_path / "labels.db").clicks()) == 3
    with server(tmp_path, port):
        pressed(page, "2", 3)  # pressed again: what was kept stands, and counts once
        page.locator("[data-status]", has_text="that answer stands").wait_for()
        pressed(page, "4", 4)
        page.locator("[data-status]:empty").wait_for(state="attached")
        page.reload()
        page.locator("#question [role=status]", has_text="4 of 10").wait_for()
        pressed(page, "u", 3)
        pressed(page, "0", 4)
    page.close()
    clicks = LabelStore(tmp_path / "labels.db").clicks()
    shown = [None if click.best is None else click.shown.index(click.best) + 1 for click in clicks]
    assert shown == [1, 3, 1, None]
    assert len({click.question.key for click in clicks}) == 4


def test_a_frame_of_a_notebook_answers_through_a_forwarded_port(browser: Any, tmp_path: Path) -> None:
    """As with `ssh -L`: the page comes under another port than the server's, inside a page of the notebook's server."""
    asked = labelling(tmp_path)
    frame = Frame(label_app(asked), height=500)
    target = int(frame.address.rsplit(":", 1)[1].strip("/"))
    with forwarded(target) as port, notebook(frame._repr_html_().replace(str(target), str(port))) as address:
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        inside = page.frame_locator("iframe")
        inside.locator("#question h1").click()
        page.keyboard.press("1")
        inside.locator("#question [role=status]", has_text="1 of 10").wait_for()
        page.close()
    frame.stop()
    assert len(asked.store.clicks()) == 1


@contextmanager
def forwarded(target: int) -> Iterator[int]:
    """A port that leads to another one."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_forward, args=(listening, target), daemon=True).start()
        yield listening.getsockname()[1]


def _forward(listening: socket.socket, target: int) -> None:
    while True:
        try:
            near, _ = listening.accept()
        except OSError:
            return
        far = socket.create_connection(("127.0.0.1", target))
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def notebook(html: str) -> Iterator[str]:
    """A server of another origin, whose page holds this."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://localhost:{served.server_port}/"
        served.shutdown()


def test_the_next_question_of_a_running_run_appears_by_itself(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r" / "version_0", steps=1, nasty=True)
    store = LabelStore(tmp_path / "labels.db")
    live = LiveLabelling(RunFiles(run), LiveQuestions(run, 4), store, "ann")
    with running(label_app(live)) as address, page_of(browser, width=360, height=740) as page:
        page.goto(address)
        for n in (1, 2):
            page.keyboard.press("1")
            page.locator("#question [role=status]", has_text=f"{n} answered").wait_for()
        page.locator("#question h1", has_text="Nothing to be asked now").wait_for()
        write_responses(run / "rollouts.jsonl", range(2, 3), nasty=True)
        page.locator("#question h1", has_text="Which answer is best?").wait_for()
        page.keyboard.press("2")
        page.locator("#question [role=status]", has_text="3 answered").wait_for()
        page.locator("#side p", has_text="3 clicks of 1 person").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert len(store.clicks()) == 3
