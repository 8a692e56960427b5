"""The engine of many machines: vLLM servers apart, adapters loaded over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.generation.adapter_files import AdapterFiles, Version
from maestro_pl.generation.agreement import KnownTokens, check_agreement
from maestro_pl.generation.engine import Engine, Generation, Progress, Sampling
from maestro_pl.generation.refusals import check_lengths, check_policy, check_sampling
from maestro_pl.generation.server_calls import Calls, Responses, Stopped
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.run.coroutines import end, run_in_thread
from maestro_pl.run.endpoints import Trouble, import_openai, read_key, split_url
from maestro_pl.run.ranks import gathered

WHO = "VLLMServerEngine"
LONGEST_PAUSE_S = 30.0


class VLLMServerEngine(Engine):
    """Samples on vLLM servers, which load the adapters of every step from a folder that they can read.

    Each server is started by the user, with the policy's base (docs/scale.md)::

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 16 --logprobs-mode processed_logprobs

    A request is one prompt with all its responses; servers take the next when they have room, so a faster one does more. A
    request that fails is asked again, by whichever server has room. A server that is gone is waited for: when it is back it
    gets the adapters, is checked, and goes on. After every change of the adapters a few known tokens are scored on both
    sides, on every server.

    Args:
        urls: addresses, each up to and including ``/v1``.
        folder: where adapters are written, readable by servers under the same path; null: this machine's memory (/dev/shm).
        max_lora_rank: that the servers were started with; vLLM's default is 16.
        quantization: that the servers were started with; ``bitsandbytes`` for a policy in ``nf4``.
        api_key_env: name of the environment variable with the servers' key.
        concurrency: requests at once on a server; vLLM batches them.
        timeout_s: seconds until a request is given up and asked again.
        deadline_s: seconds that a whole batch may take, servers that are waited for included; then the run ends.
        backoff_s: seconds before a server that failed is asked again, doubled each time up to 30.
        max_difference: nats a token by which the known tokens may differ on average; null: 0.001 for a policy in float32,
            0.1 in 16 bits.
        seeded: give each request a seed, so that a batch is drawn from the same random numbers when it is drawn again; false
            is faster in large batches on a GPU.

    Raises:
        UserError: an address that is none, or a number out of its range.
    """

    def __init__(
        self,
        urls: list[str] | str = "http://localhost:8000/v1",
        folder: str | None = None,
        max_lora_rank: int = 16,
        quantization: str | None = None,
        api_key_env: str = "VLLM_API_KEY",
        concurrency: int = 64,
        timeout_s: float = 600.0,
        deadline_s: float = 1800.0,
        backoff_s: float = 1.0,
        max_difference: float | None = None,
        seeded: bool = True,
    ) -> None:
        self.urls = [urls] if isinstance(urls, str) else list(urls)
        if not self.urls or len(set(self.urls)) < len(self.urls):
            raise UserError(f"rollout.engine.init_args.urls={self.urls}: expected one address or more, each once.")
        self.where = []
        for url in self.urls:
            parts = split_url(url, "rollout.engine.init_args.urls")
            self.where.append(f"{parts.scheme}://{parts.netloc}{parts.path}")
        for name, value in (("concurrency", concurrency), ("timeout_s", timeout_s), ("deadline_s", deadline_s)):
            if not value > 0:
                raise UserError(f"rollout.engine.init_args.{name}={value}: expected a number above 0.")
        self.max_lora_rank, self.quantization = max_lora_rank, quantization
        self.concurrency, self.timeout_s, self.deadline_s = concurrency, timeout_s, deadline_s
        self.backoff_s, self.max_difference, self.seeded = backoff_s, max_difference, seeded
        self._openai = import_openai(f"rollout.engine={WHO}")
        self._key = read_key(api_key_env)
        self._files = AdapterFiles(folder)
        self._known = KnownTokens()
        self._ready: dict[str, tuple[str, float]] = {}  # address to the adapters that were checked there, temperature

    def prepare(self, policy: LoRAPolicy, sampling: Sampling, max_prompt_tokens: int | None = None) -> None:
        """See :class:`maestro_pl.generation.Engine`."""
        check_policy(policy, WHO, self.max_lora_rank, self.quantization)
        check_sampling(sampling, WHO)

    def close(self) -> None:
        """Unload the adapters, where a server answers at once, and remove the files."""
        version, self._ready = self._files.version, {}
        if version is not None and self._known.version is not None:
            run_in_thread(lambda: self._forget(version.name))
        self._files.close()
        self._known = KnownTokens()

    def generate(
        self,
        policy: LoRAPolicy,
        prompt_ids: list[list[int]],
        n: int,
        sampling: Sampling,
        progress: Progress | None = None,
        context: HiddenContext | None = None,
    ) -> Generation:
        """See :class:`maestro_pl.generation.Engine`. Collective: the adapters are those of rank 0.

        Raises:
            UserError: the deadline is over, a server refuses, or its model is not the trainer's.
        """
        self.prepare(policy, sampling)
        version = gathered(self._files.current(policy) if _is_first() else None)[0]
        assert version is not None
        self._known.update(policy, version.name)
        work = _Work(version, prompt_ids, n, sampling, list(policy.eos_token_ids), progress)

        def check(engine_T: Tensor, where: str) -> float:
            who = f"The vLLM server at {where}"
            return check_agreement(policy, engine_T, self._known.now_T, self._known.before_T, self.max_difference, who)

        run_in_thread(lambda: self._all(work, check))
        responses = [found for found in work.found if found is not None]
        return Generation(
            [ids for found in responses for ids in found.ids],
            [reason for found in responses for reason in found.reasons],
            sampling_logps_T=torch.tensor([value for found in responses for row in found.logps for value in row]),
            extra={
                "adapter": float(version.number),
                "difference": max(self._known.differences.values(), default=0.0),
                "retries": float(work.retries),
            },
        )

    # -- one batch ---------------------------------------------------------------------------------------------------

    async def _all(self, work: _Work, check: Any) -> None:
        """Every server at once until all is answered; raises where the deadline comes first."""
        begin = time.monotonic()
        work.open()
        serving = [asyncio.ensure_future(self._serve(i, work, check)) for i in range(len(self.urls))]
        finished = asyncio.ensure_future(work.finished.wait())
        try:
            while not work.finished.is_set():
                left = begin + self.deadline_s - time.monotonic()
                if left <= 0:
                    raise UserError(self._late(work))
                done, _ = await asyncio.wait([finished, *serving], timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {finished}:
                    task.result()  # raises what ended it
        finally:
            await end([finished, *serving])

    async def _serve(self, number: int, work: _Work, check: Any) -> None:
        """Give one server requests until nothing is left; where it fails, wait and bring it back."""
        where, pause = self.where[number], self.backoff_s
        async with self._client(self.urls[number]) as client:
            calls = Calls(self._openai, client, where, self._key, self.timeout_s)
            while not work.finished.is_set():
                try:
                    await self._bring(calls, work, check)
                    pause = self.backoff_s
                    await self._feed(calls, work)
                except Stopped as stopped:
                    trouble = stopped.trouble
                    self._ready.pop(where, None)  # it may come back without the adapters
                    work.note(where, trouble)
                    if trouble.kind == "refused" and trouble.status != 404:
                        raise UserError(f"The vLLM server at {where} refused a request ({trouble.detail}).") from None
                    await asyncio.sleep(trouble.wait if trouble.wait is not None else pause)
                    pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _bring(self, calls: Calls, work: _Work, check: Any) -> None:
        """See that the server has the version's adapters and scores known tokens as the trainer does."""
        version, temperature = work.version, work.sampling.temperature
        ready = self._ready.get(calls.where)
        if ready == (version.name, temperature):
            return
        models = await calls.models()
        lengths = [int(model["max_model_len"]) for model in models.values() if model.get("max_model_len")]
        check_lengths(work.prompts, work.sampling, min(lengths, default=None), f"the vLLM server at {calls.where}")
        if version.name not in models:
            try:
                await calls.load(version.name, str(version.folder))
            except Stopped as stopped:
                if stopped.trouble.kind != "refused":
                    raise
                raise UserError(
                    f"The vLLM server at {calls.where} does not load the adapters in {version.folder} "
                    f"({stopped.trouble.detail}): start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and "
                    f"--max-lora-rank {self.max_lora_rank}, and give rollout.engine.init_args.folder one that it can read."
                ) from None
        ids = self._known.ids
        scored = torch.tensor(await calls.known(version.name, ids))
        self._known.differences[calls.where] = check(scored, calls.where)
        if temperature not in (0.0, 1.0) and not await calls.scales_logprobs(version.name, ids, temperature):
            raise UserError(
                f"The vLLM server at {calls.where} gives log-probabilities at temperature 1, and rollout.temperature="
                f"{temperature}: start it with --logprobs-mode processed_logprobs."
            )
        if ready is not None and ready[0] != version.name:
            await calls.unload(ready[0])
        self._ready[calls.where] = (version.name, temperature)

    async def _feed(self, calls: Calls, work: _Work) -> None:
        """Keep as many requests under way as the server takes, until nothing is left or one of them fails."""
        failed: list[Stopped] = []

        async def worker() -> None:
            while (index := await work.take(lambda: bool(failed))) is not None:
                try:
                    seed = work.seed(index) if self.seeded else None
                    found = await calls.sample(
                        work.version.name, work.prompts[index], work.n, work.sampling, work.eos, seed
                    )
                except Stopped as stopped:
                    failed.append(stopped)
                    work.retries += 1
                    await work.give_back(index)
                except BaseException:
                    await work.give_back(index)
                    raise
                else:
                    await work.answer(index, found)

        workers = [asyncio.ensure_future(worker()) for _ in range(min(self.concurrency, len(work.prompts)))]
        try:
            await asyncio.gather(*workers)
        finally:
            await end(workers)
        if failed:
            raise failed[0]

    async def _forget(self, name: str) -> None:
        async def one(number: int) -> None:
            async with self._client(self.urls[number]) as client:
                await Calls(self._openai, client, self.where[number], self._key, 5.0).unload(name)

        await asyncio.gather(*(one(number) for number in range(len(self.urls))), return_exceptions=True)

    def _client(self, url: str) -> Any:
        # retries are ours, over all servers
        return self._openai.AsyncOpenAI(
            base_url=url, api_key=self._key or "none", max_retries=0, timeout=self.timeout_s
        )

    def _late(self, work: _Work) -> str:
        answered = sum(found is not None for found in work.found)
        last = "; ".join(f"{where}: {trouble.detail}" for where, trouble in work.troubles.items()) or "none failed"
        return (
            f"The vLLM servers answered {answered} of {len(work.prompts)} prompts within "
            f"rollout.engine.init_args.deadline_s={self.deadline_s:g} ({last}): see to them and go on with --ckpt_path last, "
            "or raise deadline_s."
        )


class _Work:
    """The prompts of one batch, which of them are under way, and what came of them."""

    def __init__(
        self,
        version: Version,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        eos: list[int],
        progress: Progress | None,
    ) -> None:
        self.version, self.prompts, self.n, self.sampling, self.eos = version, list(prompts), n, sampling, eos
        self.found: list[Responses | None] = [None] * len(self.prompts)
        self.troubles: dict[str, Trouble] = {}
        self.retries = 0
        self._waiting = deque(range(len(self.prompts)))
        self._progress = progress

    def open(self) -> None:
        """In the loop that works on it."""
        self.finished = asyncio.Event()
        self._changed = asyncio.Condition()
        if not self.prompts:
            self.finished.set()

    def seed(self, index: int) -> int:
        """Of a prompt: the same whichever server draws it."""
        return (self.sampling.seed + 1_000_003 * index) % 2**31

    async def take(self, failed: Callable[[], bool]) -> int | None:
        """The next prompt; None once all are answered, or the server that asks has failed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._waiting or self.finished.is_set() or failed())
            return self._waiting.popleft() if self._waiting and not failed() else None

    async def give_back(self, index: int) -> None:
        """It was not answered: the next who has room asks it again, before the others."""
        async with self._changed:
            self._waiting.appendleft(index)
            self._changed.notify_all()  # also those of a server that has failed, which stop

    async def answer(self, index: int, found: Responses) -> None:
        """It was."""
        async with self._changed:
            self.found[index] = found
            done = sum(each is not None for each in self.found)
            if done == len(self.prompts):
                self.finished.set()
                self._changed.notify_all()
        if self._progress is not None:
            self._progress(done * self.n, len(self.prompts) * self.n)

    def note(self, where: str, trouble: Trouble) -> None:
        """The last trouble of a server, for the sentence at the deadline."""
        self.troubles[where] = trouble


def _is_first() -> bool:
    with suppress(ValueError, RuntimeError):
        return torch.distributed.get_rank() == 0
    return True
