"""Every key of a config that differs when a run is gone on with is named, once, under one rule."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import pytest
import yaml

from callbacks.rollout import RolloutGenerator
from maestro_pl.cli import main
from maestro_pl.training.checkpointing import leaves, restore

SCHEDULER = '{"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 6}}'
SECTIONS = {
    "seed_everything": ("seed_everything",),
    "method": ("method",),
    "model": ("model.loss.clip_low", "model.kl.coef", "model.weigher.action", "model.meta.every", "model.anchoring.fraction"),
    "model.policy": ("model.policy.model", "model.policy.lora.r", "model.policy.dtype", "model.policy.reference"),
    "model.optimizer": ("model.optimizer.class_path", "model.optimizer.lr", "model.optimizer.weight_decay"),
    "model.scheduler": ("model.scheduler.class_path", "model.scheduler.T_max"),
    "data": ("data.batch_size", "data.sources.0.path"),
    "rollout": ("rollout.temperature", "rollout.group_size", "rollout.engine", "rollout.seed"),
    "rewards": ("rewards.0.class_path", "rewards.0.normalize"),
    "anchors": ("anchors.0.function",),
    "trainer": ("trainer.max_steps", "trainer.precision", "trainer.default_root_dir"),
    "trainer.logger": ("trainer.logger.class_path", "trainer.logger.save_dir", "trainer.logger.name"),
}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> str:
    """The whole config of a run, as its checkpoints carry it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main(["fit", "--model.scheduler", SCHEDULER, "--print_config"])
    return printed.getvalue()


class Fake:
    """What :func:`restore` asks of a module, without a model."""

    reward_specs: list[Any] = []
    own_rng = None

    def __init__(self, run_config: str) -> None:
        self.run_config = run_config

    def settings(self) -> dict[str, Any]:
        return {}

    state_dict = settings

    def check_settings(self, saved: Any) -> None:
        pass

    check_rewards = load_training_state = check_settings


def differences(before: str, now: str) -> list[str]:
    """What is said when a run with one config goes on from a checkpoint of another one."""
    entry = {"format": 1, "module": "Fake", "rewards": [], "settings": {}, "config": before}
    generator = RolloutGenerator(temperature=0.3)  # whose own report is for runs without a config
    checkpoint = {
        "maestro": entry, "state_dict": {}, "callbacks": {generator.state_key: {**generator.state_dict(), "top_k": 3}},
    }  # fmt: skip
    module: Any = Fake(now)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        restore(module, checkpoint)
        generator.on_load_checkpoint(None, module, checkpoint)  # type: ignore[arg-type]
    assert len(said) <= 1
    return [change for each in said for change in str(each.message).partition("(checkpoint -> now): ")[2].split("; ")]


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value}x"


@pytest.mark.parametrize("section", SECTIONS)
def test_each_key_that_differs_is_named_once(section: str, config: str) -> None:
    before = leaves(config)
    changed: dict[str, tuple[Any, Any]] = {}

    def walk(value: Any, path: str, inside: bool) -> Any:
        name = path.replace(".init_args.", ".")
        inside = inside or name == section
        if isinstance(value, dict) and value:
            return {key: walk(entry, f"{path}.{key}" if path else key, inside) for key, entry in value.items()}
        if isinstance(value, list) and value:
            return [walk(entry, f"{path}.{place}", inside) for place, entry in enumerate(value)]
        if not inside:
            return value
        changed[name] = (value, other(value))
        return other(value)

    now = yaml.safe_dump(walk(yaml.safe_load(config), "", False), sort_keys=False)
    assert set(SECTIONS[section]) <= changed.keys() <= before.keys()
    assert differences(config, now) == [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]


def test_nothing_is_said_where_nothing_differs(config: str) -> None:
    assert differences(config, f"# the same\n{config}\nckpt_path: elsewhere.ckpt\n") == []
