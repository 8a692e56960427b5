"""Requests to one vLLM server: what is sent, what is read out of the answer, and what went wrong."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from maestro_pl.errors import UserError
from maestro_pl.generation.engine import Sampling
from maestro_pl.rollout import FinishReason
from maestro_pl.run.coroutines import within
from maestro_pl.run.endpoints import Trouble, request_errors, trouble_of, without_key


class Stopped(Exception):
    """A request failed in a way that may pass: the server is to be asked again."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.detail)
        self.trouble = trouble


@dataclass
class Responses:
    """The n responses to one prompt: ids, finish reasons, and the log-probability of each sampled token."""

    ids: list[list[int]] = field(default_factory=list)
    reasons: list[FinishReason] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)


@dataclass
class Calls:
    """The requests of one batch to one server.

    Attributes:
        openai: the package.
        client: its asynchronous client, at the server's address.
        where: the address, for sentences.
        key: what no sentence may hold.
        timeout_s: of a request.
    """

    openai: Any
    client: Any
    where: str
    key: str
    timeout_s: float

    async def models(self) -> dict[str, dict[str, Any]]:
        """What the server serves, name to what it says of it; adapters that are loaded are among them."""
        found = await self._json("/models", None)
        return {str(model["id"]): model for model in found["data"]}

    async def load(self, name: str, folder: str) -> None:
        """Let the server load adapters, if it has not; raises :class:`Stopped` of kind ``refused`` with its reason."""
        try:
            await self._text("/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        except Stopped as stopped:
            if "already" not in stopped.trouble.detail:  # another rank was first
                raise

    async def unload(self, name: str) -> None:
        """Let it forget adapters; whether it has any is no matter."""
        try:
            await self._text("/unload_lora_adapter", {"lora_name": name})
        except Stopped:
            return

    async def known(self, name: str, ids: list[int]) -> list[float]:
        """The log-probability of each id but the first under these adapters, at temperature 1."""
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = await self._completion(name, body)
        scored = answer["choices"][0]["prompt_logprobs"]
        return [float(entry[str(token)]["logprob"]) for entry, token in zip(scored[1:], ids[1:], strict=True)]

    async def scales_logprobs(self, name: str, ids: list[int], temperature: float) -> bool:
        """Whether log-probabilities are those at the temperature (processed), and not at 1 (raw)."""
        gaps: list[float] = []
        for chosen in (1.0, temperature):
            body = {"prompt": ids, "max_tokens": 1, "temperature": chosen, "seed": 0, "logprobs": 5}
            answer = await self._completion(name, body)
            best: list[float] = sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
            gaps.append(best[0] - best[-1])
        return abs(gaps[1] - gaps[0] / temperature) <= abs(gaps[1] - gaps[0])

    async def sample(
        self, name: str, ids: list[int], n: int, sampling: Sampling, eos: list[int], seed: int | None
    ) -> Responses:
        """Sample n responses to a prompt with these adapters.

        Raises:
            UserError: the answer is that of other adapters, or of a server that cannot do what is needed.
        """
        body = {"prompt": ids, "n": n, "logprobs": 0, "return_token_ids": True, **sampling_body(sampling, eos)}
        answer = await self._completion(name, body | ({} if seed is None else {"seed": seed}))
        if len(answer["choices"]) != n:
            raise UserError(f"The vLLM server at {self.where} gave {len(answer['choices'])} responses of {n}.")
        found = Responses()
        for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"])):
            if choice.get("finish_reason") not in ("stop", "length"):
                raise Stopped(Trouble("server", f"a response ended by {choice.get('finish_reason')!r}"))
            if choice.get("token_ids") is None:
                raise UserError(
                    f"The vLLM server at {self.where} gives no token ids (return_token_ids): use vLLM 0.27 or newer."
                )
            logps = [math.nan if value is None else float(value) for value in choice["logprobs"]["token_logprobs"]]
            if len(logps) != len(choice["token_ids"]):
                raise UserError(
                    f"The vLLM server at {self.where} gave {len(logps)} log-probabilities for {len(choice['token_ids'])} "
                    "tokens."
                )
            found.ids.append([int(token) for token in choice["token_ids"]])
            found.reasons.append(choice["finish_reason"])
            found.logps.append(logps)
        return found

    async def _completion(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._json("/completions", {"model": name, "stream": False, **body})
        if answer.get("model") != name:
            raise UserError(
                f"The vLLM server at {self.where} was asked for the adapters {name!r} and answered with "
                f"{answer.get('model')!r}: its answers are of another version; restart it."
            )
        return answer

    async def _json(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        text = await self._text(path, body)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not isinstance(answer.get("data" if body is None else "choices"), list):
            raise Stopped(Trouble("server", f"no {path} in the answer {text[:80]!r}"))
        return answer

    async def _text(self, path: str, body: dict[str, Any] | None) -> str:
        try:
            sent = (
                self.client.get(path, cast_to=str) if body is None else self.client.post(path, cast_to=str, body=body)
            )
            answer = await within(sent, self.timeout_s)
        except request_errors(self.openai) as error:
            trouble = trouble_of(self.openai, error, self.timeout_s)
            detail = without_key(trouble.detail, self.key)
            raise Stopped(Trouble(trouble.kind, detail, trouble.status, trouble.wait)) from None
        return str(answer)


def sampling_body(sampling: Sampling, eos: list[int]) -> dict[str, Any]:
    """The fields of a request; all are given, so that no default of the model's own or of the server's enters."""
    return {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(eos),
        "skip_special_tokens": False,
    }
