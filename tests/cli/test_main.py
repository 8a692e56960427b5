"""``python -m maestro_pl`` beside a project's own modules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from maestro_pl import __main__ as command


@pytest.mark.parametrize("first", ["", "here"])
def test_a_projects_callbacks_do_not_stand_in_the_way(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "callbacks.py").write_text("raise RuntimeError('of the project')\n")
    monkeypatch.chdir(tmp_path)
    first = str(tmp_path) if first else ""
    monkeypatch.setattr(sys, "path", [first, "elsewhere"])  # as `python -m` leaves it
    command.working_folder_last()
    assert sys.path == ["elsewhere", first]


def test_other_paths_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["elsewhere", str(tmp_path)])  # of `python -P`, or a script
    command.working_folder_last()
    assert sys.path == ["elsewhere", str(tmp_path)]
    monkeypatch.chdir(Path(command.__file__).parents[1])  # a checkout that is not installed
    monkeypatch.setattr(sys, "path", ["", "elsewhere"])
    command.working_folder_last()
    assert sys.path == ["", "elsewhere"]
