"""Weighers with one vector of weights for all responses that moves as training goes on: by a plan, or by the rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.algorithm.simplex import on_simplex
from maestro_pl.conductor.credits import zscores
from maestro_pl.conductor.weighers import Scored, Seen, Weigher, Weighing
from maestro_pl.errors import UserError, check_choice
from maestro_pl.run.ranks import gathered

Shape: TypeAlias = Literal["linear", "cosine"]
Statistic: TypeAlias = Literal["covariance", "correlation"]
TINY = 1e-8


class SharedWeights(Weigher):
    """Base of the weighers that give every response the same weights w_K, rescaled over the rewards that apply to it.

    The weights are a buffer, so they are saved and come back with the run.

    Args:
        weights: reward name to the weight at the start, each above 0; null: equal ones. They need not add up to 1.

    Raises:
        UserError: a weight that is not finite and above 0.
    """

    weights_K: Tensor

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        if weights is not None and not (weights and all(0 < value < math.inf for value in weights.values())):
            raise UserError(
                f"{type(self).__name__} weights={weights}: expected a finite weight above 0 for each reward."
            )
        self.start = weights

    @property
    def settings(self) -> dict[str, Any]:
        """The weights at the start."""
        return {"weights": self.start}

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """See :class:`Weigher`; every weighed reward must have a weight, where weights are given."""
        super().build(hidden_size, reward_names)
        given_K = self.by_name("weights", dict.fromkeys(reward_names, 1.0) if self.start is None else self.start)
        self.register_buffer("weights_K", given_K / given_K.sum())

    def by_name(self, argument: str, given: float | Mapping[str, float]) -> Tensor:
        """A number for each reward, from one for all or from those by name: float32 values_K.

        Raises:
            UserError: the names are not those of the weighed rewards.
        """
        if not isinstance(given, Mapping):
            return torch.full((len(self.reward_names),), float(given))
        if set(given) != set(self.reward_names):
            raise UserError(
                f"{type(self).__name__} {argument} names {sorted(given)}, and the rewards with role 'train' are "
                f"{sorted(self.reward_names)}: give exactly these."
            )
        return torch.tensor([float(given[name]) for name in self.reward_names])

    def multiply(self, log_factor_K: Tensor) -> None:
        """w_k <- w_k exp(log_factor_k), rescaled to 1; never wholly 0, which nothing could raise again."""
        log_K = self.weights_K.cpu().clamp(min=torch.finfo(self.weights_K.dtype).tiny).log()
        self.weights_K.copy_((log_K + log_factor_K).softmax(0))

    def forward(self, h_BD: Tensor | None, rewards_BK: Tensor, mask_BK: Tensor, sample: bool) -> Weighing:
        """See :class:`Weigher`."""
        row_K = self.weights_K.to(rewards_BK.device, rewards_BK.dtype)
        weights_BK = on_simplex(row_K.expand_as(rewards_BK), mask_BK)
        return Weighing(weights_BK, weights_BK)


class ScheduledWeights(SharedWeights):
    """Weights that follow a plan over the policy's steps.

    Between two points w_k(t) = a + (b - a) s(u), u in [0, 1] the way from one to the next: s(u) = u (``linear``) or
    (1 - cos(pi u)) / 2 (``cosine``). Before the first point and after the last one weights stay as they are there.

    Args:
        points: policy step to the weights from there on, reward name to a number of at least 0. They need not add up
            to 1; what is between is interpolated after each point was rescaled to add up to 1.
        shape: ``linear`` or ``cosine``.

    Raises:
        UserError: no points, a negative step, a weight that is not finite or below 0, or a point without any weight.
    """

    def __init__(self, points: dict[int, dict[str, float]], shape: Shape = "linear") -> None:
        super().__init__()
        check_choice("ScheduledWeights shape", shape, Shape)
        if not points or any(step < 0 for step in points):
            raise UserError(
                f"ScheduledWeights points has the steps {list(points)}: give at least one, each of at least 0."
            )
        for step, weights in points.items():
            if not all(0 <= value < math.inf for value in weights.values()) or not sum(weights.values()) > 0:
                raise UserError(
                    f"ScheduledWeights points[{step}]={weights}: give each reward a finite weight >= 0, not all zero."
                )
        self.points = {step: dict(points[step]) for step in sorted(points)}
        self.shape: Shape = shape

    @property
    def settings(self) -> dict[str, Any]:
        """The plan."""
        return {"points": {str(step): weights for step, weights in self.points.items()}, "shape": self.shape}

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """See :class:`SharedWeights`; every point names every reward."""
        super().build(hidden_size, reward_names)
        self.weights_K.copy_(self.at(0))

    def at(self, step: int) -> Tensor:
        """The weights at a policy step: w_K."""
        planned = [(at, self.by_name(f"points[{at}]", weights)) for at, weights in self.points.items()]
        planned = [(at, row_K / row_K.sum()) for at, row_K in planned]
        if step <= planned[0][0]:
            return planned[0][1]
        for (before, old_K), (after, new_K) in pairwise(planned):
            if step < after:
                way = (step - before) / (after - before)
                way = way if self.shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * way))
                return torch.lerp(old_K, new_K, way)
        return planned[-1][1]

    def prepare(self, scored: Scored) -> None:
        """Take the weights of this step."""
        self.weights_K.copy_(self.at(scored.step))


class SAWWeights(SharedWeights):
    """Weights by how much each raw reward varies in the batch: SAW (arXiv 2606.07705).

    w_k = CV_k / sum_j CV_j with CV_k = sd_k / |mean_k + offset_k| over the responses of all ranks that reward k applies to,
    before any normalisation. The paper multiplies by K; here weights add up to 1. In evaluation the last batch's are
    used; where no reward varies, the ones before stay.

    Args:
        offsets: added to the rewards' means: one number, or by name. A reward whose mean is near 0 would have all the
            weight, and one with values on both sides of 0 is named in a warning; give minus its lowest value.
    """

    def __init__(self, offsets: float | dict[str, float] = 0.0) -> None:
        super().__init__()
        self.offsets = offsets
        self._warned = False

    @property
    def settings(self) -> dict[str, Any]:
        """The offsets."""
        return {"offsets": self.offsets}

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """See :class:`SharedWeights`."""
        super().build(hidden_size, reward_names)
        self.by_name("offsets", self.offsets)  # wrong names are said before the first batch

    def prepare(self, scored: Scored) -> None:
        """The weights of this batch. Collective."""
        parts = gathered((scored.raw_BK.cpu(), scored.mask_BK.cpu()))
        raw_BK, mask_BK = torch.cat([raw for raw, _ in parts]).double(), torch.cat([mask for _, mask in parts])
        offset_K = self.by_name("offsets", self.offsets).double()
        variation_K = torch.zeros(len(self.reward_names), dtype=torch.float64)
        around_0: dict[str, float] = {}  # name to the lowest value
        for k, (values_B, applies_B) in enumerate(zip(raw_BK.unbind(1), mask_BK.unbind(1), strict=True)):
            known = values_B[applies_B]
            if len(known) > 1:
                shifted = known + offset_K[k]
                variation_K[k] = known.std() / (shifted.mean().abs() + TINY)
                if float(shifted.min()) < 0 < float(shifted.max()):
                    around_0[self.reward_names[k]] = float(known.min())
        if around_0 and not self._warned:
            self._warned = True
            lowest = ", ".join(f"{name} (from {value:.3g})" for name, value in around_0.items())
            rank_zero_warn(
                f"SAWWeights divides by the mean of each raw reward, and in this batch there are values above and below 0 of "
                f"{lowest}: a mean near 0 has all the weight. Give model.weigher.init_args.offsets, for each of them minus its "
                "lowest value."
            )
        if float(variation_K.sum()) > 0:
            self.weights_K.copy_(variation_K / variation_K.sum())


class CTWAWeights(SharedWeights):
    """Raises the weight of a reward that the training signal leaves behind: CTWA (arXiv 2602.06869).

    After each batch, with c_k the in-group covariance of raw reward k with the advantages, averaged over the groups of all
    ranks: m_k <- (1 - ema) m_k + ema c_k, then log w_k <- log w_k + lr relu(target_k - m_k). To first order a reward
    improves as this covariance is positive. The paper's weights grow without bound; here they are rescaled to add up to
    1, so that raising one lowers the others.

    Args:
        targets: what each covariance should at least be: one number, or by name.
        lr: step size of log w; the paper's 0.05.
        ema: weight of the newest batch in m.
        statistic: ``covariance`` of the raw rewards (the paper), whose size is that of the reward's own spread, or their
            ``correlation``, which is in [-1, 1] for every reward; over the responses that the reward applies to, and
            over the groups in which it and the advantages vary there.
        weights: see :class:`SharedWeights`.

    Raises:
        UserError: a value outside its range.
    """

    mean_K: Tensor
    seen_K: Tensor

    def __init__(
        self,
        targets: float | dict[str, float] = 0.1,
        lr: float = 0.05,
        ema: float = 0.1,
        statistic: Statistic = "covariance",
        weights: dict[str, float] | None = None,
    ) -> None:
        super().__init__(weights)
        check_choice("CTWAWeights statistic", statistic, Statistic)
        if not lr >= 0 or not 0 < ema <= 1:
            raise UserError(f"CTWAWeights lr={lr}, ema={ema}: expected at least 0, and a share in (0, 1].")
        self.targets, self.lr, self.ema = targets, lr, ema
        self.statistic: Statistic = statistic

    @property
    def settings(self) -> dict[str, Any]:
        """Targets, step sizes, and the weights at the start."""
        return {
            **super().settings, "targets": self.targets, "lr": self.lr, "ema": self.ema, "statistic": self.statistic
        }  # fmt: skip

    def build(self, hidden_size: int, reward_names: Sequence[str]) -> None:
        """See :class:`SharedWeights`."""
        super().build(hidden_size, reward_names)
        self.by_name("targets", self.targets)
        self.register_buffer("mean_K", torch.zeros(len(self.reward_names)))
        self.register_buffer("seen_K", torch.zeros(len(self.reward_names)))

    def observe(self, seen: Seen) -> Metrics:
        """Move the weights for the next batch. Collective."""
        now_K = self._statistic(seen)
        known_K = ~now_K.isnan()
        rate_K = torch.where(self.seen_K.cpu() > 0, self.ema, 1.0)
        mean_K = torch.where(known_K, torch.lerp(self.mean_K.cpu(), now_K.nan_to_num(0.0), rate_K), self.mean_K.cpu())
        self.mean_K.copy_(mean_K)
        self.seen_K.add_(known_K.to(self.seen_K))
        behind_K = (self.by_name("targets", self.targets) - mean_K).clamp(min=0.0)
        behind_K = torch.where(self.seen_K.cpu() > 0, behind_K, torch.zeros_like(behind_K))
        self.multiply(self.lr * behind_K)
        return {f"{self.statistic}/{name}": value for name, value in zip(self.reward_names, mean_K, strict=True)}

    def _statistic(self, seen: Seen) -> Tensor:
        """Mean over the groups of all ranks; NaN where none says anything of a reward.

        No group does in which a reward applies to fewer than two responses, and for a correlation none in which it or
        the advantages are the same for all of these.
        """
        scored, size = seen.scored, seen.scored.group_size
        advantages_B = seen.weighed.advantages_B.detach().double().cpu()
        raw_BK, mask_BK = scored.raw_BK.detach().double().cpu(), scored.mask_BK.cpu()
        summed = group_correlations if self.statistic == "correlation" else group_covariances
        sums = summed(raw_BK, mask_BK, advantages_B, size)
        total_K, groups_K = (torch.stack(parts).sum(0) for parts in zip(*gathered(sums), strict=True))
        return torch.where(groups_K > 0, total_K / groups_K.clamp(min=1), torch.nan).float()


def group_correlations(raw_BK: Tensor, mask_BK: Tensor, value_B: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """In-group Pearson correlation of each reward with the values over the responses it applies to, summed over groups.

    Args:
        raw_BK: rewards.
        mask_BK: bool, which apply.
        value_B: values.
        group_size: G.

    Returns:
        The sums, and the number of groups in which reward and values vary: two vectors of K.
    """
    value_BK = value_B.unsqueeze(1).expand_as(raw_BK)
    z_NGK, v_NGK = (
        zscores(each_BK, mask_BK, group_size).view(-1, group_size, raw_BK.shape[1]) for each_BK in (raw_BK, value_BK)
    )
    count_NK = mask_BK.view(z_NGK.shape).sum(1)
    both_NK = (z_NGK != 0).any(1) & (v_NGK != 0).any(1)
    correlation_NK = (z_NGK * v_NGK).sum(1) / (count_NK - 1).clamp(min=1)
    return torch.where(both_NK, correlation_NK, 0.0).sum(0), both_NK.sum(0)


def group_covariances(raw_BK: Tensor, mask_BK: Tensor, value_B: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """In-group covariance of each reward with the values (divided by the number of responses), summed over the groups.

    Args:
        raw_BK: rewards.
        mask_BK: bool, which apply.
        value_B: values.
        group_size: G.

    Returns:
        The sums, and the number of groups in which a reward applies to at least two responses: two vectors of K.
    """
    shape = (-1, group_size, raw_BK.shape[1])
    mask = mask_BK.view(shape)
    count_NK = mask.sum(1).clamp(min=1)
    value = value_B.view(-1, group_size, 1).expand(shape[0], group_size, shape[2])

    def centred(values: Tensor) -> Tensor:
        kept = values.masked_fill(~mask, 0.0)
        return (kept - (kept.sum(1) / count_NK).unsqueeze(1)).masked_fill(~mask, 0.0)

    covariance_NK = (centred(raw_BK.view(shape)) * centred(value)).sum(1) / count_NK
    usable_NK = mask.sum(1) > 1
    return torch.where(usable_NK, covariance_NK, 0.0).sum(0), usable_NK.sum(0)
