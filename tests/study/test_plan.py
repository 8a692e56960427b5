"""What is asked of whom: the same prompts, balance, checks, criteria."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from maestro_pl.errors import UserError
from maestro_pl.study.answers import read_systems
from maestro_pl.study.criteria import DEFAULTS, read_criteria, starting_text
from maestro_pl.study.plan import CHECK, new_study, read_study, shown_answers, write_study
from tests.support.studies import study_of, write_answers


@pytest.mark.parametrize(
    ("systems", "prompts", "raters", "votes"), [(2, 20, 3, None), (3, 7, 4, None), (3, 9, 5, 2), (2, 11, 2, 1)]
)
def test_sides_orders_and_raters_are_balanced(
    tmp_path: Path, systems: int, prompts: int, raters: int, votes: int | None
) -> None:
    study = study_of(tmp_path, systems, prompts, ("story", "social"), raters, votes=votes)
    per_question: dict[tuple[int, tuple[int, int]], list[bool]] = defaultdict(list)
    for rater in study.raters:
        sides: dict[tuple[str, tuple[int, int]], list[bool]] = defaultdict(list)
        for item in rater.items:
            if item.check is None:
                first_left = item.left == item.pair[0]
                sides[study.prompts[item.prompt].task, item.pair].append(first_left)
                per_question[item.prompt, item.pair].append(first_left)
        assert all(abs(2 * sum(left) - len(left)) <= 1 for left in sides.values())
    assert len(per_question) == 2 * prompts * systems * (systems - 1) // 2
    assert {len(left) for left in per_question.values()} == {votes or raters}
    if votes is None:
        assert all(abs(2 * sum(left) - len(left)) <= 2 for left in per_question.values())
    loads = [sum(item.check is None for item in rater.items) for rater in study.raters]
    assert max(loads) - min(loads) <= 1


def test_a_question_is_early_for_one_rater_and_late_for_another(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2, 30, raters=3, checks=0)
    thirds: dict[int, set[int]] = defaultdict(set)
    for rater in study.raters:
        for place, item in enumerate(rater.items):
            thirds[item.prompt].add(place // 10)
    assert all(seen == {0, 1, 2} for seen in thirds.values())
    orders = {tuple(item.prompt for item in rater.items) for rater in study.raters}
    assert len(orders) == 3


def test_checks_are_spread_never_first_and_right_on_either_side(tmp_path: Path) -> None:
    study = study_of(tmp_path, 2, 40, raters=2, checks=4)
    for rater in study.raters:
        places = [place for place, item in enumerate(rater.items) if item.check]
        assert len(places) == 4
        assert places[0] > 0
        assert all(b - a > 4 for a, b in itertools.pairwise(places))
        assert Counter(rater.items[place].check for place in places) == {"left": 2, "right": 2}
        for place in places:
            item = rater.items[place]
            left, right = shown_answers(study, item)
            assert (CHECK in left, CHECK in right) == (item.check == "left", item.check == "right")
            assert item.prompt >= 40  # no question shows this prompt
    usual = study_of(tmp_path, 2, 40, raters=1)
    assert sum(item.check is not None for item in usual.raters[0].items) == 3


def test_a_seed_draws_the_same_and_a_file_holds_everything(tmp_path: Path) -> None:
    one, same, other = (study_of(tmp_path, seed=seed) for seed in (3, 3, 4))
    assert [r.items for r in one.raters] == [r.items for r in same.raters]
    assert [r.items for r in one.raters] != [r.items for r in other.raters]
    assert len({r.token for study in (one, same) for r in study.raters}) == 6
    write_study(one, tmp_path / "s")
    assert read_study(tmp_path / "s") == one


def test_other_prompts_are_refused_and_tasks_are_taken_from_who_names_them(tmp_path: Path) -> None:
    one = write_answers(tmp_path / "one.jsonl", {("story", "p1"): "a", ("story", "p2"): "b"})
    other = write_answers(tmp_path / "other.jsonl", {("story", "p1"): "c", ("story", "p3"): "d"})
    with pytest.raises(UserError, match=r"story: 1 only in one .*1 in both"):
        read_systems([str(one), str(other)])
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"prompt": p, "response": "x"}) + "\n" for p in ("p2", "p1")))
    systems = read_systems([f"mine={bare}", str(one)])
    assert [set(system.answers) for system in systems] == [{("story", '"p1"'), ("story", '"p2"')}] * 2


def test_the_newest_recorded_answers_of_a_run_are_read(tmp_path: Path) -> None:
    run = tmp_path / "version_0"
    run.mkdir()
    for name, text in (("samples_test.jsonl", "old"), ("samples_test-2.jsonl", "new"), ("predictions.jsonl", "no")):
        write_answers(run / name, {("story", "p"): text})
    file = write_answers(tmp_path / "b.jsonl", {("story", "p"): "b"})
    run_system, _ = read_systems([str(run), str(file)])
    assert run_system.name == f"{tmp_path.name}/version_0"
    assert [answer.response for answer in run_system.answers.values()] == ["new"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1: no JSON"),
        ('{"prompt": "p"}', "expected an object with response"),
        ('{"prompt": 3, "response": "x"}', "expected an object with response"),
        ('{"prompt": "p", "response": "x", "rewards": {"r": "high"}}', "expected a finite number"),
        ('{"prompt": "p", "response": "x", "task": 3}', "expected a text as task"),
        ("", "has no answers"),
    ],
)
def test_bad_files_of_answers_are_told(tmp_path: Path, line: str, words: str) -> None:
    good = write_answers(tmp_path / "good.jsonl", {("", "p"): "a"})
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=words):
        read_systems([str(good), str(tmp_path / "bad.jsonl")])


def test_a_task_with_the_name_of_the_rows_over_all_is_refused_beside_others(tmp_path: Path) -> None:
    answers = {("all", "p1"): "a", ("story", "p2"): "b"}
    files = [str(write_answers(tmp_path / f"{name}.jsonl", answers)) for name in ("one", "two")]
    with pytest.raises(UserError) as caught:
        read_systems(files)
    assert str(caught.value) == (
        "one has a task called 'all', the name of the row over all tasks: give it another name in the files of answers."
    )


def test_equal_answers_are_not_asked(tmp_path: Path) -> None:
    texts = {("story", f"p{n}"): f"answer {n}" for n in range(4)}
    one = write_answers(tmp_path / "one.jsonl", texts)
    other = write_answers(tmp_path / "other.jsonl", {**texts, ("story", "p0"): "another"})
    study = new_study(read_systems([str(one), str(other)]), 4, 2, None, 0, 0)
    assert len(study.equal) == 3
    assert [len(rater.items) for rater in study.raters] == [1, 1]
    with pytest.raises(UserError, match="nothing to ask"):
        new_study(read_systems([f"a={one}", f"b={one}"]), 4, 2, None, 0, 0)


def test_criteria_have_defaults_for_stories_and_social_answers(tmp_path: Path) -> None:
    path = tmp_path / "criteria.yaml"
    path.write_text(starting_text(["my_story", "emobench", "math: 1"], {"math: 1": "social"}), encoding="utf-8")
    read = read_criteria(path)
    assert read.of("my_story") == read_criteria(DEFAULTS).tasks["creative_writing"]
    assert read.of("emobench") == read.of("math: 1") == read_criteria(DEFAULTS).tasks["social"]
    assert read.of("unknown") == read.tasks["default"]
    with pytest.raises(UserError, match="there is no such task"):
        starting_text(["a"], {"b": "social"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("welcome: [", "cannot be read as YAML"),
        ("welcome: hi", "expected the keys welcome"),
        ("{welcome: hi, tasks: {}}", "the entry 'default'"),
        ("{welcome: hi, tasks: {default: nothing}}", "the name of an entry"),
        ("{welcome: hi, tasks: {default: {question: 3}}}", "question is 3"),
        ("{welcome: hi, tasks: {default: {question: q, criteria: [{a: b}]}}}", "expected a list of texts"),
        ("{welcome: hi, tasks: {default: {question: q, show: html}}}", "expected markdown or plain"),
    ],
)
def test_bad_criteria_are_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_criteria(tmp_path / "c.yaml")
