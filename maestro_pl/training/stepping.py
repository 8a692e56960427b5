"""One optimizer step, whatever the loss is: backward passes within memory, clipping, the step itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.errors import OutOfMemory, UserError
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.sharding import gathered_value
from maestro_pl.run.random_state import kept_rng
from maestro_pl.run.ranks import average_gradients, gathered
from maestro_pl.run.recovery import first_line, is_out_of_memory, with_less
from maestro_pl.training.float16 import LossScale

Result = TypeVar("Result")


class Steppable(Protocol):
    """What a stepper needs of the LightningModule whose optimizers it steps."""

    policy: LoRAPolicy
    policy_steps: int
    max_grad_norm: float
    micro_batch_tokens: int

    @property
    def trainer(self) -> Any:
        """Lightning's trainer."""

    def optimizers(self) -> Any:
        """Lightning's optimizers."""

    def lr_schedulers(self) -> Any:
        """Lightning's schedulers."""

    def manual_backward(self, loss: Tensor) -> None:
        """Lightning's backward."""

    def optimizer_parts(self) -> list[tuple[Any, Any, Any]]:
        """Parameters, optimizer and scheduler of everything that is trained, the policy first."""


class Stepper:
    """Backward passes and optimizer steps of a module that optimises by hand.

    Args:
        module: the module; ``micro_batch_tokens`` is halved where memory runs out.
    """

    def __init__(self, module: Steppable) -> None:
        self.module = module
        self.loss_scale: LossScale | None = None  # of a run in float16

    @property
    def optimizers(self) -> list[Any]:
        """Lightning's wrappers, in the order of ``optimizer_parts``."""
        optimizers: Any = self.module.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; ranks exchange gradients before the step, in :meth:`finish`."""
        self.backward_unscaled(loss if self.loss_scale is None else self.loss_scale.scaled(loss))

    def backward_unscaled(self, loss: Tensor) -> None:
        """Backward of a loss that reads no float16, as the Conductor's."""
        with kept_rng():  # callbacks may draw in their hooks
            self.module.manual_backward(loss)

    def finish(self, loss: Tensor, last: bool = True, together: bool = False) -> Metrics:
        """Average the policy's gradient over the ranks, clip it and step its optimizer. Collective.

        A gradient that is not finite moves nothing.

        Args:
            loss: what the gradient is of, for the warning.
            last: the last optimizer step on this batch, which Lightning counts in ``global_step``.
            together: the other optimizers' gradients are of this loss too.

        Returns:
            ``policy/grad_norm`` before clipping, and ``policy/skipped``; in float16 ``policy/loss_scale``, of this step.
        """
        module, optimizer, scale = self.module, self.optimizers[0], self.loss_scale
        average_gradients(module.policy.trained_parameters())
        metrics: Metrics = {}
        if scale is not None:
            metrics["policy/loss_scale"] = scale.value
            scale.unscale([each.optimizer for each in (self.optimizers if together else [optimizer])])
        norm = gathered_value(
            torch.nn.utils.clip_grad_norm_(module.policy.trained_parameters(), module.max_grad_norm or float("inf"))
        )
        if scale is not None:
            scale.update()
        if not torch.isfinite(norm):
            if scale is not None and scale.value >= 1.0:
                rank_zero_info(
                    f"Policy step {module.policy_steps + 1} left out: a gradient overflowed in float16. The loss scale is now "
                    f"{scale.value:g}; some such steps at the beginning are usual."
                )
            else:
                rank_zero_warn(
                    f"Policy step {module.policy_steps + 1} skipped: its gradient is not finite (loss {float(loss):.4g}). "
                    "The parameters are unchanged; lower the learning rate or use dtype float32 if this repeats."
                )
            optimizer.zero_grad()
            return {"policy/grad_norm": norm, "policy/skipped": 1.0, **metrics}
        with kept_rng(moved_on=True):  # callbacks may draw in their hooks, and optimizers that round at random
            (optimizer if last else optimizer.optimizer).step()
        return {"policy/grad_norm": norm, "policy/skipped": 0.0, **metrics}

    def within_memory(self, accumulate: Callable[[], Result], passes: Callable[[], list[int]]) -> Result:
        """Accumulate gradients; where memory runs out, in passes of half as many tokens, from the same random state.

        Args:
            accumulate: forward and backward of every pass, from the beginning; reads ``micro_batch_tokens``.
            passes: tokens of the passes that it makes with the ``micro_batch_tokens`` of the moment.

        Raises:
            OutOfMemory: passes cannot be made smaller, or ranks whose parameters are cut wait for this one's.
        """
        if self.module.policy.shards is not None:
            return _once(accumulate, self.module.micro_batch_tokens)
        return with_less(accumulate, lambda message: self._halve(message, passes), all_ranks=True)

    def _halve(self, message: str, passes: Callable[[], list[int]]) -> None:
        module = self.module
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        longest, before = _longest(passes), module.micro_batch_tokens
        module.micro_batch_tokens = max(min(longest, before) // 2, 1)
        if _longest(passes) >= longest:
            module.micro_batch_tokens = before
            raise OutOfMemory(
                f"Memory ran out in an update of the smallest piece, {longest} tokens in one pass ({message}), and "
                "nothing smaller is left: `maestro-pl estimate --config ...` says what to change "
                "(gradient_checkpointing, quantization, shorter responses)."
            )
        rank_zero_warn(
            f"Memory ran out in an update of {longest} tokens a pass ({message}). The same rollout is learned from "
            f"again, and from now on with model.micro_batch_tokens={module.micro_batch_tokens}: give that to begin with "
            "it."
        )

    def step_scheduler(self, index: int) -> None:
        """Step the scheduler of the ``index``-th part that is trained, if it has one.

        Raises:
            UserError: it ends before the run does.
        """
        scheduled = [make_scheduler is not None for _, _, make_scheduler in self.module.optimizer_parts()]
        if index < len(scheduled) and scheduled[index]:
            schedulers: Any = self.module.lr_schedulers()
            schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
            scheduler = schedulers[sum(scheduled[:index])]
            try:
                scheduler.step()
            except ValueError as error:  # OneCycleLR after its last step
                key, kind = ("model.scheduler", "model.meta.scheduler")[index], type(scheduler).__name__
                raise UserError(
                    f"{key}: {kind} ends before the run does ({error}): give it the steps of the whole run."
                ) from error


def _once(accumulate: Callable[[], Result], tokens: int) -> Result:
    try:
        return accumulate()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"Memory ran out in an update ({first_line(error)}), and with trainer.strategy=fsdp the ranks cannot begin anew, "
            f"for they wait for each other's shares in the middle of it: give less than model.micro_batch_tokens={tokens}."
        ) from error


def _longest(passes: Callable[[], list[int]]) -> int:
    """Tokens of the longest pass of any rank. Collective."""
    return max(gathered(max(passes(), default=0)))
