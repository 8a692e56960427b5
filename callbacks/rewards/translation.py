"""TranslationReward: chrF or BLEU of every response, and of the whole split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice, check_number, check_tags
from callbacks.rewards.match import references_of
from callbacks.rewards.together import Together
from maestro_pl.evaluation.metrics import ALL
from maestro_pl.rewards.exact_match import extract_answer
from maestro_pl.rewards.translation import (
    Corpus,
    Tokenize,
    Translation,
    TranslationMetric,
    corpus_score,
    translation_score,
)
from maestro_pl.rollout import Normalization, Role, Rollout, rollout_of

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule


class TranslationReward(Reward):
    """Sentence chrF or smoothed sentence BLEU of the answer against the reference, in [0, 1].

    At the end of a validation or test epoch the score of the whole split is logged as
    ``test/<task>/corpus_chrf`` and, over all tasks, ``test/corpus_chrf`` (``val/...``, ``corpus_bleu``). A reward with
    a name of its own adds it: ``test/corpus_chrf/<name>``. The same scores stand in the evaluation's table and CSV, as
    a point without an interval. No reference: does not apply.

    Args:
        metric: ``chrf`` or ``bleu``.
        tokenize: of BLEU: ``auto`` (by the script of the reference), ``13a``, ``zh``, ``intl``, ``char`` or ``none``.
        word_order: of chrF: 0 is chrF, 2 is chrF++.
        column: the data column with the reference: a text or a list of accepted ones.
        answer_tag: name of the answer tag.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: an unknown metric or tokenizer, or a negative order; at the first batch: sacrebleu is not installed.
    """

    default_name = "translation"

    def __init__(
        self,
        *,
        metric: TranslationMetric = "chrf",
        tokenize: Tokenize = "auto",
        word_order: int = 0,
        column: str = "reference",
        answer_tag: str = "answer",
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_choice("TranslationReward", "metric", metric, TranslationMetric)
        check_choice("TranslationReward", "tokenize", tokenize, Tokenize)
        check_number("TranslationReward", "word_order", word_order, at_least=0, integer=True)
        check_tags("TranslationReward", "think", answer_tag)
        self.metric, self.tokenize, self.word_order = metric, tokenize, word_order
        self.column, self.answer_tag = column, answer_tag
        self._corpus = Corpus()
        self._scored: dict[int, Translation] = {}
        self._rows: list[dict[str, Any]] = []

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> list[float | None]:
        """The sentence score of each response with a reference."""
        self._scored = {}
        scores: list[float | None] = []
        for row, references in zip(rows, references_of(self, rollout, rows, self.column), strict=True):
            if not references:
                scores.append(None)
                continue
            text = extract_answer(rollout.responses[row], answer_tag=self.answer_tag)
            self._scored[row] = Translation(text, references)
            scores.append(translation_score(text, references, self.metric, **self._options))
        return scores

    @property
    def _options(self) -> dict[str, Any]:
        return {"tokenize": self.tokenize, "word_order": self.word_order}

    def _enter(self, together: Together, trainer: Any, stage: str) -> None:
        super()._enter(together, trainer, stage)
        self._scored = {}  # of the last batch: one without translations is not scored

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty corpus."""
        self._corpus.reset()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty corpus."""
        self._corpus.reset()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the validation batch and add it to the corpus."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._add(batch)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the test batch and add it to the corpus."""
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._add(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the score of the validation split."""
        self._log("val", pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the score of the test split."""
        self._log("test", pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the scores of the split to the table, which the module has made by now."""
        self._tell(pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the scores of the split to the table, which the module has made by now."""
        super().on_test_end(trainer, pl_module)
        self._tell(pl_module)

    def _tell(self, pl_module: LightningModule) -> None:
        module = cast("MaestroModule", pl_module)
        module.evaluation = [*module.evaluation, *self._rows]
        self._rows = []

    def _add(self, batch: dict[str, Any]) -> None:
        rollout = rollout_of(batch)
        places = batch.get("position")
        for row, translation in self._scored.items():
            prompt, response = divmod(row, rollout.group_size)
            place = None if places is None else int(places[prompt]) * rollout.group_size + response
            self._corpus.add(rollout.tasks[row], place, translation)
        self._scored = {}

    def _log(self, stage: str, pl_module: LightningModule) -> None:
        key = f"corpus_{self.metric}" + ("" if self.name in (self.default_name, self.metric) else f"/{self.name}")
        self._rows = []
        for task, translations in self._corpus.tasks().items():
            value = corpus_score(translations, self.metric, **self._options)
            pl_module.log(f"{stage}/{task}/{key}" if task else f"{stage}/{key}", value, rank_zero_only=True)
            point = dict.fromkeys(("mean", "low", "high"), value)
            self._rows.append({"task": task or ALL, "metric": key, **point, "n": len(translations)})
        self._corpus.reset()
