"""Labels out of files: each person is known again, nothing is lost without a word, and what is wrong is a sentence."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from maestro_pl.cli import main
from maestro_pl.errors import UserError
from maestro_pl.labelling.exchange import exported
from maestro_pl.labelling.importing import imported, labels_in
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import Click, LabelStore

GOOD = '{"prompt": "p", "responses": ["x", "y"], "choice": 1, "rater": "ann"}\n'
HEAD = "prompt,choice,rater,time,of,response_1,response_2,response_3,response_4\n"
ROW = "p,1,ann,,4,w,x,y,z\n"
DERIVED = str(uuid.uuid5(uuid.NAMESPACE_URL, "ann"))
STRANGER = "0b5e2f9a-7c1d-4e6f-8a9b-123456789abc"


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore(tmp_path / "labels.db")


def click(prompt: str, rater: str, best: str | None) -> Click:
    asked = Question.of("a", prompt, ["x", "y"])
    place = None if best is None else asked.responses.index(best)
    return Click(asked, rater, "tie" if best is None else "best", place, (0, 1), 1.0)


def held(store: LabelStore) -> list[tuple[str, str, Any]]:
    return [(c.rater, str(c.question.prompt), [c.question.responses[b] for b in c.bests]) for c in store.clicks()]


def label(*arguments: object) -> None:
    main(["label", *map(str, arguments)])


def refused(path: Path, form: str | None = None, rater: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        labels_in(path, form, rater)
    said = str(caught.value)
    assert said.startswith(str(path)) or rater
    assert said.endswith(". Nothing was imported.")
    assert ".." not in said.replace("...", "")
    return said


# -- who it is ---------------------------------------------------------------------------------------------------------


def test_people_come_back_from_argilla_as_themselves(store: LabelStore, tmp_path: Path) -> None:
    store.click(click("p", "ann", "x"), click("p", "bob", "y"), click("q", "ann", None))
    before, file = held(store), tmp_path / "arg.json"
    exported(store, file, "argilla")
    records = json.loads(file.read_text())
    records[1]["responses"]["best"].append({"value": "answer_1", "user_id": STRANGER})
    records[1]["responses"]["best"].append({"value": None, "user_id": DERIVED})  # discarded
    file.write_text(json.dumps(records))
    new = (STRANGER, "q", [records[1]["fields"]["answer_1"]])
    for counts in ((1, 3), (0, 4)):
        done = imported(store, labels_in(file, "argilla"))
        assert (done.new, done.known, done.contradicting) == (*counts, [])
    assert held(store) == [*before, new]
    # somebody of Argilla keeps the id on the way back
    exported(store, tmp_path / "back.json", "argilla")
    back = json.loads((tmp_path / "back.json").read_text())[1]["responses"]["best"]
    assert [each["user_id"] for each in back] == [DERIVED, STRANGER]


def test_a_pseudonym_is_known_by_the_id_that_came_before(tmp_path: Path) -> None:
    ours, other = LabelStore(tmp_path / "ours.db"), LabelStore(tmp_path / "other.db")
    ours.click(click("p", "ann", "x"))
    exported(ours, tmp_path / "arg.json", "argilla")
    exported(ours, tmp_path / "l.csv")
    assert imported(other, labels_in(tmp_path / "arg.json", "argilla")).new == 1
    done = imported(other, labels_in(tmp_path / "l.csv"))
    assert (done.new, done.known) == (0, 1)
    assert held(other) == [(DERIVED, "p", ["x"])]
    other.click(click("p", "ann", "x"))  # a file in which they have been counted twice gets no third one
    assert imported(other, labels_in(tmp_path / "arg.json", "argilla")).known == 1
    assert len(other.clicks()) == 2


def test_people_come_back_from_label_studio_whoever_has_imported_them_there(store: LabelStore, tmp_path: Path) -> None:
    store.click(click("p", "ann", "x"), click("p", "bob", "y"))
    before, file = held(store), tmp_path / "studio.json"
    exported(store, file, "label-studio")
    tasks = json.loads(file.read_text())
    for annotation in tasks[0]["annotations"]:
        del annotation["created_username"]
        annotation["completed_by"] = 7
    mine = {"id": "Dx_aB91ISN", "from_name": "best", "value": {"choices": ["all bad"]}}
    tasks[0]["annotations"].append({"completed_by": 7, "result": [mine]})
    file.write_text(json.dumps(tasks))
    done = imported(store, labels_in(file, "label-studio"))
    assert (done.new, done.known, done.contradicting) == (1, 2, [])
    assert held(store) == [*before, ("7", "p", [])]


def test_a_rater_that_the_file_overrules_is_said(
    store: LabelStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "l.jsonl"
    file.write_text(GOOD)
    said = refused(file, rater="bob")
    assert f"--rater bob: {file} says of each label whose it is (ann); leave --rater out" in said
    assert len(labels_in(file, rater="ann")) == 1
    file.write_text(GOOD + GOOD.replace('"ann"', "null"))
    label("import", store.path, file, "--rater", "bob")
    assert "; --rater bob counts for 1 of them, the file names the person of the others\n" in capsys.readouterr().out
    assert [rater for rater, _, _ in held(store)] == ["ann", "bob"]
    file.write_text(GOOD.replace('"ann"', "null"))
    assert "line 1: nobody is named; give --rater NAME. Nothing" in refused(file)


# -- what contradicts --------------------------------------------------------------------------------------------------


def test_answers_that_contradict_are_named(
    store: LabelStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.click(click("q", "bob", "x"))
    file = tmp_path / "l.csv"
    rows = ["q,2,bob,x,y", "p,1,ann,x,y", "p,2,ann,x,y", "p,1,ann,x,y", "p,2,ann,y,x", "p,no difference,ann,x,y",
            "p,all bad,ann,x,y", "r,,ann,x,y"]  # fmt: skip
    file.write_text("prompt,choice,rater,response_1,response_2\n" + "\n".join(rows))
    label("import", store.path, file)
    assert capsys.readouterr().out == (
        f"1 labels read from {file}; 2 were known; 4 were left out, because the same person's answer that stands is another "
        "one, and an import never replaces it: row 2 (bob), row 4 (ann), row 7 (ann) and 1 more\n"
    )
    assert held(store) == [("bob", "q", ["x"]), ("ann", "p", ["x"])]


def test_the_order_of_several_best_ones_contradicts_nothing(store: LabelStore, tmp_path: Path) -> None:
    file = tmp_path / "l.csv"
    file.write_text(HEAD + ROW.replace("1", '"1, 3"', 1) + ROW.replace("1", '"3, 1"', 1))
    done = imported(store, labels_in(file))
    assert (done.new, done.known, done.contradicting) == (1, 1, [])


# -- what holds nothing, or something else -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", ""), ("l.csv", HEAD), ("l.csv", HEAD + ROW.replace("1", "", 1)), ("l.jsonl", ""), ("l.jsonl", "\n\n"),
        ("l.jsonl", GOOD.replace(": 1", ": null")), ("l.argilla", ""), ("l.argilla", "[]"), ("l.label-studio", " "),
        ("l.label-studio", '[{"data": {"prompt": "p", "answer_1": "x", "answer_2": "y"}, "annotations": []}]'),
    ],
)  # fmt: skip
def test_a_file_without_a_label_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as caught:
        label("import", tmp_path / "labels.db", tmp_path / name, "--format", name.removeprefix("l."))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"{name} holds no label: expected " in said
    assert "and at least one choice. Nothing was imported." in said
    assert not (tmp_path / "labels.db").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD.replace("choice", "best") + ROW,
         "row 1: there is no choice, it has prompt, best, rater, time, of, response_1, response_2, response_3, response_4; "
         "expected the columns prompt, choice, response_1, response_2, ... (and, where"),
        ((HEAD + ROW).replace(",", ";"), "its columns seem to have ';' between them; save it with commas; expected the"),
        ((HEAD + ROW).replace(",", "\t"), r"its columns seem to have '\t' between them; save it with commas"),
        (HEAD + ROW + ROW.replace(",4,", ",2,"), "row 3: 'of' is '2' beside 4 answers; expected their number, or leave"),
        (HEAD + ROW.replace(",4,", ",7,"), "row 2: 'of' is '7' beside 4 answers"),
        (HEAD + ROW.replace(",4,", ",many,"), "row 2: 'of' is 'many' beside 4 answers"),
        (HEAD + "\n" + ROW.replace(",,", ",yesterday,"),
         "row 3: the time is 'yesterday', expected one since 1970 such as 2026-01-31T12:00:00+00:00; leave it empty"),
        (HEAD + ROW.replace(",,", ",0001-01-01T00:00:00-14:00,"), "expected one since 1970"),
        (HEAD + ROW.replace("z", "z,and more"), "row 2: it has 10 cells, and the header 9; put texts with a comma in them"),
        (HEAD + ROW.replace("w", '"w') + ROW, "row 2: its quotes do not match (unexpected end of data)"),
        (HEAD + ROW.replace("1", "5", 1), "row 2: the choice is '5', expected 1 to 4 (several: '1, 2'), 'no difference' or"),
        (HEAD + ROW.replace("ann", "a n n"), "row 2: rater 'a n n': expected a pseudonym of letters"),
        (HEAD + ROW.replace("x", "w"), "row 2: A question with the answers ['"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_csv_file_is_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    assert said in refused(tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + '{"prompt": "p\n', "line 2: it is no JSON (character 12: Unterminated string starting at); expected on each"),
        (GOOD + '\n{"a": x}', "line 3: it is no JSON (character 7: Expecting value); expected on each line an object"),
        (GOOD + "no json", "line 2: it is no JSON (character 1: Expecting value)"),
        (GOOD + "[1, 2]\n", "line 2: it is [1, 2]; expected on each line an object with prompt, responses and choice"),
        ('{"prompt": "p"}\n', "line 1: there is no responses and no choice, it has prompt; expected on each line an object"),
        (GOOD.replace('["x", "y"]', '"xy"'), "line 1: 'responses' is 'xy', expected a list"),
        (GOOD.replace('"p"', "7"), "line 1: the prompt is 7, expected a text or chat messages"),
        (GOOD.replace('"y"', "7"), "line 1: an answer is 7, expected a text"),
        (GOOD.replace('"ann"', '"ann", "of": 7'), "line 1: 'of' is 7 beside 2 answers"),
        (GOOD.replace('"ann"', '"ann", "time": "0001-01-01T00:00:00+14:00"'), "expected one since 1970"),
        (GOOD + GOOD.replace(": 1", ": 3"), "line 2: the choice is 3, expected 1 to 2"),
        (GOOD.replace(": 1", ": [1, 3]"), "the choice is [1, 3], expected 1 to 2 (several: '1, 2')"),
        (GOOD.replace(": 1", ': [1, "all bad"]'), "expected 1 to 2"),
        (GOOD.replace(": 1", ": 1.5"), "the choice is 1.5"),
        (GOOD.replace(": 1", ": 1e999"), "the choice is Infinity"),
        (GOOD.replace(": 1", f": {10**401}"), "the choice is 1000"),
        (GOOD.replace(": 1", ": " + "1" * 5000), "line 1: a number in it has too many digits; take some off"),
        (GOOD.replace(": 1", ": true"), "the choice is true"),
        (GOOD.replace(": 1", ": [[1]]"), "the choice is [[1]]"),
        (GOOD + GOOD.replace('"p"', r'"\ud800"'), r"line 2: a text has half a letter, \ud800, which cannot be kept"),
        ("[" * 100_000 + "\n" + GOOD, "line 1: it is nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_json_lines_is_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "l.jsonl").write_text(text)
    assert said in refused(tmp_path / "l.jsonl")


RECORD: dict[str, Any] = {
    "fields": {"prompt": "p", "answer_1": "x", "answer_2": "y"},
    "metadata": {"task": "a"},
    "responses": {"best": [{"value": "answer_1", "user_id": STRANGER}]},
}
TASK: dict[str, Any] = {
    "data": {"prompt": "p", "answer_1": "x", "answer_2": "y", "task": "a"},
    "annotations": [
        {"completed_by": 7, "created_at": "2026-01-01T00:00:00Z", "result": [
            {"id": "a", "from_name": "best", "value": {"choices": ["answer_2"]}}]}
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "held", "said"),
    [
        ("argilla", {"a": 1}, "as a whole: it is {\"a\": 1}; expected a list of records with the fields prompt, answer_1"),
        ("argilla", [RECORD, 7], "record 2: it is 7, expected an object"),
        ("argilla", [RECORD | {"fields": None}], "record 1: 'fields' is null, expected an object"),
        ("argilla", [RECORD | {"fields": {"prompt": "p"}}], "record 1: there is no answer_1 and no answer_2, it has prompt;"),
        ("argilla", [RECORD | {"responses": {"best": [{"value": "answer_3", "user_id": STRANGER}]}}],
         "record 1: the choice is 'answer_3', expected answer_1 to answer_2, 'no difference' or 'all bad'"),
        ("argilla", [RECORD | {"responses": {"best": ["answer_1"]}}], "a response is 'answer_1', expected an object"),
        ("label-studio", [TASK, TASK | {"data": 7}], "task 2: 'data' is 7, expected an object"),
        ("label-studio", [TASK | {"annotations": {"a": 1}}], "task 1: 'annotations' is {\"a\": 1}, expected a list"),
        ("label-studio", [TASK | {"annotations": [{"result": [{"from_name": "best"}]}]}], "'value' is null, expected an"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_other_programs_files_is_a_sentence(tmp_path: Path, form: str, held: Any, said: str) -> None:
    (tmp_path / "l.json").write_text(json.dumps(held))
    assert said in refused(tmp_path / "l.json", form)
    (tmp_path / "l.json").write_text("[\n{,}]")
    assert "as a whole: it is no JSON (line 2, character 2: Expecting" in refused(tmp_path / "l.json", form)


def _spoilt(value: Any) -> list[Any]:
    """The value with each of its parts replaced by something else, or taken out."""
    others: list[Any] = [None, 7, -1.5, True, "", "odd", [], [7], {}, {"a": []}, [[]], [{"role": 1}]]
    if isinstance(value, dict):
        inner = [value | {name: other} for name, part in value.items() for other in _spoilt(part)]
        return [*others, *inner, *({k: v for k, v in value.items() if k != name} for name in value)]
    if isinstance(value, list):
        return [
            *others,
            *([*value[:n], other, *value[n + 1 :]] for n, part in enumerate(value) for other in _spoilt(part)),
        ]
    return others


@pytest.mark.parametrize(("form", "good"), [("argilla", RECORD), ("label-studio", TASK), ("jsonl", json.loads(GOOD))])
def test_whatever_stands_in_a_file_nobody_sees_python(tmp_path: Path, form: str, good: Any) -> None:
    path = tmp_path / "l.json"
    for spoilt in _spoilt(good):
        path.write_text(json.dumps(spoilt if form == "jsonl" else [spoilt]))
        with suppress(UserError):
            assert len(labels_in(path, form)) == 1


def test_letters_are_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "l.csv"
    for encoding, line, byte in (("latin-1", 2, "e9"), ("utf-16", 1, "ff")):
        file.write_bytes((HEAD + ROW.replace("x", "\u00e9")).encode(encoding))
        assert f"{file}, line {line}: the byte 0x{byte} is not UTF-8; save the file as UTF-8" in refused(file)
    file.write_bytes(("task," + HEAD + "greet," + ROW).encode("utf-8-sig"))  # as spreadsheets write it
    assert [each.click.question.task for each in labels_in(file)] == ["greet"]


def test_answers_are_numbered_by_their_columns(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("response_2,prompt,choice,response_1,rater\nb,p,1,a,ann\n")
    (found,) = labels_in(tmp_path / "l.csv")
    assert [found.click.question.responses[place] for place in found.click.bests] == ["a"]


def test_all_of_a_file_or_nothing(store: LabelStore, tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text(GOOD + GOOD.replace('"p"', '"q"').replace(": 1", ": 3"))
    with pytest.raises(SystemExit):
        label("import", store.path, tmp_path / "l.jsonl")
    assert store.clicks() == []
    with pytest.raises(UserError, match="its ending says no format"):
        labels_in(tmp_path / "l.txt")
