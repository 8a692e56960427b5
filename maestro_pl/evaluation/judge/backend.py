"""What a judge asks with: one protocol for servers and local models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from maestro_pl.rollout import Message

#: Why a vote has no valid reply.
KINDS = (
    "timeout",  # no answer in time
    "connection",  # refused, dropped, no such host
    "rate_limit",  # HTTP 429
    "server",  # HTTP 5xx
    "refused",  # any other HTTP 4xx
    "bad_body",  # an answer that is no chat completion
    "deadline",  # the batch's time was over
    "given_up",  # too many failures in a row in this batch
    "too_long",  # more tokens than a local judge takes
    "malformed",  # replies that could not be read
)


@dataclass(frozen=True)
class Ask:
    """One question: the messages, the seed of this vote, and the JSON schema of a reply where the server keeps to one."""

    messages: list[Message]
    seed: int = 0
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Reply:
    """What the judge said, and the tokens that were read and written for it."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class Failure:
    """No reply: its kind (one of ``KINDS``) and the last thing seen."""

    kind: str
    detail: str = ""


Outcome: TypeAlias = Reply | Failure
OnReply: TypeAlias = Callable[[int, Reply], None]


class JudgeBackend(Protocol):
    """Answers questions; a question that cannot be answered becomes a :class:`Failure`, never an exception."""

    @property
    def identity(self) -> list[object]:
        """Everything besides messages and seed that decides a reply: the model, its address, the sampling."""

    @property
    def samples(self) -> bool:
        """Whether two replies to one question can differ."""

    def begin(self) -> None:
        """A new batch: budgets start anew."""

    def complete(self, asks: Sequence[Ask], on_reply: OnReply) -> list[Outcome]:
        """One outcome for each question, in order; ``on_reply(i, reply)`` is called as each comes in.

        Raises:
            UserError: the judge is set up so that every question would fail.
        """
