"""Multiple choice: which option an answer picks, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from callbacks.rewards.choice import ChoiceReward
from maestro_pl.errors import UserError
from maestro_pl.rewards.choice import Question, choice_accuracies, choice_score, chosen_option, read_questions
from tests.support import given, make_rollout, run

OPTIONS = ["Delight", "Anger", "Great delight", "He likes A and B", "Vitamin C", "Pride"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("c", "C"),
        ("(C)", "C"),
        ("(c)", "C"),
        ("[B]", "B"),
        ("C.", "C"),
        ("**C**", "C"),
        ("**C.**", "C"),
        ("C: Great delight", "C"),
        ("C. great  delight.", "C"),
        ("C) Great delight", "C"),
        ("Answer: C.", "C"),
        ("**Answer:** C", "C"),
        ("The answer is C", "C"),
        ("The correct answer is (C) because he wins.", "C"),
        ("Final answer: \\boxed{C}", "C"),
        ("Option C", "C"),
        ("I choose option B.", "B"),
        ("The answer is (A), since B and C are wrong", "A"),
        ("The answer is B because (A) and (C) are wrong.", "B"),
        ("Since A is wrong, the answer is C.", "C"),
        ("As he wins, (C)", "C"),
        ("C because he wins", "C"),
        ("B - he is angry", "B"),
        ("B he is cross", "B"),
        ("A", "A"),
        ("A.", "A"),
        ("A: Delight", "A"),
        ("great delight", "C"),
        ("He feels great delight.", "C"),
        ("D: He likes A and B", "D"),
        ("E. Vitamin C", "E"),
        ("\uff08\uff23\uff09", "C"),
        ("\uff23\uff1aGreat delight", "C"),
        ("\u7b54\u6848\u662fC", "C"),
        ("Anger is unlikely.\nThe answer is C.", "C"),
        ("It is not Anger, it is Pride", "F"),
        ("not B. Rather C.", "C"),
        ("b)", "B"),
        ("the answer is b.", "B"),
        ("option b", "B"),
        ("The answer is:\n\nB", "B"),
        ("A is correct.", "A"),
        ("Not B: Anger, but F: Pride", "F"),
        ("B: Anger\n\nExplanation: Option F is wrong.", "B"),
        ("A) Delight\nB) Anger\nC) Great delight\nD) He likes A and B\nE) Vitamin C\nF) Pride\n\n**Answer: B**", "B"),
        ("A) Delight\nB) Anger\nC) Great delight\nD) He likes A and B\nE) Vitamin C\nF) Pride", None),
        # no choice, or two
        ("", None),
        ("...", None),
        ("A bird flew away", None),
        ("I flew away", None),
        ("A bird flew. I saw it.", None),
        ("G", None),
        ("A: Anger", None),
        ("C: Delight", None),
        ("A or B", None),
        ("(A) (B)", None),
        ("A, B", None),
        ("The answer is A. The answer is B.", None),
        ("Answer: A\nAnswer: B", None),
        ("Delight and Anger", None),
        ("Delightful Angers", None),
        ("It is not Anger", None),
        ("J.B. came", None),
        ("\U0001f600", None),
    ],
)
def test_chosen_option(answer: str, letter: str | None) -> None:
    place = chosen_option(answer, OPTIONS)
    assert (None if place is None else "ABCDEF"[place]) == letter


def test_chinese_options_need_no_spaces() -> None:
    options = ["\u9ad8\u5174", "\u751f\u6c14", "\u975e\u5e38\u9ad8\u5174"]
    assert chosen_option("\u4ed6\u611f\u5230\u751f\u6c14\u3002", options) == 1
    assert chosen_option("\u4ed6\u975e\u5e38\u9ad8\u5174", options) == 2
    assert chosen_option("C\uff1a\u975e\u5e38\u9ad8\u5174", options) == 2
    assert chosen_option("\u9009A", options) == 0


TWO = [Question("Emotion", ("Anger", "Love"), 1), Question("Cause", ("rain", "sun", "a gift, wrapped"), 2)]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Emotion: B: Love\nCause: C", (1, 1)),
        ("Emotion: B: Love, Cause: C: a gift, wrapped", (1, 1)),
        ("emotion - love; CAUSE = (c)", (1, 1)),
        ("**Emotion:** B\n**Cause:** A", (1, 0)),
        ('{"Emotion": "B", "Cause": "C"}', (1, 1)),
        ("The emotion is Love and the cause is C.", (1, 1)),
        ("Cause: C\nEmotion: B", (1, 1)),
        ("B, C", (1, 1)),
        ("B\nC", (1, 1)),
        ("B and A", (1, 0)),
        ("1. B 2. C", (1, 1)),
        ("1) B\n2) C", (1, 1)),
        ("(1) B, (2) A", (1, 0)),
        ("1. B: Love\n2. C: a gift, wrapped", (1, 1)),
        ("BC", (1, 1)),
        ("BA.", (1, 0)),
        ("BCA", (0, 0)),
        ("The emotion that Joe feels is B, and its cause is C: a gift, wrapped.", (1, 1)),
        ("Joe feels love because of the rain.", (1, 0)),
        ("### Emotion\nB: Love\n\n### Cause\nC", (1, 1)),
        ("Emotion (B), Cause (A)", (1, 0)),
        ("The answer is B for the emotion and C for the cause.", (1, 1)),
        ("Emotion:\nA) Anger\nB) Love\nCause:\nA) rain\nB) sun\nC) a gift, wrapped\n\nEmotion: B\nCause: C", (1, 1)),
        ("Emotion: B", (1, 0)),
        ("Emotion: A\nEmotion: B\nCause: C", (0, 1)),
        ("Emotion: A: Love\nCause: C: rain", (0, 0)),
        ("B", (0, 0)),
        ("", (0, 0)),
    ],
)
def test_several_questions(answer: str, right: tuple[int, int]) -> None:
    accuracies = choice_accuracies(f"<think>Cause: B</think><answer>{answer}</answer>", TWO)
    assert tuple(accuracies.values()) == right


def test_score_is_all_or_the_share() -> None:
    assert choice_score([1.0, 0.0]) == 0
    assert choice_score([1.0, 1.0]) == 1
    assert choice_score([1.0, 0.0], share=True) == 0.5


def test_questions_of_a_row() -> None:
    assert read_questions(["x", "y"], "b") == [Question("", ("x", "y"), 1)]
    assert read_questions(np.array(["x", "y"]), "(A)") == [Question("", ("x", "y"), 0)]
    assert read_questions(["A: x", "B: y"], "Y.") == [Question("", ("x", "y"), 1)]
    assert read_questions({"e": ["x", "y"], "f": None}, {"e": "A", "f": None}) == [Question("e", ("x", "y"), 0)]
    options = ["2", "4", "6", "8"]
    for label in (2, 2.0, "C", "6"):  # an integer is an index, as in MMLU; so is a text of digits that is no option's
        assert read_questions(options, label) == [Question("", tuple(options), 2)]
    assert read_questions(["0", "1"], "1") == [Question("", ("0", "1"), 1)]  # the text and the index agree
    assert read_questions(["w", "x", "y"], "2") == [Question("", ("w", "x", "y"), 2)]
    assert read_questions(["x", "y", float("nan"), None], "B") == [Question("", ("x", "y"), 1)]
    for choices, label in ((None, "A"), (["x", "y"], None), (["x", "y"], float("nan")), ([], "A"), (["x", "y"], "")):
        assert read_questions(choices, label) == []


@pytest.mark.parametrize(
    ("choices", "label", "sentence"),
    [
        (["x", "y"], "C", "label is 'C', expected a letter from A to B or the text of an option"),
        (["x", "y"], 2, "label is 2: a number is an index, from 0 to 1 here"),
        (["x", "y"], -1, "label is -1: a number is an index"),
        (["x", "y"], True, "label is True, expected a letter"),
        (["x", "y"], 0.5, "label is 0.5, expected a letter"),
        (["x", "y"], "2", "label is '2', expected a letter"),
        (["2", "4", "6", "8"], "2", "label is '2', which is the text of option A and the index of option C: write the"),
        (["2", "4", "6", "8"], 4, "label is 4: a number is an index, from 0 to 3 here"),
        (["x", None, "y"], "A", "an option among the others is empty"),
        (["x", float("nan")], "A", "fewer than two are left"),
        ("x, y", "A", "choices is 'x, y', expected a list of 2 to 26"),
        (["x"], "A", "expected a list of 2 to 26"),
        ({"e": ["x", "y"]}, "A", "choices is a dict and label a str"),
        ({"e": ["x", "y"]}, {"f": "A"}, r"questions \['e'\] and label has \['f'\]"),
        ({"e": ["x", "y"]}, {"e": "Q"}, "label of the question 'e' is 'Q'"),
    ],
)
def test_rows_that_do_not_fit(choices: object, label: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_questions(choices, label)


def test_the_callback_scores_and_names_the_questions() -> None:
    both = {
        "choices": [{"Emotion": ["x", "y"], "Main cause": ["u", "v"]}],
        "label": [{"Emotion": "A", "Main cause": "B"}],
    }
    responses = ["Emotion: A\nMain cause: B", "Emotion: A\nMain cause: A"]
    rollout = make_rollout(responses, group_size=2, **both)
    scores = run(ChoiceReward(), rollout)
    assert scores.values_B.tolist() == [1, 0]
    assert {key: values.tolist() for key, values in scores.metrics.items()} == {"emotion": [1, 1], "main_cause": [1, 0]}
    assert given(ChoiceReward(partial="mean"), rollout) == [1, 0.5]
    assert ChoiceReward().spec.pass_at_k
    assert not ChoiceReward(partial="mean").spec.pass_at_k


def test_the_callback_on_rows_with_and_without_choices() -> None:
    columns = {"choices": [["x", "y"], None, ["x", "y"]], "label": ["B", None, "A"]}
    texts = ["<think>A</think><answer>B: y</answer>", "B", "word " * 2000]
    assert given(ChoiceReward(role="metric"), make_rollout(texts, **columns)) == [1, None, 0]
    with pytest.raises(UserError, match=r"no column 'choices'"):
        run(ChoiceReward(), make_rollout(["B"]))
    with pytest.raises(UserError, match=r"Reward 'choice', response 0 of the batch .*: label is 'Z'"):
        run(ChoiceReward(), make_rollout(["B"], choices=[["x", "y"]], label=["Z"]))
    with pytest.raises(UserError, match="partial is 'half'"):
        ChoiceReward(partial="half")  # type: ignore[arg-type]
