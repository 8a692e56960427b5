"""Which way the imports run: type-only and local ones count as well, for who reads a module has to read those too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AT_THE_ROOT = {"__init__.py", "__main__.py", "errors.py", "module.py", "py.typed", "rollout.py", "sft.py"}
ALGORITHM = "maestro_pl.algorithm"
MAY_BE_READ_BY_ALGORITHM = (ALGORITHM, "maestro_pl.rollout", "maestro_pl.errors")

Graph = dict[str, set[str]]


def modules_of(root: Path, *packages: str) -> dict[str, Path]:
    """Dotted names of every module, a package by its own name."""
    files = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(name: str, path: Path) -> Iterator[str]:
    """Every dotted name that the file imports, a name out of a module as ``module.name``."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def graph_of(root: Path, *packages: str) -> Graph:
    """Module to the modules among these packages that it imports."""
    modules = modules_of(root, *packages)
    graph: Graph = {name: set() for name in modules}
    for name, path in modules.items():
        for target in imported(name, path):
            found = target if target in modules else target.rpartition(".")[0]
            if found in modules and found != name:
                graph[name].add(found)
    return graph


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def circle_through(graph: Graph, start: str) -> list[str]:
    """The shortest way from a module back to itself; empty if there is none."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:
        for target in sorted(graph[way[-1]]):
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


def circles(graph: Graph) -> list[str]:
    """Each module that is in a circle stands in at least one of these."""
    found: list[list[str]] = []
    for name in sorted(graph):
        circle = [] if any(name in known for known in found) else circle_through(graph, name)
        found += [circle] if circle else []
    return [" -> ".join(circle) for circle in found]


def arrows_to_callbacks(graph: Graph) -> list[str]:
    """``callbacks`` stand on ``maestro_pl``, and only the command line puts the two together."""
    return [
        f"{name} -> {target}"
        for name in sorted(graph)
        if within(name, "maestro_pl") and not within(name, "maestro_pl.cli")
        for target in sorted(graph[name])
        if within(target, "callbacks")
    ]


def arrows_out_of_algorithm(graph: Graph) -> list[str]:
    """The mathematics can be read with nothing else of ours open."""
    return [
        f"{name} -> {target}"
        for name in sorted(graph)
        if within(name, ALGORITHM)
        for target in sorted(graph[name])
        if not within(target, *MAY_BE_READ_BY_ALGORITHM)
    ]


def loose_files(package: Path) -> list[str]:
    return sorted(path.name for path in package.iterdir() if path.is_file() and path.name not in AT_THE_ROOT)


def arrows_between_tests(root: Path) -> list[str]:
    """What two test files use belongs into tests/support: a test file can be renamed without a look at the others."""
    return [
        f"{name} -> {target}"
        for name, path in modules_of(root, "tests").items()
        for target in imported(name, path)
        if within(target, "tests") and any(part.startswith("test_") for part in target.split("."))
    ]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(ROOT, "maestro_pl", "callbacks")


def test_no_module_imports_itself_by_way_of_others(graph: Graph) -> None:
    found = circles(graph)
    assert not found, "Cut one arrow of each circle:\n" + "\n".join(found)


def test_only_the_command_line_imports_callbacks(graph: Graph) -> None:
    found = arrows_to_callbacks(graph)
    assert not found, "maestro_pl imports callbacks outside maestro_pl/cli:\n" + "\n".join(found)


def test_the_algorithm_knows_the_rollout_only(graph: Graph) -> None:
    found = arrows_out_of_algorithm(graph)
    assert not found, f"{ALGORITHM} imports more than {MAY_BE_READ_BY_ALGORITHM}:\n" + "\n".join(found)


def test_no_file_lies_loose_at_the_root() -> None:
    found = loose_files(ROOT / "maestro_pl")
    assert not found, f"maestro_pl/: {found} belong into a folder"


def test_no_test_file_imports_another() -> None:
    found = arrows_between_tests(ROOT)
    assert not found, "Move what is shared into tests/support:\n" + "\n".join(found)


# -- what these tests would find ---------------------------------------------------------------------------------------


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / Path(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_every_way_of_importing_is_an_arrow(tmp_path: Path) -> None:
    write(
        tmp_path,
        p__a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B\n",
        p__b="class B:\n    def c(self):\n        import p.c as c\n        return c\n",
        p__c="from . import d\nfrom .q import e\nimport torch\n",
        p__d="from .q.e import name, other\n",
        p__q__e="from .. import a\nfrom p import q\n",
    )
    (tmp_path / "p/q/__init__.py").write_text("from .e import name\n")
    assert graph_of(tmp_path, "p") == {
        "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.d", "p.q.e"}, "p.d": {"p.q.e"},
        "p.q": {"p.q.e"}, "p.q.e": {"p.a", "p.q"},
    }  # fmt: skip


def test_circles_are_found_and_each_is_shown_once() -> None:
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = {"a": {"b"}, "b": {"c", "e"}, "c": {"d"}, "d": {"b"}, "e": {"f"}, "f": {"e"}}
    assert circles(graph) == ["b -> c -> d -> b", "e -> f -> e"]


def test_arrows_to_callbacks_are_found() -> None:
    targets = {"callbacks", "callbacks.rewards.base", "maestro_pl.errors"}
    graph = {"maestro_pl.cli.run": targets, "maestro_pl.cliff": targets, "callbacks.health": targets}
    assert arrows_to_callbacks(graph) == [
        "maestro_pl.cliff -> callbacks", "maestro_pl.cliff -> callbacks.rewards.base",
    ]  # fmt: skip


def test_arrows_out_of_the_algorithm_are_found() -> None:
    allowed = {"maestro_pl.rollout", "maestro_pl.errors", "maestro_pl.algorithm.simplex"}
    graph = {ALGORITHM: allowed, f"{ALGORITHM}.losses": {*allowed, "maestro_pl", "maestro_pl.policy.policy"}}
    assert arrows_out_of_algorithm(graph) == [
        f"{ALGORITHM}.losses -> maestro_pl", f"{ALGORITHM}.losses -> maestro_pl.policy.policy",
    ]  # fmt: skip


def test_loose_files_are_found(tmp_path: Path) -> None:
    write(tmp_path, module="", stray="", algorithm__losses="")
    (tmp_path / "py.typed").touch()
    assert loose_files(tmp_path) == ["stray.py"]


def test_arrows_between_tests_are_found(tmp_path: Path) -> None:
    write(tmp_path, tests__a__test_a="from tests.a.test_b import x\nfrom tests.support import y\nimport test_c\n")
    assert arrows_between_tests(tmp_path) == ["tests.a.test_a -> tests.a.test_b.x"]
