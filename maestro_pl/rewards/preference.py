"""The preference reward: a pretrained reward model's score of (prompt, response)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from maestro_pl.errors import UserError
from maestro_pl.rollout import Message, Prompt
from maestro_pl.run.pretrained import NotLoaded, pretrained_model, pretrained_tokenizer

PairTemplate: TypeAlias = Literal["chat", "concat"]
PreferenceDType: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Encoded: TypeAlias = dict[str, list[int]]


@dataclass
class PairScorer:
    """Scores pairs of prompt and response with a sequence classifier of one label.

    Attributes:
        model: in eval mode, without gradients.
        tokenizer: the model's own.
        template: ``chat`` renders user and assistant turns with the tokenizer's chat template, ``concat`` encodes the
            prompt, a newline and the response.
        batch_size: pairs in one forward pass.
        max_length: tokens of a pair; a longer one loses the beginning of its prompt. ``None``: no limit.
    """

    model: Any
    tokenizer: Any
    template: PairTemplate = "chat"
    batch_size: int = 8
    max_length: int | None = None

    def __post_init__(self) -> None:
        self.pad_id: int | None = self.model.config.get_text_config().pad_token_id

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score pairs, the longest first, so that a batch holds pairs of similar length.

        Args:
            prompts: as the data gave them, strings or chat messages.
            responses: one for each prompt.
            progress: told how many pairs are done.

        Returns:
            float32 scores and a bool mask of the pairs that were cut to ``max_length``, both on the CPU.
        """
        encoded, cut = zip(
            *(
                encode_pair(self.tokenizer, p, r, self.template, self.max_length)
                for p, r in zip(prompts, responses, strict=True)
            ),
            strict=True,
        )
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))
        scores = torch.empty(len(encoded))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            scores[chosen] = self._forward([encoded[i] for i in chosen])
            if progress is not None:
                progress(start + len(chosen))
        return scores, torch.tensor(cut)

    @torch.no_grad()
    def _forward(self, rows: list[Encoded]) -> Tensor:
        config = self.model.config.get_text_config()
        if self.pad_id is None:
            # Decoder classifiers read their score at the last token that is not the config's padding id, and refuse a
            # batch without one. An id that occurs in no row gives every row the score that it has alone.
            config.pad_token_id = free_token_id(rows)
        inputs = pad_right(rows, config.pad_token_id)
        output = self.model(**{key: value.to(self.model.device) for key, value in inputs.items()})
        scores: Tensor = output.logits.squeeze(-1).float().cpu()
        return scores


def load_pair_scorer(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: PreferenceDType = "auto",
    template: PairTemplate = "chat",
    batch_size: int = 8,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> PairScorer:
    """Load a reward model by hub id or folder.

    Args:
        name: hub id or folder.
        device: where it runs.
        dtype: of its weights; ``auto`` as they were saved.
        template: see :class:`PairScorer`; without a chat template ``chat`` becomes ``concat``.
        batch_size: see :class:`PairScorer`.
        max_length: see :class:`PairScorer`; default: what the model takes.
        trust_remote_code: run the modelling code that comes with the weights.

    Raises:
        UserError: it cannot be loaded, has more than one label or no trained head, or takes fewer tokens than
            ``max_length``.
    """
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = pretrained_tokenizer(name, trust_remote_code)
        model = pretrained_model(
            AutoModelForSequenceClassification, name, dtype=torch_dtype, trust_remote_code=trust_remote_code
        )
    except NotLoaded as error:
        if error.missing:
            raise UserError(
                f"The preference model {name!r} lacks trained weights for {error.missing}: it was not trained as a reward "
                "model, or its files are not whole, and its scores would be random."
            ) from error
        raise UserError(
            f"The preference model {name!r} cannot be loaded as a sequence classifier: {error}. Give a folder or a hub id of a "
            "reward model, with its tokenizer."
        ) from error
    if model.config.num_labels != 1:
        raise UserError(
            f"The preference model {name!r} has {model.config.num_labels} labels: a reward model has one. Choose one that was "
            "trained as a reward model."
        )
    limit = longest_input(model, tokenizer)
    if max_length is not None and limit is not None and max_length > limit:
        raise UserError(
            f"max_length is {max_length}, and the preference model {name!r} takes {limit} tokens: lower it."
        )
    if tokenizer.chat_template is None:
        template = "concat"
    model = model.to(device).eval().requires_grad_(False)
    return PairScorer(model, tokenizer, template, batch_size, max_length or limit)


def encode_pair(
    tokenizer: Any, prompt: Prompt, response: str, template: PairTemplate, max_length: int | None
) -> tuple[Encoded, bool]:
    """Tokenize a pair; where it is longer than ``max_length`` tokens, drop tokens from the left of the prompt.

    Returns:
        The model's inputs without padding, and whether anything was dropped.
    """
    if template == "chat":
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages.append({"role": "assistant", "content": response})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = dict(tokenizer(rendered, add_special_tokens=False))
        cut = max_length is not None and len(encoded["input_ids"]) > max_length
        return ({key: values[-max_length:] for key, values in encoded.items()} if cut and max_length else encoded), cut
    text = prompt if isinstance(prompt, str) else "\n".join(str(message.get("content", "")) for message in prompt)
    encoded = dict(tokenizer(f"{text}\n", response))
    if max_length is None or len(encoded["input_ids"]) <= max_length:
        return encoded, False
    # Only the prompt gives way, unless the response alone is too long.
    excess = len(encoded["input_ids"]) - max_length
    room = len(tokenizer(f"{text}\n", add_special_tokens=False)["input_ids"])
    tokenizer.truncation_side = "left"
    strategy = "only_first" if excess < room else "longest_first"
    return dict(tokenizer(f"{text}\n", response, truncation=strategy, max_length=max_length)), True


def pad_right(rows: list[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Stack encoded rows, padded on the right: ids with ``pad_id``, masks and token types with 0."""
    width = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor([row[key] + [pad_id if key == "input_ids" else 0] * (width - len(row[key])) for row in rows])
        for key in rows[0]
    }


def free_token_id(rows: list[Encoded]) -> int:
    """The lowest token id that stands in none of the rows."""
    used = {token for row in rows for token in row["input_ids"]}
    return next(token for token in range(len(used) + 1) if token not in used)


def longest_input(model: Any, tokenizer: Any) -> int | None:
    """The most tokens the model takes, or ``None`` where it does not say."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None and 0 < limit < 10**6]
    return min(limits) if limits else None
