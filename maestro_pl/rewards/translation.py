"""Translation quality: chrF and BLEU of a response, and of a whole split from the same counts."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import CHRFScore, SacreBLEUScore

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
    return torch.cat([getattr(scorer, name).reshape(-1).double() for name in scorer._defaults])


def counts_score(counts: Tensor, metric: TranslationMetric = "chrf", *, word_order: int = 0, smooth: bool) -> float:
    """The score in [0, 1] of (summed) counts.

    chrF: the mean over n = 1..6 characters of the F-score with beta 2 of the n-grams (sacrebleu's, which takes the F-score of
    the means, differs in the fourth decimal). BLEU: the geometric mean
    of the n-gram precisions for n = 1..4 times the brevity penalty.

    Args:
        counts: from :func:`translation_counts`, of one text or summed over many.
        metric: what they were counted for.
        word_order: what they were counted for.
        smooth: add one to the counts of n > 1 (Lin and Och 2004), for BLEU of single sentences.
    """
    if metric == "bleu" and smooth:
        return _smoothed_bleu(counts.tolist())
    scorer = _scorer(metric, "13a", word_order)
    start = 0
    for name, default in scorer._defaults.items():
        assert isinstance(default, Tensor)
        setattr(scorer, name, counts[start : start + default.numel()].reshape(default.shape).float())
        start += default.numel()
    scorer._update_count = 1  # the states are given, not counted
    return float(scorer.compute())


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
    return counts_score(counts, metric, word_order=word_order, smooth=True)


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

    def compute(self) -> dict[str, Tensor]:
        """Summed counts of every task, and of all under the empty name."""
        parts = self.entries if isinstance(self.entries, Tensor) else torch.cat(self.entries)
        entries = parts.cpu()
        once = {tuple(row[:2]) if row[1] >= 0 else i: i for i, row in enumerate(entries.tolist())}
        entries = entries[sorted(once.values())]
        sums = {
            task: entries[entries[:, 0] == zlib.crc32(task.encode()), 2:].sum(0) for task in _all_ranks(self.task_names)
        }
        return {**sums, "": entries[:, 2:].sum(0)} if sums else {}

    def pad(self, width: int) -> None:
        """Give a rank without rows an empty table of the others' width, so that all can be gathered."""
        assert isinstance(self.entries, list)
        self.entries.append(torch.zeros(0, 2 + width, dtype=torch.float64, device=self.device))


def counts_width(metric: TranslationMetric, word_order: int) -> int:
    """How many counts :func:`translation_counts` gives."""
    return sum(
        default.numel()
        for default in _scorer(metric, "13a", word_order)._defaults.values()
        if isinstance(default, Tensor)
    )


def _scorer(metric: TranslationMetric, tokenize: Tokenize, word_order: int) -> Metric:
    if metric == "chrf":
        return CHRFScore(n_word_order=word_order, sync_on_compute=False)
    return SacreBLEUScore(tokenize=tokenize, sync_on_compute=False)  # type: ignore[arg-type]


def _smoothed_bleu(counts: list[float]) -> float:
    """Sentence BLEU; torchmetrics gives 0 where no 4-gram matches, with its smoothing too."""
    length, reference_length = counts[:2]
    matches, totals = counts[2:6], counts[6:10]
    if matches[0] == 0:
        return 0.0
    logs = [math.log((m + (n > 0)) / (t + (n > 0))) for n, (m, t) in enumerate(zip(matches, totals, strict=True))]
    brevity = 0.0 if length >= reference_length else 1.0 - reference_length / length
    return math.exp(sum(logs) / 4 + brevity)


def _all_ranks(names: list[str]) -> list[str]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return names
    gathered: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, names)
    return list(dict.fromkeys(name for part in gathered for name in part))
