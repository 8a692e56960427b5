"""One step ahead: how much a policy step on each response would help a held-out objective.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm.advantages import normalize_rewards
from maestro_pl.algorithm.losses import segment_sum
from maestro_pl.algorithm.scalar_reward import anchor_values
from maestro_pl.algorithm.settings import Advantages, Anchoring
from maestro_pl.conductor.credits import group_covariance
from maestro_pl.conductor.signals import Credit, MetaSignal, Observation
from maestro_pl.errors import UserError
from maestro_pl.policy.padding import token_index
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import evaluating
from maestro_pl.rollout import Rollout
from maestro_pl.run.ranks import gathered

SCALE = 1024.0  # a power of two, exact, on the way of the gradient through a base in float16


@dataclass
class Cost:
    """What a lookahead costs beside the step itself: passes through the backbone and the tokens in them."""

    forwards: int = 0
    backwards: int = 0
    tokens: int = 0


class LookaheadSignal(MetaSignal):
    """The bi-level problem with one step of the policy, differentiated (Eq. 15).

    The labelled groups of a batch are the held-out prompts: their anchor values give the gradient g of the held-out
    objective. Every response of the other groups is then worth c_i = <g, gradient of its weighted log-probability>, the
    rate at which a policy step on it raises that objective. All c_i together are one directional derivative, taken as a
    central difference of two forward passes along g. Where all groups are labelled (the warm-up, ``fraction:
    1``), each half of them is held out for the other.

    Costs one forward and backward pass of the held-out groups and two forward passes of the others a batch, counted in
    ``conductor/lookahead_forwards``, ``_backwards`` and ``_tokens``. Only adapters are moved, and put back bit for bit.

    Args:
        step: length of the difference: how much the held-out objective changes along it, in nats a response. null: 0.01
            with a float32 base, 0.2 with one in half precision, whose rounding would drown a shorter one.
        entropy_coef: lambda_ent of the gradient learners.

    Raises:
        UserError: a step that is not above 0.
    """

    uses_anchor = True
    gives_values = True

    def __init__(self, step: float | None = None, entropy_coef: float = 1e-3) -> None:
        super().__init__(entropy_coef)
        if step is not None and not step > 0:
            raise UserError(f"LookaheadSignal step={step}: expected nats above 0, or null.")
        self.step = step
        self._warned = False

    @property
    def settings(self) -> dict[str, Any]:
        """The length of the difference."""
        return {**super().settings, "step": self.step}

    def check(self, policy: LoRAPolicy, advantages: Advantages, anchoring: Anchoring) -> None:
        """Adapters must be there to be moved."""
        if policy.lora is None:
            raise UserError(
                "LookaheadSignal moves adapters, and model.policy.lora is null: train adapters, or take AnchorSignal."
            )

    def observe(self, seen: Observation) -> Credit:
        """Credits of the responses that are not held out, and each reward's covariance with them."""
        policy, rollout, size = seen.policy, seen.weighed.rollout, seen.weighed.rollout.group_size
        if len(seen.labelled_N) < 2 and not self._warned:
            self._warned = True
            rank_zero_warn(
                "LookaheadSignal holds some prompts of a batch out for the others, and this batch has one prompt, so it "
                "teaches nothing: give data.batch_size of at least 2 if this is not the last batch of an epoch."
            )
        value_B = anchor_values(rollout)
        known_N = (~value_B.isnan()).view(-1, size).any(1)
        weights_T = seen.update.token_weights(seen.weighed)
        credit_B = torch.full((len(rollout),), torch.nan)
        cost = Cost()
        halves = all(gathered(bool(seen.labelled_N.all())))  # every rank enters as many collectives
        for held_N, credited_N in folds(seen.labelled_N, halves):
            held = (held_N & known_N).nonzero().flatten().tolist()
            credited = credited_N.nonzero().flatten().tolist()
            if not any(gathered(bool(held))) or not any(gathered(bool(credited))):
                continue
            direction = held_out_gradient(
                policy, rollout, held, value_B, seen.update.passes(rollout, held), weights_T, cost
            )
            if direction is None or not credited:
                continue
            rows = [n * size + g for n in credited for g in range(size)]
            credit_B[rows] = directional_credits(
                policy,
                direction,
                rollout,
                rows,
                weights_T,
                difference_step(policy) if self.step is None else self.step,
                seen.update.pass_limit,
                cost,
            )
        usable_B = ~credit_B.isnan()
        z_B = normalize_rewards(credit_B.nan_to_num(0.0), usable_B, size, "zscore").to(seen.z_BK.device)
        z_B = torch.where(usable_B.to(z_B.device), z_B, torch.full_like(z_B, torch.nan))
        metrics = {
            "anchor_groups": float(seen.labelled_N.sum()),
            "anchor_constant": float((seen.labelled_N & ~known_N).sum()),
            **{f"lookahead_{name}": float(value) for name, value in vars(cost).items()},
        }
        return Credit(group_covariance(seen.z_BK, seen.weighed.mask_BK, z_B, size), z_B, metrics)


def difference_step(policy: LoRAPolicy) -> float:
    """Length of a central difference in nats: 0.01 in float32, 0.2 where half precision would drown a shorter one."""
    exact = next(policy.base_model.parameters()).dtype == torch.float32
    return 0.01 if exact and not torch.is_autocast_enabled(policy.device.type) else 0.2


def folds(labelled_N: Tensor, halves: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (held out, credited) of groups, bool (N,) each: the labelled and the others; two halves where all are labelled."""
    if not halves:
        yield labelled_N, ~labelled_N
        return
    even_N = torch.arange(len(labelled_N)) % 2 == 0
    yield even_N, ~even_N
    yield ~even_N, even_N


def held_out_gradient(
    policy: LoRAPolicy,
    rollout: Rollout,
    held: Sequence[int],
    value_B: Tensor,
    micro_batches: Sequence[Sequence[int]],
    weights_T: Tensor,
    cost: Cost,
) -> list[Tensor] | None:
    """The gradient of J = mean over held-out responses of v log pi(y|x), the policy gradient of the anchor. Collective.

    Args:
        policy: the policy, at its parameters.
        rollout: the batch.
        held: held-out groups.
        value_B: their responses' anchor values, z-scored in the group.
        micro_batches: the rows of these groups, in passes.
        weights_T: token weights of the policy's loss; here they only say on which tokens it is trained (0: not at all).
        cost: is added to.

    Returns:
        One tensor for each of ``policy.trained_parameters()``, the mean over ranks; None where it is 0 or not finite.
    """
    parameters = policy.trained_parameters()
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    size = rollout.group_size
    count = sum(gathered(len(held) * size))
    with torch.enable_grad(), evaluating(policy):
        for rows in micro_batches:
            logp_B = _weighted_logps(policy, rollout, rows, (weights_T != 0).float(), cost)
            objective = (value_B[rows].to(logp_B.device).nan_to_num(0.0) * logp_B).sum() / count
            for part, gradient in zip(
                total, torch.autograd.grad(objective * SCALE, parameters, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    part += gradient / SCALE
            cost.backwards += 1
    if len(gathered(0)) > 1:
        for part in total:
            torch.distributed.all_reduce(part)
    norm = torch.stack([part.norm() for part in total]).norm()
    return total if bool(torch.isfinite(norm)) and float(norm) > 0 else None


def directional_credits(
    policy: LoRAPolicy,
    direction: Sequence[Tensor],
    rollout: Rollout,
    rows: list[int],
    weights_T: Tensor,
    step: float,
    max_tokens: int,
    cost: Cost,
) -> Tensor:
    """c_i = <direction, gradient of sum_t weights_t log pi(y_it)> of some responses, by a central difference: (rows,).

    Args:
        policy: the policy; its adapters are moved to both sides and put back.
        direction: one tensor for each of ``policy.trained_parameters()``: g.
        rollout: the batch.
        rows: the responses.
        weights_T: token weights of the policy's loss.
        step: |g|^2 times the distance moved along g: the change of the objective whose gradient g is.
        max_tokens: of one forward pass.
        cost: is added to.
    """
    square = float(sum(part.double().square().sum() for part in direction))
    distance = step / square
    sides = []
    with torch.no_grad(), evaluating(policy):
        for sign in (1.0, -1.0):
            with moved(policy.trained_parameters(), direction, sign * distance):
                sides.append(_weighted_logps(policy, rollout, rows, weights_T, cost, max_tokens).cpu())
    return ((sides[0] - sides[1]) / (2.0 * distance)).float()


@contextmanager
def moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], distance: float) -> Iterator[None]:
    """Parameters + distance * direction for the length of the block; put back bit for bit."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, part in zip(parameters, direction, strict=True):
            parameter.add_(part.to(parameter.dtype), alpha=distance)
        yield
    finally:
        for parameter, original in zip(parameters, kept, strict=True):
            parameter.copy_(original)


def _weighted_logps(
    policy: LoRAPolicy,
    rollout: Rollout,
    rows: Sequence[int],
    weights_T: Tensor,
    cost: Cost,
    max_tokens: int | None = None,
) -> Tensor:
    """sum_t weights_t log pi(y_it) of some responses, in float64."""
    prompts = [rollout.prompt_ids[row // rollout.group_size] for row in rows]
    responses = [rollout.response_ids[row] for row in rows]
    statistics = policy.token_statistics(prompts, responses, temperature=rollout.temperature, max_tokens=max_tokens)
    slices = policy.scorer.slices(policy.base_model, prompts, responses, max_tokens)
    cost.forwards += len(slices)
    for chosen in slices:
        cost.tokens += policy.scorer.tokens(
            policy.base_model, [prompts[i] for i in chosen], [responses[i] for i in chosen]
        )
    places_T = token_index(rollout.lengths_B, rows).to(statistics.logps_T.device)
    weighted_T = weights_T.to(statistics.logps_T.device)[places_T] * statistics.logps_T.double()
    return segment_sum(weighted_T, rollout.lengths_B[list(rows)])
