"""What to change where a run does not fit a card, in the order of least harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from maestro_pl.memory.estimate import Estimate, Workload, estimate, optimizer_memory

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
    for count in _smaller(workload.eval_batch_size, 1):
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
    for count in _smaller(min(rows, workload.group_size), 1):
        yield running(
            "rollout.max_batch", count, "the same results; a prompt is read again for each part of its group",
            max_batch=count,
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
    """The changes that make a workload fit a card, none of them idle or larger than needed, and the estimate with them.

    The fewest changes of the list that fit are looked for by halving it; then each, the more harmful first, is taken back
    or made milder where the rest is enough. Where nothing helps, all of them are returned, with an estimate that does not
    fit.
    """
    refused = ("model.policy.activation_offload", "model.policy.quantization") if workload.ranks > 1 else ()
    options = [change for change in changes(workload) if change.key not in refused]

    def tried(chosen: list[Change]) -> Estimate:
        return estimate(_applied(workload, chosen))

    if not (found := tried(_newest(options))).fits(card_gib):
        return _newest(options), found
    least, most = 0, len(options)
    while least < most:
        middle = (least + most) // 2
        if tried(_newest(options[:middle])).fits(card_gib):
            most = middle
        else:
            least = middle + 1
    chosen = _newest(options[:most])
    for change in list(reversed(chosen))[1:]:
        milder = [other for other in options[: options.index(change)] if other.key == change.key]
        for one in ([], *([other] for other in milder)):
            fewer = sorted([*(c for c in chosen if c is not change), *one], key=options.index)
            if tried(fewer).fits(card_gib):
                chosen = fewer
                break
    return chosen, tried(chosen)


def _newest(options: list[Change]) -> list[Change]:
    """The last change of each key."""
    newest: dict[str, Change] = {}
    for change in options:
        newest.pop(change.key, None)  # the newest stands last
        newest[change.key] = change
    return list(newest.values())


def _applied(workload: Workload, chosen: list[Change]) -> Workload:
    for change in chosen:
        workload = change.apply(workload)
    return workload


def _smaller(value: int, least: int) -> Iterator[int]:
    """Halves of a value down to ``least``, which comes last."""
    while value > least:
        value = max(value // 2, least)
        yield value
