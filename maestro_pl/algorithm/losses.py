"""The GRPO objective and its relatives over a ragged batch of response tokens.

Pure functions: tensors in, loss and metrics out. Equation numbers are those of docs/algorithm.md; every variant gives
the numbers of TRL 1.16 (tests/trl/test_losses.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maestro_pl.algorithm.settings import KL, Loss, LossType, Surrogate
from maestro_pl.errors import UserError


@dataclass(frozen=True)
class TokenBatch:
    """What the policy loss needs of the response tokens of one micro-batch, laid end to end.

    Attributes:
        logps_T: log-probability under the policy being trained (with gradient).
        old_logps_T: the same under the policy that sampled the responses.
        advantages_T: advantage of the response that the token belongs to.
        weights_T: share of each token in the loss, from :func:`token_weights` of the whole batch.
        ref_logps_T: log-probability under the reference, or None without a KL term.
        lengths_B: int64 tokens of each response; needed for ratios of whole responses only.
        chosen_T: bool, the tokens whose surrogate counts (:func:`high_entropy`), or None for all. The KL term always
            counts.
        correction_T: what the surrogate is multiplied by where another program sampled
            (:func:`~maestro_pl.algorithm.mismatch.mismatch_correction`), or None.
    """

    logps_T: Tensor
    old_logps_T: Tensor
    advantages_T: Tensor
    weights_T: Tensor
    ref_logps_T: Tensor | None = None
    lengths_B: Tensor | None = None
    chosen_T: Tensor | None = None
    correction_T: Tensor | None = None


@dataclass(frozen=True)
class RolloutTokens:
    """What the losses of a rollout's micro-batches share: the tokens of all its responses, laid end to end.

    Attributes:
        advantages_T, weights_T, old_logps_T, ref_logps_T, chosen_T, correction_T: as in :class:`TokenBatch`.
            ``old_logps_T`` is None before the first of several steps: the policy is then the one that sampled.
    """

    advantages_T: Tensor
    weights_T: Tensor
    old_logps_T: Tensor | None = None
    ref_logps_T: Tensor | None = None
    chosen_T: Tensor | None = None
    correction_T: Tensor | None = None

    def at(self, index_T: Tensor) -> RolloutTokens:
        """Those at some positions."""
        optional = (self.old_logps_T, self.ref_logps_T, self.chosen_T, self.correction_T)
        rest = (None if part_T is None else part_T[index_T] for part_T in optional)
        return RolloutTokens(self.advantages_T[index_T], self.weights_T[index_T], *rest)

    def batch(self, logps_T: Tensor, lengths_B: Tensor) -> TokenBatch:
        """With the log-probabilities of the policy as it is now (with gradient), of responses of these lengths."""
        old_T = logps_T.detach() if self.old_logps_T is None else self.old_logps_T
        shared = (self.advantages_T, self.weights_T, self.ref_logps_T, lengths_B, self.chosen_T, self.correction_T)
        return TokenBatch(logps_T, old_T, *shared)


def token_weights(loss_type: LossType | Surrogate, lengths_B: Tensor, active_B: Tensor, max_new_tokens: int) -> Tensor:
    """How much each response token counts, so that the loss is ``(weights_T * per_token_loss_T).sum()``.

    The weights are those of the whole batch; cut into micro-batches they still add up to the same loss.

    Args:
        loss_type: ``grpo`` and ``sapo`` average over the tokens of each response, then over responses
            (arXiv 2402.03300); ``bnpo``, ``dapo`` and ``cispo`` average over all active tokens (arXiv 2503.14476; on
            several ranks the module turns the count into the global one, but for ``bnpo``); ``dr_grpo`` divides by B
            times the token limit (arXiv 2503.20783); ``luspo`` sums over the tokens and averages over responses, so
            that a response counts by its length. A function of one's own counts as ``dapo``.
        lengths_B: int64 response lengths, whole batch.
        active_B: bool, False for responses that do not train the policy (for instance truncated ones).
        max_new_tokens: the limit that ``dr_grpo`` divides by.

    Returns:
        float32 weights_T for all responses, 0 for those of inactive ones.
    """
    responses = lengths_B.numel()
    active_lengths_B = lengths_B * active_B
    if loss_type in ("grpo", "sapo"):
        weight_B = 1.0 / (responses * lengths_B.clamp(min=1).double())
    elif loss_type == "dr_grpo":
        weight_B = torch.full((responses,), 1.0 / (responses * max_new_tokens), dtype=torch.double)
    elif loss_type == "luspo":
        weight_B = torch.full((responses,), 1.0 / responses, dtype=torch.double)
    else:
        tokens = int(active_lengths_B.sum())
        weight_B = torch.full((responses,), 1.0 / max(tokens, 1), dtype=torch.double)
    return (weight_B * active_B).repeat_interleave(lengths_B).float()


def grpo_loss(batch: TokenBatch, loss: Loss = Loss(), kl: KL = KL()) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: B008
    """The policy surrogate with an optional KL penalty (Eq. 7; GRPO, arXiv 2402.03300, Eq. 3).

    With rho = pi / pi_old, per token:

    - clipped (every type but the two below): -min(min(rho, delta) A, clip(rho, 1 - clip_low, 1 + clip_high) A), the
      bound delta where A < 0 (two-sided clipping, INTELLECT-2, arXiv 2505.07291);
    - ``cispo`` (arXiv 2506.13585): -min(rho, clip_high) A log pi, with no gradient through the ratio. ``clip_high`` is
      the cap of the ratio itself, as in TRL, so it wants to be above 1 (ScaleRL, arXiv 2510.13786: 4 to 8);
    - ``sapo`` (arXiv 2511.20347): -(4 / t) sigmoid(t (rho - 1)) A, with t the first of ``sapo_temperatures`` where
      A > 0 and the second elsewhere;
    - a function of one's own: what it gives;

    plus kl.coef * k3; where ``kl.unbiased``, k3 is multiplied by rho, so that its gradient is that of KL(pi || ref)
    (DeepSeek-V3.2, arXiv 2512.02556; TRL's ``use_bias_correction_kl``), else it is the k3 term of the GRPO paper.

    Args:
        batch: the tokens of whole responses.
        loss: its ``type`` (see :func:`token_weights` for what it does to the average), the clip ranges, and whether rho is
            that of each ``token`` or of the whole ``sequence``: the geometric mean over its tokens (GSPO, arXiv 2507.18071).
        kl: weight and form of the KL term.

    Returns:
        The loss (a scalar with gradient), and sums over tokens of detached quantities: ``clip`` (tokens whose ratio is
        clipped on the side that matters) and ``kl`` (k3 estimate in nats).

    Raises:
        UserError: a function of one's own gives something else than one number a token.
    """
    log_ratio_T = batch.logps_T - batch.old_logps_T
    if loss.importance_level == "sequence":
        log_ratio_T = _response_mean(log_ratio_T, batch.lengths_B)
    ratio_T, advantages_T = torch.exp(log_ratio_T), batch.advantages_T
    low_T = (ratio_T < 1.0 - loss.clip_low) & (advantages_T < 0)
    high_T = (ratio_T > 1.0 + loss.clip_high) & (advantages_T > 0)
    if loss.type == "cispo":
        per_token_T = -ratio_T.clamp(max=loss.clip_high).detach() * advantages_T * batch.logps_T
        low_T, high_T = torch.zeros_like(low_T), (ratio_T > loss.clip_high) & (advantages_T > 0)
    elif loss.type == "sapo":
        positive, other = (torch.full_like(ratio_T, temperature) for temperature in loss.sapo_temperatures)
        temperature_T = torch.where(advantages_T > 0, positive, other)
        per_token_T = -torch.sigmoid(temperature_T * (ratio_T - 1.0)) * (4.0 / temperature_T) * advantages_T
        low_T = high_T = torch.zeros_like(low_T)  # a soft gate clips nothing
    elif callable(loss.type):
        per_token_T = _own(loss, batch)
    else:
        clipped_T = ratio_T.clamp(1.0 - loss.clip_low, 1.0 + loss.clip_high)
        bounded_T = ratio_T if loss.delta is None else ratio_T.clamp(max=loss.delta)
        per_token_T = -torch.minimum(bounded_T * advantages_T, clipped_T * advantages_T)
    if batch.chosen_T is not None:
        per_token_T = per_token_T * batch.chosen_T
    if batch.correction_T is not None:
        per_token_T = per_token_T * batch.correction_T
    sums = {"clip": (low_T | high_T).float().sum()}
    if batch.ref_logps_T is not None:
        kl_T = k3(batch.logps_T, batch.ref_logps_T)
        sums["kl"] = kl_T.detach().sum()
        per_token_T = per_token_T + kl.coef * (kl_T * ratio_T if kl.unbiased else kl_T)
    return (batch.weights_T * per_token_T).sum(dtype=torch.float64).float(), sums  # terms of both signs cancel


def _own(loss: Loss, batch: TokenBatch) -> Tensor:
    """What a function of the user's gives, if it can be a loss of every token."""
    assert callable(loss.type)
    per_token_T = loss.type(batch, loss)
    if not isinstance(per_token_T, Tensor) or per_token_T.shape != batch.logps_T.shape:
        got = list(per_token_T.shape) if isinstance(per_token_T, Tensor) else type(per_token_T).__name__
        raise UserError(
            f"model.loss.type={loss.name} gave {got}: expected the loss of every token, a tensor of the shape "
            f"{list(batch.logps_T.shape)}, as batch.logps_T has it."
        )
    if batch.logps_T.requires_grad and not per_token_T.requires_grad:
        raise UserError(
            f"model.loss.type={loss.name} has no gradient, so nothing would be learned: compute it from batch.logps_T, "
            "without detach() or no_grad()."
        )
    return per_token_T


def high_entropy(entropies_T: Tensor, active_T: Tensor, share: float) -> Tensor:
    """The tokens at which the policy was least certain ("forking tokens", arXiv 2506.01939).

    Args:
        entropies_T: float entropies in nats.
        active_T: bool, the tokens that take part.
        share: of the active tokens that is kept, in (0, 1]; tokens at the threshold are kept.

    Returns:
        bool chosen_T, False for tokens that are not active.
    """
    active = entropies_T[active_T].float()
    if active.numel() == 0:
        return torch.zeros_like(active_T)
    if active.numel() <= 2**24:
        threshold = torch.quantile(active, 1.0 - share)
    else:  # torch.quantile takes no more; at this size the neighbour below the interpolated value is as good
        threshold = active.kthvalue(max(1, int((1.0 - share) * active.numel()))).values
    return (entropies_T >= threshold) & active_T


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(pi || ref) from samples of pi: exp(d) - d - 1, d = ref - logp (Eq. 8)."""
    delta = ref_logps - logps
    return torch.exp(delta) - delta - 1.0


def repeated(values_B: Tensor, lengths_B: Tensor, tokens: int) -> Tensor:
    """Each response's value once for each of its tokens: values_T.

    Args:
        values_B: one for each response.
        lengths_B: int64, on the same device.
        tokens: T, their sum, which the host would wait for if it were not told.
    """
    return values_B.repeat_interleave(lengths_B, output_size=tokens)


def segment_sum(values_T: Tensor, lengths_B: Tensor) -> Tensor:
    """Sum of the tokens of each response: values_T (ragged; (T, ...)) to float values_B (B, ...)."""
    lengths_B = lengths_B.to(values_T.device)
    rows_T = repeated(torch.arange(lengths_B.numel(), device=values_T.device), lengths_B, len(values_T))
    return values_T.new_zeros((lengths_B.numel(), *values_T.shape[1:])).index_add(0, rows_T, values_T)


def _response_mean(values_T: Tensor, lengths_B: Tensor | None) -> Tensor:
    """Every token's value replaced by the mean over its response."""
    if lengths_B is None:
        raise ValueError("TokenBatch.lengths_B is None: a ratio of whole responses needs the length of each.")
    lengths_B = lengths_B.to(values_T.device)
    return repeated(segment_sum(values_T, lengths_B) / lengths_B.clamp(min=1), lengths_B, len(values_T))
