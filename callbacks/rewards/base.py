"""What every reward callback shares: its name, role and tasks, when it runs, and what it checks."""

from __future__ import annotations

import os
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.rewards.checks import check_choice, check_strings
from callbacks.rewards.together import Together
from maestro_pl.errors import RunStopped, UserError
from maestro_pl.rewards.scores import Scores, ScoresAndMetrics, describe_response, read_scores
from maestro_pl.rollout import Choice, Normalization, RewardScores, RewardSpec, Role, Rollout, check_reward_names
from maestro_pl.run.ending import asked_to_end, must_end
from maestro_pl.run.others import CtrlC, Terminated, kept_process, not_begun, origin, told, within

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule


class Reward(Callback, ABC):
    """Scores the responses of a rollout and writes ``rollout.rewards[name]``.

    A subclass implements :meth:`score`. The base runs it without gradients at the start of every training, validation,
    test and predict batch, after the ``RolloutGenerator``, on the responses of the tasks it applies to, and checks what
    comes back. Whatever it does to the random generators of Python, NumPy and torch or to the working folder is undone
    after each batch; its own draws begin from a seed of the run's, the reward's name and the batch's number.

    Rewards whose ``waits`` is true begin before the first reward of a batch is scored, and are under way together, each in
    a thread of its own, while the others compute one after another; results, and the first error, are those of the list's
    order all the same. Such a :meth:`score` must wait for others (a server, a coroutine) rather than compute, reads nothing
    that other rewards write, needs no other rank, and draws from no global generator. A class that only inherits ``waits``
    from one of this package begins when its turn comes; with ``waits`` in its own body it begins with the others.

    Args:
        name: the reward's name in the config, the metrics and the weights; unique in a run. Default: the class's own.
        role: ``train`` is weighed, ``anchor`` feeds the meta-signal and is never weighed, ``gate`` multiplies the
            scalar reward, ``metric`` is only logged. In training an anchor scores only the groups that
            ``model.anchoring.fraction`` draws, and none where nothing reads it; in an evaluation it scores all.
        normalize: what is done to the scores inside each group before they are weighed.
        tasks: the tasks whose responses are scored; the others are masked out. Default: all.

    Raises:
        UserError: a name with other signs than letters, digits, ``_``, ``-`` and ``.``, an unknown role or
            normalisation, or ``tasks`` that is not a list of strings.
    """

    default_name: ClassVar[str] = ""
    waits: bool = False  # `score` waits for others and computes nothing: it may run beside other rewards
    pass_at_k: ClassVar[bool] = False  # the score is 1 for a correct response and 0 otherwise: report pass@k

    def __init__(
        self,
        *,
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.name = name if name is not None else self.default_name or _snake_case(owner)
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.\-]+", self.name):
            raise UserError(
                f"{owner}: name is {name!r}, expected letters, digits, '_', '-' and '.' only: it becomes part of "
                "metric keys such as reward/<name>."
            )
        check_choice(owner, "role", role, Role)
        check_choice(owner, "normalize", normalize, Normalization)
        if tasks is not None:
            check_strings(owner, "tasks", tasks, hint="Leave it out to score every task.")
        if role == "gate" and normalize != "none":
            raise UserError(
                f"{owner}: a gate multiplies by its raw score in [0, 1], and normalize is {normalize!r}: give normalize: none."
            )
        self.role, self.normalize = role, normalize
        self.tasks = list(tasks) if tasks is not None else None
        self._seen_tasks: set[str] = set()
        self._together: Together | None = None  # shared by the rewards of a batch
        self._trainer: Any = None  # of the batch at hand
        self.stage = ""  # of the batch at hand: train, validation, test, predict
        self._notes: dict[str, list[Any]] = {}  # what a subclass has to say of each response beside numbers
        self._choices: list[Choice] = []  # of an anchor that compares responses
        self._ahead: RewardScores | UserError | None = None  # of a reward that was scored before its turn
        self._begun_rows: list[int] | None = None  # to be scored; known where this reward has begun

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there; the name and the role always are, unless ``__init__`` left out the base's."""
        if name in ("name", "role"):
            raise not_begun(f"Reward {type(self).__qualname__}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @property
    def spec(self) -> RewardSpec:
        """Name, role and normalisation, which the module needs before the first batch."""
        return RewardSpec(self.name, self.role, self.normalize, self.pass_at_k)

    def be_metric(self) -> None:
        """Take the role ``metric``, whatever the arguments say: scored and logged, never trained on."""
        self.role, self.normalize = "metric", "none"

    def be_anchor(self) -> None:
        """Take the role ``anchor``, whatever the arguments say: learned from on labelled groups, never weighed."""
        self.role, self.normalize = "anchor", "none"

    @property
    def state_key(self) -> str:
        """Class and name: two rewards of one class keep their own state in a checkpoint."""
        return self._generate_state_key(name=self.name)

    @abstractmethod
    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> Scores | ScoresAndMetrics | Tensor:
        """Score some responses of the rollout.

        Args:
            rollout: the batch's rollout.
            rows: indices of the B responses to score: those of the tasks this reward applies to; never empty.
            pl_module: the ``MaestroModule``, for its ``policy`` and ``stages``.

        Returns:
            One number for each of ``rows``, in their order (``None`` or NaN: does not apply to that response), as a
            list, a tensor on any device or a NumPy array; or a tuple of these scores and further numbers, each named
            and with one value for each of ``rows``.
        """

    def compare(self, rollout: Rollout, choice: Choice) -> None:
        """Say which of some responses of a group are better, from within :meth:`score`; their scores may be None.

        Raises:
            UserError: this is no anchor, or the responses are not of one group.
        """
        if self.role != "anchor":
            raise UserError(
                f"Reward {self.name!r} compares responses, which only an anchor can, and its role is {self.role!r}: list it "
                "under `anchors`, or give role: anchor."
            )
        if len({row // rollout.group_size for row in choice.rows}) != 1 or max(choice.rows) >= len(rollout):
            raise UserError(
                f"Reward {self.name!r} compares the rows {list(choice.rows)} of groups of {rollout.group_size}: a choice is "
                "among responses to one prompt."
            )
        self._choices.append(choice)
        notes = self._notes.setdefault("rank", [None] * len(rollout))
        for row, rank in zip(choice.rows, choice.ranks, strict=True):
            notes[row] = rank

    def describe(self, rollout: Rollout, row: int) -> str:
        """Name a response in an error message."""
        return describe_response(rollout, row)

    def rows_of(self, rollout: Rollout) -> list[int]:
        """The responses that this reward scores: of its tasks, and as an anchor of the labelled groups."""
        rows = list(range(len(rollout)))
        if self.role == "anchor" and rollout.labelled_N is not None:
            labelled = rollout.labelled_N.tolist()
            rows = [row for row in rows if labelled[row // rollout.group_size]]
            if rollout.shown_B is not None:
                shown = rollout.shown_B.tolist()
                rows = [row for row in rows if shown[row]]
        if self.tasks is None:
            return rows
        tasks = rollout.tasks
        return [row for row in rows if tasks[row] in self.tasks]

    def why_not(self, rollout: Rollout) -> str | None:
        """Why this reward applied to none of the responses that it scored, where the data tell; None: they do not."""
        prompts = sorted({row // rollout.group_size for row in self.rows_of(rollout)})
        column = getattr(self, "column", None)
        if isinstance(column, str) and all(rollout.columns.get(column, [None] * (n + 1))[n] is None for n in prompts):
            return f"no row has the column {column!r}"
        return None

    def stopping(self) -> bool:
        """Whether the run was asked to end, by SIGTERM or because another of its ranks has ended."""
        return self._trainer is not None and must_end(self._trainer)

    # Lightning's hooks: one body for the four kinds of batches.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callbacks around this one.

        Raises:
            UserError: no ``RolloutGenerator`` stands before this reward, or names of rewards that cannot stand side by side.
        """
        chain = cast("list[Callback]", trainer.callbacks)  # type: ignore[attr-defined]
        check_rollout_before(self, chain)
        if self is next(callback for callback in chain if isinstance(callback, Reward)):
            check_reward_names(chain)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Score the training batch's rollout, if the module learns from it."""
        if getattr(pl_module, "learns_from_rollouts", True):
            self._write_scores(trainer, pl_module, batch, "train", getattr(pl_module, "batches_done", batch_idx))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the validation batch's rollout."""
        self._write_scores(trainer, pl_module, batch, "validation", batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the test batch's rollout."""
        self._write_scores(trainer, pl_module, batch, "test", batch_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the predict batch's rollout."""
        self._write_scores(trainer, pl_module, batch, "predict", batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End what is under way, whoever raised."""
        if self._together is not None:
            self._together.cancel()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn about tasks of the list that no row had."""
        self._warn_of_unseen_tasks()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn about tasks of the list that no row had."""
        self._warn_of_unseen_tasks()

    def _write_scores(self, trainer: Any, pl_module: LightningModule, batch: Any, stage: str, number: int) -> None:
        rollout = batch.get("rollout") if isinstance(batch, Mapping) else None
        if not isinstance(rollout, Rollout):
            raise UserError(
                f"Reward {self.name!r} found no rollout in the batch: the RolloutGenerator must stand before the "
                "rewards in trainer.callbacks."
            )
        module = cast("MaestroModule", pl_module)
        rest = self._and_after(trainer)
        together = self._together
        if together is None or not together.is_of(rollout):
            together = Together(rollout, f"{stage}/{number}/{getattr(trainer, 'global_rank', 0)}")
            for reward in rest:
                reward._enter(together, trainer, stage)
        with module.clock("rewards"), torch.no_grad():
            try:
                for reward in self._that_begin(rest, module):
                    reward._begin(rollout, module)
                if self._begun_rows is not None:  # without rows too: ranks agree on the order
                    for reward in self._that_compute(rest[1:], module):
                        reward._score_ahead(rollout, module)
                if isinstance(self._ahead, UserError):
                    raise self._ahead
                rollout.rewards[self.name] = self._ahead or self._score_rollout(rollout, module)
            except BaseException:
                together.cancel()
                raise

    def _and_after(self, trainer: Any) -> list[Reward]:
        """This reward and those behind it."""
        chain = [c for c in getattr(trainer, "callbacks", []) if isinstance(c, Reward)]
        return chain[chain.index(self) :] if self in chain else [self]

    def _enter(self, together: Together, trainer: Any, stage: str) -> None:
        """Forget the last batch."""
        self._together, self._trainer, self.stage = together, trainer, stage
        self._notes, self._choices, self._begun_rows, self._ahead = {}, [], None, None

    def _that_begin(self, rest: Sequence[Reward], module: MaestroModule) -> list[Reward]:
        """Of these, the ones that wait and can go on now, unless there is nothing to do beside them."""
        if len(rest) == 1:
            return []
        begin: list[Reward] = []
        scored = True  # all rewards before this one are
        for reward in rest:
            scored = scored and reward.role == "anchor"
            may_read = reward is not self and reward._inherits_waiting
            if reward.waits and not may_read and (scored or not reward._follows_rewards(module)):
                begin.append(reward)
        return begin

    def _that_compute(self, rest: Sequence[Reward], module: MaestroModule) -> list[Reward]:
        """Of these, the ones that can be scored before this one; a class of the user's may read what others have written."""
        return [r for r in rest if not r.waits and r._is_ours and not r._follows_rewards(module)]

    @property
    def _inherits_waiting(self) -> bool:
        """Whether this is a user's class on top of one of ours that waits, and may read what others have written."""
        return not self._is_ours and not any(
            "waits" in vars(cls) for cls in type(self).__mro__ if not cls.__module__.startswith("callbacks.")
        )

    def _follows_rewards(self, module: MaestroModule) -> bool:
        """Whether this is an anchor that is shown responses by the rewards that were scored before it."""
        return self.stage == "train" and self.role == "anchor" and bool(getattr(module, "shown_by_rewards", False))

    def _begin(self, rollout: Rollout, pl_module: MaestroModule) -> None:
        """Go on in a thread, unless that began with an earlier reward."""
        if self._begun_rows is not None or self._together is None:
            return
        rows = self._begun_rows = self._decide_rows(rollout, pl_module)

        def call() -> Any:
            with torch.no_grad():  # grad mode is each thread's own
                return self._guarded_score(rollout, rows, pl_module)

        if rows:
            self._together.begin(self.name, call, self._seed())

    def _score_ahead(self, rollout: Rollout, pl_module: MaestroModule) -> None:
        """Score while a reward of the list before this one waits; an error is shown when its turn comes."""
        if self._ahead is None:
            try:
                self._ahead = self._score_rollout(rollout, pl_module)
            except UserError as error:
                if self.stopping():
                    raise
                self._ahead = error

    def _seed(self) -> int:
        where = self._together.where if self._together is not None else ""
        return zlib.crc32(f"{os.environ.get('PL_GLOBAL_SEED', 0)}/{self.name}/{where}".encode())

    def _decide_rows(self, rollout: Rollout, pl_module: MaestroModule) -> list[int]:
        if self.stage == "train" and self.role == "anchor":
            rollout.labelled_N = pl_module.labelled(rollout)
            rollout.shown_B = pl_module.shown(rollout)
        return self.rows_of(rollout)

    def _score_rollout(self, rollout: Rollout, pl_module: MaestroModule) -> RewardScores:
        rows = self._begun_rows if self._begun_rows is not None else self._decide_rows(rollout, pl_module)
        if self.tasks is not None:
            self._seen_tasks.update(rollout.tasks)
        scores: list[float | None] = [None] * len(rollout)
        metrics: dict[str, Tensor] = {}
        if rows:
            result, seconds = self._result(rollout, rows, pl_module)
            pl_module.clock.add(f"reward/{self.name}", seconds)
            values, extra = _split(result)
            owner = f"Reward {self.name!r}"
            for row, value in zip(rows, self._read(values, rollout, rows, owner), strict=True):
                scores[row] = value
            for key, column in extra.items():
                metrics[key] = torch.full((len(rollout),), float("nan"))
                metrics[key][rows] = torch.tensor(self._read(column, rollout, rows, f"{owner}, metric {key!r},"))
        return RewardScores.from_list(self.spec, scores, metrics, self._notes, self._choices)

    def _result(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> tuple[Any, float]:
        """What :meth:`score` gives, now or from the thread in which it is under way, and the seconds that it took."""
        if self._together is not None and self.name in self._together:
            try:
                return self._together.take(self.name, self.stopping)
            except Terminated as error:
                raise self._went_on(error) from error
        begin = time.perf_counter()
        with kept_process(self._seed()):
            result = self._guarded_score(rollout, rows, pl_module)
        return result, time.perf_counter() - begin

    def _guarded_score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> Any:
        """What :meth:`score` gives; whatever it raises ends in a sentence that says whose it was.

        Raises:
            RunStopped: it raised something.
            UserError: bad input, or it was interrupted because the run was asked to end.
            KeyboardInterrupt: the user's Ctrl-C.
        """
        seen = rollout if self._is_ours else _copy(rollout)
        try:
            return within(lambda: self.score(seen, list(rows), pl_module), None, self.stopping)
        except (UserError, CtrlC):
            raise
        except Terminated as error:
            raise self._went_on(error) from error
        except BaseException as error:  # code of others may raise an exit too, which would read as Ctrl-C
            raise RunStopped(
                f"{self._who} raised {told(error)} ({origin(error)}) for {len(rows)} responses, the first "
                f"{self.describe(rollout, rows[0])}.",
                status=1,
            ) from error

    @property
    def _is_ours(self) -> bool:
        return type(self).__module__.startswith("callbacks.")

    @property
    def _who(self) -> str:
        return f"Reward {self.name!r}" + ("" if self._is_ours else f": {type(self).__qualname__}.score")

    def _went_on(self, error: Terminated) -> UserError:
        asked = "SIGTERM" if asked_to_end(self._trainer) else "another rank had ended"
        return UserError(f"{self._who} went on {error} s after {asked}, and was interrupted.")

    def _read(self, values: object, rollout: Rollout, rows: list[int], owner: str) -> list[float]:
        return read_scores(values, len(rows), owner, lambda i: self.describe(rollout, rows[i]))

    def _warn_of_unseen_tasks(self) -> None:
        unseen = [task for task in self.tasks or [] if task not in self._seen_tasks]
        if unseen:
            rank_zero_warn(
                f"Reward {self.name!r} lists the tasks {unseen}, which no row of this run had (seen: "
                f"{sorted(self._seen_tasks)}): compare its tasks with data.sources.",
                category=UserWarning,
            )


def check_rollout_before(reward: Callback, chain: Sequence[Callback]) -> None:
    """Raise unless a callback with ``writes_rollout = True`` stands before ``reward``.

    Raises:
        UserError: none does.
    """
    before = chain[: chain.index(reward)] if reward in chain else chain
    if not any(getattr(callback, "writes_rollout", False) for callback in before):
        raise UserError(
            f"{type(reward).__name__} has no rollout to score: put a RolloutGenerator before the rewards (the key "
            "`rollout:` of a config does), or in front of them in Trainer(callbacks=[...])."
        )


def _copy(rollout: Rollout) -> Rollout:
    """The rollout for code that may change what it gets; what rewards leave for each other is shared."""
    tensors: dict[str, Any] = {
        name: None if (value := getattr(rollout, name)) is None else value.clone()
        for name in ("logps_T", "entropies_T", "hidden_BD", "labelled_N", "shown_B", "ref_logps_T")
    }
    return replace(
        rollout,
        prompts=deepcopy(rollout.prompts),
        prompt_texts=list(rollout.prompt_texts),
        prompt_ids=[list(ids) for ids in rollout.prompt_ids],
        response_ids=[list(ids) for ids in rollout.response_ids],
        responses=list(rollout.responses),
        finish_reasons=list(rollout.finish_reasons),
        columns=deepcopy(rollout.columns),
        rewards=dict(rollout.rewards),
        **tensors,
    )


def _split(result: Any) -> tuple[Any, Mapping[str, Any]]:
    """The scores and the metrics of what ``score`` returned."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        return result
    return result, {}


def _snake_case(class_name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_name.removesuffix("Reward") or class_name).lower()
