"""What the pages say stands in a file is defined there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`([A-Za-z_][\w.]*)(?:\(\))?` in `([\w/]+\.py)`")
PLACES = [
    (page.name, name, path)
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for name, path in NAMED.findall(page.read_text(encoding="utf-8"))
]


def test_the_equations_name_their_functions() -> None:
    assert len({name for page, name, _ in PLACES if page == "algorithm.md"}) >= 12


@pytest.mark.parametrize(("page", "name", "path"), PLACES)
def test_what_a_page_names_is_defined_where_it_says(page: str, name: str, path: str) -> None:
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    assert name.rsplit(".", 1)[-1] in defined, f"{page} says that {name} is in {path}"
