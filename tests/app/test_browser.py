"""The pages in a real browser: nothing of a run acts, everything works by keyboard and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maestro_pl.app.serving import running
from maestro_pl.app.view import view_app
from maestro_pl.report.chosen import chosen
from maestro_pl.report.page import report_html
from maestro_pl.report.responses import Responses
from maestro_pl.report.run_files import RunFiles
from tests.support.browser import chromium, page_of
from tests.support.run_folders import write_responses, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a" / "version_0", nasty=True)


def test_a_reader_finds_a_response_by_keyboard_alone(browser: Any, folder: Path) -> None:
    with running(view_app([folder])) as url, page_of(browser) as page:
        page.goto(url)
        assert page.locator("svg[role=img]").count() >= 3
        page.keyboard.press("4")
        page.wait_for_url("**/groups")
        page.keyboard.press("/")
        page.keyboard.type("story prompt 4")
        page.keyboard.press("Enter")
        page.wait_for_url("**/groups?*q=story*")
        assert page.locator("table.list tbody a").count() == 1
        page.locator("table.list tbody a").focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/group?id=7*")
        page.keyboard.press("l")
        page.wait_for_url("**/groups?*q=story*")
        page.goto(f"{url}/group?id=4&sort=step")
        page.keyboard.press("t")
        page.wait_for_url("**show=markdown*")
        assert page.locator(".markdown math msup").count() >= 1
        page.keyboard.press("j")
        page.wait_for_url("**/group?id=5*")
        assert page.locator("article.response").count() == 4


def test_nothing_of_a_run_acts_and_pages_fit_a_phone(browser: Any, folder: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "b" / "version_0", nasty=True, seed=1)
    paths = ["/", "/curves", "/weights", "/groups", *(f"/side?prompt={n}&show=markdown" for n in (0, 5))]
    paths += [f"/group?id={n}&show={show}" for n in range(0, 12, 2) for show in ("plain", "markdown")]
    with running(view_app([folder, other])) as url, page_of(browser, width=360, height=740) as page:
        for path in paths:
            assert page.goto(url + path).status == 200
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
            assert page.locator("main script, main iframe, main img, main a[href^=javascript]").count() == 0


def test_bars_of_a_response_end_where_the_reward_ends(browser: Any, folder: Path) -> None:
    with running(view_app([folder])) as url, page_of(browser) as page:
        page.goto(f"{url}/group?id=0")
        for table in page.locator("table.sum").all():
            boxes = [bar.bounding_box() for bar in table.locator("rect").all()]
            *parts, total = boxes
            edges = [edge for box in parts[-1:] for edge in (box["x"], box["x"] + box["width"])]
            ends = (total["x"], total["x"] + total["width"])
            assert min(abs(edge - end) for edge in edges for end in ends) < 3  # pixels


def test_a_running_run_refreshes_by_itself(browser: Any, folder: Path) -> None:
    with running(view_app([folder])) as url, page_of(browser) as page:
        page.goto(url + "/groups?sort=step")
        assert page.locator("table.list tbody a").count() == 12
        write_responses(folder / "rollouts.jsonl", range(7, 8))
        page.locator("#g13").wait_for()
        assert page.locator("table.list tbody a").count() == 14


def test_a_report_opens_from_its_file(browser: Any, folder: Path) -> None:
    page_text = report_html(RunFiles(folder), chosen(Responses([folder / "rollouts.jsonl"])))
    path = folder / "report.html"
    path.write_text(page_text, encoding="utf-8")
    with page_of(browser, width=360, height=740) as page:
        page.goto(path.as_uri())
        assert page.locator("details").count() == 10
        assert page.locator("svg[role=img]").count() >= 5
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
