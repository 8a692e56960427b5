"""``ResponseRecorder``: what a line holds, which steps are kept, and that no file is written into twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.records import ResponseRecorder, records
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import make_rollout


@pytest.fixture
def rollout() -> Rollout:
    nan = float("nan")
    fields = {
        "prompts": ["Dis « bonjour »", [{"role": "user", "content": "b"}]],
        "response_ids": [[2], [2, 3], [2], [2]],
        "finish_reasons": ["stop", "length", "stop", "stop"],
        "rewards": {
            "x": RewardScores.from_list(RewardSpec("x"), [1.0, 0.25, None, nan]),
            "y": RewardScores.from_list(RewardSpec("y"), [0.0, 0.0, 0.0, 0.0]),
        },
        "scalar_B": torch.tensor([0.5, 0.125, nan, 0.0]),
        "advantages_B": torch.tensor([1.0, -1.0, nan, 0.0]),
        "weights_BK": torch.tensor([[0.5, 0.5]] * 4),
        "weight_names": ["x", "y"],
        "normalized_BK": torch.tensor([[0.5, 0.0], [-0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    }
    columns: dict[str, list[Any]] = {"task": ["a", "b"], "reference": ["ref", None]}
    return make_rollout(["r0", "r1", "r2", "r3"], group_size=2, fields=fields, **columns)


def module_and_trainer(folder: Path, rank: int = 0) -> tuple[Any, Any]:
    trainer = SimpleNamespace(log_dir=str(folder), default_root_dir=".", is_global_zero=not rank, global_step=0)
    return SimpleNamespace(policy_steps=0), trainer


def lines(path: Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_record_by_hand(rollout: Rollout) -> None:
    assert records(rollout)[1] == {
        "prompt": "Dis « bonjour »",
        "response": "r1",
        "group": 0,
        "task": "a",
        "reference": "ref",
        "finish_reason": "length",
        "length": 2,
        "rewards": {"x": 0.25, "y": 0.0},
        "normalized": {"x": -0.5, "y": 0.0},
        "weights": {"x": 0.5, "y": 0.5},
        "reward": 0.125,
        "advantage": -1.0,
    }
    third = records(rollout)[2]
    assert third["prompt"] == [{"role": "user", "content": "b"}]
    assert third["rewards"] == {"x": None, "y": 0.0}
    assert third["normalized"] == {"y": 0.0}
    assert third["reward"] is None
    assert third["group"] == 1


def test_a_rollout_that_was_not_weighed_has_no_weights(rollout: Rollout) -> None:
    rollout.weights_BK = rollout.normalized_BK = rollout.scalar_B = None
    assert records(rollout)[0]["weights"] == {}
    assert records(rollout)[0]["normalized"] == {}
    assert records(rollout)[0]["reward"] is None


def test_training_keeps_every_nth_step_with_its_advantages(rollout: Rollout, tmp_path: Path) -> None:
    module, trainer = module_and_trainer(tmp_path / "run")
    recorder = ResponseRecorder(every_n_steps=2)
    recorder.setup(trainer, module, "fit")
    for step in range(1, 6):
        module.policy_steps = step
        recorder.on_train_batch_end(trainer, module, None, {"rollout": rollout}, 0)
    kept = lines(tmp_path / "run/rollouts.jsonl")
    assert [row["step"] for row in kept] == [1] * 4 + [3] * 4 + [5] * 4
    assert [row["advantage"] for row in kept[:4]] == [1.0, -1.0, None, 0.0]
    assert "« bonjour »" in (tmp_path / "run/rollouts.jsonl").read_text(encoding="utf-8")


def test_predictions_are_appended_in_a_run_and_numbered_across_runs(
    rollout: Rollout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        module, trainer = module_and_trainer(tmp_path)
        recorder = ResponseRecorder()
        recorder.setup(trainer, module, "predict")
        for _ in range(2):
            recorder.on_predict_batch_end(trainer, module, None, {"rollout": rollout}, 0)
        recorder.on_predict_end(trainer, module)
    assert len(lines(tmp_path / "predictions.jsonl")) == len(lines(tmp_path / "predictions-1.jsonl")) == 8
    assert capsys.readouterr().out.splitlines()[-1] == f"Responses: {tmp_path / 'predictions-1.jsonl'}"


def test_evaluations_are_recorded_only_where_asked_for(rollout: Rollout, tmp_path: Path) -> None:
    both = {"samples_val.jsonl", "samples_test.jsonl"}
    for evaluation, rank, expected in ((False, 0, set()), (True, 1, set()), (True, 0, both)):  # rank 0 writes for all
        module, trainer = module_and_trainer(tmp_path, rank)
        recorder = ResponseRecorder(every_n_steps=0, evaluation=evaluation)
        recorder.setup(trainer, module, "fit")
        recorder.on_train_batch_end(trainer, module, None, {"rollout": rollout}, 0)
        recorder.on_validation_batch_end(trainer, module, None, {"rollout": rollout}, 0)
        recorder.on_test_batch_end(trainer, module, None, {"rollout": rollout}, 0)
        assert {path.name for path in tmp_path.iterdir()} == expected
    assert lines(tmp_path / "samples_val.jsonl")[0]["step"] == 0
