"""LengthReward: a penalty outside a length budget, or NOVER's efficiency."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice, check_number, check_tags
from maestro_pl.errors import UserError
from maestro_pl.rewards.format import ParsedResponse, parse_response
from maestro_pl.rewards.length import LengthUnit, length_penalty, nover_efficiency
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

LengthMode: TypeAlias = Literal["budget", "efficiency"]
LengthPart: TypeAlias = Literal["response", "think", "answer"]


class LengthReward(Reward):
    """0 for a response within the budget and a penalty down to ``floor`` outside; or NOVER's efficiency reward.

    A part that is not there (no closed think block, say) counts as the whole response: breaking the format must not
    make a response shorter.

    Args:
        min: shortest length without a penalty.
        max: longest length without a penalty; ``null``: no limit.
        unit: ``tokens`` of the policy (of a whole response: as sampled, the end-of-sequence token included), ``words``
            or ``characters``.
        of: the part that is measured: the whole ``response``, its ``think`` block or its ``answer`` block.
        floor: the lowest reward of the budget mode.
        mode: ``budget``, or ``efficiency``: the share of the other valid responses of the group that it beats on both
            shorter reasoning and lower perplexity of the reference (``min``, ``max``, ``of``, ``floor`` are not read).
        perplexity: name of the :class:`PerplexityReward` that stands before this one, read by ``efficiency``.
        think_tag: name of the reasoning tag.
        answer_tag: name of the answer tag.
        think_in_prompt: the chat template opens the think block.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: a negative length, ``max`` below ``min``, no bound at all, or a floor above 0.
    """

    default_name = "length"

    def __init__(
        self,
        *,
        min: int = 0,
        max: int | None = 512,
        unit: LengthUnit = "tokens",
        of: LengthPart = "response",
        floor: float = -1.0,
        mode: LengthMode = "budget",
        perplexity: str = "perplexity",
        think_tag: str = "think",
        answer_tag: str = "answer",
        think_in_prompt: bool = False,
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_number("LengthReward", "min", min, at_least=0, integer=True)
        if max is not None:
            check_number("LengthReward", "max", max, at_least=0, integer=True)
        check_number("LengthReward", "floor", floor, at_most=0)
        check_choice("LengthReward", "unit", unit, LengthUnit)
        check_choice("LengthReward", "of", of, LengthPart)
        check_choice("LengthReward", "mode", mode, LengthMode)
        check_tags("LengthReward", think_tag, answer_tag)
        if max is not None and max < min:
            raise UserError(f"LengthReward: max, {max}, is below min, {min}: raise it, or give null for no limit.")
        if mode == "budget" and max is None and min == 0:
            raise UserError("LengthReward: min is 0 and max is null, so that every response gets 0: give one of them.")
        self.min, self.max, self.floor = min, max, float(floor)
        self.unit, self.of, self.mode, self.perplexity = unit, of, mode, perplexity
        self.think_tag, self.answer_tag, self.think_in_prompt = think_tag, answer_tag, think_in_prompt

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[float | None]:
        """A penalty in [floor, 0], or an efficiency in [0, 1], for each response."""
        if self.mode == "efficiency":
            return self._efficiencies(rollout, rows, pl_module)
        return [
            length_penalty(
                self._length(rollout, row, self._parse(rollout, row), self.of, pl_module),
                minimum=self.min,
                maximum=self.max,
                floor=self.floor,
            )
            for row in rows
        ]

    def _efficiencies(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[float | None]:
        perplexities_B = rollout.perplexities.get(self.perplexity)
        if perplexities_B is None:
            raise UserError(
                f"Reward {self.name!r} in mode efficiency reads the perplexities of a reward named {self.perplexity!r}"
                ", and none ran before it: put a PerplexityReward of that name in front of it in the list of rewards."
            )
        scores: list[float | None] = []
        for start in range(0, len(rows), rollout.group_size):
            group = rows[start : start + rollout.group_size]  # a task is a prompt's, so that rows are whole groups
            parsed = [self._parse(rollout, row) for row in group]
            lengths = [
                self._length(rollout, row, part, "think", pl_module) for row, part in zip(group, parsed, strict=True)
            ]
            perplexities = [float(perplexities_B[row]) for row in group]
            known = [not math.isnan(value) for value in perplexities]
            valid = [part.valid and ok for part, ok in zip(parsed, known, strict=True)]
            values = nover_efficiency(lengths, perplexities, valid)
            # Without a single perplexity (no reference) there is nothing to compare: the reward does not apply.
            scores += values if any(known) else [None] * len(group)
        return scores

    def _parse(self, rollout: Rollout, row: int) -> ParsedResponse:
        return parse_response(
            rollout.responses[row],
            think_tag=self.think_tag,
            answer_tag=self.answer_tag,
            think_in_prompt=self.think_in_prompt,
        )

    def _length(
        self, rollout: Rollout, row: int, parsed: ParsedResponse, of: LengthPart, pl_module: MaestroModule
    ) -> int:
        part = {"response": None, "think": parsed.think, "answer": parsed.answer}[of]
        if self.unit == "tokens":
            return len(rollout.response_ids[row]) if part is None else len(pl_module.policy.encode(part))
        text = rollout.responses[row] if part is None else part
        return len(text.split()) if self.unit == "words" else len(text)
