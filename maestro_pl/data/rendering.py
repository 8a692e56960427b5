"""Prompts to the text and the token ids that the policy reads."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from maestro_pl.data.problems import BadRowPolicy, Problems
from maestro_pl.data.rows import Row
from maestro_pl.errors import UserError
from maestro_pl.rollout import Message, Prompt

Overlong: TypeAlias = Literal["error", "drop", "truncate_left"]
SystemRole: TypeAlias = Literal["system", "user"]

# arguments of `apply_chat_template` that decide what it returns, or that come with the row
OURS = (
    "tokenize", "add_generation_prompt", "continue_final_message", "conversation", "messages", "tools", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip


@dataclass
class RenderedPrompt:
    """A row with the text and the token ids of its prompt (as a compact array: a list takes nine times the memory)."""

    row: Row
    text: str
    ids: array[int]


@dataclass
class PromptRenderer:
    """Renders prompts with the tokenizer's chat template, and keeps them within a number of tokens.

    A string becomes a user message; ``system_prompt`` is put in front of messages that have no system message. A
    tokenizer without a chat template gets the plain text, after its beginning-of-sequence token if it has the habit. A
    column ``tools`` is handed to the chat template.

    Attributes:
        tokenizer: a tokenizer of transformers.
        system_prompt: the system message, or an empty text for none.
        chat_template_kwargs: passed on to the chat template (for instance ``{"enable_thinking": False}``).
        max_prompt_tokens: the longest prompt allowed, in tokens of the rendered text; None: any length.
        overlong: what happens to longer ones. ``truncate_left`` takes words off the beginning of the last user message
            and renders again, so that the template stays whole.
        system_role: ``system``, or ``user``: system messages are put in front of the first user message, for a chat
            template that knows none.
        positions: the positions that the model has, None where that is not known. A prompt must leave one for a response.
    """

    tokenizer: Any
    system_prompt: str = ""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    overlong: Overlong = "error"
    system_role: SystemRole = "system"
    positions: int | None = None

    def __post_init__(self) -> None:
        self.has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if not self.has_template:
            rank_zero_info("The tokenizer has no chat template: prompts are rendered as plain text.")
        # a tokenizer that begins every text with BOS (Llama) expects it before plain text too; chat templates write it
        start = self.tokenizer("")["input_ids"][:1]
        begins = not self.has_template and start == [self.tokenizer.bos_token_id]
        self._bos = str(self.tokenizer.bos_token) if begins else ""

    def messages(self, prompt: Prompt) -> list[Message]:
        """The prompt as chat messages, the system prompt in front."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return _without_system(messages) if self.system_role == "user" else messages

    def text(self, prompt: Prompt, *, tools: Any = None, continues: bool = False) -> str:
        """The prompt as the policy reads it, the turn handed over to the assistant.

        Args:
            prompt: a text or chat messages.
            tools: for the chat template: a list of JSON schemas, or its text; None for none.
            continues: the last message is the beginning of the assistant's answer, and is left open.

        Raises:
            ValueError: the chat template refuses the messages, or the tools are no list.
        """
        messages = self.messages(prompt)
        given = {} if tools is None else {"tools": _read_tools(tools)}
        if not self.has_template:
            return self._bos + "\n\n".join(str(message["content"]) for message in messages)
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not continues,
                **({"continue_final_message": True} if continues else {}),
                **given,
                **self.chat_template_kwargs,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return str(rendered)

    def text_of(self, row: Row, prompt: Prompt | None = None) -> str:
        """The text of a row, or of another prompt in its place.

        Raises:
            ValueError: as :meth:`text`.
        """
        prompt = row.prompt if prompt is None else prompt
        if row.rendered and isinstance(prompt, str):
            return prompt
        return self.text(prompt, tools=row.values.get("tools"), continues=row.continues)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts; the template has written the special tokens, so none are added."""
        # verbose=False: what is too long is our own message, not the tokenizer's
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def render(self, rows: Sequence[Row], split: str, on_bad_row: BadRowPolicy = "error") -> list[RenderedPrompt]:
        """Render all rows of a split.

        Args:
            rows: what to render.
            split: its name, for messages.
            on_bad_row: what to do with rows that the chat template refuses.

        Raises:
            UserError: a template refuses a row, or a prompt is too long, and the policy says ``error``.
        """
        refused = Problems(f"of {split} cannot be rendered", "Mend them, or set data.on_bad_row: drop.")
        texts: list[str | None] = []
        for row in rows:
            try:
                texts.append(self.text_of(row))
            except ValueError as error:
                texts.append(None)
                refused.add(row.file, row.number, str(error))
        if refused:
            self._check_system_role(next(row for row, text in zip(rows, texts, strict=True) if text is None))
        refused.settle("error" if len(refused) == len(rows) else on_bad_row, len(rows))
        self._warn(rows, texts, split)
        kept = [(row, text) for row, text in zip(rows, texts, strict=True) if text is not None]
        all_ids = self.encode([text for _, text in kept]) if kept else []
        rendered = [RenderedPrompt(row, text, array("i", ids)) for (row, text), ids in zip(kept, all_ids, strict=True)]
        return self._shorten(rendered, split, on_bad_row)

    def _check_system_role(self, row: Row) -> None:
        """Say so where the chat template refuses our own system prompt: the rows cannot be mended.

        Raises:
            UserError: without the system prompt the template takes the row.
        """
        if not self.system_prompt or self.system_role == "user":
            return
        try:
            replace(self, system_role="user").text_of(row)
        except ValueError:  # refused for another reason, which the row's own sentence tells
            return
        raise UserError(
            "The tokenizer's chat template refuses a system message, and data.system_prompt is set: set data.system_role: user "
            "to put it in front of the first user message, or leave it out."
        )

    def _warn(self, rows: Sequence[Row], texts: Sequence[str | None], split: str) -> None:
        """Warn of prompts that are rendered already, and of what the chat template leaves out."""
        if not self.has_template:
            return
        marks = _special_tokens(self.tokenizer)
        given = [row for row in rows if not row.rendered and any(mark in _written(row.prompt) for mark in marks)]
        if given:
            mark = next(mark for mark in marks if mark in _written(given[0].prompt))
            rank_zero_warn(
                f"{len(given)} of {len(rows)} {split} prompts hold special tokens of the tokenizer, such as {mark!r} at "
                f"{given[0].file}:{given[0].number}: if they are rendered already, the chat template wraps them once more. Set "
                "prompt_form: rendered on their source, or give messages."
            )
        row, text = next(((row, text) for row, text in zip(rows, texts, strict=True) if text is not None), (None, None))
        if row is None or text is None or row.rendered:
            return
        system = [str(m["content"]).strip() for m in self.messages(row.prompt) if m["role"] == "system"]
        if any(content and content not in text for content in system):
            rank_zero_warn(
                "The chat template leaves the system message out of the prompt: set data.system_role: user to put it in front "
                "of the first user message."
            )
        called = next((row for row in rows if row.values.get("tools") is not None), None)
        if called is not None and not called.rendered and self.text_of(called) == self.text(called.prompt):
            rank_zero_warn(f"The rows have a column tools, which the chat template leaves out ({called.file}).")

    def _shorten(self, prompts: list[RenderedPrompt], split: str, on_bad_row: BadRowPolicy) -> list[RenderedPrompt]:
        limit, what = self.max_prompt_tokens, f"max_prompt_tokens={self.max_prompt_tokens} tokens"
        remedy = "Raise data.max_prompt_tokens, or set data.overlong: drop or truncate_left."
        if self.positions is not None and (limit is None or limit >= self.positions):
            limit = self.positions - 1
            what = f"{limit} tokens, and the model has {self.positions} positions"
            remedy = "Shorten them, or set data.overlong: drop or truncate_left."
        if limit is None or all(len(prompt.ids) <= limit for prompt in prompts):
            return prompts
        long = Problems(f"of {split} have prompts of more than {what}", remedy)
        kept, cut = [], 0
        for prompt in prompts:
            if len(prompt.ids) <= limit:
                kept.append(prompt)
            elif self.overlong == "truncate_left" and (shorter := self.truncate(prompt.row, limit)):
                kept.append(shorter)
                cut += 1
            else:
                room = "; nothing is left to take from its last user message" * (self.overlong == "truncate_left")
                long.add(prompt.row.file, prompt.row.number, f"{len(prompt.ids)} tokens{room}")
        long.settle(on_bad_row if self.overlong == "truncate_left" else self.overlong, len(prompts))
        if cut:
            rank_zero_warn(f"{cut} of {len(prompts)} {split} prompts were cut on the left to {limit} tokens.")
        return kept

    def truncate(self, row: Row, limit: int) -> RenderedPrompt | None:
        """The prompt with as much of the end of its last user message as fits, or None if not a word of it does."""
        prompt = row.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if messages[-1]["role"] != "user" or row.rendered:
            return None
        content = messages[-1]["content"]
        while content.strip():
            text = self.text_of(row, [*messages[:-1], {**messages[-1], "content": content}])
            ids = self.encode([text])[0]
            if len(ids) <= limit:
                return RenderedPrompt(row, text, array("i", ids))
            content = self._without_first(content, len(ids) - limit)
        return None

    def _without_first(self, content: str, tokens: int) -> str:
        """The text without its first tokens; cut at a character, so no token is decoded by half."""
        if not self.tokenizer.is_fast:
            ids = self.encode([content])[0][tokens:]
            return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)).lstrip("\ufffd")
        offsets = self.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = offsets["offset_mapping"]
        return content[max(1, spans[tokens][0]) :] if tokens < len(spans) else ""


def _without_system(messages: list[Message]) -> list[Message]:
    """The messages with what the system says in front of the first user message; a user message of its own if none is."""
    said = [str(message["content"]) for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    if not said:
        return messages
    first = next((place for place, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(said)}, *rest]
    user = {**rest[first], "content": "\n\n".join([*said, str(rest[first]["content"])])}
    return [*rest[:first], user, *rest[first + 1 :]]


def _read_tools(tools: Any) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools is a text that is not JSON: {error}") from error
    if not isinstance(tools, list):
        raise ValueError(f"tools is a {type(tools).__name__}, expected a list of JSON schemas")
    return tools


def _special_tokens(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [token.content for token in added if token.special and len(token.content) > 2]


def _written(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` for arguments of ``apply_chat_template`` that are ours to give."""
    for name in OURS:
        if name in kwargs:
            raise UserError(
                f"data.chat_template_kwargs has {name}, which is not the chat template's but ours; leave it out. It takes what "
                "the template reads, for instance {enable_thinking: false}."
            )


def check_limits(max_prompt_tokens: int | None) -> None:
    """Raise a ``UserError`` for a token limit that no prompt can meet."""
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise UserError(f"data.max_prompt_tokens is {max_prompt_tokens}; expected at least 1, or null for no limit.")
