"""``maestro-pl export --average``: the average of runs, by hand and by their logits' model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl.cli import main
from maestro_pl.errors import UserError
from maestro_pl.export.average import average_runs
from maestro_pl.export.trained_run import TrainedRun
from maestro_pl.policy.loading import LoRA

A, B = "m.q.lora_A.default.weight", "m.q.lora_B.default.weight"


def run_of(factors: dict[str, torch.Tensor], folder: str = "one", model: str = "base", **lora: Any) -> TrainedRun:
    config = {"model": {"policy": {"model": model, "lora": lora}}}
    return TrainedRun(Path(folder), Path(folder, "last.ckpt"), config, {"policy_steps": 3, "settings": {}}, factors)


def update(run: TrainedRun) -> torch.Tensor:
    assert run.lora is not None
    scale = run.lora.alpha / (run.lora.r**0.5 if run.lora.use_rslora else run.lora.r)
    return scale * run.state[B] @ run.state[A]


def drawn(rank: int, seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, 5, generator=rng), B: torch.randn(4, rank, generator=rng)}


def test_updates_are_averaged_and_not_factors() -> None:
    first = run_of(drawn(2, 0), r=2, alpha=4)
    second = run_of(drawn(3, 1), "two", r=3, alpha=6, use_rslora=True)
    soup = average_runs([first, second], [3.0, 1.0])
    torch.testing.assert_close(update(soup), 0.75 * update(first) + 0.25 * update(second))
    assert soup.lora == LoRA(r=5, alpha=5)
    assert (soup.steps, soup.soup) == (6, (("one", 0.75), ("two", 0.25)))
    assert first.state[A].shape == (2, 5)  # what was read stays


def test_whole_models_are_averaged_by_their_parameters() -> None:
    runs = [run_of({"w": torch.tensor([1.0, 2.0])}), run_of({"w": torch.tensor([3.0, 8.0])})]
    for run in runs:
        run.config["model"]["policy"]["lora"] = None
    assert average_runs(runs).state["w"].tolist() == [2.0, 5.0]


@pytest.mark.parametrize(
    ("runs", "shares", "sentence"),
    [
        ([run_of(drawn(2, 0))], None, "give at least two"),
        (
            [run_of(drawn(2, 0), r=2)] * 2,
            [1e308, 1e308],
            r"^--shares \[1e\+308, 1e\+308\] with 2 runs: give each a number of at least 0, not all zero, and a finite sum\.$",
        ),
        ([run_of(drawn(2, 0), r=2)] * 2, [1.0], "give each a number"),
        ([run_of(drawn(2, 0), r=2)] * 2, [0.0, 0.0], "not all zero"),
        ([run_of(drawn(2, 0), r=2), run_of(drawn(2, 0), model="other", r=2)], None, "average runs of one base"),
        ([run_of(drawn(2, 0), r=2), run_of({A: torch.zeros(2, 5)}, r=2)], None, "did not train the same layers"),
        ([run_of(drawn(2, 0), r=2), run_of({A: torch.zeros(2, 6), B: torch.zeros(4, 2)}, r=2)], None, "has the shape"),
        ([run_of(drawn(2, 0), r=2, use_dora=True)] * 2, None, "they are DoRA"),
        ([run_of(drawn(2, 0) | {"m.bias": torch.zeros(2)}, r=2)] * 2, None, "m.bias was trained beside them"),
        ([run_of(drawn(2, 0), r=2, options={"init_lora_weights": "pissa"})] * 2, None, "pissa changed their base"),
        ([run_of(drawn(2, 0), r=2, options={"rank_pattern": {"q": 1}})] * 2, None, "they have a rank_pattern"),
    ],
)
def test_what_cannot_be_averaged_is_a_sentence(runs: Any, shares: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        average_runs(runs, shares)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "merged"], "export takes RUN, or --average"),
        (["x", "--to", "merged", "--average", "y"], "beside --average"),
        (["--to", "merged", "--average", "x", "y"], "give --output DIR"),
        (["x", "--to", "merged", "--shares", "1"], "export takes RUN, or --average"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], sentence: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["export", *arguments])
    assert sentence in capsys.readouterr().err
