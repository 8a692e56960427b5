"""JudgeReward: what a language model says of each response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice, check_number, check_tags
from callbacks.rewards.together import Together
from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge import (
    Case,
    Endpoint,
    Judge,
    JudgeBackend,
    JudgeCache,
    JudgeCounts,
    LocalJudge,
    load_prompts,
)
from maestro_pl.evaluation.judge.endpoint import OPENAI
from maestro_pl.evaluation.judge.prompts import prompt_for
from maestro_pl.rewards.scores import ScoresAndMetrics
from maestro_pl.rollout import Choice, Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

JudgeDType: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
LOCAL = "local"


class JudgeReward(Reward):
    """A language model's score, verdict, comparison or rubric of each response, in [0, 1], or its choice of a group's best.

    The judge stands behind an OpenAI-compatible server, or is a causal LM on this machine (``endpoint: local``). What
    it is asked stands in the prompts file, task by task. A response is masked out, never 0, where the judge failed: no
    valid reply in time, replies that cannot be read, or votes without a majority. Every such case is counted: the share
    of failed judgements is the reward's metric ``failed``, and the totals of the run are logged as ``<name>/failed``,
    ``<name>/malformed``, ``<name>/requests``, ``<name>/cached``, ``<name>/tokens_in``, ``<name>/tokens_out``,
    ``<name>/failures_<kind>`` and, with prices, ``<name>/cost`` (in validation and test: those of the epoch, under
    ``val/`` and ``test/``).

    Args:
        model: name of the model on the server; with ``endpoint: local`` a hub id or folder, or ``sandbox``.
        endpoint: address of the server up to and including ``/v1``, or ``local``.
        prompts: YAML file, task name to prompt, as a path from the working folder; ``paper`` is the file that comes
            with the package. See docs/judge.md.
        votes: times each question is asked: majority for verdicts and comparisons, median for scores and rubrics.
        asks: times a vote is asked until its reply can be read.
        temperature: of the judge's sampling; default: 0 for one vote, 0.7 for several.
        max_tokens: of a reply.
        options: further fields of the request's body; null removes one (``{max_tokens: null}``).
        structured: ask the server for replies in JSON (``response_format: json_schema``); one that refuses the field is
            asked without it.
        orders: of prompts with the mode ``best``, which take one question for all responses of a group that are shown: 1
            shuffles them, 2 asks a second time in the reverse order; where the answers differ, the two tie. Such a judge is
            an anchor, its choices are learned from by ``RidgeLearner(target: choice)``, and it is not asked in evaluations.
        seed: of the first vote, sent where the temperature is above 0.
        baseline_column: the column that the mode ``compare`` compares with, for instance ``reference``.
        answer_tag: name of the answer tag.
        api_key_env: NAME of the environment variable with the API key.
        concurrency: requests at once.
        timeout_s: seconds until a request is given up.
        retries: further tries after a time-out, a broken connection, a 429 or a 5xx.
        backoff_s: seconds before the first of them, doubled each time, with jitter; ``Retry-After`` goes first.
        deadline_s: seconds that a batch may wait for the judge.
        give_up_after: failed requests in a row after which the rest of a batch is not tried.
        cache: SQLite file in which replies are kept; default: none.
        price_in: of a million tokens read; null: unknown, then no cost is logged.
        price_out: of a million tokens written.
        device: of a local judge; default: the trainer's device.
        dtype: of a local judge's weights; ``auto`` as they were saved.
        batch_size: questions in one batch of a local judge.
        trust_remote_code: of a local judge: run the modelling code that comes with the weights.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: an option that cannot be used; when the run starts also a prompts file, cache or model that cannot be
            read, or ``openai`` that is not installed.
    """

    default_name = "judge"

    def __init__(
        self,
        model: str,
        *,
        endpoint: str = OPENAI,
        prompts: str = "paper",
        votes: int = 1,
        asks: int = 2,
        temperature: float | None = None,
        max_tokens: int = 512,
        options: dict[str, Any] | None = None,
        structured: bool = False,
        orders: int = 1,
        seed: int = 0,
        baseline_column: str = "reference",
        answer_tag: str = "answer",
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout_s: float = 60.0,
        retries: int = 4,
        backoff_s: float = 1.0,
        deadline_s: float = 300.0,
        give_up_after: int = 20,
        cache: str | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
        device: str | None = None,
        dtype: JudgeDType = "auto",
        batch_size: int = 8,
        trust_remote_code: bool = False,
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "none",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        whole: list[tuple[str, object, int]] = [
            ("votes", votes, 1),
            ("asks", asks, 1),
            ("max_tokens", max_tokens, 1),
            ("seed", seed, 0),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("give_up_after", give_up_after, 1),
            ("batch_size", batch_size, 1),
        ]
        for argument, value, least in whole:
            check_number("JudgeReward", argument, value, at_least=least, integer=True)
        for argument, amount, lowest in (
            ("timeout_s", timeout_s, 0.001),
            ("backoff_s", backoff_s, 0),
            ("deadline_s", deadline_s, 0.001),
            ("temperature", temperature, 0),
            ("price_in", price_in, 0),
            ("price_out", price_out, 0),
        ):
            if amount is not None:
                check_number("JudgeReward", argument, amount, at_least=lowest)
        check_number("JudgeReward", "orders", orders, at_least=1, at_most=2, integer=True)
        if (price_in is None) != (price_out is None):
            raise UserError(
                f"JudgeReward: price_in is {price_in!r} and price_out {price_out!r}: give both, or neither (no cost)."
            )
        if endpoint == LOCAL and (votes > 1 or temperature):
            raise UserError(
                f"JudgeReward: votes is {votes} and temperature {temperature!r}, and a local judge is greedy: its votes "
                "would all be the same. Give votes: 1 and no temperature."
            )
        if endpoint == LOCAL and structured:
            raise UserError(
                "JudgeReward: structured is true, which only a server knows: leave it out with endpoint local."
            )
        if votes > 1 and temperature == 0:
            raise UserError(
                f"JudgeReward: votes is {votes} and temperature 0, which asks for the same reply {votes} times: give a "
                "temperature above 0, or votes: 1."
            )
        check_choice("JudgeReward", "dtype", dtype, JudgeDType)
        check_tags("JudgeReward", "think", answer_tag)
        _check_variable(api_key_env)
        try:
            self.device = torch.device(device) if device is not None else None
        except RuntimeError as error:
            raise UserError(f"JudgeReward: device is {device!r}, expected one such as cpu, cuda or cuda:1.") from error
        self.model, self.endpoint, self.prompts = model, endpoint, prompts
        self.votes, self.asks, self.seed, self.max_tokens = votes, asks, seed, max_tokens
        self.orders = orders
        self.temperature = temperature if temperature is not None else 0.7 if votes > 1 else 0.0
        self.options, self.structured = dict(options or {}), structured
        self.baseline_column, self.answer_tag, self.api_key_env = baseline_column, answer_tag, api_key_env
        self.concurrency, self.timeout_s, self.retries = concurrency, timeout_s, retries
        self.backoff_s, self.deadline_s, self.give_up_after = backoff_s, deadline_s, give_up_after
        self.cache, self.dtype, self.batch_size, self.trust_remote_code = cache, dtype, batch_size, trust_remote_code
        self.prices = None if price_in is None or price_out is None else (price_in, price_out)
        self.totals = JudgeCounts()
        self._last = JudgeCounts()
        self._judge: Judge | None = None
        self.waits = endpoint != LOCAL

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callbacks around this one, and make the judge, once."""
        super().setup(trainer, pl_module, stage)
        if self._judge is None:
            self._judge = Judge(
                self._backend(self.device or trainer.strategy.root_device),
                load_prompts(self.prompts),
                votes=self.votes,
                asks=self.asks,
                seed=self.seed,
                cache=JudgeCache(self.cache) if self.cache is not None else None,
                prices=self.prices,
                answer_tag=self.answer_tag,
            )

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """The judge's value of each response, and whether the judgement failed."""
        if self._judge is None:
            raise UserError(f"Reward {self.name!r} has no judge yet: its setup() makes it when a Trainer starts a run.")
        tasks, prompts = rollout.tasks, self._judge.prompts
        among = [row for row in rows if prompt_for(prompts, tasks[row]).mode == "best"]
        alone = [row for row in rows if row not in set(among)]
        values: dict[int, float | None] = dict.fromkeys(rows)
        failed = dict.fromkeys(rows, 0.0)

        def progress(done: str) -> None:
            pl_module.clock.note(f"{self.name}: {done}")

        if alone or not among:
            judgements, self._last = self._judge([self._case(rollout, row) for row in alone], progress=progress)
            values |= {row: judgement.value for row, judgement in zip(alone, judgements, strict=True)}
            failed |= {row: float(judgement.failed) for row, judgement in zip(alone, judgements, strict=True)}
        if among and (self.stage == "train" or self.role != "anchor"):
            failed |= self._choose(self._judge, rollout, among, progress)
        self.totals += self._last
        return list(values.values()), {"failed": list(failed.values())}

    def _choose(
        self, judge: Judge, rollout: Rollout, rows: list[int], progress: Callable[[str], None]
    ) -> dict[int, float]:
        """Ask for the best of each group; whether that failed, for each row."""
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(row // rollout.group_size, []).append(row)
        if self.role != "anchor":
            raise UserError(
                f"Reward {self.name!r}: its prompts ask for the best of a group (mode best), which is a label and no score, "
                f"and its role is {self.role!r}: list it under `anchors`, or give prompts with another mode."
            )
        shown = [group for group in groups.values() if len(group) > 1]
        cases = [[self._case(rollout, row) for row in group] for group in shown]
        chosen, counts = judge.choose(cases, self.orders, progress)
        self._last += counts
        failed: dict[int, float] = {}
        for group, choosing in zip(shown, chosen, strict=True):
            failed |= dict.fromkeys(group, float(choosing.failed))
            if choosing.best is not None:
                self.compare(rollout, Choice.of(group, [choosing.best] if choosing.best else []))
        return failed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Score the training batch's rollout, and log what the judge has taken so far."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        for key, number in self.totals.numbers().items():
            pl_module.log(f"{self.name}/{key}", number, on_step=True, on_epoch=False, reduce_fx="sum", sync_dist=True)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the validation batch's rollout, and log what the judge took."""
        super().on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._log_epoch(pl_module, "val")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score the test batch's rollout, and log what the judge took."""
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        self._log_epoch(pl_module, "test")

    def state_dict(self) -> dict[str, Any]:
        """The totals so far, so that a resumed run goes on counting."""
        totals = vars(self.totals) | {"failures": dict(self.totals.failures)}
        return {"totals": totals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the totals of a checkpoint."""
        totals = dict(state_dict["totals"])
        self.totals = JudgeCounts(**(totals | {"failures": Counter(totals["failures"])}))

    def _enter(self, together: Together, trainer: Any, stage: str) -> None:
        super()._enter(together, trainer, stage)
        self._last = JudgeCounts()

    def _log_epoch(self, pl_module: LightningModule, stage: str) -> None:
        """The sum over the epoch of what each batch took."""
        for key, number in self._last.numbers().items():
            name = f"{stage}/{self.name}/{key}"
            pl_module.log(name, number, on_epoch=True, reduce_fx="sum", batch_size=1, sync_dist=True)

    def _case(self, rollout: Rollout, row: int) -> Case:
        place = row // rollout.group_size
        columns = {name: values[place] for name, values in rollout.columns.items()}
        baseline = columns.get(self.baseline_column)
        text = None if baseline is None or baseline != baseline else str(baseline)
        return Case(rollout.prompts[place], rollout.responses[row], columns, text)

    def _backend(self, device: torch.device) -> JudgeBackend:
        if self.endpoint == LOCAL:
            return LocalJudge(
                self.model,
                device=device,
                dtype=self.dtype,
                max_tokens=self.max_tokens,
                batch_size=self.batch_size,
                trust_remote_code=self.trust_remote_code,
            )
        return Endpoint(
            self.model,
            self.endpoint,
            self.api_key_env,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            options=self.options,
            structured=self.structured,
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
            retries=self.retries,
            backoff_s=self.backoff_s,
            deadline_s=self.deadline_s,
            give_up_after=self.give_up_after,
        )


def _check_variable(name: object) -> None:
    """Raise unless this can be a variable's name; a key put here by mistake is not repeated in the error.

    Raises:
        UserError: it is no name.
    """
    if not isinstance(name, str) or not name.isidentifier() or (name.startswith("sk") and len(name) > 20):
        raise UserError(
            "JudgeReward: api_key_env is no name of an environment variable (its value is not shown here): give a name "
            "such as OPENAI_API_KEY, and put the key into that variable."
        )
