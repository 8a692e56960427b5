"""The engine of one card: vLLM in the trainer's own process."""

from __future__ import annotations

import gc
import importlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from maestro_pl.errors import UserError
from maestro_pl.generation.adapter_files import AdapterFiles, Version
from maestro_pl.generation.agreement import KnownTokens, check_agreement
from maestro_pl.generation.engine import Engine, Generation, Progress, Sampling
from maestro_pl.generation.refusals import RANKS, check_lengths, check_policy, check_sampling
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import FinishReason
from maestro_pl.run.others import TimeLimit, kept_process, within
from maestro_pl.run.ranks import count_of

WHO = "VLLMEngine"
OURS = (
    "model",
    "dtype",
    "enable_lora",
    "max_lora_rank",
    "logprobs_mode",
    "quantization",
    "max_model_len",
    "enable_sleep_mode",
)


class VLLMEngine(Engine):
    """Samples with vLLM on the trainer's own card, in its process.

    vLLM holds a base of its own beside the trainer's. It sleeps between rollouts where the device lets it (CUDA, ROCm, XPU):
    its base then lies in host memory and its cache is gone, so that the update has the card. The adapters are written to
    memory (/dev/shm) after every step, under a new name and number; a few known tokens are scored on both sides each time.

    Args:
        memory_share: of the card that vLLM may hold while it samples (its ``gpu_memory_utilization``): base, cache and
            activations. ``maestro-pl estimate`` says what it needs.
        max_model_len: tokens of a prompt and its response at most; null: ``data.max_prompt_tokens`` and
            ``rollout.max_new_tokens``, or what the model knows.
        max_lora_rank: null: the smallest that vLLM has for ``model.policy.lora.r``.
        quantization: of vLLM's base; ``bitsandbytes`` for a policy in ``nf4``.
        sleep: between rollouts, where the device lets it.
        enforce_eager: no CUDA graphs and no compilation: begins at once, samples slower.
        folder: where adapters are written; null: memory.
        deadline_s: seconds that sampling a batch may take; then the run ends.
        start_s: seconds that vLLM may take to begin.
        max_difference: nats a token by which the known tokens may differ on average; null: 0.001 for a policy in float32,
            0.1 in 16 bits.
        seeded: give each prompt a seed, so that a batch is drawn from the same random numbers when it is drawn again; false
            is faster in large batches on a GPU.
        options: further arguments of ``vllm.LLM``.

    Raises:
        UserError: a value out of its range, or an option that is an argument here.
    """

    def __init__(
        self,
        memory_share: float = 0.3,
        max_model_len: int | None = None,
        max_lora_rank: int | None = None,
        quantization: str | None = None,
        sleep: bool = True,
        enforce_eager: bool = False,
        folder: str | None = None,
        deadline_s: float = 1800.0,
        start_s: float = 1800.0,
        max_difference: float | None = None,
        seeded: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not 0 < memory_share < 1:
            raise UserError(
                f"rollout.engine.init_args.memory_share={memory_share}: expected a share of the card in (0, 1)."
            )
        for name, value in (("deadline_s", deadline_s), ("start_s", start_s)):
            if not value > 0:
                raise UserError(f"rollout.engine.init_args.{name}={value}: expected a number above 0.")
        self.options = dict(options or {})
        if ours := [name for name in OURS if name in self.options]:
            raise UserError(
                f"rollout.engine.init_args.options holds {ours[0]!r}, which the policy or another argument decides: take it "
                "out."
            )
        self.memory_share, self.max_model_len, self.max_lora_rank = memory_share, max_model_len, max_lora_rank
        self.quantization, self.sleep, self.enforce_eager = quantization, sleep, enforce_eager
        self.deadline_s, self.start_s = deadline_s, start_s
        self.max_difference, self.seeded = max_difference, seeded
        self._files = AdapterFiles(folder)
        self._known = KnownTokens()
        self._llm: Any = None
        self._sleeps = False
        self._hangs = False  # it did not come back: whatever else it is asked, it will not answer
        self._lent: int | None = None  # tokens of a prompt and its response, from the run's own limits
        self._asked = 0  # requests, which have a number each

    def prepare(self, policy: LoRAPolicy, sampling: Sampling, max_prompt_tokens: int | None = None) -> None:
        """See :class:`maestro_pl.generation.Engine`."""
        check_policy(policy, WHO, self.rank_of(policy), self.quantization)
        check_sampling(sampling, WHO)
        if count_of() > 1:
            raise UserError(
                f"rollout.engine={WHO} samples on one card, and this run has {count_of()} ranks: start vLLM servers and give "
                "rollout.engine=maestro_pl.VLLMServerEngine (docs/scale.md)."
            )
        _import("vllm")
        if max_prompt_tokens is not None:
            self._lent = max_prompt_tokens + sampling.max_new_tokens

    def rank_of(self, policy: LoRAPolicy) -> int:
        """The rank of adapters that vLLM makes room for."""
        rank = 1 if policy.lora is None else policy.lora.r
        return self.max_lora_rank or next((each for each in RANKS if each >= rank), rank)

    def close(self) -> None:
        """End vLLM, and remove the adapters' files."""
        llm, self._llm = self._llm, None
        if llm is not None:
            with suppress(Exception):  # what is left of it goes with the process
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
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
        """See :class:`maestro_pl.generation.Engine`.

        Raises:
            UserError: the deadline is over, vLLM fails, or its model is not the trainer's.
        """
        self.prepare(policy, sampling)
        self._hangs = False
        with kept_process(sampling.seed):  # vLLM seeds what it draws from
            self._wake(policy)
            check_lengths(prompt_ids, sampling, self._limit(), WHO)
            try:
                version = self._sync(policy)
                params = self._params(sampling, policy, n)
                requests = [
                    (ids, params(_seed(sampling, i) if self.seeded else None)) for i, ids in enumerate(prompt_ids)
                ]
                report = None if progress is None else (lambda done, total: progress(done * n, total * n))
                outputs = self._run(requests, version, report)
            finally:
                if not self._hangs:
                    self._rest()
        samples = [sample for output in outputs for sample in sorted(output.outputs, key=lambda each: int(each.index))]
        return Generation(
            [list(sample.token_ids) for sample in samples],
            [_reason(sample.finish_reason) for sample in samples],
            sampling_logps_T=torch.tensor([value for sample in samples for value in _logps(sample)]),
            extra={"adapter": float(version.number), "difference": self._known.differences.get(WHO, 0.0)},
        )

    # -- vLLM itself -------------------------------------------------------------------------------------------------

    def _wake(self, policy: LoRAPolicy) -> None:
        """Have it ready to sample."""
        if self._llm is None:
            self._llm = self._limited(partial(self._start, policy), self.start_s, "did not begin")
        elif self._sleeps:
            torch.cuda.empty_cache()  # what the update has freed and PyTorch still holds
            self._limited(self._llm.wake_up, self.start_s, "did not wake up")

    def _rest(self) -> None:
        if self._sleeps and self._llm is not None:
            # level 2 would throw the base away
            self._limited(partial(self._llm.sleep, level=1), self.start_s, "did not go to sleep")

    def _start(self, policy: LoRAPolicy) -> Any:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process
        vllm, platforms = _import("vllm"), _import("vllm.platforms")
        self._sleeps = self.sleep and bool(platforms.current_platform.is_sleep_mode_available())
        chosen: dict[str, Any] = {
            "model": policy.base_name,
            "tokenizer": policy.settings["tokenizer"] or policy.base_name,
            "dtype": policy.settings["dtype"],
            "trust_remote_code": policy.settings["trust_remote_code"],
            "revision": policy.settings["model_options"].get("revision"),
            "quantization": self.quantization,
            "gpu_memory_utilization": self.memory_share,
            "max_model_len": self.max_model_len or self._lent,
            "enable_lora": True,
            "max_lora_rank": self.rank_of(policy),
            "max_loras": 1,
            "logprobs_mode": "processed_logprobs",
            "enforce_eager": self.enforce_eager,
            "enable_sleep_mode": self._sleeps,
            "generation_config": "vllm",  # none of the model's own defaults of sampling
        }
        return vllm.LLM(**{name: value for name, value in chosen.items() if value is not None} | self.options)

    def _limit(self) -> int | None:
        length = getattr(getattr(self._llm.llm_engine, "model_config", None), "max_model_len", None)
        return None if length is None else int(length)

    def _sync(self, policy: LoRAPolicy) -> Version:
        """The policy's adapters in vLLM, checked where they are new."""
        version = self._files.current(policy)
        if not self._known.update(policy, version.name):
            return version
        vllm = _import("vllm")
        ids = self._known.ids
        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, output_kind=_final_only())
        (output,) = self._run([(ids, params)], version, None)
        scored = [float(entry[token].logprob) for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        self._known.differences[WHO] = check_agreement(
            policy,
            torch.tensor(scored),
            self._known.now_T,
            self._known.before_T,
            self.max_difference,
            f"rollout.engine={WHO}",
        )
        return version

    def _params(self, sampling: Sampling, policy: LoRAPolicy, n: int) -> Callable[[int | None], Any]:
        vllm = _import("vllm")
        return partial(_params_of, vllm.SamplingParams, sampling, list(policy.eos_token_ids), n)

    def _run(self, requests: list[tuple[list[int], Any]], version: Version, progress: Progress | None) -> list[Any]:
        """The outputs of some requests under these adapters, in order."""
        lora = _import("vllm.lora.request").LoRARequest(version.name, version.number, str(version.folder))
        run = partial(self._steps, requests, lora, progress)
        outputs: list[Any] = self._limited(run, self.deadline_s, "did not finish a batch")
        return outputs

    def _steps(self, requests: list[tuple[list[int], Any]], lora: Any, progress: Progress | None) -> list[Any]:
        engine = self._llm.llm_engine
        names = [str(self._asked + number) for number in range(len(requests))]
        self._asked += len(requests)
        done: dict[str, Any] = {}
        ends = time.monotonic() + self.deadline_s
        for name, (ids, params) in zip(names, requests, strict=True):
            engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=lora)
        while engine.has_unfinished_requests():
            if time.monotonic() > ends:
                engine.abort_request([name for name in names if name not in done])
                raise TimeLimit(self.deadline_s)
            for output in engine.step():
                if output.finished:
                    done[str(output.request_id)] = output
                    if progress is not None:
                        progress(len(done), len(requests))
        for output in done.values():
            if output.lora_request is not None and output.lora_request.lora_name != lora.lora_name:
                raise UserError(
                    f"rollout.engine={WHO} answered with the adapters {output.lora_request.lora_name!r} when asked for "
                    f"{lora.lora_name!r}: its answers are of another version."
                )
        return [done[name] for name in names]

    def _limited(self, call: Callable[[], Any], seconds: float, what: str) -> Any:
        try:
            return within(call, seconds)
        except TimeLimit as error:
            self._hangs = True
            raise UserError(
                f"rollout.engine={WHO} {what} within {seconds:g} s: go on with --ckpt_path last, and give more under "
                "rollout.engine.init_args (start_s, deadline_s) if it needs that."
            ) from error
        except UserError:
            raise
        except Exception as error:  # of whatever kind vLLM raises
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"rollout.engine={WHO} {what} ({type(error).__name__}: {text[:300]}).") from error


def _import(name: str) -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read on import; it would print its whole configuration
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"rollout.engine={WHO} needs vLLM, which cannot be imported here ({error}): pip install -e '.[vllm]' "
            "(docs/scale.md), or give rollout.engine=native."
        ) from error


def _final_only() -> Any:
    return _import("vllm.sampling_params").RequestOutputKind.FINAL_ONLY


def _params_of(make: Any, sampling: Sampling, eos: list[int], n: int, seed: int | None) -> Any:
    return make(
        n=n,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        temperature=sampling.temperature,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        stop=list(sampling.stop) or None,
        stop_token_ids=eos,
        skip_special_tokens=False,
        detokenize=bool(sampling.stop),
        logprobs=0,
        seed=seed,
        output_kind=_final_only(),
    )


def _seed(sampling: Sampling, index: int) -> int:
    return (sampling.seed + 1_000_003 * index) % 2**31


def _reason(reason: Any) -> FinishReason:
    if reason not in ("stop", "length"):
        raise UserError(f"rollout.engine={WHO} ended a response by {reason!r}, expected stop or length.")
    return "stop" if reason == "stop" else "length"


def _logps(sample: Any) -> list[float]:
    """The log-probability of each sampled token."""
    return [float(entry[token].logprob) for entry, token in zip(sample.logprobs, sample.token_ids, strict=True)]
