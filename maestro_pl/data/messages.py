"""The forms in which people write a conversation, and the one form in which it travels: role and content."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from maestro_pl.rollout import Message

# ShareGPT's names of the roles; names that are not here stay as they are
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant", "observation": "tool"}

_LOOKS = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")

#: The longest text that is looked into for messages.
LONGEST = 2**20


def messages_in(text: str) -> list[Message] | None:
    """The chat messages that a text writes out, as JSON or as Python writes a list of dicts; None for any other text."""
    if len(text) > LONGEST or not text.lstrip().startswith("["):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return value if is_chat(value) else None
    return None


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role (ShareGPT: ``from``)."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in value)
    )


def looks_like_chat(text: str) -> bool:
    """Whether a text begins and ends as one that writes out messages, whether or not it can be read."""
    return bool(_LOOKS.match(text)) and text.rstrip()[-1:] in ("]", "}")


def plain_message(message: Any, place: int) -> Message:
    """A message with a role and a text, out of that form, ShareGPT's, or one whose content has several parts.

    Args:
        message: as the data has it.
        place: of the message in its prompt, from 1, for the error.

    Raises:
        ValueError: it is no message, or has content that is no text.
    """
    if isinstance(message, dict) and "role" not in message and isinstance(message.get("from"), str):
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": ROLES.get(message["from"], message["from"]), "content": message.get("value"), **rest}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"message {place} of the prompt is {short(message)}; expected {{role: ..., content: ...}}")
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": _joined(content, place)}
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, str):
        raise ValueError(f"the content of message {place} of the prompt is {short(content)}, not text")
    return message


def _joined(parts: list[Any], place: int) -> str:
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"message {place} of the prompt has a part of the type {kind!r}: only texts are supported")
        texts.append(text)
    return "\n".join(texts)


def short(value: object) -> str:
    """How a value is shown in an error: its repr, cut."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
