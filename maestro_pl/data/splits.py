"""Which rows train, which validate, which test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal, TypeAlias

from maestro_pl.errors import UserError
from maestro_pl.rollout import Prompt

Split: TypeAlias = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

ALIASES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def as_split(name: object, split_names: dict[str, str]) -> Split | None:
    """Our name of a split from theirs: by ``split_names`` (ours to theirs) if it has any, else by the usual names."""
    if split_names:
        return next((split for split in SPLITS if split_names.get(split) == name), None)
    return ALIASES.get(name.strip().lower()) if isinstance(name, str) else None


def prompt_key(prompt: Prompt) -> str:
    """One string for a prompt; a string and the same text as a single user message have the same key."""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0] == {"role": "user", "content": prompt[0]["content"]}:
        prompt = prompt[0]["content"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)


def stable_unit(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone: not on row order, other rows or the process."""
    digest = hashlib.sha256(f"{seed}\n{key}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_fraction(key: str, fractions: Sequence[float], seed: int) -> Split:
    """The split of a prompt under fractions of (train, validation, test): identical prompts always share it."""
    unit, upto = stable_unit(key, seed), 0.0
    for split, fraction in zip(SPLITS, fractions, strict=True):
        upto += fraction
        if unit < upto:
            return split
    # 0.8 + 0.1 + 0.1 is a hair under 1: the hair belongs to the last split that is wanted at all
    return next(split for split, fraction in reversed(list(zip(SPLITS, fractions, strict=True))) if fraction > 0)


def check_fractions(fractions: Sequence[float] | None, where: str) -> None:
    """Raise a ``UserError`` unless the fractions are three numbers of at least 0 that sum to 1."""
    if fractions is None:
        return
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"{where} is {list(fractions)}; expected three numbers of at least 0 that sum to 1: "
            "the shares of train, validation and test, for instance [0.8, 0.1, 0.1]."
        )
