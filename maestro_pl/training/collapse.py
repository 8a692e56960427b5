"""Whether the policy has stopped being one: it gives the same tokens always, or any token at all."""

from __future__ import annotations

import math

STEPS = 2  # in a row, before anything is said
ONE_ANSWER = 0.02  # of the entropy that the run began with
LEAST = 0.05  # nats a token; a policy that begins below is as good as greedy, and none that has collapsed
NOISE = 0.95  # of the entropy of equal probabilities
NO_NOISE = 0.5  # of it; a policy that begins above has not learned to speak yet


class CollapseWatch:
    """Follows the entropy of a run's sampled tokens, and says once where the policy has collapsed.

    Args:
        vocabulary: how many tokens there are.
    """

    def __init__(self, vocabulary: int) -> None:
        self.uniform = math.log(max(vocabulary, 2))
        self.first: float | None = None
        self._count = 0
        self._said = False

    def see(self, entropy: float, step: int) -> str:
        """What to say after this step, mostly nothing.

        Args:
            entropy: mean over the sampled tokens in nats.
            step: policy steps done.
        """
        if self.first is None:
            self.first = entropy
            return ""
        one = self.first >= LEAST and entropy < ONE_ANSWER * self.first
        noise = self.first <= NO_NOISE * self.uniform and entropy > NOISE * self.uniform
        self._count = self._count + 1 if one or noise else 0
        if self._count < STEPS or self._said:
            return ""
        self._said = True
        how = "it gives one and the same response whatever is drawn" if one else "its tokens are drawn like noise"
        return (
            f"Step {step}: the policy has collapsed: {how} (policy/entropy {self.first:.3g} nats at the beginning, "
            f"{entropy:.3g} now). Go on from an earlier checkpoint, or start again, with a lower learning rate "
            "(model.optimizer.init_args.lr) or a KL term (model.kl.coef)."
        )
