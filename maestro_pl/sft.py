"""Supervised fine-tuning on the references: the paper's baseline "SFT", on the same data, policy and evaluation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from maestro_pl.algorithm import Metrics
from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.errors import UserError
from maestro_pl.policy.padding import greedy_slices
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import Rollout
from maestro_pl.training.policy_module import PolicyModule

REFERENCE_SLOT = "{reference}"


class SFTModule(PolicyModule):
    """A LoRA policy trained to give the reference: the mean negative log-likelihood of its tokens, prompts left out.

    Validation and test sample and score responses as those of :class:`MaestroModule` do, so that the runs compare;
    there is no weigher, and rewards of every role are only reported.

    Args:
        policy: the model that is trained.
        target: the text that is learned, with the slot ``{reference}``; the end-of-sequence token follows it. Default:
            the reference in an answer block behind an empty think block, the form that the format reward asks for.
        column: the data column with the reference text.
        optimizer: of the policy.
        scheduler: of its learning rate, stepped once a step.
        max_grad_norm: gradient norm that the gradient is clipped to; 0 does not clip.
        micro_batch_tokens: at most this many tokens in one forward pass of the update.

    Raises:
        UserError: a target without the slot.
    """

    learns_from_rollouts = False

    def __init__(
        self,
        policy: LoRAPolicy,
        target: str = "<think>\n</think>\n<answer>{reference}</answer>",
        column: str = "reference",
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        scheduler: Schedule | LRSchedulerCallable | None = None,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 16384,
    ) -> None:
        super().__init__(policy, optimizer, scheduler, max_grad_norm, micro_batch_tokens)
        if REFERENCE_SLOT not in target:
            raise UserError(f"model.target={target!r}: mark with {REFERENCE_SLOT} where the reference goes.")
        self.target, self.column = target, column
        policy.drop_reference()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """One step on the batch's references, in micro-batches; a row without a reference is left out and counted."""
        with self.clock("update"):
            prompts_B, targets_B = self.examples(batch)
            metrics: Metrics = {
                "sft/without_reference": float(len(batch["prompt_ids"]) - len(targets_B)),
                "length/target": sum(map(len, targets_B)) / max(len(targets_B), 1),
            }
            metrics |= self.update(prompts_B, targets_B)
            self.policy.whole()
            self.policy_steps += 1
            self.stepper.step_scheduler(0)
        self.skipped_steps += int(float(metrics["policy/skipped"]))
        self.log_training(metrics, len(batch["prompt_ids"]))

    def examples(self, batch: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts and of what is to be learned, for the rows with a reference.

        Raises:
            UserError: the rows have no such column, or it holds something other than text.
        """
        if self.column not in batch:
            raise UserError(
                f"model.column={self.column!r}: the data rows have no such column; map it under data.sources."
            )
        # the tokenizer's own: models name several, and the first of them may end a document and not a turn
        eos = self.policy.tokenizer.eos_token_id
        end = self.policy.eos_token_ids[:1] if eos is None else [int(eos)]
        prompts, targets = [], []
        for prompt_ids, reference in zip(batch["prompt_ids"], batch[self.column], strict=True):
            if reference is None or reference == "":
                continue
            if not isinstance(reference, str):
                raise UserError(
                    f"model.column={self.column!r} holds {reference!r} ({type(reference).__name__}): name a column of texts."
                )
            prompts.append(list(prompt_ids))
            targets.append(self.policy.encode(self.target.replace(REFERENCE_SLOT, reference)) + end)
        return prompts, targets

    def update(self, prompts_B: list[list[int]], targets_B: list[list[int]]) -> Metrics:
        """One optimizer step on -1/T sum_t log p(target_t | prompt, target_<t), T the tokens of all targets of all ranks."""
        tokens = self._sum_over_ranks(float(sum(map(len, targets_B))))
        if not tokens:
            return {"train/loss": 0.0, "policy/skipped": 1.0}
        sizes = [len(prompt) + len(target) for prompt, target in zip(prompts_B, targets_B, strict=True)]
        order = sorted(range(len(sizes)), key=sizes.__getitem__)  # less padding where rows are padded

        def cuts() -> list[list[int]]:
            chosen = greedy_slices([sizes[i] for i in order], self.micro_batch_tokens)
            return [[order[i] for i in cut] for cut in chosen]

        def accumulate() -> Tensor:
            self.policy.cut()
            self.stepper.optimizers[0].zero_grad()
            passes = cuts()
            total = torch.zeros((), device=self.device)
            for number, has_work in enumerate(self.policy.passes_together(len(passes))):
                if not has_work:
                    self.stepper.backward(self.policy.idle_pass())
                    continue
                rows = passes[number]
                self.clock.note(f"micro-batch {number + 1}/{len(passes)}")
                statistics = self.policy.token_statistics([prompts_B[i] for i in rows], [targets_B[i] for i in rows])
                # gradients are averaged over the ranks
                loss = -statistics.logps_T.sum() * (self.trainer.world_size / tokens)
                self.stepper.backward(loss)
                total += loss.detach()
            return total

        total = self.stepper.within_memory(accumulate, lambda: [sum(sizes[i] for i in rows) for rows in cuts()])
        return {"train/loss": total, **self.stepper.finish(total)}

    def _sum_over_ranks(self, value: float) -> float:
        if self.trainer.world_size == 1:
            return value
        return float(self.trainer.strategy.reduce(torch.tensor(value, device=self.device), reduce_op="sum"))

    def weigh_batch(self, rollout: Rollout, sample: bool) -> None:
        """Nothing: there are no weights."""

    def on_train_end(self) -> None:
        """Nothing to say."""

    def settings(self) -> dict[str, Any]:
        """See :class:`PolicyModule`."""
        return {**super().settings(), "target": self.target, "column": self.column}
