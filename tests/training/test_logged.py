"""What a step logs: its own numbers, and nothing where there is none."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks.rewards import FunctionReward
from callbacks.weights import WeightDistributionLogger
from maestro_pl.data import PromptDataModule
from maestro_pl.rollout import RewardScores, RewardSpec
from maestro_pl.training.training_log import rollout_metrics
from tests.support import module_of, sevens, trainer_of
from tests.support.rollouts import make_rollout


def only_a(completion: str, task: str, **_: Any) -> float | None:
    return float(len(completion)) if task == "a" else None


@pytest.fixture
def one_task_a_step(tmp_path: Path) -> PromptDataModule:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(6)))
    return PromptDataModule(sources=str(path), batch_size=1, show=False)


def test_what_is_absent_in_a_step_is_absent_in_every_logger(
    tiny_qwen3: Path, one_task_a_step: PromptDataModule, tmp_path: Path
) -> None:
    seen: list[str] = []

    class Tasks(WeightDistributionLogger):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["rollout"].tasks[0])
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    chain = [FunctionReward(function=sevens, name="sevens"), FunctionReward(function=only_a, name="only_a")]
    loggers = [CSVLogger(tmp_path, name="csv", flush_logs_every_n_steps=1), TensorBoardLogger(tmp_path, name="tb")]
    trainer = trainer_of(
        tmp_path, [*chain, Tasks(plot=False)], max_steps=6, limit_val_batches=0, logger=loggers, log_every_n_steps=1
    )
    trainer.fit(module_of(tiny_qwen3), one_task_a_step)
    assert sorted(seen) == ["a"] * 3 + ["b"] * 3

    with (tmp_path / "csv/version_0/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for task, row in zip(seen, rows, strict=True):
        assert (row["reward/only_a"] != "") == (task == "a")
        assert (row["weights/a/sevens"] != "") == (task == "a")
        assert (row["weights/b/sevens"] != "") == (task == "b")
        assert "reward/b/only_a" not in row  # it never applies there
        other = "ab".replace(task, "")
        for whole, of_task in (
            ("reward/sevens", "reward/{}/sevens"),
            ("length/mean", "length/{}/mean"),
            ("length/truncated", "length/{}/truncated"),
        ):
            assert row[of_task.format(task)] == row[whole]
            assert row[of_task.format(other)] == ""
        assert row["reward/sevens"] != ""
        assert row["train/loss"] != ""
    steps_of_a = [step for step, task in enumerate(seen) if task == "a"]
    assert scalar_steps(tmp_path / "tb/version_0", "reward/only_a") == steps_of_a


def test_each_task_has_its_own_means() -> None:
    cut = {"finish_reasons": ["length", "stop", "stop", "stop"]}
    rollout = make_rollout(["abc", "abcde", "ab", "abcd"], group_size=2, fields=cut, task=["a", "b"])
    rollout.rewards["mine"] = RewardScores.from_list(RewardSpec("mine"), [1.0, 3.0, 5.0, None])
    metrics = {name: float(value) for name, value in rollout_metrics(rollout).items()}
    assert metrics["reward/mine"] == pytest.approx(3.0)
    assert (metrics["reward/a/mine"], metrics["reward/b/mine"]) == (2.0, 5.0)
    assert (metrics["length/a/mean"], metrics["length/b/mean"], metrics["length/mean"]) == (4.0, 3.0, 3.5)
    assert (metrics["length/a/truncated"], metrics["length/b/truncated"]) == (0.5, 0.0)


def scalar_steps(folder: Path, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]
