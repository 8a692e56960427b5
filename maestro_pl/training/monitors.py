"""What callbacks such as ``EarlyStopping`` monitor, against what the run can log (docs/metrics.md)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor

from maestro_pl.errors import UserError
from maestro_pl.rollout import RewardSpec

_KNOWN = ("callbacks", "lightning", "maestro_pl", "pytorch_lightning")
_JUDGE = r"(judged|failed|malformed|requests|cached|tokens_in|tokens_out|cost|failures_\w+)"
_ALWAYS = ("train/loss", "policy/entropy", "policy/grad_norm", "policy/skipped", "length/mean", "length/truncated")
_OPEN = ("time", "memory", "health")  # names in there depend on what happens
_OPEN_OF_ROLLOUTS = (*_OPEN, "conductor", "anchor", "group", "weigher", "engine")


@dataclass
class Keys:
    """The metric keys of a run: some by name, the others by a pattern."""

    named: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)

    def may_hold(self, key: str) -> bool:
        """Whether the run could log ``key``."""
        return key in self.named or any(re.fullmatch(pattern, key) for pattern in self.patterns)


def check_monitors(trainer: Any, module: Any, specs: Sequence[RewardSpec]) -> None:
    """Before the first step: raise where a callback monitors what no step and no validation of ``fit`` will log.

    What code of others may log is nobody's to know: where there is any, nothing is said, and Lightning ends the run at the
    moment when it looks for the metric. Nor is anything said of an ``EarlyStopping`` with ``strict=False``, which does
    without its metric.

    Raises:
        UserError: naming the callback, its key and the keys that are close to it.
    """
    monitoring = [c for c in trainer.callbacks if isinstance(getattr(c, "monitor", None), str) and _needs_it(c)]
    if not monitoring or _has_code_of_others(trainer, module):
        return
    validates = _validates(trainer)
    keys = training_keys(module, specs, _tasks(trainer, "train"))
    if validates:
        add_validation(keys, specs, _tasks(trainer, "validation"))
    if any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks):
        keys.patterns.append("lr-.+")
    for callback in monitoring:
        key, who = callback.monitor, type(callback).__name__
        if key.startswith("val/") and not validates:
            raise UserError(
                f"trainer.callbacks: {who} monitors {key!r}, and this run does not validate (no validation rows, or "
                "trainer.limit_val_batches is 0): give the data a validation split, or monitor a metric of training."
            )
        if keys.may_hold(key) or key in ("epoch", "step"):
            continue
        close = difflib.get_close_matches(key, keys.named, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "docs/metrics.md lists the keys."
        raise UserError(f"trainer.callbacks: {who} monitors {key!r}, which nothing in this run logs: {hint}")


def training_keys(module: Any, specs: Sequence[RewardSpec], tasks: Sequence[str] | None) -> Keys:
    """What training steps log; ``tasks`` are those of the training rows, None: any."""
    names = [spec.name for spec in specs]
    any_name = _any_of(names)
    keys = Keys(list(_ALWAYS), [rf"{any_name}/{_JUDGE}"])
    keys.named += ["policy/loss_scale"] if module.stepper.loss_scale is not None else []
    if not module.learns_from_rollouts:
        keys.named += ["sft/without_reference", "length/target"]
        keys.patterns.append(rf"({'|'.join(_OPEN)})/.+")
        return keys
    keys.named += ["policy/clip_fraction", "reward/scalar", "weights_entropy"]
    keys.named += ["policy/kl"] if module.inner.kl.coef else []
    keys.named += [f"reward/{name}{suffix}" for name in names for suffix in ("", "_std")]
    trained = [spec.name for spec in specs if spec.role == "train"]
    keys.named += [f"weights/{name}{suffix}" for name in trained for suffix in ("", "_std")]
    keys.named += [f"reward/{task}/{name}" for task in tasks or () for name in names]
    any_task = ".+" if tasks is None else _any_of(tasks)
    keys.patterns += [
        rf"reward/{any_name}/.+",
        rf"reward/{any_task}/{any_name}",
        rf"length/{any_task}/(mean|truncated)",
        rf"weights/{any_task}/{_any_of(trained)}(_std)?",
        rf"weights_entropy/{any_task}",
        rf"({'|'.join(_OPEN_OF_ROLLOUTS)})/.+",
    ]
    return keys


def add_validation(keys: Keys, specs: Sequence[RewardSpec], tasks: Sequence[str] | None) -> None:
    """Add what validations log; ``tasks`` are those of the validation rows, None: any."""
    any_name = _any_of([spec.name for spec in specs])
    trained = [spec.name for spec in specs if spec.role == "train"]
    whole = ["length/mean", "length/truncated", *(f"reward/{spec.name}" for spec in specs)]
    whole += [f"weights/{name}" for name in trained]
    places = ["val", *(f"val/{task}" for task in tasks or ())]
    keys.named += [f"{place}/{key}{end}" for place in places for key in whole for end in ("", "_low", "_high")]
    of_task = "(.+/)?" if tasks is None else rf"({_any_of(tasks)}/)?"
    inner = [rf"reward/{any_name}/.+", r"corpus_\w+(/.+)?"]
    inner += [r"pass@\d+(/.+)?"] if any(spec.pass_at_k for spec in specs) else []
    inner += list(map(re.escape, whole)) if tasks is None else []
    keys.patterns += [rf"val/{of_task}({'|'.join(inner)})(_low|_high)?", rf"val/{any_name}/{_JUDGE}"]


def _any_of(names: Sequence[str]) -> str:
    return f"({'|'.join(map(re.escape, names))})" if names else r"(?!)"  # none: matches nothing


def _validates(trainer: Any) -> bool:
    rows = getattr(trainer.datamodule, "rows", None)
    split = rows.get("validation", True) if isinstance(rows, dict) else True
    return bool(split) and trainer.limit_val_batches != 0


def _tasks(trainer: Any, split: str) -> list[str] | None:
    rows = getattr(trainer.datamodule, "rows", None)
    if not isinstance(rows, dict) or split not in rows:
        return None
    return sorted({row.task for row in rows[split]})


def _needs_it(callback: Any) -> bool:
    return not isinstance(callback, EarlyStopping) or callback.strict


def _has_code_of_others(trainer: Any, module: Any) -> bool:
    parts = [module, *trainer.callbacks]
    if module.learns_from_rollouts:
        parts += [module.weigher, module.outer.meta.signal, module.outer.learner]
    return any(type(part).__module__.partition(".")[0] not in _KNOWN for part in parts)
