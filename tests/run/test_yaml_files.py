"""YAML within limits: what is refused, in which words, and that the command line's parser refuses the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from maestro_pl.cli import main
from maestro_pl.errors import UserError
from maestro_pl.run.yaml_files import ALIASED, parse_yaml, read_yaml, yaml_reason
from tests.support import fuzz

# ten levels of ten aliases each
NESTED_ANCHORS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11))


def reason(text: str) -> str:
    with pytest.raises(yaml.YAMLError) as caught:
        parse_yaml(text)
    return yaml_reason(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a: {b: [1, 2.5, true, null, x]}", {"a": {"b": [1, 2.5, True, None, "x"]}}),
        ("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}),
        ("a: &x {b: 1}\nc: &y {d: 1}\ne: {<<: *x, <<: *y}", {"a": {"b": 1}, "c": {"d": 1}, "e": {"b": 1, "d": 1}}),
        ("1: a\n'1': b", {1: "a", "1": "b"}),
        ("a: {b: 1}\nc: {b: 1}", {"a": {"b": 1}, "c": {"b": 1}}),
        ("[" * 99 + "]" * 99, None),
    ],
)
def test_what_is_read_is_what_pyyaml_reads(text: str, value: Any) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)
    assert value is None or parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            NESTED_ANCHORS,
            f"its aliases stand for more than {ALIASED} values: write them out or leave them out at line 5",
        ),
        ("a: 1\nb: &x\n  c: *x\n", "the anchor &x contains itself at line 3"),
        ("- &x [*x]", "the anchor &x contains itself at line 1"),
        ("[" * 2000 + "]" * 2000, "it is nested more than 100 deep at line 1"),
        ("[" * 200_000, "it is nested more than 100 deep at line 1"),
        ("- " * 200_000, "it is nested more than 100 deep at line 1"),
        ("{" * 200_000, "it is nested more than 100 deep at line 1"),
        ("a: 1\nb: 2\na: 3\n", "the key 'a', given at line 1, is given again at line 3"),
        ("x: {a: 1, 'a': 2}", "the key 'a', given at line 1, is given again at line 1"),
        ("x" * (4 * 2**20 + 1), "it has 4194305 characters, and at most 4194304 are read"),
        ("a: 2026-13-45", "a value cannot be read (month must be in 1..12)"),
        ("!!timestamp x", "a value cannot be read ('NoneType' object has no attribute 'groupdict')"),
        ("\ud800", r"it holds '\ud800', half a character"),
    ],
)
def test_what_is_refused(text: str, sentence: str) -> None:
    assert reason(text) == sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: caf\xe9\n".encode("latin-1"), r"F is not UTF-8 \(byte 0xe9 at 6\): save it as UTF-8\."),
        ("a: 1\n".encode("utf-16"), r"F is UTF-16: save it as UTF-8\."),
        (b"a: \x00b\n", r"F is not YAML: .*#x0000"),
        (b"a: [\n", r"F is not YAML: .* at line 2\."),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_yaml(tmp_path / "a.yaml", "F")
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml", "F")
    with pytest.raises(UserError, match="F cannot be read: Is a directory"):
        read_yaml(tmp_path, "F")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"data: caf\xe9\n", "is not UTF-8 (byte 0xe9 at 9): save it as UTF-8"),
        ("data: {}\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"data: \x00\n", "#x0000"),
        (NESTED_ANCHORS.encode(), "its aliases stand for more than 10000 values"),
        (b"data: &x [*x]\n", "the anchor &x contains itself at line 1"),
        (b"data: " + b"[" * 2000 + b"]" * 2000, "it is nested more than 100 deep at line 1"),
        (b"data: {}\nmodel: {}\ndata: {}\n", "the key 'data', given at line 1, is given again at line 3"),
    ],
)
@pytest.mark.parametrize("named", ["--config", "--rewards"])
def test_the_command_line_refuses_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    sentence: str,
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        main(["fit", named, "bad.yaml", "--print_config"])
    said = " ".join(capsys.readouterr().err.split())
    assert caught.value.code == 2
    assert said.startswith("maestro-pl: error: ")
    assert sentence in said


@fuzz
@given(st.one_of(st.text(), st.text("[]{}:-,&*!|>?#'\"% \n\tab1<=", max_size=60)))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(yaml.YAMLError):
        parse_yaml(text)


@fuzz
@given(st.binary(max_size=200))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        read_yaml(path, "F")
