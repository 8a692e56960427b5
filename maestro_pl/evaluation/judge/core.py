"""The judge: cases in, one number in [0, 1] or "not applicable" for each out, and a count of what it took."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge.backend import KINDS, Ask, JudgeBackend, Outcome, Reply
from maestro_pl.evaluation.judge.cache import JudgeCache, content_key
from maestro_pl.evaluation.judge.prompts import (
    LETTERS,
    NO_BEST,
    Case,
    JudgePrompt,
    Mode,
    Parsed,
    prompt_for,
    prompt_text,
)
from maestro_pl.rollout import Message

_VALUES = {"yes": 1.0, "no": 0.0, "A": 1.0, "tie": 0.5, "B": 0.0}


@dataclass
class Judgement:
    """What became of one case.

    Attributes:
        value: in [0, 1]; None where the judge has nothing to say (an empty column) or failed.
        failed: the judge was asked, and its valid votes were too few or tied.
    """

    value: float | None
    failed: bool = False


@dataclass
class Choosing:
    """What became of one question for the best of a group.

    Attributes:
        best: its place in the group; two where the orders disagree, none where no response stands out. None: the judge has
            nothing to say (an empty column) or failed.
        failed: the judge was asked, and its valid votes were too few or tied.
    """

    best: list[int] | None
    failed: bool = False


@dataclass
class JudgeCounts:
    """What a batch took; adds up with ``+=``.

    Attributes:
        judged, failed: cases with a value, and cases whose judgement failed.
        requests: replies received from the judge, malformed ones included.
        cached: votes answered by the cache.
        malformed: replies that could not be read.
        tokens_in, tokens_out: tokens read and written, as the judge reported them.
        cost: in the currency of the prices; None without prices.
        failures: votes that got no valid reply, by kind.
    """

    judged: int = 0
    failed: int = 0
    requests: int = 0
    cached: int = 0
    malformed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float | None = None
    failures: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: JudgeCounts) -> JudgeCounts:
        for name in ("judged", "failed", "requests", "cached", "malformed", "tokens_in", "tokens_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.cost = other.cost if self.cost is None else self.cost + (other.cost or 0.0)
        self.failures.update(other.failures)
        return self

    def numbers(self) -> dict[str, float]:
        """Every count by name: the same names in every batch, the cost only with prices."""
        names = ("judged", "failed", "requests", "cached", "malformed", "tokens_in", "tokens_out")
        numbers = {name: float(getattr(self, name)) for name in names}
        numbers |= {} if self.cost is None else {"cost": self.cost}
        return numbers | {f"failures_{kind}": float(self.failures[kind]) for kind in KINDS}


@dataclass
class _Vote:
    """One question that may be asked for several cases at once."""

    key: str
    messages: list[Message]
    prompt: JudgePrompt
    seed: int
    parsed: Parsed | None = None
    malformed: int = 0

    def ask(self, again: int) -> Ask:
        """The question; asked again, with a reminder of the form of the reply and another seed."""
        if not again:
            return Ask(self.messages, self.seed, self.prompt.schema)
        last = self.messages[-1]
        reminded = {**last, "content": f"{last['content']}\n\n{self.prompt.reminder}"}
        return Ask([*self.messages[:-1], reminded], self.seed + 1000 * again, self.prompt.schema)


@dataclass
class _Order:
    """One order in which a group is shown: the place of each letter's response, and the votes."""

    places: list[int]
    votes: list[_Vote]


class Judge:
    """Judges responses with a language model.

    Args:
        backend: who is asked: an :class:`Endpoint` or a :class:`LocalJudge`.
        prompts: what is asked, by task; ``default`` for tasks that are not listed.
        votes: times that each question is asked. More than half of the votes must be valid. Verdicts and comparisons
            are decided by the majority of the valid votes (without one the case is not applicable), scores and rubrics
            by their median.
        asks: times that a vote is asked until its reply can be read.
        seed: of the first vote.
        cache: replies that were read are kept here.
        prices: of a million tokens read and written; None: the cost is unknown.
        answer_tag: name of the tag around the answer.

    Raises:
        UserError: several votes of a judge that always says the same.
    """

    def __init__(
        self,
        backend: JudgeBackend,
        prompts: Mapping[str, JudgePrompt],
        *,
        votes: int = 1,
        asks: int = 2,
        seed: int = 0,
        cache: JudgeCache | None = None,
        prices: tuple[float, float] | None = None,
        answer_tag: str = "answer",
    ) -> None:
        if votes > 1 and not backend.samples:
            raise UserError(
                f"The judge has {votes} votes, and every vote would be the same without sampling: give a temperature above "
                "0 (an endpoint can, a local model is greedy), or votes: 1."
            )
        self.backend, self.prompts, self.cache = backend, prompts, cache
        self.votes, self.asks, self.seed, self.prices, self.answer_tag = votes, asks, seed, prices, answer_tag
        self._warned: set[str] = set()

    def __call__(
        self, cases: Sequence[Case], progress: Callable[[str], None] | None = None
    ) -> tuple[list[Judgement], JudgeCounts]:
        """Judge a batch; equal questions are asked once.

        Args:
            cases: the responses.
            progress: told how far it is, for instance ``"12/64"``; called from another thread.

        Raises:
            UserError: a task without prompt, a column that is missing, or a judge that can never answer.
        """
        votes: dict[str, _Vote] = {}
        plans = [self._plan(case, votes) for case in cases]
        counts = self._answer(votes, progress)
        judgements = [self._decide(plan) for plan in plans]
        counts.judged = sum(judgement.value is not None for judgement in judgements)
        counts.failed = sum(judgement.failed for judgement in judgements)
        return judgements, counts

    def choose(
        self, groups: Sequence[Sequence[Case]], orders: int = 1, progress: Callable[[str], None] | None = None
    ) -> tuple[list[Choosing], JudgeCounts]:
        """Ask which response of each group is best, one question for all of them.

        Args:
            groups: responses to one prompt each, whose prompt has the mode ``best``; at least two.
            orders: 1 shows them in an order that is shuffled by what they say; 2 asks a second time in the reverse order.
            progress: as in :meth:`__call__`.

        Raises:
            UserError: as :meth:`__call__`, or more responses than letters.
        """
        votes: dict[str, _Vote] = {}
        plans = [self._plan_among(group, orders, votes) for group in groups]
        counts = self._answer(votes, progress)
        chosen = [self._decide_among(plan) for plan in plans]
        counts.judged = sum(choosing.best is not None for choosing in chosen)
        counts.failed = sum(choosing.failed for choosing in chosen)
        return chosen, counts

    def _answer(self, votes: dict[str, _Vote], progress: Callable[[str], None] | None) -> JudgeCounts:
        """Answer the votes from the cache or by the judge; what that took."""
        counts = JudgeCounts(cost=None if self.prices is None else 0.0)
        self._look_up(votes.values(), counts)
        self._ask_all([vote for vote in votes.values() if vote.parsed is None], counts, progress)
        if self.prices is not None:
            counts.cost = (counts.tokens_in * self.prices[0] + counts.tokens_out * self.prices[1]) / 1e6
        return counts

    def _plan_among(self, cases: Sequence[Case], orders: int, votes: dict[str, _Vote]) -> list[_Order]:
        """The votes on a group, for each order in which it is shown; none where the prompt has nothing to ask."""
        prompt = prompt_for(self.prompts, str(cases[0].columns.get("task"))).among(len(cases))
        said = [prompt_text(cases[0].prompt), *(case.response for case in cases)]
        shuffled = list(range(len(cases)))
        random.Random(content_key(self.seed, said)).shuffle(shuffled)
        plan: list[_Order] = []
        for places in (shuffled, shuffled[::-1])[:orders]:
            messages = prompt.messages_among([cases[i] for i in places], answer_tag=self.answer_tag)
            if messages is None:
                return []
            plan.append(_Order(places, self._votes_on(messages, prompt, votes)))
        return plan

    def _votes_on(self, messages: list[Message], prompt: JudgePrompt, votes: dict[str, _Vote]) -> list[_Vote]:
        order = []
        for number in range(self.votes):
            seed = self.seed + number
            key = content_key(self.backend.identity, messages, seed, _rules(prompt))
            order.append(votes.setdefault(key, _Vote(key, messages, prompt, seed)))
        return order

    def _decide_among(self, plan: list[_Order]) -> Choosing:
        if not plan:
            return Choosing(None)
        best: list[int | None] = []
        for order in plan:
            label = decide([vote.parsed for vote in order.votes], "best")
            if label is None:
                return Choosing(None, failed=True)
            best.append(None if label == NO_BEST else order.places[LETTERS.index(str(label))])
        if any(place is None for place in best):
            return Choosing([])  # in one order at least, none stands out
        return Choosing(sorted({place for place in best if place is not None}))

    def _plan(self, case: Case, votes: dict[str, _Vote]) -> list[list[_Vote]]:
        """The votes on a case, for each order in which it is asked; none where the prompt has nothing to ask."""
        prompt = prompt_for(self.prompts, str(case.columns.get("task"))).of(case)
        if prompt is None:
            return []
        plan: list[list[_Vote]] = []
        for swapped in (False, True) if prompt.mode == "compare" else (False,):
            messages = prompt.messages(case, swapped=swapped, answer_tag=self.answer_tag)
            if messages is None:
                return []
            plan.append(self._votes_on(messages, prompt, votes))
        return plan

    def _look_up(self, votes: Iterable[_Vote], counts: JudgeCounts) -> None:
        if self.cache is None:
            return
        for vote in votes:
            reply = self.cache.get(vote.key)
            vote.parsed = None if reply is None else vote.prompt.parse(reply)
            counts.cached += vote.parsed is not None

    def _ask_all(self, open_votes: list[_Vote], counts: JudgeCounts, progress: Callable[[str], None] | None) -> None:
        """Ask, read, keep; and ask again what could not be read."""
        self.backend.begin()
        total, done = len(open_votes), 0
        for again in range(self.asks):
            if not open_votes:
                break
            asked = open_votes

            def on_reply(index: int, reply: Reply, asked: list[_Vote] = asked) -> None:
                nonlocal done
                vote = asked[index]
                vote.parsed = vote.prompt.parse(reply.text)
                if vote.parsed is not None and self.cache is not None:
                    self.cache.put(vote.key, reply.text)
                done += vote.parsed is not None
                if progress is not None:
                    progress(f"{done}/{total}")

            outcomes = self.backend.complete([vote.ask(again) for vote in asked], on_reply)
            open_votes = self._count(asked, outcomes, counts)
        if open_votes:
            counts.failures["malformed"] += len(open_votes)
            self._warn("malformed", len(open_votes), total, "replies that name no score or verdict")

    def _count(self, asked: list[_Vote], outcomes: list[Outcome], counts: JudgeCounts) -> list[_Vote]:
        """Count the outcomes; the votes whose reply could not be read are returned."""
        details: dict[str, str] = {}
        failures: Counter[str] = Counter()
        malformed = []
        for vote, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Reply):
                counts.requests += 1
                counts.tokens_in += outcome.tokens_in
                counts.tokens_out += outcome.tokens_out
                if vote.parsed is None:
                    malformed.append(vote)
            else:
                failures[outcome.kind] += 1
                details.setdefault(outcome.kind, outcome.detail)
        counts.malformed += len(malformed)
        counts.failures.update(failures)
        for kind, count in failures.items():
            self._warn(kind, count, len(asked), details[kind])
        return malformed

    def _warn(self, kind: str, count: int, total: int, detail: str) -> None:
        """Say once per kind that judgements failed."""
        if kind in self._warned:
            return
        self._warned.add(kind)
        rank_zero_warn(
            f"The judge gave no valid reply to {count} of {total} questions ({kind}: {detail or 'no further word'}): where "
            "votes are missing the reward does not apply. Further ones of this kind are counted, not shown.",
            category=UserWarning,
        )

    def _decide(self, plan: list[list[_Vote]]) -> Judgement:
        if not plan:
            return Judgement(None)
        mode = plan[0][0].prompt.mode
        decided = [decide([vote.parsed for vote in order], mode) for order in plan]
        if mode == "compare":
            value = both_orders(*decided)
        else:
            value = _VALUES[decided[0]] if isinstance(decided[0], str) else decided[0]
        return Judgement(value, failed=value is None)


def decide(votes: Sequence[Parsed | None], mode: Mode) -> Parsed | None:
    """What the votes on one question come to.

    Args:
        votes: scores in [0, 1] or labels; None where there is no valid reply.
        mode: ``score`` and ``rubric`` take the median; otherwise the label with more than half of the valid votes is taken.

    Returns:
        None where half of the votes or more are missing, or no label has a majority.
    """
    valid = [vote for vote in votes if vote is not None]
    if 2 * len(valid) <= len(votes):
        return None
    if mode in ("score", "rubric"):
        return median(float(vote) for vote in valid)
    label, count = Counter(valid).most_common(1)[0]
    return label if 2 * count > len(valid) else None


def both_orders(first: Parsed | None, swapped: Parsed | None) -> float | None:
    """A comparison asked in both orders: 1 where the response wins both, 0 where it loses both, else 0.5.

    Args:
        first: the label when the response is A: ``A``, ``B`` or ``tie``.
        swapped: the label when the response is B.

    Returns:
        None where either is missing.
    """
    if first is None or swapped is None:
        return None
    outcomes = {_VALUES[str(first)], 1.0 - _VALUES[str(swapped)]}
    return outcomes.pop() if len(outcomes) == 1 else 0.5


def _rules(prompt: JudgePrompt) -> list[object]:
    """How replies are read: two prompts with one text and different rules never share a vote."""
    weights = [criterion.weight for criterion in prompt.criteria]
    return [prompt.mode, *prompt.scale, *sorted((prompt.labels or {}).items()), *weights]
