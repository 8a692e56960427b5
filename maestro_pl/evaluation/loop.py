"""Validation, test and prediction of a module that weighs rewards."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L

from maestro_pl.evaluation.metrics import EvaluationTable, rollout_values
from maestro_pl.evaluation.records import PromptRecords, keys_of
from maestro_pl.rollout import Rollout, rollout_of
from maestro_pl.run.joining import gathered_rollout


class EvaluationLoop(L.LightningModule):
    """The evaluation half of a LightningModule: soft weights, a table of means with intervals per task.

    Attributes:
        evaluation: the last table: rows ``{task, metric, mean, low, high, n}``.
        prompt_records: the values of every prompt behind it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = EvaluationTable()
        self.evaluation: list[dict[str, Any]] = []
        self.prompt_records = PromptRecords()

    def weigh_batch(self, rollout: Rollout, sample: bool) -> None:
        """Weigh the rewards of a rollout and write weights and scalar rewards into it; the algorithm's part."""
        raise NotImplementedError

    def weighed_softly(self, batch: dict[str, Any]) -> Rollout:
        """The batch's rollout, weighed without drawing actions: the paper's inference."""
        rollout = rollout_of(batch)
        self.weigh_batch(rollout, sample=False)
        rollout.everywhere = gathered_rollout(rollout, batch.get("position"))
        return rollout

    def evaluation_step(self, batch: dict[str, Any]) -> None:
        """Weigh softly and add the rollout to the table."""
        rollout = self.weighed_softly(batch)
        tasks = [str(task) for task in rollout.columns["task"]]
        keys = keys_of(rollout.prompts, rollout.columns.get("reference") or [None] * len(tasks), tasks)
        self.table.update(tasks, rollout_values(rollout), batch.get("position"), keys)

    def evaluation_end(self, stage: Literal["val", "test"]) -> None:
        """Means with bootstrap intervals, per task and over all prompts: logged, and kept in ``evaluation``."""
        self.evaluation = self.table.compute()
        self.prompt_records = self.table.records
        self.table.reset()
        for row in self.evaluation:
            prefix = stage if row["task"] == "all" else f"{stage}/{row['task']}"
            for suffix, value in (("", row["mean"]), ("_low", row["low"]), ("_high", row["high"])):
                self.log(f"{prefix}/{row['metric']}{suffix}", value, rank_zero_only=True)

    def on_validation_epoch_start(self) -> None:
        """Start an empty table."""
        self.table.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """See :meth:`evaluation_step`."""
        self.evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        """See :meth:`evaluation_end`."""
        self.evaluation_end("val")

    def on_test_epoch_start(self) -> None:
        """Start an empty table."""
        self.table.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """See :meth:`evaluation_step`."""
        self.evaluation_step(batch)

    def on_test_epoch_end(self) -> None:
        """See :meth:`evaluation_end`."""
        self.evaluation_end("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Rollout:
        """The rollout with its rewards and soft weights."""
        return self.weighed_softly(batch)
