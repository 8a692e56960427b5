"""What to change where a run does not fit a card, in the order of least harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from maestro_pl.memory.estimate import Estimate, Workload, estimate, optimizer_memory
from maestro_pl.memory.shadow import Shadow

CARDS = (8, 12, 16, 24, 48, 80)  # GiB


@dataclass(frozen=True)
class Change:
    """One change of a config.

    Attributes:
        key: of the config.
        value: to give it.
        cost: what it costs, in words.
        apply: the workload with it.
    """

    key: str
    value: Any
    cost: str
    apply: Callable[[Workload], Workload]

    def __str__(self) -> str:
        return f"{self.key}={self.value}: {self.cost}"


def changes(workload: Workload) -> Iterator[Change]:
    """Everything that can be changed about a workload, the least harmful first."""
    model = workload.model

    def setting(key: str, value: Any, cost: str, **of_model: Any) -> Change:
        return Change(f"model.policy.{key}", value, cost, lambda w: replace(w, model=replace(w.model, **of_model)))

    def running(key: str, value: Any, cost: str, **fields: Any) -> Change:
        return Change(key, value, cost, lambda w: replace(w, **fields))

    if not model.gradient_checkpointing:
        yield setting(
            "gradient_checkpointing", "true", "the same results; the update computes its forward twice",
            gradient_checkpointing=True,
        )  # fmt: skip
    if workload.eval_batch_size > 1 and workload.eval_batch_size * workload.eval_group_size > workload.group_size:
        least = max(1, workload.group_size // workload.eval_group_size)
        for count in _smaller(workload.eval_batch_size, least):
            yield running(
                "data.eval_batch_size", count, "the same results but for their random numbers", eval_batch_size=count
            )
    group, response = workload.group_tokens, workload.max_prompt_tokens + workload.max_new_tokens
    for tokens in _smaller(min(workload.micro_batch_tokens, workload.batch_size * group), group):
        yield running(
            "model.micro_batch_tokens", tokens, "the same results; more and shorter passes", micro_batch_tokens=tokens
        )
    if workload.score_tokens > group:
        yield running("rollout.score_tokens", group, "the same results; more and shorter passes", score_tokens=group)
    rows = min(workload.max_batch or 10**9, workload.batch_size * workload.group_size)
    for count in _smaller(rows, workload.group_size):
        yield running(
            "rollout.max_batch", count, "the same results; fewer responses are decoded at once", max_batch=count
        )
    for tokens in () if workload.whole_groups else _smaller(group, response):
        yield running(
            "model.micro_batch_tokens", tokens, "the same results; groups are cut and their prompts read again",
            micro_batch_tokens=tokens,
        )  # fmt: skip
    if not model.activation_offload:
        yield setting(
            "activation_offload", "true (with gradient_checkpointing)", "the same results; waits for the host's memory",
            activation_offload=True, gradient_checkpointing=True,
        )  # fmt: skip
    if not workload.optimizer.paged:
        yield running(
            "model.optimizer", "bitsandbytes.optim.PagedAdamW8bit", "its states are rounded to 8 bits",
            optimizer=optimizer_memory("bitsandbytes.optim.PagedAdamW8bit"),
        )  # fmt: skip
    if model.quantization in ("none", "int8") and model.lora is not None:
        yield setting("quantization", "nf4", "the base is rounded to 4 bits (QLoRA)", quantization="nf4")
    if workload.group_size > 4:
        yield running("rollout.group_size", 4, "another experiment: noisier advantages", group_size=4)
    for tokens in _smaller(workload.max_new_tokens, 128):
        yield running("rollout.max_new_tokens", tokens, "another experiment: shorter responses", max_new_tokens=tokens)
    for tokens in _smaller(workload.max_prompt_tokens, 128):
        yield running("data.max_prompt_tokens", tokens, "another experiment: shorter prompts", max_prompt_tokens=tokens)


def to_fit(workload: Workload, card_gib: float) -> tuple[list[Change], Estimate]:
    """The changes that make a workload fit a card, none of them idle, and the estimate with them.

    Changes are tried one after the other; once it fits, those that turn out not to be needed are taken back, the more
    harmful first. Where nothing helps, all of them are returned, with an estimate that does not fit.
    """
    chosen: list[Change] = []
    latest: dict[str, Change] = {}
    shadows: dict[str, Shadow] = {}
    found = estimate(workload, shadows)
    for change in changes(workload):
        if found.fits(card_gib):
            break
        latest.pop(change.key, None)  # the newest change stands last
        latest[change.key] = change
        chosen = list(latest.values())
        found = estimate(_applied(workload, chosen), shadows)
    if not found.fits(card_gib):
        return chosen, found
    for change in list(reversed(chosen))[1:]:
        fewer = [other for other in chosen if other is not change]
        without = estimate(_applied(workload, fewer), shadows)
        if without.fits(card_gib):
            chosen, found = fewer, without
    return chosen, found


def _applied(workload: Workload, chosen: list[Change]) -> Workload:
    for change in chosen:
        workload = change.apply(workload)
    return workload


def _smaller(value: int, least: int) -> Iterator[int]:
    """Halves of a value down to ``least``, which comes last."""
    while value > least:
        value = max(value // 2, least)
        yield value
