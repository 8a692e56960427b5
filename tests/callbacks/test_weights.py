"""``WeightDistributionLogger``: the numbers, the file that survives a kill, and the figure."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex

from callbacks.weights import WeightDistributionLogger, WeightRow, append_rows, plot_weights, scalars, weight_rows
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import make_rollout


def rollout_of(weights: list[list[float]], tasks: list[str], masks: dict[str, list[bool]]) -> Rollout:
    """A rollout of groups of two with these weights; ``tasks`` has one entry a prompt."""
    count = len(weights)
    fields = {
        "rewards": {n: RewardScores(RewardSpec(n), torch.zeros(count), torch.tensor(m)) for n, m in masks.items()},
        "weights_BK": torch.tensor(weights),
        "weight_names": list(masks),
    }
    return make_rollout(["r"] * count, group_size=2, fields=fields, task=list(tasks))


@pytest.fixture
def rollout() -> Rollout:
    weights = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.0, 0.0]]
    return rollout_of(weights, ["a", "b"], {"x": [True, True, False, False], "y": [True, True, True, False]})


def test_rows_by_hand(rollout: Rollout) -> None:
    half = 0.5 * math.log(2)  # of the entropies 0 and ln 2
    rows = {(row.task, row.reward): row for row in weight_rows(rollout, step=7)}
    assert rows[("a", "x")] == pytest.approx(WeightRow(7, "a", "x", 0.75, 0.25, half, 2))
    assert rows[("a", "y")] == pytest.approx(WeightRow(7, "a", "y", 0.25, 0.25, half, 2))
    # the last response has no weight at all and does not count; x applies to no response of task b
    assert rows[("b", "y")] == WeightRow(7, "b", "y", 1.0, 0.0, 0.0, 1)
    assert ("b", "x") not in rows
    assert rows[("all", "x")].mean == pytest.approx(0.5)
    assert rows[("all", "x")].std == pytest.approx(math.sqrt(((0.5) ** 2 + 0 + 0.5**2) / 3))
    assert rows[("all", "y")].n == 3


def test_probabilities_are_shown_rather_than_the_sampled_action(rollout: Rollout) -> None:
    rollout.probabilities_BK = torch.full((4, 2), 0.5)
    assert {row.mean for row in weight_rows(rollout, 1)} == {0.5}
    assert {round(row.entropy, 5) for row in weight_rows(rollout, 1)} == {round(math.log(2), 5)}


def test_keys_of_several_tasks_and_of_one(rollout: Rollout) -> None:
    several = scalars(weight_rows(rollout, 1))
    assert several["weights/x"] == pytest.approx(0.5)
    assert several["weights/a/x"] == pytest.approx(0.75)
    assert several["weights/a/x_std"] == pytest.approx(0.25)
    assert several["weights_entropy/b"] == 0.0
    assert several["weights_entropy"] == pytest.approx(math.log(2) / 3)
    one = rollout_of([[0.25, 0.75], [0.75, 0.25]], ["a"], {"x": [True, True], "y": [True, True]})
    assert scalars(weight_rows(one, 1)).keys() == {
        "weights/x", "weights/x_std", "weights/y", "weights/y_std",
        "weights/a/x", "weights/a/x_std", "weights/a/y", "weights/a/y_std",
        "weights_entropy", "weights_entropy/a",
    }  # fmt: skip


def test_a_reward_called_entropy_keeps_its_weight() -> None:
    keys = scalars(weight_rows(rollout_of([[1.0, 0.0]] * 2, ["a"], {"entropy": [True] * 2, "y": [True] * 2}), 1))
    assert (keys["weights/entropy"], keys["weights/a/entropy"], keys["weights_entropy/a"]) == (1.0, 1.0, 0.0)


def test_rollout_without_weights_gives_no_rows(rollout: Rollout) -> None:
    rollout.weights_BK = None
    assert weight_rows(rollout, 1) == []


class Histograms:
    def __init__(self) -> None:
        self.calls: list[tuple[str, list[float], int]] = []

    def add_histogram(self, name: str, values: Any, global_step: int) -> None:
        self.calls.append((name, values.tolist(), global_step))


def run(logger: WeightDistributionLogger, rollout: Rollout, steps: int, folder: Path, loggers: list[Any]) -> Any:
    trainer: Any = SimpleNamespace(
        log_dir=str(folder), default_root_dir=".", is_global_zero=True, loggers=loggers, global_step=0
    )
    logged: list[dict[str, float]] = []
    module: Any = SimpleNamespace(policy_steps=0, log_dict=lambda values, **kwargs: logged.append(values))
    logger.setup(trainer, module, "fit")
    for step in range(1, steps + 1):
        module.policy_steps = step
        logger.on_train_batch_end(trainer, module, None, {"rollout": rollout}, 0)
    return trainer, module, logged


def test_every_step_is_on_disk_at_once_and_the_figure_comes_at_the_end(rollout: Rollout, tmp_path: Path) -> None:
    histograms = Histograms()
    logger = WeightDistributionLogger(every_n_steps=2)
    loggers = [SimpleNamespace(experiment=histograms), SimpleNamespace(experiment=object()), SimpleNamespace()]
    trainer, module, logged = run(logger, rollout, 4, tmp_path / "run", loggers)
    with (tmp_path / "run/weights.csv").open(newline="") as file:  # read before any end: a killed run has them too
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["task"] == "a" and row["reward"] == "x"] == ["2", "4"]
    assert float(rows[0]["mean"]) == pytest.approx(0.5)
    assert len(logged) == 2
    assert ("weights/a/x", [1.0, 0.5], 2) in histograms.calls
    assert not (tmp_path / "run/weights.png").exists()
    logger.on_exception(trainer, module, RuntimeError())
    assert (tmp_path / "run/weights.png").stat().st_size > 10_000

    again = WeightDistributionLogger()
    run(again, rollout, 1, tmp_path / "run", [])
    assert (tmp_path / "run/weights-1.csv").is_file()


def test_append_rows_writes_one_header(tmp_path: Path) -> None:
    for value in (1, 2):
        append_rows(tmp_path / "x/a.csv", [{"a": value, "b": None}], ("a", "b"))
    assert (tmp_path / "x/a.csv").read_text().split() == ["a,b", "1,", "2,"]


def test_figure_has_a_panel_a_task_and_a_colour_a_reward() -> None:
    rows = [
        {"step": step, "task": task, "reward": reward, "mean": 0.2 * k + 0.01 * step, "std": 0.5}
        for step in (1, 2)
        for task in ("all", "a", "b")
        for k, reward in enumerate(("x", "y", "z"))
        if (task, reward) != ("a", "x")
    ]
    figure = plot_weights(pd.DataFrame(rows))
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == ["a", "b"]
    colours = {
        name: {line.get_label(): to_hex(line.get_color()) for line in axis.lines} for name, axis in panels.items()
    }
    assert colours["a"].keys() == {"y", "z"}
    assert colours["a"].items() <= colours["b"].items()
    assert len(set(colours["b"].values())) == 3
    assert list(panels["b"].lines[1].get_ydata()) == pytest.approx([0.21, 0.22])
    band = panels["b"].collections[1].get_paths()[0].vertices
    assert band[:, 1].min() == 0.0  # 0.21 - 0.5, cut at 0
    assert band[:, 1].max() == pytest.approx(0.72)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y", "z"]


def test_figure_of_a_run_without_tasks_shows_all() -> None:
    figure = plot_weights(pd.DataFrame([{"step": 1, "task": "all", "reward": "x", "mean": 1.0, "std": 0.0}]))
    assert [axis.get_title() for axis in figure.axes] == ["all"]
    assert figure.axes[0].lines[0].get_marker() == "o"  # a single step is no line


def test_a_figure_of_names_that_are_mathematics_or_hidden(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "task": r"$\frac{1$", "reward": reward, "mean": 0.5, "std": 0.0}
        for reward in ("_hidden", "$x^", "y")
    ]
    figure = plot_weights(pd.DataFrame(rows))
    figure.savefig(tmp_path / "a.png")
    assert figure.axes[0].get_title() == r"\$\frac{1\$"
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_hidden", r"\$x^", "y"]


def test_a_figure_that_fails_is_a_warning(rollout: Rollout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    logger = WeightDistributionLogger()
    trainer, module, _ = run(logger, rollout, 1, tmp_path / "run", [])
    with pytest.warns(
        UserWarning, match=r"weights\.png is not drawn .*No space left on device.*weights\.csv has the numbers"
    ):
        logger.on_train_end(trainer, module)


@pytest.mark.parametrize("text", ["=1", "'=1", "''+x", "-a", "@x", "plain", "'plain", ""])
def test_a_cell_is_no_formula_and_is_read_back(text: str) -> None:
    from maestro_pl.errors import cell, from_cell

    assert from_cell(cell(text)) == text
    assert not cell(text).startswith(("=", "+", "-", "@"))
    assert cell(-1.5) == -1.5
