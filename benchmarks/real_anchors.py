"""What the answers to the four real tasks are worth, by measures that are not among their rewards.

``quality`` is in [0, 1]: for a title, a summary and a story the cosine of MiniLM's sentence embeddings with the reference
(the real title, what is summarised, the real story) times how well the asked length is kept; for a translation chrF.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

from torch import Tensor

from maestro_pl.rewards.embedding import MINILM, SentenceEncoder, load_sentence_encoder
from maestro_pl.rewards.translation import translation_score

LENGTHS = {"title": (2, 8), "summary": (8, 20), "story": (30, 45)}  # words that the prompts ask for
ALIKE = 0.02  # two qualities that differ by less are no difference that counts


def quality(completion: str, reference: str, task: str) -> float:
    """What an answer is worth."""
    if task == "translation":
        return translation_score(completion, [reference])
    similarity = float(_encoder()([completion])[0] @ _vector(reference))
    return min(max(similarity, 0.0), 1.0) * keeps(len(completion.split()), *LENGTHS[task])


def best(responses: Sequence[str], reference: str, task: str) -> set[int] | None:
    """The places of the best answer and of those alike to it; None where all are alike."""
    values = [quality(response, reference, task) for response in responses]
    found = {place for place, value in enumerate(values) if max(values) - value < ALIKE}
    return found if len(found) < len(values) else None


def keeps(words: int, fewest: int, most: int) -> float:
    """1 within the asked length; words / fewest below it, most / words above."""
    return min(words / fewest, 1.0) * min(most / max(words, 1), 1.0)


@lru_cache(maxsize=4096)
def _vector(reference: str) -> Tensor:
    """float32 [width]: a reference is asked for with each of its responses."""
    return _encoder()([reference])[0]


@cache
def _encoder() -> SentenceEncoder:
    return load_sentence_encoder(MINILM)
