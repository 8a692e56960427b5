"""Files to rows: every format, and the sentence for every way in which a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maestro_pl.data.problems import Problems
from maestro_pl.data.readers import read_file
from maestro_pl.errors import UserError


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
