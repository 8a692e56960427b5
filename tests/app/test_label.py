"""The labelling page in a real browser: by keyboard alone, on a phone, with texts that must not act."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl.app.label import Labelling, label_app
from maestro_pl.app.serving import running
from maestro_pl.conductor.ridge import RidgeLearner
from maestro_pl.labelling.questions import Group, chosen_questions
from maestro_pl.labelling.store import LabelStore
from maestro_pl.labelling.teaching import Teaching
from tests.support.browser import chromium, page_of
from tests.support.run_folders import NASTY

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


def pressed(page: Any, key: str, done: int) -> None:
    page.keyboard.press(key)
    page.locator("#question [role=status]", has_text=f"{done} of 10").wait_for()


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
