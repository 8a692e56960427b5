"""ChoiceReward: accuracy in multiple choice, by letter or by the option's text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, TypeAlias

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice, check_tags
from maestro_pl.errors import UserError
from maestro_pl.rewards.choice import choice_accuracies, choice_score, read_questions
from maestro_pl.rewards.scores import ScoresAndMetrics
from maestro_pl.rollout import Normalization, RewardSpec, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

Partial: TypeAlias = Literal["none", "mean"]


class ChoiceReward(Reward):
    """1 where the response picks the right option of every question, else 0; no choices or no label: does not apply.

    The answer is the answer block, else what follows the reasoning, else the whole response. It names an option by its
    letter ("C", "(c)", "C: text", "The answer is C.") or by its text; several questions stand as "Emotion: B" and
    "Cause: C". An answer that names two options of a question, or a letter beside another option's text, is wrong.
    Where a row has several questions, the accuracy of each is a metric (``emotion``, ``cause``).

    Args:
        choices: the data column with the options: a list of texts, or a mapping of question names to lists.
        label: the data column with the right letter (or the right option's text, or as a number its index from 0), or a
            mapping of question names.
        partial: ``none`` asks for all questions of a row, ``mean`` gives the share that is right.
        answer_tag: name of the answer tag.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: an unknown option.
    """

    default_name = "choice"
    pass_at_k = True

    def __init__(
        self,
        *,
        choices: str = "choices",
        label: str = "label",
        partial: Partial = "none",
        answer_tag: str = "answer",
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_choice("ChoiceReward", "partial", partial, Partial)
        check_tags("ChoiceReward", "think", answer_tag)
        self.choices, self.label, self.partial, self.answer_tag = choices, label, partial, answer_tag

    @property
    def spec(self) -> RewardSpec:
        """See :class:`Reward`; a share of questions is no pass@k."""
        return RewardSpec(self.name, self.role, self.normalize, self.partial == "none")

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """The score of each response whose row has choices and a label, and the accuracy of every named question."""
        choices, labels = rollout.per_response(self.choices), rollout.per_response(self.label)
        scores: list[float | None] = [None] * len(rows)
        metrics: dict[str, list[float | None]] = {}
        for i, row in enumerate(rows):
            try:
                questions = read_questions(choices[row], labels[row])
            except UserError as error:
                raise UserError(f"Reward {self.name!r}, {self.describe(rollout, row)}: {error}") from error
            if not questions:
                continue
            right = choice_accuracies(rollout.responses[row], questions, answer_tag=self.answer_tag)
            scores[i] = choice_score(list(right.values()), share=self.partial == "mean")
            for question, accuracy in right.items():
                if question:
                    key = re.sub(r"\W+", "_", question.strip().lower())
                    metrics.setdefault(key, [None] * len(rows))[i] = accuracy
        return scores, metrics
