"""``data.root``: relative paths of a config start from a folder given on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maestro_pl.data import PromptDataModule, Source
from maestro_pl.errors import UserError


def test_relative_files_start_from_the_root_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    placed = {
        path: Source(path).below(str(tmp_path)).path
        for path in ("a.jsonl", "sandbox", "openai/gsm8k", "folder", str(tmp_path / "b.csv"))
    }
    assert placed["a.jsonl"] == str(tmp_path / "a.jsonl")
    assert placed["folder"] == str(tmp_path / "folder")
    assert placed["sandbox"] == "sandbox"
    assert placed["openai/gsm8k"] == "openai/gsm8k"
    assert placed[str(tmp_path / "b.csv")] == str(tmp_path / "b.csv")
    assert Source({"train": "a.csv"}).below(str(tmp_path)).path == {"train": str(tmp_path / "a.csv")}


def test_the_data_module_reads_below_its_root(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "reference": "r"}) + "\n")
    module = PromptDataModule(sources="a.jsonl", root=str(tmp_path), show=False)
    assert [row.prompt for row in module.rows["train"]] == ["p"]


def test_a_missing_root_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: there is no folder"):
        PromptDataModule(sources="a.jsonl", root=str(tmp_path / "nowhere"))
