"""Ridge regression with coefficients linear in a context, solved in whichever form is cheapest; all are the same fit.

Pure functions. Equation numbers are those of docs/algorithm.md.

The responses of a group share a context where the Conductor reads the prompt (``context: prompt``), so what is known of a
context n is said by S_n = sum_s z_s z_s' and b_n = sum_s z_s value_s, whatever the number of its responses. The *primal*
form solves for the K F coefficients; the *kernel* form for the responses, or for at most K rows a context that have the
same S_n and b_n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

Form: TypeAlias = Literal["primal", "kernel"]
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # what `ridge: auto` chooses among
AT_ONCE = 4096  # columns of a triangular solve


class Posterior(Protocol):
    """What the uncertainty of a fit needs."""

    def variance(self, x_BF: Tensor) -> Tensor:
        """Posterior covariance of the K coefficients at these features, in units of the noise's variance: (B, K, K)."""


@dataclass
class Fit:
    """A fitted linear map from features to K numbers.

    Attributes:
        map_KF: the coefficients, float32.
        penalty: the ridge penalty that was used.
        noise: variance of the residual.
        rows: responses (or groups) that it was fitted on.
        form: in which it was solved.
        posterior: its uncertainty.
    """

    map_KF: Tensor
    penalty: float
    noise: float
    rows: int
    form: Form
    posterior: Posterior

    def covariance(self, x_BF: Tensor) -> Tensor:
        """Posterior covariance of the K coefficients at these features: (B, K, K)."""
        return self.posterior.variance(x_BF).float() * self.noise


@dataclass
class Labelled:
    """The labelled responses by their contexts, weights applied; float64.

    Attributes:
        x_NF: features of the N contexts.
        factors_WK, target_WM: of the W responses, times the square root of their weight.
        context_W: the context of each.
        energy_M: squares of what the rows leave out of the targets; no fit explains them.
        count: responses that the W rows stand for.
        weight: the sum of their weights.
    """

    x_NF: Tensor
    factors_WK: Tensor
    target_WM: Tensor
    context_W: Tensor
    energy_M: Tensor
    count: int
    weight: float

    @classmethod
    def of(cls, x_WF: Tensor, factors_WK: Tensor, target_WM: Tensor, weight_W: Tensor) -> Labelled:
        """Neighbours with the same features share a context.

        Raises:
            FloatingPointError: features, rewards or targets are not finite, or their products beyond float32.
        """
        for name, values in (("features", x_WF), ("rewards", factors_WK), ("targets", target_WM)):
            if not bool(values.isfinite().all()):
                raise FloatingPointError(f"one of the {name}")
        square_W = x_WF.double().square().sum(1) * factors_WK.double().square().sum(1)
        if not bool((square_W <= torch.finfo(torch.float32).max).all()):
            raise FloatingPointError("the kernel")
        root_W1 = weight_W.double().sqrt().unsqueeze(1)
        x_NF, context_W = torch.unique_consecutive(x_WF, dim=0, return_inverse=True)
        factors_WK, target_WM = factors_WK.double() * root_W1, target_WM.double() * root_W1
        energy_M = torch.zeros_like(target_WM[0])
        return cls(x_NF.double(), factors_WK, target_WM, context_W, energy_M, len(x_WF), float(weight_W.double().sum()))

    def shortened(self) -> Labelled:
        """At most K rows a context with the same S_n and b_n, by a QR decomposition; itself where that saves nothing."""
        contexts, rewards = len(self.x_NF), self.factors_WK.shape[1]
        if contexts * rewards >= len(self.factors_WK):
            return self
        size_N = torch.bincount(self.context_W, minlength=contexts)
        place_W = torch.arange(len(self.context_W), device=size_N.device) - (size_N.cumsum(0) - size_N)[self.context_W]
        both_WC = torch.cat([self.factors_WK, self.target_WM], 1)
        padded_NGC = both_WC.new_zeros(contexts, max(int(size_N.max()), rewards), both_WC.shape[1])
        padded_NGC[self.context_W, place_W] = both_WC
        q_NGK, r_NKK = torch.linalg.qr(padded_NGC[:, :, :rewards])
        target_NKM = q_NGK.mT @ padded_NGC[:, :, rewards:]
        context_W = torch.arange(contexts, device=size_N.device).repeat_interleave(rewards)
        left_M = (self.target_WM.square().sum(0) - target_NKM.square().sum((0, 1))).clamp(min=0.0)
        return replace(
            self,
            factors_WK=r_NKK.flatten(0, 1),
            target_WM=target_NKM.flatten(0, 1),
            context_W=context_W,
            energy_M=self.energy_M + left_M,
        )

    def kernel(self) -> Tensor:
        """(x_s x_t)(z_s z_t) of two rows: (W, W)."""
        kernel_WW = self.x_NF @ self.x_NF.T
        if len(self.x_NF) < len(self.context_W):
            kernel_WW = kernel_WW[self.context_W[:, None], self.context_W]
        return kernel_WW.mul_(self.factors_WK @ self.factors_WK.T)

    def gram(self) -> tuple[Tensor, Tensor]:
        """Design' design (K F, K F) and design' target (K F, M), the coefficients of a reward side by side."""
        contexts, width = self.x_NF.shape
        rewards, targets = self.factors_WK.shape[1], self.target_WM.shape[1]
        scatter_NKK = self.x_NF.new_zeros(contexts, rewards, rewards)
        scatter_NKK.index_add_(0, self.context_W, self.factors_WK.unsqueeze(2) * self.factors_WK.unsqueeze(1))
        toward_NKM = self.x_NF.new_zeros(contexts, rewards, targets)
        toward_NKM.index_add_(0, self.context_W, self.factors_WK.unsqueeze(2) * self.target_WM.unsqueeze(1))
        gram_KFKF = self.x_NF.new_empty(rewards, width, rewards, width)
        for k in range(rewards):
            for other in range(k, rewards):
                block_FF = (self.x_NF * scatter_NKK[:, k, other, None]).T @ self.x_NF
                gram_KFKF[k, :, other] = block_FF
                gram_KFKF[other, :, k] = block_FF  # symmetric: x x' is
        toward_KFM = torch.einsum("nf,nkm->kfm", self.x_NF, toward_NKM)
        return gram_KFKF.view(rewards * width, rewards * width), toward_KFM.flatten(0, 1)


def cheaper_form(labelled: Labelled) -> Form:
    """Which form takes fewer multiplications."""
    (contexts, width), (rows, rewards) = labelled.x_NF.shape, labelled.factors_WK.shape
    coefficients = rewards * width
    primal = rewards * (rewards + 1) / 2 * contexts * width**2 + coefficients**3 / 3
    kernel = contexts**2 * width + rows**2 * rewards + rows**3 / 3
    return "primal" if primal < kernel else "kernel"


def solve(
    labelled: Labelled, ridge: float | Literal["auto"], form: Form | None = None
) -> tuple[Tensor, float, Tensor, Form, Posterior]:
    """Minimises sum_s |target_sm - sum_k (theta_mk x_s) factor_sk|^2 + ridge |theta_m|^2 for every target m.

    Args:
        labelled: the responses.
        ridge: the penalty, or ``auto``: the most probable of :data:`PENALTIES`.
        form: None takes the cheaper one.

    Returns:
        The coefficients (M, K, F), the penalty, the squared residual (M), the form, and the posterior.
    """
    short = labelled.shortened()
    form = form or cheaper_form(short)
    rewards, targets = short.factors_WK.shape[1], short.target_WM.shape[1]
    matrix = short.kernel() if form == "kernel" else None
    toward = short.target_WM
    if matrix is None:
        matrix, toward = short.gram()
    penalty = float(ridge) if ridge != "auto" else _most_probable(short, form, matrix, toward)
    matrix.diagonal().add_(penalty)
    root = torch.linalg.cholesky(matrix)
    del matrix  # as large as the factor: hundreds of MiB at thousands of responses
    solution = torch.cholesky_solve(toward, root)
    posterior: Posterior
    if form == "kernel":
        weighed_NMK = short.x_NF.new_zeros(len(short.x_NF), targets, rewards)
        weighed_NMK.index_add_(0, short.context_W, solution.unsqueeze(2) * short.factors_WK.unsqueeze(1))
        map_MKF = torch.einsum("nmk,nf->mkf", weighed_NMK, short.x_NF)
        squares_M = (penalty * solution).square().sum(0) + short.energy_M  # the equations' own residual
        posterior = KernelPosterior(short.x_NF, short.context_W, short.factors_WK, root, penalty)
    else:
        map_MKF = solution.T.reshape(targets, rewards, -1)
        fitted_NMK = torch.einsum("nf,mkf->nmk", short.x_NF, map_MKF)
        fitted_WM = torch.einsum("wmk,wk->wm", fitted_NMK[short.context_W], short.factors_WK)
        squares_M = (short.target_WM - fitted_WM).square().sum(0) + short.energy_M
        posterior = PrimalPosterior(root, rewards)
    return map_MKF, penalty, squares_M, form, posterior


@dataclass
class KernelPosterior:
    """C' (kernel + penalty)^-1 C is what the labels explain, C_wk the kernel between x with reward k alone and row w.

    Attributes:
        x_NF, context_W, factors_WK: see :class:`Labelled`.
        root_WW: lower Cholesky factor of kernel + penalty.
        penalty: of the fit.
    """

    x_NF: Tensor
    context_W: Tensor
    factors_WK: Tensor
    root_WW: Tensor
    penalty: float

    def variance(self, x_BF: Tensor) -> Tensor:
        """See :class:`Posterior`."""
        rewards = self.factors_WK.shape[1]
        eye_KK = torch.eye(rewards, dtype=self.x_NF.dtype, device=x_BF.device)
        parts = []
        for some_BF in torch.split(x_BF.to(self.x_NF), max(AT_ONCE // rewards, 1)):
            cross_BW = (some_BF @ self.x_NF.T)[:, self.context_W]
            cross_WC = (cross_BW.T.unsqueeze(2) * self.factors_WK.unsqueeze(1)).flatten(1)
            half_WBK = torch.linalg.solve_triangular(self.root_WW, cross_WC, upper=False).view(
                -1, len(some_BF), rewards
            )
            explained_BKK = torch.einsum("wbk,wbl->bkl", half_WBK, half_WBK)
            parts.append((some_BF.square().sum(1).view(-1, 1, 1) * eye_KK - explained_BKK) / self.penalty)
        return torch.cat(parts)


@dataclass
class PrimalPosterior:
    """(design' design + penalty)^-1 itself.

    Attributes:
        root_PP: lower Cholesky factor of design' design + penalty, P = K F.
        rewards: K.
    """

    root_PP: Tensor
    rewards: int

    def variance(self, x_BF: Tensor) -> Tensor:
        """See :class:`Posterior`."""
        count, width = self.rewards, x_BF.shape[1]
        parts = []
        for some_BF in torch.split(x_BF.to(self.root_PP), max(AT_ONCE // count, 1)):
            alone_KFBK = some_BF.new_zeros(count, width, len(some_BF), count)
            for k in range(count):
                alone_KFBK[k, :, :, k] = some_BF.T
            alone_PC = alone_KFBK.view(count * width, -1)
            half_PBK = torch.linalg.solve_triangular(self.root_PP, alone_PC, upper=False).view(-1, len(some_BF), count)
            parts.append(torch.einsum("pbk,pbl->bkl", half_PBK, half_PBK))
        return torch.cat(parts)


@dataclass
class _EachItsOwn:
    """Of M independent targets with one coefficient each: the same variance for all."""

    posterior: Posterior
    targets: int

    def variance(self, x_BF: Tensor) -> Tensor:
        """See :class:`Posterior`."""
        of_one_B11 = self.posterior.variance(x_BF)
        return of_one_B11 * torch.eye(self.targets, dtype=of_one_B11.dtype, device=of_one_B11.device)


@dataclass
class _OfGroupsOfItsOwn:
    """Of rewards that were fitted on different groups.

    Attributes:
        posteriors: one for each reward; None: the prior's.
        noise_K: the noise of each fit, as a share of the noise of all.
        penalty: of the prior.
    """

    posteriors: Sequence[Posterior | None]
    noise_K: Sequence[float]
    penalty: float

    def variance(self, x_BF: Tensor) -> Tensor:
        """See :class:`Posterior`."""
        prior_B = x_BF.double().square().sum(1) / self.penalty
        alone = [prior_B if each is None else each.variance(x_BF)[:, 0, 0] for each in self.posteriors]
        return torch.diag_embed(torch.stack([part * k for part, k in zip(alone, self.noise_K, strict=True)], 1))


def fit_varying(
    x_WF: Tensor,
    z_WK: Tensor,
    value_W: Tensor,
    weight_W: Tensor,
    ridge: float | Literal["auto"],
    form: Form | None = None,
) -> Fit:
    """Ridge regression of values on rewards with coefficients linear in the context (Eq. 12).

    Minimises sum_s weight_s (value_s - sum_k (theta_k x_s) z_sk)^2 + ridge |theta|^2.

    Args:
        x_WF: features of the labelled responses.
        z_WK: their rewards, z-scored in the group, 0 where they do not apply.
        value_W: their values, z-scored in the group.
        weight_W: how much each counts.
        ridge: the penalty, or ``auto``.
        form: in which it is solved; None: the cheaper one.

    Raises:
        FloatingPointError: features, rewards or values are not finite, or too large.
    """
    labelled = Labelled.of(x_WF, z_WK, value_W.unsqueeze(1), weight_W)
    map_1KF, penalty, squares_1, form, posterior = solve(labelled, ridge, form)
    noise = float(squares_1) / max(labelled.weight, 1.0)
    return Fit(map_1KF[0].float(), penalty, noise, len(x_WF), form, posterior)


def fit_covariance(
    x_NF: Tensor, q_NK: Tensor, weight_N: Tensor, ridge: float | Literal["auto"], known_NK: Tensor | None = None
) -> Fit:
    """Ridge regression of the groups' covariances q on their mean features, one map for each reward.

    Minimises sum_n weight_n |q_n - theta x_n|^2 + (ridge / 10) |theta|^2: a group's q is a mean over its responses, so
    its noise has a variance about ten times smaller than that of a response's value. ``known_NK`` says which q are
    known; a reward that does not apply to a group's task is fitted on the other groups.

    Raises:
        FloatingPointError: features or covariances are not finite.
    """
    if known_NK is not None and not bool(known_NK.all()):
        own = [
            fit_covariance(x_NF[known_N], q_NK[known_N, k : k + 1], weight_N[known_N], ridge)
            if bool(known_N.any())
            else None
            for k, known_N in enumerate(known_NK.unbind(1))
        ]
        return _together(own, x_NF)
    one_N1 = torch.ones(len(x_NF), 1, device=x_NF.device)
    labelled = Labelled.of(x_NF, one_N1, q_NK, weight_N)
    map_K1F, penalty, squares_K, form, posterior = solve(labelled, ridge if ridge == "auto" else float(ridge) / 10)
    noise = float(squares_K.mean()) / len(x_NF)
    return Fit(map_K1F[:, 0].float(), penalty, noise, len(x_NF), form, _EachItsOwn(posterior, q_NK.shape[1]))


def _together(own: Sequence[Fit | None], x_NF: Tensor) -> Fit:
    """One fit of rewards that were fitted each on groups of its own; None: on none, and the prior is all that is known."""
    fits = [fit for fit in own if fit is not None]
    if not fits:
        raise FloatingPointError("every credit")
    rows = sum(fit.rows for fit in fits)
    noise = sum(fit.rows * fit.noise for fit in fits) / rows
    most = max(fits, key=lambda fit: fit.rows)
    map_KF = torch.cat([torch.zeros_like(most.map_KF) if fit is None else fit.map_KF for fit in own])
    share_K = [1.0 if fit is None else fit.noise / max(noise, 1e-30) for fit in own]
    posterior = _OfGroupsOfItsOwn([None if fit is None else fit.posterior for fit in own], share_K, most.penalty)
    return Fit(map_KF, most.penalty, noise, len(x_NF), most.form, posterior)


def choose_penalty(kernel_WW: Tensor, target_WM: Tensor) -> float:
    """The penalty of :data:`PENALTIES` under which the targets are most probable, the prior's variance profiled out."""
    values_W, vectors_WW = torch.linalg.eigh(kernel_WW.double())
    power_WM = (vectors_WW.T @ target_WM.double()).square()
    return _best_penalty(values_W, power_WM, len(values_W), torch.zeros_like(power_WM[0]))


def _most_probable(labelled: Labelled, form: Form, matrix: Tensor, toward: Tensor) -> float:
    """:func:`choose_penalty` from the eigenvalues of either form's matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    power = (vectors.T @ toward).square()
    energy_M = labelled.energy_M
    if form == "primal":
        kept = values > 1e-10 * values[-1].clamp(min=1e-300)
        values, power = values[kept], power[kept] / values[kept].unsqueeze(1)
        energy_M = energy_M + (labelled.target_WM.square().sum(0) - power.sum(0)).clamp(min=0.0)
    return _best_penalty(values, power, labelled.count, energy_M)


def _best_penalty(values_R: Tensor, power_RM: Tensor, count: int, energy_M: Tensor) -> float:
    """Of ``count`` directions, those beside the R given ones have the eigenvalue 0 and the power ``energy_M`` together."""
    values_R = values_R.clamp(min=0.0)

    def evidence(penalty: float) -> float:
        spread_R = values_R + penalty
        silent = count - len(values_R)
        total_M = (power_RM / spread_R.unsqueeze(1)).sum(0) + energy_M / penalty
        variance_M = (total_M / count).clamp(min=1e-12)
        log_spread = float(spread_R.log().sum()) + silent * float(torch.tensor(penalty).log())
        return -0.5 * (count * float(variance_M.log().sum()) + len(variance_M) * log_spread)

    return max(PENALTIES, key=evidence)
