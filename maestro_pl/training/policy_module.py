"""What every way of training the policy shares: evaluation, optimizers, checkpoints, counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from maestro_pl.errors import OutOfMemory, UserError
from maestro_pl.evaluation.loop import EvaluationLoop
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import RewardSource, RewardSpec, Rollout
from maestro_pl.run.random_state import set_rng_state
from maestro_pl.run.recovery import with_less
from maestro_pl.training import checkpointing
from maestro_pl.training.clock import StageClock

Result = TypeVar("Result")


class PolicyModule(EvaluationLoop):
    """A LightningModule around a :class:`LoRAPolicy`, optimised by hand.

    Args:
        policy: the model that is trained.
        optimizer: of the policy.
        scheduler: of its learning rate, stepped once a policy step.
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
        scheduler: LRSchedulerCallable | None,
        max_grad_norm: float,
        micro_batch_tokens: int,
    ) -> None:
        super().__init__()
        if not max_grad_norm >= 0:
            raise UserError(f"model.max_grad_norm={max_grad_norm}: expected at least 0.")
        if micro_batch_tokens < 1:
            raise UserError(f"model.micro_batch_tokens={micro_batch_tokens}: expected at least 1.")
        self.policy = policy
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.max_grad_norm, self.micro_batch_tokens = max_grad_norm, micro_batch_tokens
        self.stages = StageClock()
        self.reward_specs: list[RewardSpec] = []
        self.policy_steps = 0  # batches trained on, those whose update was skipped included
        self.skipped_steps = 0  # of those, the ones that did not move the policy
        self.max_new_tokens = 0  # told by the rollout callback
        self._resumed: dict[str, Any] | None = None
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

    def labelled(self, rollout: Rollout) -> Tensor:
        """Bool (N,): the groups of a training batch that rewards with the role ``anchor`` score; here none."""
        return torch.zeros(len(rollout.prompts), dtype=torch.bool)

    @property
    def weight_names(self) -> list[str]:
        """Names of the K weighed rewards, in the order of the weights."""
        return [spec.name for spec in self.reward_specs if spec.role == "train"]

    def build(self, reward_specs: list[RewardSpec]) -> None:
        """Fix the rewards of this run; called by :meth:`setup`, or by hand outside a Trainer."""
        self.reward_specs = list(reward_specs)

    def optimizer_parts(self) -> list[tuple[Any, OptimizerCallable, LRSchedulerCallable | None]]:
        """Parameters, optimizer and scheduler of everything that is trained, the policy first."""
        return [(self.policy.trained_parameters(), self.make_optimizer, self.make_scheduler)]

    def settings(self) -> dict[str, Any]:
        """The settings that shape training, as plain values, to be compared when a run is resumed."""
        lora = self.policy.lora
        return {
            "policy.model": self.policy.name_or_path,
            "policy.lora": None if lora is None else f"r={lora.r}, alpha={lora.alpha}, targets={lora.target_modules}",
            "policy.reference": self.policy.reference,
            "max_grad_norm": self.max_grad_norm,
        }

    def training_state(self) -> dict[str, Any]:
        """Counters and buffers of a run, as plain values and tensors, for a checkpoint."""
        return {"policy_steps": self.policy_steps, "skipped_steps": self.skipped_steps}

    def load_training_state(self, saved: dict[str, Any]) -> None:
        """Take back what :meth:`training_state` gave."""
        self.policy_steps, self.skipped_steps = saved["policy_steps"], saved["skipped_steps"]

    def check_settings(self, saved: dict[str, Any]) -> None:
        """Raise a ``UserError`` if a checkpoint made with these settings cannot serve this run."""

    def check_rewards(self, saved: list[RewardSpec]) -> None:
        """Raise a ``UserError`` if a checkpoint made with these rewards cannot serve this run."""

    # -- one step of the policy's optimizer --------------------------------------------------------------------------

    def finish_policy_step(self, loss: Tensor, last: bool = True) -> dict[str, Tensor | float]:
        """Clip the gradient and step the policy's optimizer; a gradient that is not finite moves nothing.

        Args:
            loss: what the gradient is of, for the warning.
            last: the last optimizer step on this batch, which Lightning counts in ``global_step``.

        Returns:
            ``policy/grad_norm`` before clipping, and ``policy/skipped``.
        """
        optimizer = self._optimizers()[0]
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trained_parameters(), self.max_grad_norm or float("inf"))
        if not torch.isfinite(norm):
            rank_zero_warn(
                f"Policy step {self.policy_steps + 1} skipped: its gradient is not finite (loss {float(loss):.4g}). "
                "The parameters are unchanged; lower the learning rate or use dtype float32 if this repeats."
            )
            optimizer.zero_grad()
            return {"policy/grad_norm": norm, "policy/skipped": 1.0}
        (optimizer if last else optimizer.optimizer).step()
        return {"policy/grad_norm": norm, "policy/skipped": 0.0}

    def within_memory(self, accumulate: Callable[[], Result], passes: Callable[[], list[int]]) -> Result:
        """Accumulate gradients; where memory runs out, in passes of half as many tokens, from the same random state.

        Args:
            accumulate: forward and backward of every pass, from the beginning; reads ``micro_batch_tokens``.
            passes: tokens of the passes that it makes with the ``micro_batch_tokens`` of the moment.

        Raises:
            OutOfMemory: passes cannot be made smaller, or other ranks may be waiting for this one's gradients.
        """

        def halve(message: str) -> None:
            for optimizer in self._optimizers():
                optimizer.zero_grad()
            longest, before = max(passes()), self.micro_batch_tokens
            if self.trainer.world_size > 1:
                raise OutOfMemory(
                    f"Memory ran out in an update of {longest} tokens a pass ({message}), and other ranks wait for its "
                    f"gradients: go on from the checkpoint with model.micro_batch_tokens={max(longest // 2, 1)}."
                )
            self.micro_batch_tokens = max(min(longest, before) // 2, 1)
            if max(passes()) >= longest:
                self.micro_batch_tokens = before
                raise OutOfMemory(
                    f"Memory ran out in an update of the smallest piece, {longest} tokens in one pass ({message}), and nothing "
                    "smaller is left: `maestro-pl estimate --config ...` says what to change (gradient_checkpointing, "
                    "quantization, shorter responses)."
                )
            rank_zero_warn(
                f"Memory ran out in an update of {longest} tokens a pass ({message}). The same rollout is learned from again, "
                f"and from now on with model.micro_batch_tokens={self.micro_batch_tokens}: give that to begin with it."
            )

        return with_less(accumulate, halve)

    def backward_part(self, loss: Tensor, sync: bool) -> None:
        """Backward of one micro-batch; ranks exchange gradients in the last one only."""
        strategy: Any = self.trainer.strategy
        if sync or not hasattr(strategy, "block_backward_sync"):
            self.manual_backward(loss)
            return
        with strategy.block_backward_sync():
            self.manual_backward(loss)

    def stop_at_max_steps(self) -> None:
        """End the run after ``max_steps`` batches: skipped updates do not count in Lightning's global_step."""
        if 0 <= self.trainer.max_steps <= self.policy_steps:
            self.trainer.should_stop = True

    def _optimizers(self) -> list[Any]:
        optimizers: Any = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def step_scheduler(self, index: int) -> None:
        """Step the scheduler of the ``index``-th of :meth:`optimizer_parts`, if it has one."""
        scheduled = [make_scheduler is not None for _, _, make_scheduler in self.optimizer_parts()]
        if index < len(scheduled) and scheduled[index]:
            schedulers: Any = self.lr_schedulers()
            schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
            schedulers[sum(scheduled[:index])].step()

    # -- Lightning ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Learn from the trainer's callbacks which rewards there are."""
        trainer: Any = self.trainer
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise UserError(
                f"trainer.precision is {trainer.precision!r}: use 32-true or bf16-mixed. The base model's own dtype is "
                "model.policy.dtype; adapters and Conductor stay in float32."
            )
        self.build([callback.spec for callback in trainer.callbacks if isinstance(callback, RewardSource)])

    def configure_optimizers(self) -> Any:
        """Optimizers and schedulers of :meth:`optimizer_parts`, in their order."""
        optimizers: list[Any] = []
        schedulers: list[Any] = []
        for parameters, make_optimizer, make_scheduler in self.optimizer_parts():
            try:
                optimizers.append(make_optimizer(parameters))
                if make_scheduler is not None:
                    schedulers.append(make_scheduler(optimizers[-1]))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"model.optimizer or model.scheduler does not take these arguments: {error}."
                ) from error
        if any(isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau) for s in schedulers):
            raise UserError("ReduceLROnPlateau watches a metric; model.scheduler is stepped by count: use another one.")
        if self._resumed is not None:
            checkpointing.check_optimizers(self._resumed, optimizers)
        self._configured_options = [checkpointing.group_options(optimizer) for optimizer in optimizers]
        return optimizers, schedulers

    def on_train_start(self) -> None:
        """Go on with the random state of the checkpoint, after any sanity check has used its own."""
        if self._resumed is None:
            return
        set_rng_state(self._resumed["rng"])
        scheduled = [make_scheduler is not None for _, _, make_scheduler in self.optimizer_parts()]
        checkpointing.reapply_options(self.trainer.optimizers, self._configured_options, scheduled)
        self._resumed = None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What a checkpoint holds: the trained part of the policy, a synced reference, the rest of us; no base weights."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        kept = {f"policy.{name}" for name in self.policy.saved_names()}
        return {name: value for name, value in state.items() if name in kept or not name.startswith("policy.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is not a parameter: counters, buffer, random state, the rewards' names, the settings."""
        checkpoint[checkpointing.KEY] = checkpointing.collect(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, say where its settings differ, and take its counters back."""
        self._resumed = checkpointing.restore(self, checkpoint)
