"""The algorithm: GRPO on the policy, and the Conductor on a slower clock.

``training_step`` is section 3 of MAESTRO (arXiv 2601.07208) from top to bottom; docs/algorithm.md gives every equation.
"""

from __future__ import annotations

from dataclasses import asdict
from math import nan
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.algorithm.advantages import Weighed, advantages_of, dropped_share
from maestro_pl.algorithm.scalar_reward import never_dropped, normalized_rewards, raw_rewards, scalar_reward
from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.algorithm.settings import KL, Advantages, Anchoring, Loss, check_at_least
from maestro_pl.algorithm.simplex import group_weights
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.meta import Meta
from maestro_pl.conductor.outer_loop import OuterLoop
from maestro_pl.conductor.own_code import (
    LEARNER,
    SIGNAL,
    WEIGHER,
    check_begun,
    gain_of,
    is_own,
    numbers_of,
    own_code,
    returned,
    settings_of,
    state_of,
)
from maestro_pl.conductor.weighers import (
    EqualWeights,
    Scored,
    Seen,
    WeighedRollout,
    Weigher,
    Weighing,
    checked_weighing,
)
from maestro_pl.errors import UserError
from maestro_pl.evaluation.metrics import ALL
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import RewardSpec, Rollout, rollout_of
from maestro_pl.run.joining import gathered_rollout
from maestro_pl.run.ranks import everywhere
from maestro_pl.training.joint import JointUpdate, check_joint
from maestro_pl.training.policy_module import PolicyModule
from maestro_pl.training.training_log import rollout_metrics
from maestro_pl.training.update import PolicyUpdate


class MaestroModule(PolicyModule):
    """A LoRA policy trained by GRPO, and a Conductor that weighs the rewards of each response.

    Rollouts and reward scores come from callbacks, through ``batch["rollout"]``.

    Args:
        policy: the model that is trained.
        weigher: who weighs the rewards: ``maestro_pl.Conductor``, ``EqualWeights``, ``FixedWeights``, ``RandomWeights``, or a
            published one (docs/weighers.md). None is ``EqualWeights``; the command line takes a Conductor that learns from
            the anchors where there are any.
        meta: how the Conductor is trained.
        anchoring: which groups the anchors label, and what of the labels enters the reward.
        advantages: from weighed rewards to advantages.
        loss: of the policy.
        kl: the penalty on the distance to the reference.
        optimizer: of the policy.
        scheduler: of the policy's learning rate, stepped once a policy step.
        updates_per_rollout: optimizer steps on one rollout.
        max_grad_norm: gradient norm that the policy's gradient is clipped to; 0 does not clip.
        micro_batch_tokens: at most this many tokens in one forward pass of the update. Groups stay whole where they fit; one
            that is longer alone is cut between its responses (never with ``meta.coupling: joint``). Where memory runs out,
            the limit is halved for the rest of the run and the update begins anew.

    Raises:
        UserError: settings that do not fit together.
    """

    def __init__(
        self,
        policy: LoRAPolicy,
        weigher: Weigher | None = None,
        meta: Meta = Meta(),  # noqa: B008 (frozen, as are the groups below)
        anchoring: Anchoring = Anchoring(),  # noqa: B008
        advantages: Advantages = Advantages(),  # noqa: B008
        loss: Loss = Loss(),  # noqa: B008
        kl: KL = KL(),  # noqa: B008
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        scheduler: Schedule | LRSchedulerCallable | None = None,
        updates_per_rollout: int = 1,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 16384,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, max_grad_norm, micro_batch_tokens)
        check_at_least("model.updates_per_rollout", updates_per_rollout, 1)
        weigher = EqualWeights() if weigher is None else weigher
        check_begun(WEIGHER, weigher, "_parameters", "reward_names")
        if meta.coupling == "joint":
            check_joint(weigher, meta, advantages)
        self.weigher, self.advantages = weigher, advantages
        self.outer = OuterLoop(self, weigher, meta, anchoring)
        update = JointUpdate if meta.coupling == "joint" else PolicyUpdate
        self.inner = update(self, loss, kl, anchoring.unlabelled, updates_per_rollout)

    # -- section 3 of the paper --------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step of the inner loop and, every M of them, one of the outer loop."""
        rollout = rollout_of(batch)
        with self.clock("update"):
            rollout.labelled_N = self.labelled(rollout)
            rewards_BK, mask_BK = normalized_rewards(rollout, self.reward_specs, self.advantages, self.device)  # Eq. 4
            scored = Scored(
                *raw_rewards(rollout, self.reward_specs, self.device), rollout.group_size, self.policy_steps
            )
            with own_code(WEIGHER, self.weigher, "prepare"):
                self.weigher.prepare(scored)
            weighing = self.weigh(rollout, rewards_BK, mask_BK, sample=True)  # Eq. 1 to 3
            scalar_B = scalar_reward(
                rollout, rewards_BK, mask_BK, weighing.weights_BK, self.outer.anchoring
            )  # Eq. 5, 14
            scalar_B, metrics = self.inner.less_kl(rollout, scalar_B)  # Eq. 8
            parts = self._parts(rollout, rewards_BK, weighing, mask_BK, self.outer.anchoring)
            advantages_B = advantages_of(scalar_B, rollout.group_size, self.advantages, parts, everywhere)  # Eq. 6
            metrics |= dropped_share(parts, rollout.group_size, self.advantages)
            gain_B, expected = self.outer.gain(rollout, weighing, rewards_BK, mask_BK)
            gain = gain_of(self.weigher)
            gain_B = gain * gain_B
            advantages_B = gain_B * advantages_B
            if self.outer.anchoring.shrink or gain != 1.0:
                rollout.gain_B = gain_B.cpu()
            metrics |= expected
            weighed = WeighedRollout(rollout, rewards_BK, mask_BK, weighing, scalar_B, advantages_B)
            metrics |= self.outer.remember(weighed)  # Eq. 9 and 10
            with own_code(WEIGHER, self.weigher, "observe"):
                given = self.weigher.observe(Seen(scored, weighed, self.policy, self.inner))
            watched = numbers_of(WEIGHER, self.weigher, "observe", given)
            metrics |= {f"weigher/{name}": value for name, value in watched.items()}
            if not self.outer.warming:
                metrics |= self.inner.step(weighed)  # Eq. 7
            metrics |= self.outer.update_if_due()  # Eq. 9, or 11 to 13
        self.log_step(weighed, metrics)

    def weigh(self, rollout: Rollout, rewards_BK: Tensor, mask_BK: Tensor, sample: bool) -> Weighing:
        """Let the weigher decide, without gradient, and write its decision into the rollout (Eq. 1 to 3)."""
        weighing = checked_weighing(self.weigher, rollout.hidden_BD, rewards_BK, mask_BK, sample)
        if self.advantages.scope == "group":
            weights_BK = group_weights(weighing.weights_BK, mask_BK, rollout.group_size)
            weighing = weighing._replace(weights_BK=weights_BK)
        weighing = self.outer.settled(rollout, weighing, mask_BK)
        rollout.normalized_BK = rewards_BK.cpu()
        rollout.weights_BK, rollout.weight_names = weighing.weights_BK.cpu(), self.weight_names
        rollout.probabilities_BK = weighing.probabilities_BK.cpu()
        return weighing

    def weigh_batch(self, rollout: Rollout, sample: bool) -> None:
        """Equations 4, 2, 5, 8 and 6 for an evaluation: normalise, weigh, scalarise."""
        rewards_BK, mask_BK = normalized_rewards(rollout, self.reward_specs, self.advantages, self.device)
        weighing = self.weigh(rollout, rewards_BK, mask_BK, sample)
        scalar_B, _ = self.inner.less_kl(rollout, scalar_reward(rollout, rewards_BK, mask_BK, weighing.weights_BK))
        rollout.scalar_B = scalar_B.cpu()
        parts = self._parts(rollout, rewards_BK, weighing, mask_BK)
        rollout.advantages_B = advantages_of(scalar_B, rollout.group_size, self.advantages, parts).cpu()

    def _parts(
        self,
        rollout: Rollout,
        rewards_BK: Tensor,
        weighing: Weighing,
        mask_BK: Tensor,
        anchoring: Anchoring | None = None,
    ) -> Weighed:
        """What scalar rewards are made of; what must be kept is asked for where something may be dropped."""
        drops = self.advantages.min_consensus > 0
        kept_B = never_dropped(rollout, anchoring).to(mask_BK.device) if drops else None
        return Weighed(rewards_BK, weighing.weights_BK, mask_BK, kept_B)

    def log_step(self, weighed: WeighedRollout, metrics: Metrics) -> None:
        """Leave scalar rewards and advantages to the observers, and log the step."""
        rollout = weighed.rollout
        rollout.scalar_B, rollout.advantages_B = weighed.scalar_B.cpu(), weighed.advantages_B.cpu()
        if self.frozen_states.read:
            metrics |= {"conductor/prompts_read": float(self.frozen_states.read)}
        rollout.everywhere = gathered_rollout(rollout)
        self.log_training(metrics | rollout_metrics(rollout.of_all_ranks), len(rollout))

    # -- what the callbacks ask --------------------------------------------------------------------------------------

    @property
    def context(self) -> HiddenContext | None:
        """The hidden state that the weigher reads."""
        with own_code(WEIGHER, self.weigher, "context"):
            context = self.weigher.context
        if context is not None and not isinstance(context, HiddenContext):
            raise returned(WEIGHER, self.weigher, "context", context)
        return context

    @property
    def batches_done(self) -> int:
        """Training batches behind us, those of the warm-up included."""
        return self.outer.batches_done

    @property
    def warmup(self) -> tuple[int, int]:
        """Batches of the Conductor's warm-up that are done, and how many there are."""
        return self.outer.warmup_done, self.outer.warmup

    def labelled(self, rollout: Rollout) -> Tensor:
        """Bool (N,): the groups of the training batch at hand that the anchors score, the same whenever it is asked."""
        return self.outer.labelled(rollout)

    def shown(self, rollout: Rollout) -> Tensor | None:
        """Bool (B,): the responses of labelled groups that the anchors are shown; None: all."""
        return self.outer.shown(rollout, self.reward_specs)

    @property
    def shown_by_rewards(self) -> bool:
        """Whether the responses that anchors are shown are chosen by the rewards that are scored before them."""
        return self.outer.anchoring.responses is not None and self.outer.anchoring.shown != "random"

    # -- Lightning ---------------------------------------------------------------------------------------------------

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
            if self.context is not None and self.context.state == "base":
                self.policy.check_base()
            with own_code(WEIGHER, self.weigher, "build"):
                self.weigher.build(self.policy.hidden_size, names)
            self.weigher.to(self.policy.device)
            self._check_weigher()
            with own_code(WEIGHER, self.weigher, "check"):
                self.weigher.check(self.policy)
            self.outer.attach()
        super().build(reward_specs)

    def _check_weigher(self) -> None:
        learned = [name for name, parameter in self.weigher.named_parameters() if parameter.requires_grad]
        if learned and not isinstance(self.weigher, Conductor):
            raise UserError(
                f"model.weigher={type(self.weigher).__name__} has parameters to learn ({', '.join(learned[:3])}), and only a "
                "maestro_pl.Conductor is trained: derive it from maestro_pl.Conductor, or freeze them with "
                "requires_grad_(False)."
            )

    def _check_saved(self) -> None:
        """Ask for what checkpoints will hold of classes of a user's own before hours are spent on it."""
        self.settings()
        for option, thing in ((WEIGHER, self.weigher), (LEARNER, self.outer.learner)):
            if is_own(thing):
                state_of(option, thing)

    def setup(self, stage: str) -> None:
        """See :class:`PolicyModule`; what is learned from must be there where something is learned."""
        super().setup(stage)
        if stage != "fit":
            return
        self._check_saved()
        self._check_anchor(self.reward_specs)
        if self.weigher.reads_validation and not self.trainer.enable_validation:
            raise UserError(
                f"model.weigher={type(self.weigher).__name__} learns from validations, and this run has none: give "
                "trainer.limit_val_batches above 0 and trainer.val_check_interval, and validation prompts."
            )
        other = [s.name for s in self.reward_specs if s.role == "train" and s.normalize != "zscore"]
        if other and isinstance(self.weigher, Conductor) and not self.outer.learner.trains_by_gradient:
            rank_zero_warn(
                f"model.meta.learner={type(self.outer.learner).__name__} finds weights for z-scored rewards, and {other} are "
                "normalised otherwise, so that their weights mean something else: give them normalize: zscore."
            )
        alike = [s.name for s in self.reward_specs if s.role == "train" and s.normalize == "zscore"]
        if alike and self.advantages.aggregation == "dvao":
            rank_zero_warn(
                f"model.advantages.aggregation=dvao lets a reward count as it varies in a group, and {alike} are z-scored "
                "there, so that all vary alike, as with mo_grpo: give them normalize: none."
            )

    def on_validation_epoch_end(self) -> None:
        """See :class:`EvaluationLoop`; the weigher hears of every whole validation of ``fit``."""
        super().on_validation_epoch_end()
        trainer = self.trainer
        whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if trainer.state.fn == "fit" and whole:
            means = {row["metric"]: row["mean"] for row in self.evaluation if row["task"] == ALL}
            mean_K = torch.tensor([means.get(f"reward/{name}", nan) for name in self.weight_names])
            with own_code(WEIGHER, self.weigher, "validated"):
                self.weigher.validated(mean_K)

    def on_train_start(self) -> None:
        """See :class:`PolicyModule`; a learner goes on with what it remembers."""
        super().on_train_start()
        self.outer.resume()
        self.outer.announce(self._training_tasks())

    def _check_anchor(self, reward_specs: list[RewardSpec]) -> None:
        anchors = [spec.name for spec in reward_specs if spec.role == "anchor"]
        if self.outer.uses_anchor and not anchors:
            raise UserError(
                f"model.meta.signal={type(self.outer.meta.signal).__name__} (or model.anchoring.hybrid="
                f"{self.outer.anchoring.hybrid}) reads an anchor, and no reward has the role 'anchor': give one, for instance "
                "{class_path: callbacks.JudgeReward, init_args: {role: anchor, ...}}."
            )

    def optimizer_parts(self) -> list[tuple[Any, OptimizerCallable, Schedule | LRSchedulerCallable | None]]:
        """The policy's, and the weigher's if it learns."""
        parts = super().optimizer_parts()
        learned = [p for p in self.weigher.parameters() if p.requires_grad]
        if learned:
            parts.append((learned, self.outer.meta.optimizer, self.outer.meta.scheduler))
        return parts

    def scheduled_steps(self) -> list[int | None]:
        """The policy's once a step, the weigher's once an update."""
        (steps, *_), meta = super().scheduled_steps(), self.outer.meta
        if steps is None or meta.coupling == "joint":
            return [steps, steps]
        return [steps, self.outer.warmup + steps // meta.every]

    def _training_tasks(self) -> list[str]:
        """Tasks of the training rows, where the data module knows them."""
        trainer: Any = self.trainer
        rows = getattr(trainer.datamodule, "rows", None)
        return sorted({str(row.task) for row in rows.get("train", ())}) if isinstance(rows, dict) else []

    def on_train_end(self) -> None:
        """Say how many labels each task got, and where steps did not move the policy."""
        self.outer.announce_end(self._training_tasks())
        if self.skipped_steps:
            rank_zero_warn(
                f"{self.skipped_steps} of {self.policy_steps} policy steps did not move the policy: every response of each "
                "group had the same reward, or none, or the gradient was not finite. See group/dead_fraction."
            )

    def settings(self) -> dict[str, Any]:
        """See :class:`PolicyModule`."""
        meta, inner = self.outer.meta, self.inner
        groups = {
            "advantages": asdict(self.advantages),
            "anchoring": asdict(self.outer.anchoring),
            "loss": inner.loss.settings,
            "kl": asdict(inner.kl),
            "meta": {"every": meta.every, "warmup": self.outer.warmup, "coupling": meta.coupling},
            "weigher": settings_of(WEIGHER, self.weigher),
            "meta.signal": settings_of(SIGNAL, meta.signal),
            "meta.learner": settings_of(LEARNER, self.outer.learner),
        }
        return {
            **super().settings(),
            "weigher": type(self.weigher).__name__,
            "meta.signal": type(meta.signal).__name__,
            "meta.learner": type(self.outer.learner).__name__,
            "updates_per_rollout": inner.steps,
            **{f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()},
        }

    def training_state(self) -> dict[str, Any]:
        """See :class:`PolicyModule`."""
        return {**super().training_state(), **self.outer.state_dict()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :class:`PolicyModule`; of a weigher of a user's own, what can be read again."""
        super().on_save_checkpoint(checkpoint)
        saved = checkpoint["state_dict"]
        if is_own(self.weigher):
            own = {f"weigher.{name}": value for name, value in state_of(WEIGHER, self.weigher).items()}
            saved |= {name: value for name, value in own.items() if name in saved}

    def load_training_state(self, saved: dict[str, Any]) -> None:
        """See :class:`PolicyModule`."""
        super().load_training_state(saved)
        self.outer.load_state_dict(saved)

    def check_settings(self, saved: dict[str, Any]) -> None:
        """See :class:`PolicyModule`."""
        self.outer.check_settings(saved)

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
