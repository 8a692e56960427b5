"""What clicks teach while they are made: weights of every task with their uncertainty, and how predictable the clicks are."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maestro_pl.algorithm.simplex import best_correlating_weights
from maestro_pl.conductor.choices import LOGIT, ChoiceFit, fit_choices
from maestro_pl.conductor.closed_form import PENALTIES
from maestro_pl.conductor.ridge import SURE, RidgeLearner
from maestro_pl.conductor.statistics import RunningCorrelation
from maestro_pl.labelling.questions import Asked, Group
from maestro_pl.labelling.store import Click

DRAWS = 100  # of the coefficients, for the intervals
INTERVAL = (0.1, 0.9)
RECENT = 10  # clicks that must have moved no weight
STILL = 0.05  # by more than this
LEAST = 3  # questions that each task must have by then


@dataclass(frozen=True)
class Weight:
    """The weight of a reward on a task, the mean over the task's groups.

    Attributes:
        reward: its name.
        mean: under the most probable coefficients.
        low, high: ends of the 80 % interval of the posterior (Laplace).
    """

    reward: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Task:
    """Where a task stands.

    Attributes:
        name: of the task.
        questions: that there are, and
        answered: of them, at least one person's answer stands.
        telling: clicks that call one answer the best.
        weights: of its rewards; equal ones before the first such click.
        against: no reward goes along with the clicks, so that ``fit`` gives all of them weight 0.
    """

    name: str
    questions: int
    answered: int
    telling: int
    weights: list[Weight]
    against: bool


@dataclass(frozen=True)
class Progress:
    """Where labelling stands.

    Attributes:
        clicks: that stand.
        tasks: in the order of their names.
        predicted: clicks that were right before they were made, of
        tried: clicks on one best answer, and
        chance: how many a guess gets right on average.
        still: the last clicks hardly changed the weights.
    """

    clicks: int
    tasks: list[Task]
    predicted: int
    tried: int
    chance: float
    still: bool


@dataclass
class _Moment:
    """What was known up to a click, and the click itself."""

    number: int
    hit: bool | None  # None: nothing was called the best
    chance: float
    weights_TK: Tensor


@dataclass
class Teaching:
    """Fits choices as ``fit`` will, click by click.

    Args:
        groups: that were sampled, with their rewards and contexts.
        asked: the questions about them.
        rewards: K names.
        learner: whose options are taken: ``ridge``, ``prior_mean``, ``target: pairs``.
        constant: the constant feature of the contexts.
    """

    groups: Sequence[Group]
    asked: Sequence[Asked]
    rewards: Sequence[str]
    learner: RidgeLearner
    constant: float
    _moments: list[_Moment] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Gather what does not change."""
        self._by_key = {asked.question.key: asked for asked in self.asked}
        self.tasks = sorted({group.task for group in self.groups})
        correlation = RunningCorrelation(len(self.rewards))
        for batch in sorted({group.batch for group in self.groups}):
            some = [group for group in self.groups if group.batch == batch]
            correlation.observe(torch.cat([g.z_GK for g in some]).float(), torch.cat([g.mask_GK for g in some]))
        self._correlation_KK = correlation.matrix_KK
        self._x_NF = torch.stack([group.x_GF.float().mean(0) for group in self.groups])
        self._applies_NK = torch.stack([group.mask_GK.any(0) for group in self.groups])
        of_task = {task: [g.task == task for g in self.groups] for task in self.tasks}
        self._task_TN = torch.tensor([of_task[task] for task in self.tasks]).float()

    def progress(self, clicks: Sequence[Click]) -> Progress:
        """Where these clicks, the oldest first, have led; those on other questions are left out."""
        known = [click for click in clicks if click.question.key in self._by_key]
        with self._lock:
            same = 0
            for moment, click in zip(self._moments, known, strict=False):
                if moment.number != click.number:
                    break
                same += 1
            del self._moments[same:]
            fit = self.fit(known[:same])
            for place in range(same, len(known)):
                click = known[place]
                hit, chance = self._predicted(fit, click)
                fit = self.fit(known[: place + 1])
                self._moments.append(_Moment(click.number, hit, chance, self._weights(fit)[0]))
            moments = list(self._moments)
        return self._told(known, fit, moments)

    def fit(self, clicks: Sequence[Click]) -> ChoiceFit | None:
        """The most probable coefficients; None where no click calls an answer the best."""
        telling = [click for click in clicks if click.best is not None]
        if not telling:
            return None
        x, z, ranks, numbers = [], [], [], []
        for number, click in enumerate(telling):
            asked = self._by_key[click.question.key]
            group, rows = self.groups[asked.group], list(asked.rows)
            x.append(group.x_GF[rows].float())
            z.append(group.z_GK[rows].float())
            ranks += click.ranks
            numbers += [number] * len(rows)
        rank_W, learner = torch.tensor(ranks), self.learner
        fit = fit_choices(
            torch.cat(x),
            torch.cat(z),
            torch.zeros(len(ranks)),
            rank_W,
            torch.tensor(numbers),
            torch.ones(len(ranks)),
            learner.ridge,
            penalties=PENALTIES,
            pairs=learner.target == "pairs",
            prior_mean=learner.prior_mean,
        )
        fit.map_KF[:, -1] += learner.prior_mean / self.constant
        return fit

    def _predicted(self, fit: ChoiceFit | None, click: Click) -> tuple[bool | None, float]:
        """Whether the fit before a click says what it was, and how probable that is for a guess."""
        if click.best is None:
            return None, 0.0
        asked, chance = self._by_key[click.question.key], len(click.bests) / len(click.question.responses)
        if fit is None:
            return False, chance
        group, rows = self.groups[asked.group], list(asked.rows)
        score_G = LOGIT * ((group.x_GF[rows].float() @ fit.map_KF.T) * group.z_GK[rows].float()).sum(1)
        return int(score_G.argmax()) in click.bests, chance

    def _weights(self, fit: ChoiceFit | None, draws: int = 0) -> tuple[Tensor, Tensor]:
        """Weights of every task, the mean over its groups: (T, K), and of each draw of the coefficients: (S, T, K)."""
        rewards = len(self.rewards)
        none_NK = torch.zeros(len(self.groups), rewards)
        value_NK = none_NK if fit is None else self._x_NF @ fit.map_KF.T
        value_SNK = value_NK.expand(draws, -1, -1)
        if fit is not None and draws:
            value_SNK = value_SNK + self._drawn(fit, draws)
        weights_SNK = self._mapped(torch.cat([value_NK.unsqueeze(0), value_SNK]))
        share_TN = self._task_TN / self._task_TN.sum(1, keepdim=True)
        weights_STK = torch.einsum("tn,snk->stk", share_TN, weights_SNK)
        return weights_STK[0], weights_STK[1:]

    def _drawn(self, fit: ChoiceFit, draws: int) -> Tensor:
        """Deviations of the groups' coefficients from the most probable ones: (S, N, K)."""
        rewards, size = fit.map_KF.shape[0], fit.basis_FR.shape[1]
        generator = torch.Generator().manual_seed(0)
        eye_PP = torch.eye(len(fit.covariance_PP), dtype=torch.float64)
        root_PP = torch.linalg.cholesky(fit.covariance_PP + 1e-10 * eye_PP)
        drawn_SP = torch.randn(draws, len(root_PP), generator=generator, dtype=torch.float64) @ root_PP.T
        inside_NR = self._x_NF.double() @ fit.basis_FR
        drawn_SNK = torch.einsum("skr,nr->snk", drawn_SP.view(draws, rewards, size), inside_NR)
        # what of a context lies outside the directions that were fitted is known by the prior alone
        outside_N = (self._x_NF.double().square().sum(1) - inside_NR.square().sum(1)).clamp(min=0.0) / fit.penalty
        noise_SNK = torch.randn(drawn_SNK.shape, generator=generator, dtype=torch.float64)
        return (drawn_SNK + outside_N.sqrt().view(1, -1, 1) * noise_SNK).float()

    def _mapped(self, value_SNK: Tensor) -> Tensor:
        """From coefficients to weights, as the Conductor does (Eq. 13)."""
        mask_SNK = self._applies_NK.expand_as(value_SNK)
        covariance_SNK = torch.where(mask_SNK, value_SNK, torch.zeros_like(value_SNK)) @ self._correlation_KK
        rewards = value_SNK.shape[-1]
        flat = best_correlating_weights(
            covariance_SNK.reshape(-1, rewards), self._correlation_KK, mask_SNK.reshape(-1, rewards)
        )
        return flat.view(value_SNK.shape)

    def _against(self, fit: ChoiceFit | None, t: int) -> bool:
        """Whether each reward's covariance with the clicks lies a deviation below 0 on a task."""
        of_task_N = self._task_TN[t].bool()
        applies_K = self._applies_NK[of_task_N].any(0)
        if fit is None or not bool(applies_K.any()):
            return False
        x_1F = self._x_NF[of_task_N].mean(0, keepdim=True)
        only_KK = self._correlation_KK * applies_K
        mean_K = only_KK @ (x_1F @ fit.map_KF.T)[0]
        deviation_K = (only_KK @ fit.covariance(x_1F)[0] @ only_KK.T).diagonal().clamp(min=0.0).sqrt()
        return bool((mean_K + SURE * deviation_K < 0)[applies_K].all())

    def _told(self, clicks: Sequence[Click], fit: ChoiceFit | None, moments: Sequence[_Moment]) -> Progress:
        mean_TK, drawn_STK = self._weights(fit, DRAWS)
        low_TK, high_TK = (drawn_STK.quantile(share, dim=0) for share in INTERVAL)
        equal_TK = self._weights(None)[0]
        questions = Counter(asked.question.task for asked in self.asked)
        answered = Counter(key_task[1] for key_task in {(c.question.key, c.question.task) for c in clicks})
        telling = Counter(click.question.task for click in clicks if click.best is not None)
        tasks = []
        for t, name in enumerate(self.tasks):
            applies_K = self._applies_NK[self._task_TN[t].bool()].any(0).tolist()
            said = telling[name] > 0
            rows = zip(self.rewards, *(values[t].tolist() for values in (mean_TK if said else equal_TK, low_TK, high_TK)),
                       strict=True)  # fmt: skip
            weights = [
                Weight(reward, mean, min(low, mean), max(high, mean))
                for (reward, mean, low, high), applies in zip(rows, applies_K, strict=True)
                if applies
            ]
            tasks.append(Task(name, questions[name], answered[name], telling[name], weights, self._against(fit, t)))
        tried = [moment for moment in moments if moment.hit is not None]
        return Progress(
            len(clicks), tasks, sum(bool(m.hit) for m in tried), len(tried), sum(m.chance for m in tried),
            self._still(moments, tasks),
        )  # fmt: skip

    def _still(self, moments: Sequence[_Moment], tasks: Sequence[Task]) -> bool:
        covered = all(task.telling >= min(LEAST, task.questions) for task in tasks)
        if len(moments) <= 2 * RECENT or not covered:
            return False
        recent = torch.stack([moment.weights_TK for moment in moments[-RECENT - 1 :]])
        return float((recent - recent[-1]).abs().max()) <= STILL
