"""The benchmarks as named sources: rows worked out by hand, splits, what is dropped, and what is said about bad files."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_pl.data import BENCHMARKS, BenchmarkCard, PromptDataModule, Source
from maestro_pl.data.named_sources import Sizes, cards_markdown
from maestro_pl.data.named_sources.choices import options_text, split_options, written_label
from maestro_pl.data.named_sources.splitting import divide
from maestro_pl.data.rows import Loaded, Row, load_source
from maestro_pl.errors import UserError
from tests.support import EA, EU, INSTRUCTION, PUBLISHED, THOUGHT, TOM, write_nover, write_rows

PROMPTS = {
    "natural_reasoning": ("Why?", "Because."),
    "ss_gen": (
        'Write a Social Story for a child with autism, titled "Tidy". Its theme is "Home": is about home',
        "I tidy.",
    ),
    "webinstruct": ("2 + 2?", "4"),
    "tombench": (
        "Xinxin has a stomachache.\n\nWhat does she feel?\n\nA: Sad\nB: Scared\nC: Happy\nD: Disappointed",
        "A: Sad",
    ),
    "general_thoughts": ("Why?", "Because."),
    "opus_books": ("Translate the following text from English to French:\n\nThe cat.", "Le chat."),
    "emobench": (
        "Ann's cake fell, but her son said he loved it.\n\nWhich emotion does Ann feel, and what is its cause? "
        "Choose one option of each list.\n\nEmotion:\nA: Anger\nB: Delight\n\n"
        "Cause:\nA: The cake fell\nB: She is tired\nC: Her son loved it",
        "Emotion: B: Delight, Cause: C: Her son loved it",
    ),
    "gsm8k": ("3 + 4?", "7"),
}


def load(name: str, file: Any = None, on_bad_row: Any = "error", **options: Any) -> Loaded:
    given = {**options, **({} if file is None else {"file": file})}
    source = Source(name, options=given)
    source.check()
    return load_source(0, source, on_bad_row=on_bad_row)


def all_rows(loaded: Loaded) -> list[Row]:
    return [row for rows in loaded.rows.values() for row in rows]


def counts(loaded: Loaded) -> list[int]:
    return [len(rows) for rows in loaded.rows.values()]


# rows


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_row(name: str, tmp_path: Path) -> None:
    (row,) = all_rows(load(name, write_rows(tmp_path / "rows.jsonl", PUBLISHED[name])))
    assert (row.prompt, row.values["reference"]) == PROMPTS[name]
    assert row.task == name
    ours = {"prompt", "reference", "task", "choices", "label"}
    for column, value in PUBLISHED[name].items():
        assert column in ours or row.values[column] == value


def test_labels_of_choice_rows(tmp_path: Path) -> None:
    file = [write_rows(tmp_path / "EU.jsonl", EU), write_rows(tmp_path / "EA.jsonl", EA)]
    by_choices = {str(type(row.values["choices"])): row.values for row in all_rows(load("emobench", file))}
    two, one = by_choices[str(dict)], by_choices[str(list)]
    assert two["choices"] == {"Emotion": EU["emotion_choices"], "Cause": EU["cause_choices"]}
    assert two["label"] == {"Emotion": "B", "Cause": "C"}
    assert (one["choices"], one["label"], one["reference"]) == (["Listen", "Leave"], "A", "A: Listen")
    assert one["prompt"] == (
        "A friend of Bo's is sad.\n\nWhat would be best for Bo to do or say in this situation? Choose one option.\n\n"
        "A: Listen\nB: Leave"
    )
    (tom,) = all_rows(load("tombench", write_rows(tmp_path / "tom.jsonl", TOM)))
    assert (tom.values["choices"], tom.values["label"]) == (["Sad", "Scared", "Happy", "Disappointed"], "A")


def test_a_teller_is_called_the_narrator(tmp_path: Path) -> None:
    (row,) = all_rows(load("emobench", write_rows(tmp_path / "EU.jsonl", {**EU, "subject": "I"})))
    assert "does the narrator feel" in str(row.prompt)
    assert row.values["subject"] == "I"


def test_languages(tmp_path: Path) -> None:
    chinese = {**EU, "language": "zh", "subject": "安"}
    file = write_rows(tmp_path / "EU.jsonl", EU, chinese)
    assert [row.values["language"] for row in all_rows(load("emobench", file))] == ["en"]
    (row,) = all_rows(load("emobench", file, language="zh"))
    assert "安感到的是哪种情绪" in str(row.prompt)
    assert len(all_rows(load("emobench", file, language="all"))) == 2
    tom = write_rows(tmp_path / "tom.jsonl", TOM)
    (row,) = all_rows(load("tombench", tom, language="zh"))
    assert row.prompt == "欣欣肚子疼。\n\n她的感受?\n\nA: 悲伤\nB: 害怕\nC: 开心\nD: 失望"
    assert {row.values["language"] for row in all_rows(load("tombench", tom, language="all"))} == {"en", "zh"}


def test_both_languages_of_a_question_share_their_split(tmp_path: Path) -> None:
    rows = [
        {**EU, "qid": str(i), "scenario": f"{language} {i}", "language": language}
        for i in range(20)
        for language in ("en", "zh")
    ]
    loaded = load("emobench", write_rows(tmp_path / "EU.jsonl", *rows), language="all")
    of = {split: {row.values["qid"] for row in rows} for split, rows in loaded.rows.items()}
    assert all(len(of[split]) > 3 for split in ("train", "test"))
    assert not of["train"] & of["test"]
    assert sum(counts(loaded)) == 40


def test_a_tombench_question_of_two_options(tmp_path: Path) -> None:
    two = {**TOM, "OPTION-C": None, "OPTION-D": None, "答案\nANSWER": "B"}
    (row,) = all_rows(load("tombench", write_rows(tmp_path / "tom.jsonl", two)))
    assert row.values["choices"] == ["Sad", "Scared"]
    assert row.values["reference"] == "B: Scared"


def test_opus_directions_and_lengths(tmp_path: Path) -> None:
    long = {"id": "1", "translation": {"en": "Yes.", "fr": "Oui, mais il pleut, et je reste ici."}}
    file = write_rows(tmp_path / "rows.jsonl", PUBLISHED["opus_books"], long)
    loaded = load("opus_books", file, max_length_ratio=3, direction="fr-en")
    (row,) = all_rows(loaded)
    assert row.prompt == "Translate the following text from French to English:\n\nLe chat."
    assert (row.values["source_language"], row.values["target_language"]) == ("French", "English")
    assert loaded.notes[0] == "1 rows whose sides differ in length by more than 3 times are left out"
    with pytest.raises(UserError, match=r"rows\.jsonl:1: translation has no 'de', only en, fr"):
        load("opus_books", file, direction="de-en")


def test_rows_without_reference_or_with_a_history_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [THOUGHT, {**THOUGHT, "reference_answer": ""}, {**THOUGHT, "prev_messages": [{"role": "user"}]}]
    loaded = load("general_thoughts", write_rows(tmp_path / "rows.jsonl", *rows))
    (row,) = all_rows(loaded)
    assert row.values["published_task"] == "chat"
    assert loaded.notes == ["1 rows without a reference are left out", "1 rows with earlier messages are left out"]
    with pytest.raises(UserError, match="no rows that can be used; 1 rows without a reference are left out"):
        load("general_thoughts", write_rows(tmp_path / "rows.jsonl", rows[1]))


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "EA.jsonl", EA)
    (row,) = all_rows(load("emobench", file, prompt_template="{subject}: {question type}\n{options}"))
    assert row.prompt == "Bo: Action\nA: Listen\nB: Leave"
    source = Source("emobench", options={"file": file}, prompt_template="{subject}!")
    assert [row.prompt for row in all_rows(load_source(0, source))] == ["Bo!"]
    source.options["prompt_template"] = "{scenario}"
    with pytest.raises(UserError, match="two prompt_templates"):
        source.check()


# NOVER's form


def test_novers_emobench(tmp_path: Path) -> None:
    scenario = "\nQuestion: Ann baked.\nHer son (5) ate.\n "
    eu = scenario + "What emotion is Ann feeling, and why? First select an emotion, then choose its cause."
    ea = scenario + "What would be the best course of action for Ann in this situation? Please select one."
    file = write_nover(
        tmp_path / "emobench.csv",
        (
            eu + "\n\nEmotion Options:\nA: Joy\nB: Fear\n\nCause Options:\nA: He ate\nB: He left" + INSTRUCTION,
            "Emotion: A: Joy, Cause: B: He left",
            "train",
        ),
        (ea + "\n\nAction Options:\nA: Wait\nB: Smile" + INSTRUCTION, "B: Smile", "test"),
    )
    loaded = load("emobench", file)
    (two,), (one,) = loaded.rows["train"], loaded.rows["test"]
    assert two.values["scenario"] == "Ann baked.\nHer son (5) ate."
    assert two.values["choices"] == {"Emotion": ["Joy", "Fear"], "Cause": ["He ate", "He left"]}
    assert two.values["label"] == {"Emotion": "A", "Cause": "B"}
    assert two.values["reference"] == "Emotion: A: Joy, Cause: B: He left"
    assert (one.values["choices"], one.values["label"]) == (["Wait", "Smile"], "B")
    assert str(one.prompt).endswith(
        "What would be best for Ann to do or say in this situation? Choose one option.\n\nA: Wait\nB: Smile"
    )


def test_novers_questions_and_translations(tmp_path: Path) -> None:
    file = write_nover(tmp_path / "nr.csv", ("\nQuestion: How far?" + INSTRUCTION, "9 km", "validation"))
    (row,) = load("natural_reasoning", file).rows["validation"]
    assert (row.prompt, row.values["reference"]) == ("How far?", "9 km")
    request = "\nTranslate the following text from Italian to Russian:\n\nSì.\nNo."
    file = write_nover(tmp_path / "opus.csv", (request + INSTRUCTION, "Да. Нет.", "test"))
    (row,) = load("opus_books", file).rows["test"]
    assert (row.values["source_language"], row.values["source_text"]) == ("Italian", "Sì.\nNo.")
    assert row.prompt == "Translate the following text from Italian to Russian:\n\nSì.\nNo."
    choice = "\nQuestion: Ann hides it.\nWho knows?\nA. Ann\nB. Bo" + INSTRUCTION
    (row,) = load("tombench", write_nover(tmp_path / "tom.csv", (choice, "B. Bo", "test"))).rows["test"]
    assert (row.values["choices"], row.values["label"], row.values["reference"]) == (["Ann", "Bo"], "B", "B: Bo")
    assert row.prompt == "Ann hides it.\nWho knows?\n\nA: Ann\nB: Bo"


def test_options_are_read_back_as_they_are_written() -> None:
    for choices in (["x", "y (z)\nmore"], {"Emotion": ["a", "b"], "Cause": ["c", "d", "e"]}):
        text = options_text(choices)  # type: ignore[arg-type]
        asked = text.replace("Emotion:", "Emotion Options:").replace("Cause:", "Cause Options:")
        assert split_options(f"Which?\n\n{asked}") == ("Which?", choices)
    with pytest.raises(ValueError, match="no options"):
        split_options("Which?\nA: only one")
    with pytest.raises(ValueError, match="'E' is not among the choices A, B"):
        written_label("E: x", ["x", "y"])
    with pytest.raises(ValueError, match="has no answer for Cause"):
        written_label("Emotion: A", {"Emotion": ["x", "y"], "Cause": ["x", "y"]})


@pytest.mark.parametrize("blank", [None, "", "  ", float("nan")])
def test_a_tombench_option_that_is_empty(tmp_path: Path, blank: Any) -> None:
    (row,) = all_rows(
        load("tombench", write_rows(tmp_path / "two.jsonl", {**TOM, "OPTION-C": blank, "OPTION-D": blank}))
    )
    assert row.values["choices"] == ["Sad", "Scared"]
    with pytest.raises(UserError, match="OPTION-B is empty and OPTION-D is not"):
        load("tombench", write_rows(tmp_path / "hole.jsonl", {**TOM, "OPTION-B": blank}))
    with pytest.raises(UserError, match="has 1 options"):
        load("tombench", write_rows(tmp_path / "one.jsonl", {**TOM, **{f"OPTION-{letter}": blank for letter in "BCD"}}))


def test_a_tombench_table_with_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "tom.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = ["STORY", "QUESTION", *(f"OPTION-{letter}" for letter in "ABCD"), "答案\nANSWER"]
        csv.writer(file).writerows([columns, ["s", "q", "x", "y", "", "", "B"]])
    (row,) = all_rows(load("tombench", str(path)))
    assert (row.values["choices"], row.values["reference"]) == (["x", "y"], "B: y")


def test_a_conversation_before_the_options_is_the_question() -> None:
    talk = "Two friends talk.\nA: Hello\n\nB: Fine.\nA: Bye\nWho left?"
    assert split_options(f"{talk}\nA: Ann\nB: Bo") == (talk, ["Ann", "Bo"])
    assert split_options(f"{talk}\n\nAction Options:\nA: Wait\nB: Go") == (talk, ["Wait", "Go"])
    assert split_options(f"{talk}\nX Options:\nA: a\nB: b\nY Options:\nA: c\nB: d") == (
        talk, {"X": ["a", "b"], "Y": ["c", "d"]},
    )  # fmt: skip
    assert split_options("Which?\nA: one\n  and more\nB: two") == ("Which?", ["one\nand more", "two"])


def test_a_written_label_says_what_its_option_says() -> None:
    names = ["Tom", "Ann", "Bob Ray"]
    for written in ("C", "C: Bob Ray", " (C) Bob\n Ray. ", "C. Bob Ray", "C:"):
        assert written_label(written, names) == "C"
    pairs = {"Emotion": ["Joy", "Fear, at first"], "Cause": ["He ate", "He left"]}
    for written in ("Emotion: B: Fear, at first, Cause: A: He ate", "Emotion: B, Cause: A", "Emotion: (B)\nCause: (A)"):
        assert written_label(written, pairs) == {"Emotion": "B", "Cause": "A"}
    with pytest.raises(ValueError, match="'C: Tom' names C, which is 'Bob Ray'"):
        written_label("C: Tom", names)
    with pytest.raises(ValueError, match="'A man' names A, which is 'Tom'"):
        written_label("A man", names)
    with pytest.raises(ValueError, match="'A: He left' names A, which is 'He ate'"):
        written_label("Emotion: A: Joy, Cause: A: He left", pairs)


# splits


def questions(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"What is {i}?", "answer": str(i)} for i in range(start, start + n)]


def test_sizes_are_shares_where_rows_are_few(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", *questions(40))
    loaded = load("webinstruct", file)
    assert counts(loaded) == [20, 10, 10]  # 2000, 1000 and 1000 of 4000, of 40 rows
    assert loaded.how == "by hash, split_seed 0"
    assert counts(load("webinstruct", file, test_size=4)) == [24, 12, 4]
    assert counts(load("webinstruct", file, train_size=10, validation_size=6, test_size=4)) == [10, 6, 4]
    assert load("webinstruct", file, train_size=10, validation_size=6, test_size=4).notes == [
        "more than asked for: 20 rows left out of train"
    ]
    assert counts(load("webinstruct", file, validation_size=0)) == [27, 0, 13]
    reversed_file = write_rows(tmp_path / "reversed.jsonl", *questions(40)[::-1])
    splits = [{row.prompt for row in load("webinstruct", f).rows["test"]} for f in (file, reversed_file)]
    assert splits[0] == splits[1]


def test_equal_prompts_are_divided_together(tmp_path: Path) -> None:
    rows = [{**row, "answer": answer} for row in questions(20) for answer in ("a", "b")]
    loaded = load("webinstruct", write_rows(tmp_path / "rows.jsonl", *rows))
    keys = [{row.key for row in rows} for rows in loaded.rows.values()]
    assert sum(counts(loaded)) == 40
    assert sum(map(len, keys)) == 20


def test_files_by_split_stay_as_they_are(tmp_path: Path) -> None:
    file = {
        "train": write_rows(tmp_path / "a.jsonl", *questions(10)),
        "test": write_rows(tmp_path / "b.jsonl", *questions(4, 10)),
    }
    loaded = load("webinstruct", file)
    assert (counts(loaded), loaded.how) == ([10, 0, 4], "by file")
    assert counts(load("webinstruct", file, validation_size=3)) == [7, 3, 4]


def test_rows_of_train_that_the_card_does_not_train_on_are_its_missing_validation(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(7480)]
    file = {
        "train": write_rows(tmp_path / "train.jsonl", *rows[:7473]),
        "test": write_rows(tmp_path / "test.jsonl", *rows[7473:]),
    }
    loaded = load("gsm8k", file)
    assert counts(loaded) == [6473, 1000, 7]  # as from the hub
    assert loaded.how == "by hash, split_seed 0"
    assert loaded.notes == []
    write_rows(tmp_path / "train.jsonl", *rows[:10])
    assert counts(load("gsm8k", file, train_size=8)) == [8, 2, 7]
    assert counts(load("gsm8k", file, train_size=8, validation_size=0)) == [8, 0, 7]


def test_empty_options_of_a_table_are_left_out_and_counted(tmp_path: Path) -> None:
    question = "\nQuestion: Ann hides it.\nWho knows?\nA. Ann\nB. Bo\nC. nan\nD. nan" + INSTRUCTION
    loaded = load("tombench", write_nover(tmp_path / "tom.csv", (question, "B. Bo", "test")))
    (row,) = loaded.rows["test"]
    assert row.prompt == "Ann hides it.\nWho knows?\n\nA: Ann\nB: Bo"
    assert row.values["choices"] == ["Ann", "Bo"]
    assert "2 empty options (nan) are left out" in loaded.notes
    published = {**TOM, "OPTION-C": float("nan"), "OPTION-D": "nan"}
    loaded = load("tombench", write_rows(tmp_path / "rows.jsonl", published))
    assert loaded.rows["test"][0].values["choices"] == ["Sad", "Scared"]
    assert "2 empty options (nan) are left out" in loaded.notes
    assert "_blank_options" not in loaded.rows["test"][0].values
    with pytest.raises(UserError, match="the label 'D' is not among the choices A, B"):
        load("tombench", write_rows(tmp_path / "rows.jsonl", {**published, "答案\nANSWER": "D"}))


@pytest.mark.parametrize("label", ["A", "A.", "(A)", " A：", "A、"])
def test_a_label_may_have_its_punctuation(tmp_path: Path, label: str) -> None:
    (row,) = all_rows(load("tombench", write_rows(tmp_path / "rows.jsonl", {**TOM, "答案\nANSWER": label})))
    assert (row.values["label"], row.values["reference"]) == ("A", "A: Sad")


def test_repetitions_and_leaks_are_dropped(tmp_path: Path) -> None:
    rows = [("a", "1", "train"), ("a", "1", "train"), ("a", "2", "train"), ("b", "1", "train"), ("c", "1", "train")]
    rows += [("b", "1", "validation"), ("d", "1", "validation"), ("d", "1", "test"), ("c", "1", "test")]
    loaded = load("natural_reasoning", write_nover(tmp_path / "rows.csv", *rows))
    assert [[row.prompt for row in split] for split in loaded.rows.values()] == [["a", "a"], ["b"], ["d", "c"]]
    assert loaded.notes == [
        "repeated in its split: 1 rows left out of train",
        "3 prompts in more than one split: 2 rows left out of train, 1 rows left out of validation",
    ]


def test_the_start_tells_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_nover(tmp_path / "rows.csv", ("a", "1", "train"), ("b", "1", "train"), ("a", "1", "test"))
    data = PromptDataModule(Source("natural_reasoning", options={"file": file}))
    assert [row.prompt for row in data.rows["train"]] == ["b"]
    said = " ".join(capsys.readouterr().out.split())
    assert "natural_reasoning 1 0 1 by column 'split'" in said
    assert "natural_reasoning: 1 prompts in more than one split: 1 rows left out of train" in said


def test_tombench_is_for_evaluation_only(tmp_path: Path) -> None:
    rows = [{**TOM, "QUESTION": f"Question {i}?"} for i in range(286)]
    file = write_rows(tmp_path / "tom.jsonl", *rows)
    loaded = load("tombench", file)
    assert (counts(loaded), loaded.how) == ([0, 0, 286], "all test")
    assert counts(load("tombench", file, test_size=85)) == [0, 0, 85]
    assert counts(load("tombench", {"train": file})) == [0, 0, 286]
    for _ in range(2):
        with pytest.warns(UserWarning, match="authors ask to use it for evaluation only"):
            trained = load("tombench", file, allow_training=True)
    assert counts(trained) == [143, 57, 86]  # a tenth of 1432, 571 and 857
    with pytest.raises(UserError, match="no train prompts to fit on"):
        PromptDataModule(Source("tombench", options={"file": file}), show=False).setup("fit")


def test_dividing_gives_exact_splits_their_size() -> None:
    rows: dict[Any, list[Row]] = {"train": [Row({"prompt": str(i)}, "f", i, 0) for i in range(10)]}
    rows |= {"validation": [], "test": []}
    divided, taken = divide(rows, Sizes(0, 8, 9), ["validation", "test"], 0, lambda row: row.key)
    assert taken
    assert [len(divided[split]) for split in ("train", "validation", "test")] == [0, 1, 9]


# files


def test_a_folder_a_root_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "tom").mkdir()
    write_rows(tmp_path / "tom" / "b.jsonl", {**TOM, "QUESTION": "Second?"})
    (tmp_path / "tom" / "a.jsonl").write_text(json.dumps(TOM), encoding="utf-8-sig")
    (tmp_path / "tom" / "LICENSE").write_text("MIT")
    data = PromptDataModule(Source("tombench", options={"file": "tom"}), root=str(tmp_path), show=False)
    assert [row.values["QUESTION"] for row in data.rows["test"]] == ["What does she feel?", "Second?"]
    below = Source("tombench", options={"file": {"test": ["a.jsonl", "/b.jsonl"]}}).below("root")
    assert below.options["file"] == {"test": [str(Path("root/a.jsonl")), "/b.jsonl"]}
    assert below.path == "tombench"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"the folder .*nothing holds no \.jsonl"):
        load("tombench", str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        (
            "emobench",
            {**EU, "emotion_label": "Joy"},
            r"the label 'Joy' is not among the choices \['Anger', 'Delight'\]",
        ),
        ("emobench", {**EU, "language": "fr"}, "language is 'fr', expected one of en, zh"),
        ("emobench", {**EU, "language": ["en"]}, r"language is \['en'\], expected one of en, zh"),
        ("emobench", {**EA, "choices": "Listen"}, "choices is 'Listen', expected a list of at least two texts"),
        ("tombench", {**TOM, "答案\nANSWER": "E"}, "the label 'E' is not among the choices A, B, C, D"),
        ("opus_books", {"translation": "Le chat."}, "translation is 'Le chat.', expected an object of two languages"),
        ("opus_books", {"translation": {"en": "Hi", "xx": "Ho"}}, "the language 'xx' is unknown"),
        ("opus_books", {"prompt": "Hello", "reference": "Salut"}, "expected 'Translate the following text from X to Y"),
        ("gsm8k", {"question": "3 + 4?", "answer": "7"}, "the answer has no result after '####'"),
        ("natural_reasoning", {"question": " ", "reference_answer": "x"}, "question is empty"),
        ("webinstruct", {"question": "2 + 2?", "answer": 4}, "answer is 4, expected text"),
        ("ss_gen", {**PUBLISHED["ss_gen"], "title": None}, "title is None, expected text"),
    ],
)
def test_rows_that_cannot_be_used(name: str, row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", PUBLISHED[name], row)
    if set(row) != set(PUBLISHED[name]):
        file = write_rows(tmp_path / "rows.jsonl", row)
        with pytest.raises(UserError, match=rf"1 of 1 rows cannot be used:\s+rows\.jsonl:1: .*{sentence}"):
            load(name, file)
        return
    with pytest.raises(UserError, match=rf"1 of 2 rows cannot be used:\s+rows\.jsonl:2: {sentence}"):
        load(name, file)
    with pytest.warns(UserWarning, match="1 of 2 rows cannot be used and are left out"):
        assert len(all_rows(load(name, file, on_bad_row="drop"))) == 1


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"rows\.jsonl has the columns a, b; gsm8k is read from the published form \(question, answer\) or "
        r"NOVER's form \(prompt, reference\)",
    ):
        load("gsm8k", write_rows(tmp_path / "rows.jsonl", {"a": 1, "b": 2}))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=r"empty\.jsonl has no rows"):
        load("gsm8k", str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"There is no file .*nowhere\.jsonl"):
        load("gsm8k", str(tmp_path / "nowhere.jsonl"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PUBLISHED["gsm8k"]) + "\n{broken\n")
    with pytest.raises(UserError, match=r"broken\.jsonl:2: not JSON"):
        load("gsm8k", str(broken))
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no column 'answer'; the published form has question, answer"):
        load("gsm8k", write_rows(tmp_path / "rows.jsonl", PUBLISHED["gsm8k"], {"question": "Only?"}))


def test_no_file_and_no_hub() -> None:
    with pytest.raises(
        UserError,
        match=r"datasets could not load 'openai/gsm8k' from the hub .*: give its rows with options: \{file: PATH\}, "
        r"as the published form \(question, answer\) or",
    ):
        load("gsm8k")
    with pytest.raises(UserError, match=r"tombench is published as files only \(https://github\.com/zhchen18/ToMBench"):
        load("tombench")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (Source("gsm8k", options={"fil": "x"}), "there is no 'fil'; expected file, prompt_template, train_size"),
        (Source("gsm8k", options={"language": "en"}), "there is no 'language'"),
        (Source("gsm8k", options={"test_size": -1}), "test_size is -1; expected a whole number of at least 0"),
        (Source("gsm8k", options={"file": {"exam": "a"}}), "file has the split 'exam'"),
        (Source("gsm8k", options={"file": []}), r"file is \[\]; expected a path, a list of paths"),
        (Source("emobench", options={"language": "fr"}), "language is 'fr'; expected one of en, zh, all"),
        (Source("tombench", options={"allow_training": "yes"}), "allow_training is 'yes'; expected true or false"),
        (Source("opus_books", options={"max_length_ratio": 0.5}), "max_length_ratio is 0.5; expected a number of at least 1"),
        (Source("opus_books", options={"direction": "fr"}), "direction is 'fr'; expected two languages"),
        (Source("gsm8k", fractions=[1, 0, 0]), "brings its own splits"),
        (Source("gsm8k", columns={"prompt": "q"}), "knows its columns"),
        (Source("gsm8k", name="socratic", options={"file": "a.jsonl"}), "'socratic', for the hub and a file, 'a.jsonl'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_used(source: Source, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PromptDataModule(source)


# the hub


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []
    train = [{"question": f"{i} + 0?", "answer": f"#### {i}"} for i in range(90)]
    test = [{"question": f"{i} + 0?", "answer": f"#### {i}"} for i in range(85, 100)]
    parts = {"train": datasets.Dataset.from_list(train), "test": datasets.Dataset.from_list(test)}

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load("gsm8k", revision="v1")
    assert asked == [(("openai/gsm8k", "main"), {"revision": "v1"})]
    assert counts(loaded) == [74, 11, 15]  # 85 of train stand in no other split; 1000 of 7473 of them validate
    assert loaded.notes == ["5 prompts in more than one split: 5 rows left out of train"]
    loaded = load("gsm8k", max_rows=30)
    assert loaded.notes[0] == "60 rows beyond max_rows=30 are left out"
    assert counts(loaded) == [25, 4, 15]  # 0, 3, ... 87 are read, and 87 is in test
    del parts["test"]
    assert counts(load("gsm8k")) == [66, 10, 14]  # 6473, 1000 and 1319 of 8792, of 90 rows
    load_source(0, Source("gsm8k", name="socratic"))
    assert asked[-1][0] == ("openai/gsm8k", "socratic")


# a whole run, the cards, the real files


def test_a_whole_run(tmp_path: Path, tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maestro_pl.cli import main

    write_rows(tmp_path / "EA.jsonl", *({**EA, "qid": str(i), "scenario": f"Case {i}."} for i in range(10)))
    config = {
        "model": {"policy": {"model": str(tiny_qwen3), "dtype": "float32"}, "weigher": "maestro_pl.Conductor"},
        "data": {"sources": [{"path": "emobench", "options": {"file": "EA.jsonl"}}], "root": str(tmp_path), "batch_size": 2},
        "rollout": {"group_size": 2, "eval_group_size": 2, "max_new_tokens": 4},
        "rewards": [
            {"class_path": "callbacks.FormatReward"},
            {"class_path": "callbacks.LengthReward", "init_args": {"max": 3}},
        ],
        "trainer": {"accelerator": "cpu", "max_steps": 1},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    assert not main(["fit", "--config", "tiny.yaml"])


def test_the_cards_stand_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.endswith(cards_markdown())
    example = re.search(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert example is not None
    for given in yaml.safe_load(example.group(1))["data"]["sources"]:
        (Source(given) if isinstance(given, str) else Source(**given)).check()
    options = {option for benchmark in BENCHMARKS.values() for option in benchmark.options}
    assert options <= set(re.findall(r"^\| `(\w+)`", page, flags=re.MULTILINE))
    tests = {name: benchmark.card.sizes.test for name, benchmark in BENCHMARKS.items()}
    assert tests == {
        "natural_reasoning": 1000, "ss_gen": 508, "webinstruct": 1000, "tombench": 857, "general_thoughts": 1000,
        "opus_books": 1000, "emobench": 128, "gsm8k": 1319,
    }  # fmt: skip
    assert all(isinstance(benchmark.card, BenchmarkCard) for benchmark in BENCHMARKS.values())


def test_the_real_files(shared: Path) -> None:
    data = shared / "data"
    expected = [
        ("natural_reasoning", "nover/nr.csv", [2000, 1000, 1000]),
        ("webinstruct", "nover/webit.csv", [1907, 983, 996]),
        ("general_thoughts", "nover/gt.csv", [1979, 995, 998]),
        ("opus_books", "nover/opus_books_all_pairs.csv", [2000, 1000, 1000]),
        ("emobench", "nover/emobench.csv", [272, 0, 128]),
        ("ss_gen", "ssgen/dev.jsonl", [407, 51, 51]),
        ("gsm8k", "gsm8k/train.jsonl", [1104, 171, 225]),
    ]
    loaded = {name: load(name, str(data / file)) for name, file, _ in expected}
    assert {name: counts(loaded[name]) for name in loaded} == {name: numbers for name, _, numbers in expected}
    assert "80 prompts in more than one split" in " ".join(loaded["webinstruct"].notes)
    assert "17 prompts in more than one split" in " ".join(loaded["general_thoughts"].notes)
    published = load("emobench", [str(data / "emobench/EU.jsonl"), str(data / "emobench/EA.jsonl")])
    assert counts(published) == [272, 0, 128]
    assert counts(load("emobench", str(data / "emobench"), language="all")) == [544, 0, 256]
    # NOVER's prompts, parsed, are the published questions
    nover = {row.key: row.values["label"] for row in all_rows(loaded["emobench"])}
    same = [row for row in all_rows(published) if nover.get(row.key) == row.values["label"]]
    assert len(nover) == len(same) == 400
