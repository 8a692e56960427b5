"""A judge behind an OpenAI-compatible server: many requests at once, retries, and an end to waiting."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge.backend import Ask, Failure, OnReply, Outcome, Reply
from maestro_pl.run.coroutines import end, run_in_thread, within
from maestro_pl.run.endpoints import import_openai, read_key, request_errors, split_url, trouble_of, without_key

OPENAI = "https://api.openai.com/v1"
_NEVER_WORKS = (401, 402, 403, 404, 405)  # wrong key, no credit, wrong address or model: the next request fails as well
_SUSPECT = 3  # failures in a row that end a batch when the one before it was given up


@dataclass
class Endpoint:
    """A model behind ``/chat/completions`` of an OpenAI-compatible server.

    Attributes:
        model: the model's name there.
        url: the address up to and including ``/v1``.
        api_key_env: name of the environment variable with the key; unset, requests carry no real key.
        temperature: of the sampling; 0 is greedy.
        max_tokens: of a reply.
        options: further fields of the request's body; ``null`` removes one of ours (``max_tokens``, ``seed``, ...).
        structured: ask for replies in JSON (``response_format: json_schema``). A server that refuses the field is asked
            without it from then on, and replies are read as text.
        concurrency: requests at once.
        timeout_s: seconds until a request is given up.
        retries: further tries after a time-out, a broken connection, a 429 or a 5xx.
        backoff_s: seconds before the first of them, doubled each time, less a random part of up to a half.
        deadline_s: seconds that a whole batch may take; what is not answered by then has failed.
        give_up_after: failed requests in a row after which the rest of the batch is not tried.
    """

    model: str
    url: str = OPENAI
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 512
    options: Mapping[str, Any] = field(default_factory=dict)
    structured: bool = False
    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 4
    backoff_s: float = 1.0
    deadline_s: float = 300.0
    give_up_after: int = 20

    def __post_init__(self) -> None:
        self._openai = import_openai("A judge behind an endpoint")
        self._key = read_key(self.api_key_env)
        _check_options(self.options, self.structured)
        parts = split_url(self.url, "The judge's endpoint")
        self._where = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self._random = random.Random()  # waiting must not move the run's own random state
        self._worked = False  # a request has succeeded: from now on nothing stops the run
        self._suspect = False  # the last batch was given up
        self._ends = 0.0
        self._has_schemas = self.structured  # until the server refuses the field

    @property
    def identity(self) -> list[object]:
        """See :class:`JudgeBackend`."""
        asked = ["endpoint", self._where, self.model, self.temperature, self.max_tokens, dict(self.options)]
        return [*asked, "json_schema"] if self.structured else asked

    @property
    def samples(self) -> bool:
        """See :class:`JudgeBackend`."""
        return self.temperature > 0

    def begin(self) -> None:
        """See :class:`JudgeBackend`."""
        self._ends = time.monotonic() + self.deadline_s

    def complete(self, asks: Sequence[Ask], on_reply: OnReply) -> list[Outcome]:
        """See :class:`JudgeBackend`."""
        outcomes: list[Outcome] = run_in_thread(lambda: self._complete(asks, on_reply), "judge")
        refused = [outcome for outcome in outcomes if isinstance(outcome, Failure) and outcome.kind == "refused"]
        if refused and not self._worked and len(refused) == len(outcomes):
            raise UserError(
                f"The judge at {self._where} refused the first {len(refused)} request(s) to the model {self.model!r} "
                f"({refused[0].detail}): correct the judge's options."
            )
        return outcomes

    async def _complete(self, asks: Sequence[Ask], on_reply: OnReply) -> list[Outcome]:
        batch = _Batch(asyncio.Semaphore(self.concurrency), _SUSPECT if self._suspect else self.give_up_after)
        client = self._openai.AsyncOpenAI(
            # retries are ours: the client's leave bad bodies, repeat used-up credit, and no give-up or hold ends their waits
            base_url=self.url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self.timeout_s,
        )
        async with client:
            tasks = [asyncio.ensure_future(self._ask(client, batch, ask, i, on_reply)) for i, ask in enumerate(asks)]
            try:
                outcomes = await asyncio.gather(*tasks)
            finally:
                await end(tasks)
        self._suspect = batch.given_up.is_set()
        return list(outcomes)

    async def _ask(self, client: Any, batch: _Batch, ask: Ask, index: int, on_reply: OnReply) -> Outcome:
        """One question until it is answered, has failed for good, or the batch is over."""
        failure = Failure("deadline", "no time was left to ask")
        for attempt in range(self.retries + 1):
            async with batch.room:
                await batch.pause(self._ends)
                if batch.given_up.is_set():
                    return Failure("given_up", failure.detail or "too many failures in a row")
                if self._left() <= 0:
                    return Failure("deadline", failure.detail)
                outcome, wait = await self._try(client, batch, ask)
            if isinstance(outcome, Reply):
                self._worked = True
                on_reply(index, outcome)
                return outcome
            failure = outcome
            if outcome.kind == "refused" or attempt == self.retries:
                return outcome
            if wait is None:
                wait = self.backoff_s * 2**attempt * self._random.uniform(0.5, 1.0)
            if wait >= self._left():
                return outcome  # its next turn would come after the end
            await batch.sleep(wait)
        return failure

    async def _try(self, client: Any, batch: _Batch, ask: Ask) -> tuple[Outcome, float | None]:
        """One request: what came of it, and how long the server asks to wait."""
        openai, status, wait = self._openai, 0, None
        body, structured = self._body(ask), self._has_schemas and ask.schema is not None
        try:
            raw = await within(
                client.chat.completions.with_raw_response.create(**body), min(self.timeout_s, self._left())
            )
            outcome = read_reply(raw.content)
        except request_errors(openai) as error:
            trouble = trouble_of(openai, error, self.timeout_s)
            status, wait = trouble.status, trouble.wait
            if structured and status in (400, 422) and "response_format" in trouble.detail:
                self._drop_schemas(status)
                return await self._try(client, batch, ask)
            outcome = Failure(trouble.kind, without_key(trouble.detail, self._key))
            self._check_status(402 if trouble.quota else status)
        batch.note(outcome)
        if status == 429 and wait is not None:
            batch.hold_until(time.monotonic() + wait)
        return outcome, wait

    def _body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        body |= {"seed": ask.seed} if self.temperature > 0 else {}
        if self._has_schemas and ask.schema is not None:
            schema = {"name": "reply", "strict": True, "schema": ask.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        body |= dict(self.options)
        known = {"temperature", "max_tokens", "seed", "response_format"}
        named = {key: value for key, value in body.items() if key in known and value is not None}
        extra = {key: value for key, value in body.items() if key not in known and value is not None}
        return {"model": self.model, "messages": ask.messages, "extra_body": extra or None, **named}

    def _drop_schemas(self, status: int) -> None:
        """Ask without ``response_format`` from now on, and say so once."""
        if self._has_schemas:
            rank_zero_warn(
                f"The judge at {self._where} refuses response_format (HTTP {status}): it is asked without, and its replies "
                "are read as text. Leave out `structured` to ask so from the start.",
                category=UserWarning,
            )
        self._has_schemas = False

    def _check_status(self, status: int) -> None:
        """Stop the run where every request would fail like the first.

        Raises:
            UserError: the key, the model or the address is wrong, and no request has ever succeeded.
        """
        if self._worked or status not in _NEVER_WORKS:
            return
        key = f"the key in ${self.api_key_env}" if self._key else f"${self.api_key_env}, which is not set"
        advice = {401: key, 402: "the account's credit", 403: f"{key} and what it may use"}
        look = advice.get(status, f"the address and the model's name {self.model!r}")
        raise UserError(f"The judge at {self._where} answered the first request with HTTP {status}: check {look}.")

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, {self._where!r})"


class _Batch:
    """What the requests of one batch share: room, a common pause, and the decision to give up."""

    def __init__(self, room: asyncio.Semaphore, give_up_after: int) -> None:
        self.room, self.give_up_after = room, give_up_after
        self.given_up = asyncio.Event()
        self._in_a_row = 0
        self._held_until = 0.0

    def note(self, outcome: Outcome) -> None:
        """Count failures in a row; a refusal or a rate limit shows that the server lives."""
        if isinstance(outcome, Failure) and outcome.kind not in ("rate_limit", "refused"):
            self._in_a_row += 1
            if self._in_a_row >= self.give_up_after:
                self.given_up.set()
        else:
            self._in_a_row = 0

    def hold_until(self, moment: float) -> None:
        """No request of the batch before this moment."""
        self._held_until = max(self._held_until, moment)

    async def pause(self, end: float) -> None:
        """Wait as long as the server asked for, at most until the end."""
        wait = min(self._held_until, end) - time.monotonic()
        if wait > 0:
            await self.sleep(wait)

    async def sleep(self, seconds: float) -> None:
        """Wait, or until the batch is given up."""
        try:
            await within(self.given_up.wait(), seconds)
        except TimeoutError:
            return


def read_reply(content: bytes) -> Outcome:
    """The reply in the body of a chat completion; a body that is none is a failure of the server."""
    try:
        body = json.loads(content)
        text = body["choices"][0]["message"].get("content")
        usage = body.get("usage") or {}
        tokens = [int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return Failure("bad_body", f"no chat completion in the answer ({type(error).__name__}: {error})"[:200])
    if isinstance(text, list):  # some servers send parts
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, Mapping))
    return Reply(text if isinstance(text, str) else "", *tokens)


def _check_options(options: Mapping[str, Any], structured: bool) -> None:
    ours = [key for key in ("model", "messages", "stream") if key in options]
    if ours:
        raise UserError(f"The judge's options hold {ours[0]!r}, which the judge writes itself: take it out.")
    if structured and "response_format" in options:
        raise UserError("The judge's options hold 'response_format', which `structured` writes: take one of both out.")
    try:
        json.dumps(dict(options))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The judge's options are {dict(options)!r}, which is no JSON ({error}): correct them."
        ) from error
