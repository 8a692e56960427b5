"""How the Conductor spreads its weight: scalars, histograms, ``weights.csv`` and ``weights.png`` (the paper's figure 3)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.errors import cell, escaped, from_cell
from maestro_pl.rollout import Rollout
from maestro_pl.run.paths import free_path, run_dir

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow, which is too pale for a line: told apart under every colour blindness
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
ALL_TASKS = "all"


class WeightRow(NamedTuple):
    """The weights of one reward in one task at one step.

    Attributes:
        step: policy steps done, skipped batches included.
        task: the task, or ``"all"``.
        reward: the reward's name.
        mean: mean weight over the task's responses, in [0, 1]; the means of a task add up to 1.
        std: population standard deviation over the same responses.
        entropy: mean over the responses of the entropy in nats of their weights, the same in every row of the task.
        n: responses.
    """

    step: int
    task: str
    reward: str
    mean: float
    std: float
    entropy: float
    n: int


def policy_weights(rollout: Rollout) -> Tensor | None:
    """The weights to show, [B, K]: the Conductor's probabilities pi(.|h) where the module put them, else the weights used.

    In training the weights used are sampled one-hot or mixed actions; the probabilities they were drawn from, in
    ``rollout.probabilities_BK``, are what the paper's figure 3 shows.
    """
    probabilities_BK = rollout.probabilities_BK
    chosen = rollout.weights_BK if probabilities_BK is None else probabilities_BK
    return None if chosen is None else chosen.detach().float().cpu()


def weight_rows(rollout: Rollout, step: int) -> list[WeightRow]:
    """Mean, spread and entropy of the weights, for ``"all"`` and every task of the rollout, in order of appearance.

    Responses without any weight (no reward applies) are left out, and so is, in a task, a reward that applies to none
    of its responses. ``"all"`` is left out when the rollout has one task only.
    """
    weights_BK = policy_weights(rollout)
    if weights_BK is None:
        return []
    tasks = rollout.tasks
    weighed_B = weights_BK.sum(dim=1) > 0
    names = list(dict.fromkeys(tasks))
    groups = {task: torch.tensor([t == task for t in tasks]) & weighed_B for task in names}
    if len(names) > 1:
        groups = {ALL_TASKS: weighed_B, **groups}
    return [row for task, rows_B in groups.items() for row in _task_rows(rollout, weights_BK, task, rows_B, step)]


def _task_rows(rollout: Rollout, weights_BK: Tensor, task: str, rows_B: Tensor, step: int) -> list[WeightRow]:
    if not rows_B.any():
        return []
    mean_K = weights_BK[rows_B].mean(dim=0)
    std_K = weights_BK[rows_B].std(dim=0, unbiased=False)
    entropy = float(torch.special.entr(weights_BK[rows_B]).sum(dim=1).mean())
    rows = []
    for k, name in enumerate(rollout.weight_names):
        scores = rollout.rewards.get(name)
        if scores is None or bool(scores.mask_B.cpu()[rows_B].any()):
            rows.append(WeightRow(step, task, name, float(mean_K[k]), float(std_K[k]), entropy, int(rows_B.sum())))
    return rows


def scalars(rows: Sequence[WeightRow]) -> dict[str, float]:
    """Metric keys of the rows: ``weights/[<task>/]<name>``, the same with ``_std``, and ``weights_entropy[/<task>]``.

    The entropy has a key of its own because a reward may be called ``entropy``.
    """
    single = len({row.task for row in rows}) == 1
    out: dict[str, float] = {}
    for row in rows:
        if row.task == ALL_TASKS or single:
            out[f"weights/{row.reward}"] = row.mean
            out[f"weights/{row.reward}_std"] = row.std
            out["weights_entropy"] = row.entropy
        if row.task != ALL_TASKS:
            out[f"weights/{row.task}/{row.reward}"] = row.mean
            out[f"weights/{row.task}/{row.reward}_std"] = row.std
            out[f"weights_entropy/{row.task}"] = row.entropy
    return out


class WeightDistributionLogger(Callback):
    """Logs the weight distribution per task and reward, and draws its evolution.

    Scalars go through every logger, histograms to the loggers whose experiment has ``add_histogram`` (TensorBoard).
    Rows are appended to ``weights.csv`` in the run's folder after each step, so that a killed run keeps them, and
    ``weights.png`` is drawn at the end, also of a run that fails. What is shown is ``policy_weights``.

    Args:
        every_n_steps: policy steps between two rows and histograms.
        plot: whether to draw ``weights.png``.
    """

    def __init__(self, every_n_steps: int = 1, plot: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.plot = plot
        self.csv_path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the file; it is created with its first row."""
        folder = run_dir(trainer)  # on every rank: the folder's name is broadcast
        self.csv_path = free_path(folder / "weights.csv") if stage == "fit" and trainer.is_global_zero else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Log and append the weights of this batch, if it has any."""
        if "rollout" not in batch:
            return
        step = int(getattr(pl_module, "policy_steps", trainer.global_step))
        rollout: Rollout = batch["rollout"].of_all_ranks
        rows = weight_rows(rollout, step)
        if not rows or step % self.every_n_steps:
            return
        pl_module.log_dict(scalars(rows), on_step=True, on_epoch=False, batch_size=len(rollout))
        self._histograms(trainer, rollout, step)
        if self.csv_path is not None:
            append_rows(self.csv_path, [row._asdict() for row in rows], WeightRow._fields)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw ``weights.png``."""
        self._draw()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        self._draw()

    def _draw(self) -> None:
        if not self.plot or self.csv_path is None or not self.csv_path.exists():
            return
        import pandas as pd

        try:
            frame = pd.read_csv(self.csv_path, keep_default_na=False, dtype={"task": str, "reward": str})
            frame[["task", "reward"]] = frame[["task", "reward"]].map(from_cell)
            plot_weights(frame).savefig(self.csv_path.with_suffix(".png"), dpi=150)
        except Exception as error:  # a figure never ends a run, nor hides what ended it
            rank_zero_warn(
                f"weights.png is not drawn ({type(error).__name__}: {error}); {self.csv_path} has the numbers."
            )

    def _histograms(self, trainer: Trainer, rollout: Rollout, step: int) -> None:
        experiments: list[Any] = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        writers = [experiment for experiment in experiments if hasattr(experiment, "add_histogram")]
        weights_BK = policy_weights(rollout)
        if not writers or weights_BK is None:
            return
        tasks = rollout.tasks
        for task in dict.fromkeys(tasks):
            rows_B = torch.tensor([t == task for t in tasks])
            for k, name in enumerate(rollout.weight_names):
                for writer in writers:
                    writer.add_histogram(f"weights/{task}/{name}", weights_BK[rows_B, k].numpy(), global_step=step)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Append rows to a CSV file and close it; a new file gets its header first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=fields)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)


def _plain(text: str) -> str:
    """A name as matplotlib shows it: no mathematics, and no label that its legend leaves out."""
    shown = escaped(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def plot_weights(frame: pd.DataFrame) -> Figure:
    """The evolution of the mean weight per reward, one panel a task, with a band of one standard deviation (figure 3).

    Args:
        frame: the columns of ``weights.csv``: ``step``, ``task``, ``reward``, ``mean``, ``std``.

    Returns:
        A figure that belongs to no GUI; save it with ``savefig``. A reward has the same colour in every panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [task for task in dict.fromkeys(frame["task"]) if task != ALL_TASKS] or [ALL_TASKS]
    rewards = list(dict.fromkeys(frame["reward"]))
    columns = 2 if len(tasks) == 4 else min(3, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.0 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    top = min(1.0, max(0.5, 1.05 * float((frame["mean"] + frame["std"]).max())))
    for axis, task in zip(axes, tasks, strict=False):
        panel = frame[frame["task"] == task]
        for k, reward in enumerate(rewards):
            _curve(axis, panel[panel["reward"] == reward].sort_values("step"), reward, k)
        axis.set(title=_plain(task), ylim=(0, top), ylabel="mean weight", xlabel="policy step")
        axis.grid(alpha=0.25, linewidth=0.6)
    for index, axis in enumerate(axes):
        axis.set_visible(index < len(tasks))
        lowest = index + columns >= len(tasks)  # nothing visible below
        axis.tick_params(labelbottom=lowest, labelleft=index % columns == 0)
        axis.xaxis.label.set_visible(lowest)
        axis.yaxis.label.set_visible(index % columns == 0)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown = [reward for reward in rewards if _plain(reward) in handles]
    figure.legend(
        [handles[_plain(r)] for r in shown],
        [_plain(r) for r in shown],
        loc="outside lower center",
        ncols=min(3 * columns, len(shown)),
        frameon=False,
    )
    return figure


def _curve(axis: Any, curve: pd.DataFrame, reward: str, index: int) -> None:
    """One line with its band; rewards beyond the palette repeat its colours in another line style."""
    if curve.empty:
        return
    colour, style = _COLOURS[index % len(_COLOURS)], _STYLES[index // len(_COLOURS) % len(_STYLES)]
    marker = "o" if len(curve) == 1 else None
    axis.plot(curve["step"], curve["mean"], style, color=colour, label=_plain(reward), linewidth=1.8, marker=marker)
    low, high = (curve["mean"] - curve["std"]).clip(0, 1), (curve["mean"] + curve["std"]).clip(0, 1)
    axis.fill_between(curve["step"], low, high, color=colour, alpha=0.15, linewidth=0)
