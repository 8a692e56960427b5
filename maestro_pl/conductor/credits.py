"""From rewards and values to what each reward's emphasis is worth, and the losses on it. Pure functions.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_pl.algorithm.advantages import group_advantages, normalize_rewards
from maestro_pl.algorithm.settings import Scaling


def zscores(rewards_BK: Tensor, mask_BK: Tensor, group_size: int) -> Tensor:
    """Every reward z-scored inside its group over the responses that it applies to: z_BK, 0 elsewhere."""
    columns = [
        normalize_rewards(values_B, mask_B, group_size, "zscore")
        for values_B, mask_B in zip(rewards_BK.unbind(1), mask_BK.unbind(1), strict=True)
    ]
    return torch.stack(columns, dim=1)


def group_covariance(z_BK: Tensor, mask_BK: Tensor, value_B: Tensor, group_size: int) -> Tensor:
    """In-group covariance of every reward with the value: q_k = mean over the group of z_k z_value (Eq. 10).

    Args:
        z_BK: rewards z-scored in their group.
        mask_BK: bool, which apply.
        value_B: z-scored values; NaN where the value is not known.
        group_size: G.

    Returns:
        q_BK, a group's q on each of its rows. NaN where fewer than two responses of the group have both numbers.
    """
    both_BK = mask_BK & ~value_B.isnan().unsqueeze(1)
    product_BK = torch.where(both_BK, z_BK * value_B.nan_to_num(0.0).unsqueeze(1), torch.zeros_like(z_BK))
    shape = (-1, group_size, z_BK.shape[1])
    count_NK = both_BK.view(shape).sum(1)
    mean_NK = product_BK.view(shape).sum(1) / count_NK.clamp(min=1)
    q_NK = torch.where(count_NK > 1, mean_NK, torch.full_like(mean_NK, torch.nan))
    return q_NK.repeat_interleave(group_size, 0)


def action_advantages(scalar_BK: Tensor, scalar_B: Tensor, group_size: int, scale: Scaling) -> Tensor:
    """A_i(k): the advantage that response i would have had with action k, the actions of the others being what they were.

    Args:
        scalar_BK: the scalar reward of each response under each action.
        scalar_B: the scalar rewards that were used; NaN where no reward applies.
        group_size: G.
        scale: ``group`` or ``none``, as in :func:`maestro_pl.algorithm.advantages.group_advantages`; what each action would
            do to the spread of a whole ``batch`` is not worked out.

    Returns:
        A_BK. Its expectation over a_i ~ pi is that of the sampled advantage (Rao-Blackwell: same mean, less variance).
    """
    count, rewards = scalar_B.shape[0] // group_size, scalar_BK.shape[1]
    # one imagined group for each response i and action k: scalar_B with R_i replaced by R_i(k)
    groups = scalar_B.view(count, 1, 1, group_size).expand(count, group_size, rewards, group_size).clone()
    index = torch.arange(group_size, device=scalar_B.device)
    groups[:, index, :, index] = scalar_BK.view(count, group_size, rewards).transpose(0, 1)
    advantages = group_advantages(groups.flatten(), group_size, scale)
    own = advantages.view(count, group_size, rewards, group_size)[:, index, :, index]  # (G, N, K)
    return own.transpose(0, 1).reshape(-1, rewards)


def meta_loss(
    log_prob_B: Tensor, advantages_B: Tensor, probabilities_BK: Tensor, entropy_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_meta = -mean(A log pi(a|h)) - lambda_ent mean H(pi(.|h)) (Eq. 9)."""
    entropy = distribution_entropy(probabilities_BK).mean()
    reinforce = -(advantages_B * log_prob_B).mean()
    loss = reinforce - entropy_coef * entropy
    return loss, {"loss": loss.detach(), "reinforce": reinforce.detach(), "entropy": entropy.detach()}


def clipped_loss(
    log_prob_B: Tensor, drawn_log_prob_B: Tensor, advantages_B: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """-mean(min(rho A, clip(rho, 1 - c, 1 + c) A)), rho = pi(a|h) now over then, and the share of clipped rows.

    For actions that an older Conductor drew. At rho = 1 its gradient is that of -mean(A log pi(a|h)).
    """
    ratio_B = (log_prob_B - drawn_log_prob_B).exp()
    plain_B, clipped_B = ratio_B * advantages_B, ratio_B.clamp(1 - clip, 1 + clip) * advantages_B
    return -torch.minimum(plain_B, clipped_B).mean(), (clipped_B < plain_B).float().mean()


def expected_loss(probabilities_BK: Tensor, credit_BK: Tensor, entropy_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """-mean(sum_k pi_k q_k) - lambda_ent mean H(pi): all actions in expectation instead of a drawn one (Eq. 11)."""
    entropy = distribution_entropy(probabilities_BK).mean()
    expected = -(probabilities_BK * credit_BK.nan_to_num(0.0)).sum(-1).mean()
    loss = expected - entropy_coef * entropy
    return loss, {"loss": loss.detach(), "expected": expected.detach(), "entropy": entropy.detach()}


def pairwise_loss(log_prob_B: Tensor, advantages_B: Tensor, group_B: Tensor) -> Tensor:
    """Mean over the pairs (i, j) of a group with A_i > A_j of -log sigmoid(log pi(a_i|h_i) - log pi(a_j|h_j)).

    The action of the better response should be the more probable one, by however much it is better; a Bradley-Terry
    loss with the log-probabilities as scores. 0 where no group has two different advantages.

    Args:
        log_prob_B: log pi(a|h), with gradient in the Conductor.
        advantages_B: group-relative advantages.
        group_B: int64, equal inside a group.
    """
    better_BB = (advantages_B.unsqueeze(1) > advantages_B.unsqueeze(0)) & (group_B.unsqueeze(1) == group_B.unsqueeze(0))
    margin_BB = log_prob_B.unsqueeze(1) - log_prob_B.unsqueeze(0)
    losses = -torch.nn.functional.logsigmoid(margin_BB[better_BB])
    return losses.sum() / max(len(losses), 1)


def distribution_entropy(probabilities_BK: Tensor) -> Tensor:
    """Entropy in nats of each row: entropy_B; zero probabilities (rewards that do not apply) add nothing."""
    # not torch.special.entr: its gradient at 0 is infinite, and times the mask's 0 that is NaN
    safe_BK = torch.where(probabilities_BK > 0, probabilities_BK, torch.ones_like(probabilities_BK))
    return -(probabilities_BK * safe_BK.log()).sum(-1)
