"""ExactMatchReward and ContainsReward: the response against the reference or a list of strings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, TypeAlias

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice, check_strings, check_tags
from maestro_pl.errors import UserError
from maestro_pl.rewards.contains import Require, contains_score
from maestro_pl.rewards.exact_match import accepted_references, exact_match_score, extract_answer
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

ContainsPart: TypeAlias = Literal["response", "answer"]


class ExactMatchReward(Reward):
    """1 where the response's answer equals the reference after normalisation, else 0; no reference: does not apply.

    The answer is the answer block, else what follows the reasoning, else the whole response. Case, white space,
    surrounding punctuation and commas between thousands do not count, and numbers are compared as numbers (1.0 equals
    1).

    Args:
        column: the data column with the reference: a text, a number, or a list of accepted ones.
        pattern: a regular expression; where it matches in the answer, its last match (its first group, if it has one)
            is taken instead.
        drop_articles: also leave out a, an and the.
        answer_tag: name of the answer tag.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: a pattern that is no regular expression.
    """

    default_name = "exact_match"
    pass_at_k = True

    def __init__(
        self,
        *,
        column: str = "reference",
        pattern: str = "",  # not `str | None`: jsonargparse would take a text that begins with # for null
        drop_articles: bool = False,
        answer_tag: str = "answer",
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_tags("ExactMatchReward", "think", answer_tag)
        try:
            self.pattern = re.compile(pattern) if pattern else None
        except re.error as error:
            raise UserError(
                f"ExactMatchReward: the pattern {pattern!r} is no regular expression ({error}): correct it."
            ) from error
        self.column, self.drop_articles, self.answer_tag = column, drop_articles, answer_tag

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[float | None]:
        """0 or 1 for each response with a reference."""
        accepted = references_of(self, rollout, rows, self.column)
        return [
            exact_match_score(
                rollout.responses[row],
                references,
                pattern=self.pattern,
                answer_tag=self.answer_tag,
                drop_articles=self.drop_articles,
            )
            if references
            else None
            for row, references in zip(rows, accepted, strict=True)
        ]


class ContainsReward(Reward):
    """1 where any (or all) of the listed strings, or of the references, stand in the answer, else 0.

    Args:
        strings: what to look for; default: the reference, and the reward does not apply where there is none.
        require: ``any`` or ``all`` of them.
        of: look in the ``answer`` (the answer block, else what follows the reasoning, else all) or the whole
            ``response``.
        ignore_case: compare without case.
        column: the data column with the reference: a text, a number, or a list of them.
        answer_tag: name of the answer tag.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: an empty list of strings or an unknown option.
    """

    default_name = "contains"

    def __init__(
        self,
        *,
        strings: list[str] | None = None,
        require: Require = "any",
        of: ContainsPart = "answer",
        ignore_case: bool = True,
        column: str = "reference",
        answer_tag: str = "answer",
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        if strings is not None:
            check_strings("ContainsReward", "strings", strings, hint="Leave it out to look for the reference.")
        check_choice("ContainsReward", "require", require, Require)
        check_choice("ContainsReward", "of", of, ContainsPart)
        check_tags("ContainsReward", "think", answer_tag)
        self.strings, self.require, self.of = strings, require, of
        self.ignore_case, self.column, self.answer_tag = ignore_case, column, answer_tag

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[float | None]:
        """0 or 1 for each response with something to look for."""
        wanted = [self.strings] * len(rows) if self.strings else references_of(self, rollout, rows, self.column)
        texts = [rollout.responses[row] for row in rows]
        if self.of == "answer":
            texts = [extract_answer(text, answer_tag=self.answer_tag) for text in texts]
        return [
            contains_score(text, strings, require=self.require, ignore_case=self.ignore_case) if strings else None
            for text, strings in zip(texts, wanted, strict=True)
        ]


def references_of(reward: Reward, rollout: Rollout, rows: list[int], column: str) -> list[list[str]]:
    """The accepted references of each row.

    Raises:
        UserError: the column is missing, or holds something that is no reference.
    """
    cells = rollout.per_response(column)
    references: list[list[str]] = []
    for row in rows:
        try:
            references.append(accepted_references(cells[row]))
        except UserError as error:
            raise UserError(
                f"Reward {reward.name!r}, column {column!r}, {reward.describe(rollout, row)}: {error}"
            ) from error
    return references
