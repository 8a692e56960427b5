"""``maestro-pl rewards``: what the rewards of a config are worth, without training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from maestro_pl.cli import main
from maestro_pl.cli.rewards import Wanted

USERS_CODE = """
import lightning

calls = {"even": 0}
seen = []

def length(completion):
    seen.append(completion)
    return float(len(completion))

def even(completion, task):
    calls["even"] += 1
    return float(sum(map(ord, completion)) % 5) if task == "even" else None

def gold(completion):
    return float(len(completion))

class Loud(lightning.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise KeyError("no callback but rewards is called")
"""


def function(name: str, **options: Any) -> dict[str, Any]:
    return {
        "class_path": "callbacks.FunctionReward",
        "init_args": {"function": f"code_of_rewards.py:{name}", **options},
    }


@pytest.fixture
def folder(tmp_path: Path, tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tasks = ["even", "odd", "odd", "odd", "rare"]
    rows = [{"prompt": f"Say {i}", "task": tasks[i % 5] if i < 10 else "odd"} for i in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "model": {"policy": {"model": str(tiny_qwen3), "dtype": "float32"}, "weigher": "maestro_pl.Conductor"},
        "data": {"sources": "data.jsonl", "batch_size": 3, "show": False},
        "rollout": {"group_size": 4, "max_new_tokens": 4},
        "rewards": [function("length"), function("even")],
        "anchors": [function("gold")],
        "trainer": {"accelerator": "cpu", "max_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "code_of_rewards.py").write_text(USERS_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MAESTRO_DEBUG", raising=False)
    return tmp_path


REWARDS = ["rewards", "--config", "tiny.yaml"]


def sentence(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert not shown.out
    return shown.err.splitlines()[-1].removeprefix("maestro-pl: error: ")


def test_each_task_gets_its_groups_and_nothing_is_trained_or_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    main([*REWARDS, "--groups", "3", "--json", "--trainer.callbacks+=code_of_rewards.Loud"])
    shown = capsys.readouterr()
    found = json.loads(shown.out)["tasks"]
    assert {task: part["groups"] for task, part in found.items()} == {"even": 2, "odd": 3, "rare": 2, "all": 7}
    assert "groups sampled: " in shown.err
    assert {path.name for path in folder.iterdir()} <= before  # no run folder
    assert found["all"]["rewards"]["gold"]["applied"] == 28  # the anchor scores every group, the default draws few
    assert found["all"]["rewards"]["length"]["anchor"]["r"] == pytest.approx(1.0)
    assert found["odd"]["rewards"]["even"]["applied"] == 0
    assert found["odd"]["rewards"]["even"]["because"] == "it applies to nothing"


def test_text_and_csv_say_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*REWARDS, "--groups", "2", "--csv", "found.csv"])
    text = capsys.readouterr().out
    assert "odd: 8 responses in 2 groups\nreward" in text
    with (folder / "found.csv").open(newline="") as file:
        rows = {(row["task"], row["reward"]): row for row in csv.DictReader(file)}
    row = rows["odd", "length"]
    assert f"length  train   8 of 8   {float(row['mean']):.3g} " in text
    assert (row["verdict"] or "-") in ("helps", "silent")


@pytest.mark.slow  # a run and two looks
def test_the_first_groups_are_those_of_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", "tiny.yaml", "--data.batch_size", "16"])
    with (folder / "runs/tiny/version_0/rewards.csv").open(newline="") as file:
        trained = {(row["task"], row["reward"]): row for row in csv.DictReader(file)}
    capsys.readouterr()
    main([*REWARDS, "--groups", "16", "--json", "--data.batch_size", "16"])
    found = json.loads(capsys.readouterr().out)["tasks"]["odd"]["rewards"]
    for name in ("length", "even"):
        assert found[name]["n"] == int(trained["odd", name]["n"])
        assert (found[name]["mean"] or 0.0) == float(trained["odd", name]["mean"] or 0.0)

    checkpoint = "runs/tiny/version_0/checkpoints/last.ckpt"  # the next batch, of the policy that was trained
    main([*REWARDS, "--groups", "1", "--json", "--ckpt_path", checkpoint])
    assert json.loads(capsys.readouterr().out)["tasks"]["odd"]["groups"] == 1
    assert [path.name for path in (folder / "runs/tiny").iterdir()] == ["version_0"]


def test_without_an_anchor_that_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*REWARDS, "--groups", "1", "--anchors=[]"])
    text = capsys.readouterr().out
    assert "No anchor, so nothing says which rewards help" in text
    assert "verdict" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rewards=[]", "--anchors=[]"], "There are no rewards to look at: list at least one under `rewards`"),
        (["--groups", "0"], "--groups '0': expected how many groups to sample of each task"),
        (["--groups", "many"], "--groups 'many': expected how many groups"),
        (
            ["--csv", "no/such/folder.csv"],
            "--csv no/such/folder.csv: expected the path of a file in a folder that exists.",
        ),
        (["--group", "3"], ""),
    ],
)
def test_what_cannot_be_used_is_a_sentence(
    arguments: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence([*REWARDS, *arguments], capsys).startswith(expected)


def test_supervised_training_has_no_rewards_to_look_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sft.yaml").write_text("method: sft\ndata: {sources: data.jsonl}\n")
    assert "method: sft trains on references" in sentence(["rewards", "--config", "sft.yaml"], capsys)


def test_help_is_printed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        main(["rewards", *arguments])
        assert "--groups N" in capsys.readouterr().out


def test_prompts_of_tasks_that_have_enough_are_passed_over() -> None:
    class Loader:
        prompts = tuple(SimpleNamespace(row=SimpleNamespace(values={"task": task})) for task in "aabcb")

        def __iter__(self) -> Any:
            yield {"task": ["a", "a", "b"], "prompt": [1, 2, 3]}
            yield {"task": ["a", "a"], "prompt": [4, 5]}
            yield {"task": ["b", "c", "a"], "prompt": [6, 7, 8]}
            raise AssertionError("every task has its groups")

    assert list(Wanted(Loader(), 1)) == [
        {"task": ["a", "b"], "prompt": [1, 3]}, {"task": ["c"], "prompt": [7]},
    ]  # fmt: skip
