"""What a run keeps and says: one folder whatever the logger, the config in its checkpoints, sentences when it is cut off."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maestro_pl.cli import main
from maestro_pl.cli.arguments import with_config
from maestro_pl.errors import UserError

pytestmark = pytest.mark.slow  # whole runs

USERS_CODE = """
import errno
import os
import sys
import lightning
from lightning.pytorch.loggers.logger import Logger

class FakeWandb(Logger):
    def __init__(self, name=None, save_dir=".", project="lightning_logs"):
        super().__init__()
        self._project, self._save_dir, self.rows = project, save_dir, []

    name = property(lambda self: self._project)
    version = property(lambda self: None)
    save_dir = property(lambda self: self._save_dir)

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)

class AtStep(lightning.Callback):
    error = staticmethod(lambda: None)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.policy_steps == 1:
            self.error()

class Full(AtStep):
    def error(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.csv")

class TooLarge(AtStep):
    def error(self):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "metrics.csv")

class Exits(AtStep):
    def error(self):
        sys.exit("no API key")

class Wanders(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")

class BugAndBadObserver(AtStep):
    def error(self):
        raise KeyError("the first error")

    def on_exception(self, trainer, pl_module, exception):
        raise RuntimeError("the second error")
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``tiny.yaml``, its data and a module of the user's."""
    rows = [{"prompt": f"Say {i}", "reference": str(i), "task": ("even", "odd")[i % 2]} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": {"policy": {"model": str(tiny_qwen3), "dtype": "float32"}, "weigher": "maestro_pl.Conductor"},
        "data": {"sources": "data.jsonl", "fractions": [0.5, 0.25, 0.25], "batch_size": 2, "show": False},
        "rollout": {"group_size": 2, "eval_group_size": 1, "max_new_tokens": 2},
        "rewards": [
            {"class_path": "callbacks.FormatReward"},
            {"class_path": "callbacks.EntropyReward"},
        ],
        "trainer": {"accelerator": "cpu", "max_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_code.py").write_text(USERS_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_code", raising=False)
    monkeypatch.delenv("MAESTRO_DEBUG", raising=False)
    return tmp_path


FIT = ["fit", "--config", "tiny.yaml"]
ADAMW = '{{"class_path": "torch.optim.AdamW", "init_args": {{"lr": {lr}}}}}'


def fail(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and sentence of a command that must fail with one line and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maestro-pl: error: ")]
    assert len(lines) == 1
    return int(str(caught.value.code)), lines[0].removeprefix("maestro-pl: error: ")


def test_one_folder_a_run_where_the_logger_has_none(folder: Path) -> None:
    for version in (0, 1):
        main([*FIT, "--trainer.logger", "users_code.FakeWandb"])
        run = folder / f"runs/tiny/version_{version}"
        assert {path.name for path in run.iterdir()} == {
            "config.yaml", "weights.csv", "weights.png", "rollouts.jsonl", "rewards.csv", "report.html", "checkpoints",
        }  # fmt: skip
        assert (run / "checkpoints/last.ckpt").is_file()
    assert {path.name for path in (folder / "runs").iterdir()} == {"tiny"}
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        "data.jsonl", "tiny.yaml", "users_code.py", "runs",
    }  # fmt: skip


@pytest.mark.parametrize("logger", ["lightning.pytorch.loggers.CSVLogger", "users_code.FakeWandb"])
def test_a_working_folder_that_changes_moves_nothing(
    logger: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dir = [] if "Fake" in logger else ["--trainer.logger.save_dir=runs", "--trainer.logger.name=tiny"]
    main([*FIT, "--trainer.logger", logger, *save_dir, "--trainer.callbacks", "users_code.Wanders"])
    run = folder / "runs/tiny/version_0"
    assert {"config.yaml", "weights.csv", "rollouts.jsonl", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert (run / "metrics.csv").is_file() == bool(save_dir)
    assert (run / "checkpoints/last.ckpt").is_file()
    assert {path.name for path in (folder / "elsewhere").rglob("*")} <= {"elsewhere"}
    assert "Writing to runs/tiny/version_0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("callback", "message", "kept"),
    [
        ("EarlyStopping", "trainer: Early stopping conditioned on metric `health/no` which is not available", True),
        ("ModelCheckpoint", "trainer: `ModelCheckpoint(monitor='health/no')` could not find the monitored key", False),
    ],
)
def test_a_monitor_that_is_not_logged_ends_in_a_sentence(
    callback: str, message: str, kept: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = f'{{"class_path": "lightning.pytorch.callbacks.{callback}", "init_args": {{"monitor": "health/no"}}}}'
    often = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1"]
    status, sentence = fail([*FIT, *often, "--trainer.callbacks", watched], capsys)
    assert status == 1
    assert sentence.startswith(message)
    assert ("`maestro-pl fit --ckpt_path runs/tiny/version_0/checkpoints/" in sentence) == kept
    assert ("No checkpoint was written yet" in sentence) != kept


@pytest.mark.parametrize(
    "loggers",
    [
        "false",
        "lightning.pytorch.loggers.TensorBoardLogger",
        '[{"class_path": "users_code.FakeWandb"}, {"class_path": "lightning.pytorch.loggers.CSVLogger",'
        ' "init_args": {"save_dir": "runs", "name": "tiny"}}]',
    ],
)
def test_one_folder_a_run_with_another_logger_none_or_several(loggers: str, folder: Path) -> None:
    main([*FIT, "--trainer.logger", loggers])
    main([*FIT, "--trainer.logger", loggers, "--ckpt_path", "last", "--trainer.max_steps", "2"])
    for version, step in ((0, 1), (1, 2)):
        run = folder / f"runs/tiny/version_{version}"
        assert {"config.yaml", "weights.csv", "checkpoints"} <= {path.name for path in run.iterdir()}
        saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["maestro"]
        assert saved["policy_steps"] == step
    assert not (folder / "checkpoints").exists()
    assert not (folder / "lightning_logs").exists()


def test_a_logger_whose_package_is_missing_is_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "needs.py").write_text(
        "from users_code import FakeWandb\n"
        "class Needs(FakeWandb):\n"
        "    def __init__(self, name=None, save_dir='.'):\n"
        "        raise ModuleNotFoundError(\"Requirement 'wandb>=0.12.10' not met.\")\n"
    )
    status, sentence = fail([*FIT, "--trainer.logger", "needs.Needs"], capsys)
    assert status == 2
    assert sentence == "the config names a class whose package is missing: Requirement 'wandb>=0.12.10' not met."


@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_a_save_dir_that_cannot_be_written_is_a_sentence(
    kind: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder / "taken"
    if kind == "a file":
        place.touch()
    else:
        import os

        makedirs = os.makedirs

        def refused(name: Any, *args: Any, **kwargs: Any) -> None:
            if str(name).startswith(str(place)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
            makedirs(name, *args, **kwargs)

        monkeypatch.setattr(os, "makedirs", refused)
    status, sentence = fail([*FIT, "--trainer.logger.save_dir", str(place)], capsys)
    assert status == 2
    assert "cannot be written" in sentence
    assert "--trainer.logger.save_dir" in sentence


@pytest.mark.parametrize(
    ("callback", "status", "message"),
    [
        ("Full", 1, "The run's folder cannot be written: No space left on device (metrics.csv). Nothing is lost"),
        ("TooLarge", 1, "The run's folder cannot be written: File too large (metrics.csv). Nothing is lost"),
        ("Exits", 1, "users_code.Exits.error raised SystemExit: no API key ("),
    ],
)
def test_what_ends_a_run_is_a_sentence_that_names_what_is_kept(
    callback: str, status: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*FIT, "--trainer.max_steps", "3", "--trainer.callbacks", f"users_code.{callback}"]
    got, sentence = fail(args, capsys)
    assert got == status
    assert sentence.startswith(message)
    path = Path(sentence.split("--ckpt_path ")[1].split("`")[0])
    assert torch.load(path, weights_only=True)["maestro"]["policy_steps"] == 1


def test_an_observer_that_fails_on_the_way_out_hides_no_error_and_stops_no_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    from callbacks.weights import WeightDistributionLogger

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "the third error")

    monkeypatch.setattr(CSVLogger, "finalize", fails)
    monkeypatch.setattr(WeightDistributionLogger, "on_exception", fails)
    args = [*FIT, "--trainer.max_steps", "3", "--trainer.callbacks", "users_code.BugAndBadObserver"]
    with (
        pytest.warns(UserWarning, match="BugAndBadObserver failed while the run was ending: RuntimeError: the second"),
        pytest.raises(KeyError, match="the first error"),
    ):
        main(args)
    saved = torch.load(folder / "runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["maestro"]["policy_steps"] == 1


def test_a_checkpoint_carries_its_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*FIT, "--rollout.max_new_tokens", "3"])
    saved = folder / "runs/tiny/version_0/checkpoints/last.ckpt"
    (folder / "elsewhere").mkdir()
    copied = saved.rename(folder / "elsewhere/copied.ckpt")
    config = yaml.safe_load(with_config(["test", "--ckpt_path", str(copied)])[2])
    assert config["rollout"]["max_new_tokens"] == 3
    assert config["data"]["sources"] == "data.jsonl"
    main(["test", "--ckpt_path", str(copied)])
    tested = folder / "runs/tiny/version_1"
    assert yaml.safe_load((tested / "test.config.yaml").read_text())["rollout"]["max_new_tokens"] == 3

    content = torch.load(copied, weights_only=True)
    del content["maestro"]["config"]
    torch.save(content, folder / "elsewhere/without.ckpt")
    status, sentence = fail(["test", "--ckpt_path", "elsewhere/without.ckpt"], capsys)
    assert status == 2
    assert "carries no config" in sentence
    assert "--config FILE" in sentence


def test_last_is_the_newest_whole_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keeps = ["--trainer.callbacks+=callbacks.RunCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]
    main([*FIT, *keeps, "--trainer.max_steps", "4"])  # an update whose groups are all dead is skipped, and not saved
    saved = folder / "runs/tiny/version_0/checkpoints"
    content = bytearray((saved / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    (saved / "last.ckpt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged .* takes .*step-00000\d\.ckpt, the newest whole one"):
        main([*FIT, "--ckpt_path", "last", "--trainer.max_steps", "5"])
    resumed = folder / "runs/tiny/version_1/checkpoints/last.ckpt"
    assert torch.load(resumed, weights_only=True)["maestro"]["policy_steps"] == 5

    for path in folder.rglob("*.ckpt"):
        path.write_bytes(b"")
    status, sentence = fail([*FIT, "--ckpt_path", "last"], capsys)
    assert status == 2
    assert "no checkpoint is whole" in sentence


def test_what_a_resumed_run_does_otherwise_is_named_once(folder: Path) -> None:
    main([*FIT, "--model.optimizer", ADAMW.format(lr=0.01)])
    now = {
        "model.policy.sync_every": ("6", "9"), "model.max_grad_norm": ("1.0", "2.0"), "rollout.temperature": ("1.0", "0.5"),
        "rollout.max_new_tokens": ("2", "3"), "trainer.max_steps": ("1", "2"), "trainer.logger.name": ("'tiny'", "'other'"),
    }  # fmt: skip
    options = [word for key, (_, value) in now.items() for word in (f"--{key}", value.strip("'"))]
    saved = "runs/tiny/version_0/checkpoints/last.ckpt"
    with pytest.warns(UserWarning, match="checkpoint -> now") as warned:
        main([*FIT, "--model.optimizer", ADAMW.format(lr=0.02), *options, "--ckpt_path", saved])
    said = " ".join(str(each.message) for each in warned)
    named = said.partition("(checkpoint -> now): ")[2]
    for key, (before, value) in {**now, "model.optimizer.lr": ("0.01", "0.02")}.items():
        assert f"{key}: {before} -> {value}" in named
        assert said.count(f"{key.rpartition('.')[2]}: {before}") == 1  # by nobody else either, under whatever name


def test_a_file_that_is_no_checkpoint_is_refused_before_anything_is_built(folder: Path) -> None:
    Path("half.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"'half\.ckpt' is not a checkpoint, or only a part of one"):
        with_config(["test", "--ckpt_path", "half.ckpt"])
