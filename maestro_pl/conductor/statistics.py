"""Running statistics that the Conductor keeps of what it reads: the centre of h, and how rewards go along with each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maestro_pl.run.ranks import gathered

MEMORY = 4096  # responses after which old ones begin to fade
LARGEST = 1e18  # of a hidden state: what is larger has no square in float32


class _Running(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))


class RunningScale(_Running):
    """Centres and scales features: (x - mean) / spread, the spread one number for each part of the features.

    Args:
        width: D, features.
        parts: equal parts that they consist of.
    """

    mean_D: Tensor
    spread_P: Tensor

    def __init__(self, width: int, parts: int = 1) -> None:
        super().__init__()
        self.parts = parts
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("spread_P", torch.ones(parts))

    def forward(self, x_BD: Tensor) -> Tensor:
        """The features, centred and scaled."""
        centred_BD = x_BD - self.mean_D
        spread_P1 = self.spread_P.clamp(min=1e-6).unsqueeze(-1)
        scaled_BD: Tensor = in_parts(centred_BD, self.parts) / spread_P1
        return scaled_BD.flatten(-2)

    @torch.no_grad()
    def observe(self, x_BD: Tensor) -> None:
        """Take a batch into account, that of every rank. Collective."""
        x_BD = torch.cat([part.to(x_BD.device) for part in gathered(x_BD.detach().cpu())]).float()
        x_BD = x_BD[usable_states(x_BD)]  # one bad state must not spoil the centre of all
        if not len(x_BD):
            return
        before = float(self.count)
        first, rate = before == 0, len(x_BD) / (before + len(x_BD))
        self.count.fill_(min(before + len(x_BD), float(MEMORY)))
        self.mean_D.lerp_(x_BD.mean(0), rate)
        square_P = in_parts((x_BD - self.mean_D).square(), self.parts).mean((0, 2))
        self.spread_P.copy_(square_P.sqrt() if first else torch.lerp(self.spread_P.square(), square_P, rate).sqrt())


def usable_states(x_BD: Tensor) -> Tensor:
    """Bool (B,): rows that a statistic or a fit may read: every feature finite, and its square too (NaN is neither)."""
    return (x_BD.abs() < LARGEST).all(-1)


def in_parts(x_BD: Tensor, parts: int) -> Tensor:
    """The features in equal parts: (B, parts, D / parts)."""
    return x_BD.view(*x_BD.shape[:-1], parts, x_BD.shape[-1] // parts)


class RunningCorrelation(_Running):
    """In-group correlation of K rewards with each other, from their z-scores; the identity until something was seen.

    Args:
        rewards: K.
    """

    product_KK: Tensor
    seen_KK: Tensor

    def __init__(self, rewards: int) -> None:
        super().__init__()
        self.register_buffer("product_KK", torch.zeros(rewards, rewards))
        self.register_buffer("seen_KK", torch.zeros(rewards, rewards))

    @property
    def matrix_KK(self) -> Tensor:
        """The correlations; 1 on the diagonal, 0 for pairs that never applied together."""
        mean_KK = self.product_KK / self.seen_KK.clamp(min=1e-6)
        spread_K = mean_KK.diagonal().clamp(min=1e-6).sqrt()
        correlation_KK = (mean_KK / spread_K.unsqueeze(0) / spread_K.unsqueeze(1)).clamp(-1.0, 1.0)
        return torch.where(torch.eye(len(spread_K), device=mean_KK.device).bool(), 1.0, correlation_KK)

    @torch.no_grad()
    def observe(self, z_BK: Tensor, mask_BK: Tensor) -> None:
        """Take a batch of z-scores into account, that of every rank; rows that are not finite are left out. Collective."""
        finite_B = z_BK.isfinite().all(-1)
        z_BK, applies_BK = z_BK[finite_B], mask_BK[finite_B].float()
        own = ((z_BK.T @ z_BK).cpu(), (applies_BK.T @ applies_BK).cpu(), len(z_BK))
        parts = gathered(own)
        product_KK = torch.stack([part[0] for part in parts]).sum(0).to(z_BK.device)
        seen_KK = torch.stack([part[1] for part in parts]).sum(0).to(z_BK.device)
        total = float(self.count) + sum(part[2] for part in parts)
        if not total:
            return
        fade = min(1.0, MEMORY / total)
        self.count.fill_(min(total, float(MEMORY)))
        self.product_KK.add_(product_KK).mul_(fade)
        self.seen_KK.add_(seen_KK).mul_(fade)
