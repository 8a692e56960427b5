"""Weights and contexts: do they follow the task, do the tasks differ, are they the same on unseen prompts?

Permutations of task labels come from a seeded numpy generator; torch's global random state is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maestro_pl.evaluation.health.record import WeighedBatch, has_choice
from maestro_pl.evaluation.health.reward_weights import Measured

PERMUTATIONS = 199  # with the observed labelling 200, so that p-values are multiples of 1/200


class PromptWeights(NamedTuple):
    """Mean weights of each prompt's responses over rewards that all its peers share: weights_NK and the task of each."""

    weights_NK: Tensor
    tasks_N: list[str]


def prompt_weights(weights_BK: Tensor, mask_BK: Tensor, tasks_N: Sequence[str], group_size: int) -> PromptWeights:
    """Mean weights of each group over the rewards that every task has, rescaled to add up to 1.

    A task has a reward if it applies to at least half of its responses with a choice. Without this restriction the
    tasks would differ by the rewards they have, whatever the weigher does. Fewer than two such rewards: no rows.
    """
    choice_B, tasks_B = has_choice(weights_BK, mask_BK), [task for task in tasks_N for _ in range(group_size)]
    common_K = torch.ones(mask_BK.shape[1], dtype=torch.bool)
    for task in set(tasks_N):
        rows_B = choice_B & torch.tensor([t == task for t in tasks_B])
        if rows_B.any():
            common_K &= mask_BK[rows_B].double().mean(0) >= 0.5
    kept = weights_BK[:, common_K]
    rows_B = choice_B & mask_BK[:, common_K].all(1) & (kept.sum(1) > 0)
    if int(common_K.sum()) < 2 or not rows_B.any():
        return PromptWeights(weights_BK[:0], [])
    kept = (kept / kept.sum(1, keepdim=True)).masked_fill(~rows_B.unsqueeze(1), 0.0)
    count_N = rows_B.view(-1, group_size).sum(1)
    some_N = count_N > 0
    mean_NK = kept.view(len(count_N), group_size, -1).sum(1) / count_N.clamp(min=1).unsqueeze(1)
    return PromptWeights(mean_NK[some_N], [t for t, some in zip(tasks_N, some_N.tolist(), strict=True) if some])


def _labellings(tasks_N: Sequence[str], seed: int) -> Tensor:
    """Float64 [1 + PERMUTATIONS, T, N]: shares of each prompt in its task's mean, first as given and then permuted."""
    names, labels_N = np.unique(np.asarray(tasks_N), return_inverse=True)
    generator = np.random.default_rng(seed)
    orders = [labels_N, *(generator.permutation(labels_N) for _ in range(PERMUTATIONS))]
    one_hot = torch.from_numpy(np.stack(orders)).unsqueeze(1) == torch.arange(len(names)).view(1, -1, 1)
    return one_hot.double() / one_hot.sum(2, keepdim=True)


def task_information(prompts: PromptWeights, seed: int = 0) -> Measured:
    """Mutual information in nats of the task and an action drawn from the weights, without the bias of few prompts.

    I = H(mean w) - sum_t p(t) H(mean w of task t), less its mean over random permutations of the task labels among
    prompts; the error is the standard deviation over these.
    """
    shares = _labellings(prompts.tasks_N, seed)
    counts_C = 1.0 / shares[0].amax(1)
    entropies_RC = torch.special.entr(shares @ prompts.weights_NK).sum(2)
    whole = torch.special.entr(prompts.weights_NK.mean(0)).sum()
    information_R = whole - (entropies_RC * counts_C / counts_C.sum()).sum(1)
    return Measured(float(information_R[0] - information_R[1:].mean()), float(information_R[1:].std()))


class TaskDifference(NamedTuple):
    """How the rewards' structure differs between tasks.

    Attributes:
        size: largest difference between two tasks' means of one feature.
        p: share of permutations of the task labels, the given one included, that separate the tasks at least as well.
        by: ``anchor`` or ``rewards``.
    """

    size: float
    p: float
    by: str


def task_difference(batch: WeighedBatch, least: int, seed: int = 0) -> TaskDifference | None:
    """Whether tasks want other weights: by what their rewards have to do with the anchor, or with each other.

    The features of a group are the correlations, inside it, of each reward with the anchor; where fewer than two tasks
    have ``least`` groups with anchor scores, the correlations of the rewards with each other stand in for them.

    Returns:
        None with fewer than two tasks of ``least`` groups.
    """
    shape = (-1, batch.group_size, len(batch.names))
    z, anchor = batch.z_BK.view(shape), batch.anchor_B.view(-1, batch.group_size)
    labelled_N = (~anchor.isnan()).sum(1) >= 2
    freedom = batch.group_size - 1
    with_anchor = (z * anchor.nan_to_num(0.0).unsqueeze(2)).sum(1) / freedom
    upper = torch.triu_indices(len(batch.names), len(batch.names), offset=1)
    with_each_other = (z.transpose(1, 2) @ z)[:, upper[0], upper[1]] / freedom
    for features_NF, groups_N, by in (
        (with_anchor, labelled_N, "anchor"),
        (with_each_other, torch.ones_like(labelled_N), "rewards"),
    ):
        enough = _tasks_with(batch.tasks_N, groups_N, least)
        chosen = [n for n, task in enumerate(batch.tasks_N) if task in enough and bool(groups_N[n])]
        if len(enough) >= 2:
            return TaskDifference(*_separation(features_NF[chosen], [batch.tasks_N[n] for n in chosen], seed), by)
    return None


def _tasks_with(tasks_N: Sequence[str], groups_N: Tensor, least: int) -> set[str]:
    kept = [task for task, keep in zip(tasks_N, groups_N.tolist(), strict=True) if keep]
    return {task for task in kept if kept.count(task) >= least}


def _separation(features_NF: Tensor, tasks_N: Sequence[str], seed: int) -> tuple[float, float]:
    shares = _labellings(tasks_N, seed)
    counts_C = 1.0 / shares[0].amax(1)
    means_RCF = shares @ features_NF
    between_R = ((means_RCF - features_NF.mean(0)).square().sum(2) * counts_C).sum(1)
    as_good = int((between_R >= between_R[0] * (1 - 1e-9)).sum())  # counts the given labelling itself
    return float((means_RCF[0].amax(0) - means_RCF[0].amin(0)).max()), as_good / len(between_R)


# -- training and validation prompts ---------------------------------------------------------------------------------


class Gap(NamedTuple):
    """How far the weights on training and on validation prompts of one task are apart.

    Attributes:
        distance: total variation distance between the two mean weights, in [0, 1].
        error: at most the standard error of the distance, from the spread between prompts.
        drift: distance between the older and the newer half of the training prompts: the weights move in the meantime.
    """

    distance: float
    error: float
    drift: float


def weight_gaps(train: WeighedBatch, validation: WeighedBatch, least: int) -> dict[str, Gap]:
    """The gap of every task with at least ``least`` prompts on both sides.

    Both batches have the same rewards; ``train`` is in the order of training.
    """
    gaps = {}
    for task in sorted(set(train.tasks_N) & set(validation.tasks_N)):
        means, masks = zip(_means_of_task(train, task), _means_of_task(validation, task), strict=True)
        sides = ["train"] * len(means[0]) + ["validation"] * len(means[1])
        shared = prompt_weights(torch.cat(means), torch.cat(masks), sides, group_size=1)
        train_NK, validation_NK = (
            shared.weights_NK[[s == side for s in shared.tasks_N]] for side in ("train", "validation")
        )
        if min(len(train_NK), len(validation_NK)) >= max(least, 2):
            gaps[task] = _gap(train_NK, validation_NK)
    return gaps


def _means_of_task(batch: WeighedBatch, task: str) -> tuple[Tensor, Tensor]:
    """Mean weights of each prompt of a task over its responses with a choice, and the rewards that apply to all of these."""
    shape = (-1, batch.group_size, len(batch.names))
    rows, mask = batch.choice_B.view(shape[:2]).unsqueeze(2), batch.mask_BK.view(shape)
    mean_NK = batch.weights_BK.view(shape).masked_fill(~rows, 0.0).sum(1) / rows.sum(1).clamp(min=1)
    chosen = [n for n, name in enumerate(batch.tasks_N) if name == task]
    return mean_NK[chosen], ((mask | ~rows).all(1) & rows.any(1))[chosen]


def _gap(train_NK: Tensor, validation_NK: Tensor) -> Gap:
    variance_K = train_NK.var(0) / len(train_NK) + validation_NK.var(0) / len(validation_NK)
    half = len(train_NK) // 2
    drift = total_variation(train_NK[:half].mean(0), train_NK[half:].mean(0))
    distance = total_variation(train_NK.mean(0), validation_NK.mean(0))
    return Gap(distance, 0.5 * float(variance_K.sqrt().sum()), drift)


def total_variation(first_K: Tensor, second_K: Tensor) -> float:
    """Half the sum of absolute differences of two distributions: the share of the weight that is elsewhere."""
    return 0.5 * float((first_K - second_K).abs().sum())
