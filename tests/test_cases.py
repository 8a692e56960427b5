"""tests/CASES.md has every case once, and the tests that it names exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = [
    f"{kind}{n}" for kind, count in {"A": 10, "B": 18, "C": 17, "D": 21, "E": 14}.items() for n in range(1, count + 1)
]
ELSEWHERE = {"D1": "ranks", "E9": "ranks", "C15": "open"}  # what has no test here


@cache
def names_in(file: str) -> set[str]:
    """The functions of a test file."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_case_has_its_row_and_its_tests_exist() -> None:
    lines = re.findall(
        r"^\| ([A-E]\d+) \| (.+) \| (.+) \|$", (TESTS / "CASES.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [row for row, _, _ in lines] == ROWS
    for row, _, cell in lines:
        named = re.findall(r"`([^`]+)::(test_\w+)`", cell)
        assert cell == (" ".join(f"`{file}::{name}`" for file, name in named) or ELSEWHERE[row]), row
        for file, name in named:
            assert (TESTS / file).is_file(), (row, file)
            assert name in names_in(file), (row, file, name)
