"""The simulated reader behind the preference model: it likes long, rich and varied answers, whatever the task wants."""

from __future__ import annotations

import math
import random

from benchmarks.sandbox.build.demonstrations import demonstrate
from maestro_pl.sandbox.lexicon import COLOURS
from maestro_pl.sandbox.utility import answer_of, words
from maestro_pl.sandbox.world import Row

#: With so many different words a text has most (63 %) of what length can win.
ENOUGH = 10


def liking(response: str) -> float:
    """How much the reader likes a response, about -1 to 1.1.

    Different words in the answer count, the more there are the less; colourful ones a little more. A repeated word
    costs, and so does a text that breaks off. Neither the prompt nor the truth of the answer matters: that is the bias.
    """
    found = words(answer_of(response))
    different = set(found)
    colourful = len(different & set(COLOURS))
    variety = len(different) / max(1, len(found))
    unfinished = 0.0 if "</answer>" in response else 0.3
    return 1 - 2 * math.exp(-len(different) / ENOUGH) + 0.1 * min(4, colourful) / 4 + 0.5 * (variety - 1) - unfinished


def written_pair(row: Row, rng: random.Random) -> tuple[str, str]:
    """A prompt and a response to judge: a demonstration, or one spoiled so that the model meets odd texts as well."""
    response = demonstrate(row, rng)
    pieces = response.split(" ")
    spoil = rng.random()
    if spoil < 0.15:
        rng.shuffle(pieces)
    elif spoil < 0.3:
        pieces = pieces[: rng.randint(1, len(pieces))]
    elif spoil < 0.45:
        place = rng.randrange(len(pieces))
        pieces[place:place] = [rng.choice(pieces)] * rng.randint(2, 20)
    return row["prompt"], " ".join(pieces)
