"""Rows that cannot be used: where they stand, why, and what to do about all of them at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError

BadRowPolicy: TypeAlias = Literal["error", "drop"]

SHOWN = 5


@dataclass
class Problems:
    """Collects rejected rows so that one message can name the first few and count the rest.

    Attributes:
        what: what is wrong with all of them, in words that follow a count ("120 of 4000 rows cannot be used").
        remedy: what the reader can do about it, appended to the error.
    """

    what: str
    remedy: str
    found: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.found)

    def add(self, file: str, row: int, reason: str) -> None:
        """Note one rejected row; ``row`` is 1-based (the line number in text files)."""
        self.found.append(f"{file}:{row}: {reason}")

    def settle(self, policy: BadRowPolicy, total: int) -> None:
        """Raise for the rows found, or warn with their count and let the run go on without them.

        Args:
            policy: ``error`` raises, ``drop`` warns.
            total: how many rows were looked at, the rejected ones included.

        Raises:
            UserError: rows were rejected and the policy is ``error``.
        """
        if not self.found:
            return
        rest = len(self.found) - SHOWN
        shown = "\n  ".join(self.found[:SHOWN] + ([f"... and {rest} more"] if rest > 0 else []))
        text = f"{len(self.found)} of {total} rows {self.what}"
        if policy == "error":
            raise UserError(f"{text}:\n  {shown}\n{self.remedy}")
        rank_zero_warn(f"{text} and are left out:\n  {shown}")
