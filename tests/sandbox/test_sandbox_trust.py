"""The experiments on the context, on choices and on tasks without labels or help: their cells, labels and tables."""

from __future__ import annotations

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import maestro_pl
from benchmarks import people
from benchmarks.sandbox import cells, offline_choices, runner, trust
from benchmarks.sandbox.cells import Cell, Protocol, brief, describe, module_of, plain, rewards_of
from benchmarks.sandbox.offline import Variant, labels_of
from benchmarks.sandbox.runner import finished, hand_on, take_over
from callbacks import BestOfAnchor, PeopleAnchor
from maestro_pl.data.sources import Source
from maestro_pl.errors import UserError
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import LabelStore
from maestro_pl.sandbox import TASKS, rows, simulated_choice


@pytest.mark.parametrize("part", list(trust.PARTS))
def test_every_cell_of_a_part_has_a_name_and_an_anchor_of_its_kind(part: str) -> None:
    found = trust.PARTS[part](Protocol())
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        if cell.rewards == "against":
            anchors = [reward for reward in rewards_of(cell) if reward.role == "anchor"]
            assert len(anchors) == (cell.labels is not None)
        if cell.anchor == "choices":
            assert cell.learner_args["target"] in ("choice", "pairs")


def test_there_are_enough_prompts_in_new_wordings() -> None:
    source = Source("sandbox", options=cells.NEW_WORDINGS)
    data = maestro_pl.PromptDataModule([source], eval_limit=Protocol().eval_prompts, show=False)
    for split in ("train", "validation", "test"):
        assert Counter(row.values["task"] for row in data.rows[split]) == dict.fromkeys(TASKS, 24)


def test_a_run_that_fails_costs_none_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run_cell(cell: Cell) -> dict[str, Any]:
        ran.append(cell.seed)
        if cell.seed == 1 and fails:
            raise UserError("no prompts.")
        return {"cell": describe(cell), "utility": {"all": 0.5}, "seconds": 1.0}

    fails = True
    monkeypatch.setattr(runner, "run_cell", run_cell)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    asked = [Cell("equal", seed) for seed in (1, 2, 3)]
    with pytest.raises(UserError, match=r"1 of 3 runs failed, first equal with seed 1: no prompts\. The others are"):
        runner.run_all(asked, tmp_path / "runs.jsonl", 1)
    assert {entry["seed"] for entry in finished(tmp_path / "runs.jsonl").values()} == {2, 3}
    fails = False
    assert [entry["seed"] for entry in runner.run_all(asked, tmp_path / "runs.jsonl", 1)] == [1, 2, 3]
    assert ran == [1, 2, 3, 1]


def test_choices_cost_what_their_name_says() -> None:
    for cell in trust.choices(Protocol()):
        if cell.labels is None:
            continue
        module = module_of(replace(cell, weigher="equal"))
        groups = round(cell.labels * cell.protocol.groups)
        shown = module.outer.anchoring.responses or cell.protocol.group
        judgements = groups if cell.anchor == "choices" else groups * shown
        assert judgements == int(cell.name.split()[0])


def test_a_person_who_chooses_is_an_anchor() -> None:
    cell = Cell("c", 3, labels=0.1, anchor="choices", noise=1.0, rewards="against", labelled_tasks=("reply",))
    (anchor,) = [reward for reward in rewards_of(cell) if reward.role == "anchor"]
    assert isinstance(anchor, BestOfAnchor)
    assert (anchor.tasks, anchor.kwargs) == (["reply"], {"noise": 1.0, "seed": 3})
    assert brief("a b a") == -3.0
    assert plain("a b a") == -2.0


@pytest.mark.parametrize(
    ("label", "shown", "expected"),
    [
        ("best", 0, [1, 0, 1, 1]),
        ("best", 3, None),
        ("ranking", 0, [1, 0, 3, 2]),
    ],
)
def test_offline_labels_are_ranks(label: str, shown: int, expected: Any) -> None:
    z = torch.tensor([[0.0], [1.0], [-1.0], [0.1]])
    variant = Variant("v", group=4, label=label, shown=shown)
    value, rank = labels_of(variant, torch.tensor([2.0, 5.0, 0.0, 1.0]), z, torch.Generator())
    assert rank is not None
    assert value.isnan().all()
    if expected is not None:
        assert rank[:, 0].tolist() == expected
    else:
        assert sorted(rank[:, 0].tolist()) == [-1, 0, 1, 1]
        assert int(rank[1, 0]) == 0


def test_offline_ratings_of_a_part_share_one_deviation() -> None:
    z = torch.tensor([[0.0], [1.0], [-1.0], [0.1]] * 2)
    labels = torch.tensor([9.0, 1.0, 3.0, 9.0, 9.0, 4.0, 0.0, 9.0])
    value, rank = labels_of(Variant("v", group=4, shown=2), labels, z, torch.Generator())
    assert rank is None
    deviation = ((2 * 1.0 + 2 * 4.0) / 2) ** 0.5
    expected = torch.tensor([math.nan, -1.0, 1.0, math.nan, math.nan, 2.0, -2.0, math.nan]) / deviation
    torch.testing.assert_close(value, expected, equal_nan=True)


def test_judgements_are_counted_by_group() -> None:
    found = {(kind, count): variant for kind, count, variant in offline_choices.variants(96)}
    assert found["ratings, all 8", 240].responses == 240
    assert found["ratings, 4 by spread", 240].responses == 60 * 8
    assert found["best of 4 by spread", 40].responses == 40 * 8
    assert ("best of 8", 160) not in found
    assert isinstance(found["best of 8", 40].learner(), maestro_pl.RidgeLearner)


def entry(name: str, seed: int, utility: dict[str, float]) -> dict[str, Any]:
    return {
        "name": name, "seed": seed, "utility": utility, "new_templates": None, "length": 20.0, "labelled_groups": 2,
        "labels": {"a": {"ratings": 16, "choices": 1}}, "context_drift": 0.5, "unhelped": ["a"], "tokens": 1, "seconds": 1.0,
    }  # fmt: skip


def test_the_table_counts_seeds_with_a_family_below_equal_weights(tmp_path: Path) -> None:
    even = dict.fromkeys(["all", *TASKS], 0.2)
    results = []
    for seed, low in ((1, 0.1), (2, 0.19)):
        results += [entry("equal", seed, even), entry("oracle", seed, dict.fromkeys(["all", *TASKS], 0.4 + seed / 100))]
        results.append(entry("m", seed, {**even, "all": 0.3, "reply": low}))
    rows = trust.rows_of(results)
    trust.write(tmp_path / "t.csv", rows)
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 7
    summary = trust.summarise(rows)
    assert summary["m"]["seeds_below"] == 1  # 0.01 is not counted
    assert summary["m"]["worst_family"]["mean"] == pytest.approx(-0.055)
    assert summary["m"]["share"] == pytest.approx(0.1 / 0.215, abs=1e-4)
    assert summary["m"]["labels"] == 17
    assert "| m | 17 | 0.300 |" in trust.table(summary)


def test_runs_are_handed_on_and_taken_over(tmp_path: Path) -> None:
    def run(seed: int, drift: float) -> dict[str, Any]:
        return {**entry("m", seed, {"all": 0.1}), "cell": {"name": "m", "seed": seed}, "context_drift": drift}

    path, results = tmp_path / "a/runs.jsonl", tmp_path / "kept/runs.json"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(run(seed, drift)) + "\n" for seed, drift in ((2, math.nan), (1, 0.5))))
    hand_on(path, results)
    json.loads(results.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    take_over(results, tmp_path / "b/runs.jsonl")
    hand_on(tmp_path / "b/runs.jsonl", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == results.read_text()
    found = {each["seed"]: each for each in finished(tmp_path / "b/runs.jsonl").values()}
    assert found[1] == run(1, 0.5)
    assert math.isnan(trust.rows_of([found[2]])[0]["context_drift"])


def test_a_person_at_the_page_presses_the_key_of_what_is_shown(tmp_path: Path) -> None:
    (row,) = rows("train", n_per_task=1, tasks=["reply"])
    store = LabelStore(tmp_path / "labels.db")
    asked = Question.of(
        "reply", row["prompt"], [f"<answer>{text} friend</answer>" for text in ("sorry", "hey", "glad")]
    )
    store.add([asked])
    person = people.Person(store.path, seed=3)
    texts = [asked.responses[place] for place in asked.order(people.RATER)]
    expected = simulated_choice(texts, "reply", row["subject"], row["target"], row["prompt"], seed=3)

    class Page:
        def __init__(self, shown: list[str]) -> None:
            self.shown = shown

        def locator(self, selector: str) -> Any:
            texts = [SimpleNamespace(inner_text=partial(str, text)) for text in self.shown]
            return SimpleNamespace(all=lambda: texts, get_attribute=lambda name: asked.key)

    assert person.key(Page(texts)) == str(1 + expected)
    with pytest.raises(AssertionError):
        person.key(Page(texts[::-1]))


def test_a_run_that_leaves_clicks_out_is_no_result(tmp_path: Path) -> None:
    path = str(tmp_path / "labels.db")
    cell = Cell("20 clicks", 3, anchor="people", people=path, labels=0.1)
    (anchor,) = [reward for reward in rewards_of(replace(cell, rewards="against")) if reward.role == "anchor"]
    assert isinstance(anchor, PeopleAnchor)
    assert anchor.path == path
    entry = {
        "name": cell.name,
        "seed": 3,
        "cell": describe(cell),
        "labels": {"a": {"choices": 12}, "b": {"choices": 8}},
    }
    people.check([entry])
    entry["labels"] = {"a": {"choices": 12}}
    with pytest.raises(RuntimeError, match="used 12 of 20 clicks"):
        people.check([entry])
