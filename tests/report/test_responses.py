"""The index of recorded responses: what it holds, how it grows, and that a kept one is the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from maestro_pl.errors import UserError
from maestro_pl.report import responses as module
from maestro_pl.report.responses import Responses, Wanted, disagreement, index_path, response_files
from tests.support.run_folders import write_responses


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_responses(tmp_path / "rollouts.jsonl", range(1, 5))
    return tmp_path / "rollouts.jsonl"


def test_groups_are_those_that_were_written(path: Path) -> None:
    found = Responses([path])
    assert (len(found), len(found.groups)) == (32, 8)
    assert found.groups["task"].tolist() == ["arithmetic", "story"] * 4
    assert found.groups["dead"].tolist() == [False, False, False, True] * 2
    assert found.weighed == ["format", "length", "preference"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(r["response"] for r in found.read(5)) == sorted(r["response"] for r in lines[20:24])
    advantages = [record["advantage"] for record in found.read(0)]
    assert advantages == sorted(advantages, reverse=True)


def test_an_index_that_is_kept_says_the_same_and_takes_in_what_is_new(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Responses([path])
    monkeypatch.setattr(module, "KEPT_FROM", 1)
    Responses([path])
    assert index_path(path).is_file()
    kept = Responses([path])
    assert kept.frame.equals(plain.frame[kept.frame.columns])
    assert kept.find(Wanted(text="ANSWER** 0")) == plain.find(Wanted(text="answer** 0")) == list(range(8))
    write_responses(path, range(5, 6))
    assert kept.refresh()
    assert not kept.refresh()
    assert kept.find(Wanted(text="prompt 5")) == [8, 9]
    assert kept.find(Wanted(text="שלום")) == list(range(10))


def test_an_index_of_another_file_is_made_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_FROM", 1)
    Responses([path])
    path.unlink()
    write_responses(path, range(11, 16))
    assert Responses([path]).groups["step"].tolist() == [s for s in range(11, 16) for _ in range(2)]
    index_path(path).write_bytes(b"damaged")
    assert len(Responses([path])) == 40


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (
            [{"role": "user", "content": "hi <b>"}, {"role": "assistant", "content": "yo"}],
            "user: hi <b>\nassistant: yo",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], 'user: [{"type": "text", "text": "hi"}]'),
    ],
)
def test_chats_and_odd_prompts_are_texts(tmp_path: Path, prompt: object, text: str) -> None:
    row = {"prompt": prompt, "response": "a", "rewards": {"x": 1}, "weights": {"x": 1.0}, "reward": None}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "prompt": "plain"}) + "\n")
    found = Responses([tmp_path / "p.jsonl"])
    assert found.groups["prompt"].tolist() == [text, "plain"]


def test_one_chat_after_another_stays_on_the_quick_way(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": f"{n}"}], "response": "a", "reward": n} for n in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Responses([tmp_path / "p.jsonl"]).groups["prompt"].tolist() == ["user: 0", "user: 1", "user: 2"]


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="records no response"):
        Responses([tmp_path / "p.jsonl"])
    (tmp_path / "q.jsonl").write_text("{nonsense\n")
    with pytest.raises(UserError, match="is no JSON"):
        Responses([tmp_path / "q.jsonl"])


def test_nothing_recorded_is_an_empty_list(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").touch()
    found = Responses([tmp_path / "p.jsonl"])
    assert found.find(Wanted()) == []
    assert found.prompts() == {}


def test_files_of_a_stage_are_its_own(tmp_path: Path) -> None:
    for name in (
        "rollouts.jsonl",
        "rollouts.rank1.jsonl",
        "rollouts-1.jsonl",
        "rollouts_old.jsonl",
        "samples_val.jsonl",
    ):
        (tmp_path / name).touch()
    found = [path.name for path in response_files(tmp_path, "rollouts")]
    assert found == ["rollouts-1.jsonl", "rollouts.jsonl", "rollouts.rank1.jsonl"]


def test_disagreement_by_hand() -> None:
    one = [np.array([1.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.0])]
    assert disagreement(one, np.array([2.0, 0.0, 0.0, 1.0])).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_groups_of_different_tasks_and_rewards_are_compared_by_their_standing(tmp_path: Path) -> None:
    rows = [
        {"prompt": str(g), "group": g, "response": "a", "task": "t", "rewards": {"x": g + i / 10}, "weights": {"x": 1.0},
         "normalized": {"x": i - 0.5}, "reward": i - 0.5, "advantage": i - 0.5}
        for g in (2, 0, 1)
        for i in (0, 1)
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Responses([tmp_path / "p.jsonl"])
    assert found.groups["mean"].tolist() == [0.0, 0.0, 0.0]  # of normalised rewards, in every group
    assert found.find(Wanted(sort="best")) == [0, 2, 1]
    assert found.find(Wanted(sort="worst", by="x")) == [1, 2, 0]
