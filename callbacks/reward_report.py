"""What the rewards were worth over a stage of the run, at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rewards.base import Reward
from maestro_pl.errors import escaped
from maestro_pl.evaluation.records import write_whole
from maestro_pl.evaluation.reward_report import RewardStatistics
from maestro_pl.evaluation.reward_report_tables import csv_table, report_text
from maestro_pl.rollout import Rollout
from maestro_pl.run.paths import free_path, run_dir

WARMUP, FIT = "warmup", "fit"
_FILES = {WARMUP: "rewards_warmup.csv", FIT: "rewards.csv"}
_TITLES = {WARMUP: "the warm-up", FIT: "training"}


def asked_of(trainer: Any, rollout: Rollout) -> dict[str, list[int]]:
    """The responses that each reward among the callbacks was asked about."""
    return {
        c.name: c.rows_of(rollout) for c in trainer.callbacks if isinstance(c, Reward) and c.name in rollout.rewards
    }


class RewardReport(Callback):
    """Prints what the rewards were worth at the end of the Conductor's warm-up and at the end of ``fit``, and writes it.

    For each task and reward: on how many responses it applied, its mean, its spread inside groups, in how many groups it
    can tell the responses apart, and its correlations inside groups with the anchor and the other rewards. The files are
    ``rewards_warmup.csv`` and ``rewards.csv`` in the run's folder. The numbers are sums that a checkpoint keeps: a resumed
    run reports what it and those before it have seen, and a run that ends early what it has.
    """

    def __init__(self) -> None:
        self.statistics = {WARMUP: RewardStatistics(), FIT: RewardStatistics()}
        self._folder = Path()
        self._anchors: list[str] = []
        self._stage = FIT
        self._unsaid: set[str] = set()  # stages with batches of this process that were not yet reported

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew; a checkpoint's sums are loaded after this."""
        self._folder = run_dir(trainer)  # on every rank: the folder's name is broadcast
        chain: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside Trainer.__init__
        self._anchors = [c.name for c in chain if isinstance(c, Reward) and c.role == "anchor"]
        if stage == "fit":
            self.statistics = {WARMUP: RewardStatistics(), FIT: RewardStatistics()}
            self._unsaid = set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note whether the batch belongs to the warm-up."""
        done, total = getattr(pl_module, "warmup", (0, 0))
        self._stage = WARMUP if done < total else FIT

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch of all ranks; report the warm-up after its last one."""
        rollout = batch.get("rollout") if isinstance(batch, dict) else None
        if not isinstance(rollout, Rollout) or not rollout.rewards or not trainer.is_global_zero:
            return
        rollout = rollout.of_all_ranks
        self.statistics[self._stage].add(rollout, asked_of(trainer, rollout))
        self._unsaid.add(self._stage)
        done, total = getattr(pl_module, "warmup", (0, 0))
        if self._stage == WARMUP and done >= total:
            self._report(WARMUP)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what was not yet reported."""
        self._report_rest()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report what was seen until then."""
        self._report_rest()

    def state_dict(self) -> dict[str, Any]:
        """The sums of both stages."""
        return {stage: statistics.state_dict() for stage, statistics in self.statistics.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint."""
        for stage, statistics in self.statistics.items():
            statistics.load_state_dict(state_dict.get(stage, {}))

    def _report_rest(self) -> None:
        for stage in (WARMUP, FIT):
            if stage in self._unsaid:
                self._report(stage)

    def _report(self, stage: str) -> None:
        self._unsaid.discard(stage)
        whole = self.statistics[stage]
        print(f"\nThe rewards over {_TITLES[stage]}\n{escaped(report_text(whole, self._anchors))}", flush=True)
        try:
            path = free_path(self._folder / _FILES[stage])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, csv_table(whole.rows()))
        except OSError as error:  # what was learned is worth more than a table of it
            rank_zero_warn(f"{_FILES[stage]} is not written: {error}")
            return
        print(f"Written to {path}", flush=True)
