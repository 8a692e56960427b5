"""Which groups people are asked about, and which of their responses they see."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from torch import Tensor

from maestro_pl.conductor.choices import spread_rows
from maestro_pl.errors import UserError
from maestro_pl.rewards.labels import label_key
from maestro_pl.rollout import Prompt

MOST = 9  # answers of a question: each has a key of its own


@dataclass(frozen=True)
class Question:
    """A prompt and some answers to it, which are told apart by their texts.

    Attributes:
        task: of the prompt.
        prompt: a text or chat messages.
        responses: the answers' texts, in an order that does not depend on the run that sampled them.

    Raises:
        UserError: fewer than two different answers.
    """

    task: str
    prompt: Prompt
    responses: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check it."""
        if not 2 <= len(set(self.digests)) == len(self.responses) <= MOST:
            raise UserError(
                f"A question with the answers {list(self.responses)!r:.200}: expected 2 to {MOST}, all different."
            )

    @classmethod
    def of(cls, task: str, prompt: Prompt, responses: Sequence[str]) -> Question:
        """With the answers in their own order, that of their digests."""
        ordered = sorted(responses, key=lambda text: response_digest(prompt, text))
        return cls(task, prompt, tuple(ordered))

    @property
    def prompt_digest(self) -> str:
        """What the prompt is known by, see :func:`prompt_digest`."""
        return prompt_digest(self.prompt)

    @property
    def digests(self) -> list[str]:
        """What each answer is known by, see :func:`response_digest`."""
        return [response_digest(self.prompt, text) for text in self.responses]

    @property
    def key(self) -> str:
        """What the question is known by: its content, whatever run or order it comes from."""
        return _digest("\0".join([self.prompt_digest, *sorted(self.digests)]))

    def order(self, rater: str) -> list[int]:
        """The places of the answers as this person sees them: drawn by chance, and the same whenever it is asked."""
        places = list(range(len(self.responses)))
        random.Random(_digest(f"{self.key}\0{rater}")).shuffle(places)
        return places


@dataclass
class Group:
    """A sampled group and what its rewards say.

    Attributes:
        task: of the prompt.
        prompt: a text or chat messages.
        responses: G texts.
        z_GK: float rewards z-scored in the group, 0 where they do not apply.
        mask_GK: bool, which rewards apply.
        x_GF: float features of the context.
        batch: number of the training batch that holds it, from 0.
    """

    task: str
    prompt: Prompt
    responses: list[str]
    z_GK: Tensor
    mask_GK: Tensor
    x_GF: Tensor
    batch: int = 0


@dataclass(frozen=True)
class Asked:
    """A question, and where its answers stand in the group that it is made of.

    Attributes:
        question: what people see.
        group: number of the group.
        rows: places in the group, one for each of ``question.responses``.
    """

    question: Question
    group: int
    rows: tuple[int, ...]


def prompt_digest(prompt: Prompt) -> str:
    """What a prompt is known by: its text, without white space at the ends."""
    return _digest(label_key(prompt, "")[0])


def response_digest(prompt: Prompt, response: str) -> str:
    """What an answer to a prompt is known by: both texts, without white space at the ends."""
    return _digest(json.dumps(label_key(prompt, response)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def question_of(groups: Sequence[Group], place: int, shown: int) -> Asked | None:
    """The question about one group: its ``shown`` different responses whose rewards differ most.

    None where all its responses have one text.
    """
    group = groups[place]
    first: dict[str, int] = {}  # equal texts are one answer
    for row, text in enumerate(group.responses):
        first.setdefault(response_digest(group.prompt, text), row)
    rows = list(first.values())
    if len(rows) < 2:
        return None
    chosen = [rows[each] for each in spread_rows(group.z_GK[rows], shown)]
    question = Question.of(group.task, group.prompt, [group.responses[row] for row in chosen])
    return Asked(question, place, tuple(first[digest] for digest in question.digests))


def chosen_questions(groups: Sequence[Group], count: int, shown: int) -> list[Asked]:
    """Questions about ``count`` groups at most: one of each task after the other, those of a task as they were sampled.

    Args:
        groups: that were sampled.
        count: how many questions.
        shown: how many answers each has at most.
    """
    by_task: dict[str, dict[str, Asked]] = {}
    for place, group in enumerate(groups):
        asked = question_of(groups, place, shown)
        if asked is not None:
            by_task.setdefault(group.task, {}).setdefault(asked.question.key, asked)
    rounds = zip_longest(*(by_task[task].values() for task in sorted(by_task)))
    return [asked for each in rounds for asked in each if asked is not None][:count]
