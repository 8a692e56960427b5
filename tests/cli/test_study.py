"""``maestro-pl study`` as a person calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from maestro_pl.app import serving
from maestro_pl.cli import main
from maestro_pl.study.plan import read_study
from tests.support.studies import write_answers


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    prompts = [("story", f"p{n}") for n in range(6)]
    return [str(write_answers(tmp_path / f"{name}.jsonl", {key: f"{name} {key}" for key in prompts})) for name in "ab"]


def fails(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["study", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_study_is_made_and_served_with_a_link_for_each_rater(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "study")
    main(["study", "new", *files, "--per-task", "4", "--raters", "2", "--criteria", "story=social", "--out", folder])
    assert "2 raters with 6 questions each" in capsys.readouterr().out
    assert "story: social" in (tmp_path / "study" / "criteria.yaml").read_text()
    study = read_study(tmp_path / "study")

    class Ended:
        def run(self, sockets: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(serving, "_server", lambda app: Ended())
    for host, ends in (("127.0.0.1", ""), ("0.0.0.0", f"?token={study.token}")):
        main(["study", "serve", folder, "--host", host, "--port", "0"])
        out = capsys.readouterr().out
        assert all(f"/r/{rater.token}{ends}\n" in out for rater in study.raters)
    fails(["new", *files, "--out", folder], "already holds a study", capsys)
    fails(["report", folder], "no vote that counts yet", capsys)
    fails(["report", folder, "--least-passed", "2"], "between 0 and 1", capsys)


def test_what_cannot_be_used_is_told(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "s")]
    fails(["anew"], "expected one of new, serve, report", capsys)
    fails(["new", files[0], *out], "compares at least two", capsys)
    fails(["new", files[0], files[0], *out], "Two are called 'a'", capsys)
    fails(["new", files[0], str(tmp_path / "none"), *out], "give the folder of a run", capsys)
    fails(["new", *files, *out, "--votes", "9"], "between 1 and the raters", capsys)
    fails(["new", *files, *out, "--criteria", "x=social"], "there is no such task", capsys)
    fails(["serve", str(tmp_path)], "holds no study", capsys)
    assert not (tmp_path / "s").exists()


def test_a_file_is_no_folder_of_a_study_or_a_report(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"argument --out: '{files[0]}' cannot be a folder, because '{files[0]}' is a file: name another;"
    fails(["new", *files, "--out", files[0]], words, capsys)
    fails(["report", str(tmp_path), "--out", files[0]], words, capsys)
