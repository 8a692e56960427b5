"""The pages of ``maestro-pl view``, without a browser."""

from __future__ import annotations

import html
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from maestro_pl.app.notebook import show
from maestro_pl.app.serving import running
from maestro_pl.app.view import Viewer, view_app
from maestro_pl.cli import main
from maestro_pl.errors import UserError
from tests.support.run_folders import NASTY, write_responses, write_run

PAGES = (
    "/", "/curves?metric=reward/format&metric=policy/kl", "/weights", "/groups?sort=disputed", "/group?id=1",
    "/group?id=2&show=markdown", "/side", "/side?prompt=3&show=markdown",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / name / "version_0", nasty=True, seed=seed) for seed, name in enumerate("ab")]


@pytest.fixture(scope="module")
def address(folders: list[Path]) -> Iterator[str]:
    with running(view_app(folders)) as url:
        yield url


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def groups_of(page: str) -> list[int]:
    return [int(number) for number in re.findall(r'id="g(\d+)"', page)]


@pytest.mark.parametrize("path", PAGES)
def test_no_text_of_a_run_becomes_html(address: str, path: str) -> None:
    status, page = get(address + path)
    assert status == 200
    for element in re.findall(r"<[a-zA-Z][^>]*>", page):
        assert "pwned" not in element, element
        assert not re.search(r"\son\w+\s*=|javascript:", element), element
    assert "\x1b" not in page
    assert "49" not in re.findall(r"onload=window.pwned=4&gt;(.{0,20})", page)  # no template of a text is filled in


def test_the_list_is_filtered_and_sorted(address: str) -> None:
    assert len(groups_of(get(address + "/groups")[1])) == 12
    assert len(groups_of(get(address + "/groups?task=story")[1])) == 6
    assert len(groups_of(get(address + "/groups?only=dead")[1])) == 3
    assert groups_of(get(address + "/groups?only=truncated")[1]) == [4, 5]
    assert groups_of(get(address + "/groups?first=2&last=3")[1]) == [2, 3, 4, 5]
    assert groups_of(get(address + "/groups?q=STORY+prompt+4")[1]) == [7]
    assert groups_of(get(address + "/groups?q=no+such+text")[1]) == []
    best = groups_of(get(address + "/groups?sort=best")[1])
    assert groups_of(get(address + "/groups?sort=worst")[1])[0] == best[-1]
    assert groups_of(get(address + "/groups?by=length&low=1e9")[1]) == []


def test_findings_stand_beside_their_step(address: str) -> None:
    page = get(address + "/groups")[1]
    assert page.index("Health 1: dead_groups") < page.index('id="g2"')
    assert page.index("Health 1: dead_groups") > page.index('id="g1"')
    assert "60 % of the groups teach nothing" in get(address + "/group?id=2")[1]


def test_bars_of_a_group_add_up_and_its_neighbours_are_those_of_the_list(address: str) -> None:
    page = get(address + "/group?id=4&task=arithmetic")[1]
    assert page.count("✓ adds up") == 4
    assert "does not add up" not in page
    assert "id=2&amp;task=arithmetic" in page  # back
    assert "id=6&amp;task=arithmetic" in page  # on
    advantages = [float(text) for text in re.findall(r"<h2>\d\. advantage ([+-][\d.]+)", page)]
    assert advantages == sorted(advantages, reverse=True)


def test_a_run_without_normalised_rewards_says_that_its_sums_are_not_exact(tmp_path: Path) -> None:
    with running(view_app([write_run(tmp_path / "version_0", exact=False)])) as url:
        assert get(url + "/group?id=0")[1].count("not exact: raw × weight") == 4


def test_prompts_of_two_runs_stand_side_by_side(address: str) -> None:
    page = get(address + "/side?prompt=2")[1]
    assert page.count('<article class="response inner">') == 8
    assert "a/version_0" in page
    assert "b/version_0" in page


def test_a_page_asks_again_and_is_sent_only_what_is_new(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "version_0", steps=2)
    with running(view_app([folder])) as url:
        page = get(url + "/groups")[1]
        again = html.unescape(re.findall(r'hx-get="([^"]+)"', page)[0])
        assert get(url + again)[0] == 204
        write_responses(folder / "rollouts.jsonl", range(3, 4))
        with (folder / "rollouts.jsonl").open("a") as file:
            file.write('{"step": 4, "half')  # a line that is being written
        status, page = get(url + again)
        assert (status, len(groups_of(page))) == (200, 6)


def test_bad_addresses_are_answered_in_a_sentence(address: str) -> None:
    for path, words in (
        ("/groups?low=x", "low=&#39;x&#39;: expected a number"),
        ("/groups?sort=x", "sort=&#39;x&#39;"),
        ("/groups?by=x", "expected reward"),
        ("/groups?run=9", "There is no run 9"),
        ("/groups?stage=../x", "expected one of"),
        ("/group?id=999", "There is no group 999"),
        ("/group?id=..%2F..%2Fetc", "The address cannot be used"),
    ):
        status, page = get(address + path)
        assert status in (400, 422)
        assert words in page, path


def test_folders_that_are_no_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a" / "version_0", steps=1)
    for arguments, words in (
        ([str(tmp_path / "none")], "there is no such folder"),
        ([str(tmp_path / "a")], "it has the runs version_0"),
        ([str(run), str(run)], "is given twice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["view", *arguments])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_and_nothing_small_is_written(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / where / "r" / "version_0", steps=1) for where in "ab"]
    before = sorted(path for path in tmp_path.rglob("*"))
    assert len({run.name for run in Viewer(folders).runs}) == 2
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_notebook_shows_a_frame(folders: list[Path]) -> None:
    frame = show(folders[0], height=300)
    try:
        assert f'<iframe src="{frame.address}" width="100%" height="300"' in frame._repr_html_()
        assert get(frame.address)[0] == 200
    finally:
        frame.stop()


def test_texts_are_as_nasty_as_they_claim() -> None:
    assert any("<script>" in text for text in NASTY)


def test_responses_that_cannot_be_read_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in the thread that reads: the page would say for ever that they are read for the first time."""

    def denied(files: list[Path]) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("maestro_pl.app.view.Responses", denied)
    run = write_run(tmp_path / "r" / "version_0", steps=1)
    with pytest.raises(
        UserError, match=r"responses in .*version_0 cannot be read \(PermissionError: .*Permission denied"
    ):
        Viewer([run]).index(0, "rollouts").get()
