"""The Conductor's context as the frozen base sees it: prompts are read once a run and kept, responses with the reference."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import Rollout

MOST_BYTES = 2**26  # of the kept states, in memory and in a checkpoint: 16,384 prompts of width 1024


class FrozenStates:
    """Hidden states of the frozen base.

    Attributes:
        read: prompts that the base has read so far, those that were forgotten and read again included.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.read = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()  # the longest unused first
        self._of = ""

    def __len__(self) -> int:
        """How many prompts are kept."""
        return len(self._kept)

    def write(self, policy: LoRAPolicy, rollout: Rollout, context: HiddenContext, max_tokens: int) -> None:
        """Fill ``rollout.hidden_BD``; with it ``ref_logps_T``, where responses are read and the base is the reference."""
        if context.place == "prompt":
            states_ND = self.of_prompts(policy, rollout.prompt_ids, context, max_tokens)
            rollout.hidden_BD = states_ND.repeat_interleave(rollout.group_size, 0)
            return
        statistics = policy.token_statistics(
            [ids for ids in rollout.prompt_ids for _ in range(rollout.group_size)],
            rollout.response_ids,
            temperature=rollout.temperature,
            context=context,
            which="base",
            max_tokens=max_tokens,
        )
        rollout.hidden_BD = statistics.hidden_BD
        if policy.reference_is_base:
            rollout.ref_logps_T = statistics.logps_T

    def of_prompts(
        self, policy: LoRAPolicy, prompt_ids: Sequence[Sequence[int]], context: HiddenContext, max_tokens: int
    ) -> Tensor:
        """The state of each prompt's last token, float32 (N, D); a prompt that is kept is not read again."""
        self._be_of(policy, context)
        keys = [_key(ids) for ids in prompt_ids]
        new = {key: ids for key, ids in zip(keys, prompt_ids, strict=True) if key not in self._kept}
        fresh: dict[str, Tensor] = {}
        if new:
            # statistics are of responses: one token stands in for one, and changes nothing in front of it
            hidden_ND = policy.token_statistics(
                list(new.values()),
                [[policy.pad_token_id]] * len(new),
                context=context,
                which="base",
                max_tokens=max_tokens,
            ).hidden_BD
            assert hidden_ND is not None
            fresh = dict(zip(new, hidden_ND.cpu(), strict=True))
            self.read += len(new)
        found = [fresh[key] if key in fresh else self._kept[key] for key in keys]
        for key, state_D in zip(keys, found, strict=True):
            self._kept[key] = state_D
            self._kept.move_to_end(key)
        most = max(1, self.most_bytes // (4 * found[0].numel()))
        while len(self._kept) > most:
            self._kept.popitem(last=False)
        return torch.stack(found).to(policy.device)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors; empty where nothing was read."""
        if not self._kept:
            return {}
        return {
            "of": self._of,
            "keys": list(self._kept),
            "states_ND": torch.stack(list(self._kept.values())),
            "read": self.read,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; states of another base or layer are forgotten when it is asked for."""
        self._of = state.get("of", "")
        self._kept = OrderedDict(zip(state.get("keys", ()), state.get("states_ND", ()), strict=True))
        self.read = state.get("read", 0)

    def _be_of(self, policy: LoRAPolicy, context: HiddenContext) -> None:
        settings = policy.settings
        names = ("model", "base", "dtype", "quantization", "double_quantization", "compute_dtype", "model_options")
        of = repr([context, *(settings.get(name) for name in names)])
        if of != self._of:
            self._of = of
            self._kept.clear()


def _key(ids: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()
