"""The format reward: exactly one think block and then one answer block, and the parser that other rewards read with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class ParsedResponse:
    """The parts of a response.

    Attributes:
        think: the stripped text of the think block; ``None`` where there is not exactly one closed block.
        answer: the stripped text of the answer block; ``None`` where there is not exactly one closed block.
        valid: the response is exactly one think block and then one answer block.
    """

    think: str | None
    answer: str | None
    valid: bool


def parse_response(
    text: str, *, think_tag: str = "think", answer_tag: str = "answer", think_in_prompt: bool = False
) -> ParsedResponse:
    """Split a response into its reasoning and its answer.

    A block is found also where the whole is not valid (an answer block with prose around it), so that rewards can read
    what is there.

    Args:
        text: the response.
        think_tag: name of the reasoning tag.
        answer_tag: name of the answer tag.
        think_in_prompt: the chat template has opened the think block already: the response starts inside it.
    """
    text = text.strip()
    if think_in_prompt:
        text = f"<{think_tag}>{text}"
    counts = [text.count(tag) for name in (think_tag, answer_tag) for tag in (f"<{name}>", f"</{name}>")]
    whole = _whole_pattern(think_tag, answer_tag).fullmatch(text) if counts == [1, 1, 1, 1] else None
    if whole:
        return ParsedResponse(whole["think"].strip(), whole["answer"].strip(), True)
    return ParsedResponse(_block(text, think_tag), _block(text, answer_tag), False)


def format_score(
    text: str,
    *,
    think_tag: str = "think",
    answer_tag: str = "answer",
    think_in_prompt: bool = False,
    allow_empty: bool = True,
) -> float:
    """1 where the stripped text is exactly ``<think>..</think><answer>..</answer>``, else 0 (NOVER's format reward).

    White space between the blocks is allowed; a tag that stands twice, in the wrong order or inside the other block is
    not.

    Args:
        text: the response.
        think_tag: name of the reasoning tag.
        answer_tag: name of the answer tag.
        think_in_prompt: the chat template has opened the think block already.
        allow_empty: count empty blocks as well, as NOVER does.
    """
    parsed = parse_response(text, think_tag=think_tag, answer_tag=answer_tag, think_in_prompt=think_in_prompt)
    return float(parsed.valid and (allow_empty or bool(parsed.think and parsed.answer)))


@lru_cache(maxsize=16)
def _whole_pattern(think_tag: str, answer_tag: str) -> re.Pattern[str]:
    think, answer = re.escape(think_tag), re.escape(answer_tag)
    return re.compile(
        rf"<{think}>(?P<think>.*)</{think}>\s*<{answer}>(?P<answer>.*)</{answer}>",
        re.DOTALL,
    )


def _block(text: str, tag: str) -> str | None:
    """The text of the only closed block with this tag."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start, end = text.find(opening), text.find(closing)
    if text.count(opening) != 1 or text.count(closing) != 1 or end < start:
        return None
    return text[start + len(opening) : end].strip()
