"""The outer loop: what the Conductor decided is remembered with what it was worth, and learned from on a slower clock."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm import Mean, Metrics
from maestro_pl.algorithm.advantages import scalarise
from maestro_pl.algorithm.scalar_reward import (
    anchor_scores,
    anchor_values,
    anchored_responses,
    gate_product,
    normalized_rewards,
)
from maestro_pl.algorithm.settings import Advantages, Anchoring
from maestro_pl.algorithm.simplex import on_simplex
from maestro_pl.conductor.anchor import AnchorSignal
from maestro_pl.conductor.buffer import Decisions, MetaBuffer, of_all_ranks
from maestro_pl.conductor.choices import spread_rows
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.credits import zscores
from maestro_pl.conductor.earlier import EarlierGroups, decisions_of
from maestro_pl.conductor.labels import LabelCounts, LabelScale, TaskLabels, choice_ranks, task_id, tells_apart
from maestro_pl.conductor.meta import Meta
from maestro_pl.conductor.own_code import LEARNER, check_tensor, is_own, named, numbers_of, own_code, state_of
from maestro_pl.conductor.ridge import RidgeLearner
from maestro_pl.conductor.schedule import LabelSchedule
from maestro_pl.conductor.signals import Credit, Observation, check_signal, observed
from maestro_pl.conductor.weighers import UpdatePlan, WeighedRollout, Weigher, Weighing
from maestro_pl.errors import UserError
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import Later, RewardSpec, Rollout
from maestro_pl.run.ranks import average_gradients, count_of, gathered, own_rows


class Steps(Protocol):
    """How the Conductor's optimizer is stepped; ``training.stepping.Stepper`` is one."""

    @property
    def optimizers(self) -> list[Any]:
        """The policy's, and the Conductor's."""

    @property
    def backward_unscaled(self) -> Callable[[Tensor], None]:
        """Backward of a loss, ranks exchanging gradients."""

    def step_scheduler(self, index: int) -> None:
        """Step the scheduler of the policy (0) or of the Conductor (1), if it has one."""


class Host(Protocol):
    """What the outer loop needs of the LightningModule around it."""

    policy: LoRAPolicy
    policy_steps: int
    stepper: Any
    inner: Any
    advantages: Advantages

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    @property
    def trainer(self) -> Any:
        """Lightning's trainer."""

    @property
    def global_rank(self) -> int:
        """Of this process."""


class OuterLoop:
    """Labels, buffer and updates of the Conductor (Eq. 9 to 13); without a Conductor it counts labels and no more.

    Args:
        module: whose policy samples what the Conductor weighs.
        weigher: the Conductor, or another weigher.
        meta: how it is trained.
        anchoring: which groups the anchors label.

    Attributes:
        buffer: decisions since the last update.
        counts: labels of every task so far.
        label_scale: of the anchors, where only some responses of a group are rated.
        unhelped: tasks on which no reward goes along with the anchor, by the learner's posterior: reward to its covariance
            with the anchor and the deviation of that.
        updates: of the Conductor so far.
        warmup_done: batches of the warm-up behind us.
        labelled_groups: groups that the anchors were asked about.
        earlier: groups of earlier batches, for anchors that are answered late.
    """

    def __init__(self, module: Host, weigher: Weigher, meta: Meta, anchoring: Anchoring) -> None:
        self.module, self.weigher, self.meta, self.anchoring = module, weigher, meta, anchoring
        self.learner = meta.made_learner
        self.warmup = meta.warmup if isinstance(weigher, Conductor) else 0
        self.schedule = LabelSchedule(anchoring.fraction, anchoring.seed)
        self.buffer, self.counts, self.label_scale = MetaBuffer(), LabelCounts(), LabelScale()
        self.unhelped: dict[str, dict[str, tuple[float, float]]] = {}
        self.updates = self.warmup_done = self.labelled_groups = 0
        self.earlier = EarlierGroups()
        self._warned = False

    @property
    def conductor(self) -> Conductor:
        """The weigher, where it learns."""
        assert isinstance(self.weigher, Conductor)  # only a Conductor draws the actions that are learned from
        return self.weigher

    @property
    def learns(self) -> bool:
        """Whether there is a Conductor, and it is trained here and not with the policy."""
        return isinstance(self.weigher, Conductor) and self.meta.coupling == "async"

    @property
    def warming(self) -> bool:
        """Whether the batch at hand belongs to the warm-up."""
        return self.warmup_done < self.warmup

    @property
    def batches_done(self) -> int:
        """Training batches behind us, those of the warm-up included."""
        return self.warmup_done + self.module.policy_steps

    @property
    def uses_anchor(self) -> bool:
        """Whether rewards with the role ``anchor`` are read in training, so that they must be scored there."""
        return self.anchoring.hybrid > 0 or (self.meta.signal.uses_anchor and isinstance(self.weigher, Conductor))

    def attach(self) -> None:
        """Check that Conductor, signal and learner fit, once the Conductor has its layers.

        Raises:
            UserError: they do not.
        """
        if isinstance(self.weigher, Conductor):
            check_signal(self.meta.signal, self.module.policy, self.module.advantages, self.anchoring)
            with own_code(LEARNER, self.learner, "attach"):
                self.learner.attach(self.weigher, self.meta.signal)
        if self.anchoring.shrink and not self._expects:
            raise UserError(
                f"model.anchoring.shrink=true with {type(self.weigher).__name__} and {type(self.learner).__name__}, which do "
                "not say how well the weighed reward goes along with an anchor: give a linear maestro_pl.Conductor, signal: "
                "maestro_pl.AnchorSignal and learner: ridge (target: regression, choice or pairs), or leave shrink out."
            )

        if self.anchoring.shrink and self.module.inner.kl.in_reward:
            raise UserError(
                "model.anchoring.shrink=true with model.kl.place=reward: the penalty would be shrunk with the rewards, and "
                "be nothing where they say nothing. Give model.kl.place: loss, or leave shrink out."
            )

    def resume(self) -> None:
        """Go on with what a checkpoint brought, once the Conductor's parameters are back."""
        if isinstance(self.weigher, Conductor):
            with own_code(LEARNER, self.learner, "resume"):
                self.learner.resume(self.weigher)

    def labelled(self, rollout: Rollout) -> Tensor:
        """Bool (N,): the groups of the training batch at hand that the anchors score, the same whenever it is asked."""
        count = len(rollout.prompts)
        if not self.uses_anchor:
            return torch.zeros(count, dtype=torch.bool)
        if self.warming:
            return torch.ones(count, dtype=torch.bool)
        step, everywhere = self.module.policy_steps, count * count_of()
        if not self.anchoring.coverage:
            return own_rows(self.schedule.draw(everywhere, step))
        # rank r has every R-th group of the global batch
        tasks_N = [task for tasks in zip(*gathered(_tasks_of(rollout)), strict=True) for task in tasks]
        asked = {task: self.counts.asked(task) for task in set(tasks_N)}
        return own_rows(self.schedule.draw(everywhere, step, tasks_N=tasks_N, asked=asked))

    def shown(self, rollout: Rollout, specs: Sequence[RewardSpec]) -> Tensor | None:
        """Bool (B,): the responses that anchors are shown of the groups that they label; None: all.

        Raises:
            UserError: they are chosen by their rewards, and none was scored yet.
        """
        count = self.anchoring.responses
        if count is None or count >= rollout.group_size:
            return None
        size, groups = rollout.group_size, len(rollout.prompts)
        shown_B = torch.zeros(len(rollout), dtype=torch.bool)
        if self.anchoring.shown == "random":
            seed = f"{self.anchoring.seed}/{self.batches_done}/{self.module.global_rank}"
            generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
            places = [torch.randperm(size, generator=generator)[:count].tolist() for _ in range(groups)]
        else:
            scored = [spec for spec in specs if spec.role == "train" and spec.name in rollout.rewards]
            if not scored:
                raise UserError(
                    "model.anchoring.responses shows the responses whose rewards differ most, and no reward is scored before "
                    "the anchor: list the anchors after the rewards, or give shown: random."
                )
            rewards_BK, mask_BK = normalized_rewards(rollout, scored, self.module.advantages, torch.device("cpu"))
            z_NGK = zscores(rewards_BK, mask_BK, size).view(groups, size, -1)
            wanted = self.labelled(rollout).tolist()
            places = [spread_rows(z_GK, count) if wanted[n] else [] for n, z_GK in enumerate(z_NGK)]
        for n, chosen in enumerate(places):
            shown_B[[n * size + place for place in chosen]] = True
        return shown_B

    def settled(self, rollout: Rollout, weighing: Weighing, mask_BK: Tensor) -> Weighing:
        """The weights, where the labels of a task say that its rewards must not be weighed by what was learned.

        Zero where no reward goes along with the anchor on the task; where the anchors have said nothing of it,
        ``model.anchoring.unlabelled_tasks`` decides.
        """
        if not self.learns or not self.meta.signal.needs_labels_of_task:
            return weighing
        tasks_B = [task for task in _tasks_of(rollout) for _ in range(rollout.group_size)]
        names = set(tasks_B)
        unknown = {task for task in names if self.counts.unknown(task)}
        how = self.anchoring.unlabelled_tasks
        silent = {task for task in names if task in self.unhelped} | (unknown if how == "skipped" else set())
        equal = unknown if how == "equal" else set()
        if not silent and not equal:
            return weighing
        device = mask_BK.device
        silent_B1 = torch.tensor([task in silent for task in tasks_B], device=device).unsqueeze(1)
        equal_B1 = torch.tensor([task in equal for task in tasks_B], device=device).unsqueeze(1)

        def changed(weights_BK: Tensor) -> Tensor:
            even_BK = on_simplex(torch.ones_like(weights_BK), mask_BK)
            return torch.where(equal_B1, even_BK, weights_BK).masked_fill(silent_B1, 0.0)

        return weighing._replace(
            weights_BK=changed(weighing.weights_BK), probabilities_BK=changed(weighing.probabilities_BK)
        )

    def gain(self, rollout: Rollout, weighing: Weighing, rewards_BK: Tensor, mask_BK: Tensor) -> tuple[Tensor, Metrics]:
        """What the advantages of a training batch are multiplied by (``model.anchoring.shrink``), and what is logged of it.

        The best guess of an anchor's z-score, where the weighed reward correlates with it by c, is c times the weighed
        reward's own: GRPO's division by the group's spread would make a unit of it, however little it says (Eq. 17).

        Args:
            rollout: the training batch.
            weighing: what its rewards were weighed by.
            rewards_BK: normalised rewards.
            mask_BK: bool, which apply.

        Returns:
            gain_B: c for the responses of a group, 1 where nothing is known, and 1 for a response that a gate is not
            wholly open for: that is no guess of what it is worth; and the expected correlation c by task.
        """
        one_B = torch.ones(len(rollout), device=mask_BK.device)
        fitted = self.learner.fitted if self._expects and isinstance(self.learner, RidgeLearner) else None
        if fitted is None:
            return one_B, {}
        read_BD = rollout.hidden_BD if weighing.h_BD is None else weighing.h_BD
        assert read_BD is not None  # the Conductor has read it
        size, device, tasks_N = rollout.group_size, mask_BK.device, _tasks_of(rollout)
        predicted_B = self.conductor.predicted(read_BD.to(device), zscores(rewards_BK, mask_BK, size))
        weighed_B = scalarise(rewards_BK, weighing.weights_BK, mask_BK)
        c_N, tells_N = expected_correlation(weighed_B, predicted_B, fitted.noise, size)
        metrics: Metrics = {}
        for task in dict.fromkeys(tasks_N):
            if task_id(task) in fitted.tasks:
                own_N = torch.tensor([each == task for each in tasks_N]).to(device) & tells_N
                metrics[f"conductor/expected_correlation/{task}"] = Mean((c_N * own_N).sum(), own_N.sum())
        if not self.anchoring.shrink:
            return one_B, metrics
        share = self.anchoring.hybrid
        if share:  # of a mixture with the anchor's own z-score, where that is known
            spread_N = ((1 - share) ** 2 + share**2 + 2 * share * (1 - share) * c_N).sqrt()
            own_N = anchored_responses(rollout, anchor_values(rollout)).view(-1, size).any(1).to(device)
            mixed_N = torch.where(
                tells_N, ((1 - share) * c_N + share) / spread_N, 1.0
            )  # the label's alone where R is one
            c_N = torch.where(own_N, mixed_N, c_N)
        known_N = torch.tensor([task_id(task) in fitted.tasks for task in tasks_N]).to(device)
        gain_B = torch.where(known_N, c_N, 1.0).repeat_interleave(size)
        return torch.where(gate_product(rollout).to(device) < 1, 1.0, gain_B), metrics

    def announce_end(self, tasks: Sequence[str] = ()) -> None:
        """The same once a run has ended, and in one sentence that nothing was learned where there was time to."""
        self.announce(tasks)
        steps = self.module.policy_steps
        if self.learns and not self.updates and (self.warmup_done or steps >= self.meta.every):
            rank_zero_warn(
                f"The Conductor has not learned anything in {self.batches_done} batches: model.meta.signal="
                f"{type(self.meta.signal).__name__} gave no credit that is a number, or its learner skipped every update. Its "
                "weights are those that it began with."
            )

    def announce(self, tasks: Sequence[str] = ()) -> None:
        """Print how many labels each task got so far, and in one sentence what becomes of those without."""
        if not self.learns or not self.uses_anchor:
            return
        self.counts.show("labels by task", tasks)
        without = [task for task in dict.fromkeys((*tasks, *self.counts.tasks)) if self.counts.unknown(task)]
        if without and self.meta.signal.needs_labels_of_task:
            done = {
                "equal": "their rewards are weighed equally",
                "weighed": "they are weighed by what was learned from other tasks, which can be worse than equal weights",
                "skipped": "their rewards do not train the policy",
            }[self.anchoring.unlabelled_tasks]
            rank_zero_warn(
                f"The anchors have said nothing of the tasks {', '.join(without)}: {done} "
                f"(model.anchoring.unlabelled_tasks: {self.anchoring.unlabelled_tasks})."
            )

    def remember(self, weighed: WeighedRollout) -> Metrics:
        """Count the labels of a batch, and buffer its decisions with what the meta-signal says they were worth."""
        metrics: Metrics = {}
        labelled_N, answered_N = self.labelled(weighed.rollout), answered(weighed.rollout)
        later = self._later(weighed.rollout)
        if later:
            metrics["anchor/earlier_choices"] = float(self._hear(later))
        if self.uses_anchor:
            self.labelled_groups += sum(gathered(int(labelled_N.sum())))
            metrics["anchor/labelled_groups"] = float(self.labelled_groups)
            self.counts.add(weighed.rollout, labelled_N, answered_N)
            if self.counts.choices:
                metrics["anchor/choices"] = float(self.counts.choices)
        if not self.learns:
            return metrics
        z_BK = zscores(weighed.rewards_BK, weighed.mask_BK, weighed.rollout.group_size)
        self.conductor.observe_rewards(z_BK, weighed.mask_BK)
        module = self.module
        inner: UpdatePlan = module.inner
        open_B = gate_product(weighed.rollout).to(z_BK.device)
        scale = None if self.anchoring.responses is None else self.label_scale
        seen = Observation(
            self.conductor, module.policy, inner, module.advantages, weighed, z_BK, open_B, labelled_N, scale
        )
        credit = observed(self.meta.signal, seen)
        if credit.rank_BJ is not None:
            self._check_takes_choices()
        metrics |= self._drift(weighed)
        decisions = self._decisions(weighed, z_BK, credit)
        metrics |= self._told(self._buffer(decisions))
        if later:
            self.earlier.add(decisions, weighed.rollout, later, labelled_N, answered_N)
        counts = gathered(credit.metrics)
        return metrics | {f"conductor/{name}": sum(each.get(name, 0.0) for each in counts) for name in credit.metrics}

    def update_if_due(self) -> Metrics:
        """After a batch: one update on the buffered decisions in the warm-up and every M policy steps. Collective."""
        due = self.warming or self.module.policy_steps % self.meta.every == 0
        self.warmup_done += int(self.warming)
        if not due or not self.learns or not len(self.buffer):
            return {}
        broken = self._told(self.buffer.drop_broken())  # of a checkpoint; those of this run were not let in
        decisions = self.buffer.joined()
        before_BK = self._probabilities(decisions.h_BD, decisions.mask_BK)
        with own_code(LEARNER, self.learner, "learn"):
            given = self.learner.learn(
                self.conductor, self.meta.signal, self.buffer, step=self.step, batch=self.batches_done
            )
        metrics = numbers_of(LEARNER, self.learner, "learn", given)
        self.buffer.clear(self.learner.replay)
        if not metrics.get("skipped"):
            self.updates += 1
        self.unhelped = self._named(self.learner.unhelped)
        logged: Metrics = broken | {f"conductor/{name}": value for name, value in metrics.items()}
        return logged | self._moved(decisions.h_BD, decisions.mask_BK, before_BK)

    def step(self, loss: Tensor) -> Metrics:
        """Backward of a meta-loss and a step of the Conductor's optimizer; plain metrics without prefix."""
        steps: Steps = self.module.stepper
        steps.optimizers[1].optimizer.zero_grad()
        steps.backward_unscaled(loss)
        return self._step_optimizer()

    def step_jointly(self, h_BD: Tensor, mask_BK: Tensor) -> Metrics:
        """A step of the Conductor's optimizer on the gradient that a joint backward has left."""
        before_BK = self._probabilities(h_BD, mask_BK)
        average_gradients(self.conductor.parameters())
        skipped = self._step_optimizer()
        if skipped:
            return {f"conductor/{name}": value for name, value in skipped.items()}
        self.updates += 1
        return self._moved(h_BD, mask_BK, before_BK)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Counters, buffer and what the learner remembers, as plain values and tensors."""
        return {
            "conductor_updates": self.updates,
            "buffer": self.buffer.state_dict(),
            "learner": state_of(LEARNER, self.learner),
            "warmup_done": self.warmup_done,
            "labelled_groups": self.labelled_groups,
            "label_counts": self.counts.state_dict(),
            "label_scale": self.label_scale.state_dict(),
            "earlier": self.earlier.state_dict(),
            "unhelped": {task: {k: list(v) for k, v in rewards.items()} for task, rewards in self.unhelped.items()},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.updates = saved["conductor_updates"]
        self.buffer.load_state_dict(saved["buffer"])
        with own_code(LEARNER, self.learner, "load_state_dict"):
            self.learner.load_state_dict(saved["learner"])
        self.warmup_done = saved["warmup_done"]
        self.labelled_groups = saved["labelled_groups"]
        self.counts.load_state_dict(saved.get("label_counts", {}))
        self.label_scale.load_state_dict(saved.get("label_scale", {}))
        self.earlier.load_state_dict(saved.get("earlier", {}))
        unhelped = saved.get("unhelped", {})
        self.unhelped = {task: {name: (v[0], v[1]) for name, v in by.items()} for task, by in unhelped.items()}

    def check_settings(self, saved: dict[str, Any]) -> None:
        """Raise where the checkpoint's Conductor was trained in a way that this run cannot go on with.

        Raises:
            UserError: by a fit in closed form, and this run learns by gradient, or the other way round.
        """
        before, now = saved["meta.learner"], type(self.learner).__name__
        fitted = "RidgeLearner" in (before, now)
        if isinstance(self.weigher, Conductor) and saved["weigher"] == "Conductor" and before != now and fitted:
            raise UserError(
                f"The checkpoint's Conductor was trained by {before}, this run has model.meta.learner {now}: give the "
                "learner of the run that it comes from, or start a new run."
            )

    # -- its parts ---------------------------------------------------------------------------------------------------

    @property
    def _expects(self) -> bool:
        """Whether the Conductor says what responses are worth to an anchor."""
        fits_values = isinstance(self.learner, RidgeLearner) and self.learner.target != "covariance"
        return self.learns and fits_values and isinstance(self.meta.signal, AnchorSignal)

    def _later(self, rollout: Rollout) -> dict[str, Later]:
        """The anchors of which more may come after this batch, where it would be learned from."""
        if not self.learns or not self.meta.signal.gives_choices:
            return {}
        return {scores.spec.name: scores.later for scores in anchor_scores(rollout) if scores.later is not None}

    def _hear(self, later: Mapping[str, Later]) -> int:
        """Count and buffer what is said of groups of earlier batches by now; how many choices these are so far."""
        found = self.earlier.said(later)
        if found:
            self._check_takes_choices()
            decisions = decisions_of(found, self.module.device)
            self.buffer.add(decisions.rows(decisions.mask_BK.any(-1) & decisions.finite_B))
        for said in found:
            group = said.group
            telling = said.telling and not group.answered
            self.labelled_groups += int(not group.asked)
            counted = TaskLabels(asked=int(not group.asked), answered=int(telling), choices=len(said.columns))
            self.counts.add_later(group.task, counted)
            group.asked, group.answered = True, group.answered or telling
        return self.earlier.choices

    def _check_takes_choices(self) -> None:
        if not self.learner.takes_choices:
            raise UserError(
                f"An anchor compares responses, and {type(self.learner).__name__} with its options learns from scores only: "
                "give model.meta.learner: {class_path: maestro_pl.RidgeLearner, init_args: {target: choice}}."
            )

    def _decisions(self, weighed: WeighedRollout, z_BK: Tensor, credit: Credit) -> Decisions:
        """What was decided on every response of this rank, and what it was worth."""
        rollout, weighing, device = weighed.rollout, weighed.weighing, self.module.device
        read_BD = rollout.hidden_BD if weighing.h_BD is None else weighing.h_BD
        assert read_BD is not None  # the Conductor has read it
        h_BD = read_BD.to(device)
        none_B = torch.full((len(rollout),), -1, dtype=torch.long, device=device)
        return Decisions(
            h_BD.detach().float(),
            weighed.mask_BK,
            none_B if weighing.action_B is None else weighing.action_B,
            weighed.advantages_B.detach(),
            torch.arange(len(rollout), device=device) // rollout.group_size,
            self.updates,
            log_prob_B=None if weighing.log_prob_B is None else weighing.log_prob_B.detach(),  # type: ignore[arg-type]
            credit_BK=credit.credit_BK.detach().float(),
            value_B=None if credit.value_B is None else credit.value_B.detach().float(),  # type: ignore[arg-type]
            z_BK=z_BK.detach().float(),
            rank_BJ=credit.rank_BJ,  # type: ignore[arg-type]
            task_B=torch.tensor([task_id(t) for t in _tasks_of(rollout) for _ in range(rollout.group_size)]).to(device),
        )

    def _buffer(self, decisions: Decisions) -> int:
        """Keep the decisions that can be learned from; how many could not, for a number that is not finite."""
        applies_B = decisions.mask_BK.any(-1)
        rows_B = applies_B & decisions.finite_B
        known_B = (~decisions.credit_BK.isnan().all(1) | (decisions.rank_BJ >= 0).any(1)) & rows_B
        known, broken = torch.stack([known_B.sum(), (applies_B & ~rows_B).sum()]).tolist()  # one look at the device
        if any(gathered(known > 0)):
            self.buffer.add(of_all_ranks(decisions.rows(rows_B)))
        return sum(gathered(broken))

    def _drift(self, weighed: WeighedRollout) -> Metrics:
        """Cosine of this batch's contexts to the nearest ones that were learned from, for each task that was labelled."""
        rollout, read_BD = weighed.rollout, weighed.weighing.h_BD
        h_BD = rollout.hidden_BD if read_BD is None else read_BD
        assert h_BD is not None  # the Conductor has read it
        with own_code(LEARNER, self.learner, "nearest"):
            cosine_B = self.learner.nearest(self.conductor, h_BD.to(self.module.device))
        if cosine_B is None:
            return {}
        if is_own(self.learner):
            check_tensor(f"{named(LEARNER, self.learner)}: `nearest`", cosine_B, (len(rollout),))
        by_task: dict[str, list[float]] = {}
        for n, task in enumerate(_tasks_of(rollout)):
            group_G = cosine_B[n * rollout.group_size : (n + 1) * rollout.group_size]
            group_G = group_G[group_G.isfinite()]
            if len(group_G) and not self.counts.unknown(task):
                by_task.setdefault(task, []).append(float(group_G.mean()))
        if not by_task:
            return {}
        metrics: Metrics = {
            f"conductor/context_drift/{task}": Mean(sum(cosines), len(cosines)) for task, cosines in by_task.items()
        }
        every = [cosine for cosines in by_task.values() for cosine in cosines]
        return metrics | {"conductor/context_drift": Mean(sum(every), len(every))}

    def _named(self, unhelped: dict[int, tuple[Tensor, Tensor, Tensor]]) -> dict[str, dict[str, tuple[float, float]]]:
        """Tasks and rewards by name."""
        names = {task_id(task): task for task in self.counts.tasks}
        return {
            names[task]: {
                reward: (float(mean_K[k]), float(deviation_K[k]))
                for k, reward in enumerate(self.conductor.reward_names)
                if applies_K[k]
            }
            for task, (mean_K, deviation_K, applies_K) in unhelped.items()
            if task in names
        }

    def _told(self, broken: int) -> Metrics:
        """The count of responses that the Conductor cannot learn from, where there are any, and a warning once."""
        if not broken:
            return {}
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Step {self.module.policy_steps}: {broken} response(s) have a hidden state, a reward or a credit that is not "
                "finite, and the Conductor does not learn from them; `conductor/nonfinite` counts them from here on. If they "
                "are many, the policy has diverged: lower its learning rate, or use dtype float32."
            )
        return {"conductor/nonfinite": float(broken)}

    def _step_optimizer(self) -> Metrics:
        """Empty where it has moved."""
        steps: Steps = self.module.stepper
        optimizer = steps.optimizers[1].optimizer  # the bare one: Lightning would count its step in global_step
        gradients = [p.grad for p in self.conductor.parameters() if p.grad is not None]
        if gradients and not bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            rank_zero_warn(f"Conductor update at step {self.module.policy_steps} skipped: its gradient is not finite.")
            optimizer.zero_grad()
            return {"skipped": 1.0}
        optimizer.step()
        self.conductor.constrain_()
        steps.step_scheduler(1)
        return {}

    def _probabilities(self, h_BD: Tensor, mask_BK: Tensor) -> Tensor:
        with torch.no_grad():
            return self.conductor.probabilities(h_BD, mask_BK)

    def _moved(self, h_BD: Tensor, mask_BK: Tensor, before_BK: Tensor) -> Metrics:
        """How far an update has moved the Conductor's decisions."""
        change = 0.5 * (self._probabilities(h_BD, mask_BK) - before_BK).abs().sum(-1).mean()  # total variation
        return {"conductor/step_change": change, "conductor/tau": self.conductor.tau.detach()}


def expected_correlation(weighed_B: Tensor, predicted_B: Tensor, noise: float, size: int) -> tuple[Tensor, Tensor]:
    """How well the weighed reward of each group is expected to correlate with what an anchor would say (Eq. 17).

    Of a value that is what was predicted and an error: cov(R, v) / sqrt(var(R) (var(v) + noise)) inside the group.

    Args:
        weighed_B: float weighed rewards R, NaN where none applies.
        predicted_B: float predicted values v.
        noise: variance of the error.
        size: G.

    Returns:
        c_N in [0, 1], 0 where the weighed reward is the same for all; and bool tells_N, where it is not.
    """
    known_NG = ~weighed_B.isnan().view(-1, size)
    count_N1 = known_NG.sum(1, keepdim=True).clamp(min=1)

    def centred(values_B: Tensor) -> Tensor:
        values_NG = values_B.double().nan_to_num(0.0).view(-1, size) * known_NG
        return (values_NG - values_NG.sum(1, keepdim=True) / count_N1) * known_NG

    weighed_NG, predicted_NG = centred(weighed_B), centred(predicted_B)
    mean = 1 / (count_N1[:, 0] - 1).clamp(min=1)
    spread_N = ((predicted_NG.square().sum(1) * mean) + noise).sqrt()
    own_N = (weighed_NG.square().sum(1) * mean).sqrt()
    largest_N = weighed_B.double().nan_to_num(0.0).abs().view(-1, size).amax(1)
    tells_N = own_N > 1e-6 * largest_N  # more than rounding, whatever the rewards' unit
    tiny = torch.finfo(torch.float64).tiny
    c_N = (weighed_NG * predicted_NG).sum(1) * mean / own_N.clamp(min=tiny) / spread_N.clamp(min=tiny)
    return torch.where(tells_N, c_N.clamp(0.0, 1.0), 0.0).float(), tells_N


def answered(rollout: Rollout) -> Tensor:
    """Bool (N,) on the CPU: groups of which the anchors said something that tells their responses apart."""
    known_N = (~anchor_values(rollout).isnan()).view(-1, rollout.group_size).any(1)
    return known_N | tells_apart(choice_ranks(rollout), rollout.group_size)


def _tasks_of(rollout: Rollout) -> list[str]:
    """The task of each group; one for all where the rows have none."""
    return [str(task) for task in rollout.columns.get("task", ["all"] * len(rollout.prompts))]
