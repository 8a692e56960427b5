"""Whether an engine's model is the trainer's: a few known tokens, scored on both sides after every change of the adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from maestro_pl.errors import UserError
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import evaluating

#: Mean difference, nats a token, above which a run ends: rounding in float32, and in 16 bits.
BOUNDS = {"float32": 1e-3}
BOUND_16 = 0.1
KNOWN = (
    "Two friends met at the harbour on a grey morning. One had a map, the other a loaf of bread; they talked for 20 minutes "
    "about which way was shorter, and then walked north. What would you have done?"
)
TOKENS = 64


def known_ids(policy: LoRAPolicy) -> list[int]:
    """Ids of the known tokens, 2 to 64."""
    ids = policy.encode(KNOWN)[:TOKENS]
    return ids if len(ids) > 1 else [policy.pad_token_id] * 2


def known_logps(policy: LoRAPolicy) -> Tensor:
    """The trainer's log-probability of each known token but the first, at temperature 1, on the CPU."""
    first, *rest = known_ids(policy)
    with torch.no_grad(), evaluating(policy):
        return policy.token_statistics([[first]], [rest]).logps_T.float().cpu()


@dataclass(frozen=True)
class Agreement:
    """What the comparison found.

    Attributes:
        difference: mean size of the difference, nats a token.
        stale: the engine's numbers are those of the adapters before, as far as rounding lets this be told.
    """

    difference: float
    stale: bool


def agreement(engine_T: Tensor, now_T: Tensor, before_T: Tensor | None = None) -> Agreement:
    """Compare an engine's log-probabilities of the known tokens with the trainer's.

    The step from the trainer's numbers now to those of the version before is a direction; how far the engine lies along it
    is 0 where it has the new adapters and 1 where it has the old ones. It is believed where the step is more than twelve times
    the rounding across that direction.

    Args:
        engine_T: of the engine.
        now_T: of the trainer.
        before_T: of the trainer, with the adapters that the engine had before.
    """
    off_T = engine_T.double() - now_T.double()
    difference = float(off_T.abs().mean())
    if before_T is None:
        return Agreement(difference, False)
    step_T = before_T.double() - now_T.double()
    size = float(step_T.norm())
    if size == 0.0:
        return Agreement(difference, False)
    along = float(off_T @ step_T) / size**2
    across = float((off_T - along * step_T).norm()) / max(len(off_T) - 1, 1) ** 0.5
    return Agreement(difference, along > 0.5 and size > 12.0 * across)


def check_agreement(
    policy: LoRAPolicy, engine_T: Tensor, now_T: Tensor, before_T: Tensor | None, bound: float | None, who: str
) -> float:
    """The mean difference, where the engine has the trainer's model.

    Args:
        policy: the trainer's.
        engine_T: of the engine, as in :func:`agreement`.
        now_T: of the trainer.
        before_T: of the trainer, with the adapters before.
        bound: of the mean difference; None: by the dtype of the policy.
        who: the engine, for the sentence.

    Raises:
        UserError: it has not.
    """
    if bound is None:
        bound = BOUNDS.get(policy.settings["dtype"], BOUND_16)
    if engine_T.shape != now_T.shape:
        raise UserError(
            f"{who} scored {len(engine_T)} of {len(now_T)} known tokens: its tokenizer or version is another."
        )
    found = agreement(engine_T, now_T, before_T)
    if found.stale:
        raise UserError(
            f"{who} answers with the adapters of the version before, not with those that were just loaded (known tokens are "
            f"{found.difference:.2g} nats off, along the last step): restart it; nothing was trained on its answers."
        )
    if not found.difference <= bound:  # NaN is no agreement either
        raise UserError(
            f"{who} and the trainer disagree: known tokens are {found.difference:.2g} nats apart on average, and {bound:g} is "
            "allowed. Its base must be model.policy.model in the same dtype and quantization; "
            "rollout.engine.init_args.max_difference raises the bound."
        )
    return found.difference


@dataclass
class KnownTokens:
    """The trainer's numbers of the known tokens, of the version at hand and of the one before.

    Attributes:
        version: the name of the adapters.
        ids: the known tokens.
        now_T: their log-probabilities under this version.
        before_T: under the one before.
        differences: mean difference of each engine that was compared.
    """

    version: str | None = None
    ids: list[int] = field(default_factory=list)
    now_T: Tensor = field(default_factory=lambda: torch.zeros(0))
    before_T: Tensor | None = None
    differences: dict[str, float] = field(default_factory=dict)

    def update(self, policy: LoRAPolicy, version: str) -> bool:
        """Score them where the version is new, and say whether it is."""
        if version == self.version:
            return False
        before_T = None if self.version is None else self.now_T
        self.ids, self.now_T = known_ids(policy), known_logps(policy)
        self.version, self.before_T, self.differences = version, before_T, {}
        return True
