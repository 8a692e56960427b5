"""Files to rows: every format, and the sentence for every way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maestro_pl.data import readers
from maestro_pl.data.problems import Problems
from maestro_pl.data.readers import read_file
from maestro_pl.errors import UserError
from tests.support import fuzz


def problems() -> Problems:
    return Problems("cannot be used", "Mend them.")


def read(path: Path, **options: object) -> list[tuple[int, dict[str, object]]]:
    return read_file(path, problems(), options)


def reasons(path: Path) -> list[str]:
    found = problems()
    read_file(path, found)
    return found.found


def test_jsonl_numbers_lines_through_blank_ones_bom_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n{"prompt": "two\\u2028x\xe2\x80\xa8y"}\r\n\n\n')
    assert read(path) == [(1, {"prompt": "one"}), (3, {"prompt": "two\u2028x\u2028y"})]


def test_json_list_and_data_object(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "meta": {"a": [1]}}, {"prompt": "two"}]
    for name, value in (("a.json", rows), ("b.json", {"data": rows, "version": 1})):
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
        assert read(tmp_path / name) == [(1, rows[0]), (2, rows[1])]


def test_csv_numbers_the_line_a_row_starts_on(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,reference\r\n"two\r\nlines, ""quoted""",x\r\nb,y\r\n\r\n')
    assert read(path) == [
        (2, {"prompt": 'two\r\nlines, "quoted"', "reference": "x"}),
        (4, {"prompt": "b", "reference": "y"}),
    ]


def test_csv_without_a_last_newline_keeps_the_last_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,reference\na,b")
    assert read(path) == [(2, {"prompt": "a", "reference": "b"})]


def test_csv_delimiter_and_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt;reference\na,1;b\n")
    (tmp_path / "a.tsv").write_text("prompt\treference\na,1\tb\n")
    expected = [(2, {"prompt": "a,1", "reference": "b"})]
    assert read(tmp_path / "a.csv", delimiter=";") == expected
    assert read(tmp_path / "a.tsv") == expected
    with pytest.raises(UserError, match=r"a\.csv: .*delimit.*csv\.reader"):
        read(tmp_path / "a.csv", delimit=";")


def test_csv_takes_fields_longer_than_the_default_limit_of_the_csv_module(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt\n" + "x" * 200_000 + "\n")
    assert len(str(read(path)[0][1]["prompt"])) == 200_000


def test_parquet_gives_plain_python_values(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "choices": ["x", "y"], "meta": {"k": 1}}, {"prompt": "b", "choices": [], "meta": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(1, rows[0]), (2, rows[1])]
    assert type(read(tmp_path / "a.parquet")[0][1]["choices"]) is list


def test_bad_json_lines_are_named_by_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n{"prompt": \n[1]\n{"prompt": "caf\xe9"}\nnull\n')
    assert reasons(path) == [
        "a.jsonl:2: not JSON: Expecting value at character 11",
        "a.jsonl:3: the line holds a list, expected an object like {...}",
        "a.jsonl:4: byte 0xe9 at character 16 is not UTF-8",
        "a.jsonl:5: the line holds null, expected an object like {...}",
    ]


def test_json_nested_beyond_the_recursion_limit_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": ' + "[" * 200_000 + "\n")
    assert reasons(path) == ["a.jsonl:1: not JSON that can be read: nested too deeply"]


def test_bad_csv_rows_are_named_by_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,reference\na,b\nc\nd,e,f\n"caf\xe9",g\n"h"i,j\nk,l\n"open,m\n')
    assert reasons(path) == [
        "a.csv:3: 1 fields, expected 2 (prompt, reference)",
        "a.csv:4: 3 fields, expected 2 (prompt, reference)",
        "a.csv:5: byte 0xe9 at character 4 is not UTF-8",
        "a.csv:6: not CSV: ',' expected after '\"'",
        "a.csv:8: not CSV: unexpected end of data",
    ]


def test_a_bad_item_of_a_json_list_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "a"}, "b"]')
    assert reasons(path) == ["a.json:2: the row is a string, expected an object like {...}"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"x", r"suffix '\.txt'; expected one of \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        ("a.jsonl", b"", r"a\.jsonl has no rows"),
        ("a.csv", b"", r"a\.csv is empty; expected a header line"),
        ("a.csv", b"prompt,reference\n", r"a\.csv has no rows"),
        ("a.csv", b"prompt,prompt\na,b\n", r"more than one column named prompt"),
        ("a.csv", b'"prompt\na,b\n', r"no readable header line"),
        ("a.json", b"", r"a\.json is not JSON: line 1: Expecting value"),
        ("a.json", b'{"prompt": 1}\n{"prompt": 2}', r"Extra data.* name it \.jsonl"),
        ("a.json", b'{"rows": []}', r"holds an object; expected a list of rows"),
        ("a.json", b'["caf\xe9"]', r"not UTF-8: byte 0xe9 at 5"),
        ("a.json", b"[]", r"has no rows"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), r"is UTF-16; save it as UTF-8"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet is not a Parquet file that can be read: \S"),
        ("a.parquet", b"", r"a\.parquet is not a Parquet file that can be read: \S"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"prompt": "\\ud83d"}\n', r"a\.jsonl:1: a text holds '\\ud83d', which is half a character"),
        ("a.jsonl", b'{"meta": [{"\\uDC00": 1}]}\n', r"a\.jsonl:1: a text holds '\\udc00', which is half a character"),
        ("a.json", b'[{"prompt": "\\ud83d"}]', r"a\.json:1: a text holds '\\ud83d', which is half a character"),
        (
            "a.jsonl",
            b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}",
            r"a\.jsonl:1: its values are nested more than 100 deep",
        ),
        ("a.jsonl", b'{"a": 1, "b": 2, "a": 3}', r"a\.jsonl:1: the key 'a' is given more than once"),
        ("a.jsonl", b'{"m": {"a": 1, "a": 1}}', r"a\.jsonl:1: the key 'a' is given more than once"),
        ("a.csv", b"prompt\na\x00b\n", r"a\.csv:2: (it holds a NUL byte|not CSV: line contains NUL)"),
    ],
)
def test_a_row_that_no_program_can_use(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    (found,) = reasons(tmp_path / name)
    assert re.match(reason, found)


def test_two_halves_are_a_character_and_a_hundred_levels_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "a": ' + "[" * 99 + "]" * 99 + "}")
    ((_, row),) = read(tmp_path / "a.jsonl")
    assert row["prompt"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_text_files_may_be_packed(tmp_path: Path, name: str) -> None:
    content = {"a.jsonl": '{"prompt": "é"}', "a.json": '[{"prompt": "é"}]'}.get(name, "prompt\né\n")
    with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
        file.write(content.encode())
    assert [row for _, row in read(tmp_path / f"{name}.gz")] == [{"prompt": "é"}]


def test_a_packed_file_that_is_cut_or_none(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"prompt": "x"}\n' * 1000)
    for content in (packed[:-10], packed[:40], b"{}", b"", packed[:20] + b"\xff" * 40):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz (cannot be read: \S|has no rows)"):
            read(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.parquet.gz").write_bytes(packed)
    with pytest.raises(UserError, match="has the suffix"):
        read(tmp_path / "a.parquet.gz")


def test_what_is_too_large_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LARGEST", 2**21)
    monkeypatch.setattr(readers, "MOST_ROWS", 10)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b" " * 2**25)
    (tmp_path / "a.csv").write_bytes(b"x" * (2**21 + 1))
    pq.write_table(pa.table({"prompt": ["x"] * 11}), tmp_path / "a.parquet")
    for name in ("a.jsonl.gz", "a.csv"):
        with pytest.raises(UserError, match="has more than 0 GiB, and is read into memory: divide it"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.parquet has 11 rows of 0\.0 GiB; at most 10 of"):
        read(tmp_path / "a.parquet")


def test_a_column_whose_name_begins_with_a_blank_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt, reference\na, b\n")
    with pytest.warns(
        UserWarning, match=r"the column ' reference' begins or ends with a blank.*\{reference: ' reference'\}"
    ):
        assert read(tmp_path / "a.csv") == [(2, {"prompt": "a", " reference": " b"})]


@fuzz
@given(
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"]),
    st.one_of(
        st.binary(max_size=200),
        st.text('{}[]",:\\ud8\n\r\t \0ab1e-.', max_size=60).map(str.encode),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
    ),
    st.integers(0, 300),
    st.integers(0, 255),
)
def test_any_bytes_are_rows_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes, place: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    if name.endswith(("gz", "parquet")):  # a sound file with one byte changed: nothing else gets past the first check
        if name.endswith("gz"):
            path.write_bytes(gzip.compress(content, mtime=0))
        else:
            pq.write_table(pa.table({"prompt": ["a", "b"], "n": [[1], None]}), path)
        broken = bytearray(path.read_bytes())
        broken[place % len(broken)] = byte
        content = bytes(broken)
    path.write_bytes(content)
    found = problems()
    with contextlib.suppress(UserError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = read_file(path, found)
        json.dumps(rows, ensure_ascii=False, default=str).encode()
    assert all(reason.startswith(f"{name}:") for reason in found.found)


def test_a_missing_file_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"There is no file .*a\.jsonl; .* holds b\.csv\."):
        read(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="holds no data files"):
        read(tmp_path / "nowhere" / "a.jsonl")


def test_options_of_a_format_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"takes no options, got \{'delimiter': ';'\}"):
        read(tmp_path / "a.jsonl", delimiter=";")


def test_problems_show_five_and_count_all() -> None:
    found = problems()
    for row in range(1, 8):
        found.add("a.csv", row, "bad")
    with pytest.raises(UserError) as raised:
        found.settle("error", 100)
    lines = str(raised.value).splitlines()
    assert lines[0] == "7 of 100 rows cannot be used:"
    assert lines[1:6] == [f"  a.csv:{row}: bad" for row in range(1, 6)]
    assert lines[6:] == ["  ... and 2 more", "Mend them."]
    with pytest.warns(UserWarning, match="7 of 100 rows cannot be used and are left out"):
        found.settle("drop", 100)
