"""The judge's rubrics: criteria, replies, and their weighed share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge import Case, Judge, Reply, load_prompts
from maestro_pl.evaluation.judge.prompts import make_prompt
from maestro_pl.evaluation.judge.rubrics import Criterion, listed, parse_rubric, read_criteria

THREE = (Criterion("Is short.", 1.0), Criterion("Is kind.", 2.0), Criterion("Rhymes.", 5.0))
PROMPT = {"mode": "rubric", "prompt": "{answer}\n{criteria}"}


class Scripted:
    """A backend that gives the same reply to all, and keeps what it was asked."""

    samples = False

    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.identity: list[object] = ["scripted"]
        self.asked: list[Any] = []

    def begin(self) -> None:
        """A new batch."""

    def complete(self, asks: Any, on_reply: Any) -> Any:
        self.asked += list(asks)
        replies = [Reply(self.reply, 1, 1) for _ in asks]
        for index, reply in enumerate(replies):
            on_reply(index, reply)
        return replies


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("1: yes\n2: no\n3: yes", 6 / 8),
        ("It is short and cold.\n\n**1.** Yes, three words.\n**2.** No - rude.\n**3.** no", 1 / 8),
        ("Criterion 1: met\nCriterion 2: met\nCriterion 3: not met", 3 / 8),
        ("1 - no\n2) no\n3 = no", 0.0),
        ('Well: {"reason": "a {b}", "1": "yes", "2": "yes", "3": true}', 1.0),
        ("<think>1: no</think>1: yes\n2: yes\n3: no", 3 / 8),
        ("1: yes\n2: no", None),  # one is missing
        ("1: yes\n2: no\n3: yes\n4: yes", None),  # there is no fourth
        ("1: yes\n2: no\n3: yes\n3: no", None),  # which?
        ("1: yes\n2: no\n3: perhaps", None),
        ("yes, no, yes", None),
    ],
)
def test_a_reply_is_the_share_of_the_weights_that_are_met(reply: str, value: float | None) -> None:
    assert parse_rubric(reply, THREE) == value


def test_criteria_are_lists_or_json() -> None:
    assert read_criteria(["Is short.", {"criterion": "Is  kind.", "weight": 2}], "x") == THREE[:2]
    assert read_criteria('["Is short.", {"criterion": "Is kind.", "weight": 2}]', "x") == THREE[:2]
    assert listed(THREE) == "1. Is short.\n2. Is kind.\n3. Rhymes."


@pytest.mark.parametrize(
    "given", [[], "words", {"criterion": "a"}, [1], [""], [{"criterion": "a", "weight": 0}], [{"text": "a"}],
              [{"criterion": "a", "weight": math.nan}], [{"criterion": "a", "weight": True}]],
)  # fmt: skip
def test_bad_criteria_are_sentences(given: Any) -> None:
    with pytest.raises(UserError, match="here"):
        read_criteria(given, "here")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({**PROMPT}, "mode rubric without criteria"),
        ({**PROMPT, "criteria": ["a"], "prompt": "{answer}"}, "must show {criteria}"),
        ({**PROMPT, "criteria": ["a"], "prompt": "{criteria}"}, "neither {answer} nor {response}"),
        ({"prompt": "{answer}", "criteria": ["a"]}, "criteria are of mode: rubric, and the mode is verdict"),
    ],
)
def test_bad_prompts_are_sentences(entry: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make_prompt(entry, "file")


def test_one_call_judges_a_rubric_of_the_file() -> None:
    prompt = make_prompt({**PROMPT, "criteria": ["Is short.", {"criterion": "Is kind.", "weight": 3}]}, "file")
    backend = Scripted("1: no\n2: yes")
    (judgement,), counts = Judge(backend, {"default": prompt})([Case("q", "hello", {"task": "t"})])
    assert judgement.value == 0.75
    assert counts.requests == 1
    assert backend.asked[0].messages[-1]["content"] == "hello\n1. Is short.\n2. Is kind."
    assert backend.asked[0].schema["required"] == ["reason", "1", "2"]


def test_each_prompt_has_its_own_rubric() -> None:
    prompt = make_prompt({**PROMPT, "criteria": "rubric"}, "file")
    rows: list[Any] = [["a", "b"], ["a", {"criterion": "b", "weight": 3}], None, math.nan, []]
    backend = Scripted("1: no\n2: yes")
    judgements, counts = Judge(backend, {"default": prompt})(
        [Case("q", "hello", {"task": "t", "rubric": row}) for row in rows]
    )
    assert [judgement.value for judgement in judgements] == [0.5, 0.75, None, None, None]
    assert not any(judgement.failed for judgement in judgements)
    assert counts.requests == 2  # the same question, but other weights
    with pytest.raises(UserError, match="reads the column 'rubric'"):
        Judge(backend, {"default": prompt})([Case("q", "hello", {"task": "t"})])


def test_a_reply_without_every_verdict_fails_and_is_no_zero() -> None:
    prompt = make_prompt({**PROMPT, "criteria": ["a", "b"]}, "file")
    backend = Scripted("1: no")
    with pytest.warns(UserWarning, match="no valid reply"):
        (judgement,), counts = Judge(backend, {"default": prompt})([Case("q", "hello", {"task": "t"})])
    assert (judgement.value, judgement.failed, counts.malformed) == (None, True, 2)
    assert "Reply with 2 lines" in backend.asked[1].messages[-1]["content"]


def test_the_pages_example_is_a_prompts_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    (tmp_path / "prompts.yaml").write_text(page.split("### Rubrics")[1].split("```yaml\n")[1].split("```")[0])
    prompt = load_prompts(str(tmp_path / "prompts.yaml"))["advice"]
    assert [criterion.weight for criterion in prompt.criteria] == [3.0, 1.0]
    assert yaml.safe_load((tmp_path / "prompts.yaml").read_text())["advice"]["mode"] == "rubric"
