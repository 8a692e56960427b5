"""What the rewards say of the first responses, at the start of every run."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rewards.base import Reward
from maestro_pl.evaluation.reward_table import never_applied, reward_row, reward_table
from maestro_pl.rollout import Rollout


class RewardTable(Callback):
    """Prints a table of the rewards at the first training batch, and warns of each that applies to nothing.

    Each reward with its role, normalisation and tasks, on how many of the first responses it applied, the mean and
    standard deviation of its raw scores, and in how many groups it can tell the responses apart. A reward whose tasks
    the first batch lacks is looked at in the first batch that has them. Of several ranks, the first one's responses
    count.
    """

    def __init__(self) -> None:
        self._open: set[str] | None = None  # rewards that no batch has asked yet; None: there was no batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew."""
        self._open = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the scores of the first batch, and at those of rewards that had nothing to score until now."""
        rollout = batch.get("rollout") if isinstance(batch, dict) else None
        if not isinstance(rollout, Rollout) or self._open == set() or not trainer.is_global_zero:
            return
        callbacks = cast("list[Callback]", trainer.callbacks)  # type: ignore[attr-defined]
        rewards = [c for c in callbacks if isinstance(c, Reward) and c.name in rollout.rewards]
        rows = {
            reward.name: reward_row(
                rollout.rewards[reward.name], rollout.group_size, reward.rows_of(rollout), reward.tasks or ()
            )
            for reward in rewards
        }
        if self._open is None:
            self._open = set(rows)
            print(f"Rewards on the first {len(rollout)} responses:\n{reward_table(list(rows.values()))}", flush=True)
        for reward in rewards:
            row = rows[reward.name]
            if reward.name not in self._open or not row.n:
                continue
            self._open.discard(reward.name)
            if rollout.rewards[reward.name].choices:  # it compares responses, and scores none
                continue
            if sentence := never_applied(row, None if row.applied else reward.why_not(rollout)):
                rank_zero_warn(sentence)
