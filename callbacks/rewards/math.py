"""MathReward: the answer equals the reference as mathematics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_number, check_tags
from callbacks.rewards.match import references_of
from maestro_pl.rewards.exact_match import extract_answer
from maestro_pl.rewards.math import MathComparer, Verdict, math_score
from maestro_pl.rewards.scores import ScoresAndMetrics
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule


class MathReward(Reward):
    """1 where the answer equals the reference as mathematics (1/2 and 2/4), else 0; by math-verify.

    The comparison runs in a child process. One that takes longer than ``seconds``, or that fails, does not apply, and
    counts in the metrics ``timed_out`` and ``failed``; nor does a reference without mathematics. An answer without
    mathematics is 0.

    Args:
        column: the data column with the reference: a text, a number, or a list of accepted ones.
        seconds: one comparison may take.
        memory_mb: address space the child process may take.
        answer_tag: name of the answer tag.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: a limit that is no positive number; at the first batch: math-verify is not installed.
    """

    default_name = "math"
    pass_at_k = True

    def __init__(
        self,
        *,
        column: str = "reference",
        seconds: float = 5.0,
        memory_mb: int = 2048,
        answer_tag: str = "answer",
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_number("MathReward", "seconds", seconds, at_least=0.01)
        check_number("MathReward", "memory_mb", memory_mb, at_least=512, integer=True)
        check_tags("MathReward", "think", answer_tag)
        self.column, self.seconds, self.memory_mb, self.answer_tag = column, seconds, memory_mb, answer_tag
        self._comparer: MathComparer | None = None
        self._warned = False

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """0 or 1 for each response with a reference; the comparisons that timed out or failed as metrics."""
        if self._comparer is None:
            self._comparer = MathComparer(self.seconds, self.memory_mb)
        verdicts: list[Verdict] = []
        seen: dict[tuple[str, ...], Verdict] = {}  # the responses of a group often agree
        for row, references in zip(rows, references_of(self, rollout, rows, self.column), strict=True):
            answer = extract_answer(rollout.responses[row], answer_tag=self.answer_tag)
            key = (answer, *references)
            if key not in seen:
                seen[key] = self._comparer.compare(answer, references) if references else "no_reference"
            verdicts.append(seen[key])
        self._warn(verdicts)
        metrics = {kind: [float(verdict == kind) for verdict in verdicts] for kind in ("timed_out", "failed")}
        return [math_score(verdict) for verdict in verdicts], metrics

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the child process."""
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the child process."""
        self.close()

    def close(self) -> None:
        """End the child process; the next comparison starts another."""
        if self._comparer is not None:
            self._comparer.close()
        self._comparer = None

    def _warn(self, verdicts: list[Verdict]) -> None:
        late, failed = verdicts.count("timed_out"), verdicts.count("failed")
        if (late or failed) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Reward {self.name!r}: of {len(verdicts)} comparisons {late} took longer than {self.seconds:g} s and {failed} "
                "failed; they do not apply, and the metrics `timed_out` and `failed` count them from here on.",
                category=UserWarning,
            )
