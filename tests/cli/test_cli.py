"""``maestro-pl``: whole runs on a tiny model, the folder they write, and what is kept when they end early."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from callbacks.checkpoint import RunCheckpoint
from callbacks.progress import StageProgressBar
from maestro_pl.cli import main
from maestro_pl.cli.quiet import quiet
from maestro_pl.cli.run import OBSERVERS, MaestroCLI, Parser

USERS_CODE = """
import lightning

calls = 0

def fine(prompts, completions):
    return [0.1 * (i % 4) for i in range(len(completions))]

def third_is_infinite(prompts, completions):
    global calls
    calls += 1
    return [float("inf") if calls == 3 else 0.1 * (i % 4) for i in range(len(completions))]

def at_once_infinite(prompts, completions):
    return [float("inf")] * len(completions)

class Interrupted(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.policy_steps == 2:
            raise KeyboardInterrupt

def third_exits(prompts, completions):
    global calls
    calls += 1
    if calls == 3:
        raise SystemExit("no API key")
    return [0.1 * (i % 4) for i in range(len(completions))]

class Exits(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.policy_steps == 2:
            raise SystemExit(0)

class Generator(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.policy_steps == 2:
            raise GeneratorExit

class LateBug(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.policy_steps == 2:
            raise KeyError("a bug")

class Bug(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise KeyError("a bug")
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``tiny.yaml``, its data and a module of the user's."""
    rows = [{"prompt": f"Say {i}", "reference": str(i), "task": ("even", "odd")[i % 2]} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": {
            "policy": {"model": str(tiny_qwen3), "dtype": "float32"},
            "weigher": "maestro_pl.Conductor",
        },
        "data": {"sources": "data.jsonl", "fractions": [0.6, 0.2, 0.2], "batch_size": 2, "show": False},
        "rollout": {"group_size": 2, "eval_group_size": 2, "max_new_tokens": 4},
        "rewards": [
            {"class_path": "callbacks.FormatReward"},
            {"class_path": "callbacks.LengthReward", "init_args": {"max": 3}},
        ],
        "trainer": {"accelerator": "cpu", "max_steps": 3, "num_sanity_val_steps": -1, "val_check_interval": 3},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_code.py").write_text(USERS_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_code", raising=False)
    monkeypatch.delenv("MAESTRO_DEBUG", raising=False)
    return tmp_path


def function_reward(name: str) -> str:
    return json.dumps([{"class_path": "callbacks.FunctionReward", "init_args": {"function": f"users_code.{name}"}}])


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fail(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and sentence of a command that must fail with one line and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maestro-pl: error: ")]
    assert len(lines) == 1
    return caught.value.code, lines[0].removeprefix("maestro-pl: error: ")


def printed_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*args, "--print_config"])
    assert caught.value.code in (0, None)
    return capsys.readouterr().out


def test_version_help_and_a_mistyped_command_do_not_load_torch() -> None:
    script = (
        "import sys\nfrom maestro_pl.cli import main\nmain(['--version'])\nmain(['--help'])\nmain([])\n"
        "try: main(['fitt'])\nexcept SystemExit as stop: print('status', stop.code)\n"
        "print('torch' in sys.modules, 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "maestro-pl 0.1.0"
    assert done.stdout.count("usage: maestro-pl COMMAND") == 2
    assert done.stdout.splitlines()[-2:] == ["status 2", "False False"]
    assert "did you mean fit?" in done.stderr


def test_help_and_docs_name_every_top_key_and_observer() -> None:
    from maestro_pl.cli import USAGE

    cli = LightningCLI.__new__(MaestroCLI)
    cli.arguments = ["fit", "--method", "sft"]  # which has no weigher to be chosen under `model`, a key not added here
    parser = Parser(exit_on_error=False)
    cli.add_arguments_to_parser(parser)
    keys = {key.partition(".")[0] for key in parser.get_defaults().keys(branches=True)}
    listed = USAGE.partition("YAML with the keys ")[2].partition(";")[0].split(", ")
    assert keys | {"model", "data", "trainer"} == set(listed)
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    for observer in (*OBSERVERS, StageProgressBar, RunCheckpoint):
        assert f"| `{observer.__name__}` | " in page


#: Runs a command while bitsandbytes says, as it is imported, what it says on a CPU with AVX512-BF16 and no GPU.
ON_SUCH_A_CPU = """
import importlib.abc, logging, sys
imported = []
class Speaks(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "bitsandbytes.backends.cpu.ops":
            imported.append(name)
            logging.getLogger(name).warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "x")
sys.meta_path.insert(0, Speaks())
from maestro_pl.cli import main
try:
    main(sys.argv[1:])
finally:
    print("bitsandbytes was imported:", bool(imported))
"""


@pytest.mark.slow
def test_a_run_says_nothing_on_stderr_that_is_not_about_the_run(tmp_path: Path) -> None:
    arguments = "fit --model.policy.gradient_checkpointing true --rollout.max_new_tokens 8 --data.eval_limit 2"
    steps = "--trainer.max_steps 1 --trainer.num_sanity_val_steps 0 --trainer.limit_val_batches 0"
    done = subprocess.run(
        [sys.executable, "-c", ON_SUCH_A_CPU, *arguments.split(), *steps.split()],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "MAESTRO_DEBUG": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train 1/1" in done.stdout
    assert done.stdout.splitlines()[-1] == "bitsandbytes was imported: True"
    for noise in ("gemm_4bit_forward", "FutureWarning", "deprecated", "checkpointing", "rank_zero_warn(", ".py:"):
        assert noise not in done.stderr


@pytest.mark.slow
def test_a_command_is_silenced_before_its_modules_are_imported() -> None:
    command = [sys.executable, "-c", ON_SUCH_A_CPU, "fit", "--config", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "bitsandbytes was imported: True\n"
    assert [line.split(":")[:3] for line in done.stderr.splitlines()] == [["maestro-pl", " error", " --config"]]


def test_a_warning_is_one_sentence_without_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = warnings.formatwarning
    monkeypatch.setattr(warnings, "formatwarning", shown)  # put back afterwards
    monkeypatch.setenv("MAESTRO_DEBUG", "1")
    quiet()
    assert warnings.formatwarning is shown
    monkeypatch.setenv("MAESTRO_DEBUG", "0")
    quiet()
    text = warnings.formatwarning("2 rows are left out:\n  \x1b[1ma", UserWarning, "rows.py", 3, "rank_zero_warn(")
    assert text == "maestro-pl: warning: 2 rows are left out:\n    \\x1b[1ma\n"


def test_ctrl_c_while_a_command_loads_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maestro_pl.cli._dispatch", interrupted)
    monkeypatch.delenv("MAESTRO_DEBUG", raising=False)
    assert fail(["fit"], capsys) == (130, "stopped by Ctrl-C.")
    monkeypatch.setenv("MAESTRO_DEBUG", "1")
    with pytest.raises(KeyboardInterrupt):
        main(["fit"])


def test_a_tool_gets_the_remaining_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import maestro_pl.cli as cli

    given: list[list[str]] = []
    monkeypatch.setitem(cli.TOOLS, "compare", "json:loads")
    monkeypatch.setattr(json, "loads", given.append)
    main(["compare", "a", "--b"])
    assert given == [["a", "--b"]]


@pytest.mark.slow
def test_fit_then_test_predict_and_resume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "tiny.yaml"])
    first = folder / "runs/tiny/version_0"
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "Run:        runs/tiny/version_0"
    assert "train 3/3" in shown
    assert {path.name for path in first.iterdir()} == {
        "config.yaml", "metrics.csv", "weights.csv", "weights.png", "rollouts.jsonl", "val_metrics.csv",
        "before_after.csv", "rewards.csv", "report.html", "checkpoints",
    }  # fmt: skip
    assert "Report:     runs/tiny/version_0/report.html" in shown
    report = (first / "report.html").read_text(encoding="utf-8")
    assert '<th scope="row" class="key">trainer.max_steps</th><td class="key">200</td><td class="key">3</td>' in report
    assert "<summary>" in report
    assert [row["step"] for row in read_csv(first / "weights.csv") if row["task"] == "all"] == list("112233")
    assert {row["step"] for row in read_csv(first / "val_metrics.csv")} == {"0", "3"}
    assert len(read_csv(first / "metrics.csv")) >= 3
    checkpoint = first / "checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["maestro"]["policy_steps"] == 3

    before = digest(first)
    # without --config, the config of the run that wrote the checkpoint
    main(["test", "--ckpt_path", str(checkpoint)])
    tested = folder / "runs/tiny/version_1"
    rows = read_csv(tested / "test_metrics.csv")
    assert {row["task"] for row in rows} == {"even", "odd", "all"}
    assert {"reward/length", "weights/format"} <= {row["metric"] for row in rows}
    assert {row["step"] for row in rows} == {"3"}
    assert (tested / "test.config.yaml").is_file()
    report = (tested / "report.html").read_text(encoding="utf-8")
    assert "reward/length" in report
    assert 1 <= report.count("<summary>") <= 10  # of the responses of the test, none of which is recorded
    assert not list(tested.glob("samples_test*"))

    main(["predict", "--config", "tiny.yaml", "--ckpt_path", str(checkpoint)])
    lines = (folder / "runs/tiny/version_2/predictions.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert len(prompts) == 2 * len(set(prompts)) > 0
    assert digest(first) == before

    main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    resumed = folder / "runs/tiny/version_3"
    assert {row["step"] for row in read_csv(resumed / "weights.csv")} == {"4"}
    assert digest(first) == before


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in (
        ["--trainer.logger.version", "7"],
        ["--trainer.logger", "false", "--trainer.default_root_dir", "here"],
    ):
        args = [
            "fit",
            "--config",
            "tiny.yaml",
            "--trainer.max_steps",
            "1",
            "--trainer.num_sanity_val_steps",
            "0",
            *extra,
        ]
        main(args)
        before = digest(folder)
        status, sentence = fail(args, capsys)
        assert status == 2
        assert "already holds a run" in sentence
        assert digest(folder) == before


@pytest.mark.slow
def test_bad_scores_during_training_end_in_a_sentence_that_names_the_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--trainer.num_sanity_val_steps", "0"]
    rewards = ["--rewards", function_reward("third_is_infinite")]
    status, sentence = fail(["fit", "--config", "tiny.yaml", *rewards, *quick], capsys)
    assert status == 1
    assert "'third_is_infinite' returned inf" in sentence
    path = Path(sentence.split("--ckpt_path ")[1].split("`")[0])
    assert torch.load(path, weights_only=True)["maestro"]["policy_steps"] == 2
    assert (path.parents[1] / "weights.png").is_file()  # drawn although the run failed

    status, sentence = fail(
        ["fit", "--config", "tiny.yaml", "--rewards", function_reward("at_once_infinite"), *quick], capsys
    )
    assert status == 2  # nothing was trained yet
    assert "--ckpt_path" not in sentence


def test_ctrl_c_keeps_a_checkpoint_and_the_handler(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    args = ["fit", "--config", "tiny.yaml", "--trainer.num_sanity_val_steps", "0"]
    status, sentence = fail([*args, "--trainer.callbacks", "users_code.Interrupted"], capsys)
    assert status == 130
    path = Path(sentence.split("--ckpt_path ")[1].split("`")[0])
    assert torch.load(path, weights_only=True)["maestro"]["policy_steps"] == 2
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.slow
def test_exits_of_code_of_others_are_no_ctrl_c(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--config", "tiny.yaml", "--trainer.num_sanity_val_steps", "0"]
    for given, owner in (
        (
            ["--rewards", function_reward("third_exits")],
            "Reward 'third_exits': users_code.third_exits raised SystemExit: no",
        ),
        (["--trainer.callbacks", "users_code.Exits"], "users_code.Exits.on_train_batch_start raised SystemExit: 0 ("),
        (
            ["--trainer.callbacks", "users_code.Generator"],
            "users_code.Generator.on_train_batch_start raised GeneratorExit (",
        ),
    ):
        status, sentence = fail([*args, *given], capsys)
        assert status == 1
        assert sentence.startswith(owner)
        path = Path(sentence.split("--ckpt_path ")[1].split("`")[0])
        assert torch.load(path, weights_only=True)["maestro"]["policy_steps"] == 2
    with pytest.raises(KeyError, match="a bug"):  # a bug keeps its traceback, and what is kept is said beside it
        main([*args, "--trainer.callbacks", "users_code.LateBug"])
    said = capsys.readouterr().err
    assert "users_code.LateBug.on_train_batch_start raised KeyError: 'a bug'" in said
    assert "go on from it with `maestro-pl fit --ckpt_path " in said


MY_CLASSES = """
import torch
from callbacks import Reward
from maestro_pl import EqualWeights

class Novelty(Reward):
    def score(self, rollout, rows, pl_module):
        return [1.0] * len(rows)

class Mine(EqualWeights):
    pass

class Slow(torch.optim.SGD):
    pass
"""


def test_classes_of_ones_own_by_module_or_by_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "my_classes.py").write_text(MY_CLASSES)
    (folder / "far").mkdir()
    (folder / "far/my_far_classes.py").write_text(MY_CLASSES)
    (folder / "bye_class.py").write_text("raise SystemExit(0)\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(folder))])
    args = ["fit", "--config", "tiny.yaml"]
    own = [
        *(
            "--rewards+=my_classes.Novelty",
            "--rewards+=my_classes.py:Novelty",
            "--metrics+=far/my_far_classes.py:Novelty",
        ),
        *("--model.weigher", "my_classes.py:Mine", "--model.optimizer", "far/my_far_classes.py:Slow"),
        *("--model.optimizer.lr", "0.1"),
    ]
    config = yaml.safe_load(printed_config([*args, *own], capsys))
    assert [entry["class_path"] for entry in config["rewards"][2:]] == ["my_classes.Novelty", "my_classes.py:Novelty"]
    assert config["metrics"][0]["class_path"] == "far/my_far_classes.py:Novelty"
    assert config["model"]["weigher"]["class_path"] == "my_classes.py:Mine"
    assert config["model"]["optimizer"]["class_path"] == f"{folder / 'far/my_far_classes.py'}:Slow"
    for given, sentence in {
        "my_classes.py:Nothing": "has no 'Nothing'; its classes are ['EqualWeights', 'Mine', 'Novelty', 'Reward', 'Slow']",
        "nowhere.py:Novelty": "nowhere.py' of a class is not there",
        "my_classes.py:Mine": "is not a Reward",
        "bye_class.py:C": "failed: SystemExit: 0",
        "bye_class.C": "failed: SystemExit: 0",
    }.items():
        status, said = fail([*args, f"--rewards+={given}"], capsys)
        assert status == 2
        assert sentence in said
    monkeypatch.delitem(sys.modules, "my_classes", raising=False)


@pytest.mark.slow
def test_last_checkpoint_is_the_last_step_also_between_two_saves(folder: Path) -> None:
    checkpoint = ["--trainer.callbacks+=callbacks.RunCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    main(["fit", "--config", "tiny.yaml", "--trainer.num_sanity_val_steps", "0", *checkpoint])
    saved = folder / "runs/tiny/version_0/checkpoints"
    steps = {path.name: torch.load(path, weights_only=True)["maestro"]["policy_steps"] for path in saved.iterdir()}
    assert steps == {"step-000002.ckpt": 2, "last.ckpt": 3}


def test_a_bug_keeps_its_traceback_and_debug_shows_any(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["fit", "--config", "tiny.yaml", "--trainer.num_sanity_val_steps", "0"]
    with pytest.raises(KeyError, match="a bug"):
        main([*args, "--trainer.callbacks", "users_code.Bug"])
    monkeypatch.setenv("MAESTRO_DEBUG", "1")
    with pytest.raises(ValueError, match="no_such_key"):
        main([*args, "--model.no_such_key", "1"])


def test_the_chain_of_callbacks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chains: list[list[str]] = []
    monkeypatch.setattr(
        MaestroCLI, "fit", lambda self, **kwargs: chains.append([type(c).__name__ for c in self.trainer.callbacks])
    )
    args = ["fit", "--config", "tiny.yaml"]
    main(args)
    main(
        [
            *args,
            "--trainer.callbacks",
            '[{"class_path": "users_code.Bug"}, {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}]',
        ]
    )
    main([*args, "--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"])
    head = ["RolloutGenerator", "FormatReward", "LengthReward"]
    observers = [
        "RewardTable",
        "WeightDistributionLogger",
        "ResponseRecorder",
        "ResponseTable",
        "RewardReport",
        "RunReport",
        "EvaluationReport",
        "MemoryProbe",
    ]
    assert chains == [
        [*head, "StageProgressBar", *observers, "SaveRunConfig", "RunCheckpoint"],  # Lightning puts checkpoints last
        [*head, "Bug", "TQDMProgressBar", *observers, "SaveRunConfig", "RunCheckpoint"],
        [*head, *observers, "SaveRunConfig"],
    ]


def test_rewards_are_replaced_or_appended_wherever_the_option_stands(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sets").mkdir()
    (folder / "sets/one.yaml").write_text("- class_path: callbacks.EntropyReward\n")
    (folder / "with_file.yaml").write_text(
        yaml.safe_dump({**yaml.safe_load(Path("tiny.yaml").read_text()), "rewards": "sets/one.yaml"})
    )

    def names(*args: str) -> list[str]:
        config = yaml.safe_load(printed_config(["fit", *args], capsys))
        return [reward["class_path"].split(".")[-1] for reward in config["rewards"]]

    config = ("--config", "tiny.yaml")
    assert names(*config) == ["FormatReward", "LengthReward"]
    assert names(*config, "--rewards", "sets/one.yaml") == ["EntropyReward"]
    assert names("--rewards", "sets/one.yaml", *config) == ["EntropyReward"]
    assert names(*config, "--rewards+=callbacks.EntropyReward") == ["FormatReward", "LengthReward", "EntropyReward"]
    assert names("--config", "with_file.yaml") == ["EntropyReward"]


@pytest.mark.slow
def test_the_printed_config_is_a_fixed_point(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", "--config", "tiny.yaml", "--rollout.temperature", "0.7", "--model.policy.lora.r", "4"]
    once = printed_config(args, capsys)
    (folder / "again.yaml").write_text(once)
    assert printed_config(["fit", "--config", "again.yaml"], capsys) == once
    assert yaml.safe_load(once)["rollout"]["temperature"] == 0.7

    made: list[Any] = []
    monkeypatch.setattr(MaestroCLI, "fit", lambda self, **kwargs: made.append((self.trainer, self.model)))
    main(args)
    main(["fit", "--config", "again.yaml"])
    (trainer, model), (trainer_again, model_again) = made
    assert [type(c) for c in trainer.callbacks] == [type(c) for c in trainer_again.callbacks]
    assert model.policy.lora == model_again.policy.lora
    assert model.policy.lora.r == 4
    for parameter, again in zip(model.policy.parameters(), model_again.policy.parameters(), strict=True):
        assert torch.equal(parameter, again)


@pytest.mark.parametrize("way", ["option", "option with =", "config"])
def test_a_list_of_rewards_replaces_another_of_the_same_length(
    way: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = [{"class_path": "callbacks.FormatReward", "init_args": {"role": "gate"}}, "callbacks.LengthReward"]
    new = [{"class_path": "callbacks.FormatReward", "init_args": {"normalize": "zscore"}}, "callbacks.LengthReward"]
    config = yaml.safe_load((folder / "tiny.yaml").read_text())
    (folder / "old.yaml").write_text(yaml.safe_dump({**config, "rewards": old}))
    (folder / "new.yaml").write_text(yaml.safe_dump({"rewards": new} if way == "config" else new))
    given = {
        "option": ["--rewards", "new.yaml"],
        "option with =": ["--rewards=new.yaml"],
        "config": ["--config", "new.yaml"],
    }
    with pytest.raises(SystemExit):
        main(["fit", "--config", "old.yaml", *given[way], "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    first = printed["rewards"][0]["init_args"]
    assert (first["role"], first["normalize"]) == ("train", "zscore")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "old.yaml", "--rewards+=callbacks.EntropyReward", "--print_config"])
    appended = yaml.safe_load(capsys.readouterr().out)["rewards"]
    assert [entry["class_path"].rpartition(".")[2] for entry in appended] == [
        "FormatReward",
        "LengthReward",
        "EntropyReward",
    ]
    assert appended[0]["init_args"]["role"] == "gate"
