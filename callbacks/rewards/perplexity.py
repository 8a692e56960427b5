"""PerplexityReward: how probable the policy finds the reference answer after the response's reasoning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice, check_number, check_tags
from maestro_pl.errors import UserError
from maestro_pl.policy.scoring import evaluating
from maestro_pl.rewards.perplexity import (
    THINK_SLOT,
    InvalidFormat,
    nover_log_perplexity,
    nover_perplexity,
    reasoning_of,
    reference_context,
)
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

PerplexityModel: TypeAlias = Literal["policy", "reference"]
PerplexityScore: TypeAlias = Literal["perplexity", "log"]


class PerplexityReward(Reward):
    """Minus NOVER's perplexity of the reference given the prompt and the response's reasoning.

    The perplexities of all responses are also left in ``rollout.perplexities[name]`` (a float tensor of B, NaN where there is
    none), for the efficiency mode of :class:`LengthReward`. A response without a reference is not scored.

    Args:
        model: whose probabilities: the ``policy`` itself, or its ``reference`` (NOVER's slowly synced proxy is
            ``model.policy.reference: synced``).
        invalid: a response without the format counts as reasoning as a ``whole`` (its tags left out), or gets no score
            (``none``). ``whole`` is the default, because no response can then escape the reward by breaking the format,
            and a model that does not know the format yet learns from the first step; NOVER's rule that only formatted
            responses count is the role ``gate`` of :class:`FormatReward`.
        score: ``perplexity`` gives -P, ``log`` gives -log P. The same order, hence the same ranks; without rank
            normalisation ``log`` is the tamer one.
        template: the text between prompt and reference, with the slot ``{think}``; default: the two tags, without the
            opening one if the prompt has it already.
        column: the data column with the reference text.
        max_tokens: padded tokens of one forward pass; default: the module's ``micro_batch_tokens``.
        think_tag: name of the reasoning tag.
        answer_tag: name of the answer tag.
        think_in_prompt: the chat template opens the think block.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`; NOVER and the paper rank this reward inside the group.
        tasks: see :class:`Reward`.

    Raises:
        UserError: an unknown option, ``max_tokens`` below 1, or a template without ``{think}``.
    """

    default_name = "perplexity"

    def __init__(
        self,
        *,
        model: PerplexityModel = "policy",
        invalid: InvalidFormat = "whole",
        score: PerplexityScore = "perplexity",
        template: str = "",  # not `str | None`: jsonargparse would take a text that begins with # for null
        column: str = "reference",
        max_tokens: int | None = None,
        think_tag: str = "think",
        answer_tag: str = "answer",
        think_in_prompt: bool = False,
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "rank",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_choice("PerplexityReward", "model", model, PerplexityModel)
        check_choice("PerplexityReward", "invalid", invalid, InvalidFormat)
        check_choice("PerplexityReward", "score", score, PerplexityScore)
        check_tags("PerplexityReward", think_tag, answer_tag)
        if max_tokens is not None:
            check_number("PerplexityReward", "max_tokens", max_tokens, at_least=1, integer=True)
        if not template:
            template = f"{'' if think_in_prompt else f'<{think_tag}>'}{THINK_SLOT}</{think_tag}><{answer_tag}>"
        if THINK_SLOT not in template:
            raise UserError(
                f"PerplexityReward: the template {template!r} has no {THINK_SLOT}: mark with it where the reasoning goes."
            )
        self.model, self.invalid, self.kind = model, invalid, score
        self.template, self.column, self.max_tokens = template, column, max_tokens
        self.think_tag, self.answer_tag, self.think_in_prompt = think_tag, answer_tag, think_in_prompt

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[float | None]:
        """Minus P (or minus log P) of each response's reference."""
        encode = pl_module.policy.encode
        references = rollout.per_response(self.column)
        scored: list[int] = []
        prompts: list[list[int]] = []
        contexts: list[list[int]] = []
        targets: list[list[int]] = []
        think_lengths: list[int] = []
        for row in rows:
            think = self._reasoning(rollout.responses[row])
            target = encode(self._reference_text(rollout, row, references[row]))
            if think is None or not target:
                continue
            scored.append(row)
            prompts.append(rollout.prompt_ids[row // rollout.group_size])
            contexts.append(encode(reference_context(think, self.template)))
            targets.append(target)
            think_lengths.append(len(encode(think)))
        perplexities = torch.full((len(rollout),), float("nan"))
        scores: dict[int, float] = {}
        logps = self._logps(pl_module, prompts, contexts, targets) if scored else []
        for row, values, length in zip(scored, logps, think_lengths, strict=True):
            # a score must be finite in float32: beyond it the perplexity stays at the largest
            perplexities[row] = min(nover_perplexity(values, len(values), length), torch.finfo(torch.float32).max)
            log_form = self.kind == "log"
            scores[row] = -nover_log_perplexity(values, len(values), length) if log_form else -float(perplexities[row])
        rollout.perplexities[self.name] = perplexities
        return [scores.get(row) for row in rows]

    def _reasoning(self, response: str) -> str | None:
        return reasoning_of(
            response,
            think_tag=self.think_tag,
            answer_tag=self.answer_tag,
            think_in_prompt=self.think_in_prompt,
            invalid=self.invalid,
        )

    def _reference_text(self, rollout: Rollout, row: int, reference: object) -> str:
        if reference is None:
            return ""
        if not isinstance(reference, str):
            raise UserError(
                f"Reward {self.name!r} reads one reference text from the column {self.column!r}, and found "
                f"{reference!r} ({type(reference).__name__}) for {self.describe(rollout, row)}: name a column of texts."
            )
        return reference

    def _logps(
        self, pl_module: MaestroModule, prompts: list[list[int]], contexts: list[list[int]], targets: list[list[int]]
    ) -> list[list[float]]:
        """Log-probabilities of each target's tokens after prompt and context; a group's prompt is read once."""
        lengths = [len(target) for target in targets]
        with evaluating(pl_module.policy), pl_module.trainer.precision_plugin.forward_context():
            statistics = pl_module.policy.token_statistics(
                prompts,
                [context + target for context, target in zip(contexts, targets, strict=True)],
                which=self.model,
                max_tokens=self.max_tokens or pl_module.micro_batch_tokens,
                tails_B=lengths,
            )
        return [part.tolist() for part in torch.split(statistics.logps_T.float().cpu(), lengths)]
