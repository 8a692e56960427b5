"""FormatReward: one think block and then one answer block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_tags
from maestro_pl.rewards.format import format_score
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule


class FormatReward(Reward):
    """1 where a response is exactly ``<think>..</think><answer>..</answer>``, else 0.

    Args:
        think_tag: name of the reasoning tag.
        answer_tag: name of the answer tag.
        think_in_prompt: the chat template opens the think block, so that responses start inside it.
        allow_empty: count empty blocks as well, as NOVER does.
        name: see :class:`Reward`.
        role: see :class:`Reward`; ``gate`` makes the other rewards count only where the format holds (NOVER).
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: a tag that is empty or holds brackets, spaces or slashes, or two equal tags.
    """

    default_name = "format"

    def __init__(
        self,
        *,
        think_tag: str = "think",
        answer_tag: str = "answer",
        think_in_prompt: bool = False,
        allow_empty: bool = True,
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_tags("FormatReward", think_tag, answer_tag)
        self.think_tag, self.answer_tag = think_tag, answer_tag
        self.think_in_prompt, self.allow_empty = think_in_prompt, allow_empty

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[float | None]:
        """0 or 1 for each response."""
        return [
            format_score(
                rollout.responses[row],
                think_tag=self.think_tag,
                answer_tag=self.answer_tag,
                think_in_prompt=self.think_in_prompt,
                allow_empty=self.allow_empty,
            )
            for row in rows
        ]
