"""The engine that sampled and the trainer that learns are two programs: what their difference does to the loss.

An engine of its own (vLLM) rounds otherwise, may hold the adapters in another dtype or the base in another quantisation,
so its tokens come from a policy that is not quite the trainer's. Importance sampling takes that back: every token's
surrogate is multiplied by rho = pi_trainer / pi_engine, bounded by a cap. The formulas are those of TRL 1.16
(tests/trl/test_losses.py); truncation is that of arXiv 2510.18855, masks those of arXiv 2510.23027.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_pl.algorithm import Mean, Metrics
from maestro_pl.algorithm.losses import repeated, segment_sum
from maestro_pl.algorithm.settings import Mismatch


def mismatch_correction(
    logps_T: Tensor, sampling_logps_T: Tensor, lengths_B: Tensor, kind: Mismatch = "token_truncate", cap: float = 3.0
) -> tuple[Tensor | None, Metrics]:
    """What the surrogate of each token is multiplied by: the ratio rho, truncated or masked.

    Args:
        logps_T: float log-probability of each token under the trainer's policy at the time of the rollout; no gradient.
        sampling_logps_T: float, the same under the engine that drew it.
        lengths_B: int64 tokens of each response.
        kind: ``token_truncate``: min(rho, cap) of each token; ``token_mask``: rho, and 0 where it is above the cap;
            ``sequence_truncate`` and ``sequence_mask``: the same with the rho of the whole response, the product over its
            tokens; ``none``: no correction, the metrics only.
        cap: C.

    Returns:
        float32 correction_T, detached, or None with ``none``; and ``engine/kl`` (k3 estimate of KL(engine || trainer), nats
        a token), ``engine/ratio_max`` (largest rho of a token), ``engine/masked`` (share of the tokens whose rho was
        above the cap, so that it was truncated or left out).
    """
    delta_T = (logps_T.detach() - sampling_logps_T.to(logps_T.device)).float()
    ratio_T = torch.exp(delta_T)
    count = len(ratio_T)
    metrics: Metrics = {
        "engine/kl": Mean((ratio_T - delta_T - 1.0).sum(), count),
        "engine/ratio_max": ratio_T.max() if count else torch.ones(()),
    }
    if kind == "none":
        return None, metrics
    if kind.startswith("sequence"):
        ratio_T = torch.exp(_response_sums(delta_T, lengths_B))
    above_T = ratio_T > cap
    metrics["engine/masked"] = Mean(above_T.float().sum(), count)
    if kind.endswith("truncate"):
        return ratio_T.clamp(max=cap), metrics
    return ratio_T.masked_fill(above_T, 0.0), metrics


def _response_sums(values_T: Tensor, lengths_B: Tensor) -> Tensor:
    """Every token's value replaced by the sum over its response; in float64, for long responses."""
    lengths_B = lengths_B.to(values_T.device)
    wide = torch.float32 if values_T.device.type == "mps" else torch.float64
    return repeated(segment_sum(values_T.to(wide), lengths_B), lengths_B, len(values_T)).float()
