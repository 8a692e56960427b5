"""The algorithm: GRPO on the policy, and the Conductor on a slower clock.

``training_step`` is section 3 of MAESTRO (arXiv 2601.07208) from top to bottom; docs/algorithm.md gives every equation.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm.advantages import (
    Aggregation,
    Scaling,
    apply_gate,
    batch_advantages,
    dead_groups,
    group_advantages,
    normalize_rewards,
    scalarise,
    standardize_rewards,
)
from maestro_pl.algorithm.joint import JointDecision, joint_advantages
from maestro_pl.algorithm.losses import (
    ImportanceLevel,
    LossType,
    TokenBatch,
    grpo_loss,
    high_entropy,
    k3,
    segment_sum,
    token_weights,
)
from maestro_pl.algorithm.simplex import on_simplex
from maestro_pl.conductor import (
    AdvantageSignal,
    Credit,
    Decisions,
    LabelSchedule,
    Learner,
    LearnerName,
    MetaBuffer,
    MetaSignal,
    Observation,
    ReinforceLearner,
    anchor_values,
    make_learner,
    meta_loss,
)
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.credits import zscores
from maestro_pl.conductor.weighers import Weigher, Weighing
from maestro_pl.errors import UserError
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.padding import token_index
from maestro_pl.policy.passes import pass_tokens, row_batches
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import evaluating
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout, rollout_of
from maestro_pl.run.ranks import gathered
from maestro_pl.training.policy_module import PolicyModule
from maestro_pl.training.training_log import Metrics, mean_over_ranks, training_metrics

KLPlace: TypeAlias = Literal["loss", "reward"]
Coupling: TypeAlias = Literal["async", "joint"]
Scope: TypeAlias = Literal["response", "group"]
Unlabelled: TypeAlias = Literal["weighed", "skipped"]


class MaestroModule(PolicyModule):
    """A LoRA policy trained by GRPO, and a Conductor that weighs the rewards of each response.

    Rollouts and reward scores come from callbacks, through ``batch["rollout"]``.

    Args:
        policy: the model that is trained.
        weigher: who weighs the rewards: ``maestro_pl.Conductor``, ``EqualWeights``, ``FixedWeights``,
            ``RandomWeights``.
        meta_signal: what the Conductor learns from: ``maestro_pl.AdvantageSignal`` (the paper), ``AnchorSignal``,
            ``LookaheadSignal``, ``CombinedSignal``.
        learner: how it learns: ``reinforce`` (the paper), ``gradient`` or ``ridge``, or a learner with its options
            (``maestro_pl.RidgeLearner``, ...).
        conductor_every: M, policy steps between two updates of the Conductor; the paper's 3.
        conductor_warmup_steps: batches before the first policy step in which the Conductor alone learns, from the
            untrained policy; an anchor labels all of their groups. They do not count in ``trainer.max_steps``, and
            without a Conductor there are none.
        scope: ``response``: every response is weighed by its own weights. ``group``: by the mean weights of its group,
            so that the responses of a group are compared by one ruler.
        anchor_fraction: share of the groups that the rewards with role ``anchor`` score in training, where the
            meta-signal or ``hybrid`` reads them; null is one group a step. Groups left out cost nothing.
        anchor_seed: of the draw of those groups.
        hybrid: on labelled groups, the share of the anchor itself in the scalar reward; the rest is the weighed reward.
            0 trains the policy on the weighed rewards only.
        unlabelled: what groups without a label train the policy on: the ``weighed`` rewards, or nothing (``skipped``),
            which with ``hybrid: 1`` uses the labels alone.
        coupling: ``async`` (the paper): no gradient flows between the two. ``joint``, its ablation: the policy's loss
            also moves the Conductor, through the weights, and the Conductor's also moves the policy, through h; both
            step at every optimizer step of the policy, and ``conductor_every`` is not read.
        optimizer: of the policy.
        conductor_optimizer: of the Conductor; the paper's AdamW at 5e-5.
        scheduler: of the policy's learning rate, stepped once a policy step.
        conductor_scheduler: of the Conductor's learning rate, stepped once an update of the Conductor.
        loss_type: ``dapo``, ``grpo``, ``dr_grpo`` and ``bnpo`` differ in how token losses are averaged; ``cispo``,
            ``sapo`` and ``luspo`` are other surrogates (``maestro_pl.algorithm.losses``).
        importance_level: probability ratio of each ``token``, or of the whole ``sequence`` (GSPO).
        clip_low: lower clip range of the probability ratio, 1 - clip_low.
        clip_high: upper clip range, 1 + clip_high; with ``cispo`` the cap of the ratio itself (4 to 8 are usual).
        delta: upper bound of the ratio where the advantage is negative; null sets none.
        sapo_temperatures: of ``sapo``, for positive and for other advantages.
        top_entropy: share of the tokens, the most uncertain ones, whose surrogate counts; 1 takes all.
        kl_coef: weight of the k3 KL penalty to the reference; 0 leaves the reference out.
        kl_in: add the penalty to the ``loss`` (per token) or take it off the ``reward`` (summed over the response).
        kl_unbiased: in the loss, multiply k3 by the probability ratio, so that its gradient is that of the KL; false is
            the GRPO paper's term.
        aggregation: ``sum_then_normalize`` takes advantages of the weighed sum inside each group;
            ``normalize_then_sum`` standardises every reward inside its group first and the sum over the batch (GDPO).
        advantage_scale: what advantages are divided by: the standard deviation of the ``group``, of the ``batch``, or
            ``none``; GDPO has its own.
        updates_per_rollout: optimizer steps on one rollout.
        max_grad_norm: gradient norm that the policy's gradient is clipped to; 0 does not clip.
        micro_batch_tokens: at most this many tokens in one forward pass of the update. Groups stay whole where they
            fit; one that is longer alone is cut between its responses (never with ``coupling: joint``). Where memory
            runs out, the limit is halved for the rest of the run and the update begins anew.
        mask_truncated: leave responses that hit the token limit out of the loss.
    """

    def __init__(
        self,
        policy: LoRAPolicy,
        weigher: Weigher,
        meta_signal: MetaSignal = AdvantageSignal(),  # noqa: B008 (stateless)
        learner: LearnerName | Learner = "reinforce",
        conductor_every: int = 3,
        conductor_warmup_steps: int = 0,
        scope: Scope = "response",
        anchor_fraction: float | None = None,
        anchor_seed: int = 0,
        hybrid: float = 0.0,
        unlabelled: Unlabelled = "weighed",
        coupling: Coupling = "async",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        conductor_optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5),
        scheduler: LRSchedulerCallable | None = None,
        conductor_scheduler: LRSchedulerCallable | None = None,
        loss_type: LossType = "dapo",
        importance_level: ImportanceLevel = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        delta: float | None = None,
        sapo_temperatures: tuple[float, float] = (1.0, 1.05),
        top_entropy: float = 1.0,
        kl_coef: float = 0.0,
        kl_in: KLPlace = "loss",
        kl_unbiased: bool = True,
        aggregation: Aggregation = "sum_then_normalize",
        advantage_scale: Scaling = "group",
        updates_per_rollout: int = 1,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 16384,
        mask_truncated: bool = False,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, max_grad_norm, micro_batch_tokens)
        if clip_low > 1:
            raise UserError(f"model.clip_low={clip_low}: the ratio is clipped to 1 - clip_low; expected at most 1.")
        if not 0 < top_entropy <= 1:
            raise UserError(f"model.top_entropy={top_entropy}: expected a share of the tokens in (0, 1].")
        if delta is not None and not delta > 0:
            raise UserError(f"model.delta={delta}: expected a bound above 0 (above 1 + clip_high to matter), or null.")
        if len(sapo_temperatures) != 2 or not min(sapo_temperatures) > 0:
            raise UserError(f"model.sapo_temperatures={list(sapo_temperatures)}: expected two numbers above 0.")
        for name, chosen, known in (
            ("coupling", coupling, Coupling),
            ("loss_type", loss_type, LossType),
            ("importance_level", importance_level, ImportanceLevel),
            ("kl_in", kl_in, KLPlace),
            ("aggregation", aggregation, Aggregation),
            ("advantage_scale", advantage_scale, Scaling),
            ("scope", scope, Scope),
            ("unlabelled", unlabelled, Unlabelled),
        ):
            if chosen not in get_args(known):
                raise UserError(f"model.{name}={chosen!r}: expected one of {', '.join(get_args(known))}.")
        if loss_type == "cispo" and clip_high < 1:
            rank_zero_warn(
                f"model.clip_high={clip_high}: `cispo` caps the ratio at clip_high itself, so every token's gradient is "
                "scaled down to it; values of 4 to 8 are usual."
            )
        for name, value, least in (
            ("conductor_every", conductor_every, 1),
            ("updates_per_rollout", updates_per_rollout, 1),
            ("clip_low", clip_low, 0),
            ("clip_high", clip_high, 0),
            ("kl_coef", kl_coef, 0),
            ("conductor_warmup_steps", conductor_warmup_steps, 0),
        ):
            if not value >= least:
                raise UserError(f"model.{name}={value}: expected at least {least}.")
        if not 0 <= hybrid <= 1:
            raise UserError(
                f"model.hybrid={hybrid}: expected the anchor's share of the reward on labelled groups, in [0, 1]."
            )
        if unlabelled == "skipped" and hybrid != 1:
            raise UserError(
                f"model.unlabelled=skipped trains on the labels alone, and model.hybrid={hybrid}: give hybrid: 1, or "
                "unlabelled: weighed."
            )
        learner = make_learner(learner)
        if coupling == "joint" and conductor_warmup_steps:
            raise UserError(
                f"model.conductor_warmup_steps={conductor_warmup_steps} with coupling=joint: policy and Conductor step "
                "together there, so there is no warm-up; give 0."
            )
        if coupling == "joint":
            self._check_joint(weigher, meta_signal, learner, aggregation, advantage_scale)
        self.weigher = weigher
        self.meta_signal, self.learner = meta_signal, learner
        self.conductor_every = conductor_every
        self.conductor_warmup_steps = conductor_warmup_steps if isinstance(weigher, Conductor) else 0
        self.scope: Scope = scope
        self.hybrid = hybrid
        self.unlabelled: Unlabelled = unlabelled
        self.label_schedule = LabelSchedule(anchor_fraction, anchor_seed)
        self.warmup_done = 0  # batches of the warm-up behind us
        self.labelled_groups = 0  # groups that the anchors were asked about
        self.coupling: Coupling = coupling
        self.make_conductor_optimizer, self.make_conductor_scheduler = conductor_optimizer, conductor_scheduler
        self.loss_type: LossType = loss_type
        self.importance_level: ImportanceLevel = importance_level
        self.clip_low, self.clip_high, self.delta = clip_low, clip_high, delta
        self.sapo_temperatures: tuple[float, float] = (sapo_temperatures[0], sapo_temperatures[1])
        self.top_entropy = top_entropy
        self.kl_coef, self.kl_in, self.kl_unbiased = kl_coef, kl_in, kl_unbiased
        self.aggregation: Aggregation = aggregation
        self.advantage_scale: Scaling = advantage_scale
        self.updates_per_rollout = updates_per_rollout
        self.mask_truncated = mask_truncated
        self.buffer = MetaBuffer()
        self.conductor_updates = 0

    # -- one training step -------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step of the inner loop and, every ``conductor_every`` steps, one of the outer loop."""
        rollout = rollout_of(batch)
        warming = self.warmup_done < self.conductor_warmup_steps
        with self.stages("update"):
            rewards_BK, mask_BK = self.normalized_rewards(rollout)  # Eq. 4
            weighing = self.weigh(rollout, rewards_BK, mask_BK, sample=True)  # Eq. 1 to 3
            # Eq. 5, and 14 where an anchor has a share in it
            scalar_B, metrics = self.scalar_reward(rollout, rewards_BK, weighing.weights_BK, mask_BK, training=True)
            advantages_B = self.advantages(scalar_B, rollout.group_size)  # Eq. 6
            rollout.scalar_B, rollout.advantages_B = scalar_B.cpu(), advantages_B.cpu()
            metrics |= self._count_labels(rollout)
            if self.coupling == "async":
                metrics |= self.remember(rollout, rewards_BK, mask_BK, weighing)  # Eq. 9 and 10

            if not warming:
                joint = (
                    self._joint_decision(rollout, rewards_BK, mask_BK, weighing) if self.coupling == "joint" else None
                )
                metrics |= self.update_policy(rollout, advantages_B, joint)  # Eq. 7 and 8
                self.skipped_steps += int(metrics["policy/skipped"])
                self.policy_steps += 1
                if self.policy.reference == "synced" and self.policy_steps % self.policy.sync_every == 0:
                    self.policy.sync_reference()
                self.step_scheduler(0)
            else:
                self.warmup_done += 1

            due = warming or self.policy_steps % self.conductor_every == 0
            if due and self.coupling == "async" and any(gathered(len(self.buffer) > 0)):
                metrics |= self.update_conductor()  # Eq. 9, or 11 to 13
        metrics |= training_metrics(rollout, self.stages)
        self.log_dict(mean_over_ranks({name: float(value) for name, value in metrics.items()}), batch_size=len(rollout))
        self.stop_at_max_steps()

    def normalized_rewards(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The weighed rewards, each normalised inside its group: rewards_BK and the mask of those that apply (Eq. 4)."""
        scores = [rollout.rewards[spec.name] for spec in self.reward_specs if spec.role == "train"]
        mask_BK = torch.stack([s.mask_B for s in scores], dim=1).to(self.device)
        columns = [normalize_rewards(s.values_B, s.mask_B, rollout.group_size, s.spec.normalize) for s in scores]
        rewards_BK = torch.stack(columns, dim=1).to(self.device)
        if self.aggregation == "normalize_then_sum":
            rewards_BK = standardize_rewards(rewards_BK, mask_BK, rollout.group_size)
        return rewards_BK, mask_BK

    def weigh(self, rollout: Rollout, rewards_BK: Tensor, mask_BK: Tensor, sample: bool) -> Weighing:
        """Let the weigher decide, without gradient, and write its decision into the rollout (Eq. 1 to 3)."""
        with torch.no_grad():
            weighing: Weighing = self.weigher(rollout.hidden_BD, rewards_BK, mask_BK, sample)
        if self.scope == "group":
            weights_BK = group_weights(weighing.weights_BK, mask_BK, rollout.group_size)
            weighing = weighing._replace(weights_BK=weights_BK)
        rollout.weights_BK, rollout.weight_names = weighing.weights_BK.cpu(), self.weight_names
        rollout.extra["probabilities_BK"] = weighing.probabilities_BK.cpu()
        return weighing

    def weigh_batch(self, rollout: Rollout, sample: bool) -> None:
        """Equations 4, 2 and 5 for an evaluation: normalise, weigh, scalarise."""
        rewards_BK, mask_BK = self.normalized_rewards(rollout)
        weighing = self.weigh(rollout, rewards_BK, mask_BK, sample)
        rollout.scalar_B = self.scalar_reward(rollout, rewards_BK, weighing.weights_BK, mask_BK)[0].cpu()
        rollout.advantages_B = self.advantages(rollout.scalar_B, rollout.group_size)

    def scalar_reward(
        self, rollout: Rollout, rewards_BK: Tensor, weights_BK: Tensor, mask_BK: Tensor, training: bool = False
    ) -> tuple[Tensor, Metrics]:
        """R = sum_k w_k r_k, gated, less the KL penalty where it belongs to the reward (Eq. 5).

        In training, anchors may have a share in it (Eq. 14); a group that is then skipped is NaN.
        """
        scalar_B = scalarise(rewards_BK, weights_BK, mask_BK)
        skipped_B = torch.zeros_like(scalar_B, dtype=torch.bool)
        if training and self.hybrid:
            scalar_B, skipped_B = self.with_anchor(rollout, scalar_B)
        for open_B in self.gates(rollout):
            scalar_B = apply_gate(scalar_B, open_B.to(scalar_B.device), rollout.group_size)
        scalar_B = scalar_B.masked_fill(skipped_B, torch.nan)
        if not self.kl_coef or self.kl_in == "loss":
            return scalar_B, {}
        kl_T = k3(self.scored_logps(rollout, "policy"), self.scored_logps(rollout, "reference"))
        penalised_B = scalar_B - self.kl_coef * segment_sum(kl_T, rollout.lengths_B)
        return penalised_B, {"policy/kl": kl_T.mean()}

    def with_anchor(self, rollout: Rollout, scalar_B: Tensor) -> tuple[Tensor, Tensor]:
        """On labelled groups, let the anchor itself enter the scalar reward (Eq. 14).

        R <- (1 - hybrid) z(R) + hybrid v, v the anchors' value and z(R) the z-score in the group; a response that the
        anchor did not score has no place on that scale and gets none. Groups without a label, and those whose anchor is
        the same for all responses, keep R; with ``unlabelled: skipped`` they are skipped.

        Returns:
            scalar_B, and bool skipped_B.
        """
        value_B = anchor_values(rollout).to(scalar_B.device)
        known_N = (~value_B.isnan()).view(-1, rollout.group_size).any(1) & self.labelled(rollout).to(scalar_B.device)
        z_B = normalize_rewards(scalar_B.nan_to_num(0.0), ~scalar_B.isnan(), rollout.group_size, "zscore")
        known_B = known_N.repeat_interleave(rollout.group_size)
        mixed_B = torch.where(known_B, (1.0 - self.hybrid) * z_B + self.hybrid * value_B, scalar_B)
        return mixed_B, ~known_B if self.unlabelled == "skipped" else torch.zeros_like(known_B)

    @property
    def batches_done(self) -> int:
        """Training batches behind us, those of the warm-up included."""
        return self.warmup_done + self.policy_steps

    @property
    def uses_anchor(self) -> bool:
        """Whether rewards with the role ``anchor`` are read in training, so that they must be scored there."""
        return self.hybrid > 0 or (self.meta_signal.uses_anchor and isinstance(self.weigher, Conductor))

    def labelled(self, rollout: Rollout) -> Tensor:
        """Bool (N,): the groups of the training batch at hand that the anchors score, the same whenever it is asked."""
        count = len(rollout.prompts)
        if not self.uses_anchor:
            return torch.zeros(count, dtype=torch.bool)
        if self.warmup_done < self.conductor_warmup_steps:
            return torch.ones(count, dtype=torch.bool)
        return self.label_schedule.draw(count, self.policy_steps, self.global_rank)

    def _count_labels(self, rollout: Rollout) -> Metrics:
        if not self.uses_anchor:
            return {}
        self.labelled_groups += int(self.labelled(rollout).sum())
        return {"anchor/labelled_groups": float(self.labelled_groups)}

    def gate_product(self, rollout: Rollout) -> Tensor:
        """How far all gates together are open for each response, in [0, 1]."""
        open_B = torch.ones(len(rollout))
        for gate_B in self.gates(rollout):
            open_B = open_B * gate_B
        return open_B

    def gates(self, rollout: Rollout) -> list[Tensor]:
        """How far each gate is open for each response, in [0, 1]; one that does not apply is open."""
        scores = [rollout.rewards[spec.name] for spec in self.reward_specs if spec.role == "gate"]
        for gate in scores:
            _check_gate(gate)
        return [torch.where(gate.mask_B, gate.values_B, torch.ones_like(gate.values_B)) for gate in scores]

    def advantages(self, scalar_B: Tensor, group_size: int) -> Tensor:
        """Group-relative advantages, or those of GDPO (Eq. 6)."""
        if self.aggregation == "normalize_then_sum":
            return batch_advantages(scalar_B)
        return group_advantages(scalar_B, group_size, self.advantage_scale)

    def update_policy(self, rollout: Rollout, advantages_B: Tensor, joint: JointDecision | None = None) -> Metrics:
        """GRPO steps on the policy from one rollout, in micro-batches of whole groups (Eq. 7 and 8).

        With ``joint``, the Conductor is trained in the same steps.
        """
        lengths_B, group_size = rollout.lengths_B, rollout.group_size
        active_B = self._active(rollout)
        penalised = self.kl_coef > 0 and self.kl_in == "loss"
        tokens = {
            "advantages_T": advantages_B.repeat_interleave(lengths_B.to(self.device)),
            "weights_T": self.loss_token_weights(rollout).to(self.device),
        }
        if penalised:
            tokens["ref_logps_T"] = self.scored_logps(rollout, "reference")
        if self.top_entropy < 1:
            tokens["chosen_T"] = self._chosen_tokens(rollout, active_B.repeat_interleave(lengths_B))

        silent_N = ~active_B.view(-1, group_size).any(1)
        if not penalised:
            silent_N |= dead_groups(advantages_B.cpu(), group_size)  # no loss, no gradient: no forward either
        groups = [n for n, silent in enumerate(silent_N.tolist()) if not silent]
        metrics: Metrics = {"group/dead_fraction": dead_groups(advantages_B, group_size).float().mean()}
        if self._any_rank_has(groups) and not groups:
            groups = [0]  # its gradient is zero, but the other ranks wait for this one in their backward
        if not groups:
            return metrics | {"train/loss": 0.0, "policy/skipped": 1.0}
        for update in range(self.updates_per_rollout):
            last = update == self.updates_per_rollout - 1
            metrics |= self._step_policy(rollout, groups, tokens, last, joint)
        return metrics

    def _step_policy(
        self,
        rollout: Rollout,
        groups: list[int],
        tokens: dict[str, Tensor],
        last: bool,
        joint: JointDecision | None = None,
    ) -> Metrics:
        """One optimizer step: forward and backward of every micro-batch, clip, step.

        ``tokens`` holds what a :class:`TokenBatch` needs of all tokens of the rollout. The first of several steps adds
        its own log-probabilities as ``old_logps_T``: before it, the policy is the one that sampled.
        """
        totals, count, logps_seen_T = self.within_memory(
            lambda: self.accumulate(rollout, groups, tokens, joint),
            lambda: self.pass_tokens_of(rollout, groups, joint is not None),
        )
        if "old_logps_T" not in tokens and not last:
            tokens["old_logps_T"] = logps_seen_T
        metrics: Metrics = {"train/loss": totals["loss"], "policy/clip_fraction": totals["clip"] / count}
        if "kl" in totals:
            metrics["policy/kl"] = totals["kl"] / count
        metrics |= self.finish_policy_step(totals["loss"], last)
        if joint is not None and rollout.hidden_BD is not None:
            metrics |= {name: value for name, value in totals.items() if name.startswith("conductor/")}
            with torch.no_grad():
                before_BK = self._conductor.probabilities(rollout.hidden_BD, joint.mask_BK)
            stepped = self._step_conductor_optimizer()
            metrics |= {f"conductor/{name}": value for name, value in stepped.items()}
            if not stepped:
                self.conductor_updates += 1
                metrics |= self._conductor_metrics(rollout.hidden_BD, joint.mask_BK, before_BK)
        return metrics

    def accumulate(
        self,
        rollout: Rollout,
        groups: list[int],
        tokens: dict[str, Tensor],
        joint: JointDecision | None = None,
        whole_groups: bool = False,
    ) -> tuple[dict[str, Tensor], int, Tensor]:
        """Forward and backward of every micro-batch, from zero gradients.

        Returns:
            Sums over the tokens, the number of these tokens, and logps_T as computed here.
        """
        micro_batches = self.micro_batches(rollout, groups, whole_groups=whole_groups or joint is not None)
        for optimizer in self._optimizers() if joint is not None else self._optimizers()[:1]:
            optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        count = 0
        on_policy = "old_logps_T" not in tokens
        logps_seen_T = torch.zeros_like(tokens["weights_T"])
        self.policy.train()
        for index, rows in enumerate(micro_batches):
            self.stages.note(f"micro-batch {index + 1}/{len(micro_batches)}")
            tokens_of = token_index(rollout.lengths_B, rows).to(self.device)
            statistics = self.policy.token_statistics(
                [rollout.prompt_ids[row // rollout.group_size] for row in rows],
                [rollout.response_ids[row] for row in rows],
                temperature=rollout.temperature,
                context=self.context if joint is not None else None,
                hidden_grad=joint is not None,
            )
            here = {name: values_T[tokens_of] for name, values_T in tokens.items()}
            if on_policy:
                here["old_logps_T"] = logps_seen_T[tokens_of] = statistics.logps_T.detach()
            meta: Tensor | None = None
            meta_sums: dict[str, Tensor] = {}
            if joint is not None and statistics.hidden_BD is not None:
                advantages_B, meta, meta_sums = self._joint_terms(
                    statistics.hidden_BD, joint.rows(rows), rollout.group_size, len(rows) / len(rollout)
                )
                here["advantages_T"] = advantages_B.repeat_interleave(rollout.lengths_B[rows].to(self.device))
            loss, sums = grpo_loss(
                TokenBatch(statistics.logps_T, lengths_B=rollout.lengths_B[rows], **here),
                loss_type=self.loss_type,
                importance_level=self.importance_level,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                delta=self.delta,
                sapo_temperatures=self.sapo_temperatures,
                kl_coef=self.kl_coef,
                kl_unbiased=self.kl_unbiased,
            )
            self.backward_part(loss if meta is None else loss + meta, sync=index == len(micro_batches) - 1)
            count += len(tokens_of)
            for name, value in {"loss": loss.detach(), **sums, **meta_sums}.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value
        return totals, count, logps_seen_T

    def _joint_decision(
        self, rollout: Rollout, rewards_BK: Tensor, mask_BK: Tensor, weighing: Weighing
    ) -> JointDecision:
        assert weighing.action_B is not None  # a Conductor draws actions in training
        assert rollout.scalar_B is not None
        open_B = self.gate_product(rollout).to(self.device)
        return JointDecision(weighing.action_B, rewards_BK, mask_BK, open_B, rollout.scalar_B.to(self.device))

    def _joint_terms(
        self, hidden_BD: Tensor, decision: JointDecision, group_size: int, share: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Advantages and Eq. 9 of some groups, both with gradients into the policy and the Conductor."""
        conductor, signal = self._conductor, self.meta_signal
        assert isinstance(signal, AdvantageSignal)  # checked at the start
        probabilities_BK = conductor.probabilities(hidden_BD, decision.mask_BK)
        advantages_B = joint_advantages(
            probabilities_BK, decision, group_size, conductor.action, conductor.mix_rate, self.advantage_scale
        )
        log_prob_B = conductor.log_prob(probabilities_BK, decision.action_B)
        loss, metrics = meta_loss(log_prob_B, advantages_B.detach(), probabilities_BK, signal.entropy_coef)
        return advantages_B, share * loss, {f"conductor/{name}": share * value for name, value in metrics.items()}

    def remember(self, rollout: Rollout, rewards_BK: Tensor, mask_BK: Tensor, weighing: Weighing) -> Metrics:
        """Buffer the Conductor's decisions with what the meta-signal says they were worth."""
        h_BD = rollout.hidden_BD if weighing.h_BD is None else weighing.h_BD
        if not isinstance(self.weigher, Conductor) or h_BD is None:
            return {}
        assert rollout.scalar_B is not None
        assert rollout.advantages_B is not None
        h_BD, advantages_B = h_BD.to(self.device), rollout.advantages_B.to(self.device)
        z_BK = zscores(rewards_BK, mask_BK, rollout.group_size)
        self.weigher.observe_rewards(z_BK, mask_BK)
        labelled_N = self.labelled(rollout)
        scalar_B = rollout.scalar_B.to(self.device)
        credit: Credit = self.meta_signal.observe(
            Observation(self, rollout, rewards_BK, mask_BK, z_BK, weighing, scalar_B, advantages_B, labelled_N)
        )
        group_B = torch.arange(len(rollout), device=self.device) // rollout.group_size
        none_B = torch.full((len(rollout),), -1, dtype=torch.long, device=self.device)
        decisions = Decisions(
            h_BD.detach().float(),
            mask_BK,
            none_B if weighing.action_B is None else weighing.action_B,
            advantages_B.detach(),
            group_B,
            self.conductor_updates,
            log_prob_B=None if weighing.log_prob_B is None else weighing.log_prob_B.detach(),  # type: ignore[arg-type]
            credit_BK=credit.credit_BK.detach().float(),
            value_B=None if credit.value_B is None else credit.value_B.detach().float(),  # type: ignore[arg-type]
            z_BK=z_BK.detach().float(),
        )
        rows_B = mask_BK.any(-1) & h_BD.isfinite().all(-1)
        known_B = ~decisions.credit_BK.isnan().all(1) & rows_B
        if bool(known_B.any()) or self.trainer.world_size > 1:  # ranks update together, whatever each of them knows
            self.buffer.add(decisions.rows(rows_B))
        return {f"conductor/{name}": value for name, value in credit.metrics.items()}

    def update_conductor(self) -> Metrics:
        """One step of the outer loop on the buffered decisions; no gradient reaches the policy."""
        conductor, decisions = self._conductor, self.buffer.joined()
        with torch.no_grad():
            before_BK = conductor.probabilities(decisions.h_BD, decisions.mask_BK)
        metrics = self.learner.learn(self, conductor, self.buffer)
        self.buffer.clear(self.learner.replay)
        if not metrics.get("skipped"):
            self.conductor_updates += 1
        logged: Metrics = {f"conductor/{name}": value for name, value in metrics.items()}
        return logged | self._conductor_metrics(decisions.h_BD, decisions.mask_BK, before_BK)

    def step_conductor(self, loss: Tensor) -> Metrics:
        """Backward of a meta-loss and a step of the Conductor's optimizer; plain metrics without prefix."""
        self._optimizers()[1].optimizer.zero_grad()
        self.backward_part(loss, sync=True)
        return self._step_conductor_optimizer()

    def _step_conductor_optimizer(self) -> Metrics:
        optimizer = self._optimizers()[1].optimizer  # the bare one: Lightning would count its step in global_step
        if not all(bool(p.grad.isfinite().all()) for p in self._conductor.parameters() if p.grad is not None):
            rank_zero_warn(f"Conductor update at step {self.policy_steps} skipped: its gradient is not finite.")
            optimizer.zero_grad()
            return {"skipped": 1.0}
        optimizer.step()
        self._conductor.constrain_()
        self.step_scheduler(1)
        return {}

    def _conductor_metrics(self, h_BD: Tensor, mask_BK: Tensor, before_BK: Tensor) -> Metrics:
        """How far an update has moved the Conductor's decisions."""
        with torch.no_grad():
            after_BK = self._conductor.probabilities(h_BD, mask_BK)
        change = 0.5 * (after_BK - before_BK).abs().sum(-1).mean()  # total variation distance
        return {"conductor/step_change": change, "conductor/tau": self._conductor.tau.detach()}

    @property
    def _conductor(self) -> Conductor:
        assert isinstance(self.weigher, Conductor)  # only a Conductor draws the actions that are learned from
        return self.weigher

    # -- its parts ---------------------------------------------------------------------------------------------------

    def _active(self, rollout: Rollout) -> Tensor:
        """Bool (B,): the responses that the policy is trained on."""
        active_B = torch.ones(len(rollout), dtype=torch.bool)
        if self.mask_truncated:
            active_B = torch.tensor([reason != "length" for reason in rollout.finish_reasons])
        if self.unlabelled == "skipped" and rollout.scalar_B is not None:
            active_B &= ~rollout.scalar_B.isnan()
        return active_B

    def loss_token_weights(self, rollout: Rollout) -> Tensor:
        """How much each response token counts in the policy's loss (Eq. 7): weights_T. Collective."""
        lengths_B, active_B = rollout.lengths_B, self._active(rollout)
        weights_T = token_weights(self.loss_type, lengths_B, active_B, self.max_new_tokens or int(lengths_B.max()))
        if self.loss_type in ("dapo", "cispo") and self.trainer.world_size > 1:  # the mean over the tokens of all ranks
            local = (lengths_B * active_B).sum().float().to(self.device)
            everywhere = self.trainer.strategy.reduce(local.clone(), reduce_op="mean")
            weights_T = weights_T * float(local / everywhere.clamp(min=1.0 / self.trainer.world_size))
        return weights_T

    def _chosen_tokens(self, rollout: Rollout, active_T: Tensor) -> Tensor:
        if rollout.entropies_T is None:
            raise UserError(
                f"model.top_entropy={self.top_entropy}: the rollout has no entropies; its engine gave none."
            )
        return high_entropy(rollout.entropies_T.to(self.device), active_T.to(self.device), self.top_entropy)

    def scored_logps(self, rollout: Rollout, which: Literal["policy", "reference"]) -> Tensor:
        """Log-probabilities of the rollout's tokens from a forward pass in eval mode.

        Those of decoding are rounded in another way; against them, a policy that equals its reference would not be at
        0.
        """
        prompts_B = [ids for ids in rollout.prompt_ids for _ in range(rollout.group_size)]
        stage = "reference" if which == "reference" else "scoring"
        with torch.no_grad(), evaluating(self.policy), self.stages(stage):
            statistics = self.policy.token_statistics(
                prompts_B,
                rollout.response_ids,
                temperature=rollout.temperature,
                which=which,
                max_tokens=self.micro_batch_tokens,
            )
        return statistics.logps_T

    def micro_batches(self, rollout: Rollout, groups: list[int], whole_groups: bool = False) -> list[list[int]]:
        """Rows of these groups in passes of at most ``micro_batch_tokens`` tokens; see :func:`row_batches`."""
        return row_batches(*_lengths(rollout), groups, self.micro_batch_tokens, self.policy.packs, whole_groups)

    def pass_tokens_of(self, rollout: Rollout, groups: list[int], whole_groups: bool) -> list[int]:
        prompts, responses = _lengths(rollout)
        passes = self.micro_batches(rollout, groups, whole_groups)
        return [pass_tokens(prompts, responses, rows, self.policy.packs) for rows in passes]

    def _any_rank_has(self, groups: list[int]) -> bool:
        if self.trainer.world_size == 1:
            return bool(groups)
        count = torch.tensor(float(len(groups)), device=self.device)
        return float(self.trainer.strategy.reduce(count, reduce_op="sum")) > 0

    @staticmethod
    def _check_joint(
        weigher: Weigher, signal: MetaSignal, learner: Learner, aggregation: Aggregation, scale: Scaling
    ) -> None:
        if not isinstance(weigher, Conductor) or weigher.reads == "shuffled" or weigher.action == "soft":
            raise UserError(
                f"model.coupling=joint trains a Conductor that reads its own h, and model.weigher is "
                f"{type(weigher).__name__}: give maestro_pl.Conductor, or coupling async."
            )
        paper = isinstance(signal, AdvantageSignal) and not signal.pairwise_coef and signal.actions == "sampled"
        if not paper or learner.settings != ReinforceLearner().settings:
            raise UserError(
                "model.coupling=joint knows the paper's meta-loss only: leave model.meta_signal and model.learner out, or take "
                "coupling async."
            )
        if aggregation != "sum_then_normalize" or scale == "batch":
            raise UserError(
                f"model.coupling=joint with aggregation={aggregation}, advantage_scale={scale}: advantages must be those of "
                "a group (sum_then_normalize; group or none)."
            )

    # -- Lightning ---------------------------------------------------------------------------------------------------

    @property
    def context(self) -> HiddenContext | None:
        """The hidden state that the weigher reads."""
        return self.weigher.context

    def build(self, reward_specs: list[RewardSpec]) -> None:
        """Fix the rewards of this run and build the weigher for them."""
        names = [spec.name for spec in reward_specs if spec.role == "train"]
        if not names:
            raise UserError(
                "No reward with role 'train' among the callbacks: list at least one under `rewards` (for instance "
                "callbacks.LengthReward), or the policy has nothing to learn from."
            )
        if self.weigher.reward_names and self.weigher.reward_names != names:
            raise UserError(
                f"This module weighs {self.weigher.reward_names}, but the callbacks now give {names}: use the reward set "
                "of the run it comes from, in the same order."
            )
        if not self.weigher.reward_names:
            self.weigher.build(self.policy.hidden_size, names)
            self.weigher.to(self.policy.device)
            if isinstance(self.weigher, Conductor):
                self.meta_signal.check(self)
                self.learner.attach(self.weigher, self.meta_signal)
        super().build(reward_specs)

    def setup(self, stage: str) -> None:
        """See :class:`PolicyModule`; what is learned from must be there where something is learned."""
        super().setup(stage)
        if stage != "fit":
            return
        self._check_anchor(self.reward_specs)
        other = [s.name for s in self.reward_specs if s.role == "train" and s.normalize != "zscore"]
        if other and isinstance(self.weigher, Conductor) and not self.learner.trains_by_gradient:
            rank_zero_warn(
                f"model.learner={type(self.learner).__name__} finds weights for z-scored rewards, and {other} are normalised "
                "otherwise, so that their weights mean something else: give them normalize: zscore."
            )

    def on_train_start(self) -> None:
        """See :class:`PolicyModule`; a learner goes on with what it remembers."""
        super().on_train_start()
        if isinstance(self.weigher, Conductor):
            self.learner.resume(self.weigher)

    def _check_anchor(self, reward_specs: list[RewardSpec]) -> None:
        anchors = [spec.name for spec in reward_specs if spec.role == "anchor"]
        if self.uses_anchor and not anchors:
            raise UserError(
                f"model.meta_signal={type(self.meta_signal).__name__} (or model.hybrid={self.hybrid}) reads an anchor, and no "
                "reward has the role 'anchor': give one, for instance {class_path: callbacks.JudgeReward, init_args: {role: "
                "anchor, ...}}."
            )

    def optimizer_parts(self) -> list[tuple[Any, OptimizerCallable, LRSchedulerCallable | None]]:
        """The policy's, and the weigher's if it learns."""
        parts = super().optimizer_parts()
        learned = [p for p in self.weigher.parameters() if p.requires_grad]
        if learned:
            parts.append((learned, self.make_conductor_optimizer, self.make_conductor_scheduler))
        return parts

    def on_train_end(self) -> None:
        """Say so where steps did not move the policy."""
        if self.skipped_steps:
            rank_zero_warn(
                f"{self.skipped_steps} of {self.policy_steps} policy steps did not move the policy: every response of each "
                "group had the same reward, or none, or the gradient was not finite. See group/dead_fraction."
            )

    def settings(self) -> dict[str, Any]:
        """See :class:`PolicyModule`."""
        names = (
            "conductor_every", "coupling", "loss_type", "importance_level", "clip_low", "clip_high", "delta", "top_entropy",
            "sapo_temperatures", "kl_coef", "kl_in", "kl_unbiased", "advantage_scale", "aggregation", "updates_per_rollout",
            "mask_truncated", "conductor_warmup_steps", "scope", "hybrid", "unlabelled",
        )  # fmt: skip
        return {
            **super().settings(),
            "weigher": type(self.weigher).__name__,
            **{f"weigher.{name}": value for name, value in self.weigher.settings.items()},
            "meta_signal": type(self.meta_signal).__name__,
            **{f"meta_signal.{name}": value for name, value in self.meta_signal.settings.items()},
            "learner": type(self.learner).__name__,
            **{f"learner.{name}": value for name, value in self.learner.settings.items()},
            "anchor_fraction": self.label_schedule.fraction,
            "anchor_seed": self.label_schedule.seed,
            **{name: getattr(self, name) for name in names},
        }

    def training_state(self) -> dict[str, Any]:
        """See :class:`PolicyModule`."""
        return {
            **super().training_state(),
            "conductor_updates": self.conductor_updates,
            "buffer": self.buffer.state_dict(),
            "learner": self.learner.state_dict(),
            "warmup_done": self.warmup_done,
            "labelled_groups": self.labelled_groups,
        }

    def load_training_state(self, saved: dict[str, Any]) -> None:
        """See :class:`PolicyModule`."""
        super().load_training_state(saved)
        self.conductor_updates = saved["conductor_updates"]
        self.buffer.load_state_dict(saved["buffer"])
        self.learner.load_state_dict(saved.get("learner", {}))  # checkpoints of version 0.1 have none
        self.warmup_done = saved.get("warmup_done", 0)
        self.labelled_groups = saved.get("labelled_groups", 0)

    def check_settings(self, saved: dict[str, Any]) -> None:
        """Raise where the checkpoint's Conductor was trained in a way that this run cannot go on with."""
        before, now = saved.get("learner", "ReinforceLearner"), type(self.learner).__name__
        fitted = "RidgeLearner" in (before, now)
        if isinstance(self.weigher, Conductor) and saved.get("weigher") == "Conductor" and before != now and fitted:
            raise UserError(
                f"The checkpoint's Conductor was trained by {before}, this run has model.learner {now}: give the learner of "
                "the run that it comes from, or start a new run."
            )

    def check_rewards(self, saved: list[RewardSpec]) -> None:
        """Raise unless the checkpoint weighs the same rewards in the same order."""
        if not self.weigher.reward_names:  # loaded outside a Trainer
            self.build(saved)
        names = [spec.name for spec in saved if spec.role == "train"]
        if names != self.weight_names:
            raise UserError(
                f"The checkpoint weighs the rewards {names}, this run {self.weight_names}: use the same reward set in the "
                "same order."
            )


def _lengths(rollout: Rollout) -> tuple[list[int], list[list[int]]]:
    """Tokens of each prompt, and of the responses to it."""
    size, lengths = rollout.group_size, rollout.lengths_B.tolist()
    groups = range(len(rollout.prompt_ids))
    return [len(ids) for ids in rollout.prompt_ids], [lengths[n * size : (n + 1) * size] for n in groups]


def _check_gate(gate: RewardScores) -> None:
    outside = gate.mask_B & ((gate.values_B < 0) | (gate.values_B > 1))
    if bool(outside.any()):
        raise UserError(
            f"The gate {gate.spec.name!r} gave {float(gate.values_B[outside][0]):.4g}: a gate is a share in [0, 1]. Give the "
            "reward the role train, or rescale it."
        )


def group_weights(weights_BK: Tensor, mask_BK: Tensor, group_size: int) -> Tensor:
    """Each response weighed by the mean weights of its group, rescaled over the rewards that apply to it."""
    mean_NK = weights_BK.view(-1, group_size, weights_BK.shape[1]).mean(1)
    return on_simplex(mean_NK.repeat_interleave(group_size, 0), mask_BK)
