"""The learning rate over a run: a warm-up, and a decay to the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from maestro_pl.algorithm.settings import check_at_least
from maestro_pl.errors import UserError, check_choice

Decay: TypeAlias = Literal["none", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A learning rate that rises from 0, and falls over the rest of the run, as transformers' schedules do.

    Attributes:
        warmup: how long it rises: a share of the run's steps below 1, a number of steps from 1 on.
        decay: how it falls until the last step.
        floor: the share of the learning rate that it falls to.

    Raises:
        UserError: a value outside its range.
    """

    warmup: float = 0.0
    decay: Decay = "none"
    floor: float = 0.0

    def __post_init__(self) -> None:
        """Check every value."""
        check_at_least("scheduler.warmup", self.warmup, 0)
        check_choice("scheduler.decay", self.decay, Decay)
        if not 0 <= self.floor <= 1:
            raise UserError(f"scheduler.floor={self.floor}: expected a share of the learning rate, from 0 to 1.")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise UserError(f"scheduler.warmup={self.warmup}: expected a share below 1, or a whole number of steps.")

    @property
    def needs_end(self) -> bool:
        """Whether it can only be told with the number of steps."""
        return self.decay != "none" or 0 < self.warmup < 1

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by after ``step`` of ``steps`` steps."""
        rising = int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * steps)
        if step < rising:
            return step / max(rising, 1)
        progress = min((step - rising) / max(steps - rising, 1), 1.0)
        left = {"none": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[self.decay]
        return self.floor + (1 - self.floor) * left
