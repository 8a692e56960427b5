"""The report on the rewards at the end of the warm-up and of training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from callbacks.reward_report import RewardReport
from callbacks.rewards import FunctionReward
from maestro_pl import Anchoring, Meta
from maestro_pl.conductor import AnchorSignal, GradientLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.data import PromptDataModule
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import make_rollout, module_of, rewards, sevens, trainer_of


def read_csv(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {f"{row['task']}/{row['reward']}": row for row in csv.DictReader(file)}


def trainer(folder: Path, callbacks: list[Any]) -> Any:
    return SimpleNamespace(
        log_dir=str(folder), default_root_dir=str(folder), callbacks=callbacks, is_global_zero=True, global_step=0
    )


def rollout_of(*values: float) -> Rollout:
    scores = {"x": RewardScores.from_list(RewardSpec("x"), values)}
    return make_rollout(["r"] * len(values), group_size=2, fields={"rewards": scores})


def test_warm_up_and_training_are_reported_apart_and_a_resumed_run_goes_on(
    tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(8)))

    def run(folder: Path, steps: int, checkpoint: Path | None = None) -> Any:
        chain = rewards(FunctionReward(function=sevens, name="gold", role="anchor"))
        made = trainer_of(folder, [*chain, RewardReport()], max_steps=steps, limit_val_batches=0)
        data = PromptDataModule(sources=str(prompts), batch_size=2, show=False)
        settings: dict[str, Any] = {
            "weigher": Conductor(action="soft"),
            "meta": Meta(signal=AnchorSignal(), learner=GradientLearner(), warmup=2),
            "anchoring": Anchoring(fraction=0.5),
        }
        made.fit(module_of(tiny_qwen3, **settings), data, ckpt_path=checkpoint, weights_only=False)
        return made

    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    run(whole, 2)
    printed = capsys.readouterr().out
    assert printed.index("The rewards over the warm-up") < printed.index("The rewards over training")
    assert f"Written to {whole / 'rewards_warmup.csv'}" in printed
    warmup, training = read_csv(whole / "rewards_warmup.csv"), read_csv(whole / "rewards.csv")
    assert warmup["all/gold"]["n"] == "16"  # 2 batches of 2 groups of 4, all labelled
    assert training["all/sevens"]["n"] == "16"
    assert int(training["all/gold"]["n"]) < 16
    # the anchor is the reward itself
    assert float(warmup["all/sevens"]["anchor_r"]) == pytest.approx(1.0)

    run(first, 1).save_checkpoint(first / "last.ckpt")
    run(second, 2, first / "last.ckpt")
    assert (second / "rewards.csv").read_text() == (whole / "rewards.csv").read_text()
    assert not (second / "rewards_warmup.csv").exists()  # that was reported by the run that had it


def test_a_run_that_ends_early_reports_what_it_has_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = RewardReport()
    made, module = trainer(tmp_path, [report]), SimpleNamespace(warmup=(0, 0))
    report.setup(made, module, "fit")  # type: ignore[arg-type]
    report.on_exception(made, module, KeyboardInterrupt())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out
    report.on_train_batch_start(made, module, {}, 0)  # type: ignore[arg-type]
    report.on_train_batch_end(made, module, None, {"rollout": rollout_of(0.0, 1.0, 2.0, 2.0)}, 0)  # type: ignore[arg-type]
    report.on_exception(made, module, KeyboardInterrupt())  # type: ignore[arg-type]
    assert read_csv(tmp_path / "rewards.csv")["a/x"]["told_apart_share"] == "0.5"
    assert "groups told apart" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = RewardReport()
    made, module = trainer(tmp_path / "file", [report]), SimpleNamespace()
    report.setup(made, module, "fit")  # type: ignore[arg-type]
    report.on_train_batch_end(made, module, None, {"rollout": rollout_of(0.0, 1.0)}, 0)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"rewards\.csv is not written"):
        report.on_train_end(made, module)  # type: ignore[arg-type]


def test_the_first_rank_reports_the_batch_of_all_ranks(tmp_path: Path) -> None:
    report, other = RewardReport(), RewardReport()
    made, module = trainer(tmp_path, [report]), SimpleNamespace()
    report.setup(made, module, "fit")  # type: ignore[arg-type]
    rollout = rollout_of(3.0, 3.0)
    rollout.everywhere = rollout_of(3.0, 3.0, 0.0, 1.0)
    report.on_train_batch_end(made, module, None, {"rollout": rollout}, 0)  # type: ignore[arg-type]
    report.on_train_end(made, module)  # type: ignore[arg-type]
    row = read_csv(tmp_path / "rewards.csv")["a/x"]
    assert (row["n"], row["groups"], row["told_apart"]) == ("4", "2", "1")

    made.is_global_zero = False
    other.setup(made, module, "fit")  # type: ignore[arg-type]
    other.on_train_batch_end(made, module, None, {"rollout": rollout}, 0)  # type: ignore[arg-type]
    other.on_train_end(made, module)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["rewards.csv"]


def test_sums_can_be_loaded_without_code(tmp_path: Path) -> None:
    report = RewardReport()
    report.statistics["fit"].add(rollout_of(0.0, 1.0))
    torch.save(report.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == report.state_dict()
