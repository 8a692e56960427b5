"""PeopleAnchor: which answer people called the best, from the file that ``maestro-pl label`` keeps."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rewards.base import Reward
from maestro_pl.errors import UserError
from maestro_pl.labelling.questions import prompt_digest, response_digest
from maestro_pl.labelling.store import EARLIER, LabelStore
from maestro_pl.rewards.scores import ScoresAndMetrics
from maestro_pl.rollout import Choice, Later, RewardScores, Rollout
from maestro_pl.run.ranks import gathered

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

#: Digests of a question's answers, and their ranks.
Ranked = tuple[tuple[str, ...], tuple[int, ...]]


class PeopleAnchor(Reward):
    """An anchor that says which answer people called the best, where a group holds the texts that they have seen.

    The file is that of ``maestro-pl label``. New clicks are read at every step; nothing is waited for: a group of which
    the file says nothing has no label. Where one comes while later batches are trained on (``maestro-pl label RUN --live``),
    it counts from then on, with the context and the rewards that the group had when it was sampled. Every click is one
    choice, so that several people about one group are several; one that is taken back after a run has read it is not
    forgotten by that run. White space at the ends of prompt and answers does not count. It says all that the file knows of a
    labelled group, whatever ``model.anchoring.responses`` shows to other anchors. At the end of ``fit`` one line says how
    many choices were used. Learned from by ``RidgeLearner(target: choice)``; gives no scores, so that it is not asked in
    evaluations.

    Args:
        path: of the file; an empty one holds no labels yet.
        earlier: responses of earlier batches that a label may still come for, the newest; 0: none. Contexts and rewards of
            their groups are kept, and are in the checkpoints.
        name: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: ``earlier`` is below 0; when a run starts, there is no such file, or it is none of labels.
    """

    default_name = "people"

    def __init__(
        self, path: str, *, earlier: int = EARLIER, name: str | None = None, tasks: list[str] | None = None
    ) -> None:
        super().__init__(name=name, role="anchor", tasks=tasks)
        if earlier < 0:
            raise UserError(f"PeopleAnchor: earlier is {earlier}, expected a number of responses, or 0 for none.")
        self.path, self.earlier = path, earlier
        self._seen: tuple[int, int] | None = None
        self._by_prompt: dict[str, list[Ranked]] = {}
        self._asked = self._found = self._used = 0
        self._before = 0  # choices about earlier groups, of the run that was resumed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callbacks around this one and read the file."""
        super().setup(trainer, pl_module, stage)
        self._asked = self._found = self._used = 0
        self._read_new()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was counted before this run was resumed."""
        self._before = _earlier_choices(pl_module)

    def _score_rollout(self, rollout: Rollout, pl_module: MaestroModule) -> RewardScores:
        """Look into the file once a batch, and say what it holds of the groups of earlier ones too."""
        if self.stage != "train":
            return super()._score_rollout(rollout, pl_module)
        self._refresh()
        if 0 < self.earlier < rollout.group_size:
            raise UserError(
                f"PeopleAnchor: earlier is {self.earlier}, less than the {rollout.group_size} responses of one group, so that "
                "nothing would be kept: give 0 for nothing, or some hundreds."
            )
        scores = super()._score_rollout(rollout, pl_module)
        if self.earlier:
            ours = [self.tasks is None or task in self.tasks for task in rollout.tasks]
            names = [
                response_digest(prompt, text) if our else ""
                for prompt, text, our in zip(rollout.prompts_B(), rollout.responses, ours, strict=True)
            ]
            choices = [choice for known in self._by_prompt.values() for choice in known]
            scores.later = Later(names, choices, self.earlier)
        return scores

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """Leave the choices of people about the groups of these rows."""
        if self.stage == "train":
            for n in sorted({row // rollout.group_size for row in rows}):
                self._compare(rollout, n)
        return [None] * len(rows), {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many choices were used."""
        super().on_fit_end(trainer, pl_module)
        parts = gathered((self._asked, self._found, self._used))
        asked, found, used = (sum(part[i] for part in parts) for i in range(3))
        whole = _earlier_choices(pl_module)  # the same on every rank
        late = whole - self._before
        if not asked and not late:
            return
        if trainer.is_global_zero:
            then = f"; {late} more came later than their groups" if late else ""
            print(f"Reward {self.name!r}: {used} choices of people, about {found} of {asked} groups{then}", flush=True)
        if not found and not whole:
            rank_zero_warn(
                f"Reward {self.name!r}: {self.path} says nothing of the {asked} groups that this run asked about: label with "
                "`maestro-pl label` and the same config, seed and rewards; the first batches of `fit` (model.meta.warmup) have "
                "its texts. Or label while it runs: `maestro-pl label RUN --live`.",
                category=UserWarning,
            )

    def _compare(self, rollout: Rollout, n: int) -> None:
        self._asked += 1
        known = self._by_prompt.get(prompt_digest(rollout.prompts[n]), [])
        place: dict[str, int] = {}
        for row in range(n * rollout.group_size, (n + 1) * rollout.group_size) if known else ():
            place.setdefault(response_digest(rollout.prompts[n], rollout.responses[row]), row)
        choices = [
            Choice(tuple(place[digest] for digest in digests), ranks)
            for digests, ranks in known
            if place.keys() >= set(digests)
        ]
        for choice in choices:
            self.compare(rollout, choice)
        self._found += bool(choices)
        self._used += len(choices)

    def _refresh(self) -> None:
        """Read what is new; a file that cannot be read now leaves what was read before."""
        try:
            self._read_new()
        except UserError as error:
            rank_zero_warn(f"{error} Reward {self.name!r} goes on with what it has read.")

    def _read_new(self) -> None:
        store = LabelStore(self.path, writes=False)
        try:
            version = store.version()
            if version == self._seen:
                return
            found: dict[str, list[Ranked]] = defaultdict(list)
            for click in store.clicks():
                found[click.question.prompt_digest].append((tuple(click.question.digests), tuple(click.ranks)))
        finally:
            store.close()
        self._by_prompt, self._seen = dict(found), version


def _earlier_choices(module: Any) -> int:
    """Choices that came for groups of earlier batches so far; 0 for a module without an outer loop."""
    outer = getattr(module, "outer", None)
    return 0 if outer is None else int(outer.earlier.choices)
