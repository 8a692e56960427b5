"""The fault campaign: it runs, counts what did not hold, and gives the command that tries it again."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.faults import __main__ as command
from benchmarks.faults.runs import differs, metric_rows
from benchmarks.faults.trial import Fault, Trial, campaign
from tests.support.ranks import ended, start


def campaign_of(fault: str, out: Path) -> None:
    sys.exit(command.main(["--seeds", "1", "--only", fault, "--out", str(out)]))


@pytest.fixture(autouse=True)
def no_preload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the tests has its imports, and keeps its environment."""
    monkeypatch.setattr(command, "environment", lambda: None)
    monkeypatch.setattr("benchmarks.faults.child.preload", lambda: None)


def test_readers_are_fuzzed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    assert command.main(["--seeds", "1", "--only", "fuzz-jsonl", "fuzz-values", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text(encoding="utf-8")) == found
    assert (found["trials"], found["held"]) == (2, 2)
    for fault in found["faults"].values():
        counts = fault["counts"]
        assert counts["read"] + counts["refused"] == counts["inputs"] == 40
        assert counts["read"] >= 1
        assert counts["refused"] >= 1


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_save_goes_on(tmp_path: Path) -> None:
    # in a process of its own: what it forks must not have the history of other tests
    done = start(campaign_of, "kill-save", tmp_path / "faults.json", output=tmp_path / "said")
    assert ended([done], 1800) == [0], (tmp_path / "said").read_text()
    found = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))["faults"]["kill-save"]
    assert (found["trials"], found["held"], found["failures"]) == (1, 1, []), (tmp_path / "said").read_text()


def test_what_does_not_hold_is_named_with_its_seed() -> None:
    def trial(trial: Trial) -> None:
        trial.counts["tried"] += 1
        trial.require(trial.seed != 4, "it is the fourth")
        if trial.seed == 5:
            raise KeyError("a bug of the campaign")

    found = campaign([Fault("x", "it holds", trial, most=4)], seeds=20, first_seed=2)["faults"]["x"]
    assert (found["trials"], found["held"], found["counts"]) == (4, 2, {"tried": 4})
    assert [failure["seed"] for failure in found["failures"]] == [4, 5]
    assert found["failures"][0]["what"] == "it is the fourth"
    assert "a bug of the campaign" in found["failures"][1]["what"]
    assert found["failures"][0]["again"] == "python -m benchmarks.faults --only x --seeds 1 --first_seed 4"


def test_faults_are_listed_and_chosen_by_their_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--only", "kill"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["kill-rollout", "kill-update", "kill-warm-up", "kill-save", "kill-judge", "kill-experiment"]
    for arguments in (["--only", "nonsense"], ["--seeds", "0"]):
        with pytest.raises(SystemExit):
            command.main(arguments)


def test_one_bit_is_a_difference(tmp_path: Path) -> None:
    one = {"a": [torch.zeros(2), 1.0], "b": {"c": "x"}}
    assert differs(one, {"a": [torch.zeros(2), 1.0], "b": {"c": "x"}}) == ""
    assert differs(one, {"a": [torch.tensor([0.0, 1e-45]), 1.0], "b": {"c": "x"}}) == ".a.0"
    assert differs(one, {"a": [torch.zeros(2), 1.0], "b": {"c": "y"}}) == ".b.c: 'y', not 'x'"
    assert differs(one, {"a": [torch.zeros(2)], "b": {"c": "x"}}) == ".a: 1 entries, not 2"
    (tmp_path / "metrics.csv").write_text("step,train/loss,time/update\n0,0.5,1.25\n")
    assert metric_rows(tmp_path / "metrics.csv") == [{"step": "0", "train/loss": "0.5"}]


def test_the_tests_that_the_page_names_are_there() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"`(tests/\S+)::(\w+)`", (root / "docs/reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [name for file, name in named if f"\ndef {name}(" not in (root / file).read_text(encoding="utf-8")] == []
