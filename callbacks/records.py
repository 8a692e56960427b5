"""Responses on disk, one JSON line each, to be read by people and by scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from maestro_pl.algorithm.scalar_reward import anchor_values, anchored_responses, gates
from maestro_pl.algorithm.settings import Advantages, Anchoring
from maestro_pl.rollout import Rollout
from maestro_pl.run.paths import free_path, run_dir

_FILES = {"fit": "rollouts", "validate": "samples_val", "test": "samples_test", "predict": "predictions"}


def records(rollout: Rollout, anchoring: Anchoring | None = None) -> list[dict[str, Any]]:
    """One plain record a response; a score that does not apply, NaN and infinities are None.

    The scalar reward can be computed again from the records of a group (docs/metrics.md).

    Args:
        rollout: scored, and weighed if it was.
        anchoring: of a training batch, whose anchors may have a share in the scalar reward.

    Returns:
        B dicts with ``prompt``, ``response``, ``group`` (its number in the batch), ``task``, ``reference``,
        ``finish_reason``, ``length`` (tokens), ``rewards`` (name to raw value), ``normalized`` (the weighed ones as they
        entered the sum), ``weights`` (name to weight), ``reward`` (the scalar reward) and ``advantage``; where there are
        any, ``gates`` (name to share that is open), ``anchor`` (its value, and the share of it in the reward), ``kl`` (taken
        off the reward), ``skipped`` (true: left out because it has no label) and ``adapter`` (of an engine such as vLLM: the
        version of the adapters that sampled the response); ``noted`` where a reward noted more (TRL's
        ``log_extra``): name to columns.
    """
    references = rollout.per_response("reference")
    further = _further(rollout, anchoring)
    rows = []
    for i, (prompt, response) in enumerate(zip(rollout.prompts_B(), rollout.responses, strict=True)):
        rewards = {
            name: _number(scores.values_B[i]) if bool(scores.mask_B[i]) else None
            for name, scores in rollout.rewards.items()
        }
        rows.append(
            {
                "prompt": prompt,
                "response": response,
                "group": i // rollout.group_size,
                "task": rollout.tasks[i],
                "reference": references[i],
                "finish_reason": rollout.finish_reasons[i],
                "length": len(rollout.response_ids[i]),
                "rewards": rewards,
                "normalized": {
                    n: v for n, v in _named(rollout, rollout.normalized_BK, i).items() if _applies(rollout, n, i)
                },
                "weights": _named(rollout, rollout.weights_BK, i),
                "reward": None if rollout.scalar_B is None else _number(rollout.scalar_B[i]),
                "advantage": None if rollout.advantages_B is None else _number(rollout.advantages_B[i]),
                **{key: value[i] for key, value in further.items() if value[i] is not None},
                **({"adapter": int(rollout.engine["adapter"])} if "adapter" in rollout.engine else {}),
            }
        )
        noted = {name: {key: values[i] for key, values in s.texts.items()} for name, s in rollout.rewards.items()}
        if any(noted.values()):
            rows[-1]["noted"] = {name: columns for name, columns in noted.items() if columns}
    return rows


def _named(rollout: Rollout, values_BK: Tensor | None, row: int) -> dict[str, float | None]:
    """A row of a weighed matrix, by the rewards' names; empty where there is none."""
    values = [] if values_BK is None else values_BK[row].tolist()
    return {name: _number(value) for name, value in zip(rollout.weight_names, values, strict=False)}


def _applies(rollout: Rollout, name: str, row: int) -> bool:
    return name not in rollout.rewards or bool(rollout.rewards[name].mask_B[row])


def _further(rollout: Rollout, anchoring: Anchoring | None) -> dict[str, list[Any]]:
    """What else entered the scalar reward: B values a key, None where there is nothing to be said."""
    if rollout.scalar_B is None:
        return {}
    further: dict[str, list[Any]] = {}
    names = [name for name, scores in rollout.rewards.items() if scores.spec.role == "gate"]
    if names:
        rows = zip(*(open_B.tolist() for open_B in gates(rollout)), strict=True)
        further["gates"] = [dict(zip(names, row, strict=True)) for row in rows]
    if anchoring is not None and anchoring.hybrid:
        value_B = anchor_values(rollout)
        known = anchored_responses(rollout, value_B).tolist()
        further["anchor"] = [
            {"value": _number(value), "share": anchoring.hybrid} if ok else None
            for value, ok in zip(value_B, known, strict=True)
        ]
        if anchoring.unlabelled == "skipped":
            further["skipped"] = [None if ok else True for ok in known]
    if rollout.kl_B is not None:
        further["kl"] = [_number(value) for value in rollout.kl_B]
    if rollout.gain_B is not None and bool((rollout.gain_B != 1).any()):
        further["gain"] = [_number(value) for value in rollout.gain_B]
    return further


class ResponseRecorder(Callback):
    """Writes responses into the run's folder: all of ``predict``, and samples of the other stages.

    ``predict`` writes every response to ``predictions.jsonl``; ``fit`` those of every ``every_n_steps``-th step to
    ``rollouts.jsonl``, with ``step`` and ``advantage_by`` (what its advantages were divided by); ``validate`` and
    ``test`` every response to ``samples_val.jsonl`` and ``samples_test.jsonl`` where ``evaluation`` is true. A file that
    exists is never written into: a number is put after its name. Each batch is on disk before the next begins.

    Args:
        every_n_steps: policy steps between two recorded training batches; 0 records none.
        evaluation: whether validation (in fit too, with its ``step``) and test are recorded.
    """

    def __init__(self, every_n_steps: int = 10, evaluation: bool = False) -> None:
        self.every_n_steps = every_n_steps
        self.evaluation = evaluation
        self._folder = Path()
        self._writes = True
        self._paths: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start new files; rank 0 writes the responses of all ranks."""
        self._folder = run_dir(trainer)
        self._writes = trainer.is_global_zero
        self._paths = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Record the batch of every ``every_n_steps``-th step, the first included."""
        step = int(getattr(pl_module, "policy_steps", trainer.global_step))
        if not self.every_n_steps or (step - 1) % self.every_n_steps or "rollout" not in batch:
            return
        anchoring = getattr(getattr(pl_module, "outer", None), "anchoring", None)
        by = _advantages_by(pl_module)
        self._write("fit", ({"step": step, **row, **by} for row in records(batch["rollout"].of_all_ranks, anchoring)))

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
            self._write("validate", ({"step": step, **row} for row in records(batch["rollout"].of_all_ranks)))

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
            self._write("test", records(batch["rollout"].of_all_ranks))

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
        self._write("predict", records(batch["rollout"].of_all_ranks))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the file."""
        if "predict" in self._paths:
            print(f"Responses: {self._paths['predict']}", flush=True)

    def _write(self, stage: str, rows: Iterable[dict[str, Any]]) -> None:
        if not self._writes:
            return
        if stage not in self._paths:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._paths[stage] = free_path(self._folder / f"{_FILES[stage]}.jsonl")
        append_records(self._paths[stage], rows)


def append_records(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append one JSON line a record and close the file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n" for row in rows)


def _advantages_by(module: Any) -> dict[str, Any]:
    """How a training batch came from scalar rewards to advantages; what is at its default and says nothing is left out."""
    settings: Advantages | None = getattr(module, "advantages", None)
    if settings is None:
        return {}
    own_scale = settings.aggregation != "sum_then_normalize"
    by: dict[str, Any] = {"advantage_by": settings.aggregation if own_scale else settings.scale}
    if settings.min_consensus:
        by |= {"min_consensus": settings.min_consensus, "consensus_scale": settings.consensus_scale}
    return by


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
