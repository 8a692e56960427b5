"""The page of a study, without a browser, and once by keyboard in one."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from maestro_pl.app.serving import running
from maestro_pl.app.study import study_app
from maestro_pl.study.answers import read_systems
from maestro_pl.study.criteria import DEFAULTS, FILE
from maestro_pl.study.plan import CHECK, Study, new_study, write_study
from maestro_pl.study.store import FILE as CLICKS
from maestro_pl.study.store import Clicks
from tests.support.browser import chromium, page_of
from tests.support.run_folders import NASTY
from tests.support.studies import write_answers


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Study]:
    prompts = [("story", f"prompt {text}") for text in NASTY]
    one = {key: f"One says {NASTY[n]} $x^2$" for n, key in enumerate(prompts)}
    other = {key: "" if n == 0 else f"Other says {NASTY[n]} \u05e9\u05dc\u05d5\u05dd" for n, key in enumerate(prompts)}
    files = [write_answers(tmp_path / "secret_a.jsonl", one), write_answers(tmp_path / "secret_b.jsonl", other)]
    study = new_study(read_systems([str(file) for file in files]), 20, 2, None, 2, 0)
    folder = tmp_path / "study"
    write_study(study, folder)
    (folder / FILE).write_text(DEFAULTS.read_text(encoding="utf-8"), encoding="utf-8")
    return folder, study


@pytest.fixture
def address(made: tuple[Path, Study]) -> Iterator[str]:
    with running(study_app(made[0])) as url:
        yield url


def ask(url: str, form: dict[str, str] | None = None, **headers: str) -> tuple[int, str]:
    data = None if form is None else urllib.parse.urlencode(form).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_rater_answers_takes_back_pauses_and_goes_on(address: str, made: tuple[Path, Study]) -> None:
    folder, study = made
    rater = study.raters[0]
    mine = f"{address}/r/{rater.token}"
    assert f"There are {len(rater.items)} questions" in ask(mine)[1]
    for place in range(len(rater.items)):
        page = ask(f"{mine}/next")[1]
        assert f'name="place" value="{place}"' in page
        assert (CHECK in page) == (rater.items[place].check is not None)
        status, page = ask(f"{mine}/choose", {"place": str(place), "choice": "tie"})
        assert status == 200
        if place == 3:
            assert 'name="place" value="3"' in ask(f"{mine}/undo", {})[1]
            ask(f"{mine}/choose", {"place": "3", "choice": "left"})
            assert "4 of" in ask(mine)[1]  # a pause: the link says where one is
    assert "That was all" in page
    stands = Clicks(folder / CLICKS).of(rater.name)
    assert [click.choice for click in stands.values()] == ["tie"] * 3 + ["left"] + ["tie"] * (len(stands) - 4)
    assert all(click.seconds is not None for click in stands.values())
    assert Clicks(folder / CLICKS).of("R2") == {}


def test_pages_are_blind_and_no_text_becomes_html(address: str, made: tuple[Path, Study]) -> None:
    _, study = made
    rater = study.raters[1]
    for place in range(len(rater.items)):
        page = ask(f"{address}/r/{rater.token}/next")[1]
        assert "secret" not in page
        assert "\x1b" not in page
        for element in re.findall(r"<[a-zA-Z][^>]*>", page):
            assert "pwned" not in element, element
            assert not re.search(r"\son\w+\s*=|javascript:", element), element
        ask(f"{address}/r/{rater.token}/choose", {"place": str(place), "choice": "left"})


def test_strangers_and_bad_clicks_are_refused(address: str, made: tuple[Path, Study]) -> None:
    folder, study = made
    mine = f"{address}/r/{study.raters[0].token}"
    before = sorted(path.name for path in folder.iterdir())
    assert ask(address)[0] == 404
    for path in ("/r/wrong", "/r/wrong/next"):
        assert ask(address + path)[0] == 400
    for form in ({"place": "99", "choice": "left"}, {"place": "0", "choice": "x"}, {"choice": "left"}, {"place": "²"}):
        assert ask(f"{mine}/choose", form)[0] == 400
    assert ask(f"{mine}/choose", {"place": "0", "choice": "x" * 2000})[0] == 400
    assert ask(f"{mine}/choose", {"place": "0", "choice": "left"}, Origin="http://evil.example")[0] == 403
    assert Clicks(folder / CLICKS).all() == []
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_killed_writer_loses_no_click_that_was_kept(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom maestro_pl.study.store import Clicks\n"
        "store = Clicks(Path(sys.argv[1]))\n"
        "for place in range(100000):\n    store.add('R1', place, 'left')\n    print(place, flush=True)\n"
    )
    path = tmp_path / CLICKS
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 20:
                break
        writer.send_signal(signal.SIGKILL)
        said = [20, *map(int, writer.stdout.read().split())]
    store = Clicks(path)
    places = list(store.of("R1"))
    assert places[: said[-1] + 1] == list(range(said[-1] + 1))
    assert len(places) - 1 - said[-1] in (0, 1)  # the one that was kept and not yet said
    store.add("R1", 0, "right")
    assert store.of("R1")[0].choice == "right"


@pytest.mark.slow
def test_a_rater_needs_only_the_keyboard(made: tuple[Path, Study]) -> None:
    folder, study = made
    rater = study.raters[0]
    with chromium() as browser, running(study_app(folder)) as url, page_of(browser, width=400, height=800) as page:
        page.goto(f"{url}/r/{rater.token}")
        page.keyboard.press("Enter")
        page.locator("[name=place][value='0']").wait_for(state="attached")
        keys = "120" * len(rater.items)
        for place in range(len(rater.items)):
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            if place == 2:
                page.keyboard.press("u")
                page.locator("[name=place][value='1']").wait_for(state="attached")
                page.keyboard.press("0")
                page.locator("[name=place][value='2']").wait_for(state="attached")
            page.keyboard.press(keys[place])
            if place + 1 < len(rater.items):
                page.locator(f"[name=place][value='{place + 1}']").wait_for(state="attached")
        page.get_by_text("That was all").wait_for()
    choices = [click.choice for click in sorted(Clicks(folder / CLICKS).all(), key=lambda click: click.place)]
    named = {"1": "left", "2": "right", "0": "tie"}
    assert choices == [named[key] if place != 1 else "tie" for place, key in enumerate(keys[: len(choices)])]
