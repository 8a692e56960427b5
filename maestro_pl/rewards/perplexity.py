"""The perplexity reward: how probable the reference answer is after the response's reasoning (NOVER, arXiv 2505.16022)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from maestro_pl.rewards.format import parse_response

InvalidFormat: TypeAlias = Literal["none", "whole"]

THINK_SLOT = "{think}"


def nover_perplexity(ref_logps: Sequence[float], len_ref: int, len_think: int) -> float:
    """Perplexity of the reference given prompt and reasoning, with NOVER's correction for the reasoning's length.

    ``P = exp(-sum_i log p(ref_i | prompt, think, ref_<i) / (len_ref * max(1, 1 + log10(max(len_think, 1)))))``; lower
    is better. The correction favours longer reasoning: 100 tokens divide the mean surprise by 3.

    Args:
        ref_logps: log-probabilities of the reference's tokens, in nats.
        len_ref: number of the reference's tokens, at least 1.
        len_think: number of the reasoning's tokens.

    Returns:
        P of at least 1, or infinity where it is beyond a float.
    """
    exponent = nover_log_perplexity(ref_logps, len_ref, len_think)
    return math.exp(exponent) if exponent < 709 else math.inf


def nover_log_perplexity(ref_logps: Sequence[float], len_ref: int, len_think: int) -> float:
    """The exponent of :func:`nover_perplexity`, log P in nats: the corrected mean surprise of a reference token."""
    correction = max(1.0, 1.0 + math.log10(max(len_think, 1)))
    return -math.fsum(ref_logps) / (len_ref * correction)


def reasoning_of(
    text: str,
    *,
    think_tag: str = "think",
    answer_tag: str = "answer",
    think_in_prompt: bool = False,
    invalid: InvalidFormat = "whole",
) -> str | None:
    """The text that counts as a response's reasoning.

    Args:
        text: the response.
        think_tag: name of the reasoning tag.
        answer_tag: name of the answer tag.
        think_in_prompt: the chat template has opened the think block already.
        invalid: what to do where the response has not the format: ``whole`` takes all of it without its tags, ``none``
            gives ``None``.
    """
    parsed = parse_response(text, think_tag=think_tag, answer_tag=answer_tag, think_in_prompt=think_in_prompt)
    if parsed.valid:
        return parsed.think
    if invalid == "none":
        return None
    return re.sub(rf"</?(?:{re.escape(think_tag)}|{re.escape(answer_tag)})>", " ", text).strip()


def reference_context(think: str, template: str = "<think>{think}</think><answer>") -> str:
    """The text between the prompt and the reference: the template with the reasoning in its ``{think}`` slot."""
    return template.replace(THINK_SLOT, think)
