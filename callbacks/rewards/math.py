"""MathReward: the answer equals the reference as mathematics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_number, check_tags
from callbacks.rewards.match import references_of
from maestro_pl.rewards.exact_match import answers_equal, extract_answer
from maestro_pl.rewards.math import MathComparer, Verdict, math_score
from maestro_pl.rewards.scores import ScoresAndMetrics, excerpt
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

_UNREADABLE = ("no_reference", "unreadable_reference")


class MathReward(Reward):
    """1 where the answer equals the reference as mathematics (1/2 and 2/4), else 0; by math-verify.

    The comparison runs in a child process. An answer without mathematics is 0, and so is one that cannot be read within
    ``seconds`` or at all, which counts in the metrics ``timed_out`` and ``failed``. A reference that holds no mathematics
    or cannot be read does not apply, and counts in the metric ``unreadable_reference``.

    Args:
        column: the data column with the reference: a text, a number, or a list of accepted ones.
        seconds: of processor time one comparison may take.
        memory_mb: address space the child process may take.
        text: take an answer that equals the reference as text as well, by the rules of ``ExactMatchReward``; a reference
            without mathematics is then compared that way instead of not at all.
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
        text: bool = False,
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
        self.text = text
        self._comparer: MathComparer | None = None
        self._warned: set[str] = set()

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """0 or 1 for each response with a readable reference; what could not be read as metrics."""
        if self._comparer is None:
            self._comparer = MathComparer(self.seconds, self.memory_mb)
        verdicts: list[Verdict | None] = []
        unreadable: list[str] = []
        seen: dict[tuple[str, ...], Verdict] = {}  # the responses of a group often agree
        for row, references in zip(rows, references_of(self, rollout, rows, self.column), strict=True):
            answer = extract_answer(rollout.responses[row], answer_tag=self.answer_tag)
            key = (answer, *references)
            if references and key not in seen:
                seen[key] = self._compared(self._comparer, answer, references)
            verdicts.append(seen[key] if references else None)
            if verdicts[-1] in _UNREADABLE:
                unreadable.append(references[0])
        self._warn(verdicts, unreadable)
        metrics = {kind: [float(verdict == kind) for verdict in verdicts] for kind in ("timed_out", "failed")}
        metrics["unreadable_reference"] = [float(verdict in _UNREADABLE) for verdict in verdicts]
        return [None if verdict is None else math_score(verdict) for verdict in verdicts], metrics

    def _compared(self, comparer: MathComparer, answer: str, references: list[str]) -> Verdict:
        if self.text and any(answers_equal(answer, reference) for reference in references):
            return "equal"
        verdict = comparer.compare(answer, references)
        return "different" if self.text and verdict in _UNREADABLE else verdict

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the child process."""
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the child process."""
        super().on_exception(trainer, pl_module, exception)
        self.close()

    def close(self) -> None:
        """End the child process; the next comparison starts another."""
        if self._comparer is not None:
            self._comparer.close()
        self._comparer = None

    def _warn(self, verdicts: list[Verdict | None], unreadable: list[str]) -> None:
        late, failed = verdicts.count("timed_out"), verdicts.count("failed")
        if (late or failed) and "answers" not in self._warned:
            self._warned.add("answers")
            rank_zero_warn(
                f"Reward {self.name!r}: of {len(verdicts)} comparisons {late} took longer than {self.seconds:g} s and {failed} "
                "failed; such an answer is wrong (0), and the metrics `timed_out` and `failed` count them from here on.",
                category=UserWarning,
            )
        if unreadable and "references" not in self._warned:
            self._warned.add("references")
            rank_zero_warn(
                f"Reward {self.name!r}: {len(unreadable)} of {len(verdicts)} responses have a reference that holds no "
                f"mathematics or cannot be read, such as {excerpt(unreadable[0])}. The reward does not apply to them, and the "
                "metric `unreadable_reference` counts them from here on; `text: true` compares such references as texts.",
                category=UserWarning,
            )
