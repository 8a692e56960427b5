"""Token ids that a tokenizer gives and a model has no embedding for."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from maestro_pl.errors import UserError

ADVICE = (
    "give the model's own tokenizer (model.policy.tokenizer), or a model whose embeddings were resized to the tokenizer"
)


def guard_ids(base: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer of another model; where only added tokens are too many, refuse them when they are met.

    Raises:
        UserError: ordinary tokens have ids beyond the embedding.
    """
    embedding = base.get_input_embeddings()
    rows = int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return
    ordinary = sorted(beyond.keys() - tokenizer.added_tokens_decoder.keys())
    if ordinary:
        raise UserError(
            f"The tokenizer has {len(ordinary)} tokens beyond the {rows} that the model has embeddings for, the first of them "
            f"{beyond[ordinary[0]]!r} (id {ordinary[0]}): {ADVICE}."
        )
    named = ", ".join(repr(beyond[number]) for number in sorted(beyond)[:3])
    rank_zero_warn(
        f"The tokenizer has {len(beyond)} added tokens that the model has no embedding for ({named}): a text with one of "
        "them is refused."
    )
    embedding.register_forward_pre_hook(_Guard(rows, beyond), with_kwargs=True)


class _Guard:
    """Looks at the ids that enter an embedding."""

    def __init__(self, rows: int, beyond: dict[int, str]) -> None:
        self.rows, self.beyond = rows, beyond

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input")
        if isinstance(ids, Tensor) and ids.numel() and int(ids.max()) >= self.rows:
            number = int(ids.max())
            raise UserError(
                f"A text has the token {self.beyond.get(number)!r} (id {number}), and the model has embeddings for {self.rows} "
                f"tokens: {ADVICE}."
            )
