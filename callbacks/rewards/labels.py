"""LabelFileReward: what people said about a response, looked up in a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rewards.base import Reward
from maestro_pl.errors import UserError
from maestro_pl.rewards.labels import Label, LabelColumns, LabelKey, label_key, read_labels
from maestro_pl.rewards.scores import ScoresAndMetrics
from maestro_pl.rollout import Normalization, Role, Rollout
from maestro_pl.run.ranks import gathered

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

_TO_LABEL = {"fit": "rollouts.jsonl (ResponseRecorder writes all of them with every_n_steps: 1)",
             "test": "samples_test.jsonl (ResponseRecorder writes it with evaluation: true)"}  # fmt: skip


class LabelFileReward(Reward):
    """The score that people gave to a response, from a file; a response that is not in it: does not apply.

    The file holds a prompt, a response and a score a row, for instance the rows that ``ResponseRecorder`` writes and
    one more column. Several rows of one prompt and response are averaged, and the metric ``disagreement`` is their
    standard deviation. White space at the ends of prompt and response does not count. The file is read when a run
    starts; an empty one holds no labels. At the end of ``fit`` and ``test`` one line says how many responses had a
    label.

    Unlike other rewards, its role is ``anchor`` unless another is given: only responses that people have seen have a
    label.

    Args:
        path: a ``.jsonl`` or ``.csv`` file (or ``.json``, ``.tsv``, ``.parquet``).
        prompt_column: column of the prompt: a text, or chat messages as a list or its text.
        response_column: column of the response.
        score_column: column of the score, a finite number; empty or null means: not labelled.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.
    """

    default_name = "labels"

    def __init__(
        self,
        path: str,
        *,
        prompt_column: str = "prompt",
        response_column: str = "response",
        score_column: str = "score",
        name: str | None = None,
        role: Role = "anchor",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        self.path = Path(path).expanduser()
        self.columns = LabelColumns(prompt_column, response_column, score_column)
        self._labels: dict[LabelKey, Label] | None = None
        self._asked: Counter[str] = Counter()  # responses of each phase
        self._found: Counter[str] = Counter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callbacks around this one and read the file.

        Raises:
            UserError: the file is not there or has rows that cannot be used.
        """
        super().setup(trainer, pl_module, stage)
        self._labels = read_labels(self.path, self.columns)
        self._asked.clear()
        self._found.clear()

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """The mean score of each response that has a label, and how far the scores behind it lie apart."""
        if self._labels is None:
            raise UserError(
                f"Reward {self.name!r} has no labels yet: its setup() reads them when a Trainer starts a run."
            )
        prompts_B = rollout.prompts_B()
        labels = [self._labels.get(label_key(prompts_B[row], rollout.responses[row])) for row in rows]
        phase = _phase(pl_module)
        self._asked[phase] += len(labels)
        self._found[phase] += sum(label is not None for label in labels)
        spread = [None if label is None else label.disagreement for label in labels]
        metrics = {"disagreement": spread} if any(value is not None for value in spread) else {}
        return [None if label is None else label.score for label in labels], metrics

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many responses of the training had a label."""
        super().on_fit_end(trainer, pl_module)
        self._report(trainer, "fit", ("warm-up", "training"))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many responses had a label."""
        super().on_test_end(trainer, pl_module)
        self._report(trainer, "test", ("test",))

    def _report(self, trainer: Trainer, stage: str, phases: tuple[str, ...]) -> None:
        parts = gathered((self._asked, self._found))
        asked, found = (sum((part[i] for part in parts), Counter()) for i in (0, 1))
        seen = [phase for phase in phases if asked[phase]]
        if not seen:
            return
        if trainer.is_global_zero:
            counts = ", ".join(f"{phase} {found[phase]} of {asked[phase]}" for phase in seen)
            print(f"Reward {self.name!r}: responses with a label: {counts}", flush=True)
        if not any(found[phase] for phase in seen):
            rank_zero_warn(
                f"Reward {self.name!r}: none of the {sum(asked[phase] for phase in seen)} responses it was asked about stands "
                f"in {self.path}: add a column {self.columns.score!r} to this run's {_TO_LABEL[stage]}, give that file as path "
                "and run again with the same config and seed.",
                category=UserWarning,
            )


def _phase(module: MaestroModule) -> str:
    """``warm-up``, ``training``, ``test``, or another evaluation."""
    if not module.trainer.training:
        return "test" if module.trainer.testing else "evaluation"
    done, total = module.warmup
    return "warm-up" if done < total else "training"
