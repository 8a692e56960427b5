"""The pure scoring functions against values worked out by hand."""

import math
import re

import numpy as np
import pytest
import torch

from maestro_pl.errors import UserError
from maestro_pl.rewards.contains import contains_score
from maestro_pl.rewards.entropy import response_entropy
from maestro_pl.rewards.exact_match import (
    accepted_references,
    answers_equal,
    exact_match_score,
    extract_answer,
    normalize_answer,
)
from maestro_pl.rewards.format import ParsedResponse, format_score, parse_response
from maestro_pl.rewards.length import length_penalty, nover_efficiency
from maestro_pl.rewards.perplexity import nover_log_perplexity, nover_perplexity, reasoning_of, reference_context
from maestro_pl.rewards.scores import excerpt, read_scores

GOOD = "<think>two and two</think><answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (GOOD, 1),
        (f"  {GOOD}\n", 1),
        ("<think>a\nb</think>\n\n<answer>4\n</answer>", 1),
        ("<think></think><answer></answer>", 1),
        ("", 0),
        ("4", 0),
        (f"So: {GOOD}", 0),
        (f"{GOOD} Done.", 0),
        ("<think>a</think> then <answer>4</answer>", 0),
        ("<answer>4</answer><think>a</think>", 0),
        ("<think>a</think><answer>4", 0),
        ("<think>a<answer>4</answer></think>", 0),
        ("<think>a</think><think>b</think><answer>4</answer>", 0),
        ("<think>a</think><answer>4</answer><answer>5</answer>", 0),
        ("<think>a</think><answer><think>4</answer>", 0),
        ("<Think>a</Think><answer>4</answer>", 0),
    ],
)
def test_format_is_one_think_block_and_then_one_answer_block(text: str, score: float) -> None:
    assert format_score(text) == score


def test_format_options() -> None:
    assert format_score("<why>a</why><say>4</say>", think_tag="why", answer_tag="say") == 1
    assert format_score(GOOD, think_tag="why") == 0
    assert format_score("a</think><answer>4</answer>") == 0
    assert format_score("a</think><answer>4</answer>", think_in_prompt=True) == 1
    assert format_score(GOOD, think_in_prompt=True) == 0  # the tag would stand twice
    assert format_score("<think></think><answer>4</answer>", allow_empty=False) == 0
    assert format_score("<think>a</think><answer> </answer>", allow_empty=False) == 0
    assert format_score(GOOD, allow_empty=False) == 1
    assert format_score("<t.>a</t.><a+>4</a+>", think_tag="t.", answer_tag="a+") == 1  # no regular expressions


def test_parse_finds_a_block_in_a_response_without_the_format() -> None:
    assert parse_response(GOOD) == ParsedResponse("two and two", "4", True)
    assert parse_response("Well, <answer> 4 </answer>.") == ParsedResponse(None, "4", False)
    assert parse_response("<think>a</think> 4") == ParsedResponse("a", None, False)
    assert parse_response("<answer>4</answer><answer>5</answer>") == ParsedResponse(None, None, False)
    assert parse_response("</think>a<think>") == ParsedResponse(None, None, False)
    assert parse_response("a</think>4", think_in_prompt=True) == ParsedResponse("a", None, False)


@pytest.mark.parametrize(
    ("length", "minimum", "maximum", "expected"),
    [
        (10, 10, 20, 0.0),
        (20, 10, 20, 0.0),
        (25, 10, 20, -0.25),
        (40, 10, 20, -1.0),
        (400, 10, 20, -1.0),
        (5, 10, 20, -0.5),
        (0, 10, 20, -1.0),
        (1, 0, 0, -1.0),  # max(max, 1): no division by zero
        (1000, 10, None, 0.0),
        (1, 2, None, -0.5),
    ],
)
def test_length_penalty(length: int, minimum: int, maximum: int | None, expected: float) -> None:
    assert length_penalty(length, minimum=minimum, maximum=maximum) == expected


def test_length_penalty_floor() -> None:
    assert length_penalty(80, maximum=20, floor=-2.5) == -2.5
    assert length_penalty(60, maximum=20, floor=-2.5) == -2.0


def test_efficiency_is_the_share_of_valid_others_beaten_on_both() -> None:
    # 0 beats 1 and 2 (shorter, lower); 1 beats nobody; 2 is longer than 1 but lower; 3 is invalid and never compared.
    lengths, perplexities = [10, 20, 30, 1], [1.5, 3.0, 2.0, 1.0]
    assert nover_efficiency(lengths, perplexities, [True, True, True, False]) == [1.0, 0.0, 0.0, 0.0]
    assert nover_efficiency(lengths, perplexities, [True] * 4) == [2 / 3, 0.0, 0.0, 1.0]
    assert nover_efficiency([10, 10], [1.0, 2.0], [True, True]) == [0.0, 0.0]  # equally long: not shorter
    assert nover_efficiency([10, 20], [2.0, 2.0], [True, True]) == [0.0, 0.0]  # equally likely: not lower
    assert nover_efficiency([10, 20], [1.0, 2.0], [True, False]) == [0.0, 0.0]  # nobody to beat


def test_response_entropy_by_row() -> None:
    entropies_T = torch.tensor([1.0, 3.0, 0.5, 0.25, 0.0, 0.75], dtype=torch.float64)
    lengths_B = torch.tensor([2, 0, 1, 3])
    mean_B = response_entropy(entropies_T, lengths_B)
    sum_B = response_entropy(entropies_T, lengths_B, "sum")
    assert mean_B[[0, 2, 3]].tolist() == pytest.approx([2.0, 0.5, 1 / 3])
    assert sum_B[[0, 2, 3]].tolist() == [4.0, 0.5, 1.0]
    assert torch.isnan(mean_B[1])
    assert torch.isnan(sum_B[1])
    assert mean_B.dtype == torch.float32


@pytest.mark.parametrize(
    ("logps", "len_think", "expected"),
    [
        ([-2.0, -4.0], 0, math.exp(3.0)),  # no reasoning: no correction
        ([-2.0, -4.0], 1, math.exp(3.0)),  # 1 + log10 1 = 1
        ([-2.0, -4.0], 10, math.exp(1.5)),  # 1 + log10 10 = 2
        ([-2.0, -4.0], 100, math.exp(1.0)),  # 1 + log10 100 = 3
        ([-math.log(8.0)], 100, 2.0),  # the cube root of 8
        ([0.0, 0.0], 5, 1.0),
        ([-1e4], 0, math.inf),
    ],
)
def test_nover_perplexity(logps: list[float], len_think: int, expected: float) -> None:
    assert nover_perplexity(logps, len(logps), len_think) == pytest.approx(expected)
    if math.isfinite(expected):
        assert nover_log_perplexity(logps, len(logps), len_think) == pytest.approx(math.log(expected))


def test_reasoning_of_broken_responses() -> None:
    assert reasoning_of(GOOD, invalid="none") == "two and two"
    assert reasoning_of("<think>two and", invalid="none") is None
    assert reasoning_of("<think>two and") == "two and"
    assert reasoning_of("<answer>4</answer> as 2+2") == "4  as 2+2"
    assert reasoning_of("a</think><answer>4</answer>", think_in_prompt=True) == "a"


def test_reference_context_leaves_other_braces_alone() -> None:
    assert reference_context("a {b} \\1") == "<think>a {b} \\1</think><answer>"
    assert reference_context("x", "{{think}} {y}") == "{x} {y}"


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  New\n York. ", "new york"),
        ("**$1,200.**", "1200"),
        ("(B)", "b"),
        ("`'Yes!'`", "yes"),
        ("#### 72", "72"),
        (".5", ".5"),
        ("5!", "5!"),  # a factorial
        ("Stop!", "stop"),
        ("\u22123", "-3"),
        ("It\u2019s", "it's"),
        ("[1,2)", "[1,2)"),  # an interval keeps its brackets
        ("(1, 2)", "(1, 2)"),
        ("1,200,300.5", "1200300.5"),
        ("1,20", "1,20"),
        ("50%", "50%"),
        ("the cat", "the cat"),
        ("...", ""),
        ("$x$", "x"),
    ],
)
def test_normalize_answer(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_articles_are_dropped_on_request_and_never_alone() -> None:
    assert normalize_answer("The cat and an owl", drop_articles=True) == "cat and owl"
    assert normalize_answer("A", drop_articles=True) == "a"
    assert answers_equal("The cat", "cat", drop_articles=True)
    assert not answers_equal("The cat", "cat")


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("1.0", "1", True),
        ("$1,000.00", "1000", True),
        ("-0.50", "-.5", True),
        ("1e3", "1000", True),
        ("+7", "7", True),
        ("0.1", "0.10000000000000001", False),
        ("10", "1", False),
        ("50%", "50", False),
        ("nan", "NaN", True),  # the same word
        ("1/2", "0.5", False),
        ("Paris", "paris.", True),
        ("1e999999", "1e999998", False),
    ],
)
def test_answers_equal(answer: str, reference: str, equal: bool) -> None:
    assert answers_equal(answer, reference) is equal


def test_extract_answer_falls_back_step_by_step() -> None:
    number = re.compile(r"-?\d+")
    assert extract_answer(GOOD) == "4"
    assert extract_answer("<think>5 or 6</think>\nIt is 7.") == "It is 7."
    assert extract_answer("It is 7.") == "It is 7."
    assert extract_answer("3, 4 and 5 make 12 in all", pattern=number) == "12"
    assert extract_answer("<think>9</think><answer>x = 8</answer>", pattern=number) == "8"
    assert extract_answer("<answer>none</answer>", pattern=number) == "none"
    assert extract_answer("A: 4 B: 5 ", pattern=re.compile(r"[AB]: (\d)")) == "5"


def test_exact_match_accepts_any_of_the_references() -> None:
    assert exact_match_score(GOOD, ["four", "4.0"]) == 1
    assert exact_match_score(GOOD, ["5"]) == 0
    assert exact_match_score("<a>4</a>", ["4"], answer_tag="a") == 1


def test_accepted_references() -> None:
    assert accepted_references("4") == ["4"]
    assert accepted_references(4) == ["4"]
    assert accepted_references(["a", 2, None]) == ["a", "2"]
    assert accepted_references(np.array(["a", "b"])) == ["a", "b"]
    assert accepted_references(None) == accepted_references(" ") == accepted_references(math.nan) == []
    with pytest.raises(UserError, match=r"\{'a': 1\} \(dict\) is no reference"):
        accepted_references({"a": 1})


def test_contains() -> None:
    text = "Plants make\n sugar from Light."
    assert contains_score(text, ["light", "water"]) == 1
    assert contains_score(text, ["light", "water"], require="all") == 0
    assert contains_score(text, ["make sugar", "light"], require="all") == 1
    assert contains_score(text, ["light"], ignore_case=False) == 0


@pytest.mark.parametrize(
    "raw",
    [
        [1, None, True],
        (1.0, float("nan"), np.float64(1)),
        np.array([1, np.nan, 1]),
        np.array([1, None, True], dtype=object),
        torch.tensor([1.0, float("nan"), 1.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor([1])],
    ],
)
def test_scores_of_every_kind_are_read(raw: object) -> None:
    one, missing, other = read_scores(raw, 3, "Reward 'x'", lambda i: f"response {i}")
    assert (one, other) == (1.0, 1.0)
    assert math.isnan(missing)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ([1.0], r"Reward 'x' returned 1 score\(s\) for 2 responses: return one for each"),
        (0.5, r"returned 0.5 \(float\) for 2 responses: return a list"),
        ("ab", r"returned 'ab' \(str\) for 2 responses: return a list"),
        ({0: 1, 1: 1}, r"\(dict\) for 2 responses: return a list"),
        ([1.0, "high"], r"returned 'high' \(str\) for response 1: a score is a number"),
        ([1.0, "1.0"], r"returned '1.0' \(str\) for response 1"),
        ([[1.0], 1.0], r"returned \[1.0\] \(list\) for response 0"),
        ([1.0, 2j], r"returned 2j \(complex\) for response 1"),
        ([1.0, float("-inf")], r"returned -inf \(float\) for response 1: a score must be finite"),
        ([1.0, 1e39], r"returned 1e\+39 \(float\) for response 1: a score must be finite in float32"),
        ([10**400, 1.0], "for response 0: a score must be finite"),
        (torch.ones(2, 2), r"returned \[1.0, 1.0\] \(list\) for response 0"),
        (torch.tensor(1.0), "returned 1.0"),
    ],
)
def test_scores_that_cannot_be_used_name_the_value(raw: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_scores(raw, 2, "Reward 'x'", lambda i: f"response {i}")


def test_excerpt_keeps_both_ends_on_one_line() -> None:
    assert excerpt("a\n b") == "'a b'"
    assert excerpt("x" * 50 + "y" * 50, width=9) == "'xxx...yyy'"


@pytest.mark.parametrize(
    "answer",
    [
        "72",
        r"\boxed{72}",
        "$72$",
        r"$\boxed{72}$",
        r"\(72\)",
        r"\[ 72 \]",
        r"\$72",
        "\uff17\uff12",
        "72\u200b",
        r"\text{72}.",
    ],
)
def test_exact_match_reads_through_latex_and_typography(answer: str) -> None:
    assert exact_match_score(f"<think>x</think><answer>{answer}</answer>", ["72"]) == 1


@pytest.mark.parametrize("answer", [r"\boxed{73}", "$72$ and $73$", r"\frac{72}{1}", "72%", "7 2", r"\boxed{}"])
def test_exact_match_is_still_exact(answer: str) -> None:
    assert exact_match_score(f"<think>x</think><answer>{answer}</answer>", ["72"]) == 0


def test_exact_match_composes_accents() -> None:
    assert exact_match_score("<think>x</think><answer>caf\u0065\u0301</answer>", ["caf\u00e9"]) == 1
