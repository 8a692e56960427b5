"""The contract between the rollout callback and whatever samples the responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import FinishReason

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        max_new_tokens: limit of a response, the end-of-sequence token included.
        min_new_tokens: the end-of-sequence token is not drawn before this many tokens.
        temperature: 0 means greedy.
        top_p: nucleus; 1 keeps all.
        top_k: 0 keeps all.
        min_p: drop tokens less probable than this share of the most probable one.
        stop: strings that end a response; the text is cut in front of them, the tokens are kept.
        seed: makes a call repeatable.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for ok, name, expected in (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "between 0 and max_new_tokens"),
            (self.temperature >= 0, "temperature", "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "a share in (0, 1]"),
            (self.top_k >= 0, "top_k", "0 (off) or more"),
            (0 <= self.min_p < 1, "min_p", "a share in [0, 1)"),
            (all(self.stop), "stop", "strings that are not empty"),
        ):
            if not ok:
                raise UserError(f"rollout.{name}={getattr(self, name)!r}: expected {expected}.")


@dataclass
class Generation:
    """B = N * n responses, prompt by prompt, and what decoding saw for free.

    Attributes:
        response_ids: token ids, the end-of-sequence token included where it was sampled.
        finish_reasons: ``stop`` or ``length``.
        logps_T, entropies_T, hidden_BD: as in :class:`maestro_pl.rollout.Rollout`, or None where the engine did not see
            them; one scoring pass fills in the rest.
        sampling_logps_T: of an engine that is a program of its own: log-probability of each response token as it saw it,
            at the temperature of the sampling. Used to correct for the difference, never as ``logps_T``.
        extra: further numbers of the batch, logged as ``engine/<name>``; ``adapter`` is the version that sampled it.
    """

    response_ids: list[list[int]]
    finish_reasons: list[FinishReason]
    logps_T: Tensor | None = None
    entropies_T: Tensor | None = None
    hidden_BD: Tensor | None = None
    sampling_logps_T: Tensor | None = None
    extra: dict[str, float] = field(default_factory=dict)


class Engine:
    """Samples n responses to each prompt; engines are derived from it.

    An engine puts the policy into eval mode with the cache on and gradient checkpointing off, restores what it changed,
    leaves the global random state as it found it, ends responses at any of ``policy.eos_token_ids``, and derives
    lengths from what was sampled, never from padding.
    """

    def prepare(self, policy: LoRAPolicy, sampling: Sampling, max_prompt_tokens: int | None = None) -> None:
        """Called before a run starts: an engine refuses here what it would do otherwise than asked.

        Args:
            policy: the model.
            sampling: of the training batches.
            max_prompt_tokens: of the longest prompt, where the data limits it.

        Raises:
            UserError: says what does not fit, and what to change.
        """

    def close(self) -> None:
        """Called when a run has ended, whatever way: let go of memory, files and servers. May be used again."""

    def generate(
        self,
        policy: LoRAPolicy,
        prompt_ids: list[list[int]],
        n: int,
        sampling: Sampling,
        progress: Progress | None = None,
        context: HiddenContext | None = None,
    ) -> Generation:
        """Sample.

        Args:
            policy: the model.
            prompt_ids: N prompts.
            n: responses a prompt.
            sampling: how.
            progress: ``progress(done, total)`` is called with counts of responses as they finish.
            context: what ``hidden_BD`` should be, if anybody reads it; an engine may leave it to the scoring pass.
        """
        raise NotImplementedError
