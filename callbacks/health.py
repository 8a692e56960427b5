"""Warns in plain words where the weighing of the rewards goes wrong."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.weights import policy_weights
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.outer_loop import OuterLoop
from maestro_pl.errors import UserError, check_choice, check_seed
from maestro_pl.evaluation.health.advice import ADVICE, ANCHORED, WEIGHING
from maestro_pl.evaluation.health.findings import (
    Examination,
    Finding,
    Thresholds,
    examine,
    examine_drift,
    examine_gaps,
    examine_unhelped,
)
from maestro_pl.evaluation.health.record import WeighedBatch, joined, observe
from maestro_pl.evaluation.health.tasks import weight_gaps
from maestro_pl.rollout import Rollout
from maestro_pl.run.paths import free_path, run_dir, shown

Reaction: TypeAlias = Literal["warn", "stop"]
STEP_CHANGE = "conductor/step_change"  # logged by the module where its Conductor was updated
DRIFT = "conductor/context_drift"


class ConductorHealth(Callback):
    """Judges recent training batches after every step, and names each failure once, with the numbers and what to try.

    Looked for: weights collapsed to uniform or to one reward, a saturated reward that takes the weight, weights that
    move too fast, self-grading, ignored context, a context that drifts, tasks on which no reward helps, over-fitting to
    training prompts, dead groups, conflicting rewards (docs/health.md). A weigher that does not learn is judged only by
    dead groups and conflict, a single reward only by dead groups, a module without rollouts not at all. Findings are
    warned of and logged as ``health/<key>``, printed at the end and written to ``health.json`` in the run's folder, with
    the labels of each task. In a distributed run those of rank zero's own prompts count.

    Args:
        action: ``warn`` goes on; ``stop`` ends the run cleanly at the first finding, on all ranks.
        window: training batches that are judged together.
        patience: training batches before anything is judged.
        thresholds: when a measurement counts as a failure.
        seed: of the permutation tests, which leave the run's random state alone.

    Raises:
        UserError: an unknown action, a patience that the window never reaches, or a seed out of bounds.
    """

    def __init__(
        self,
        action: Reaction = "warn",
        window: int = 20,
        patience: int = 10,
        thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        check_choice("ConductorHealth action", action, Reaction)
        if not 1 <= patience <= window:
            raise UserError(f"ConductorHealth patience={patience}, window={window}: choose 1 <= patience <= window.")
        check_seed("ConductorHealth seed", seed)
        self.action, self.window, self.patience = action, window, patience
        self.thresholds, self.seed = thresholds, seed
        self.findings: list[Finding] = []
        self._start(None)

    def _start(self, path: Path | None) -> None:
        self._path = path
        self._batches: deque[WeighedBatch] = deque(maxlen=self.window)
        self._validation: list[WeighedBatch] = []
        self._step_changes: deque[float] = deque(maxlen=5)
        self._cosines: list[float] = []
        self._labels: dict[str, dict[str, int]] = {}
        self._updates = 0
        self._seen = 0
        self._examined: set[str] = set()
        self._unlogged: dict[str, float] = {}
        self._learns = self._anchored = False
        self._closed = False

    # -- what Lightning calls ----------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew; a checkpoint's findings are loaded after this."""
        folder = run_dir(trainer)  # on every rank: the folder's name is broadcast
        if stage == "fit":
            self.findings = []
            self._start(folder / "health.json" if trainer.is_global_zero else None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the Conductor's updates from here."""
        self._updates = _updates(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the recent batches with this one, log the numbers, and report what is new."""
        rollout = _rollout(batch)
        found = False
        if trainer.is_global_zero and rollout is not None:
            found = self._take(trainer, pl_module, rollout)
        self._stop_if(trainer, found)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last validation."""
        self._validation = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the weights of a validation inside ``fit``."""
        rollout = _rollout(batch)
        if self._batches and rollout is not None and isinstance(getattr(pl_module, "weigher", None), Conductor):
            self._validation.append(observe(rollout, policy_weights(rollout)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the weights on validation prompts with those of the recent training batches."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        found = False
        if trainer.is_global_zero and self._validation and len(self._batches) >= self.patience:
            train, validation = joined(self._batches), joined(self._validation)
            self._validation = []
            if train.names == validation.names and len(train.names) > 1:
                gaps = weight_gaps(train, validation, self.thresholds.least_of_task)
                found = self._report(examine_gaps(gaps, self.thresholds, _step(trainer, pl_module)))
        self._stop_if(trainer, found)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary and write ``health.json``."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print and write what there is."""
        try:
            self._close()
        except OSError as error:  # the run's own error is the one to be shown
            rank_zero_warn(f"health.json is not written: {error}")

    def state_dict(self) -> dict[str, Any]:
        """The findings, so that a resumed run does not warn of them again."""
        return {"findings": [asdict(finding) for finding in self.findings]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.findings = [Finding(**finding) for finding in state_dict["findings"]]

    # -- its parts ---------------------------------------------------------------------------------------------------

    def _take(self, trainer: Trainer, pl_module: Any, rollout: Rollout) -> bool:
        self._batches.append(observe(rollout, policy_weights(rollout)))
        self._seen += 1
        self._learns = isinstance(getattr(pl_module, "weigher", None), Conductor)
        updates = _updates(pl_module) if self._learns else None
        if updates is not None and updates > self._updates and STEP_CHANGE in trainer.callback_metrics:
            self._updates = updates
            self._step_changes.append(float(trainer.callback_metrics[STEP_CHANGE]))
        found = False
        if DRIFT in trainer.callback_metrics:
            self._cosines.append(float(trainer.callback_metrics[DRIFT]))
        if len(self._batches) >= self.patience:
            step = _step(trainer, pl_module)
            window = joined(self._batches)
            found = self._report(examine(window, self.thresholds, step, updates, list(self._step_changes), self.seed))
            found |= self._take_labels(trainer, pl_module, step)
        if self._unlogged:
            values, self._unlogged = self._unlogged, {}
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=len(rollout), rank_zero_only=True)
        return found

    def _take_labels(self, trainer: Trainer, pl_module: Any, step: int) -> bool:
        """Judge what the Conductor makes of the anchors' labels."""
        outer = getattr(pl_module, "outer", None)
        self._anchored = isinstance(outer, OuterLoop) and outer.learns and outer.meta.signal.needs_labels_of_task
        if not isinstance(outer, OuterLoop) or not self._anchored:
            return False
        self._labels = outer.counts.state_dict()
        found = self._report(examine_drift(self._cosines, self.thresholds, step))
        return self._report(examine_unhelped(outer.unhelped, outer.anchoring.hybrid, step)) or found

    def _report(self, examination: Examination) -> bool:
        """Warn of what is found for the first time; whether there was any."""
        self._examined.update(examination.examined)
        self._unlogged |= {f"health/{name}": number for name, number in examination.numbers.items()}
        known = {finding.key for finding in self.findings}
        new = [finding for finding in examination.findings if finding.key not in known]
        for finding in new:
            self.findings.append(finding)
            self._unlogged[f"health/{finding.key}"] = 1.0
            ending = " The run stops here (action: stop); its checkpoint is kept." if self.action == "stop" else ""
            rank_zero_warn(f"Health, step {finding.step}. {finding.text} What to try: {finding.advice}{ending}")
        return bool(new)

    def _stop_if(self, trainer: Trainer, found: bool) -> None:
        if self.action == "stop" and trainer.strategy.broadcast(found):  # all ranks leave the loop together
            trainer.should_stop = True

    def _close(self) -> None:
        if self._closed or self._path is None or not self._seen:
            return
        self._closed = True
        possible = [key for key in ADVICE if self._learns or key not in WEIGHING]
        possible = [key for key in possible if self._anchored or key not in ANCHORED]
        open_keys = [key for key in possible if key not in self._examined]
        path = free_path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "healthy": not self.findings,
            "batches": self._seen,
            "findings": [asdict(finding) for finding in self.findings],
            "not_judged": open_keys,
            **({"labels": self._labels} if self._labels else {}),
            "thresholds": asdict(self.thresholds),
        }
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(
            summary(self.findings, open_keys) + (f"\n  {shown(path)} has them in full." if self.findings else ""),
            flush=True,
        )


def summary(findings: list[Finding], not_judged: list[str]) -> str:
    """Which findings there are, a line each, or one line; what they say was warned of when they were found."""
    rest = f" (not judged, too little data: {', '.join(not_judged)})" if not_judged else ""
    if not findings:
        return f"Health: healthy{rest}"
    lines = [f"Health: {len(findings)} finding{'s' if len(findings) > 1 else ''}{rest}"]
    lines += [f"  step {finding.step}: {finding.key}" for finding in findings]
    return "\n".join(lines)


def _rollout(batch: Any) -> Rollout | None:
    rollout = batch.get("rollout") if isinstance(batch, dict) else None
    return rollout.of_all_ranks if isinstance(rollout, Rollout) else None


def _step(trainer: Trainer, module: Any) -> int:
    return int(getattr(module, "policy_steps", trainer.global_step))


def _updates(pl_module: LightningModule) -> int:
    """Updates of the Conductor so far; 0 for a module without one."""
    outer = getattr(pl_module, "outer", None)
    return 0 if outer is None else int(outer.updates)
