"""The one record that travels through a batch: prompts, responses, token statistics, rewards, weights.

Shape suffixes: ``_N`` prompts, ``_G`` responses a prompt (a *group*), ``_B = N * G`` responses, ``_T`` response tokens
of the whole rollout laid end to end (ragged: row ``i`` is ``[cu_seqlens[i], cu_seqlens[i + 1])``), ``_K`` rewards,
``_D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from maestro_pl.errors import UserError

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | list[Message]
Role: TypeAlias = Literal["train", "anchor", "gate", "metric"]
Normalization: TypeAlias = Literal["none", "zscore", "rank", "minmax"]
FinishReason: TypeAlias = Literal["stop", "length"]

RESERVED = ("scalar",)  # what is logged as reward/<this> beside the rewards
SUFFIXES = ("_std", "_low", "_high")  # what is logged of a reward beside its mean


@dataclass(unsafe_hash=True)  # not frozen: Lightning copies what `predict` returns field by field
class RewardSpec:
    """What the module must know of a reward before the first batch.

    Attributes:
        name: unique in a run; the key in ``Rollout.rewards`` and in every metric.
        role: ``train`` is weighed, ``anchor`` feeds the meta-signal and is never weighed, ``gate`` multiplies the
            scalar reward, ``metric`` is only logged.
        normalize: how the module normalises the values inside each group before weighing.
        pass_at_k: the reward is 1 for a correct response and 0 otherwise, so evaluation reports pass@k.
    """

    name: str
    role: Role = "train"
    normalize: Normalization = "none"
    pass_at_k: bool = False


@runtime_checkable
class RewardSource(Protocol):
    """Anything among the trainer's callbacks that announces a reward (``callbacks.rewards.Reward`` does)."""

    @property
    def spec(self) -> RewardSpec: ...


def check_reward_names(chain: Sequence[Any]) -> None:
    """Raise where two of a run's metrics would have one key because of how its rewards are named.

    Args:
        chain: callbacks, rewards among them.

    Raises:
        UserError: two rewards have one name, or one is called as a number that is logged beside the rewards, or as another
            reward's spread or interval (``<name>_std``, ``<name>_low``, ``<name>_high``).
    """
    first: dict[str, str] = {}
    for place, source in enumerate([each for each in chain if isinstance(each, RewardSource)], start=1):
        name, title = source.spec.name, f"{type(source).__name__} (number {place} of the rewards)"
        if name in first:
            raise UserError(
                f"Two rewards are named {name!r}: {first[name]} and {title}. Give one of them another name (init_args: "
                "name: ...)."
            )
        if name in RESERVED:
            raise UserError(
                f"A reward is named {name!r}: {title}. reward/{name} is the logged scalar reward: give it another name "
                "(init_args: name: ...)."
            )
        first[name] = title
    for name, title in first.items():
        for suffix in SUFFIXES:
            if f"{name}{suffix}" in first:
                raise UserError(
                    f"Rewards are named {name!r} ({title}) and {name + suffix!r} ({first[name + suffix]}), and "
                    f"reward/{name}{suffix} is what is logged of {name!r}: give one of them another name (init_args: name: "
                    "...)."
                )


@dataclass(frozen=True)
class Choice:
    """What an anchor says where it compares some responses of one group instead of scoring each.

    Attributes:
        rows: the responses that it was shown, rows of the rollout; at least two, of one group.
        ranks: of each of them: 0 for the best, larger ones for worse, equal ones where they tie. All equal: no difference
            that counts, or all are bad; nothing is learned from it.

    Raises:
        UserError: fewer than two responses, one of them twice, or another number of ranks.
    """

    rows: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check it."""
        distinct = len(set(self.rows)) == len(self.rows)
        if len(self.rows) < 2 or not distinct or len(self.ranks) != len(self.rows) or min(self.ranks) < 0:
            raise UserError(
                f"A choice among the rows {list(self.rows)} with the ranks {list(self.ranks)}: expected at least two different "
                "rows, and for each a rank, 0 for the best."
            )

    @classmethod
    def of(cls, rows: Sequence[int], best: Sequence[Sequence[int]] = ()) -> Choice:
        """From places among the rows, the best first.

        Args:
            rows: the responses that were shown.
            best: stages of places in ``rows``: ``[[2]]`` is "the third is best", ``[[0, 1]]`` a tie of two,
                ``[[2], [0], [1]]`` a ranking, nothing "no difference" or "all are bad". Those that are not named are
                worse than all that are.
        """
        ranks = [len(best)] * len(rows)
        for rank, places in enumerate(best):
            for place in places:
                ranks[place] = rank
        return cls(tuple(rows), tuple(ranks))


@dataclass(frozen=True)
class Later:
    """What an anchor that is answered late knows its responses by, and what it says of those of earlier batches.

    Attributes:
        names: B names of the batch's responses, by which their group and text are known again; "": of this one it will say
            nothing.
        choices: all that is known by now: names of responses of one group, and a rank for each. One about no response that
            is remembered, or that was counted before, changes nothing.
        keep: so many responses of earlier batches are remembered for it, the newest.
    """

    names: list[str]
    choices: list[tuple[tuple[str, ...], tuple[int, ...]]]
    keep: int


@dataclass
class RewardScores:
    """The scores of one reward for a rollout.

    Attributes:
        values_B: float32; raw (not normalised); 0 where ``mask_B`` is False.
        mask_B: bool; False where the reward does not apply to the response (another task, ``None`` or NaN).
        metrics: further numbers a reward returned beside its score, name to one float a response (NaN: not given).
        texts: what else it noted of the responses, name to one plain value each (None: nothing).
        choices: of an anchor that compares responses; those that it scores have values too.
        later: of an anchor that may say more of these responses while later batches are trained on; None: it will not.
    """

    spec: RewardSpec
    values_B: Tensor
    mask_B: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    texts: dict[str, list[Any]] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    later: Later | None = None

    @classmethod
    def from_list(
        cls,
        spec: RewardSpec,
        scores: Sequence[float | None],
        metrics: dict[str, Tensor] | None = None,
        texts: dict[str, list[Any]] | None = None,
        choices: list[Choice] | None = None,
    ) -> RewardScores:
        """Build the record from one score a response; ``None`` and NaN mean "does not apply"."""
        raw_B = torch.tensor([float("nan") if s is None else float(s) for s in scores], dtype=torch.float32)
        mask_B = ~torch.isnan(raw_B)
        return cls(
            spec, torch.where(mask_B, raw_B, torch.zeros_like(raw_B)), mask_B, metrics or {}, texts or {}, choices or []
        )


@dataclass
class Rollout:
    """Whole groups of responses: response ``i`` answers prompt ``i // group_size``.

    Attributes:
        prompts: N prompts as the data set gave them (a string or chat messages).
        prompt_texts: N prompts as rendered by the chat template.
        prompt_ids: N lists of token ids.
        response_ids: B lists of token ids; the end-of-sequence token is part of the response where it was sampled.
        responses: B decoded texts, without special tokens, cut at a stop string.
        finish_reasons: B; ``length`` means cut by the token limit.
        group_size: G.
        columns: every other column of the data rows, N values each (``task`` and ``reference`` are always there).
        temperature: the sampling temperature, which every log-probability below is taken at.
        logps_T: float32 log-probability of each response token under the policy that sampled it.
        sampling_logps_T: float32, the same as an engine with a program of its own saw it; None where the policy itself
            sampled.
        engine: what the engine says of the batch, name to number (``adapter``: the version of the adapters that sampled it).
        entropies_T: float32 entropy in nats of the distribution each response token was drawn from.
        hidden_BD: float32 context of the Conductor, h(x, y): the terminal hidden state, or what ``weigher.context``
            asks.
        ref_logps_T: float32 log-probability of each response token under the reference, where a pass has seen it already.
        labelled_N: bool, the groups that anchors score; None: all.
        shown_B: bool, the responses of these groups that anchors are shown; None: all.
        rewards: reward name to scores, in the order in which the callbacks ran.
        scalar_B, advantages_B, weights_BK, weight_names: written by the module when it has weighed the rewards;
            ``scalar_B`` is NaN where no reward applied.
        normalized_BK: the weighed rewards as they entered the sum, normalised inside their groups; written with the weights.
        kl_B: what the KL penalty took off the scalar reward, where it belongs to the reward.
        gain_B: what the training batch's advantages were multiplied by, by the weigher or ``model.anchoring.shrink``.
        probabilities_BK: the weigher's own distribution pi(.|h), before any action; written with the weights.
        perplexities: name of a perplexity reward to the float perplexities of all B responses, NaN where there is none.
        everywhere: the groups of all ranks as one rollout, written by the module when the step is done; None: there is
            one rank.
    """

    prompts: list[Prompt]
    prompt_texts: list[str]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    responses: list[str]
    finish_reasons: list[FinishReason]
    group_size: int
    columns: dict[str, list[Any]] = field(default_factory=dict)
    temperature: float = 1.0
    logps_T: Tensor | None = None
    entropies_T: Tensor | None = None
    hidden_BD: Tensor | None = None
    sampling_logps_T: Tensor | None = None
    engine: dict[str, float] = field(default_factory=dict)
    ref_logps_T: Tensor | None = None
    labelled_N: Tensor | None = None
    shown_B: Tensor | None = None
    rewards: dict[str, RewardScores] = field(default_factory=dict)
    scalar_B: Tensor | None = None
    advantages_B: Tensor | None = None
    weights_BK: Tensor | None = None
    weight_names: list[str] = field(default_factory=list)
    normalized_BK: Tensor | None = None
    kl_B: Tensor | None = None
    gain_B: Tensor | None = None
    probabilities_BK: Tensor | None = None
    perplexities: dict[str, Tensor] = field(default_factory=dict)
    everywhere: Rollout | None = None

    def __post_init__(self) -> None:
        if len(self.response_ids) != len(self.prompt_ids) * self.group_size:
            raise UserError(
                f"A rollout of {len(self.prompt_ids)} prompts and group size {self.group_size} needs "
                f"{len(self.prompt_ids) * self.group_size} responses, got {len(self.response_ids)}: "
                "generate whole groups, prompt by prompt."
            )

    def __len__(self) -> int:
        """B, the number of responses."""
        return len(self.response_ids)

    @property
    def of_all_ranks(self) -> Rollout:
        """The rollout of the whole global batch, for those who watch a run."""
        return self if self.everywhere is None else self.everywhere

    @property
    def lengths_B(self) -> Tensor:
        """int64 number of tokens of each response, the end-of-sequence token included."""
        return torch.tensor([len(ids) for ids in self.response_ids], dtype=torch.long)

    @property
    def cu_seqlens(self) -> Tensor:
        """int64 (B + 1): where each response starts in the ``_T`` tensors."""
        return torch.cat([torch.zeros(1, dtype=torch.long), self.lengths_B.cumsum(0)])

    @property
    def tasks(self) -> list[str]:
        """B task names, one a response."""
        return [str(task) for task in self.per_response("task")]

    def per_response(self, column: str) -> list[Any]:
        """Column values repeated for every response of the group: B values.

        Raises:
            UserError: the data rows have no such column.
        """
        if column not in self.columns:
            raise UserError(
                f"The data rows have no column {column!r}; they have {sorted(self.columns)}. "
                "Map it under data.sources, or take it out of the reward's arguments."
            )
        return [value for value in self.columns[column] for _ in range(self.group_size)]

    def prompts_B(self) -> list[Prompt]:
        """The prompt of each response: B values."""
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]


def rollout_of(batch: dict[str, Any]) -> Rollout:
    """The rollout that the callbacks left in the batch.

    Raises:
        UserError: no callback wrote one.
    """
    rollout = batch.get("rollout")
    if not isinstance(rollout, Rollout):
        raise UserError(
            'The batch has no "rollout": put callbacks.RolloutGenerator in front of the trainer\'s callbacks '
            "(the command line does it by itself)."
        )
    return rollout
