"""Keys and values of groups: each prompt's once, and those of the tokens that its rows have drawn since."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_pl.attention import causal


class GroupCache:
    """Attention of a decoding batch, as a :class:`maestro_pl.attention.Layout`.

    All rows have drawn the same number of tokens, so their own keys need no mask; those of the prompts, padded to the longest,
    do. Queries of one group meet the keys of their prompt in one matrix product.

    Args:
        prompt_lengths: of N prompts.
        owners: the prompt of each row, in ascending order.
        max_new_tokens: most tokens that a row can draw.
    """

    def __init__(self, prompt_lengths: list[int], owners: list[int], max_new_tokens: int) -> None:
        self.prompt_lengths, self.max_new_tokens = prompt_lengths, max_new_tokens
        self.prompts = torch.tensor(sorted(set(owners)))
        self.owners = torch.tensor(owners)
        self.prompt_states: dict[int, tuple[Tensor, Tensor]] = {}  # layer to keys and values (N, key heads, P, D)
        self.row_states: dict[int, tuple[Tensor, Tensor]] = {}  # layer to keys and values (A, key heads, capacity, D)
        self.drawn = 0
        self._prefilling: list[int] | None = None

    def begin_prefill(self, prompts: list[int]) -> None:
        """The next forward pass reads these prompts, one after the other."""
        self._prefilling = prompts

    def begin_decoding(self, device: torch.device) -> None:
        """Every prompt has been read; forward passes now read one token of every row."""
        self._prefilling = None
        longest = max(self.prompt_lengths)
        lengths = torch.tensor(self.prompt_lengths, device=device)
        beyond = torch.arange(longest, device=device) >= lengths.unsqueeze(1)
        self.prompt_mask = beyond.view(len(self.prompt_lengths), 1, 1, longest) if bool(beyond.any()) else None
        self.owners, self.prompts = self.owners.to(device), self.prompts.to(device)
        self._arrange()

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (positions in the batch), and the prompts that no row is left of."""
        self.row_states = {layer: (k[rows], v[rows]) for layer, (k, v) in self.row_states.items()}
        self.owners = self.owners[rows]
        left = torch.isin(self.prompts, self.owners)
        if not bool(left.all()):
            self.prompt_states = {layer: (k[left], v[left]) for layer, (k, v) in self.prompt_states.items()}
            self.prompts = self.prompts[left]
            self.prompt_mask = None if self.prompt_mask is None else self.prompt_mask[left]
        self._arrange()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """See :class:`maestro_pl.attention.Layout`."""
        if self._prefilling is not None:
            return self._attend_prompts(layer, query, key, value, scale)
        if scale is None:
            scale = query.shape[-1] ** -0.5
        keys, values = self._append(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        rows, key_heads = keys.shape[:2]
        query_A = (query[0].transpose(0, 1) * scale).reshape(rows, key_heads, -1, query.shape[-1])
        prompt_keys, prompt_values = self.prompt_states[layer]
        to_prompt = torch.matmul(self._by_prompt(query_A), prompt_keys.transpose(-1, -2))
        if self.prompt_mask is not None:
            to_prompt = to_prompt.masked_fill(self.prompt_mask, -torch.inf)
        to_own = torch.matmul(query_A, keys.transpose(-1, -2))
        scores = torch.cat([self._by_row(to_prompt, query_A.shape[2]), to_own], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        on_prompt, on_own = torch.split(weights, [prompt_keys.shape[2], keys.shape[2]], dim=-1)
        from_prompt = self._by_row(torch.matmul(self._by_prompt(on_prompt), prompt_values), query_A.shape[2])
        out = from_prompt + torch.matmul(on_own, values)
        return out.reshape(1, rows, -1, out.shape[-1])

    def _attend_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        assert self._prefilling is not None
        lengths = [self.prompt_lengths[i] for i in self._prefilling]
        if layer not in self.prompt_states:
            shape = (len(self.prompt_lengths), key.shape[1], max(self.prompt_lengths), key.shape[3])
            self.prompt_states[layer] = key.new_zeros(shape), value.new_zeros((*shape[:3], value.shape[3]))
        keys, values = self.prompt_states[layer]
        outs, begin = [], 0
        for prompt, length in zip(self._prefilling, lengths, strict=True):
            part = slice(begin, begin + length)
            q, k, v = query[:, :, part], key[:, :, part], value[:, :, part]
            outs.append(causal(q, k, v, scale, 0.0))
            keys[prompt, :, :length], values[prompt, :, :length] = k[0], v[0]
            begin += length
        return torch.cat(outs, dim=2).transpose(1, 2)

    def _append(self, layer: int, key_A: Tensor, value_A: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to every row; all keys and values of the rows so far."""
        if layer == min(self.prompt_states):
            self.drawn += 1
        if layer not in self.row_states or self.row_states[layer][0].shape[2] < self.drawn:
            self.row_states[layer] = self._enlarged(layer, key_A, value_A)
        keys, values = self.row_states[layer]
        keys[:, :, self.drawn - 1], values[:, :, self.drawn - 1] = key_A, value_A
        return keys[:, :, : self.drawn], values[:, :, : self.drawn]

    def _enlarged(self, layer: int, key_A: Tensor, value_A: Tensor) -> tuple[Tensor, Tensor]:
        """Room for twice as many tokens, 64 at first, and for no more than a row can draw."""
        room = min(max(64, 2 * (self.drawn - 1)), self.max_new_tokens)
        bigger = []
        for index, new in enumerate((key_A, value_A)):
            states = new.new_zeros((new.shape[0], new.shape[1], room, new.shape[2]))
            if layer in self.row_states:
                old = self.row_states[layer][index]
                states[:, :, : old.shape[2]] = old
            bigger.append(states)
        return bigger[0], bigger[1]

    def _arrange(self) -> None:
        """Where each row stands in the grid of prompts and rows."""
        prompt = torch.searchsorted(self.prompts, self.owners)
        counts = torch.bincount(prompt, minlength=len(self.prompts))
        self.width = int(counts.max())
        self.full = bool((counts == self.width).all())
        first = counts.cumsum(0) - counts
        self.place = prompt * self.width + torch.arange(len(prompt), device=prompt.device) - first[prompt]

    def _by_prompt(self, states: Tensor) -> Tensor:
        """Rows (A, key heads, shared heads, X) side by side for each prompt: (N, key heads, width * shared heads, X)."""
        if not self.full:
            grid = states.new_zeros((len(self.prompts) * self.width, *states.shape[1:]))
            states = grid.index_copy_(0, self.place, states)
        grid = states.view(len(self.prompts), self.width, *states.shape[1:])
        return grid.transpose(1, 2).flatten(2, 3)

    def _by_row(self, states: Tensor, shared_heads: int) -> Tensor:
        """The inverse of :meth:`_by_prompt`."""
        prompts, key_heads, _, size = states.shape
        grid = states.view(prompts, key_heads, self.width, shared_heads, size).transpose(1, 2).flatten(0, 1)
        return grid if self.full else grid[self.place]
