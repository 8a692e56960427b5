"""Prompts to the text and the token ids that the policy reads."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from maestro_pl.data.problems import BadRowPolicy, Problems
from maestro_pl.data.rows import Row
from maestro_pl.errors import UserError
from maestro_pl.rollout import Message, Prompt

Overlong: TypeAlias = Literal["error", "drop", "truncate_left"]


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
    tokenizer without a chat template gets the plain text, after its beginning-of-sequence token if it has the habit.

    Attributes:
        tokenizer: a tokenizer of transformers.
        system_prompt: the system message, or an empty text for none.
        chat_template_kwargs: passed on to the chat template (for instance ``{"enable_thinking": False}``).
        max_prompt_tokens: the longest prompt allowed, in tokens of the rendered text; None: any length.
        overlong: what happens to longer ones. ``truncate_left`` takes words off the beginning of the last user message
            and renders again, so that the template stays whole.
    """

    tokenizer: Any
    system_prompt: str = ""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    overlong: Overlong = "error"

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
        if not self.system_prompt or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def text(self, prompt: Prompt) -> str:
        """The prompt as the policy reads it, the turn handed over to the assistant.

        Raises:
            ValueError: the chat template refuses the messages.
        """
        messages = self.messages(prompt)
        if not self.has_template:
            return self._bos + "\n\n".join(str(message["content"]) for message in messages)
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return str(rendered)

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
                texts.append(self.text(row.prompt))
            except ValueError as error:
                texts.append(None)
                refused.add(row.file, row.number, str(error))
        refused.settle(on_bad_row, len(rows))
        kept = [(row, text) for row, text in zip(rows, texts, strict=True) if text is not None]
        all_ids = self.encode([text for _, text in kept]) if kept else []
        rendered = [RenderedPrompt(row, text, array("i", ids)) for (row, text), ids in zip(kept, all_ids, strict=True)]
        return self._shorten(rendered, split, on_bad_row)

    def _shorten(self, prompts: list[RenderedPrompt], split: str, on_bad_row: BadRowPolicy) -> list[RenderedPrompt]:
        limit = self.max_prompt_tokens
        if limit is None or all(len(prompt.ids) <= limit for prompt in prompts):
            return prompts
        remedy = "Raise data.max_prompt_tokens, or set data.overlong: drop or truncate_left."
        long = Problems(f"of {split} have prompts of more than max_prompt_tokens={limit} tokens", remedy)
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
        if messages[-1]["role"] != "user":
            return None
        content = messages[-1]["content"]
        while content.strip():
            text = self.text([*messages[:-1], {**messages[-1], "content": content}])
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


def check_limits(max_prompt_tokens: int | None) -> None:
    """Raise a ``UserError`` for a token limit that no prompt can meet."""
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise UserError(f"data.max_prompt_tokens is {max_prompt_tokens}; expected at least 1, or null for no limit.")
