"""What every way of training the policy shares: evaluation, optimizers, checkpoints, counters."""

from __future__ import annotations

import math
import os
import zlib
from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.algorithm.settings import check_at_least
from maestro_pl.errors import UserError
from maestro_pl.evaluation.loop import EvaluationLoop
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.frozen import FrozenStates
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import RewardSource, RewardSpec, Rollout
from maestro_pl.run.ending import agree_to_end, end_together
from maestro_pl.run.plain import plain
from maestro_pl.run.properties import PlainProperties
from maestro_pl.run.random_state import rng_of_rank, rng_of_resumed, rng_state, seeded_state, set_rng_state
from maestro_pl.run.ranks import gathered, let_us_average
from maestro_pl.training import checkpointing
from maestro_pl.training.clock import StageClock
from maestro_pl.training.collapse import CollapseWatch
from maestro_pl.training.float16 import PRECISIONS, loss_scale_of
from maestro_pl.training.fsdp import check_sharding
from maestro_pl.training.metric_rows import keep_rows, write_row_early
from maestro_pl.training.monitors import check_monitors
from maestro_pl.training.saving import not_finite, save_whole_files
from maestro_pl.training.scheduling import make_scheduler
from maestro_pl.training.stepping import Stepper
from maestro_pl.training.training_log import joined_metrics


class PolicyModule(PlainProperties, EvaluationLoop):
    """A LightningModule around a :class:`LoRAPolicy`, optimised by hand.

    Args:
        policy: the model that is trained.
        optimizer: of the policy.
        scheduler: of its learning rate, stepped once a policy step: ``{warmup: 0.1, decay: cosine}``, or a class path.
        max_grad_norm: gradient norm that the policy's gradient is clipped to; 0 does not clip.
        micro_batch_tokens: at most this many tokens in one forward pass of the update. Where memory runs out in one,
            they are halved for the rest of the run and the update begins anew.
    """

    automatic_optimization = False
    strict_loading = False  # a checkpoint holds no base weights; checkpointing checks the names exactly
    learns_from_rollouts = True  # False: no rollout is sampled and scored for a training batch

    def __init__(
        self,
        policy: LoRAPolicy,
        optimizer: OptimizerCallable,
        scheduler: Schedule | LRSchedulerCallable | None,
        max_grad_norm: float,
        micro_batch_tokens: int,
    ) -> None:
        super().__init__()
        check_at_least("model.max_grad_norm", max_grad_norm, 0)
        check_at_least("model.micro_batch_tokens", micro_batch_tokens, 1)
        self.policy = policy
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.max_grad_norm, self.micro_batch_tokens = max_grad_norm, micro_batch_tokens
        self.clock = StageClock()
        self.stepper = Stepper(self)
        self.frozen_states = FrozenStates()
        self.reward_specs: list[RewardSpec] = []
        self.policy_steps = 0  # batches trained on, those whose update was skipped included
        self.skipped_steps = 0  # of those, the ones that did not move the policy
        self.max_new_tokens = 0  # told by the rollout callback
        self.run_config = ""  # the whole config as YAML, where there is one: checkpoints carry it
        self.step_metrics: dict[str, float] = {}  # what the last training step logged, and nothing of an earlier one
        self.own_rng: dict[str, Any] | None = None  # where the last step left the random state
        self.rngs: list[dict[str, Any]] = []  # the same of every rank
        self._collapse: CollapseWatch | None = None
        self._resumed: dict[str, Any] | None = None
        self._resumed_schedules: list[dict[str, Any]] = []
        self._configured_options: list[list[dict[str, Any]]] = []

    # -- what a subclass says of itself ------------------------------------------------------------------------------

    @property
    def context(self) -> HiddenContext | None:
        """The hidden state that rollouts must bring along, or None."""
        return None

    @property
    def batches_done(self) -> int:
        """Training batches behind us."""
        return self.policy_steps

    @property
    def saves_together(self) -> bool:
        """Whether a checkpoint takes all ranks, for each holds only a share of what is trained."""
        return self.policy.shards is not None and self.policy.shards.trains_shares

    @property
    def warmup(self) -> tuple[int, int]:
        """Batches before the first policy step that are done, and how many there are."""
        return 0, 0

    def labelled(self, rollout: Rollout) -> Tensor:
        """Bool (N,): the groups of a training batch that rewards with the role ``anchor`` score; here none."""
        return torch.zeros(len(rollout.prompts), dtype=torch.bool)

    def shown(self, rollout: Rollout) -> Tensor | None:
        """Bool (B,): the responses that anchors are shown of the groups that they score; None: all."""
        return None

    @property
    def weight_names(self) -> list[str]:
        """Names of the K weighed rewards, in the order of the weights."""
        return [spec.name for spec in self.reward_specs if spec.role == "train"]

    def build(self, reward_specs: list[RewardSpec]) -> None:
        """Fix the rewards of this run; called by :meth:`setup`, or by hand outside a Trainer."""
        self.reward_specs = list(reward_specs)

    def optimizer_parts(self) -> list[tuple[Any, OptimizerCallable, Schedule | LRSchedulerCallable | None]]:
        """Parameters, optimizer and scheduler of everything that is trained, the policy first."""
        return [(self.policy.trained_parameters(), self.make_optimizer, self.make_scheduler)]

    def scheduled_steps(self) -> list[int | None]:
        """How often each scheduler of :meth:`optimizer_parts` is stepped in this run, None where nobody knows."""
        steps: float = self.trainer.max_steps
        if steps < 0:
            steps = self.trainer.estimated_stepping_batches
        return [int(steps) if math.isfinite(steps) else None] * 2

    def settings(self) -> dict[str, Any]:
        """The settings that shape training, as plain values, to be compared when a run is resumed."""
        return {
            **{f"policy.{name}": value for name, value in self.policy.settings.items()},
            "max_grad_norm": self.max_grad_norm,
            "micro_batch_tokens": self.micro_batch_tokens,
        }

    def training_state(self) -> dict[str, Any]:
        """Counters and buffers of a run, as plain values and tensors, for a checkpoint."""
        return {
            "policy_steps": self.policy_steps,
            "skipped_steps": self.skipped_steps,
            "frozen_states": self.frozen_states.state_dict(),
            **({} if self.stepper.loss_scale is None else {"loss_scale": self.stepper.loss_scale.state_dict()}),
        }

    def load_training_state(self, saved: dict[str, Any]) -> None:
        """Take back what :meth:`training_state` gave."""
        self.policy_steps, self.skipped_steps = saved["policy_steps"], saved["skipped_steps"]
        self.frozen_states.load_state_dict(saved.get("frozen_states", {}))
        if self.stepper.loss_scale is not None:
            self.stepper.loss_scale.load_state_dict(saved.get("loss_scale", {}))

    def check_settings(self, saved: dict[str, Any]) -> None:
        """Raise a ``UserError`` if a checkpoint made with these settings cannot serve this run."""

    def check_rewards(self, saved: list[RewardSpec]) -> None:
        """Raise a ``UserError`` if a checkpoint made with these rewards cannot serve this run."""

    # -- the end of a step -------------------------------------------------------------------------------------------

    def log_training(self, metrics: Metrics, batch_size: int) -> None:
        """Log a step, the wall seconds of its stages with it, as means over the ranks; stop after the last one."""
        times = {f"time/{stage}": seconds for stage, seconds in self.clock.pop_seconds().items()}
        self.own_rng = rng_state()
        self.step_metrics, self.rngs = joined_metrics({**metrics, **times}, self.own_rng)
        self.log_dict(self.step_metrics, batch_size=batch_size)
        if (entropy := self.step_metrics.get("policy/entropy")) is not None:
            self._collapse = self._collapse or CollapseWatch(self.policy.model.config.get_text_config().vocab_size)
            if text := self._collapse.see(entropy, self.policy_steps):
                rank_zero_warn(text)
        # skipped updates do not count in Lightning's global_step, so a run of nothing else would never end
        if 0 <= self.trainer.max_steps <= self.policy_steps:
            self.trainer.should_stop = True

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Learn from the trainer's callbacks which rewards there are."""
        trainer: Any = self.trainer
        save_whole_files(trainer)
        keep_rows(trainer)
        let_us_average(trainer.strategy, self)
        check_sharding(trainer, self.policy)
        end_together(trainer)
        if trainer.precision not in PRECISIONS:
            raise UserError(
                f"trainer.precision is {trainer.precision!r}: use 32-true, bf16-mixed or 16-mixed. The base model's own dtype "
                "is model.policy.dtype; adapters and Conductor stay in float32."
            )
        if stage == "fit":
            made = loss_scale_of(trainer, self.policy)  # each trainer has a scale of its own to switch off
            self.stepper.loss_scale = self.stepper.loss_scale or made
        for callback in trainer.callbacks:
            if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                raise UserError(
                    f"trainer.callbacks has {type(callback).__name__}, which averages and saves whole models, and a checkpoint "
                    "here holds what is trained only: take it out. A running average of the policy is its reference with "
                    "policy.reference: synced and a small sync_rate."
                )
        specs = [callback.spec for callback in trainer.callbacks if isinstance(callback, RewardSource)]
        if stage == "fit":
            check_monitors(trainer, self, specs)
        self.build(specs)

    def configure_optimizers(self) -> Any:
        """Optimizers and schedulers of :meth:`optimizer_parts`, in their order."""
        optimizers: list[Any] = []
        schedulers: list[Any] = []
        for (parameters, make_optimizer, made_by), steps in zip(
            self.optimizer_parts(), self.scheduled_steps(), strict=False
        ):
            try:
                optimizers.append(make_optimizer(parameters))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"model.optimizer or model.scheduler does not take these arguments: {error}."
                ) from error
            if made_by is not None:
                schedulers.append(make_scheduler(made_by, optimizers[-1], steps))
        if self._resumed is not None:
            checkpointing.check_optimizers(self._resumed, optimizers)
        self._configured_options = [checkpointing.group_options(optimizer) for optimizer in optimizers]
        return optimizers, schedulers

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Before anything of a training batch is logged, forget what the one before it logged.

        Lightning repeats the last value of a metric until the epoch ends, so that a reward of a task that is absent, or
        a judge that is dead, would go on as a row of values that nobody measured.
        """
        results = getattr(self.trainer, "_results", None) if self.trainer.training else None
        for metric in results.values() if results is not None else ():
            if metric.meta.on_step and not metric.meta.on_epoch:
                metric.reset()
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Where SIGTERM came to one rank, all of them end after this batch."""
        agree_to_end(self.trainer)

    def on_train_start(self) -> None:
        """Go on with the random state of the checkpoint, after any sanity check has used its own.

        A run that begins where a seed was set (``seed_everything``, as the command line does) draws from that seed, whatever
        callbacks and libraries have drawn before its first step.
        """
        trainer: Any = self.trainer
        if 0 <= trainer.max_steps <= self.policy_steps:
            # Lightning counts no skipped update, and would do one more
            trainer.should_stop = True
        if self._resumed is None:
            if self.own_rng is None and (seed := os.environ.get("PL_GLOBAL_SEED")) is not None:
                self.own_rng = seeded_state(zlib.crc32(f"{seed}/train".encode()))
            if trainer.world_size > 1:  # ranks begin alike, and would draw the same noise
                self.own_rng = rng_of_rank(self.own_rng or rng_state(), self.global_rank)
            return
        self.own_rng = rng_of_resumed(self._resumed, self.global_rank)
        set_rng_state(self.own_rng)
        parts = self.optimizer_parts()
        scheduled = [made_by is not None for _, _, made_by in parts]
        compared = checkpointing.configs_compared({checkpointing.KEY: self._resumed}, self.run_config)
        checkpointing.reapply_options(trainer.optimizers, self._configured_options, scheduled, report=not compared)
        self._go_on_with_schedules(scheduled)
        self._resumed = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw on from where the last step left off, whatever callbacks and libraries have drawn in between."""
        if self.own_rng is not None:
            set_rng_state(self.own_rng)

    def _go_on_with_schedules(self, scheduled: list[bool]) -> None:
        """Each scheduler of this run, of the policy and of the Conductor, at the step that the checkpoint reached."""
        assert self._resumed is not None
        saved = list(self._resumed_schedules)
        had = self._resumed.get("schedulers", scheduled[: len(saved)])
        states = [saved.pop(0) if each and saved else None for each in had]
        configs: list[Any] = list(self.trainer.lr_scheduler_configs)
        done = (self.policy_steps, int(self._resumed.get("conductor_updates", 0)))
        for part, is_scheduled in enumerate(scheduled):
            if is_scheduled:
                state = states[part] if part < len(states) else None
                checkpointing.go_on_with_schedule(
                    ("model.scheduler", "model.meta.scheduler")[part],
                    configs.pop(0).scheduler,
                    self._configured_options[part],
                    state,
                    done[part] if state is None else int(state.get("last_epoch", done[part])),
                )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What a checkpoint holds: the trained part of the policy, a synced reference, the rest of us; no base weights."""
        if self.policy.shards is not None:
            return self.gathered_state()
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        kept = {f"policy.{name}" for name in self.policy.saved_names()}
        return {name: value for name, value in state.items() if name in kept or not name.startswith("policy.")}

    def gathered_state(self, keep: bool = True) -> dict[str, Any]:
        """The same where parameters are cut over the ranks, gathered one by one. Collective.

        Args:
            keep: False: an empty dict, of a rank that takes part for the others.
        """
        state = self._with_policy(self.policy.saved_state(keep))
        return state if keep else {}

    def shares_state(self) -> dict[str, Any]:
        """The same with this rank's shares of what is cut."""
        return self._with_policy(self.policy.saved_shares())

    def _with_policy(self, saved: dict[str, Tensor]) -> dict[str, Any]:
        state: dict[str, Any] = {f"policy.{name}": value for name, value in saved.items()}
        for name, child in self.named_children():
            if child is not self.policy:
                state |= child.state_dict(prefix=f"{name}.")
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is not a parameter: counters, buffer, random state, the rewards' names, the settings.

        Raises:
            UserError: parameters or an optimizer's state are not finite, or a callback gives what is no plain value: the run
                could not go on from them.
        """
        trained = ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        broken = not_finite(trained, self.trainer.optimizers)
        if self.saves_together:  # each rank looks at its own shares
            broken = next(filter(None, gathered(broken)), "")
        if broken:
            raise UserError(
                f"The run has diverged: at policy step {self.policy_steps} {broken} is not finite, so this state is not "
                "saved. Go back to a checkpoint of an earlier step, with a lower learning rate."
            )
        checkpoint[checkpointing.KEY] = checkpointing.collect(self)
        for key, state in checkpoint.get("callbacks", {}).items():  # rewards and others of a user's own are among them
            checkpoint["callbacks"][key] = plain(state, f"{key}: `state_dict`")
        write_row_early(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, say where its settings differ, and take its counters back."""
        self._resumed = checkpointing.restore(self, checkpoint)
        # not Lightning's to restore: the config decides whether they are the same schedules
        self._resumed_schedules = checkpoint.get("lr_schedulers", [])
        checkpoint["lr_schedulers"] = []
        trainer: Any = self._trainer
        if trainer is not None and trainer.state.fn == "fit" and 0 <= trainer.max_steps <= self.policy_steps:
            rank_zero_warn(
                f"The checkpoint is at policy step {self.policy_steps} and trainer.max_steps is {trainer.max_steps}, so "
                "nothing is left to train: give --trainer.max_steps the number that is to be reached."
            )
