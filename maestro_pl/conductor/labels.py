"""What the anchors were asked and what they said: how many labels each task got, on which scale, and in which order."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from maestro_pl.algorithm.advantages import group_advantages
from maestro_pl.algorithm.scalar_reward import anchor_scores
from maestro_pl.errors import escaped
from maestro_pl.rollout import Rollout
from maestro_pl.run.ranks import gathered


def task_id(task: str) -> int:
    """A task's name as a number, the same in every process."""
    return zlib.crc32(task.encode())


@dataclass
class TaskLabels:
    """The labels of one task.

    Attributes:
        groups: that were sampled.
        asked: of them, those that the anchors were asked about.
        answered: of them, those of which they said something that tells responses apart.
        ratings: responses that got a score.
        choices: comparisons of responses of one group.
    """

    groups: int = 0
    asked: int = 0
    answered: int = 0
    ratings: int = 0
    choices: int = 0

    def add(self, other: TaskLabels) -> None:
        """Count these too."""
        for name, number in asdict(other).items():
            setattr(self, name, getattr(self, name) + number)


class LabelCounts:
    """The labels of every task of a run, over all ranks."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskLabels] = {}

    def add(self, rollout: Rollout, asked_N: Tensor, answered_N: Tensor) -> None:
        """Count a batch. Collective.

        Args:
            rollout: with what the anchors said.
            asked_N: bool, the groups that they were asked about.
            answered_N: bool, those of which they said something.
        """
        own: dict[str, TaskLabels] = {}
        tasks = [str(task) for task in rollout.columns.get("task", ["all"] * len(rollout.prompts))]
        for n, task in enumerate(tasks):
            own.setdefault(task, TaskLabels()).add(TaskLabels(1, int(asked_N[n]), int(answered_N[n])))
        for scores in anchor_scores(rollout):
            for n, count in enumerate(scores.mask_B.view(-1, rollout.group_size).sum(1).tolist()):
                own[tasks[n]].ratings += count
            for choice in scores.choices:
                own[tasks[choice.rows[0] // rollout.group_size]].choices += 1
        for part in gathered(own):
            for task, labels in part.items():
                self.tasks.setdefault(task, TaskLabels()).add(labels)

    def add_later(self, task: str, labels: TaskLabels) -> None:
        """Count what was said of a group of an earlier batch, which every rank knows."""
        self.tasks.setdefault(task, TaskLabels()).add(labels)

    @property
    def choices(self) -> int:
        """Comparisons so far, of all tasks."""
        return sum(labels.choices for labels in self.tasks.values())

    def asked(self, task: str) -> int:
        """Groups of a task that the anchors were asked about."""
        return self.tasks[task].asked if task in self.tasks else 0

    @property
    def without(self) -> list[str]:
        """Tasks of which nothing is known, where something is known of another."""
        known = [task for task, labels in self.tasks.items() if labels.answered]
        return [task for task in self.tasks if task not in known] if known else []

    def unknown(self, task: str) -> bool:
        """Whether nothing is known of this task, while something is of another."""
        known = any(labels.answered for labels in self.tasks.values())
        return known and not (task in self.tasks and self.tasks[task].answered)

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Plain numbers."""
        return {task: asdict(labels) for task, labels in self.tasks.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.tasks = {task: TaskLabels(**labels) for task, labels in state.items()}

    def show(self, title: str, known: Sequence[str] = ()) -> None:
        """Print a line a task; those of ``known`` that had no group yet too."""
        if not any(labels.groups for labels in self.tasks.values()):
            Console().print(f"{title}: none yet", Text(f"({', '.join(map(escaped, sorted({*self.tasks, *known})))})"))
            return
        table = Table(title, "groups", "asked", "told apart", "ratings", "choices", box=None)
        for task in sorted({*self.tasks, *known}):
            labels = self.tasks.get(task, TaskLabels())
            numbers = (labels.groups, labels.asked, labels.answered, labels.ratings, labels.choices)
            table.add_row(Text(escaped(task)), *map(str, numbers))
        Console().print(table)


class LabelScale:
    """One standard deviation for all labels of an anchor: groups of which a few responses are rated have none of their own."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}  # anchor to squares of its centred labels, and their degrees of freedom

    def values(self, rollout: Rollout) -> Tensor:
        """What each response is worth: labels less their group's mean, over the anchor's deviation; the mean over anchors.

        Collective: labels of all ranks make the deviation. NaN where nothing was said, and in groups whose labels are
        all the same. Returns value_B on the CPU.
        """
        size = rollout.group_size
        centred: dict[str, tuple[Tensor, Tensor]] = {}
        own: dict[str, tuple[float, float]] = {}
        for scores in anchor_scores(rollout):
            mask_B = scores.mask_B.cpu()
            values_B = scores.values_B.cpu().masked_fill(~mask_B, torch.nan)
            centred_B = group_advantages(values_B, size, "none")
            rated_N = mask_B.view(-1, size).sum(1)
            centred[scores.spec.name] = (centred_B, mask_B)
            own[scores.spec.name] = (float(centred_B.square().sum()), float((rated_N - 1).clamp(min=0).sum()))
        for part in gathered(own):
            for name, (squares, freedom) in part.items():
                before = self.sums.setdefault(name, [0.0, 0.0])
                self.sums[name] = [before[0] + squares, before[1] + freedom]
        total_B, applying_B = torch.zeros(len(rollout)), torch.zeros(len(rollout))
        for name, (centred_B, mask_B) in centred.items():
            squares, freedom = self.sums[name]
            total_B += centred_B / max(squares / max(freedom, 1.0), 1e-12) ** 0.5
            applying_B += mask_B
        value_B = total_B / applying_B.clamp(min=1)
        varies_N = (value_B != 0).view(-1, size).any(1)
        known_B = (applying_B > 0) & varies_N.repeat_interleave(size)
        return torch.where(known_B, value_B, torch.full_like(value_B, torch.nan))

    def state_dict(self) -> dict[str, list[float]]:
        """Plain numbers."""
        return {name: list(sums) for name, sums in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.sums = {name: list(sums) for name, sums in state.items()}


def choice_ranks(rollout: Rollout) -> Tensor:
    """The anchors' comparisons as ranks in columns, int64 rank_BJ on the CPU: 0 is best, -1 was not shown in this one.

    A group with several comparisons has several columns; J is 0 where there is none.
    """
    columns: list[Tensor] = []
    used: list[set[int]] = []  # the groups that each column has a comparison of
    for scores in anchor_scores(rollout):
        for choice in scores.choices:
            group = choice.rows[0] // rollout.group_size
            place = next((j for j, groups in enumerate(used) if group not in groups), len(used))
            if place == len(used):
                used.append(set())
                columns.append(torch.full((len(rollout),), -1, dtype=torch.long))
            used[place].add(group)
            columns[place][list(choice.rows)] = torch.tensor(choice.ranks)
    return torch.stack(columns, dim=1) if columns else torch.empty(len(rollout), 0, dtype=torch.long)


def tells_apart(rank_BJ: Tensor, group_size: int) -> Tensor:
    """Bool (N,): groups of which at least one comparison has two ranks."""
    shown = rank_BJ.view(len(rank_BJ) // group_size, group_size, rank_BJ.shape[1])
    high = shown.amax(1)
    low = shown.masked_fill(shown < 0, torch.iinfo(torch.long).max).amin(1)
    return ((high >= 0) & (low < high)).any(1)
