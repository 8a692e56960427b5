"""Which hidden state of the policy is read as h(x, y), the context of the Conductor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Layer: TypeAlias = Literal["last", "middle", "first"] | int
Pool: TypeAlias = Literal["last", "mean"]
Place: TypeAlias = Literal["terminal", "prompt", "both"]
State: TypeAlias = Literal["policy", "base"]


@dataclass(frozen=True)
class HiddenContext:
    """Which hidden state of the policy is read.

    Attributes:
        layer: ``last`` (after the final norm), ``middle``, ``first`` (after the first block), or an index into
            transformers' ``hidden_states`` (0 is the embedding).
        pool: ``last`` response token, or the ``mean`` over the response's tokens.
        place: ``terminal`` is the response's state, after prompt and response; ``prompt`` that of the prompt's last
            token, before anything was answered, the same for a whole group; ``both`` puts the prompt's in front of the
            response's.
        state: whose hidden state: the ``policy``'s own, which moves while it trains, or that of the frozen ``base``.
    """

    layer: Layer = "last"
    pool: Pool = "last"
    place: Place = "terminal"
    state: State = "policy"

    @property
    def parts(self) -> int:
        """How many hidden states of the policy lie side by side in it."""
        return 2 if self.place == "both" else 1

    @property
    def from_policy(self) -> HiddenContext | None:
        """What an engine or a pass of the policy can note on its way: itself, or None where it is the base's."""
        return self if self.state == "policy" else None
