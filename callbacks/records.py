"""Responses on disk, one JSON line each, to be read by people and by scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from maestro_pl.rollout import Rollout
from maestro_pl.run.paths import free_path, run_dir

_FILES = {"fit": "rollouts", "validate": "samples_val", "test": "samples_test", "predict": "predictions"}


def records(rollout: Rollout) -> list[dict[str, Any]]:
    """One plain record a response; a score that does not apply, NaN and infinities are None.

    Returns:
        B dicts with ``prompt``, ``response``, ``task``, ``reference``, ``finish_reason``, ``length`` (tokens),
        ``rewards`` (name to raw value), ``weights`` (name to weight) and ``reward`` (the scalar reward);
        ``noted`` where a reward noted more (TRL's ``log_extra``): name to columns.
    """
    references = rollout.per_response("reference")
    rows = []
    for i, (prompt, response) in enumerate(zip(rollout.prompts_B(), rollout.responses, strict=True)):
        rewards = {
            name: _number(scores.values_B[i]) if bool(scores.mask_B[i]) else None
            for name, scores in rollout.rewards.items()
        }
        weights = (
            {} if rollout.weights_BK is None else dict(zip(rollout.weight_names, rollout.weights_BK[i], strict=True))
        )
        rows.append(
            {
                "prompt": prompt,
                "response": response,
                "task": rollout.tasks[i],
                "reference": references[i],
                "finish_reason": rollout.finish_reasons[i],
                "length": len(rollout.response_ids[i]),
                "rewards": rewards,
                "weights": {name: _number(weight) for name, weight in weights.items()},
                "reward": None if rollout.scalar_B is None else _number(rollout.scalar_B[i]),
            }
        )
        noted = {name: {key: values[i] for key, values in s.texts.items()} for name, s in rollout.rewards.items()}
        if any(noted.values()):
            rows[-1]["noted"] = {name: columns for name, columns in noted.items() if columns}
    return rows


class ResponseRecorder(Callback):
    """Writes responses into the run's folder: all of ``predict``, and samples of the other stages.

    ``predict`` writes every response to ``predictions.jsonl``; ``fit`` those of every ``every_n_steps``-th step to
    ``rollouts.jsonl``, with ``step`` and ``advantage``; ``validate`` and ``test`` every response to
    ``samples_val.jsonl`` and ``samples_test.jsonl`` where ``evaluation`` is true. A file that exists is never written
    into: a number is put after its name. Each batch is on disk before the next begins.

    Args:
        every_n_steps: policy steps between two recorded training batches; 0 records none.
        evaluation: whether validation (in fit too, with its ``step``) and test are recorded.
    """

    def __init__(self, every_n_steps: int = 10, evaluation: bool = False) -> None:
        self.every_n_steps = every_n_steps
        self.evaluation = evaluation
        self._folder = Path()
        self._suffix = ""
        self._paths: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start new files; every rank of a distributed run has its own."""
        self._folder = run_dir(trainer)
        self._suffix = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        self._paths = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Record the batch of every ``every_n_steps``-th step, the first included."""
        step = int(getattr(pl_module, "policy_steps", trainer.global_step))
        if not self.every_n_steps or (step - 1) % self.every_n_steps or "rollout" not in batch:
            return
        rollout: Rollout = batch["rollout"]
        advantages = [None] * len(rollout) if rollout.advantages_B is None else map(_number, rollout.advantages_B)
        extended = zip(records(rollout), advantages, strict=True)
        self._write("fit", ({"step": step, **row, "advantage": advantage} for row, advantage in extended))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the batch where ``evaluation`` is true."""
        if self.evaluation:
            step = int(getattr(pl_module, "policy_steps", trainer.global_step))
            self._write("validate", ({"step": step, **row} for row in records(batch["rollout"])))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the batch where ``evaluation`` is true."""
        if self.evaluation:
            self._write("test", records(batch["rollout"]))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record every response."""
        self._write("predict", records(batch["rollout"]))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the file."""
        if "predict" in self._paths:
            print(f"Responses: {self._paths['predict']}", flush=True)

    def _write(self, stage: str, rows: Iterable[dict[str, Any]]) -> None:
        if stage not in self._paths:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._paths[stage] = free_path(self._folder / f"{_FILES[stage]}{self._suffix}.jsonl")
        append_records(self._paths[stage], rows)


def append_records(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append one JSON line a record and close the file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n" for row in rows)


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
