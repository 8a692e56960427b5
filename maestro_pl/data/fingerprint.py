"""Whether the training data of a resumed run is still that of its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.data.rendering import RenderedPrompt
from maestro_pl.data.sampling import PromptStream

WORDS = {"rows": "number of rows", "hash": "rows", "draws": "mixture", "seed": "seed"}


def fingerprint(prompts: Sequence[RenderedPrompt], stream: PromptStream) -> dict[str, Any]:
    """Plain values, fit for a checkpoint, that change with the training rows, their order, the mixture or the seed."""
    digest = hashlib.sha256()
    for row in (prompt.row for prompt in prompts):
        digest.update(repr((row.key, row.values["reference"], row.task, row.source)).encode("utf-8", "surrogatepass"))
    return {"rows": len(prompts), "hash": digest.hexdigest(), "draws": stream.draws, "seed": stream.seed}


def warn_if_changed(then: dict[str, Any], now: dict[str, Any], position: int) -> None:
    """Warn if training goes on at a position of an order that is no longer the same."""
    changed = [WORDS[name] for name, value in now.items() if then.get(name) != value]
    if changed:
        rank_zero_warn(
            f"The training data is not that of the checkpoint ({', '.join(changed)} changed; {then.get('rows')} rows then, "
            f"{now['rows']} now): training goes on at position {position} of the new order, where some prompts of this "
            "epoch may come twice or not at all."
        )
