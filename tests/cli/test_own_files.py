"""Classes and functions of a user's file that are mistyped, missing or broken, and runs that a user's code ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from maestro_pl.cli import main

FILE = """
import sys
import lightning
import torch
from callbacks import Reward
from maestro_pl import RidgeLearner, Weigher

class NoSuper(Weigher):
    def __init__(self):
        self.scale = torch.nn.Parameter(torch.zeros(2))

class NoSuperReward(Reward):
    def __init__(self):
        {}.nothing

    def score(self, rollout, rows, pl_module):
        return [0.0] * len(rows)

class NoLearner(RidgeLearner):
    def __init__(self):
        raise ValueError("apple")

class Picky(Reward):
    def __init__(self, error: str):
        if error == "exit":
            sys.exit(3)
        try:
            import no_such_package
        except ImportError:
            raise {"key": KeyError, "run": RuntimeError, "file": OSError, "never": NotImplementedError}[error]("apple")

    def score(self, rollout, rows, pl_module):
        return [0.0] * len(rows)

class NoScore(Reward):
    pass

class BadScore(NoScore):
    def score(self, rollout, rows, pl_module):
        raise KeyError("apple")

class Untyped(BadScore):
    def __init__(self, words):
        pass

class Leaves(lightning.Callback):
    def on_train_start(self, trainer, pl_module):
        sys.exit("no key")

def raises(completion):
    raise KeyError("apple")

def leaves(completion):
    sys.exit(3)

def fine(completion):
    return float(len(completion))
"""
CONFIG = {
    "model": {"policy": {"model": "sandbox", "dtype": "float32"}},
    "data": {"sources": "data.jsonl", "batch_size": 2},
    "rollout": {"group_size": 4, "max_new_tokens": 4},
    "rewards": [{"class_path": "callbacks.LengthReward", "init_args": {"max": 8}}],
    "trainer": {"max_steps": 1, "accelerator": "cpu"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAESTRO_DEBUG", raising=False)
    Path("mine.py").write_text(FILE)
    Path("bad_syntax.py").write_text("import os\n\nclass A(:\n    pass\n")
    Path("tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("data.jsonl").write_text("".join(f'{{"prompt": "say {n}", "reference": "b"}}\n' for n in range(4)))
    return tmp_path


def fail(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and sentence of a command that must fail with one line and no traceback."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maestro-pl: error: ")]
    assert len(lines) == 1
    return int(str(caught.value.code)), lines[0].removeprefix("maestro-pl: error: ")


@pytest.mark.parametrize(
    "key",
    ["model.weigher", "model.meta.signal", "model.meta.learner", "model.loss.type", "model.scheduler", "rollout.engine",
     "trainer.callbacks", "rewards+"],
)  # fmt: skip
def test_a_class_path_of_a_file_that_cannot_be_used(key: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = "['BadScore', 'Leaves', "
    there += (
        "'NoLearner', 'NoScore', 'NoSuper', 'NoSuperReward', 'Picky', 'Reward', 'RidgeLearner', 'Untyped', 'Weigher']"
    )
    named = key.removesuffix("+")
    for given, sentence in {
        "mine.py:Missing": f"'mine.py:Missing': the file has no 'Missing'; its classes are {there}, its functions "
        "['fine', 'leaves', 'raises'].",
        "nofile.py:X": f"the file '{folder}/nofile.py' of a class is not there: give its path, or a full one.",
        "bad_syntax.py:A": f"importing '{folder}/bad_syntax.py' failed: SyntaxError: invalid syntax "
        f"({folder}/bad_syntax.py:3).",
    }.items():
        assert fail(["fit", "--config", "tiny.yaml", f"--{key}={given}"], capsys) == (2, f"{named}: {sentence}")
    assert not Path("runs").exists()


def test_a_file_beside_its_config_and_arguments_below_the_class(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "two words").mkdir()
    (folder / "two words/near.py").write_text("class A: pass\n")
    weigher = {"class_path": "near.py:B", "init_args": {"a": 1}}
    Path("two words/c.yaml").write_text(yaml.safe_dump({"configs": ["../tiny.yaml"], "model": {"weigher": weigher}}))
    status, said = fail(["fit", "--config", "two words/c.yaml"], capsys)
    assert status == 2
    assert said == f"model.weigher: '{folder}/two words/near.py:B': the file has no 'B'; its classes are ['A']."


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (
            "--model.weigher=mine.py:NoSuper",
            "mine.py:NoSuper raised AttributeError: cannot assign parameters before Module.__init__() call ({}/mine.py:10): "
            "correct the class or its arguments.",
        ),
        (
            "--rewards+=mine.py:NoSuperReward",
            "mine.py:NoSuperReward raised AttributeError: 'dict' object has no attribute 'nothing' ({}/mine.py:14): correct "
            "the class or its arguments.",
        ),
        (
            "--model.meta.learner=mine.py:NoLearner",
            "mine.py:NoLearner raised ValueError: apple ({}/mine.py:21): correct the class or its arguments.",
        ),
        (
            "--rewards=[{{class_path: mine.py:Untyped, init_args: {{words: a}}}}]",
            "rewards: {}/mine.py:Untyped takes 'words' without a type: write one, such as `words: str`.",
        ),
        (
            "--rewards+=mine.py:NoScore",
            "rewards: 'mine.py:NoScore' cannot be used as it is: it has no score of its own, which is needed.",
        ),
    ],
)
def test_a_class_that_cannot_be_built_says_its_own_error(
    option: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(["fit", "--config", "tiny.yaml", option.format()], capsys) == (2, sentence.format(folder))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("key", "KeyError: 'apple'"),
        ("run", "RuntimeError: apple"),
        ("file", "OSError: apple"),
        ("never", "NotImplementedError: apple"),
        ("exit", "SystemExit: 3"),
    ],
)
def test_whatever_a_constructor_raises_is_a_sentence(
    error: str, told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = 1 + Path("mine.py").read_text().split("sys.exit(3)" if error == "exit" else "raise {")[0].count("\n")
    reward = f"[{{class_path: mine.py:Picky, init_args: {{error: {error}}}}}]"
    said = f"mine.py:Picky raised {told} ({folder}/mine.py:{line}): correct the class or its arguments."
    assert fail(["fit", "--config", "tiny.yaml", f"--rewards={reward}"], capsys) == (2, said)


@pytest.mark.parametrize("in_file", [False, True])
def test_null_for_keys_that_stand_below_one(in_file: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("null.yaml").write_text("model: {meta: null}\n")
    given = ["--config", "null.yaml"] if in_file else ["--model.meta", "null"]
    assert fail(["fit", "--config", "tiny.yaml", *given], capsys) == (
        2,
        "model.meta takes the keys below it (--model.meta.KEY VALUE), or a YAML file of them, not 'null'. Leave it out for "
        "the defaults.",
    )


FUNCTION = "[{{class_path: callbacks.FunctionReward, init_args: {{function: mine.py:{}}}}}]"


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (f"--rewards={FUNCTION.format('raises')}", "Reward 'raises': mine.py:raises raised KeyError: 'apple' ("),
        (f"--rewards={FUNCTION.format('leaves')}", "Reward 'leaves': mine.py:leaves raised SystemExit: 3 ("),
        ("--rewards=[mine.py:BadScore]", "Reward 'bad_score': BadScore.score raised KeyError: 'apple' ("),
        ("--trainer.callbacks+=mine.py:Leaves", "{}/mine.py:Leaves.on_train_start raised SystemExit: no key ("),
    ],
)
def test_code_that_ends_the_run_in_its_first_batch_is_a_failure_and_no_bad_input(
    option: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = fail(["fit", "--config", "tiny.yaml", option, "--trainer.limit_val_batches=0"], capsys)
    assert status == 1
    assert said.startswith(sentence.format(folder))


def test_what_a_run_says_of_what_it_does_not_use(
    folder: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", "tiny.yaml", "--model.weigher=maestro_pl.EqualWeights"]
    anchor = "--anchors=[{class_path: callbacks.FunctionReward, init_args: {function: mine.py:fine}}]"
    main([*args, anchor, "--model.anchoring.responses=99"])
    warned = [str(warning.message) for warning in recwarn]
    (validation,) = [text for text in warned if "validation" in text]
    assert validation.startswith("The data have no validation prompts, so nothing is evaluated while training")
    assert not [text for text in warned if "Total length" in text]
    (responses,) = [text for text in warned if "anchoring.responses" in text]
    assert responses.startswith("model.anchoring.responses=99 is more than the 4 responses of a group")
    said = capsys.readouterr().out
    assert "The anchor 'fine' was asked about none of these responses" in said
    assert "give a reward with role anchor" not in said

    recwarn.clear()
    main([*args, "--trainer.limit_val_batches=0", "--model.anchoring.responses=4", anchor])
    warned = [str(warning.message) for warning in recwarn]
    assert not [text for text in warned if "validation" in text or "anchoring" in text]
