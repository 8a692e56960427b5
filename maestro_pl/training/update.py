"""The inner loop: GRPO steps on the policy from one weighed rollout."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from maestro_pl.algorithm import Mean, Metrics
from maestro_pl.algorithm.advantages import dead_groups
from maestro_pl.algorithm.losses import RolloutTokens, grpo_loss, high_entropy, k3, repeated, segment_sum, token_weights
from maestro_pl.algorithm.mismatch import mismatch_correction
from maestro_pl.algorithm.settings import KL, Loss, Unlabelled
from maestro_pl.conductor.weighers import WeighedRollout
from maestro_pl.errors import UserError
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.padding import token_index
from maestro_pl.policy.passes import pass_tokens, row_batches
from maestro_pl.policy.scoring import TokenStatistics, evaluating
from maestro_pl.rollout import Rollout
from maestro_pl.run.ranks import everywhere
from maestro_pl.training.clock import StageClock
from maestro_pl.training.stepping import Steppable, Stepper


class Host(Steppable, Protocol):
    """What the update needs of the LightningModule around it."""

    clock: StageClock
    stepper: Stepper
    skipped_steps: int
    max_new_tokens: int

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""


class PolicyUpdate:
    """GRPO steps on the policy from one rollout, in micro-batches of whole groups where they fit (Eq. 7 and 8).

    Args:
        module: whose policy is trained.
        loss: the loss.
        kl: the penalty on the distance to the reference.
        unlabelled: whether groups without a label train.
        steps: optimizer steps on one rollout.
    """

    whole_groups = False  # True: a group is never cut, even where it alone is longer than `micro_batch_tokens`
    coupled = False  # True: the Conductor's gradient is of the policy's loss too

    def __init__(self, module: Host, loss: Loss, kl: KL, unlabelled: Unlabelled = "weighed", steps: int = 1) -> None:
        self.module, self.loss, self.kl, self.steps = module, loss, kl, steps
        self.unlabelled = unlabelled

    def less_kl(self, rollout: Rollout, scalar_B: Tensor) -> tuple[Tensor, Metrics]:
        """The scalar reward less the KL penalty, where it belongs to the reward (Eq. 8)."""
        if not self.kl.in_reward:
            return scalar_B, {}
        kl_T = k3(self.scored_logps(rollout, "policy"), self.scored_logps(rollout, "reference"))
        penalty_B = self.kl.coef * segment_sum(kl_T, rollout.lengths_B)
        rollout.kl_B = penalty_B.detach().cpu()
        return scalar_B - penalty_B, {"policy/kl": Mean(kl_T.sum(), len(kl_T))}

    def step(self, weighed: WeighedRollout) -> Metrics:
        """The optimizer steps of one batch, and what goes with them: counters, the reference, the schedule."""
        module = self.module
        metrics = self.update(weighed)
        module.skipped_steps += int(float(metrics["policy/skipped"]))
        module.policy_steps += 1
        if module.policy.reference == "synced" and module.policy_steps % module.policy.sync_every == 0:
            module.policy.sync_reference()
        module.policy.whole()
        module.stepper.step_scheduler(0)
        return metrics

    def update(self, weighed: WeighedRollout) -> Metrics:
        """The optimizer steps; none where no response has an advantage or a penalty."""
        rollout = weighed.rollout
        correction_T, metrics = self.mismatch(rollout)
        tokens = replace(self.tokens(weighed), correction_T=correction_T)
        groups = self.active_groups(weighed)
        dead_N = dead_groups(weighed.advantages_B, rollout.group_size)
        metrics |= {"group/dead_fraction": dead_N.float().mean()}
        if not self._any_rank_has(groups):
            return metrics | {"train/loss": 0.0, "policy/skipped": 1.0}
        for number in range(1, self.steps + 1):
            last = number == self.steps
            totals, count, logps_seen_T = self.module.stepper.within_memory(
                lambda tokens=tokens: self.accumulate(rollout, groups, tokens),  # type: ignore[misc]
                lambda: self.pass_tokens(rollout, groups),
            )
            if tokens.old_logps_T is None:  # before the first step, the policy is the one that sampled
                tokens = replace(tokens, old_logps_T=logps_seen_T)
            metrics |= {"train/loss": totals["loss"], "policy/clip_fraction": Mean(totals.get("clip", 0.0), count)}
            if "kl" in totals:
                metrics["policy/kl"] = Mean(totals["kl"], count)
            metrics |= self.finish(totals, last)
        return metrics

    def accumulate(
        self, rollout: Rollout, groups: list[int], tokens: RolloutTokens
    ) -> tuple[dict[str, Tensor], int, Tensor]:
        """Forward and backward of every micro-batch, from zero gradients.

        Returns:
            Sums over the tokens, the number of these tokens, and logps_T as computed here.
        """
        module, passes = self.module, self.passes(rollout, groups)
        module.policy.cut()
        self.zero_grad()
        totals: dict[str, Tensor] = {"loss": torch.zeros((), device=module.device)}
        count = 0  # where no group of this rank has a gradient, others may have one
        logps_seen_T = torch.zeros_like(tokens.weights_T)
        module.policy.train()
        for number, has_work in enumerate(module.policy.passes_together(len(passes))):
            if not has_work:
                module.stepper.backward(module.policy.idle_pass())
                continue
            rows = passes[number]
            module.clock.note(f"micro-batch {number + 1}/{len(passes)}")
            index_T = token_index(rollout.lengths_B, rows).to(module.device)
            loss, sums, logps_T = self.loss_of(rollout, rows, tokens.at(index_T))
            logps_seen_T[index_T] = logps_T
            module.stepper.backward(loss)
            count += len(index_T)
            for name, value in sums.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value
        return totals, count, logps_seen_T

    # -- what a coupled update does otherwise (`training.joint`) -----------------------------------------------------

    def loss_of(
        self, rollout: Rollout, rows: list[int], tokens: RolloutTokens
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of one micro-batch with gradient, detached sums over its tokens, and detached logps_T."""
        logps_T = self.statistics(rollout, rows).logps_T
        loss, sums = grpo_loss(tokens.batch(logps_T, rollout.lengths_B[rows]), self.loss, self.kl)
        return loss, {"loss": loss.detach(), **sums}, logps_T.detach()

    def zero_grad(self) -> None:
        """Begin with zero gradients."""
        self.module.stepper.optimizers[0].zero_grad()

    def finish(self, totals: dict[str, Tensor], last: bool) -> Metrics:
        """Clip and step, after the backward of every micro-batch."""
        return self.module.stepper.finish(totals["loss"], last, self.coupled)

    # -- its parts ---------------------------------------------------------------------------------------------------

    def tokens(self, weighed: WeighedRollout) -> RolloutTokens:
        """What the loss needs of all tokens of the rollout. Collective."""
        rollout, device = weighed.rollout, self.module.device
        chosen_T = None
        if self.loss.top_entropy < 1:
            if rollout.entropies_T is None:
                raise UserError(
                    f"model.loss.top_entropy={self.loss.top_entropy}: the rollout has no entropies; its engine gave none."
                )
            active_T = self.active(weighed).repeat_interleave(rollout.lengths_B)
            chosen_T = high_entropy(rollout.entropies_T.to(device), active_T.to(device), self.loss.top_entropy)
        return RolloutTokens(
            repeated(weighed.advantages_B, rollout.lengths_B.to(device), int(rollout.lengths_B.sum())),
            self.token_weights(weighed).to(device),
            ref_logps_T=self.scored_logps(rollout, "reference") if self.kl.in_loss else None,
            chosen_T=chosen_T,
        )

    def mismatch(self, rollout: Rollout) -> tuple[Tensor | None, Metrics]:
        """What corrects for an engine with probabilities of its own, and how far they are from ours. Collective."""
        if rollout.sampling_logps_T is None:
            return None, {}
        logps_T = rollout.logps_T if rollout.logps_T is not None else self.scored_logps(rollout, "policy")
        correction_T, metrics = mismatch_correction(
            logps_T.to(self.module.device),
            rollout.sampling_logps_T,
            rollout.lengths_B,
            self.loss.mismatch,
            self.loss.mismatch_cap,
        )
        largest = torch.as_tensor(metrics["engine/ratio_max"]).reshape(1)
        return correction_T, metrics | {"engine/ratio_max": everywhere(largest).max()}

    def active(self, weighed: WeighedRollout) -> Tensor:
        """Bool (B,) on the CPU: the responses that the policy is trained on."""
        active_B = torch.ones(len(weighed.rollout), dtype=torch.bool)
        if self.loss.mask_truncated:
            active_B = torch.tensor([reason != "length" for reason in weighed.rollout.finish_reasons])
        if self.unlabelled == "skipped":
            active_B &= ~weighed.scalar_B.isnan().cpu()
        return active_B

    def active_groups(self, weighed: WeighedRollout) -> list[int]:
        """The groups that have a gradient; the others need no forward pass either."""
        size = weighed.rollout.group_size
        silent_N = ~self.active(weighed).view(-1, size).any(1)
        if not self.kl.in_loss:
            silent_N |= dead_groups(weighed.advantages_B.cpu(), size)
        return [n for n, silent in enumerate(silent_N.tolist()) if not silent]

    def token_weights(self, weighed: WeighedRollout) -> Tensor:
        """How much each response token counts in the policy's loss (Eq. 7): weights_T. Collective."""
        module, lengths_B, active_B = self.module, weighed.rollout.lengths_B, self.active(weighed)
        weights_T = token_weights(self.loss.type, lengths_B, active_B, module.max_new_tokens or int(lengths_B.max()))
        over_tokens = self.loss.type in ("dapo", "cispo") or callable(self.loss.type)
        if over_tokens and module.trainer.world_size > 1:  # the mean over the tokens of all ranks
            local = (lengths_B * active_B).sum().float().to(module.device)
            everywhere = module.trainer.strategy.reduce(local.clone(), reduce_op="mean")
            weights_T = weights_T * float(local / everywhere.clamp(min=1.0 / module.trainer.world_size))
        return weights_T

    def statistics(
        self, rollout: Rollout, rows: list[int], context: HiddenContext | None = None, hidden_grad: bool = False
    ) -> TokenStatistics:
        """Token statistics of some responses under the policy, with gradient."""
        return self.module.policy.token_statistics(
            [rollout.prompt_ids[row // rollout.group_size] for row in rows],
            [rollout.response_ids[row] for row in rows],
            temperature=rollout.temperature,
            context=context,
            hidden_grad=hidden_grad,
        )

    def scored_logps(self, rollout: Rollout, which: Literal["policy", "reference"]) -> Tensor:
        """Log-probabilities of the rollout's tokens from a forward pass in eval mode.

        Those of decoding are rounded in another way; against them, a policy that equals its reference would not be at 0.
        """
        if which == "reference" and rollout.ref_logps_T is not None:  # read together with the Conductor's context
            return rollout.ref_logps_T
        module = self.module
        stage = "reference" if which == "reference" else "scoring"
        with torch.no_grad(), evaluating(module.policy), module.clock(stage):
            statistics = module.policy.token_statistics(
                [ids for ids in rollout.prompt_ids for _ in range(rollout.group_size)],
                rollout.response_ids,
                temperature=rollout.temperature,
                which=which,
                max_tokens=module.micro_batch_tokens,
            )
        return statistics.logps_T

    @property
    def pass_limit(self) -> int:
        """Tokens of one forward pass at most, of the moment."""
        return self.module.micro_batch_tokens

    def passes(self, rollout: Rollout, groups: list[int]) -> list[list[int]]:
        """Rows of these groups in passes of at most ``micro_batch_tokens`` tokens; see :func:`row_batches`."""
        module = self.module
        return row_batches(
            *_lengths(rollout), groups, module.micro_batch_tokens, module.policy.packs, self.whole_groups
        )

    def pass_tokens(self, rollout: Rollout, groups: list[int]) -> list[int]:
        """Tokens of each of these passes."""
        lengths, packs = _lengths(rollout), self.module.policy.packs
        return [pass_tokens(*lengths, rows, packs) for rows in self.passes(rollout, groups)]

    def _any_rank_has(self, groups: list[int]) -> bool:
        trainer = self.module.trainer
        if trainer.world_size == 1:
            return bool(groups)
        count = torch.tensor(float(len(groups)), device=self.module.device)
        return float(trainer.strategy.reduce(count, reduce_op="sum")) > 0


def _lengths(rollout: Rollout) -> tuple[list[int], list[list[int]]]:
    """Tokens of each prompt, and of the responses to it."""
    size, lengths = rollout.group_size, rollout.lengths_B.tolist()
    groups = range(len(rollout.prompt_ids))
    return [len(ids) for ids in rollout.prompt_ids], [lengths[n * size : (n + 1) * size] for n in groups]
