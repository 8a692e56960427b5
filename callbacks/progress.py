"""What the run is doing, on a terminal and in a log file; a long stage is never silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import rich
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from maestro_pl.rollout import Rollout

TOKENS, LOSS = "tokens", "loss"  # the numbers that are no rewards


@dataclass
class Progress:
    """Where the run is.

    Attributes:
        phase: ``warm-up`` (of the Conductor, before the first step), ``train``, ``validate``, ``check`` (the validation
            before training), ``test`` or ``predict``.
        done: steps or batches of the phase that are done.
        total: of how many; None where it is not known.
        resumed: value of ``done`` when the phase began here.
        since: clock at the phase's begin.
        stage: what happens in the step: rollout, rewards, update, ...; empty between stages.
        note: how far the stage is.
        stage_since: clock at the stage's begin.
        numbers: last known values to show, in order.
        seconds: wall seconds of the last step's stages.
    """

    phase: str = ""
    done: int = 0
    total: int | None = None
    resumed: int = 0
    since: float = 0.0
    stage: str = ""
    note: str = ""
    stage_since: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def position(self) -> str:
        """``train 3/100``."""
        return f"{self.phase} {self.done}/{'?' if self.total is None else self.total}"

    def left(self, now: float) -> str:
        """Time left at the pace so far, or an empty string."""
        paced = self.done - self.resumed
        if self.total is None or paced <= 0 or self.done >= self.total:
            return ""
        return f"{duration((now - self.since) / paced * (self.total - self.done))} left"

    def line(self, now: float) -> str:
        """The whole state after a step, in one line."""
        stages = " ".join(f"{name} {seconds:.1f}s" for name, seconds in self.seconds.items())
        return "  ".join(part for part in (self.position(), self.figures(), stages, self.left(now)) if part)

    def figures(self) -> str:
        """``em 0.512  tokens 48.3  loss -0.0123``, with several tasks ``em gsm8k 0.512, tombench 0.3  ...``."""
        shown: dict[str, list[str]] = {}
        for label, value in self.numbers.items():
            name, _, task = label.partition("/")
            number = f"{0.0 if abs(value) < 1e-6 else value:.3g}"  # rounding of a mean of 0
            shown.setdefault(name, []).append(f"{task} {number}".strip())
        return "  ".join(f"{name} {', '.join(numbers)}" for name, numbers in shown.items())

    def doing(self, now: float) -> str:
        """What happens inside the step: ``rollout 32/64 responses, 41 s``."""
        if not self.stage:
            return f"between stages, {duration(now - self.stage_since)}"
        return f"{' '.join(filter(None, (self.stage, self.note)))}, {duration(now - self.stage_since)}"


class RewardFigures:
    """The few numbers that say how a batch's responses were judged: means of raw scores, in a fixed order.

    The metrics come first, each for each task where there are at most four tasks; then the anchors, which score few
    groups; and where no metric scored the batch, the rewards that are weighed. What scored nothing in the batch is left
    out, and there are never more than ``most``.

    Args:
        most: numbers at most.
        most_tasks: tasks that have a number of their own at most.
    """

    def __init__(self, most: int = 6, most_tasks: int = 4) -> None:
        self.most, self.most_tasks = most, most_tasks
        self._tasks: dict[str, set[str]] = {}  # of each metric, seen so far: a batch need not hold them all

    def of(self, rollout: Rollout) -> dict[str, float]:
        """Label to mean, over the responses of the batch that the reward applies to."""
        scores = rollout.rewards
        metrics = [name for name, scored in scores.items() if scored.spec.role == "metric"]
        anchors = [name for name, scored in scores.items() if scored.spec.role == "anchor"]
        weighed = [name for name, scored in scores.items() if scored.spec.role in ("train", "gate")]
        figures: dict[str, float | None] = {}
        by_task = self._by_task(rollout, metrics, len(anchors))
        for name in metrics:
            tasks = sorted(self._tasks[name]) if by_task else []
            if len(tasks) > 1:
                figures |= {f"{name}/{task}": _mean(rollout, name, task) for task in tasks}
            else:
                figures[_label(name)] = _mean(rollout, name)
        measured = any(bool(scores[name].mask_B.any()) for name in metrics)
        for name in [*anchors, *([] if measured else weighed)]:
            figures[_label(name)] = _mean(rollout, name)
        return dict([(label, value) for label, value in figures.items() if value is not None][: self.most])

    def _by_task(self, rollout: Rollout, metrics: Sequence[str], others: int) -> bool:
        for name in metrics:
            applies = rollout.rewards[name].mask_B.tolist()
            self._tasks.setdefault(name, set()).update(
                task for task, scored in zip(rollout.tasks, applies, strict=True) if scored
            )
        tasks = set().union(*(self._tasks[name] for name in metrics))
        figures = sum(max(1, len(self._tasks[name])) for name in metrics)
        return len(tasks) <= self.most_tasks and figures + others <= self.most


class StageProgressBar(ProgressBar):
    """Shows step (first those of the Conductor's warm-up), stage (rollout, rewards, ...), rewards, tokens and loss.

    The rewards' numbers are means of raw scores over the batch's responses, the metrics and anchors where there are any
    (:class:`RewardFigures`); ``tokens`` is the mean length of a response. The scalar reward is not among them: its mean
    is 0 wherever the rewards are normalised inside their groups.

    On a terminal it is a live bar. Elsewhere (a pipe, a log file, a notebook) it prints a line after each of the first
    steps and then one every ``every_s`` seconds, and says what is going on whenever nothing was printed for
    ``heartbeat_s`` seconds, also from inside one long stage.

    Args:
        every_s: seconds between two lines where the output is no terminal.
        heartbeat_s: longest silence in seconds where the output is no terminal.
        first_steps: that many steps have a line each, whatever ``every_s`` is.
        live: True or False overrides the detection of a terminal.
    """

    def __init__(
        self, every_s: float = 10.0, heartbeat_s: float = 20.0, first_steps: int = 5, live: bool | None = None
    ) -> None:
        super().__init__()
        self.every_s, self.heartbeat_s, self.first_steps = every_s, heartbeat_s, first_steps
        self.live = live
        self.progress = Progress()
        self._rewards = RewardFigures()
        self._training: Progress | None = None  # set aside while a validation inside `fit` is shown
        self._enabled = True
        self._clock: Callable[[], float] = time.monotonic
        self._lock = threading.Lock()
        self._spoken = self._clock()
        self._display: Live | None = None
        self._beat: threading.Thread | None = None
        self._ended = threading.Event()

    def __rich__(self) -> RenderableType:
        """The live bar: one row for the step, one for the stage and the numbers."""
        now, p = self._clock(), self.progress
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        bar = Bar(total=float(p.total or 1), completed=float(p.done), pulse=p.total is None)
        row.add_row(Text(p.position(), style="bold"), bar, p.left(now) or duration(now - p.since))
        return Group(row, Text(f"  {p.doing(now)}  {p.figures()}", overflow="fold"))

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning does so on every rank but the first."""
        self._enabled = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to the module's stages."""
        super().setup(trainer, pl_module, stage)
        clock = getattr(pl_module, "clock", None)
        if clock is not None and self._on_stage not in clock.listeners:
            clock.listeners.append(self._on_stage)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop listening and showing."""
        self._stop()
        clock = getattr(pl_module, "clock", None)
        if clock is not None and self._on_stage in clock.listeners:
            clock.listeners.remove(self._on_stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self.teardown(trainer, pl_module, "")

    # -- phases ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the warm-up's batch or the step that a checkpoint left off at."""
        self._begin_training(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        # of this step alone: Lightning's own keep the last value of what is absent
        metrics = getattr(pl_module, "step_metrics", None)
        if metrics is None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        times = {k.removeprefix("time/"): v for k, v in metrics.items() if k.startswith("time/") and k.count("/") == 1}
        numbers = self._numbers(batch)
        if "train/loss" in metrics:
            numbers[LOSS] = metrics["train/loss"]
        if self.progress.phase != "warm-up":
            self._advance(_step(trainer, pl_module), numbers, times)
            return
        done, total = _warmup(pl_module)
        self._advance(done, numbers, times)
        if done >= total:
            self._begin_training(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self._stop()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation in place of the training, until it ends."""
        if self.progress.phase in ("warm-up", "train"):
            self._training = self.progress
        self._begin("check" if trainer.sanity_checking else "validate", self._batches("val"))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Show the batch."""
        self._advance(self.progress.done + 1, self._numbers(batch))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the training, if there is one."""
        if self._training is not None:
            self.progress, self._training = self._training, None
        else:
            self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin("test", self._batches("test"))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Show the batch."""
        self._advance(self.progress.done + 1, self._numbers(batch))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self._stop()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._begin("predict", self._batches("predict"))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Show the batch."""
        self._advance(self.progress.done + 1, self._numbers(batch))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self._stop()

    # -- output ------------------------------------------------------------------------------------------------------

    def _begin_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done, total = _warmup(pl_module)
        if done < total:
            self._begin("warm-up", total, done)
        else:
            self._begin("train", trainer.max_steps if trainer.max_steps > 0 else None, _step(trainer, pl_module))

    def _begin(self, phase: str, total: int | None, done: int = 0) -> None:
        now = self._clock()
        self.progress = Progress(phase, done, total, resumed=done, since=now, stage_since=now)
        if not self._enabled:
            return
        console = rich.get_console()
        live = console.is_terminal and not console.is_jupyter if self.live is None else self.live
        if not live:
            self._say(f"{phase}: {'?' if total is None else total} {'steps' if phase == 'train' else 'batches'}")
            self._start_heartbeat()
        elif self._display is None:
            self._display = Live(self, console=console, refresh_per_second=4)
            self._display.start()

    def _advance(self, done: int, numbers: dict[str, float], seconds: dict[str, float] | None = None) -> None:
        p = self.progress
        p.done, p.numbers, p.seconds = done, numbers, seconds or {}
        now = self._clock()
        early = done - p.resumed <= self.first_steps
        if self._enabled and self._display is None and (early or done == p.total or now - self._spoken >= self.every_s):
            self._say(p.line(now))

    def _numbers(self, batch: Any) -> dict[str, float]:
        """The batch's rewards and its mean response length, where it has a rollout."""
        rollout = batch.get("rollout") if isinstance(batch, dict) else None
        if rollout is None:
            return {}
        return {**self._rewards.of(rollout), TOKENS: float(rollout.lengths_B.float().mean())}

    def _on_stage(self, stage: str, note: str) -> None:
        p = self.progress
        if stage != p.stage:
            p.stage_since = self._clock()
        p.stage, p.note = stage, note

    def _say(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)
            self._spoken = self._clock()

    def _start_heartbeat(self) -> None:
        if self._beat is None:
            self._ended.clear()
            self._beat = threading.Thread(target=self._beat_until_ended, name="maestro-heartbeat", daemon=True)
            self._beat.start()

    def _beat_until_ended(self) -> None:
        tick = min(1.0, self.heartbeat_s / 10)
        while not self._ended.wait(tick):
            self._break_silence(tick)

    def _break_silence(self, tick: float = 0.0) -> None:
        """Say what is going on if the silence would be too long at the next tick."""
        now = self._clock()
        if self._enabled and now - self._spoken + tick >= self.heartbeat_s:
            self._say(f"{self.progress.position()}  {self.progress.doing(now)}")

    def _stop(self) -> None:
        if self._beat is not None:
            self._ended.set()
            self._beat.join()
            self._beat = None
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _batches(self, kind: str) -> int | None:
        counts = {
            "val": self.trainer.num_sanity_val_batches
            if self.trainer.sanity_checking
            else self.trainer.num_val_batches,
            "test": self.trainer.num_test_batches,
            "predict": self.trainer.num_predict_batches,
        }[kind]
        total = sum(counts) if isinstance(counts, list) else counts
        return int(total) if total != float("inf") else None


def duration(seconds: float) -> str:
    """``41 s``, ``3:07 min`` or ``2:05 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _step(trainer: Trainer, pl_module: LightningModule) -> int:
    return int(getattr(pl_module, "policy_steps", trainer.global_step))


def _warmup(pl_module: LightningModule) -> tuple[int, int]:
    """Batches of the Conductor's warm-up that are done, and how many there are; (0, 0) for a module without one."""
    done, total = getattr(pl_module, "warmup", (0, 0))
    return int(done), int(total)


def _label(name: str) -> str:
    return f"reward/{name}" if name in (TOKENS, LOSS) else name


def _mean(rollout: Rollout, name: str, task: str | None = None) -> float | None:
    """Mean raw score of a reward over the responses, of a task, that it applies to; None where there are none."""
    scores = rollout.rewards[name]
    chosen_B = scores.mask_B
    if task is not None:
        chosen_B = chosen_B & torch.tensor([other == task for other in rollout.tasks], device=chosen_B.device)
    return float(scores.values_B[chosen_B].mean()) if bool(chosen_B.any()) else None
