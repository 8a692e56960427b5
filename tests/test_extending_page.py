"""The files of docs/extending.md are written as they stand, and a run trains with all of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks.rewards import Reward
from maestro_pl.cli import main
from maestro_pl.conductor import Learner, MetaSignal, Weigher
from maestro_pl.generation import Engine
from maestro_pl.run.importing import import_name

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
KINDS = {
    "my_reward.py": ("Novelty", Reward),
    "my_weigher.py": ("WeakestFirst", Weigher),
    "my_signal.py": ("Brief", MetaSignal),
    "my_learner.py": ("Clamped", Learner),
    "my_engine.py": ("Noise", Engine),
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``config/mine.yaml`` and the files that it names beside it."""
    folder = tmp_path / "config"
    folder.mkdir()
    for name, text in re.findall(r"```\w+\n# (\w+\.\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def test_the_page_has_one_of_each(files: Path) -> None:
    assert {path.name for path in files.iterdir()} == {*KINDS, "my_loss.py", "mine.yaml"}
    for name, (attribute, kind) in KINDS.items():
        module, found = import_name(f"{files / name}:{attribute}", "class")
        assert issubclass(getattr(module, found), kind)
    text = PAGE.read_text(encoding="utf-8")
    for name in (*KINDS, "my_loss.py"):
        assert text.count(f"{name}:") >= 1  # and how a config names it


@pytest.mark.slow
def test_a_run_trains_with_all_of_them(files: Path, tmp_path: Path) -> None:
    small = ["--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", "--data.batch_size=2"]
    sandbox = ["--config", str(PAGE.parents[1] / "configs/quickstart.yaml"), "--config", "config/mine.yaml"]
    main(["fit", *sandbox, *small, "--trainer.max_steps=2", "--trainer.callbacks+=callbacks.ResponseRecorder",
          "--trainer.callbacks.every_n_steps=1"])  # fmt: skip
    run = next((tmp_path / "runs").glob("*/version_0"))
    settings = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["maestro"]["settings"]
    kept = {key: settings[key] for key in ("meta.signal", "meta.learner", "loss.type")}
    assert kept == {"meta.signal": "Brief", "meta.learner": "Clamped", "loss.type": "capped"}
    records = [json.loads(line) for line in (run / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records
    assert all({"format", "novelty"} <= set(record["rewards"]) for record in records)
    config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["rollout"]["engine"]["class_path"] == f"{files / 'my_engine.py'}:Noise"
    assert config["model"]["loss"]["type"] == f"{files / 'my_loss.py'}:capped"

    # the run's config is whole: it goes on from anywhere, here with the weigher of the page
    main(["fit", "--config", str(run / "config.yaml"), "--model.weigher=config/my_weigher.py:WeakestFirst",
          "--trainer.logger.name=again", "--trainer.max_steps=1"])  # fmt: skip
    again = tmp_path / "runs/again/version_0/checkpoints/last.ckpt"
    assert torch.load(again, weights_only=True)["maestro"]["settings"]["weigher"] == "WeakestFirst"
