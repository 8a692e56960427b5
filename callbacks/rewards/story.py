"""StoryReward: surface qualities of a Social Story."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_tags
from callbacks.rewards.match import references_of
from maestro_pl.rewards.exact_match import extract_answer
from maestro_pl.rewards.scores import ScoresAndMetrics
from maestro_pl.rewards.story import story_counts, story_scores
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule


class StoryReward(Reward):
    """Mean of readability, length, structure, balance of sentences and person of an English Social Story, in [0, 1].

    The parts and what they are made of are metrics. They are rules of thumb over words and line breaks, see
    ``maestro_pl.rewards.story``; without a reference the length is left out.

    Args:
        column: the data column with a reference story, whose length is aimed at.
        answer_tag: name of the answer tag.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: a name that is no tag.
    """

    default_name = "story"

    def __init__(
        self,
        *,
        column: str = "reference",
        answer_tag: str = "answer",
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_tags("StoryReward", "think", answer_tag)
        self.column, self.answer_tag = column, answer_tag

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """The score of each response, its parts and its counts."""
        scores: list[float | None] = []
        metrics: dict[str, list[float | None]] = {}
        for i, (row, references) in enumerate(zip(rows, references_of(self, rollout, rows, self.column), strict=True)):
            story = extract_answer(rollout.responses[row], answer_tag=self.answer_tag)
            parts = story_scores(story, references[0] if references else None)
            scores.append(parts.score)
            for key, value in {**asdict(parts), **story_counts(story)}.items():
                metrics.setdefault(key, [None] * len(rows))[i] = value
        return scores, metrics
