"""The evaluation table against values worked out by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.rewards import ExactMatchReward
from maestro_pl.errors import UserError
from maestro_pl.evaluation import metrics
from maestro_pl.evaluation.metrics import (
    EvaluationTable,
    bootstrap_interval,
    pass_at_k,
    pass_at_k_values,
    rollout_values,
)
from maestro_pl.evaluation.records import keys_of, prompt_key, write_records
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import make_rollout


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0


def test_pass_at_k_values_skip_prompts_it_does_not_apply_to() -> None:
    values = pass_at_k_values(torch.tensor([[1.0, 0.0], [0.0, 0.0], [math.nan, math.nan]]))
    assert values["pass@1"][:2].tolist() == [0.5, 0.0]
    assert values["pass@2"][:2].tolist() == [1.0, 0.0]
    assert values["pass@1"][2].isnan()


def test_the_table_has_a_row_per_task_and_metric() -> None:
    table = EvaluationTable()
    table.update(["b", "a"], {"x": torch.tensor([1.0, 3.0]), "y": torch.tensor([5.0, math.nan])})
    table.update(["b"], {"x": torch.tensor([2.0])})
    rows = {(row["task"], row["metric"]): row for row in table.compute()}
    assert set(rows) == {("a", "x"), ("b", "x"), ("b", "y"), ("all", "x"), ("all", "y")}
    assert (rows["b", "x"]["mean"], rows["b", "x"]["n"]) == (1.5, 2)
    assert (rows["all", "x"]["mean"], rows["all", "x"]["n"]) == (2.0, 3)
    assert (rows["all", "y"]["mean"], rows["all", "y"]["n"]) == (5.0, 1)
    table.reset()
    assert table.compute() == []


def test_bootstrap_interval_covers_the_mean_at_its_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(100):
        low, high = bootstrap_interval(torch.randn(40, generator=generator).numpy(), 0.95, 500, seed)
        covered += low <= 0.0 <= high
    assert 86 <= covered <= 100
    assert bootstrap_interval(torch.tensor([2.0]).numpy(), 0.95, 100, 0) == (2.0, 2.0)
    assert bootstrap_interval(torch.tensor([3.0, 3.0]).numpy(), 0.95, 100, 0) == (3.0, 3.0)


def test_rollout_values_are_means_of_groups() -> None:
    fields = {"finish_reasons": ["stop", "length", "stop", "stop"]}
    rollout = make_rollout(["x", "xx", "xxx", "xxx"], group_size=2, fields=fields, task=["a", "b"])
    spec = RewardSpec("r")
    rollout.rewards["r"] = RewardScores.from_list(spec, [1.0, 2.0, None, 5.0])
    match = ExactMatchReward().spec
    rollout.rewards[match.name] = RewardScores.from_list(match, [1.0, 0.0, 1.0, 1.0])
    values = rollout_values(rollout)
    assert values["reward/r"].tolist() == [1.5, 5.0]
    assert values["length/mean"].tolist() == [1.5, 3.0]
    assert values["length/truncated"].tolist() == [0.5, 0.0]
    assert values["pass@1"].tolist() == [0.5, 1.0]
    assert values["pass@2"].tolist() == [1.0, 1.0]


def test_weights_are_reported_in_the_order_of_the_rewards() -> None:
    rollout = Rollout(
        prompts=["p"],
        prompt_texts=["p"],
        prompt_ids=[[1]],
        response_ids=[[1], [1]],
        responses=["", ""],
        finish_reasons=["stop", "stop"],
        group_size=2,
        columns={"task": ["a"], "reference": [None]},
    )
    for name in ("z", "a"):
        rollout.rewards[name] = RewardScores.from_list(RewardSpec(name), [1.0, 2.0])
    rollout.weights_BK = torch.tensor([[0.25, 0.75], [0.75, 0.25]])
    rollout.weight_names = ["z", "a"]
    values = rollout_values(rollout)
    assert [name for name in values if name.startswith("weights/")] == ["weights/z", "weights/a"]
    assert (values["weights/z"].tolist(), values["weights/a"].tolist()) == ([0.5], [0.5])


def test_a_prompt_that_two_ranks_were_given_counts_once() -> None:
    table = EvaluationTable()
    table.update(["a", "a"], {"x": torch.tensor([1.0, 3.0])}, [4, 7])
    table.update(["a", "b"], {"x": torch.tensor([1.0, 8.0])}, [4, 9])
    rows = {(row["task"], row["metric"]): row for row in table.compute()}
    assert (rows["a", "x"]["mean"], rows["a", "x"]["n"]) == (2.0, 2)
    assert (rows["all", "x"]["mean"], rows["all", "x"]["n"]) == (4.0, 3)


def test_the_first_value_of_a_prompt_that_stands_twice_is_taken() -> None:
    table = EvaluationTable()
    for value in (1.0, 5.0):
        table.update(["a", "a"], {"x": torch.tensor([value, 3.0])}, [4, int(value)])
    assert table.compute()[0]["mean"] == pytest.approx((1 + 3 + 3) / 3)


def test_ranks_share_a_prompt_only_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks: list[Any] = []

    def gathered(mine: Any) -> list[Any]:
        ranks.append(mine)
        return ranks

    monkeypatch.setattr(metrics, "gathered", gathered)
    tables = [EvaluationTable(), EvaluationTable()]
    for table, value in zip(tables, (1.0, 2.0), strict=True):
        table.update(["a", "a"], {"x": torch.tensor([value, 3.0]), f"y{value:g}": torch.zeros(2)}, [0, int(value)])
        table.update(["b"], {"x": torch.tensor([value])})
    tables[0].compute()
    rows = {(row["task"], row["metric"]): (row["mean"], row["n"]) for row in tables[1].compute()}
    assert list(dict.fromkeys(metric for _, metric in rows)) == ["x", "y1", "y2"]
    assert rows["a", "x"] == (pytest.approx((1 + 3 + 3) / 3), 3)
    assert rows["b", "x"] == (1.5, 2)


def test_a_task_may_not_be_called_all() -> None:
    with pytest.raises(UserError, match="A task is called 'all'"):
        EvaluationTable().update(["all"], {"x": torch.tensor([1.0])})


def test_the_key_of_a_prompt_is_of_what_is_asked() -> None:
    key = prompt_key("p", "r", "t")
    assert key == prompt_key("p", "r", "t")
    assert 0 <= key.number < 2**52
    others = [prompt_key(*each) for each in (("q", "r", "t"), ("p", "s", "t"), ("p", "r", "u"), ("p", None, "t"))]
    assert len({key.number, *(other.number for other in others)}) == 5
    assert prompt_key([{"role": "user", "content": "a\n b"}], None, "t").text == "a b"


def test_records_do_not_depend_on_the_order_of_the_batches(tmp_path: Path) -> None:
    def table(batches: list[list[int]]) -> EvaluationTable:
        prompts = ["p", "q", "p"]  # the data has p twice
        out = EvaluationTable()
        for places in batches:
            keys = keys_of([prompts[i] for i in places], [None] * len(places), ["t"] * len(places))
            numbers = torch.tensor([(0.5, math.nan, 2.0)[i] for i in places])
            out.update(["t"] * len(places), {"x": numbers, "y": numbers + 1}, places, keys)
        return out

    written = []
    for number, batches in enumerate(([[0, 1, 2]], [[2, 1], [0, 1]])):
        made = table(batches)
        made.compute()
        made.reset()
        path = tmp_path / str(number) / "test_prompts.csv"
        write_records(path, made.records, {"split": "test"})
        written.append((path.read_text(), json.loads(path.with_suffix(".json").read_text())))
        assert sorted(p.name for p in path.parent.iterdir()) == ["test_prompts.csv", "test_prompts.json"]
    assert written[0] == written[1]
    rows = list(csv.DictReader(written[0][0].splitlines()))
    p, q = (f"{prompt_key(text, None, 't').number:013x}" for text in "pq")
    found = {(row["prompt"], row["metric"]): row["value"] for row in rows}
    assert (found[p, "x"], found[f"{p}-2", "x"], found[q, "x"], found[p, "y"]) == ("0.5", "2.0", "nan", "1.5")
    header = written[0][1]
    assert header == {"split": "test", "n": 3, "prompts": {p: "p", f"{p}-2": "p", q: "q"}}


def test_without_keys_there_are_no_records() -> None:
    table = EvaluationTable()
    table.update(["a"], {"x": torch.tensor([1.0])})
    assert len(table.compute()) == 2
    assert len(table.records) == 0
