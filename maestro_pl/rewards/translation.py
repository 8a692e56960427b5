"""Translation quality: chrF and BLEU of a response, and of a whole split from the same counts."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import CHRFScore, SacreBLEUScore

from maestro_pl.run.ranks import names_of_all_ranks

TranslationMetric: TypeAlias = Literal["chrf", "bleu"]
Tokenize: TypeAlias = Literal["auto", "13a", "zh", "intl", "char", "none"]

_KANA = re.compile(r"[\u3040-\u30ff]")
_HAN = re.compile(r"[\u3400-\u9fff]")


def translation_counts(
    text: str,
    references: Sequence[str],
    metric: TranslationMetric = "chrf",
    *,
    tokenize: Tokenize = "auto",
    word_order: int = 0,
) -> Tensor:
    """The n-gram counts of a translation, which add up over a corpus: float64, 1-D.

    Args:
        text: the translation.
        references: one or more; chrF takes the best of them, BLEU all.
        metric: ``chrf`` (Popovic 2015) or ``bleu`` (Papineni et al. 2002).
        tokenize: of BLEU, as sacrebleu names them; ``auto`` is ``char`` for a reference with kana, ``zh`` for one with
            Chinese characters, and ``13a`` for all others.
        word_order: of chrF; 2 is chrF++.
    """
    scorer = _scorer(metric, tokenizer_of(references, tokenize), word_order)
    scorer.update([text], [list(references)])
    states: dict[str, Any] = scorer.metric_state
    return torch.cat([torch.as_tensor(state).reshape(-1).double() for state in states.values()])


def counts_score(counts: Tensor, metric: TranslationMetric = "chrf", *, smooth: bool = False) -> float:
    """The score in [0, 1] of (summed) counts, as sacrebleu computes it from them.

    chrF is the F-score with beta 2 of the mean precision and the mean recall over the n-grams that both sides have,
    n = 1..6 characters (torchmetrics' own chrF averages the F-scores instead). BLEU is the geometric mean of the n-gram
    precisions for n = 1..4 times the brevity penalty.

    Args:
        counts: from :func:`translation_counts`, of one text or summed over many.
        metric: what they were counted for.
        smooth: add one to the counts of n > 1 (Lin and Och 2004), for BLEU of single sentences.
    """
    return _chrf(counts) if metric == "chrf" else _bleu(counts.tolist(), smooth)


def translation_score(
    text: str,
    references: Sequence[str],
    metric: TranslationMetric = "chrf",
    *,
    tokenize: Tokenize = "auto",
    word_order: int = 0,
) -> float:
    """Sentence chrF or smoothed sentence BLEU in [0, 1]; see :func:`translation_counts` and :func:`counts_score`."""
    counts = translation_counts(text, references, metric, tokenize=tokenize, word_order=word_order)
    return counts_score(counts, metric, smooth=True)


def tokenizer_of(references: Sequence[str], tokenize: Tokenize) -> Tokenize:
    """The tokenizer behind ``auto``."""
    if tokenize != "auto":
        return tokenize
    joined = " ".join(references)
    return "char" if _KANA.search(joined) else "zh" if _HAN.search(joined) else "13a"


class CorpusCounts(Metric):
    """Counts of every response of a split, gathered over the ranks; a response two ranks had counts once."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.task_names: list[str] = []
        self.add_state("entries", default=[], dist_reduce_fx="cat")  # rows of (task, place, counts...)
        self.entries: list[Tensor] | Tensor

    def update(self, task: str, place: float, counts: Tensor) -> None:
        """Add one response.

        Args:
            task: its task.
            place: what tells it apart from all others on any rank; negative where nothing does.
            counts: from :func:`translation_counts`.
        """
        if task not in self.task_names:
            self.task_names.append(task)
        head = torch.tensor([zlib.crc32(task.encode()), place], dtype=torch.float64)
        assert isinstance(self.entries, list)
        self.entries.append(torch.cat([head, counts])[None].to(self.device))

    def compute(self) -> dict[str, tuple[Tensor, int]]:
        """Summed counts and number of the responses of every task, and of all under the empty name."""
        entries = self._once()
        found = {
            task: entries[entries[:, 0] == zlib.crc32(task.encode()), 2:]
            for task in names_of_all_ranks(self.task_names)
        }
        if found:
            found[""] = entries[:, 2:]
        return {task: (rows.sum(0), len(rows)) for task, rows in found.items()}

    def _once(self) -> Tensor:
        """The entries of all ranks, without repetitions."""
        parts = self.entries if isinstance(self.entries, Tensor) else torch.cat(self.entries)
        entries = parts.cpu()
        once = {tuple(row[:2]) if row[1] >= 0 else i: i for i, row in enumerate(entries.tolist())}
        return entries[sorted(once.values())]

    def pad(self, width: int) -> None:
        """Give a rank without rows an empty table of the others' width, so that all can be gathered."""
        assert isinstance(self.entries, list)
        self.entries.append(torch.zeros(0, 2 + width, dtype=torch.float64, device=self.device))


def counts_width(metric: TranslationMetric, word_order: int) -> int:
    """How many counts :func:`translation_counts` gives."""
    return translation_counts("a", ["a"], metric, word_order=word_order).numel()


def _scorer(metric: TranslationMetric, tokenize: Tokenize, word_order: int) -> Metric:
    if metric == "chrf":
        return CHRFScore(n_word_order=word_order, sync_on_compute=False)
    return SacreBLEUScore(tokenize=tokenize, sync_on_compute=False)  # type: ignore[arg-type]


def _chrf(counts: Tensor, beta: float = 2.0) -> float:
    blocks = counts[:18].view(3, 6), counts[18:].view(3, -1)  # characters, then words where they are counted
    text, reference, matches = torch.cat(blocks, dim=1)
    both = (text > 0) & (reference > 0)
    if not bool(both.any()):
        return 0.0
    precision = float((matches[both] / text[both]).mean())
    recall = float((matches[both] / reference[both]).mean())
    if precision + recall == 0:
        return 0.0
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _bleu(counts: list[float], smooth: bool) -> float:
    length, reference_length = counts[:2]
    added = [float(smooth and n > 0) for n in range(4)]
    matches = [count + more for count, more in zip(counts[2:6], added, strict=True)]
    totals = [count + more for count, more in zip(counts[6:10], added, strict=True)]
    if min(matches) == 0:
        return 0.0
    brevity = 0.0 if length >= reference_length else 1.0 - reference_length / length
    return math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4 + brevity)
