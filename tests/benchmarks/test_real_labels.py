"""Labels on recorded groups: what is read, what is learned of a world whose truth is known, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import real_labels
from benchmarks.real_labels import Groups, main, measure, read_groups, score, ties
from maestro_pl.errors import UserError


def row(step: int, group: int, task: str, quality: float | None, **rewards: float) -> dict[str, object]:
    scores = rewards | ({} if quality is None else {"quality": quality})
    weights = dict.fromkeys(rewards, 0.5)
    return {"step": step, "group": group, "task": task, "prompt": f"p{group}", "rewards": scores, "weights": weights}


def write(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir()
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_groups_are_read_and_those_without_the_metric_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row(1, 0, "a", 0.1, brevity=-1.0, richness=3.0),
        row(1, 0, "a", 0.3, brevity=-3.0, richness=5.0),
        row(1, 1, "b", None, brevity=-1.0, richness=1.0),
        row(1, 1, "b", 0.5, brevity=-2.0, richness=2.0),
        row(2, 0, "b", 0.7, brevity=-4.0, richness=8.0),
        row(2, 0, "b", 0.2, brevity=-2.0, richness=6.0),
        row(3, 0, "b", 0.2, brevity=-2.0, richness=6.0),  # cut off
    ]
    (tmp_path / "fit-0").mkdir()
    lines = [json.dumps(r) for r in reversed(rows)]
    (tmp_path / "fit-0" / "rollouts.jsonl").write_text("\n".join([*lines, lines[-1][:20]]))  # killed in its last line
    groups = read_groups([tmp_path], "quality")
    assert "2 of 4 groups are left out" in capsys.readouterr().out
    groups = read_groups([write(tmp_path / "other", rows)], "quality")
    assert groups.names == ["brevity", "richness"]
    assert (groups.tasks, groups.prompts) == (["a", "b"], ["p0", "p0"])
    torch.testing.assert_close(groups.truth_NG, torch.tensor([[0.1, 0.3], [0.7, 0.2]]))
    assert groups.z_NGK.sign().tolist() == [[[1, -1], [-1, 1]], [[-1, 1], [1, -1]]]
    with pytest.raises(
        UserError, match=r"No group of a rollouts\.jsonl below these folders has weighed rewards and 'truth'"
    ):
        read_groups([tmp_path], "truth")


def world(count: int = 120) -> tuple[Groups, torch.Tensor]:
    """Two tasks that want opposite rewards, told apart by the state; a third reward is noise."""
    draws = torch.Generator().manual_seed(0)
    z_NGK = torch.randn(count, 6, 3, generator=draws)
    z_NGK = (z_NGK - z_NGK.mean(1, keepdim=True)) / z_NGK.std(1, keepdim=True)
    first_N = torch.arange(count) % 2 == 0
    truth_NG = torch.where(first_N.unsqueeze(1), z_NGK[:, :, 0] - z_NGK[:, :, 1], z_NGK[:, :, 1] - z_NGK[:, :, 0])
    states_ND = torch.where(first_N.unsqueeze(1), 1.0, -1.0) + 0.3 * torch.randn(count, 16, generator=draws)
    tasks = ["first" if first else "second" for first in first_N.tolist()]
    return Groups(["x", "y", "noise"], tasks, [f"p{n}" for n in range(count)], z_NGK, truth_NG), states_ND


def test_a_score_is_the_correlation_inside_groups() -> None:
    groups, _ = world(4)
    weights_NK = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]]).repeat(2, 1)
    assert score(groups, weights_NK, range(4)) == pytest.approx({"first": 1.0, "second": 1.0})
    assert score(groups, -weights_NK, [0, 2]) == pytest.approx({"first": -1.0})


def test_what_differs_by_less_than_counts_ties() -> None:
    truth_B = torch.tensor([0.50, 0.49, 0.30, 0.10, 0.9, 0.7, 0.7, 0.1])
    ranking = torch.tensor([0, 1, 2, 3, -1, 0, 1, 2]).unsqueeze(1)
    assert ties(ranking, truth_B, 4, 0.02)[:, 0].tolist() == [0, 0, 1, 2, -1, 0, 0, 1]
    best = torch.tensor([0, 1, 1, 1, -1, 0, 1, 1]).unsqueeze(1)
    assert ties(best, truth_B, 4, 0.02)[:, 0].tolist() == [0, 0, 1, 1, -1, 0, 0, 1]
    assert ties(ranking, torch.zeros(8), 4, 0.02)[:, 0].tolist() == [0, 0, 0, 0, -1, 0, 0, 0]  # nothing is said


def test_groups_of_a_labelled_prompt_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, states_ND = world(40)
    groups = replace(groups, prompts=[f"p{n // 4}" for n in range(40)])
    seen: list[set[str]] = []

    def scored(groups: Groups, weights_NK: torch.Tensor, held_out: list[int]) -> dict[str, float]:
        seen.append({groups.prompts[n] for n in held_out})
        return {"first": 0.0}

    monkeypatch.setattr(real_labels, "score", scored)
    measure(groups, states_ND, draws=1, counts=(3,))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    labelled = {groups.prompts[n] for n in order[:3]}
    assert all(found == {f"p{n}" for n in range(10)} - labelled for found in seen[:4])  # equal weights' row too


def test_every_kind_of_label_learns_what_each_task_wants() -> None:
    groups, states_ND = world()
    rows = {(r["labels"], r["groups"]): r for r in measure(groups, states_ND, draws=3, counts=(8, 40))}
    assert abs(float(str(rows["equal weights", 0]["mean"]))) < 0.1
    for kind in real_labels.KINDS:
        assert float(str(rows[kind, 40]["mean"])) > 0.6  # 0.71 is the most that weights of at least 0 can reach
    most = float(str(rows["all, in sample", 120]["mean"]))
    assert most == pytest.approx(2**-0.5, abs=0.05)  # of two rewards of opposite sign one is left
    with pytest.raises(UserError, match="120 groups: too few to label 80"):
        measure(groups, states_ND, draws=1, counts=(80,))


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups, states_ND = world()
    monkeypatch.setattr(real_labels, "read_groups", lambda runs, truth: groups)
    monkeypatch.setattr(real_labels, "states_of", lambda model, prompts: states_ND)
    main(["--runs", str(tmp_path), "--model", "m", "--draws", "1", "--output", str(tmp_path / "labels.csv")])
    said = capsys.readouterr().out
    assert "120 groups of 6, 120 prompts: x, y, noise" in said
    assert "| equal weights | 0 | 1 |" in said
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 1 + 2 + 3 * 4
