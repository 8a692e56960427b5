"""The ablation "joint": policy and Conductor trained by one backward pass, each also through the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.algorithm.joint import JointDecision, joint_advantages
from maestro_pl.algorithm.losses import RolloutTokens, grpo_loss, repeated
from maestro_pl.algorithm.scalar_reward import gate_product
from maestro_pl.algorithm.settings import KL, Advantages, Loss, Unlabelled
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.credits import meta_loss
from maestro_pl.conductor.learners import ReinforceLearner
from maestro_pl.conductor.meta import Meta
from maestro_pl.conductor.outer_loop import OuterLoop
from maestro_pl.conductor.signals import AdvantageSignal
from maestro_pl.conductor.weighers import WeighedRollout, Weigher
from maestro_pl.errors import UserError
from maestro_pl.rollout import Rollout
from maestro_pl.training.update import Host, PolicyUpdate


class JointHost(Host, Protocol):
    """What the joint update needs of the LightningModule around it."""

    outer: OuterLoop
    advantages: Advantages


class JointUpdate(PolicyUpdate):
    """L_GRPO also moves the Conductor, through the weights, and L_meta also the policy, through h; both step together.

    Args:
        module: whose policy and Conductor are trained.
        loss: the loss.
        kl: the penalty on the distance to the reference.
        unlabelled: whether groups without a label train.
        steps: optimizer steps on one rollout.
    """

    coupled = True
    whole_groups = True  # the advantages of a group are computed again from the weights of all of it
    module: JointHost

    def __init__(
        self, module: JointHost, loss: Loss, kl: KL, unlabelled: Unlabelled = "weighed", steps: int = 1
    ) -> None:
        super().__init__(module, loss, kl, unlabelled, steps)
        self.decision: JointDecision | None = None  # of the batch at hand

    def update(self, weighed: WeighedRollout) -> Metrics:
        """See :class:`PolicyUpdate`; what was decided is kept, so that it can be computed again with gradient."""
        assert weighed.weighing.action_B is not None  # a Conductor draws actions in training
        open_B = gate_product(weighed.rollout).to(self.module.device)
        self.decision = JointDecision(
            weighed.weighing.action_B, weighed.rewards_BK, weighed.mask_BK, open_B, weighed.scalar_B
        )
        self.hidden_BD = weighed.rollout.hidden_BD
        try:
            return super().update(weighed)
        finally:
            self.decision = None

    def loss_of(
        self, rollout: Rollout, rows: list[int], tokens: RolloutTokens
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The sum of both losses, with gradients into the policy and the Conductor."""
        if self.decision is None:  # the probe's worst step, before anything was decided
            return super().loss_of(rollout, rows, tokens)
        conductor, signal = self.module.outer.conductor, self.module.outer.meta.signal
        assert isinstance(signal, AdvantageSignal)  # checked at the start
        statistics = self.statistics(rollout, rows, conductor.context, hidden_grad=True)
        assert statistics.hidden_BD is not None
        decision, lengths_B = self.decision.rows(rows), rollout.lengths_B[rows]
        probabilities_BK = conductor.probabilities(statistics.hidden_BD, decision.mask_BK)
        advantages_B = joint_advantages(
            probabilities_BK,
            decision,
            rollout.group_size,
            conductor.action,
            conductor.mix_rate,
            self.module.advantages.scale,
        )
        log_prob_B = conductor.log_prob(probabilities_BK, decision.action_B)
        share = len(rows) / len(rollout)
        meta, metrics = meta_loss(log_prob_B, advantages_B.detach(), probabilities_BK, signal.entropy_coef)
        advantages_T = repeated(advantages_B, lengths_B.to(self.module.device), int(lengths_B.sum()))
        tokens = replace(tokens, advantages_T=advantages_T)
        loss, sums = grpo_loss(tokens.batch(statistics.logps_T, lengths_B), self.loss, self.kl)
        sums = {"loss": loss.detach(), **sums}
        sums |= {f"conductor/{name}": share * value for name, value in metrics.items()}
        return loss + share * meta, sums, statistics.logps_T.detach()

    def zero_grad(self) -> None:
        """Begin with zero gradients, the Conductor's too."""
        for optimizer in self.module.stepper.optimizers:
            optimizer.zero_grad()

    def finish(self, totals: dict[str, Tensor], last: bool) -> Metrics:
        """Step the policy and the Conductor."""
        metrics = super().finish(totals, last)
        if self.decision is None or self.hidden_BD is None:
            return metrics
        metrics |= {name: value for name, value in totals.items() if name.startswith("conductor/")}
        return metrics | self.module.outer.step_jointly(self.hidden_BD, self.decision.mask_BK)


def check_joint(weigher: Weigher, meta: Meta, advantages: Advantages) -> None:
    """Raise where policy and Conductor cannot be trained as one.

    Raises:
        UserError: another weigher than a Conductor with drawn actions, another meta-loss than the paper's, or advantages
            that are not those of a group.
    """
    if not isinstance(weigher, Conductor) or weigher.reads == "shuffled" or weigher.action == "soft":
        raise UserError(
            f"model.meta.coupling=joint trains a Conductor that reads its own h, and model.weigher is "
            f"{type(weigher).__name__}: give maestro_pl.Conductor, or coupling async."
        )
    if weigher.context.state == "base":
        raise UserError(
            "model.meta.coupling=joint moves the policy through h, and model.weigher.state=base reads a model that never "
            "moves: give state: policy, or coupling async."
        )
    signal, learner = meta.signal, meta.made_learner
    paper = isinstance(signal, AdvantageSignal) and not signal.pairwise_coef and signal.actions == "sampled"
    if not paper or learner.settings != ReinforceLearner().settings:
        raise UserError(
            "model.meta.coupling=joint knows the paper's meta-loss only: leave model.meta.signal and model.meta.learner "
            "out, or take coupling async."
        )
    if advantages.aggregation != "sum_then_normalize" or advantages.scale == "batch" or advantages.min_consensus:
        raise UserError(
            f"model.meta.coupling=joint with model.advantages.aggregation={advantages.aggregation}, "
            f"scale={advantages.scale}, min_consensus={advantages.min_consensus:g}: advantages must be those of a group "
            "(sum_then_normalize; group or none; no response dropped)."
        )
