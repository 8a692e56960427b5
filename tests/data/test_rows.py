"""Sources to rows: columns, templates, references, prompts, splits, and the reason for every row that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maestro_pl.data import patterns
from maestro_pl.data.rows import Loaded, load_source
from maestro_pl.data.sources import NAMED, Source
from maestro_pl.data.splits import prompt_key, split_by_fraction, stable_unit
from maestro_pl.data.template import PromptTemplate
from maestro_pl.errors import UserError

FIXED_UNIT = 0.963955127820947

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def jsonl(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return jsonl


def train(path: str, **options: Any) -> list[dict[str, Any]]:
    return [row.values for row in load_source(0, Source(path, **options)).rows["train"]]


def counts(loaded: Loaded) -> list[int]:
    return [len(loaded.rows[split]) for split in ("train", "validation", "test")]


# columns, tasks, filters


def test_columns_are_renamed_and_the_others_travel_untouched(write: Write) -> None:
    path = write([{"question": "q", "answer": "a", "meta": {"k": [1, None]}, "level": 3}])
    assert train(path, columns={"prompt": "question", "reference": "answer"}) == [
        {"prompt": "q", "reference": "a", "meta": {"k": [1, None]}, "level": 3, "task": "rows"}
    ]


def test_columns_can_be_swapped(write: Write) -> None:
    path = write([{"prompt": "a", "reference": "b"}])
    assert train(path, columns={"prompt": "reference", "reference": "prompt"}) == [
        {"prompt": "b", "reference": "a", "task": "rows"}
    ]


@pytest.mark.parametrize(
    ("name", "row", "option", "task"),
    [
        ("gsm8k/train.jsonl", {}, None, "gsm8k"),
        ("gsm8k/dev.jsonl", {}, None, "gsm8k"),
        ("gsm8k/hard.jsonl", {}, None, "hard"),
        ("gsm8k/hard.jsonl", {"task": "maths"}, None, "maths"),
        ("gsm8k/hard.jsonl", {"task": None}, None, "hard"),
        ("gsm8k/hard.jsonl", {"task": "maths"}, "sums", "sums"),
    ],
)
def test_task_is_the_option_then_the_column_then_the_stem(
    write: Write, name: str, row: dict[str, Any], option: str | None, task: str
) -> None:
    assert train(write([{"prompt": "a", **row}], name), task=option)[0]["task"] == task


def test_where_keeps_rows_by_value_or_list_of_values(write: Write) -> None:
    path = write([{"prompt": str(i), "language": language} for i, language in enumerate(["en", "zh", "en", "de"])])
    assert [row["prompt"] for row in train(path, where={"language": "en"})] == ["0", "2"]
    assert [row["prompt"] for row in train(path, where={"language": ["en", "de"]})] == ["0", "2", "3"]
    path = write([{"prompt": str(i), "level": str(i)} for i in range(3)])
    assert [row["prompt"] for row in train(path, where={"level": 1})] == ["1"]
    with pytest.raises(UserError, match=r"no rows that can be used after where: \{'level': 7\}"):
        train(path, where={"level": 7})


def test_limit_is_per_split(write: Write) -> None:
    path = write([{"prompt": str(i), "split": split} for i, split in enumerate(["train"] * 5 + ["test"] * 1)])
    loaded = load_source(0, Source(path, limit=2))
    assert [row.prompt for row in loaded.rows["train"]] == ["0", "1"]
    assert counts(loaded) == [2, 0, 1]


# templates, cuts, references


def test_template_builds_the_prompt_from_columns_by_either_name(write: Write) -> None:
    path = write([{"title": "Rain", "chapter": "fears", "story": "s"}])
    row = train(
        path,
        columns={"reference": "story"},
        prompt_template="Write {title} ({chapter}), not {{braces}}, {story}={reference}.",
    )[0]
    assert row["prompt"] == "Write Rain (fears), not {braces}, s=s."
    assert row["title"] == "Rain"


def test_template_options_nested_columns_and_names_with_spaces() -> None:
    template = PromptTemplate("{question type}: {meta[who]} {meta.items[1]}\n{choices!o}\n{choices!j}")
    row = {"question type": "Action", "meta": {"who": "Ann", "items": [0, 7]}, "choices": ["stay", "go"]}
    assert template.fill(row) == "Action: Ann 7\nA: stay\nB: go\nstay, go"
    assert PromptTemplate("{choices!o}").fill({"choices": list(range(27))}).endswith("Z: 25\nAA: 26")


def test_template_reaches_no_attributes() -> None:
    with pytest.raises(ValueError, match="not in the row"):
        PromptTemplate("{a.__class__}").fill({"a": "x"})


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{titel}", r"the template's \{titel\} is not in the row, which has \['title', 'none'\]"),
        ("{none}", r"the template's \{none\} is empty in this row"),
        ("{title!o}", r"the template's !o needs a list, the row has str 'Rain'"),
        ("{title!x}", r"unknown conversion !x"),
    ],
)
def test_a_row_that_a_template_does_not_fit(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PromptTemplate(template).fill({"title": "Rain", "none": None})


@pytest.mark.parametrize("template", ["{title", "title}", "{}", "{[0]}"])
def test_a_template_that_is_none(template: str) -> None:
    with pytest.raises(UserError, match="prompt_template"):
        PromptTemplate(template)


def test_cut_then_template(write: Write) -> None:
    path = write([{"prompt": "\nQuestion: 1+1?\n\nAnswer in the format: <x>"}])
    assert train(path, cut_prompt_at="Answer in the format:")[0]["prompt"] == "Question: 1+1?"
    row = train(path, cut_prompt_at="Answer in the format:", prompt_template="{prompt} Think first.")[0]
    assert row["prompt"] == "Question: 1+1? Think first."


def test_cut_of_the_last_message(write: Write) -> None:
    messages = [{"role": "system", "content": "CUT"}, {"role": "user", "content": "hello CUT here"}]
    assert train(write([{"prompt": messages}]), cut_prompt_at="CUT")[0]["prompt"] == [
        messages[0],
        {"role": "user", "content": "hello"},
    ]


def test_cut_that_is_in_no_prompt_or_not_in_all(write: Write) -> None:
    path = write([{"prompt": "a CUT b"}, {"prompt": "c"}])
    with pytest.raises(UserError, match="cut_prompt_at 'Cut' is in none of 2 prompts"):
        train(path, cut_prompt_at="Cut")
    with pytest.warns(UserWarning, match="missing from 1 of 2 prompts"):
        assert [row["prompt"] for row in train(path, cut_prompt_at="CUT")] == ["a", "c"]


def test_reference_pattern_takes_the_first_group(write: Write) -> None:
    path = write([{"prompt": "q", "reference": "24 + 48 = 72\n#### 72 "}])
    assert train(path, reference_pattern=r"####\s*(.+)")[0]["reference"] == "72"


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (0.5, "0.5"), (True, "True"), (None, None), (float("nan"), None)]
)
def test_a_reference_is_text_or_none(write: Write, value: object, text: str | None) -> None:
    assert train(write([{"prompt": "q", "reference": value}]))[0]["reference"] == text


@pytest.mark.parametrize("task", [None, float("nan")])
def test_a_row_without_task_has_its_files(write: Write, task: object) -> None:
    path = write([{"prompt": "q", "kind": task}])
    assert train(path, columns={"task": "kind"})[0]["task"] == Path(path).stem


def test_a_row_without_reference_has_none(write: Write) -> None:
    assert train(write([{"prompt": "q"}]))[0]["reference"] is None


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        (["42", 42.0, None], ["42", "42.0"]),
        (["42"], "42"),
        ([], None),
        ([None, float("nan")], None),
        ("42", "42"),
    ],
)
def test_several_right_answers(write: Write, value: Any, reference: Any) -> None:
    path = write([{"prompt": "q", "reference": value}, {"prompt": "r", "reference": "x"}])
    assert [row["reference"] for row in train(path)] == [reference, "x"]


def test_each_of_several_right_answers_goes_through_the_pattern(write: Write) -> None:
    path = write([{"prompt": "q", "reference": ["#### 1", "so #### 2"]}])
    assert train(path, reference_pattern=r"####\s*(.+)")[0]["reference"] == ["1", "2"]


def test_what_some_rows_lack_is_empty_in_them(write: Write) -> None:
    path = write([{"prompt": "2 + 2?", "answer": "#### 4"}, {"prompt": "a story"}, {"prompt": "q", "answer": None}])
    loaded = load_source(0, Source(path, columns={"reference": "answer"}, reference_pattern="#### (.)"))
    assert [row.values["reference"] for row in loaded.rows["train"]] == ["4", None, None]
    assert loaded.notes == ["1 rows lack the column 'answer': their reference is empty"]


def test_nested_columns_by_a_path(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "2 + 2?"}],
            "reward_model": {"ground_truth": "4", "style": "rule"},
            "extra_info": {"split": "test", "ids": [7]},
        },
        {
            "prompt": [{"role": "user", "content": "r"}],
            "reward_model": None,
            "extra_info": {"split": "train", "ids": [8]},
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = {"reference": "reward_model.ground_truth", "id": "extra_info.ids[0]"}
    source = Source(str(tmp_path / "a.parquet"), columns=columns, split_column="extra_info.split")
    loaded = load_source(0, source)
    (test,), (trained,) = loaded.rows["test"], loaded.rows["train"]
    assert test.values == {**rows[0], "reference": "4", "id": 7, "task": "a"}
    assert (trained.values["reference"], trained.values["id"]) == (None, 8)
    kept = load_source(0, Source(str(tmp_path / "a.parquet"), where={"extra_info.split": "train"}))
    assert [row.prompt for row in kept.rows["train"]] == [[{"role": "user", "content": "r"}]]
    with pytest.raises(UserError, match=r"no column 'reward_model\.truth' \(for reference\)"):
        train(str(tmp_path / "a.parquet"), columns={"reference": "reward_model.truth"})


@pytest.mark.parametrize("text", [json.dumps, str])
def test_messages_written_as_text_are_messages(write: Write, text: Callable[[Any], str]) -> None:
    messages = [{"role": "system", "content": "It's brief."}, {"role": "user", "content": "hi"}]
    path = write([{"prompt": text(messages)}, {"prompt": "[1, 2] and [{'a': 1}]"}, {"prompt": "[{no}]"}])
    loaded = load_source(0, Source(path))
    assert [row.prompt for row in loaded.rows["train"]] == [messages, "[1, 2] and [{'a': 1}]", "[{no}]"]
    assert loaded.notes == ["1 rows have chat messages written as text, which are read as messages"]
    assert train(path, prompt_form="rendered")[0]["prompt"] == text(messages)


def test_texts_become_messages_if_asked(write: Write) -> None:
    path = write([{"prompt": "hi"}, {"prompt": [{"role": "user", "content": "ho"}]}])
    assert [row["prompt"] for row in train(path, prompt_form="messages")] == [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "ho"}],
    ]


def test_forms_of_conversations(write: Write) -> None:
    user = {"role": "user", "content": "a\nb"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    rows = [
        {"conversations": [{"from": "human", "value": "a\nb"}, {"from": "gpt", "value": "c"}]},
        {"messages": [{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]},
        {"prompt": [user, call, {"role": "tool", "content": "3"}]},
    ]
    path = write(rows)
    loaded = load_source(0, Source(path, last_assistant="reference"))
    prompts = [row.prompt for row in loaded.rows["train"]]
    assert prompts == [[user], [user], [user, {**call, "content": ""}, {"role": "tool", "content": "3"}]]
    assert [row.values["reference"] for row in loaded.rows["train"]] == ["c", None, None]
    assert "1 rows have their prompt in the column conversations" in loaded.notes
    goes_on = load_source(0, Source(path, last_assistant="continue")).rows["train"]
    assert [row.continues for row in goes_on] == [True, False, False]
    assert goes_on[0].prompt == [user, {"role": "assistant", "content": "c"}]
    with pytest.raises(
        UserError, match=r"last message of the prompt is the assistant's.*last_assistant: reference or continue"
    ):
        train(path)


def test_alpaca(write: Write) -> None:
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Hi.", "input": "", "output": "Ho."},
    ]
    loaded = load_source(0, Source(write(rows)))
    assert [(row.prompt, row.values["reference"]) for row in loaded.rows["train"]] == [
        ("Add.\n\n1, 2", "3"),
        ("Hi.", "Ho."),
    ]
    mapped = load_source(0, Source(write(rows), columns={"prompt": "instruction"}))
    assert mapped.notes == [
        "1 rows have an input that is not in the prompt: leave out columns to read Alpaca's form, or set prompt_template"
    ]


def test_a_pattern_that_never_ends_is_stopped(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    path = write([{"prompt": "q", "reference": "a" * 60 + "!"}] * 1000)
    with pytest.raises(
        UserError, match=r"rows\.jsonl:1: reference_pattern: the search for '\(a\+\)\+\$' .* does not end"
    ):
        load_source(0, Source(path, reference_pattern="(a+)+$"), on_bad_row="drop")


def test_shards(tmp_path: Path) -> None:
    def shard(name: str, *prompts: str) -> None:
        pq.write_table(pa.table({"prompt": list(prompts)}), tmp_path / name)

    shard("train-00000-of-00002.parquet", "a")
    shard("train-00001-of-00002.parquet", "b")
    shard("test-00000-of-00001-0123456789abcdef.parquet", "c")
    loaded = load_source(0, Source(str(tmp_path)))
    assert (counts(loaded), loaded.how) == ([2, 0, 1], "its own splits")
    assert loaded.rows["train"][0].task == tmp_path.name
    assert [row["prompt"] for row in train(str(tmp_path / "train-*.parquet"))] == ["a", "b"]
    by_split = Source({"train": str(tmp_path / "train-*"), "test": str(tmp_path / "test-*")})
    assert counts(load_source(0, by_split)) == [2, 0, 1]
    assert counts(load_source(0, Source(str(tmp_path), split="test"))) == [0, 0, 3]
    shard("more.parquet", "d")
    with pytest.raises(UserError, match=r"name of test-00000-.* tells its split, and that of more\.parquet tells none"):
        load_source(0, Source(str(tmp_path)))


# rows that cannot be used

ALL_IS_NO_TASK = (
    "the task is 'all', which stands for every task in tables and logs: give the source a task of another name, or rename its "
    "file"
)


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"question": "q"}, {}, r"no column 'prompt'; the row has \['question'\]: map one"),
        (
            {"prompt": "q"},
            {"columns": {"reference": "answer"}},
            r"no column 'answer' \(for reference\); .*\['prompt'\]",
        ),
        (
            {"prompt": "q", "x": "y"},
            {"columns": {"prompt": "x"}},
            r"'prompt' is mapped, but the row has its own 'prompt'",
        ),
        ({"prompt": "q", "position": 1}, {}, r"the column name 'position' is taken; map it"),
        ({"prompt": "q", "task": "all"}, {}, f"{ALL_IS_NO_TASK}\n"),
        ({"prompt": "q"}, {"task": "all"}, f"{ALL_IS_NO_TASK}\n"),
        ({"prompt": " \n"}, {}, "the prompt is empty"),
        ({"prompt": None}, {}, "the prompt is empty; expected text or a list of chat messages"),
        ({"prompt": 3}, {}, "the prompt is of the type int; expected text"),
        ({"prompt": []}, {}, "the prompt is empty: a list without messages"),
        ({"prompt": ["hi"]}, {}, r"message 1 of the prompt is 'hi'; expected \{role"),
        ({"prompt": [{"content": "hi"}]}, {}, r"message 1 of the prompt is \{'content': 'hi'\}"),
        ({"prompt": [{"role": "user", "content": 1}]}, {}, "the content of message 1 of the prompt is 1, not text"),
        ({"prompt": [{"role": "user", "content": " "}]}, {}, "its last message has no text"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, {}, "the last message of the prompt is the assistant's"),
        ({"prompt": "CUT x"}, {"cut_prompt_at": "CUT"}, "the prompt is empty once it is cut at 'CUT'"),
        ({"prompt": "q", "reference": {"a": 1}}, {}, "reference is a dict, expected text or a list of texts"),
        ({"prompt": "q", "reference": [["a"], "b"]}, {}, "reference is a list, expected text or a list of texts"),
        ({"prompt": [{"from": "human"}]}, {}, "the content of message 1 of the prompt is None, not text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            {},
            "message 1 of the prompt has a part of the type 'image_url': only texts are supported",
        ),
        ({"prompt": "[{'role': 'user', 'content': broken}]"}, {}, "looks like chat messages written as text"),
        (
            {"prompt": [{"role": "user", "content": "q"}]},
            {"prompt_form": "rendered"},
            "a list of messages, and prompt_form",
        ),
        ({"prompt": '[{"role": "user", "content": "\\ud83d"}]'}, {}, "the prompt holds .*half a character"),
        (
            {"prompt": "q", "reference": "7"},
            {"reference_pattern": "#(.)"},
            r"'#\(\.\)' does not match the reference '7'",
        ),
        ({"prompt": "q"}, {"reference_pattern": "#(.)"}, r"does not match the reference None"),
        ({"prompt": "q"}, {"prompt_template": "{titel}"}, r"\{titel\} is not in the row, which has \['prompt'\]"),
        ({"prompt": "q", "split": "banana"}, {}, "split is 'banana', which is none of train, validation and test"),
        ({"prompt": "q"}, {"split_column": "fold"}, r"no column 'fold' to split by; the row has \['prompt'"),
    ],
)
def test_a_row_is_refused_with_file_row_and_reason(
    write: Write, row: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    path = write([row])
    with pytest.raises(
        UserError, match=rf"(?s)1 of 1 rows cannot be used:\n  rows\.jsonl:1: .*{reason}.*on_bad_row: drop"
    ):
        train(path, **options)


def test_drop_goes_on_with_the_good_rows_and_counts_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\nnot json\n{"prompt": ""}\n{"prompt": "b"}\n')
    with pytest.warns(
        UserWarning, match=r"(?s)2 of 4 rows cannot.*rows\.jsonl:2: not JSON.*rows\.jsonl:3: the prompt is"
    ):
        loaded = load_source(0, Source(str(path)), on_bad_row="drop")
    assert [(row.prompt, row.number) for row in loaded.rows["train"]] == [("a", 1), ("b", 4)]


def test_a_source_of_nothing_but_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("x\n")
    with (
        pytest.warns(UserWarning, match="1 of 1 rows"),
        pytest.raises(UserError, match=r"rows\.jsonl has no rows that can be used\."),
    ):
        load_source(0, Source(str(tmp_path / "rows.jsonl")), on_bad_row="drop")


# splits


def test_split_by_column_with_the_usual_names(write: Write) -> None:
    names = ["train", "Dev", "val", "validation", "test"]
    path = write([{"prompt": str(i), "fold": name} for i, name in enumerate(names)])
    loaded = load_source(0, Source(path, split_column="fold"))
    assert counts(loaded) == [1, 3, 1]
    assert loaded.how == "by column 'fold'"
    assert loaded.rows["test"][0].values["fold"] == "test"


def test_split_names_map_ours_to_theirs(write: Write) -> None:
    path = write([{"prompt": str(i), "split": name} for i, name in enumerate(["0", "1"])])
    assert counts(load_source(0, Source(path, split_names={"train": "0", "test": "1"}))) == [1, 0, 1]


def test_a_column_named_split_wins_over_the_fractions_of_all_sources(write: Write) -> None:
    path = write([{"prompt": str(i), "split": "test"} for i in range(20)])
    assert counts(load_source(0, Source(path), fractions=[1, 0, 0])) == [0, 0, 20]
    assert counts(load_source(0, Source(path, fractions=[1, 0, 0]))) == [20, 0, 0]


def test_a_column_named_split_is_believed_whichever_row_has_it(write: Write) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "0"}, {"prompt": "1", "split": "test"}, {"prompt": "2", "split": "train"}]
    with pytest.raises(
        UserError, match=r"(?s)1 of 3 rows cannot be used:\n  rows\.jsonl:1: no column 'split' to split by"
    ):
        load_source(0, Source(write(rows)))
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        assert counts(load_source(0, Source(write(rows)), on_bad_row="drop")) == [1, 0, 1]


def test_empty_options_of_a_template_are_left_out_and_counted(write: Write) -> None:
    rows = [{"choices": ["x", "y", None, float("nan")]}, {"choices": ["x", "y", "z", "nan"]}]
    loaded = load_source(0, Source(write(rows), prompt_template="{choices!o}"))
    assert [row.prompt for row in loaded.rows["train"]] == ["A: x\nB: y", "A: x\nB: y\nC: z"]
    assert loaded.notes == ["3 empty options (nan) are left out"]


def test_split_by_file_and_into_one_split(write: Write) -> None:
    files = {
        "train": write([{"prompt": "a"}], "a.jsonl"),
        "test": write([{"prompt": "b", "split": "train"}], "b.jsonl"),
    }
    assert counts(load_source(0, Source(files))) == [1, 0, 1]
    assert counts(load_source(0, Source(files["train"], split="validation"))) == [0, 1, 0]
    assert counts(load_source(0, Source(files["train"]))) == [1, 0, 0]


def test_fractions_do_not_depend_on_order_or_other_rows(write: Write) -> None:
    rows = [{"prompt": f"question {i}"} for i in range(300)]
    by_split = {
        split: {row.prompt for row in part}
        for split, part in load_source(0, Source(write(rows, "a.jsonl")), fractions=[0.8, 0.1, 0.1]).rows.items()
    }
    half = load_source(0, Source(write(rows[::-2], "b.jsonl")), fractions=[0.8, 0.1, 0.1])
    for split, part in half.rows.items():
        assert {row.prompt for row in part} == by_split[split] & {row["prompt"] for row in rows[::-2]}
    # binomial: 240 +- 4 * 6.9, 30 +- 4 * 5.2
    assert 212 <= len(by_split["train"]) <= 268
    assert 9 <= len(by_split["validation"]) <= 51
    assert 9 <= len(by_split["test"]) <= 51


def test_fractions_are_fixed_numbers() -> None:
    # the first 8 bytes of sha256("0\nhello") over 2**64; written down, so that no release moves a test set
    assert stable_unit("hello", 0) == pytest.approx(FIXED_UNIT, abs=1e-12)
    assert split_by_fraction("hello", [FIXED_UNIT + 1e-9, 1 - FIXED_UNIT - 1e-9, 0], 0) == "train"
    assert split_by_fraction("hello", [FIXED_UNIT - 1e-9, 0, 1 - FIXED_UNIT + 1e-9], 0) == "test"
    assert stable_unit("hello", 1) != stable_unit("hello", 0)


def test_the_same_prompt_as_text_and_as_message_share_a_split() -> None:
    assert prompt_key([{"role": "user", "content": "hi"}]) == prompt_key("hi")
    assert prompt_key([{"role": "user", "content": "hi", "name": "Ann"}]) != prompt_key("hi")
    assert prompt_key([{"role": "system", "content": "hi"}, {"role": "user", "content": "hi"}]) != prompt_key("hi")


# what a source can be


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"path": ""}, "has an empty path"),
        ({"path": {}}, "has an empty path"),
        ({"path": "a.csv", "split": "dev"}, "split is 'dev'; expected one of train, validation, test"),
        ({"path": "a.csv", "split_names": {"dev": "x"}}, "'dev' is no split"),
        ({"path": {"dev": "a.csv"}}, "'dev' is no split"),
        (
            {"path": "a.csv", "split": "test", "fractions": [1, 0, 0]},
            "more than one way how to split: split and fractions",
        ),
        (
            {"path": {"train": "a.csv"}, "split_column": "s"},
            "more than one way how to split: path by split and split_column",
        ),
        ({"path": "a.csv", "fractions": [0.5, 0.5]}, r"a\.csv: fractions is \[0\.5, 0\.5\]; expected three numbers"),
        ({"path": "a.csv", "fractions": [0.5, 0.5, 0.5]}, "sum to 1"),
        ({"path": "a.csv", "fractions": [1.5, -0.5, 0]}, "at least 0"),
        ({"path": "a.csv", "weight": -1.0}, r"weight is -1\.0; expected a number of at least 0"),
        ({"path": "a.csv", "weight": float("nan")}, "weight is nan"),
        ({"path": "a\0.csv"}, "the path holds a NUL character"),
        ({"path": 3}, "has the path 3; expected a text, or rows"),
        ({"path": [1]}, "a row is a int; expected dicts"),
        ({"path": {"prompt": ["a"], "n": [1, 2]}}, r"The columns have the lengths \{'prompt': 1, 'n': 2\}"),
        (
            {"path": "a.csv", "prompt_form": "chat"},
            "prompt_form is 'chat'; expected one of as_given, messages, rendered",
        ),
        ({"path": "a.csv", "limit": 0}, "limit is 0; expected at least 1 row"),
        ({"path": "a.csv", "prompt_template": "{"}, "prompt_template '{'"),
        ({"path": "a.csv", "reference_pattern": "("}, r"reference_pattern '\(' is no regular expression"),
        ({"path": "a.csv", "reference_pattern": "a"}, r"reference_pattern 'a' has no \(group\)"),
    ],
)
def test_a_source_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Source(**options).check()


def test_a_source_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file or folder a/b/c; expected one, a hub id, or one of sandbox"):
        train("a/b/c")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"a\.csv has no rows"):
        train("folder")
    (tmp_path / "folder" / "a.csv").unlink()
    with pytest.raises(UserError, match=r"not one made by datasets\.save_to_disk, and holds no file that can be read"):
        train("folder")
    (tmp_path / "folder" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read as a folder made by datasets|but not one made by"):
        train("folder")
    with pytest.raises(UserError, match=r"No file matches folder/\*\.parquet"):
        train("folder/*.parquet")


def test_a_named_source_is_called_for_each_split_with_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def world(split: str, n: int = 1) -> list[dict[str, Any]]:
        return [{"prompt": f"{split} {i}", "task": "sums", "extra": i} for i in range(n)]

    monkeypatch.setitem(NAMED, "world", world)
    loaded = load_source(0, Source("world", options={"n": 2}))
    assert counts(loaded) == [2, 2, 2]
    assert loaded.rows["test"][1].values == {"prompt": "test 1", "task": "sums", "extra": 1, "reference": None}
    assert loaded.rows["test"][1].file == "world[test]"
    with pytest.raises(UserError, match=r"world does not take options \{'m': 2\}"):
        load_source(0, Source("world", options={"m": 2}))
    with pytest.raises(UserError, match="world brings its own splits"):
        load_source(0, Source("world", split="train"))


def test_a_type_error_inside_a_named_source_is_not_taken_for_a_wrong_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def world(split: str) -> list[dict[str, Any]]:
        raise TypeError("a bug")

    monkeypatch.setitem(NAMED, "world", world)
    with pytest.raises(TypeError, match="a bug"):
        load_source(0, Source("world"))


def test_the_sandbox_is_a_named_source() -> None:
    with pytest.raises(UserError, match=r"sandbox does not take options \{'n': 3\}: got an unexpected keyword"):
        load_source(0, Source("sandbox", options={"n": 3}))
    loaded = load_source(0, Source("sandbox", options={"n_per_task": 3}))
    for split in ("train", "validation", "test"):
        tasks = [row.task for row in loaded.rows[split]]
        assert len(set(tasks)) >= 4
        assert {tasks.count(task) for task in tasks} == {3}
        assert all(row.prompt for row in loaded.rows[split])


# datasets


def test_a_folder_of_datasets_with_its_own_splits(tmp_path: Path) -> None:
    import datasets

    rows = {"prompt": ["a", "b"], "choices": [["x"], ["y", "z"]]}
    pieces = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows), test=datasets.Dataset.from_dict({"prompt": ["c"], "choices": [["w"]]})
    )
    pieces.save_to_disk(str(tmp_path / "mine"))
    loaded = load_source(0, Source(str(tmp_path / "mine")))
    assert counts(loaded) == [2, 0, 1]
    assert loaded.how == "its own splits"
    assert loaded.rows["train"][1].values == {"prompt": "b", "choices": ["y", "z"], "reference": None, "task": "mine"}
    assert loaded.rows["train"][1].file == "mine[train]"
    assert counts(load_source(0, Source(str(tmp_path / "mine"), split="test"))) == [0, 0, 3]


def test_a_folder_with_a_single_data_set_can_be_split_by_fractions(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"prompt": [str(i) for i in range(40)]}).save_to_disk(str(tmp_path / "one"))
    assert counts(load_source(0, Source(str(tmp_path / "one")), fractions=[0, 0, 1])) == [0, 0, 40]
    assert counts(load_source(0, Source(str(tmp_path / "one")))) == [40, 0, 0]


def test_a_hub_id_is_loaded_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, **options: Any) -> Any:
        asked.append((path, name, options))
        return {"train": [{"question": "q"}], "holdout": [{"question": "r"}], "extra": [{"question": "s"}]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(
        "openai/gsm8k",
        name="main",
        columns={"prompt": "question"},
        split_names={"train": "train", "test": "holdout"},
        options={"revision": "v1"},
    )
    loaded = load_source(0, source)
    assert asked == [("openai/gsm8k", "main", {"revision": "v1"})]
    assert counts(loaded) == [1, 0, 1]
    assert loaded.rows["test"][0].task == "gsm8k"


def test_a_hub_id_whose_splits_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    pieces = {"train_sft": [{"prompt": "a"}], "test_sft": [{"prompt": "b"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: pieces)
    with pytest.raises(UserError, match="has the splits train_sft, test_sft: map them with split_names"):
        load_source(0, Source("some/set"))


def test_a_hub_id_that_cannot_be_loaded() -> None:
    with pytest.raises(
        UserError,
        match=r"'nobody/nothing' is no file or folder here and no named source \(sandbox, natural_reasoning, ",
    ):
        load_source(0, Source("nobody/nothing"))
