"""A few responses with their rewards, weights and advantages, as a table in the loggers that show tables."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.records import records
from maestro_pl.rollout import Rollout
from maestro_pl.run.others import told

Cells = dict[str, list[Any]]  # column to one cell a response

LONGEST = 2000  # characters of a text in a table
FIRST = ("step", "task", "prompt", "response", "finish_reason", "reward", "advantage")


class ResponseTable(Callback):
    """Sends a few groups of responses to the loggers that take tables: W&B, MLflow and TensorBoard.

    One row a response: prompt, response, scalar reward, advantage, and every reward and weight. In training it is the first
    groups of every ``every_n_steps``-th step (key ``responses/train``), in an evaluation the first groups of the first batch
    (``responses/val``, ``responses/test``). W&B gets a ``wandb.Table``, MLflow the artifact ``responses/<stage>.json``, which
    grows, TensorBoard a text; any other logger whose methods have these names gets the same. A logger that fails is warned
    of once, and the run goes on: ``rollouts.jsonl`` has the responses.

    Args:
        every_n_steps: policy steps between two tables of training; 0 sends none.
        groups: in a table; 0 sends none.
    """

    def __init__(self, every_n_steps: int = 50, groups: int = 2) -> None:
        self.every_n_steps = every_n_steps
        self.groups = groups
        self._failed: set[str] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send the first groups of the batch of every ``every_n_steps``-th step, the first included."""
        step = _step(trainer, pl_module)
        if self.every_n_steps and step > 0 and (step - 1) % self.every_n_steps == 0:
            self._send(trainer, pl_module, batch, "train")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Send the first groups of the first batch."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._send(trainer, pl_module, batch, "val")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Send the first groups of the first batch."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._send(trainer, pl_module, batch, "test")

    def _send(self, trainer: Trainer, pl_module: LightningModule, batch: Any, stage: str) -> None:
        rollout = batch.get("rollout") if isinstance(batch, dict) else None
        if not isinstance(rollout, Rollout) or not trainer.is_global_zero or not self.groups:
            return
        step = _step(trainer, pl_module)
        table: Cells | None = None
        for logger in trainer.loggers:
            name = type(logger).__name__
            try:
                send = _way_into(logger)
                if send is None:
                    continue
                table = table or cells(rollout, self.groups, step)
                send(stage, table, step)
            except Exception as error:  # no network, a full disk: nothing that training depends on
                if name not in self._failed:
                    self._failed.add(name)
                    rank_zero_warn(
                        f"{name} did not take the table of responses ({told(error)}); the run goes on, and rollouts.jsonl "
                        "has responses."
                    )


def cells(rollout: Rollout, groups: int, step: int) -> Cells:
    """The first groups as columns: step, task, texts, scalar reward, advantage, and each reward and weight by name."""
    count = min(len(rollout), groups * rollout.group_size)
    rows = records(rollout)[:count]
    columns: Cells = {name: [] for name in FIRST}
    for row in rows:
        plain = {"step": step, **row, "prompt": _prompt(row["prompt"])}
        for name in FIRST:
            value = plain[name]
            columns[name].append(_cut(value) if isinstance(value, str) else value)
    for kind in ("rewards", "weights"):
        for name in rows[0][kind] if rows else ():
            columns[f"{kind}/{name}"] = [row[kind][name] for row in rows]
    return columns


def markdown(table: Cells) -> str:
    """The table in Markdown, every text as it is: signs that would be taken for markup are escaped."""
    body = (map(_markdown_cell, row) for row in zip(*table.values(), strict=True))
    lines = [map(_markdown_cell, table), ["---"] * len(table), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _way_into(logger: Any) -> Any:
    """How this logger takes a table, as a function of stage, table and step; None: it takes none."""
    if callable(getattr(logger, "log_table", None)):  # W&B's

        def as_table(stage: str, table: Cells, step: int) -> None:
            rows = [list(row) for row in zip(*table.values(), strict=True)]
            logger.log_table(key=f"responses/{stage}", columns=list(table), data=rows, step=step)

        return as_table
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "log_table", None)) and hasattr(logger, "run_id"):  # MLflow's client

        def as_artifact(stage: str, table: Cells, step: int) -> None:
            experiment.log_table(run_id=logger.run_id, data=table, artifact_file=f"responses/{stage}.json")

        return as_artifact
    if callable(getattr(experiment, "add_text", None)):  # TensorBoard's writer

        def as_text(stage: str, table: Cells, step: int) -> None:
            experiment.add_text(f"responses/{stage}", markdown(table), global_step=step)

        return as_text
    return None


def _step(trainer: Any, module: Any) -> int:
    return int(getattr(module, "policy_steps", trainer.global_step))


def _prompt(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    texts = (m.get("content") for m in prompt)
    return "\n\n".join(
        f"{m.get('role')}: {text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str)}"
        for m, text in zip(prompt, texts, strict=True)
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"


_MARKUP = str.maketrans({sign: f"\\{sign}" for sign in "\\`*_{}[]()#+-.!|"})


def _markdown_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return html.escape(str(value), quote=False).translate(_MARKUP).replace("\n", "<br>")
