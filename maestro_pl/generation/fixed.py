"""Decoding with fixed shapes: between two leavings of rows every step is the same program on the same memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maestro_pl.generation.cache import GroupCache
from maestro_pl.generation.decoding import Decoding
from maestro_pl.generation.step import DecodingStep

FIRST_ROOM = 64  # drawn tokens for which a row has room at first


class StaticGroupCache(GroupCache):
    """A :class:`GroupCache` whose keys and values stay where they are while tokens are drawn.

    Attributes:
        room: drawn tokens for which every row has room; attention goes over all of it, and a mask says what is there.
    """

    room = 0
    _place: Tensor  # where the token that is read goes, int64 (1,)

    def make_room(self, tokens: int) -> None:
        """Room for so many drawn tokens of every row: keys and values move. It is doubled, to no more than a row can draw."""
        room = min(max(FIRST_ROOM, tokens, 2 * self.room), self.max_new_tokens)
        for layer in list(self.row_states or self.prompt_states):
            pair = self.row_states.get(layer) or tuple(part[:0] for part in self.prompt_states[layer])
            self.row_states[layer] = self._roomy(pair[0], room), self._roomy(pair[1], room)
        self.room = room

    def begin_step(self, step_1: Tensor) -> None:
        """The next forward pass reads token number ``step`` (from 0) of every row; int64 (1,), on the device."""
        own = torch.arange(self.room, device=step_1.device) <= step_1
        self._place = step_1 + self.copied
        if not self.copied:
            self.own_mask = ~own
        else:
            own = own.view(1, 1, 1, -1)
            ahead = own.new_ones((1, 1, 1, self.copied)) if self.row_mask is None else self.row_mask[..., : self.copied]
            self._seen = torch.cat([ahead, own.expand(*ahead.shape[:3], -1)], dim=3)

    def _mask_of_copies(self, keys: int) -> Tensor | None:
        return self._seen

    def _append(self, layer: int, key_A: Tensor, value_A: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.row_states[layer]
        keys.index_copy_(2, self._place, key_A.unsqueeze(2))
        values.index_copy_(2, self._place, value_A.unsqueeze(2))
        return keys, values

    def _roomy(self, old: Tensor, room: int) -> Tensor:
        new = old.new_zeros((len(self.owners), old.shape[1], self.copied + room, old.shape[3]))
        if len(old):
            new[:, :, : old.shape[2]] = old
        return new


class FixedDecoding(Decoding):
    """:class:`Decoding` in which a step asks nothing of the host.

    Every step reads and draws all rows of the batch, and a mask keeps what has ended. Rows leave in larger parts than
    otherwise, and the host looks at the device once in a few steps, since what leaves changes the program.

    Args:
        program: runs the steps.
    """

    look_every = 4  # steps; at most so many less one are taken in vain at the end
    cache_type = StaticGroupCache
    cache: StaticGroupCache

    def __init__(self, *args: Any, program: DecodingStep) -> None:
        super().__init__(*args)
        self.program = program
        # each leaving is a program to capture, and what a card reads in a step are the weights, for many rows or few
        self.leave_at = 1 / 2 if program.how == "graph" else 1 / 4
        self.step_1 = torch.zeros(1, dtype=torch.long, device=self.device)

    def _go_on(self) -> None:
        # a capture is the current device's, and would miss what another one does
        with torch.cuda.device_of(self.step_1):  # type: ignore[no-untyped-call]
            try:
                self._take_steps()
            finally:
                self.program.begin()  # a captured step holds the memory that it runs on

    def _take_steps(self) -> None:
        most = self.sampling.max_new_tokens - (self.context is None)  # a context is in the state of the last token, too
        step = 0
        while self._someone_stays():
            steps = min(1 if self.stop else self.look_every, most - step)
            if step + steps > self.cache.room:
                self.program.begin()  # before: a captured step holds memory too
                self.cache.make_room(step + steps)
            for _ in range(steps):
                self.program(self._step)
                step += 1
            if self.stop:
                self._end_at_stop_strings(step)
            self.drawing, self.through = torch.stack([self.drawing_A.sum(), self._through_A().sum()]).tolist()

    def _someone_stays(self) -> bool:
        rows = len(self.rows_A)
        stays = super()._someone_stays()
        if len(self.rows_A) < rows:
            self.program.begin()
        return stays

    def _step(self) -> None:
        """Read a token of every row and draw the next one: no look from the host, no shape that depends on numbers."""
        rows_A, live_A = self.rows_A, self.drawing_A
        self.cache.begin_step(self.step_1)
        layers = self.context is not None and self.context.layer != "last"
        output = self._backbone(self.tokens_BL[rows_A, self.step_1], self.begin_A + self.step_1, layers)
        hidden_AD = output.last_hidden_state[0]
        if self.context is not None:
            self._note(output, hidden_AD, self.step_1)
        self.step_1.add_(1)
        # beyond the last token nobody draws any more: what is read and written there is kept as it is
        place_1 = self.step_1.clamp(max=self.sampling.max_new_tokens - 1)
        drawn = self.sampler.draw(self.scorer.logits(self.base, hidden_AD), rows_A, place_1)
        for kept, new in (
            (self.tokens_BL, drawn.tokens),
            (self.logps_BL, drawn.logps),
            (self.entropies_BL, drawn.entropies),
        ):
            kept[rows_A, place_1] = torch.where(live_A, new, kept[rows_A, place_1])
        self.lengths_B[rows_A] = self.lengths_B[rows_A] + live_A
        ended_A = self._ends(drawn.tokens)
        self.stopped_B[rows_A] = torch.where(live_A, ended_A, self.stopped_B[rows_A])
        self.drawing_A.logical_and_(~ended_A & (self.step_1 + 1 < self.sampling.max_new_tokens))

    def _end_at_stop_strings(self, step: int) -> None:
        """End rows in which a stop string has come up with token number ``step``; strings are the host's."""
        found_A = self.stop.ends(self.tokens_BL[self.rows_A, : step + 1])
        self.stopped_B[self.rows_A] |= found_A
        self.drawing_A.logical_and_(~found_A)
