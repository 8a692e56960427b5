"""Translation quality: chrF and BLEU of a response and of a whole split, by sacrebleu."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeAlias

from maestro_pl.errors import UserError
from maestro_pl.run.ranks import gathered

TranslationMetric: TypeAlias = Literal["chrf", "bleu"]
Tokenize: TypeAlias = Literal["auto", "13a", "zh", "intl", "char", "none"]

_KANA = re.compile(r"[\u3040-\u30ff]")
_HAN = re.compile(r"[\u3400-\u9fff]")


class Translation(NamedTuple):
    """A text and the references that it is compared with."""

    text: str
    references: Sequence[str]


def translation_score(
    text: str,
    references: Sequence[str],
    metric: TranslationMetric = "chrf",
    *,
    tokenize: Tokenize = "auto",
    word_order: int = 0,
) -> float:
    """Sentence chrF or smoothed sentence BLEU in [0, 1].

    Args:
        text: the translation.
        references: one or more; chrF takes the best of them, BLEU all.
        metric: ``chrf`` (Popovic 2015), the F-score with beta 2 over n-grams of 1 to 6 characters; or ``bleu`` (Papineni
            et al. 2002) over n = 1 to 4, with one added to the counts of n > 1 (Lin and Och 2004).
        tokenize: of BLEU, as sacrebleu names them; ``auto`` is ``char`` for a reference with kana, ``zh`` for one with
            Chinese characters, and ``13a`` for all others.
        word_order: of chrF; 2 is chrF++.

    Raises:
        UserError: ``sacrebleu`` is not installed.
    """
    one = [Translation(text, references)]
    return _score(one, metric, tokenize, word_order, smooth_method="add-k", smooth_value=1)


def corpus_score(
    translations: Sequence[Translation],
    metric: TranslationMetric = "chrf",
    *,
    tokenize: Tokenize = "auto",
    word_order: int = 0,
) -> float:
    """The chrF or BLEU of a corpus in [0, 1], with sacrebleu's own smoothing; see :func:`translation_score`."""
    return _score(translations, metric, tokenize, word_order)


def tokenizer_of(references: Sequence[str], tokenize: Tokenize) -> Tokenize:
    """The tokenizer behind ``auto``."""
    if tokenize != "auto":
        return tokenize
    joined = " ".join(references)
    return "char" if _KANA.search(joined) else "zh" if _HAN.search(joined) else "13a"


class Corpus:
    """The translations of a split, gathered over the ranks; a response that two ranks had counts once."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, int | None, Translation]] = []

    def add(self, task: str, place: int | None, translation: Translation) -> None:
        """Add one response.

        Args:
            task: its task.
            place: what tells it apart from all others on any rank; None where nothing does.
            translation: its text and references.
        """
        self._entries.append((task, place, translation))

    def tasks(self) -> dict[str, list[Translation]]:
        """The responses of every task, and of all under the empty name, on every rank. Collective."""
        entries = [entry for part in gathered(self._entries) for entry in part]
        once = {(task, i if place is None else f"at {place}"): text for i, (task, place, text) in enumerate(entries)}
        found: dict[str, list[Translation]] = {}
        for (task, _), translation in once.items():
            found.setdefault(task, []).append(translation)
        return {**found, "": list(once.values())} if found else {}

    def reset(self) -> None:
        """Forget the responses."""
        self._entries = []


def _score(
    translations: Sequence[Translation],
    metric: TranslationMetric,
    tokenize: Tokenize,
    word_order: int,
    **smoothing: Any,
) -> float:
    if importlib.util.find_spec("sacrebleu") is None:
        raise UserError(
            "Scoring translations needs the package sacrebleu, which is not installed: run pip install "
            "-e '.[benchmarks]'."
        )
    from sacrebleu.metrics import BLEU, CHRF

    scorer: Any = CHRF(word_order=word_order)
    if metric == "bleu":  # cut into tokens here, since a corpus may hold several languages
        scorer = BLEU(tokenize="none", force=True, **smoothing)
        translations = [_tokenized(translation, tokenize) for translation in translations]
    texts = [translation.text for translation in translations]
    streams = list(zip_longest(*(translation.references for translation in translations)))
    score = float(scorer.corpus_score(texts, streams).score) / 100
    return min(score, 1.0)  # BLEU's logarithms leave 1.0000000000000004


def _tokenized(translation: Translation, tokenize: Tokenize) -> Translation:
    from sacrebleu.metrics import BLEU

    cut = BLEU(tokenize=tokenizer_of(translation.references, tokenize)).tokenizer
    return Translation(
        cut(translation.text.rstrip()), [cut(reference.rstrip()) for reference in translation.references]
    )
