"""The Conductor in closed form: a linear contextual bandit, fitted by ridge regression on the labelled responses.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Mapping as Rows
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.conductor.buffer import Decisions, MetaBuffer
from maestro_pl.conductor.choices import ChoiceFit, fit_choices
from maestro_pl.conductor.closed_form import PENALTIES, Fit, fit_covariance, fit_varying
from maestro_pl.conductor.conductor import CONSTANT, Conductor, Mapping
from maestro_pl.conductor.learners import Learner, Step, check_knows_all
from maestro_pl.conductor.signals import MetaSignal
from maestro_pl.conductor.statistics import usable_states
from maestro_pl.errors import UserError, check_choice

Target: TypeAlias = Literal["regression", "covariance", "choice", "pairs"]
Exploration: TypeAlias = Literal["none", "thompson", "ucb"]
FIELDS = ("h_BD", "z_BK", "value_B", "credit_BK", "mask_BK", "group_B", "step_B", "rank_B", "task_B")
SURE = 1.0  # posterior deviations below 0 that every covariance must be for a task that no reward helps


@dataclass(frozen=True)
class Fitted:
    """What a fit knew.

    Attributes:
        noise: variance of what the coefficients leave unexplained of a value; of choices, of the error of a look.
        tasks: numbers of the tasks of which something was known (:func:`known_tasks`).
    """

    noise: float
    tasks: frozenset[int]


class RidgeLearner(Learner):
    """Fits the Conductor's linear layer by ridge regression on every labelled response of a window (Eq. 12 and 13).

    Two things can be regressed on the context x(h). ``regression``: the value of a response on its rewards, with
    coefficients that depend on the context, value_i = sum_k (theta_k x_i) z_ik + noise; the theta_k x are the weights
    themselves, and what rewards share is counted once. ``covariance``: the group's q_k on x, which is Eq. 10's anchor
    covariance; rewards that go along with each other are then all praised for the same thing. Two more take choices of
    anchors that compare responses, beside ratings of other groups: ``choice``, where P(j is best of S) is the softmax of the
    values over S, a ranking being such choices one after the other (Plackett-Luce), and ``pairs``, which takes each choice
    apart into pairs of a better and a worse response (Bradley-Terry). There the most probable coefficients are found by
    Newton's method in the leading directions of the context; with ratings alone they are those of ``regression``.

    Nothing is trained by gradient: ``model.meta.optimizer`` is not used, and the Conductor must be linear (no
    ``hidden_sizes``). It is solved for the responses or for the coefficients, whichever is cheaper
    (:mod:`maestro_pl.conductor.closed_form`).

    Args:
        target: what is regressed, see above.
        ridge: penalty, in units of the noise's variance over the prior variance of a coefficient; features have a mean
            square of 1 and values are z-scores. ``auto`` takes the most probable of 1, 3, 10, ..., 300 (marginal
            likelihood).
        forgetting: weight of a labelled response after each further policy step; 1 remembers all alike.
        window: responses that are remembered at most, the newest.
        mapping: from the fitted numbers to weights. ``correlation``: the weights of at least 0 whose weighed reward
            correlates best with the value, given how the rewards correlate with each other (Eq. 13). ``softmax``: as in
            Eq. 2.
        exploration: ``none``; ``thompson`` draws the coefficients from their posterior, once a batch; ``ucb`` adds
            ``exploration_coef`` posterior standard deviations. The labels say what every reward is worth, not only the
            emphasised one, so exploring is rarely needed.
        exploration_coef: see ``exploration``.
        prior_mean: what every coefficient is taken for where nothing was labelled, a value a standard deviation of the
            reward; above 0 the weights become equal ones as evidence vanishes. Not for ``covariance``.
        constant: the constant feature of the context: its square is how much of the prior variance all contexts share.
        trust_region: see :class:`Learner`.
        ema: see :class:`Learner`.

    Raises:
        UserError: a value outside its range.
    """

    trains_by_gradient = False

    def __init__(
        self,
        target: Target = "regression",
        ridge: float | Literal["auto"] = 30.0,
        forgetting: float = 1.0,
        window: int = 1024,
        mapping: Mapping = "correlation",
        exploration: Exploration = "none",
        exploration_coef: float = 1.0,
        trust_region: float | None = None,
        ema: float = 0.0,
        prior_mean: float = 0.0,
        constant: float = CONSTANT,
    ) -> None:
        super().__init__(1, 0, trust_region, ema)
        check_choice("RidgeLearner target", target, Target)
        check_choice("RidgeLearner exploration", exploration, Exploration)
        check_choice("RidgeLearner mapping", mapping, Mapping)
        if mapping == "correlation" and (trust_region is not None or ema):
            raise UserError(
                f"RidgeLearner mapping=correlation with trust_region={trust_region}, ema={ema}: these weights do not depend on "
                "the scale of the fit, so a shortened or averaged fit may give the same ones; give mapping: softmax, or leave "
                "both out."
            )
        if ridge != "auto" and not float(ridge) > 0:
            raise UserError(f"RidgeLearner ridge={ridge}: expected a penalty above 0, or `auto`.")
        if not 0 < forgetting <= 1 or window < 2 or not exploration_coef >= 0:
            raise UserError(
                f"RidgeLearner forgetting={forgetting}, window={window}, exploration_coef={exploration_coef}: expected a "
                "weight in (0, 1], at least 2 responses, and at least 0."
            )
        if not constant > 0 or not abs(prior_mean) < 10:
            raise UserError(
                f"RidgeLearner constant={constant}, prior_mean={prior_mean}: expected a constant above 0, and values of a "
                "standard deviation (0.1, say)."
            )
        if prior_mean and target == "covariance":
            raise UserError(
                f"RidgeLearner prior_mean={prior_mean} with target=covariance: the prior is one of coefficients; give target: "
                "regression or choice, or prior_mean: 0."
            )
        self.prior_mean, self.constant = prior_mean, constant
        self.target: Target = target
        self.ridge, self.forgetting, self.window = ridge, forgetting, window
        self.mapping, self.exploration_coef = mapping, exploration_coef
        self.exploration: Exploration = exploration
        self.remembered: dict[str, Tensor] = {}
        self.fitted: Fitted | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, compared when a run is resumed."""
        names = ["target", "ridge", "forgetting", "window", "mapping", "exploration", "exploration_coef"]
        names += ["prior_mean", "constant"]
        return {**super().settings, **{name: getattr(self, name) for name in names}}

    def attach(self, conductor: Conductor, signal: MetaSignal) -> None:
        """See :class:`Learner`; needs a linear Conductor and a signal that credits every reward."""
        super().attach(conductor, signal)
        check_knows_all(signal, "ridge")
        if self.target != "covariance" and not signal.gives_values:
            raise UserError(
                f"RidgeLearner target={self.target} explains what each response was worth, and {type(signal).__name__} says "
                "what each reward's emphasis was worth only: give target: covariance, or an AnchorSignal."
            )
        if conductor.hidden_sizes:
            raise UserError(
                f"model.meta.learner=ridge fits one linear layer, and model.weigher has hidden_sizes={conductor.hidden_sizes}: "
                "leave them out, or give learner: gradient."
            )
        conductor.be_fitted(self.mapping, covariances=self.target == "covariance", constant=self.constant)

    def state_dict(self) -> dict[str, Any]:
        """The remembered responses, and what the last fit knew."""
        fitted = None if self.fitted is None else [self.fitted.noise, sorted(self.fitted.tasks)]
        return {"remembered": {name: values.cpu() for name, values in self.remembered.items()}, "fitted": fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        remembered: dict[str, Tensor] = dict(state["remembered"])
        if remembered:
            remembered.setdefault("rank_B", torch.full_like(remembered["step_B"], -1))
            remembered.setdefault("task_B", torch.zeros_like(remembered["step_B"]))
            finite_B = usable_states(remembered["h_BD"]) & remembered["z_BK"].isfinite().all(1)
            finite_B &= ~remembered["value_B"].isinf() & ~remembered["credit_BK"].isinf().any(1)
            if not bool(finite_B.all()):
                rank_zero_warn(
                    f"{int((~finite_B).sum())} of the {len(finite_B)} responses that the checkpoint's RidgeLearner remembers "
                    "hold numbers that are not finite: they are forgotten."
                )
                remembered = {name: values[finite_B] for name, values in remembered.items()}
        self.remembered = remembered
        fitted = state.get("fitted")
        self.fitted = None if fitted is None else Fitted(float(fitted[0]), frozenset(map(int, fitted[1])))

    def resume(self, conductor: Conductor) -> None:
        """See :class:`Learner`; exploration goes on from the fit on what is remembered."""
        fit = self.fit(conductor) if self.exploration != "none" else None
        if fit is not None:
            self._explore(conductor, fit)

    def _fit(self, conductor: Conductor, signal: MetaSignal, buffer: MetaBuffer, step: Step, batch: int) -> Metrics:
        self.remember(buffer.joined(), batch)
        fit = self.fit(conductor)
        if fit is None:
            return {"labelled": 0.0, "skipped": 1.0}
        conductor.set_linear(fit.map_KF)
        groups_B = self.remembered["group_B"]
        # values are centred in their group, of which two ratings leave a half
        freedom = 1.0 if isinstance(fit, ChoiceFit) else 1 - len(set(groups_B.tolist())) / len(groups_B)
        self.fitted = Fitted(fit.noise / max(freedom, 0.5), known_tasks(self.remembered))
        self._explore(conductor, fit)
        self.unhelped = self._unhelped(conductor, fit)
        metrics: Metrics = {"labelled": float(fit.rows), "ridge": fit.penalty, "noise": fit.noise}
        if self.takes_choices:
            chosen_W = self.remembered["rank_B"] >= 0
            metrics["choices"] = float(len(set(self.remembered["group_B"][chosen_W].tolist())))
        return metrics

    @property
    def takes_choices(self) -> bool:  # type: ignore[override]
        """See :class:`Learner`."""
        return self.target in ("choice", "pairs")

    def remember(self, decisions: Decisions, step: int) -> None:
        """Keep the responses of which something is known."""
        old = {name: values.cpu() for name, values in self.remembered.items()}
        next_group = int(old["group_B"].max()) + 1 if len(old.get("group_B", ())) else 0
        new = self._rows(decisions, step)
        new["group_B"] = new["group_B"] + next_group
        parts = [old, new] if old else [new]
        rows = {name: torch.cat([part[name] for part in parts]) for name in FIELDS}
        groups_W, cut = rows["group_B"], max(len(rows["step_B"]) - self.window, 0)
        rows = {name: values[cut:] for name, values in rows.items()}
        if (
            cut and int(rows["rank_B"][0]) >= 0 and groups_W[cut - 1] == groups_W[cut]
        ):  # half of a choice is another one
            whole_B = rows["group_B"] != rows["group_B"][0]
            rows = {name: values[whole_B] for name, values in rows.items()}
            if not bool(whole_B.any()):
                shown = int((groups_W == groups_W[cut]).sum())
                raise UserError(
                    f"RidgeLearner window={self.window} is too small for a choice among {shown} responses: give at least "
                    f"{shown}, and many times as much for it to learn from many choices."
                )
        self.remembered = rows

    def _rows(self, decisions: Decisions, step: int) -> dict[str, Tensor]:
        """What is known of a batch, on the CPU: its rated responses, and those of each choice once for each."""
        decisions = decisions.cpu()  # as a whole: each choice of rows on the device would make the host wait
        rated_B = ~decisions.credit_BK.isnan().all(1) if self.target == "covariance" else ~decisions.value_B.isnan()
        columns = decisions.rank_BJ.shape[1]
        kept: list[tuple[Decisions, Tensor | None, int]] = [(decisions.rows(rated_B & decisions.finite_B), None, 0)]
        for j in range(columns):
            shown = decisions.rows((decisions.rank_BJ[:, j] >= 0) & decisions.finite_B)
            kept.append((shown, shown.rank_BJ[:, j], j + 1))
        parts = []
        for some, rank_B, place in kept:
            part = {name: getattr(some, name) for name in FIELDS if name not in ("step_B", "rank_B")}
            part["group_B"] = part["group_B"] * (columns + 1) + place
            part["step_B"] = torch.full((len(some),), step)
            part["rank_B"] = torch.full((len(some),), -1) if rank_B is None else rank_B
            if rank_B is not None:
                part["value_B"] = torch.full_like(part["value_B"], torch.nan)
            elif self.target != "covariance":
                part["z_BK"] = _centred_over_rated(part, decisions, columns)
            parts.append(part)
        return {name: torch.cat([part[name] for part in parts]) for name in FIELDS}

    def nearest(self, conductor: Conductor, h_BD: Tensor) -> Tensor | None:
        """See :class:`Learner`; of the contexts that are remembered."""
        if not len(self.remembered.get("step_B", ())):
            return None
        with torch.no_grad():
            known_WD = conductor.inputs(self.remembered["h_BD"].to(h_BD.device))
            own_BD = torch.nn.functional.normalize(conductor.inputs(h_BD), dim=-1)
            cosine_BW = own_BD @ torch.nn.functional.normalize(known_WD, dim=-1).T
        return cosine_BW.amax(1)

    @torch.no_grad()
    def _unhelped(self, conductor: Conductor, fit: Fit | ChoiceFit) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """Tasks on which no reward goes along with the anchor: covariances, their deviations, and which rewards apply."""
        rows = {name: values.to(conductor.log_tau.device) for name, values in self.remembered.items()}
        correlation_KK = torch.eye(fit.map_KF.shape[0], device=conductor.log_tau.device)
        if conductor.correlation is not None and self.target != "covariance":
            correlation_KK = conductor.correlation.matrix_KK
        found = {}
        for task in sorted(known_tasks(self.remembered)):
            of_task_B = rows["task_B"] == task
            applies_K = rows["mask_BK"][of_task_B].any(0)
            x_1F = conductor.features(rows["h_BD"][of_task_B]).mean(0, keepdim=True)
            only_KK = correlation_KK * applies_K  # of a coefficient of a reward that never applies nothing is known
            mean_K = only_KK @ (x_1F @ fit.map_KF.T)[0]
            variance_K = (only_KK @ fit.covariance(x_1F)[0] @ only_KK.T).diagonal().clamp(min=0.0)
            deviation_K = variance_K.sqrt()
            if bool(applies_K.any()) and bool((mean_K + SURE * deviation_K < 0)[applies_K].all()):
                found[task] = (mean_K.cpu(), deviation_K.cpu(), applies_K.cpu())
        return found

    def fit(self, conductor: Conductor) -> Fit | ChoiceFit | None:
        """The map from features to coefficients, from what is remembered; None where nothing is, or it has no finite fit."""
        try:
            fit = self._fit_remembered(conductor)
            if fit is not None and not bool(fit.map_KF.isfinite().all()):
                raise FloatingPointError("the fitted map")
            return fit
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"RidgeLearner left the Conductor as it is: with ridge={self.ridge} the equations of what it remembers have no "
                "solution in floating point. Give a larger ridge, such as 1, or auto."
            )
            return None
        except FloatingPointError as error:
            rank_zero_warn(
                f"RidgeLearner left the Conductor as it is: {error} of the {len(self.remembered['step_B'])} remembered "
                "responses is not finite. If this repeats, start from an earlier checkpoint with a lower learning rate, or "
                "give the Conductor norm: rms or center."
            )
            return None

    def _fit_remembered(self, conductor: Conductor) -> Fit | ChoiceFit | None:
        device = conductor.log_tau.device
        rows = {name: values.to(device) for name, values in self.remembered.items()}
        if not rows or not len(rows["step_B"]):
            return None
        with torch.no_grad():
            x_BF = conductor.features(rows["h_BD"])
        age_B = (rows["step_B"].max() - rows["step_B"]).float()
        weight_B = self.forgetting**age_B
        if self.target != "covariance":
            z_BK, rank_B = rows["z_BK"].float(), rows["rank_B"]
            # around the prior mean: its share of a value is taken off, and the coefficients get it back
            value_B = rows["value_B"] - self.prior_mean * z_BK.sum(1)
            fit: Fit | ChoiceFit
            if bool((rank_B >= 0).any()):
                fit = fit_choices(
                    x_BF,
                    z_BK,
                    value_B,
                    rank_B,
                    rows["group_B"],
                    weight_B,
                    self.ridge,
                    penalties=PENALTIES,
                    pairs=self.target == "pairs",
                    prior_mean=self.prior_mean,
                )
            else:
                fit = fit_varying(x_BF, z_BK, value_B, weight_B, self.ridge)
            fit.map_KF[:, -1] += self.prior_mean / self.constant
            return fit
        groups, index = torch.unique(rows["group_B"], return_inverse=True)
        size_N = torch.zeros(len(groups), device=device).index_add_(0, index, torch.ones_like(weight_B))

        def mean(values: Tensor) -> Tensor:
            total = torch.zeros(len(groups), *values.shape[1:], device=device).index_add_(0, index, values.float())
            return total / size_N.view(-1, *[1] * (values.dim() - 1))

        known_BK = ~rows["credit_BK"].isnan()
        q_NK = mean(rows["credit_BK"].nan_to_num(0.0)) / mean(known_BK.float()).clamp(min=1e-6)
        return fit_covariance(mean(x_BF), q_NK, mean(weight_B), self.ridge, mean(known_BK.float()) > 0)

    def _explore(self, conductor: Conductor, fit: Fit | ChoiceFit) -> None:
        if self.exploration == "none":
            conductor.explore = None
            return
        thompson, coef = self.exploration == "thompson", self.exploration_coef

        def explored(x_BF: Tensor, value_BK: Tensor) -> Tensor:
            sd_BK = posterior_sd(fit, x_BF)
            if not thompson:
                return value_BK + coef * sd_BK
            draw_K = torch.randn(value_BK.shape[1], device=x_BF.device)  # one draw a batch: one ruler for every group
            return value_BK + coef * sd_BK * draw_K

        conductor.explore = explored


def known_tasks(remembered: Rows[str, Tensor]) -> frozenset[int]:
    """Numbers of the tasks that have a rating, or a choice that tells its responses apart: not all as good or as bad."""
    rank_W, group_W = remembered["rank_B"], remembered["group_B"]
    index_W = torch.unique(group_W, return_inverse=True)[1]
    highest_N = torch.zeros(int(index_W.max()) + 1, dtype=rank_W.dtype).scatter_reduce(
        0, index_W, rank_W, "amax", include_self=False
    )
    lowest_N = torch.zeros_like(highest_N).scatter_reduce(0, index_W, rank_W, "amin", include_self=False)
    telling_W = (rank_W < 0) | (highest_N > lowest_N)[index_W]
    return frozenset(remembered["task_B"][telling_W].tolist())


def posterior_sd(fit: Fit | ChoiceFit, x_BF: Tensor) -> Tensor:
    """Posterior standard deviation of each coefficient at these features: sd_BK."""
    return fit.covariance(x_BF).diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()


def _centred_over_rated(part: dict[str, Tensor], decisions: Decisions, columns: int) -> Tensor:
    """The rewards of rated responses, less their mean over those of the group that are rated, where some are not."""
    z_BK, group_B = part["z_BK"], part["group_B"]
    whole = torch.bincount(decisions.group_B * (columns + 1), minlength=1)
    size_B = torch.bincount(group_B, minlength=len(whole))[group_B] if len(group_B) else group_B
    partial_B = size_B < whole[group_B] if len(group_B) else torch.zeros(0, dtype=torch.bool)
    for group in sorted(set(group_B[partial_B].tolist())):
        rows_B = group_B == group
        mask_BK = part["mask_BK"][rows_B]
        mean_K = z_BK[rows_B].sum(0) / mask_BK.sum(0).clamp(min=1)
        z_BK[rows_B] = torch.where(mask_BK, z_BK[rows_B] - mean_K, torch.zeros_like(mean_K))
    return z_BK
