"""Schedulers that a config names: torch's that hold others, those of transformers, and functions of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LRSchedulerCallable
from torch.optim import lr_scheduler

from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.cli import main
from maestro_pl.cli.class_paths import allow_files
from maestro_pl.errors import UserError
from maestro_pl.training.scheduling import make_scheduler
from maestro_pl.training.stepping import Stepper
from tests.support.schedules import rates

TORCH, THEIRS = "torch.optim.lr_scheduler", "transformers.get_{}_schedule_with_warmup"
MINE = """
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
if TYPE_CHECKING:
    from torch.optim import Optimizer

def typed(optimizer: Optimizer, rise: int = 2):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / rise)

def halves(step):
    return 0.5**step

def made(optimizer, rise, num_training_steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / rise / num_training_steps)
"""


def named(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path if "." in class_path else f"{TORCH}.{class_path}", "init_args": init_args}


LINEAR = named("LinearLR", start_factor=0.5, total_iters=2)
SEQUENCE = named("SequentialLR", schedulers=[LINEAR, named("CosineAnnealingLR", T_max=2)], milestones=[2])


@pytest.fixture
def parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArgumentParser:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    allow_files()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scheduler", type=Schedule | LRSchedulerCallable | None)
    return parser


def parsed(parser: ArgumentParser, value: Any) -> tuple[Any, str]:
    """What makes the scheduler, and the config that is written of it."""
    config: Namespace = parser.parse_object({"scheduler": value})
    return parser.instantiate(config).scheduler, parser.dump(config)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (SEQUENCE, [0.5, 0.75, 1, 0.5]),
        (named("LambdaLR", lr_lambda="mine.py:halves"), [1, 0.5, 0.25, 0.125]),
        (named(THEIRS.format("cosine"), num_warmup_steps=2), [0, 0.5, 1, 0.5]),
        (named(THEIRS.format("linear"), num_warmup_steps=0, num_training_steps=8), [1, 0.875, 0.75, 0.625]),
        (named("transformers.get_constant_schedule_with_warmup", num_warmup_steps=4), [0, 0.25, 0.5, 0.75]),
        ("transformers.get_constant_schedule", [1, 1, 1, 1]),
        (named("mine.py:made", rise=2), [0, 0.125, 0.25, 0.375]),
        (
            named(
                "SequentialLR", schedulers=[LINEAR, named(THEIRS.format("linear"), num_warmup_steps=0)], milestones=[1]
            ),
            [0.5, 1, 0.75, 0.5],
        ),
        (named("ChainedScheduler", schedulers=[LINEAR, named("ExponentialLR", gamma=0.5)]), [0.5, 0.375, 0.25, 0.125]),
    ],
)
def test_what_a_config_can_name(value: Any, expected: list[float], parser: ArgumentParser) -> None:
    made_by, written = parsed(parser, value)
    assert rates(made_by, 4) == pytest.approx(expected)
    again, _ = parsed(parser, yaml.safe_load(written)["scheduler"])  # as a run's own config.yaml has it
    assert rates(again, 4) == pytest.approx(expected)


def test_what_is_refused(parser: ArgumentParser) -> None:
    made_by, _ = parsed(parser, named(THEIRS.format("cosine"), num_warmup_steps=2))
    with pytest.raises(
        UserError, match=r"get_cosine_schedule_with_warmup needs an end: give num_training_steps, or trainer"
    ):
        rates(made_by, None)
    made_by, _ = parsed(parser, SEQUENCE | {"init_args": SEQUENCE["init_args"] | {"milestones": [1, 2]}})
    with pytest.raises(UserError, match=r"does not take these arguments: .*milestones"):
        rates(made_by, 4)
    with pytest.raises(Exception, match="num_warmup_steps"):
        parsed(parser, named(THEIRS.format("cosine")))


def test_types_for_a_checker_only_do_not_matter(parser: ArgumentParser) -> None:
    made_by, _ = parsed(parser, named("mine.py:typed", rise=4))
    assert rates(made_by, None, 2) == [0.0, 0.25]
    with pytest.raises(Exception, match="rise"):  # the others are checked
        parsed(parser, named("mine.py:typed", rise="up"))


def test_one_that_ends_before_the_run_is_a_sentence() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=2), optimizer, None)
    module: Any = SimpleNamespace(optimizer_parts=lambda: [(None, None, scheduler)], lr_schedulers=lambda: scheduler)
    optimizer.step()
    Stepper(module).step_scheduler(0)
    Stepper(module).step_scheduler(0)
    with pytest.raises(UserError, match=r"model\.scheduler: OneCycleLR ends before the run does .*give it the steps"):
        Stepper(module).step_scheduler(0)


def test_from_python_they_are_torchs_own() -> None:
    def made(optimizer: Any) -> Any:
        parts: list[Any] = [lr_scheduler.LinearLR(optimizer, 0.5), lr_scheduler.ConstantLR(optimizer, 1.0)]
        return lr_scheduler.SequentialLR(optimizer, parts, [1])

    assert rates(made, 4)[0] == 0.5


@pytest.mark.slow
def test_a_run_with_a_sequence_goes_on_as_if_it_had_not_stopped(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(8)))
    config = {
        "model": {"policy": {"model": str(tiny_qwen3), "dtype": "float32"}, "scheduler": SEQUENCE},
        "data": {"sources": "data.jsonl", "batch_size": 2, "show": False},
        "rollout": {"group_size": 2, "max_new_tokens": 2},
        "rewards": [{"class_path": "callbacks.EntropyReward"}],
        "trainer": {"accelerator": "cpu", "limit_val_batches": 0},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", "tiny.yaml"]

    def rate(version: int) -> float:
        (path,) = tmp_path.glob(f"runs/*/version_{version}/checkpoints/last.ckpt")
        group = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"][0]
        return float(group["lr"] / group["initial_lr"])

    main([*fit, "--trainer.max_steps", "3"])
    main([*fit, "--trainer.max_steps", "1"])
    main([*fit, "--trainer.max_steps", "3", "--ckpt_path", "last"])
    assert [rate(version) for version in range(3)] == pytest.approx([0.5, 0.75, 0.5])
