"""The judge: how replies are read and votes decided, and how it gets on with a real server that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge import Ask, Case, Endpoint, Failure, Judge, JudgeCache, LocalJudge, Reply, load_prompts
from maestro_pl.evaluation.judge.core import JudgeCounts, both_orders, decide
from maestro_pl.evaluation.judge.endpoint import read_reply
from maestro_pl.evaluation.judge.parsing import parse_label, parse_score
from maestro_pl.evaluation.judge.prompts import make_prompt, prompt_text
from maestro_pl.run.endpoints import retry_after
from maestro_pl.run.paths import config_path
from tests.support import KEY, Server, fuzz
from tests.support.interrupts import ctrl_c_when

VERDICT_WORDS = ("correct", "yes", "true", "right", "incorrect", "no", "false", "wrong", "not correct")
VERDICT = {"correct": "yes", "yes": "yes", "incorrect": "no", "no": "no", "not correct": "no"}


def endpoint(server: Server, **options: Any) -> Endpoint:
    quick: dict[str, Any] = {"backoff_s": 0.01, "timeout_s": 60.0, "deadline_s": 600.0}
    return Endpoint("m", server.url, **(quick | options))


PROMPTS = {
    "default": make_prompt({"prompt": "Q {prompt} A {answer}", "system": "Grade."}, "test"),
    "score": make_prompt({"prompt": "A {response}", "mode": "score", "scale": [1, 5]}, "test"),
    "duel": make_prompt({"prompt": "A: {answer_a} B: {answer_b}", "mode": "compare"}, "test"),
    "referenced": make_prompt({"prompt": "{answer} or {reference}"}, "test"),
}


def case(response: str, task: str = "t", **values: Any) -> Case:
    baseline = values.pop("baseline", None)
    return Case("question", response, {"task": task, "reference": None, **values}, baseline)


def judge(backend: Any, **options: Any) -> Judge:
    return Judge(backend, PROMPTS, **options)


def values_of(judge: Judge, *cases: Case) -> tuple[list[float | None], JudgeCounts]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judgements, counts = judge(cases)
    return [judgement.value for judgement in judgements], counts


# -- reading replies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 7", 0.7),
        ("**Score:** 7/10", 0.7),
        ("Some words.\n\n**Score: 7.5**", 0.75),
        ("score = 7,5", 0.75),
        ("Rating: 8 out of 10", 0.8),
        ("Score (0-10): 3", 0.3),
        ('{"score": 4}', 0.4),
        ('```json\n{"reason": "a {b} c", "score": "9/10"}\n```', 0.9),
        ("7/10", 0.7),
        ("Good.\n10", 1.0),
        ("<think>Score: 2</think>Score: 8", 0.8),
        ("First I thought Score: 2.\nScore: 6", 0.6),
        ("the score is 0", 0.0),
        ("<think>Score: 2", None),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: 70/100", None),
        ("Score: 70%", None),
        ("Score: 1-10", None),
        ('{"score": NaN}', None),
        ('{"score": true}', None),
        ("I would give it 7 points of praise", None),
        ("", None),
        ("Score: 8\n\nThe expert's story would score 10.", 0.8),
        ("Score: 6\nGrade 2 reading level.", 0.6),
        ("Score: 6\nGrade: 2", 0.6),
        ('{"score": 3, "reference": {"score": 8}}', 0.3),
        ('{"overall_score": 6, "score": 3}', 0.6),
        ('[{"score": 8}, {"score": 3}]', None),
        ("Overall score: 6\n\nIn parts:\nScore: 8 for tone", 0.6),
        ("Score: 3\nScore (reference): 8\nReference score: 8", 0.3),
        ("Score: 5\nThe score is 8 for the expert.", None),
        ("Score: 7\nHm.\nScore: 8", 0.8),
        ("Score: 7\nScore: 8\nHm.", None),
        ("Score:\n8\n\nGrade: 2", 0.8),
        ("A good story. Score: 7", 0.7),
        ("Score: 7 or 8", None),
        ("Score: 8th grade", None),
        ("Score 7/10.", 0.7),
    ],
)
def test_scores(text: str, expected: float | None) -> None:
    assert parse_score(text, 0, 10) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Verdict: correct", "yes"),
        ("**Verdict:** *Incorrect*.", "no"),
        ("It is fine.\nVerdict: **correct**", "yes"),
        ('{"verdict": "incorrect"}', "no"),
        ('{"reason": "x", "verdict": "correct"} ', "yes"),
        ("Correct.", "yes"),
        ("reasons\n\nno", "no"),
        ("Verdict: not correct", "no"),
        ("<think>Verdict: correct</think>\nVerdict: incorrect", "no"),
        ("Verdict: correct\nOn second thought.\nVerdict: incorrect", "no"),
        ("The answer is correct because it agrees.", None),
        ("I cannot call this correct", None),
        ("Verdict: correct or incorrect", None),
        ('{"verdict": null}', None),
        ("[1, 2", None),
        ("", None),
        ("Verdict: correct\nThe reference answer is no.", "yes"),
        ("Verdict: incorrect\n\nThe correct answer is: yes", "no"),
        ("Verdict:\n\nincorrect\n\nThe correct answer is: yes", "no"),
        ("### Verdict\nincorrect\nThe answer is: yes", "no"),
        ("Verdict - incorrect\nAnswer: yes", "no"),
        ('{"verdict": "correct", "details": {"answer": "no"}}', "yes"),
        ('{"verdict": "correct", "details": {"verdict": "no"}}', "yes"),
        ('{"evaluation": {"verdict": "correct"}, "answer": "no"}', None),
        ('{"reference_verdict": "no", "verdict": "correct"}', "yes"),
        ('[{"verdict": "correct"}, {"verdict": "no"}]', None),
        ('{"answer": "no", "correct": "yes"}', "yes"),
        ("Answer: no\nCorrect: yes", "yes"),
        ("Result: correct\nThe reference answer is no.", None),
        ("Verdict: correct ... on reflection Verdict: incorrect", "no"),
        ("Verdict: correct\n(The other grader's verdict: incorrect)", None),
        ("Verdict: correct\nVerdict: incorrect\nThe unit is missing.", None),
        ("Final verdict: correct\nA stricter verdict: incorrect.", "yes"),
        ("Verdict: correct\nThe verdict is based on the number.", "yes"),
        ("Verdict: correct\n\nincorrect", None),
    ],
)
def test_verdicts(text: str, expected: str | None) -> None:
    assert parse_label(text, VERDICT) == expected


def test_comparisons() -> None:
    read = PROMPTS["duel"].parse
    replies = [
        "[[A]]",
        "Verdict: Response B",
        "Winner: tie",
        '{"winner": "a"}',
        "A is better than B",
        "Verdict: A and B",
        "Winner: A\n(The answer is: C)",
    ]
    assert [read(reply) for reply in replies] == ["A", "B", "tie", "A", None, None, "A"]


@pytest.mark.parametrize("part", ["{", '{"a":', "my final ", "score (", "verdict: ", "- "])
def test_a_reply_full_of_one_thing_is_read_quickly(part: str) -> None:
    start = time.process_time()  # a search that looks at every pair of places would take minutes
    assert parse_label(part * 20_000, VERDICT) is None
    assert parse_score(part * 20_000, 0, 10) is None
    assert time.process_time() - start < 10


# -- votes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("votes", "mode", "expected"),
    [
        (["yes", "no", "yes"], "verdict", "yes"),
        (["yes", "yes", None], "verdict", "yes"),
        (["yes", "no", None], "verdict", None),  # a tie
        (["yes", None, None], "verdict", None),  # one of three is no majority
        (["yes", None], "verdict", None),  # nor is half of them
        ([0.2, 0.4, None, None], "score", None),
        (["A", "B", "tie"], "compare", None),
        ([0.2, 0.9, 0.4], "score", 0.4),
        ([0.2, None, 0.4], "score", pytest.approx(0.3)),
        ([None], "score", None),
        ([0.0], "score", 0.0),
    ],
)
def test_votes_are_decided(votes: list[Any], mode: Any, expected: Any) -> None:
    assert decide(votes, mode) == expected


def test_a_comparison_needs_both_orders() -> None:
    assert both_orders("A", "B") == 1
    assert both_orders("B", "A") == 0
    assert both_orders("A", "A") == 0.5  # the judge likes what comes first
    assert both_orders("tie", "tie") == 0.5
    assert both_orders("A", "tie") == 0.5
    assert both_orders("A", None) is None


def test_votes_without_sampling_are_refused(server: Server) -> None:
    with pytest.raises(UserError, match="every vote would be the same"):
        judge(endpoint(server), votes=3)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_the_shipped_prompts_ask_for_what_is_read() -> None:
    prompts = load_prompts("configs/judge/paper.yaml")
    assert set(prompts) == {
        "default", "natural_reasoning", "ss_gen", "webinstruct", "tombench", "general_thoughts", "opus_books", "emobench",
        "gsm8k", "arithmetic", "emotion", "social_story", "translation",
    }  # fmt: skip
    for name, prompt in prompts.items():
        messages = prompt.messages(Case("P?", "<think>t</think><answer>A!</answer>", {"task": name, "reference": "R."}))
        assert messages is not None
        text = messages[-1]["content"]
        assert all(part in text for part in ("P?", "A!", "R."))
        assert "<think>" not in text
        assert prompt.mode == "verdict"
        first, _, second = text.strip().splitlines()[-3:]
        assert (prompt.parse(first), prompt.parse(second)) == ("yes", "no")


def test_prompts_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "gsm8k" in load_prompts("configs/judge/paper.yaml")
    assert load_prompts("paper").keys() == load_prompts("configs/judge/paper.yaml").keys()
    with pytest.raises(
        UserError, match=r"'../judge/paper.yaml' cannot be read .*from the working folder.* shipped one"
    ):
        load_prompts("../judge/paper.yaml")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "a: {prompt: '{answer}', mode: finest}",
            "mode is 'finest', expected one of score, verdict, compare, rubric, best",
        ),
        ("a: {prompt: '{reference}'}", "the judge would not see it"),
        ("a: {prompt: '{answer}', mode: compare}", "must show {answer_a} and {answer_b}"),
        ("a: {prompt: '{answer}', mode: score, scale: [10, 0]}", r"scale is \[10, 0\]"),
        ("a: {prompt: '{answer}', mode: score, scale: [0, .inf]}", "scale is"),
        ("a: {prompt: '{answer', mode: score}", "prompt_template"),
        ("a: {promt: '{answer}'}", "unknown key 'promt'"),
        ("a: {system: x}", "prompt is None"),
        ("a: 3", "3 is no prompt"),
        ("- a", "holds list"),
        ("", "holds NoneType"),
        ("a: [", "is not YAML"),
        ("a: {prompt: '{answer}', positive: [3]}", "positive holds 3"),
        ("a: {prompt: '{answer}', positive: 3}", "positive holds 3"),
        ("a: {prompt: '{answer}', positive: {x: y}}", "positive holds {'x': 'y'}"),
        ("a: {prompt: '{answer}', positive: '...'}", "positive holds '...'"),
        ("a: {prompt: '{answer}', positive: Wrong}", "positive holds 'wrong', which is a negative verdict"),
        ("a: {prompt: '{answer}', positive: no}", "positive holds 'no', which is a negative verdict"),
        (
            "a: {prompt: '{answer}', positive: good, negative: [Good]}",
            "negative holds 'good', which is a positive verdict",
        ),
        ("a: {prompt: '{answer!z}'}", "{answer!z}, and the conversions are !o and !j"),
        ("a: {prompt: '{answer!o}'}", "takes answer apart"),
        ("a: {prompt: '{answer[0]}'}", "takes answer apart"),
        ("a: {prompt: '{answer:.2f}'}", "'.2f' in {answer:.2f} is no format"),
        ("a: {prompt: '{answer} {size:%%}'}", "'%%' in {size:%%} is no format"),
        ("a: {prompt: '{answer}', mode: score, scale: [true, 5]}", r"scale is \[True, 5\]"),
        ("a: {prompt: '{answer}', mode: score, scale: '15'}", "scale is '15'"),
    ],
)
def test_bad_prompts_files(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_prompts(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(str(tmp_path / "none.yaml"))


@fuzz
@given(
    st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.sampled_from(["prompt", "mode", "scale", "positive", "negative", "system"]),
            st.text("{}[]answer.!:0x ", max_size=12)
            | st.sampled_from(["{answer}", "score", "verdict", None, 3, [0, 5]]),
            max_size=4,
        ).map(lambda entry: json.dumps({"a": entry}).encode()),
    )
)
def test_any_prompts_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "prompts.yaml"
    file.write_bytes(content)
    with contextlib.suppress(UserError):
        load_prompts(str(file))


def test_verdict_words_of_ones_own() -> None:
    prompt = make_prompt({"prompt": "{answer}", "positive": ["Richtig", True], "negative": "falsch"}, "test")
    assert [prompt.parse(reply) for reply in ("Verdict: richtig", "Falsch!", "yes")] == ["yes", "no", "yes"]


def test_a_chat_prompt_is_shown_with_its_roles() -> None:
    assert prompt_text([{"role": "user", "content": " hi "}]) == "hi"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert prompt_text(turns) == "system: s\n\nuser: u"


# -- the server -------------------------------------------------------------------------------------------------------


def test_good_answers(server: Server) -> None:
    server.answer = lambda body, _: "Verdict: correct" if "good" in body["messages"][1]["content"] else "Verdict: no"
    values, counts = values_of(judge(endpoint(server), prices=(2.0, 5.0)), case("good"), case("bad"), case("good"))
    assert values == [1.0, 0.0, 1.0]
    assert counts.requests == len(server.bodies) == 2  # equal responses share a request
    assert (counts.tokens_in, counts.tokens_out, counts.judged, counts.failed) == (200, 20, 3, 0)
    assert counts.cost == pytest.approx((200 * 2 + 20 * 5) / 1e6)
    assert server.paths == ["/v1/chat/completions"] * 2
    body = next(body for body in server.bodies if "good" in body["messages"][1]["content"])
    assert body == {
        "model": "m", "temperature": 0.0, "max_tokens": 512,
        "messages": [{"role": "system", "content": "Grade."}, {"role": "user", "content": "Q question A good"}],
    }  # fmt: skip
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_scores_are_mapped_from_their_scale(server: Server) -> None:
    server.answer = lambda body, _: "Score: 4"
    values, counts = values_of(judge(endpoint(server)), case("x", "score"))
    assert values == [0.75]
    assert counts.cost is None
    assert "cost" not in counts.numbers()


def test_options_of_the_body(server: Server) -> None:
    options = {"max_tokens": None, "max_completion_tokens": 7, "top_p": 0.9, "seed": None}
    values_of(judge(endpoint(server, temperature=0.5, options=options)), case("x"))
    sent = {key: value for key, value in server.bodies[0].items() if key != "messages"}
    assert sent == {"model": "m", "temperature": 0.5, "max_completion_tokens": 7, "top_p": 0.9}


def test_the_shipped_options_for_gemini(server: Server) -> None:
    for name in ("ss_gen", "opus_books"):
        cell = yaml.safe_load(config_path(f"paper/{name}.yaml").read_text(encoding="utf-8"))
        assert cell["metrics+"] == "../judge/gemini.yaml"
        given = yaml.safe_load(config_path("judge/gemini.yaml").read_text(encoding="utf-8"))["init_args"]
        server.bodies.clear()
        chosen = {key: given[key] for key in ("temperature", "max_tokens", "options")}
        values, _ = values_of(judge(endpoint(server, **chosen), votes=given["votes"]), case("x"))
        assert values == [1.0]
        assert len(server.bodies) == 3  # without a seed the votes are three requests all the same
        sent = {key: value for key, value in server.bodies[0].items() if key != "messages"}
        assert sent == {"model": "m", "temperature": 0.7, "max_tokens": 2048, "reasoning_effort": "none"}


@pytest.mark.parametrize(
    ("given", "key", "value", "expected"),
    [
        (case("x"), "verdict", {"type": "string", "enum": [*VERDICT_WORDS]}, 1.0),
        (case("x", "score"), "score", {"type": "number", "minimum": 1.0, "maximum": 5.0}, 0.75),
        (case("x", "duel", baseline="y"), "verdict", {"type": "string", "enum": ["A", "B", "tie"]}, 0.5),
    ],
)
def test_structured_replies(server: Server, given: Case, key: str, value: dict[str, Any], expected: float) -> None:
    said = {"verdict": "correct", "score": 4} if given.columns["task"] != "duel" else {"verdict": "A"}
    server.answer = lambda body, _: json.dumps({"reason": "Score: 1. Verdict: no. {", key: said[key]})
    values, counts = values_of(judge(endpoint(server, structured=True)), given)
    assert (values, counts.malformed) == ([expected], 0)
    assert server.bodies[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {
            "name": "reply",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"reason": {"type": "string"}, key: value},
                "required": ["reason", key],
                "additionalProperties": False,
            },
        },
    }
    assert list(server.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]) == ["reason", key]


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_without_schemas_is_asked_without_them(server: Server, status: int) -> None:
    server.message = "response_format is not supported"
    server.answer = lambda body, _: status if "response_format" in body else "Well.\nVerdict: correct"
    made = judge(endpoint(server, structured=True, concurrency=2, retries=0))
    with pytest.warns(UserWarning, match=rf"refuses response_format \(HTTP {status}\)") as caught:
        judgements, counts = made([case(str(i)) for i in range(6)])
    assert len(caught) == 1
    assert [judgement.value for judgement in judgements] == [1.0] * 6
    assert counts.failures.total() == 0  # a refusal of the field is no failure of the question
    refused = sum("response_format" in body for body in server.bodies)
    assert 1 <= refused <= 2
    assert len(server.bodies) == 6 + refused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made([case("later")])
    assert len(server.bodies) == 7 + refused


def test_another_refusal_keeps_the_schema(server: Server) -> None:
    made = judge(endpoint(server, structured=True))
    assert values_of(made, case("x"))[0] == [1.0]
    server.answer = lambda body, number: 400
    values, counts = values_of(made, case("y"))
    assert (values, dict(counts.failures)) == ([None], {"refused": 1})
    server.answer = lambda body, number: "Hm." if number == 2 else "Verdict: correct"
    assert values_of(made, case("z"))[0] == [1.0]  # a server that ignores the field is read as text, and reminded
    assert len(server.bodies) == 4
    assert all("response_format" in body for body in server.bodies)
    asked = endpoint(server, structured=True)
    asked.begin()
    asked.complete([Ask([{"role": "user", "content": "free"}])], lambda index, reply: None)
    assert "response_format" not in server.bodies[-1]  # a question without a schema


@pytest.mark.parametrize(
    ("options", "status", "kind", "structured"),
    [
        ({}, 400, "refused", False),
        ({"options": {"response_format": {"type": "json_object"}}}, 400, "refused", True),  # the user's own stays
        ({"structured": True}, 500, "server", True),
    ],
)
def test_a_word_about_the_field_is_no_reason_to_ask_without_it(
    server: Server, options: dict[str, Any], status: int, kind: str, structured: bool
) -> None:
    made = judge(endpoint(server, retries=1, **options))
    assert values_of(made, case("x"))[0] == [1.0]
    server.answer = lambda body, number: status
    server.message = "response_format"
    assert dict(values_of(made, case("y"))[1].failures) == {kind: 1}
    assert ["response_format" in body for body in server.bodies] == [structured] * len(server.bodies)


def test_structured_replies_are_kept_apart(server: Server) -> None:
    plain, structured = endpoint(server).identity, endpoint(server, structured=True).identity
    assert plain == ["endpoint", server.url, "m", 0.0, 512, {}]
    assert structured == [*plain, "json_schema"]
    with pytest.raises(UserError, match="`structured` writes"):
        endpoint(server, structured=True, options={"response_format": {"type": "json_object"}})


def test_an_empty_column_is_not_applicable_and_a_missing_one_an_error(server: Server) -> None:
    made = judge(endpoint(server))
    values, counts = values_of(made, case("x", "referenced"), case("x", "duel"))
    assert values == [None, None]
    assert counts.failed == len(server.bodies) == 0
    with pytest.raises(UserError, match="reads the column 'reference'"):
        made([Case("p", "r", {"task": "referenced"})])
    only = Judge(endpoint(server), {"a": PROMPTS["score"]})
    with pytest.raises(UserError, match="no prompt for the task 't'"):
        only([case("x")])


def test_votes_each_have_a_seed(server: Server) -> None:
    server.answer = lambda body, _: "Verdict: " + ("no" if body["seed"] == 11 else "yes")
    values, counts = values_of(judge(endpoint(server, temperature=0.7), votes=3, seed=10), case("x"), case("x"))
    assert values == [1.0, 1.0]
    assert counts.requests == 3
    assert sorted(body["seed"] for body in server.bodies) == [10, 11, 12]


def test_comparisons_are_asked_in_both_orders(server: Server) -> None:
    server.answer = lambda body, _: "Verdict: A" if "A: good" in body["messages"][0]["content"] else "Verdict: B"
    made = judge(endpoint(server))
    duels = [case("good", "duel", baseline="base"), case("base", "duel", baseline="good")]
    values, counts = values_of(made, *duels)
    assert values == [1.0, 0.0]
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == ["A: base B: good", "A: good B: base"]
    server.answer = lambda body, _: "Verdict: A"
    assert values_of(made, duels[0])[0] == [0.5]
    server.answer = lambda body, _: "Verdict: A" if "A: good" in body["messages"][0]["content"] else "hm"
    values, counts = values_of(made, duels[0])
    assert values == [None]
    assert (counts.failed, counts.malformed, counts.failures["malformed"]) == (1, 2, 1)


def test_malformed_replies_are_asked_again(server: Server) -> None:
    server.answer = lambda body, number: "Well, it depends." if number == 0 else "Verdict: correct"
    values, counts = values_of(judge(endpoint(server, temperature=1.0)), case("x"))
    assert values == [1.0]
    assert (counts.malformed, counts.requests, counts.tokens_in, counts.failures.total()) == (1, 2, 200, 0)
    assert "Reply with one line" in server.bodies[1]["messages"][-1]["content"]
    assert server.bodies[0]["seed"] != server.bodies[1]["seed"]
    server.answer = lambda body, number: "Hm."
    with pytest.warns(UserWarning, match="1 of 1 questions .malformed"):
        (judgement,), counts = judge(endpoint(server), asks=3)([case("y")])
    assert (judgement.value, judgement.failed) == (None, True)
    assert (counts.malformed, counts.requests) == (3, 3)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (500, "server"),
        (503, "server"),
        (408, "server"),
        (429, "rate_limit"),
        (None, "connection"),
        (b"{not json", "bad_body"),
        (b"", "bad_body"),
        (b"[]", "bad_body"),
        (b'{"choices": []}', "bad_body"),
        (b'{"choices": null}', "bad_body"),
        (b'{"error": "overloaded"}', "bad_body"),
        (b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": "many"}}', "bad_body"),
        (b"\xff\xfe", "bad_body"),
    ],
)
def test_passing_failures_are_tried_again_and_lasting_ones_masked(server: Server, bad: Any, kind: str) -> None:
    server.answer = lambda body, number: bad if number < 2 else "Verdict: no"
    values, counts = values_of(judge(endpoint(server, retries=2)), case("x"))
    assert values == [0.0]
    assert counts.failures.total() == 0
    server.answer = lambda body, number: bad
    values, counts = values_of(judge(endpoint(server, retries=2)), case("x"))
    assert values == [None]
    assert dict(counts.failures) == {kind: 1}
    assert counts.failed == 1
    assert len(server.bodies) == 6


def test_slow_answers_time_out(server: Server) -> None:
    server.answer = lambda body, number: server.hang() if number == 0 else "Verdict: yes"
    assert values_of(judge(endpoint(server, timeout_s=0.3, retries=100)), case("x"))[0] == [1.0]
    assert server.now >= 1  # the first answer was not waited for
    server.answer = lambda body, number: server.hang()
    values, counts = values_of(judge(endpoint(server, timeout_s=0.1, retries=1)), case("x"))
    assert values == [None]
    assert dict(counts.failures) == {"timeout": 1}


def test_retry_after_is_honoured(server: Server) -> None:
    server.answer = lambda body, number: (429, {"Retry-After": "0.5"}) if number == 0 else "Verdict: yes"
    assert values_of(judge(endpoint(server)), case("x"))[0] == [1.0]
    assert server.times[1] - server.times[0] >= 0.5
    # longer than the batch may take: not waited for
    server.answer = lambda body, number: (429, {"Retry-After": "3600"})
    start = time.monotonic()
    values, counts = values_of(judge(endpoint(server)), case("y"))
    assert values == [None]
    assert time.monotonic() - start < 300
    assert dict(counts.failures) == {"rate_limit": 1}


def test_retry_after_as_a_date_and_as_nonsense() -> None:
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({}) is None


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Endpoint("m", "http://127.0.0.1:9/v1", backoff_s=0.01, retries=1)
    with pytest.warns(UserWarning, match="gave no valid reply to 2 of 2 questions .connection"):
        judgements, counts = judge(backend)([case("x"), case("y")])
    assert [judgement.value for judgement in judgements] == [None, None]
    assert dict(counts.failures) == {"connection": 2}


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, r"check the key in \$OPENAI_API_KEY"), (403, "what it may use"), (404, "the model's name 'm'")],
)
def test_a_wrong_key_model_or_address_stops_the_run_at_once(server: Server, status: int, sentence: str) -> None:
    server.answer = lambda body, number: status
    with pytest.raises(UserError, match=sentence) as caught:
        judge(endpoint(server))([case(str(i)) for i in range(20)])
    assert KEY not in str(caught.value)
    assert len(server.bodies) <= 16


def test_a_key_that_is_not_set(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    assert values_of(judge(endpoint(server)), case("x"))[0] == [1.0]  # a server of one's own needs none
    server.answer = lambda body, number: 401
    with pytest.raises(UserError, match=r"check \$OPENAI_API_KEY, which is not set"):
        judge(endpoint(server))([case("x")])
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(UserError, match="no HTTP header can carry"):
        endpoint(server)


def test_used_up_credit_is_no_rate_limit(server: Server) -> None:
    backend = endpoint(server)
    quota = json.dumps({"error": {"message": "no money", "code": "insufficient_quota"}}).encode()

    def respond(handler: Any, answer: Any) -> None:
        handler.send_response(429)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(quota)))
        handler.end_headers()
        handler.wfile.write(quota)

    server.respond = respond  # type: ignore[method-assign]
    with pytest.raises(UserError, match="credit"):
        judge(backend)([case("x")])
    assert len(server.bodies) == 1


def test_a_run_that_has_had_an_answer_survives_a_401(server: Server) -> None:
    made = judge(endpoint(server))
    assert values_of(made, case("x"))[0] == [1.0]
    server.answer = lambda body, number: 401
    with pytest.warns(UserWarning, match="refused: HTTP 401") as caught:
        (judgement,), counts = made([case("y")])
    assert judgement.value is None
    assert dict(counts.failures) == {"refused": 1}
    assert len(server.bodies) == 2  # not tried again
    assert all(KEY not in str(warning.message) for warning in caught)
    assert "***" in str(caught[0].message)
    with warnings.catch_warnings():  # the same kind is said once
        warnings.simplefilter("error")
        made([case("z")])


def test_a_refused_first_batch_is_an_error_and_one_refused_response_is_not(server: Server) -> None:
    server.answer = lambda body, number: 400 if "long" in body["messages"][1]["content"] else "Verdict: yes"
    values, counts = values_of(judge(endpoint(server, concurrency=1)), case("long"), case("x"))
    assert values == [None, 1.0]
    assert dict(counts.failures) == {"refused": 1}
    with pytest.raises(UserError, match=r"refused the first 1 request.*HTTP 400"):
        judge(endpoint(server))([case("long")])


def test_never_more_requests_at_once_than_allowed(server: Server) -> None:
    three = threading.Barrier(3)

    def answer(body: Any, number: int) -> str:
        three.wait(60)
        return "Verdict: yes"

    server.answer = answer
    values, _ = values_of(judge(endpoint(server, concurrency=3)), *(case(str(i)) for i in range(12)))
    assert values == [1.0] * 12
    assert server.most == 3


def test_a_dead_server_is_given_up_and_tried_again_in_the_next_batch(server: Server) -> None:
    server.answer = lambda body, number: 500
    made = judge(endpoint(server, concurrency=2, give_up_after=4, retries=100, backoff_s=0.001))
    values, counts = values_of(made, *(case(str(i)) for i in range(30)))
    assert values == [None] * 30
    assert len(server.bodies) <= 5
    assert counts.failures["given_up"] >= 28
    values_of(made, *(case(str(i)) for i in range(30)))
    assert len(server.bodies) <= 5 + 4  # sooner than the first time
    server.answer = lambda body, number: "Verdict: yes"
    values, _ = values_of(made, *(case(str(i)) for i in range(30)))
    assert values == [1.0] * 30


def test_a_batch_ends_at_its_deadline(server: Server) -> None:
    server.answer = lambda body, number: "Verdict: yes" if number < 2 else server.hang()
    start = time.monotonic()
    backend = endpoint(server, concurrency=1, deadline_s=3.0)
    values, counts = values_of(judge(backend), *(case(str(i)) for i in range(30)))
    assert time.monotonic() - start < 60  # one request may take as long
    assert 1 <= values.count(1.0) <= 2
    assert counts.failures["deadline"] >= 27
    assert counts.judged + counts.failed == 30


def test_inside_a_running_event_loop(server: Server) -> None:
    async def notebook() -> list[float | None]:
        return values_of(judge(endpoint(server)), case("x"))[0]

    assert asyncio.run(notebook()) == [1.0]


def test_bodies_of_chat_completions() -> None:
    def read(**message: Any) -> Any:
        return read_reply(json.dumps({"choices": [{"message": message}]}).encode())

    assert read(content="x") == Reply("x", 0, 0)
    assert read(content=[{"type": "text", "text": "a"}, {"text": "b"}]) == Reply("ab", 0, 0)
    assert read(content=None) == read() == Reply("", 0, 0)
    assert isinstance(read_reply(b'{"choices": [{"message": null}]}'), Failure)
    assert isinstance(read_reply(b"[" * 100_000), Failure)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("localhost:8000", "expected an address such as"),
        ("ftp://x/v1", "expected an address such as"),
        ("http://x:port/v1", "is no address"),
        ("", "expected an address such as"),
    ],
)
def test_bad_addresses(url: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Endpoint("m", url)
    with pytest.raises(UserError, match="user name or password") as caught:
        Endpoint("m", "https://me:hunter2@example.org/v1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("options", [{"model": "x"}, {"stream": True}, {"messages": []}, {"stop": {1, 2}}])
def test_options_that_are_not_the_users(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="options"):
        Endpoint("m", options=options)


def test_an_interrupt_cancels_what_is_under_way(server: Server) -> None:
    server.answer = lambda body, number: server.hang()
    with ctrl_c_when(lambda: server.now), pytest.raises(KeyboardInterrupt):
        judge(endpoint(server))([case("x")])
    assert server.now == 1  # its answer was not waited for
    for thread in [thread for thread in threading.enumerate() if thread.name == "judge"]:
        thread.join(timeout=5)  # it has nothing left to do
        assert not thread.is_alive()


def test_without_the_openai_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[judge\]'"):
        Endpoint("m", "http://localhost/v1")


def test_the_key_stands_nowhere(server: Server) -> None:
    backend = endpoint(server)
    assert KEY not in repr(backend)
    assert KEY not in json.dumps(backend.identity)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_cached_reply_makes_no_request(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "deep/judge.sqlite")
    first = judge(endpoint(server, temperature=0.5), votes=3, cache=JudgeCache(path), prices=(1, 1))
    assert values_of(first, case("x"))[0] == [1.0]
    again = judge(endpoint(server, temperature=0.5), votes=3, cache=JudgeCache(path), prices=(1, 1))
    values, counts = values_of(again, case("x"))
    assert values == [1.0]
    assert (counts.cached, counts.requests, counts.tokens_in, counts.cost) == (3, 0, 0, 0)
    assert len(server.bodies) == 3
    values_of(judge(endpoint(server, temperature=0.6), votes=3, cache=JudgeCache(path)), case("x"))
    assert len(server.bodies) == 6  # another temperature is another question
    values_of(judge(endpoint(server, temperature=0.5), votes=3, seed=3, cache=JudgeCache(path)), case("x"))
    assert len(server.bodies) == 9
    assert KEY.encode() not in Path(path).read_bytes()


def test_failures_and_malformed_replies_are_not_cached(server: Server, tmp_path: Path) -> None:
    made = judge(endpoint(server, retries=0), asks=1, cache=JudgeCache(str(tmp_path / "c")))
    server.answer = lambda body, number: ["hm", 500, "Verdict: no"][number]
    assert [values_of(made, case("x"))[0] for _ in range(4)] == [[None], [None], [0.0], [0.0]]
    assert len(server.bodies) == 3


def test_a_file_that_is_no_cache(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("my notes " * 500)
    with pytest.raises(UserError, match=r"cannot be used .file is not a database"):
        JudgeCache(str(file))
    assert file.read_text().startswith("my notes")
    with pytest.raises(UserError, match="cannot be used"):
        JudgeCache(str(tmp_path))


def test_a_cache_that_breaks_during_the_run_is_left_alone(tmp_path: Path) -> None:
    cache = JudgeCache(str(tmp_path / "c"))
    cache.put("k", "r")
    cache.put("k", "other")
    assert cache.get("k") == "r"
    cache.put("s", "\ud800")  # no text that can be stored
    assert cache.get("s") is None
    other = sqlite3.connect(tmp_path / "c")
    other.execute("DROP TABLE judge_replies")
    other.commit()
    with pytest.warns(UserWarning, match="the run goes on without it"):
        assert cache.get("k") is None
    cache.put("k", "r")
    assert cache.get("k") is None


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_several_processes_share_a_cache_and_a_killed_one_loses_nothing(tmp_path: Path) -> None:
    cache = JudgeCache(str(tmp_path / "c"))
    children = []
    for name in "ab":
        child = os.fork()
        if not child:
            for i in range(20):
                cache.put(f"{name}-{i}", "reply")
            os.kill(os.getpid(), signal.SIGKILL)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [signal.SIGKILL] * 2
    assert all(cache.get(f"{name}-{i}") == "reply" for name in "ab" for i in range(20))


# -- a model on this machine ------------------------------------------------------------------------------------------


def test_the_sandbox_says_nothing_that_can_be_read() -> None:
    made = judge(LocalJudge("sandbox", max_tokens=4), asks=2)
    values, counts = values_of(made, case("x"), case("y"), case("x"))
    assert values == [None] * 3
    assert (counts.malformed, counts.requests, dict(counts.failures)) == (4, 4, {"malformed": 2})
    assert counts.tokens_in > 0


def test_a_local_judge_replies_in_a_batch_as_it_does_alone(tiny_qwen3: Path) -> None:
    local = LocalJudge(str(tiny_qwen3), max_tokens=8, batch_size=3)
    asks = [Ask([{"role": "user", "content": text}]) for text in ("a", "something longer", "b c", "?", "and one more")]
    seen: dict[int, Reply] = {}
    together = local.complete(asks, seen.__setitem__)
    alone = [local.complete([ask], lambda index, reply: None)[0] for ask in asks]
    assert together == alone == [seen[i] for i in range(5)]
    assert all(isinstance(reply, Reply) and 1 <= reply.tokens_out <= 8 for reply in together)


def test_a_local_judge_that_names_a_verdict(tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalJudge(str(tiny_qwen3), max_tokens=8)
    monkeypatch.setattr(local, "_generate", lambda rows: [Reply("Verdict: correct", len(row), 3) for row in rows])
    values, counts = values_of(judge(local), case("x"), case("y"))
    assert values == [1.0, 1.0]
    assert counts.tokens_out == 6


def test_a_question_too_long_for_a_local_judge(tiny_qwen3: Path) -> None:
    values, counts = values_of(judge(LocalJudge(str(tiny_qwen3), max_tokens=100), asks=1), case("x" * 300), case("y"))
    assert values == [None, None]
    assert dict(counts.failures) == {"too_long": 1, "malformed": 1}


def test_a_local_judge_without_a_system_turn_or_a_template(tiny_qwen3: Path) -> None:
    local = LocalJudge(str(tiny_qwen3))
    messages = [{"role": "system", "content": "Grade."}, {"role": "user", "content": "This."}]
    local.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    assert local.tokenizer.decode(local._encode(messages)) == "Grade.\n\nThis."
    local.tokenizer.chat_template = None
    assert local.tokenizer.decode(local._encode(messages)) == "Grade.\n\nThis.\n\n"


def test_a_local_judge_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The judge: No tokenizer could be loaded"):
        LocalJudge(str(tmp_path))
    with pytest.raises(UserError, match="every vote would be the same"):
        judge(LocalJudge("sandbox"), votes=3)
