"""Labels by choice: which responses are shown, how probable a choice is, and the coefficients that explain it best.

Pure functions. Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOGIT = math.pi / math.sqrt(
    6
)  # standard deviation of a Gumbel error: a choice errs as a rating with an error of 1 does
BASIS = 20  # directions of the context that choices are explained by
ITERATIONS = 30  # of Newton's method; a handful is usual
SPREAD = 0.05  # weight of the rewards' scatter in what is shown


def spread_rows(z_GK: Tensor, count: int) -> list[int]:
    """The ``count`` responses of a group whose rewards differ most: their places, in order.

    The pair with the largest |z_i - z_j| first; then, one by one, the response that maximises
    log det(I + 0.05 Zc' Zc), Zc the rewards of the chosen ones less their mean.

    Args:
        z_GK: rewards z-scored in the group, 0 where they do not apply.
        count: how many, at least 2; a smaller group is shown whole.
    """
    size = len(z_GK)
    if count >= size:
        return list(range(size))
    z_GK = z_GK.double()
    far = int(torch.cdist(z_GK, z_GK).argmax())
    chosen = [far // size, far % size] if far // size != far % size else [0, 1]  # all alike: any two
    while len(chosen) < count:
        left = [row for row in range(size) if row not in chosen]
        chosen.append(max(left, key=lambda row: _scatter(z_GK[[*chosen, row]])))
    return sorted(chosen)


def _scatter(z_SK: Tensor) -> float:
    centred_SK = z_SK - z_SK.mean(0)
    eye_KK = torch.eye(z_SK.shape[1], dtype=z_SK.dtype, device=z_SK.device)
    return float(torch.logdet(eye_KK + SPREAD * centred_SK.T @ centred_SK))


@dataclass(frozen=True)
class Stages:
    """Rankings taken apart: at each stage one of the responses that are left is best (Plackett-Luce).

    Attributes:
        row_M: int64, the response of each entry.
        stage_M: int64, its stage, 0 to S - 1.
        share_M: float, its share of the stage's choice: 1 of a single best one, 1/n of n that tie, 0 of the others.
        weight_S: float, how much each stage counts.
    """

    row_M: Tensor
    stage_M: Tensor
    share_M: Tensor
    weight_S: Tensor

    def __len__(self) -> int:
        """S."""
        return len(self.weight_S)


def stages_of(rank_B: Tensor, group_B: Tensor, weight_B: Tensor, pairs: bool = False) -> Stages:
    """The stages of every group's ranking.

    Those of the last rank, which are left over at the end, are no stage: between them nothing was said. So a group in
    which all have one rank (no difference, or all are bad) has none.

    Args:
        rank_B: int64, 0 for the best, equal where they tie; below 0: not shown.
        group_B: int64, equal for the responses of one choice.
        weight_B: float, the same in a group.
        pairs: take each ranking apart into its pairs of a better and a worse response (Bradley-Terry).
    """
    entries: list[tuple[int, int, float]] = []
    weights: list[float] = []
    ranks, groups, sizes = rank_B.tolist(), group_B.tolist(), weight_B.tolist()
    members: dict[int, list[int]] = {}
    for row, rank in enumerate(ranks):
        if rank >= 0:
            members.setdefault(groups[row], []).append(row)
    for rows in members.values():
        stages: list[tuple[list[int], list[int]]] = []  # those that are left, and the best of them
        if pairs:
            stages = [([i, j], [i]) for i in rows for j in rows if ranks[i] < ranks[j]]
        else:
            for rank in sorted({ranks[row] for row in rows})[:-1]:
                left = [row for row in rows if ranks[row] >= rank]
                stages.append((left, [row for row in left if ranks[row] == rank]))
        for left, best in stages:
            entries += [(row, len(weights), (row in best) / len(best)) for row in left]
            weights.append(sizes[rows[0]])
    device = rank_B.device
    columns = list(zip(*entries, strict=True)) or [(), (), ()]
    return Stages(
        torch.tensor(columns[0], dtype=torch.long, device=device),
        torch.tensor(columns[1], dtype=torch.long, device=device),
        torch.tensor(columns[2], dtype=torch.float64, device=device),
        torch.tensor(weights, dtype=torch.float64, device=device),
    )


def choice_probabilities(score_B: Tensor, stages: Stages) -> Tensor:
    """P(j is best of those that are left) = exp(LOGIT s_j) / sum of exp(LOGIT s_i): p_M, one for each entry."""
    logit_M = LOGIT * score_B[stages.row_M]
    top_S = torch.full_like(stages.weight_S, -torch.inf, dtype=logit_M.dtype)
    top_S = top_S.scatter_reduce(0, stages.stage_M, logit_M, "amax")
    raised_M = (logit_M - top_S[stages.stage_M]).exp()
    return raised_M / torch.zeros_like(top_S).index_add(0, stages.stage_M, raised_M)[stages.stage_M]


def choice_log_likelihood(score_B: Tensor, stages: Stages) -> Tensor:
    """Log-probability of what was chosen, a scalar: ties have the mean of those that tie; differentiable in the scores.

    Args:
        score_B: float, s_i = z_i beta(x), in the unit of a value with an error of 1.
        stages: what was chosen.
    """
    log_M = choice_probabilities(score_B, stages).clamp(min=torch.finfo(score_B.dtype).tiny).log()
    return (stages.weight_S[stages.stage_M] * stages.share_M * log_M).sum()


@dataclass
class ChoiceFit:
    """The most probable coefficients given choices and ratings, and how uncertain they are (Laplace).

    Attributes:
        map_KF: the coefficients, float32.
        penalty: the ridge penalty that was used.
        noise: variance of a rating's error, 1: the unit of the scores.
        rows: responses that it was fitted on.
        basis_FR: float64, the directions of the context in which it was fitted.
        covariance_PP: float64, of the K R coefficients in these directions, those of a reward side by side.
    """

    map_KF: Tensor
    penalty: float
    noise: float
    rows: int
    basis_FR: Tensor
    covariance_PP: Tensor

    def covariance(self, x_BF: Tensor) -> Tensor:
        """Posterior covariance of the K coefficients at these features: (B, K, K)."""
        rewards, size = self.map_KF.shape[0], self.basis_FR.shape[1]
        inside_BR = x_BF.double() @ self.basis_FR
        blocks = self.covariance_PP.view(rewards, size, rewards, size)
        covariance_BKK = torch.einsum("br,krls,bs->bkl", inside_BR, blocks, inside_BR)
        outside_B = (x_BF.double().square().sum(1) - inside_BR.square().sum(1)).clamp(min=0.0) / self.penalty
        eye_KK = torch.eye(rewards, dtype=torch.float64, device=x_BF.device)
        return (covariance_BKK + outside_B.view(-1, 1, 1) * eye_KK).float()


def fit_choices(
    x_WF: Tensor,
    z_WK: Tensor,
    value_W: Tensor,
    rank_W: Tensor,
    group_W: Tensor,
    weight_W: Tensor,
    ridge: float | Literal["auto"],
    penalties: tuple[float, ...] = (),
    pairs: bool = False,
    prior_mean: float = 0.0,
) -> ChoiceFit:
    """Coefficients linear in the context from choices, and ratings of other groups.

    Minimises ridge |theta|^2 / 2 + sum over ratings of weight (value - s)^2 / 2 - log-likelihood of the choices, with
    s = sum_k (theta_k x + prior_mean) z_k, by Newton's method in the :data:`BASIS` leading eigenvectors of the contexts'
    kernel.

    Args:
        x_WF: features of the labelled responses.
        z_WK: their rewards, z-scored in the group, 0 where they do not apply.
        value_W: ratings, centred in the group, less the prior mean's share; read where ``rank_W`` is below 0.
        rank_W: ranks in a choice, see :func:`stages_of`; below 0: a rating.
        group_W: equal for the responses of one choice.
        weight_W: how much each counts.
        ridge: the penalty, or ``auto``: the most probable of ``penalties`` (Laplace).
        penalties: see ``ridge``.
        pairs: see :func:`stages_of`.
        prior_mean: of every coefficient; the map that is given back is without it.

    Raises:
        FloatingPointError: the contexts or rewards are not finite.
    """
    if not bool((x_WF.isfinite().all() & z_WK.isfinite().all()).item()):
        raise FloatingPointError("a feature")
    basis_FR = leading_directions(x_WF.double(), BASIS)
    design_WP = (z_WK.double().unsqueeze(2) * (x_WF.double() @ basis_FR).unsqueeze(1)).flatten(1)
    stages = stages_of(rank_W, group_W, weight_W, pairs)
    rated_W = (rank_W < 0).double() * weight_W.double()
    value_W = torch.where(rank_W < 0, value_W, torch.zeros_like(value_W)).double()
    chosen = [float(ridge)] if ridge != "auto" else list(penalties)
    offset_W = prior_mean * z_WK.double().sum(1)
    problem = Problem(design_WP, value_W, rated_W, offset_W, stages)
    fits = [_newton(problem, penalty) for penalty in chosen]
    best = max(range(len(fits)), key=lambda i: fits[i][2])
    theta_P, hessian_PP, _ = fits[best]
    map_KF = (theta_P.view(z_WK.shape[1], -1) @ basis_FR.T).float()
    covariance_PP = torch.cholesky_inverse(torch.linalg.cholesky(hessian_PP))
    return ChoiceFit(map_KF, chosen[best], 1.0, len(x_WF), basis_FR, covariance_PP)


def leading_directions(x_WF: Tensor, most: int) -> Tensor:
    """The leading right singular vectors of the features, those without any share left out: (F, R), R at most ``most``.

    Neighbours with the same features, as the responses of a group have, are taken once, with the root of their number.
    """
    x_NF, size_N = torch.unique_consecutive(x_WF, dim=0, return_counts=True)
    x_NF = x_NF * size_N.to(x_NF).sqrt().unsqueeze(1)
    wide = x_NF.shape[1] > len(x_NF)
    values_R, vectors_RR = torch.linalg.eigh(x_NF @ x_NF.T if wide else x_NF.T @ x_NF)
    large_R = values_R > 1e-10 * values_R[-1].clamp(min=1e-300)
    keep = large_R.nonzero().squeeze(1).flip(0)[:most]  # one look at the device
    leading_RR: Tensor = vectors_RR[:, keep]
    return (x_NF.T @ leading_RR) / values_R[keep].sqrt() if wide else leading_RR


@dataclass(frozen=True)
class Problem:
    """What coefficients theta_P are to explain, all in float64.

    Attributes:
        design_WP: s = design theta.
        value_W: of the ratings.
        rated_W: how much each counts; 0 for responses of choices.
        offset_W: what is added to the scores in choices.
        stages: the choices.
    """

    design_WP: Tensor
    value_W: Tensor
    rated_W: Tensor
    offset_W: Tensor
    stages: Stages

    def loss(self, theta_P: Tensor, penalty: float) -> Tensor:
        """The objective of :func:`fit_choices`."""
        score_W = self.design_WP @ theta_P
        ratings = 0.5 * (self.rated_W * (self.value_W - score_W).square()).sum()
        choices = choice_log_likelihood(score_W + self.offset_W, self.stages)
        total: Tensor = 0.5 * penalty * theta_P.square().sum() + ratings - choices
        return total

    def derivatives(self, theta_P: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """Gradient and Hessian of :meth:`loss`."""
        design_WP, stages = self.design_WP, self.stages
        score_W = design_WP @ theta_P
        p_M, weight_M = choice_probabilities(score_W + self.offset_W, stages), stages.weight_S[stages.stage_M]
        entry_MP = design_WP[stages.row_M]
        mean_SP = torch.zeros(len(stages), len(theta_P), dtype=torch.float64, device=theta_P.device)
        mean_SP = mean_SP.index_add(0, stages.stage_M, p_M.unsqueeze(1) * entry_MP)
        gradient_P = penalty * theta_P - design_WP.T @ (self.rated_W * (self.value_W - score_W))
        gradient_P = gradient_P - LOGIT * entry_MP.T @ (weight_M * (stages.share_M - p_M))
        choices_PP = (entry_MP * (weight_M * p_M).unsqueeze(1)).T @ entry_MP
        choices_PP = choices_PP - (mean_SP * stages.weight_S.unsqueeze(1)).T @ mean_SP
        ratings_PP = (design_WP * self.rated_W.unsqueeze(1)).T @ design_WP
        eye_PP = torch.eye(len(theta_P), dtype=torch.float64, device=theta_P.device)
        return gradient_P, penalty * eye_PP + ratings_PP + LOGIT**2 * choices_PP


def _newton(problem: Problem, penalty: float) -> tuple[Tensor, Tensor, float]:
    """The minimum of the convex objective, its Hessian there, and the log evidence."""
    theta_P = torch.zeros(problem.design_WP.shape[1], dtype=torch.float64, device=problem.design_WP.device)
    now = problem.loss(theta_P, penalty)
    for _ in range(ITERATIONS):
        gradient_P, hessian_PP = problem.derivatives(theta_P, penalty)
        step_P = torch.cholesky_solve(gradient_P.unsqueeze(1), torch.linalg.cholesky(hessian_PP)).squeeze(1)
        share, then = 1.0, problem.loss(theta_P - step_P, penalty)
        while then > now and share > 1e-6:
            share /= 2
            then = problem.loss(theta_P - share * step_P, penalty)
        if then > now:
            break
        theta_P, gained, now = theta_P - share * step_P, float(now - then), then
        if gained <= 1e-12 * (1.0 + abs(float(now))):
            break
    _, hessian_PP = problem.derivatives(theta_P, penalty)
    evidence = -now + 0.5 * len(theta_P) * math.log(penalty) - 0.5 * torch.logdet(hessian_PP)
    return theta_P, hessian_PP, float(evidence)
