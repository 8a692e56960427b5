"""What ratings, choices and rankings teach a Conductor about the responses of real runs, without training anything.

    python -m benchmarks.real_labels --runs FOLDER_OF_RUNS --model FOLDER_OF_SMOLLM2 --truth quality --draws 40

Every group that the runs' ``rollouts.jsonl`` recorded has its rewards and a metric that none of them is. A draw labels a few
groups by that metric, fits a Conductor on them with the package's own learner (on the frozen base's states of the prompts),
and lets it weigh the groups of other prompts. Labels have no error; qualities that differ by less than ``--alike`` tie. The
score is the correlation, inside each of these groups, of the weighed rewards with the metric: what a policy gradient would
follow. Its mean over tasks and that of the worst task, means over the draws, are printed as Markdown and written to
benchmarks/results/real_labels.csv; the first row is of equal weights on the same groups, the last of one vector a task, fitted
on all of its groups and scored on the same: about the most that weights can reach.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import maestro_pl
from benchmarks.faults.runs import rollout_rows
from benchmarks.real_anchors import ALIKE
from benchmarks.sandbox.offline import Variant, labels_of, taught
from maestro_pl.algorithm.simplex import best_correlating_weights
from maestro_pl.conductor.credits import zscores
from maestro_pl.data.rendering import PromptRenderer
from maestro_pl.errors import UserError
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.frozen import FrozenStates
from maestro_pl.policy.policy import LoRAPolicy

RESULTS = Path(__file__).parent / "results" / "real_labels.csv"
COUNTS = (8, 16, 27, 42)  # labelled groups of all tasks together
FLAT = 1e-4  # a spread of the metric below which a group says nothing


def choosing() -> maestro_pl.RidgeLearner:
    """The learner of choices and rankings."""
    return maestro_pl.RidgeLearner(target="choice")


#: Kinds of labels of four responses: those that differ most, as ``model.anchoring.shown: spread`` shows them.
KINDS = {
    "ratings of 4": Variant("", shown=4, noise=0.0),
    "best of 4": Variant("", learner=choosing, label="best", shown=4),
    "ranking of 4": Variant("", learner=choosing, label="ranking", shown=4),
}


@dataclass(frozen=True)
class Groups:
    """Recorded groups of one size.

    Attributes:
        names: K rewards.
        tasks: of N groups.
        prompts: of N groups, as the run's rows have them.
        z_NGK: rewards, z-scored in the group.
        truth_NG: the metric.
    """

    names: list[str]
    tasks: list[str]
    prompts: list[str]
    z_NGK: Tensor
    truth_NG: Tensor


def read_groups(runs: Iterable[Path], truth: str) -> Groups:
    """All groups below these folders in which every response has every reward and the metric.

    Raises:
        UserError: there are none.
    """
    rows: list[list[dict[str, Any]]] = []
    for path in sorted(file for folder in runs for file in folder.rglob("rollouts.jsonl")):
        groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for row in rollout_rows(path):
            groups.setdefault((row["step"], row["group"]), []).append(row)
        rows += groups.values()
    sizes = Counter(map(len, rows))
    size = max(sizes, key=lambda count: (sizes[count], count), default=0)  # a run that was cut off has a smaller one
    weighed_in = Counter(tuple(group[0]["weights"] or ()) for group in rows)
    names = list(max(weighed_in, key=lambda row: weighed_in[row], default=()))
    whole = [group for group in rows if len(group) == size and all(_scores(row, [*names, truth]) for row in group)]
    if not whole or not names:
        raise UserError(
            f"No group of a rollouts.jsonl below these folders has weighed rewards and {truth!r}: give folders of runs that "
            "list it under `metrics`."
        )
    if len(whole) < len(rows):
        print(f"{len(rows) - len(whole)} of {len(rows)} groups are left out: another size, or without every score.")
    raw_NGK = torch.tensor([[_scores(row, names) for row in group] for group in whole])
    mask_BK = torch.ones(len(whole) * size, len(names), dtype=torch.bool)
    return Groups(
        names,
        [str(group[0]["task"]) for group in whole],
        [str(group[0]["prompt"]) for group in whole],
        zscores(raw_NGK.flatten(0, 1), mask_BK, size).view(len(whole), size, -1),
        torch.tensor([[_scores(row, [truth])[0] for row in group] for group in whole]),
    )


def _scores(row: dict[str, Any], names: Sequence[str]) -> list[float]:
    """The row's scores, or nothing where one is missing."""
    scores = [row["rewards"].get(name) for name in names]
    return [] if None in scores else scores


def ties(rank_BJ: Tensor, truth_B: Tensor, size: int, alike: float) -> Tensor:
    """Ranks in which qualities that differ by less than ``alike`` from the next better one tie with it."""
    ranks = rank_BJ.clone()
    for n in range(len(truth_B) // size):
        rows = [row for row in range(n * size, (n + 1) * size) if int(rank_BJ[row, 0]) >= 0]
        order = sorted(rows, key=lambda row: -float(truth_B[row]))
        most = int(rank_BJ[rows, 0].max())
        rank = 0
        for better, worse in pairwise(order):
            ranks[better, 0] = rank
            rank = min(most, rank + int(float(truth_B[better] - truth_B[worse]) >= alike))
            ranks[worse, 0] = rank
    return ranks


@torch.no_grad()
def states_of(model: str, prompts: Sequence[str]) -> Tensor:
    """The frozen base's state of each prompt, as one turn of a chat: float32 (N, D)."""
    policy = LoRAPolicy(model, dtype="float32")
    render = PromptRenderer(policy.tokenizer)
    ids = render.encode([render.text(prompt) for prompt in prompts])
    return FrozenStates().of_prompts(policy, ids, HiddenContext(place="prompt"), max_tokens=4096)


def weighed(
    groups: Groups, states_ND: Tensor, chosen: Sequence[int], variant: Variant, seed: int, alike: float = 0.0
) -> Tensor:
    """The weights of every group after these were labelled: (N, K)."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    size, index = groups.truth_NG.shape[1], torch.tensor(chosen)
    z_BK, truth_B = groups.z_NGK[index].flatten(0, 1), groups.truth_NG[index].flatten()
    variant = replace(variant, group=size, conductor={"context": "prompt", "state": "base"})
    value_B, rank_BJ = labels_of(variant, truth_B, z_BK, generator)
    rank_BJ = None if rank_BJ is None else ties(rank_BJ, truth_B, size, alike)
    h_BD = states_ND[index].repeat_interleave(size, 0)
    made = taught(variant, groups.names, states_ND, h_BD, z_BK, value_B, rank_BJ)
    with torch.no_grad():
        return made.probabilities(states_ND, torch.ones(len(states_ND), len(groups.names), dtype=torch.bool))


def score(groups: Groups, weights_NK: Tensor, held_out: Iterable[int]) -> dict[str, float]:
    """Task to the mean correlation, inside its held-out groups, of the weighed rewards with the metric."""
    found: dict[str, list[float]] = {}
    for n in held_out:
        truth_G = groups.truth_NG[n] - groups.truth_NG[n].mean()
        if float(truth_G.std()) < FLAT:
            continue
        reward_G = groups.z_NGK[n] @ weights_NK[n]
        reward_G = reward_G - reward_G.mean()
        length = float(reward_G.norm() * truth_G.norm())
        found.setdefault(groups.tasks[n], []).append(float(reward_G @ truth_G) / length if length > 1e-9 else 0.0)
    return {task: fmean(values) for task, values in sorted(found.items())}


def fitted_on_all(groups: Groups) -> Tensor:
    """One vector a task from all of its groups, of at least 0, whose weighed reward correlates best: (N, K); equal if none."""
    weights_NK = torch.zeros(len(groups.tasks), len(groups.names))
    truth_NG = groups.truth_NG - groups.truth_NG.mean(1, keepdim=True)
    truth_NG = truth_NG / truth_NG.std(1, keepdim=True).clamp(min=FLAT)
    for task in dict.fromkeys(groups.tasks):
        rows_N = torch.tensor([other == task for other in groups.tasks])
        z_BK, truth_B = groups.z_NGK[rows_N].flatten(0, 1), truth_NG[rows_N].flatten()
        covariance_1K, every_1K = (z_BK.T @ truth_B).unsqueeze(0) / len(z_BK), torch.ones(1, z_BK.shape[1]).bool()
        weights_NK[rows_N] = best_correlating_weights(covariance_1K, z_BK.T @ z_BK / len(z_BK), every_1K)
    return weights_NK


def measure(
    groups: Groups, states_ND: Tensor, draws: int, counts: Sequence[int] = COUNTS, alike: float = 0.0
) -> list[dict[str, object]]:
    """Rows: equal weights, each kind of label and number of labelled groups (the same draws for all), and all groups."""
    total = len(groups.tasks)
    if total <= 2 * max(counts):
        raise UserError(f"{total} groups: too few to label {max(counts)} of them and score the rest.")
    orders = [torch.randperm(total, generator=torch.Generator().manual_seed(draw)).tolist() for draw in range(draws)]
    held_out = []
    for order in orders:
        # another group of a labelled prompt is no fresh one
        seen = {groups.prompts[n] for n in order[: max(counts)]}
        held_out.append([n for n in range(total) if groups.prompts[n] not in seen])
    equal_NK = torch.full((total, len(groups.names)), 1 / len(groups.names))
    rows = [_row("equal weights", 0, [score(groups, equal_NK, left) for left in held_out])]
    for kind, variant in KINDS.items():
        for count in counts:
            scores = [
                score(groups, weighed(groups, states_ND, order[:count], variant, draw, alike), held_out[draw])
                for draw, order in enumerate(orders)
            ]
            rows.append(_row(kind, count, scores))
    return [*rows, _row("all, in sample", total, [score(groups, fitted_on_all(groups), range(total))])]


def _row(kind: str, count: int, scores: Sequence[dict[str, float]]) -> dict[str, object]:
    named = sorted({task for row in scores for task in row})  # a draw may leave a task no group
    tasks = {task: round(fmean(row[task] for row in scores if task in row), 4) for task in named}
    return {
        "labels": kind,
        "groups": count,
        "draws": len(scores),
        "mean": round(fmean(fmean(row.values()) for row in scores), 4),
        "worst_task": round(fmean(min(row.values()) for row in scores), 4),
        **tasks,
    }


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows)])


def main(args: list[str] | None = None) -> None:
    """Read, draw, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="folders with rollouts.jsonl somewhere below"
    )
    parser.add_argument("--model", required=True, help="hub id or folder of the runs' base")
    parser.add_argument("--truth", default="quality", help="the metric that the labels are made of")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--alike", type=float, default=ALIKE, help="qualities that differ by less tie")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(args)
    groups = read_groups(options.runs, options.truth)
    rows = measure(groups, states_of(options.model, groups.prompts), options.draws, alike=options.alike)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    prompts = len(set(groups.prompts))
    print(f"{len(groups.tasks)} groups of {groups.truth_NG.shape[1]}, {prompts} prompts: {', '.join(groups.names)}")
    print(table(rows))


if __name__ == "__main__":
    main()
