"""A judge on this machine: a causal LM of transformers, greedy and batched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge.backend import Ask, Failure, OnReply, Outcome, Reply
from maestro_pl.policy.loading import eos_token_ids, load_model, load_tokenizer, resolve_model
from maestro_pl.rewards.preference import longest_input
from maestro_pl.rollout import Message


class LocalJudge:
    """Greedy replies of a causal LM, rendered with its chat template (plain text where it has none).

    Args:
        model: hub id or folder; ``sandbox`` is the tiny policy of the package.
        device: where it runs.
        dtype: of its weights; ``auto`` as they were saved.
        max_tokens: of a reply.
        batch_size: questions in one batch.
        trust_remote_code: run the modelling code that comes with the weights.

    Raises:
        UserError: the model or its tokenizer cannot be loaded.
    """

    samples = False

    def __init__(
        self,
        model: str,
        *,
        device: torch.device | str = "cpu",
        dtype: str = "auto",
        max_tokens: int = 512,
        batch_size: int = 8,
        trust_remote_code: bool = False,
    ) -> None:
        self.name, self.max_tokens, self.batch_size = model, max_tokens, batch_size
        self.dtype = dtype
        folder = resolve_model(model)
        try:
            self.tokenizer = load_tokenizer(folder, trust_remote_code)
            chosen = dtype if dtype == "auto" else getattr(torch, dtype)
            loaded = load_model(folder, dtype=chosen, trust_remote_code=trust_remote_code)
        except UserError as error:
            raise UserError(f"The judge: {str(error).replace('under model.policy.model', 'as its model')}") from error
        self.model: Any = loaded.to(device).eval().requires_grad_(False)
        self.eos_ids = eos_token_ids(self.tokenizer, self.model)
        self.limit = longest_input(self.model, self.tokenizer)

    @property
    def identity(self) -> list[object]:
        """See :class:`JudgeBackend`."""
        return ["local", self.name, self.dtype, self.max_tokens]

    def begin(self) -> None:
        """See :class:`JudgeBackend`."""

    def complete(self, asks: Sequence[Ask], on_reply: OnReply) -> list[Outcome]:
        """See :class:`JudgeBackend`; a prompt that leaves no room for a reply is a failure ``too_long``."""
        ids = [self._encode(ask.messages) for ask in asks]
        room = None if self.limit is None else self.limit - self.max_tokens
        outcomes: list[Outcome] = [
            Failure(
                "too_long", f"{len(row)} tokens, and the model takes {self.limit} with the reply's {self.max_tokens}"
            )
            for row in ids
        ]
        order = sorted((i for i, row in enumerate(ids) if room is None or len(row) <= room), key=lambda i: -len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            for index, reply in zip(chosen, self._generate([ids[i] for i in chosen]), strict=True):
                outcomes[index] = reply
                on_reply(index, reply)
        return outcomes

    def _encode(self, messages: list[Message]) -> list[int]:
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(str(message["content"]) for message in messages) + "\n\n"
            return list(self.tokenizer(text, verbose=False)["input_ids"])
        text = self._render(messages)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, messages: list[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            if messages[0]["role"] != "system":
                raise UserError(f"The chat template of the judge {self.name!r} refuses its prompt: {error}.") from error
        # some templates (Gemma's) know no system message
        content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        return self._render([{**messages[1], "content": content}, *messages[2:]])

    @torch.no_grad()
    def _generate(self, rows: list[list[int]]) -> list[Reply]:
        from transformers import GenerationConfig

        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.eos_ids or [0])[0]
        width = max(map(len, rows))
        device = self.model.device
        input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        self.model.generation_config = GenerationConfig()  # none of the model's own sampling defaults
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_tokens,
            eos_token_id=self.eos_ids or None,
            pad_token_id=pad,
            use_cache=True,
        )
        made = self.model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
        return [self._reply(len(row), new) for row, new in zip(rows, made[:, width:].tolist(), strict=True)]

    def _reply(self, tokens_in: int, new: list[int]) -> Reply:
        end = next((i for i, token in enumerate(new) if token in self.eos_ids), len(new))
        return Reply(str(self.tokenizer.decode(new[:end], skip_special_tokens=True)), tokens_in, min(end + 1, len(new)))
