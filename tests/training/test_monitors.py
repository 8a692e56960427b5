"""What is monitored and never logged is found before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint

from callbacks import WeightDistributionLogger
from maestro_pl.algorithm.settings import KL
from maestro_pl.errors import UserError
from maestro_pl.training.monitors import check_monitors
from tests.support import data_of, module_of, rewards, trainer_of


@pytest.fixture(scope="module")
def fitted(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainer of a run of two steps with a validation after each, and its metrics."""
    folder = tmp_path_factory.mktemp("monitors")
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(10)))
    chain = [*rewards(), WeightDistributionLogger(plot=False)]
    trainer = trainer_of(
        folder, chain, max_steps=2, val_check_interval=1, check_val_every_n_epoch=None, limit_val_batches=1
    )
    trainer.fit(module_of(tiny_qwen3, kl=KL(coef=0.1)), data_of(path))
    return trainer


def check(fitted: Any, *watchers: Callback) -> None:
    module, before = fitted.lightning_module, fitted.callbacks
    specs = [callback.spec for callback in before if hasattr(callback, "spec")]
    fitted.callbacks = [*before, *watchers]
    try:
        check_monitors(fitted, module, specs)
    finally:
        fitted.callbacks = before


def test_whatever_a_run_logs_may_be_monitored(fitted: Any) -> None:
    logged = list(fitted.callback_metrics)
    assert {"train/loss", "policy/kl", "reward/sevens", "val/reward/sevens", "val/a/weights/elevens_low"} <= set(logged)
    check(fitted, *(EarlyStopping(monitor=key) for key in logged), ModelCheckpoint(monitor="step"))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("val/rewards/sevens", "did you mean 'val/reward/sevens"),
        ("val_loss", "did you mean 'train/loss'"),
        ("reward/seven", "did you mean 'reward/sevens'"),
        ("val/c/reward/sevens", "did you mean 'val/"),
        ("test/reward/sevens", "did you mean 'val/reward/sevens'|did you mean 'reward/sevens'"),
        ("val/pass@1", "did you mean|docs/metrics.md lists the keys"),
        ("reward/c/sevens", "did you mean 'reward/[ab]/sevens'"),
        ("length/c/mean", "did you mean|docs/metrics.md lists the keys"),
        ("weights/c/sevens", "did you mean"),
        ("zzz", r"docs/metrics\.md lists the keys"),
    ],
)
def test_what_nothing_logs_is_named_with_what_is_close(key: str, hint: str, fitted: Any) -> None:
    for watcher in (EarlyStopping(monitor=key), ModelCheckpoint(monitor=key)):
        sentence = rf"{type(watcher).__name__} monitors '{key}', which nothing in this run logs: .*({hint})"
        with pytest.raises(UserError, match=sentence):
            check(fitted, watcher)


def test_code_of_others_may_log_anything(fitted: Any) -> None:
    class Mine(Callback):
        pass

    check(fitted, EarlyStopping(monitor="mine/metric"), Mine())
    with pytest.raises(UserError, match="nothing in this run logs"):
        check(fitted, EarlyStopping(monitor="mine/metric"))


def test_what_lightning_itself_logs_and_does_without(fitted: Any) -> None:
    check(fitted, EarlyStopping(monitor="lr-AdamW"), LearningRateMonitor())
    check(fitted, EarlyStopping(monitor="zzz", strict=False))


def test_own_callbacks_may_log_as_if_they_validated(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scores(Callback):
        pass

    monkeypatch.setattr(fitted, "limit_val_batches", 0)
    check(fitted, EarlyStopping(monitor="val/own_score"), Scores())
    with pytest.raises(UserError, match="this run does not validate"):
        check(fitted, EarlyStopping(monitor="val/own_score"))


def test_a_validation_that_never_comes_is_said_before_the_run(tiny_qwen3: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "a"}) + "\n" for i in range(6)))
    for options in ({"limit_val_batches": 0}, {}):
        watcher = EarlyStopping(monitor="val/reward/sevens")
        trainer = trainer_of(tmp_path, [*rewards(), watcher], max_steps=1, **options)
        data = data_of(path)
        if not options:
            data.fractions = (1.0, 0.0, 0.0)
        with pytest.raises(UserError, match="monitors 'val/reward/sevens', and this run does not validate"):
            trainer.fit(module_of(tiny_qwen3), data)
        assert trainer.global_step == 0
