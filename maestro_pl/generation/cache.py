"""Keys and values of groups: each prompt's once, and those of the tokens that its rows have drawn since."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maestro_pl.policy.attention import causal

COPY_BELOW = 4096  # measured: docs/performance.md


class GroupCache:
    """Attention of a decoding batch, as a :class:`maestro_pl.policy.attention.Layout`.

    All rows have drawn the same number of tokens, so their own keys need no mask; those of the prompts, padded to the
    longest, may. While many rows share long prompts, a prompt's keys are kept once and the queries of its group meet
    them in one matrix product. Once ``rows * longest prompt`` is at most ``copy_below``, every row gets a copy in front
    of its own keys: reading a few more keys is then cheaper than the many small operations that keep them apart.

    Args:
        prompt_lengths: of N prompts.
        owners: the prompt of each row, in ascending order.
        max_new_tokens: most tokens that a row can draw.
        copy_below: see above; 0 never copies.
    """

    def __init__(
        self, prompt_lengths: list[int], owners: list[int], max_new_tokens: int, copy_below: int = COPY_BELOW
    ) -> None:
        self.prompt_lengths, self.max_new_tokens, self.copy_below = prompt_lengths, max_new_tokens, copy_below
        self.longest = max(prompt_lengths)
        self.prompts = torch.tensor(sorted(set(owners)))
        self.owners = torch.tensor(owners)
        self.prompt_states: dict[int, tuple[Tensor, Tensor]] = {}  # layer to keys and values (N, key heads, P, D)
        self.row_states: dict[int, tuple[Tensor, Tensor]] = {}  # layer to keys and values (A, key heads, room, D)
        self.copied = 0  # prompt keys in front of each row's own
        self.prompt_mask: Tensor | None = None  # True beyond the end of a prompt
        self.row_mask: Tensor | None = None  # True for what a row sees, where prompts were copied
        self.own_mask: Tensor | None = None  # True for what of its own a row does not have yet, where prompts are apart
        self.drawn = 0
        self._prefilling: list[int] | None = None

    def begin_prefill(self, prompts: list[int]) -> None:
        """The next forward pass reads these prompts, one after the other."""
        self._prefilling = prompts

    def begin_decoding(self, device: torch.device) -> None:
        """Every prompt has been read; forward passes now read one token of every row."""
        self._prefilling = None
        self.first_layer = min(self.prompt_states)
        lengths = torch.tensor(self.prompt_lengths, device=device)
        beyond = torch.arange(self.longest, device=device) >= lengths.unsqueeze(1)
        self.prompt_mask = beyond.view(-1, 1, 1, self.longest) if bool(beyond.any()) else None
        self.owners, self.prompts = self.owners.to(device), self.prompts.to(device)
        self._arrange()

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (positions in the batch), and the prompts that no row is left of."""
        for layer, (k, v) in self.row_states.items():  # one layer at a time: never two whole caches
            self.row_states[layer] = k[rows], v[rows]
            del k, v
        self.owners = self.owners[rows]
        if self.copied:
            self.row_mask = None if self.row_mask is None else self.row_mask[rows]
            return
        left = torch.isin(self.prompts, self.owners).nonzero().squeeze(1)
        if len(left) < len(self.prompts):
            for layer, (k, v) in self.prompt_states.items():
                self.prompt_states[layer] = k[left], v[left]
                del k, v
            self.prompts = self.prompts[left]
            self.prompt_mask = None if self.prompt_mask is None else self.prompt_mask[left]
        self._arrange()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """See :class:`maestro_pl.policy.attention.Layout`."""
        if self._prefilling is not None:
            return self._attend_prompts(layer, query, key, value, scale)
        keys, values = self._append(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        rows, key_heads = keys.shape[:2]
        query_A = query[0].transpose(0, 1).reshape(rows, key_heads, -1, query.shape[-1])
        if self.copied:
            mask = self._mask_of_copies(keys.shape[2])
            out = F.scaled_dot_product_attention(query_A, keys, values, attn_mask=mask, scale=scale)
        else:
            out = self._attend_apart(layer, query_A, keys, values, query.shape[-1] ** -0.5 if scale is None else scale)
        return out.reshape(1, rows, -1, out.shape[-1])

    def _mask_of_copies(self, keys: int) -> Tensor | None:
        """What each row sees of its first ``keys`` keys, the prompt's in front; None where that is all."""
        return None if self.row_mask is None else self.row_mask[..., :keys]

    def _attend_apart(self, layer: int, query_A: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention over prompt keys that are kept once and the rows' own, with one softmax over both."""
        query_A = query_A * scale
        shared = query_A.shape[2]
        prompt_keys, prompt_values = self.prompt_states[layer]
        to_prompt = torch.matmul(self._by_prompt(query_A), prompt_keys.transpose(-1, -2))
        if self.prompt_mask is not None:
            to_prompt = to_prompt.masked_fill(self.prompt_mask, -torch.inf)
        to_own = torch.matmul(query_A, keys.transpose(-1, -2))
        if self.own_mask is not None:
            to_own = to_own.masked_fill(self.own_mask, -torch.inf)
        scores = torch.cat([self._by_row(to_prompt, shared), to_own], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        on_prompt, on_own = torch.split(weights, [prompt_keys.shape[2], keys.shape[2]], dim=-1)
        from_prompt = self._by_row(torch.matmul(self._by_prompt(on_prompt), prompt_values), shared)
        return from_prompt + torch.matmul(on_own, values)

    def _attend_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        assert self._prefilling is not None
        lengths = [self.prompt_lengths[i] for i in self._prefilling]
        if layer not in self.prompt_states:
            shape = (len(self.prompt_lengths), key.shape[1], self.longest, key.shape[3])
            self.prompt_states[layer] = key.new_zeros(shape), value.new_zeros((*shape[:3], value.shape[3]))
        keys, values = self.prompt_states[layer]
        outs, begin = [], 0
        for prompt, length in zip(self._prefilling, lengths, strict=True):
            part = slice(begin, begin + length)
            q, k, v = query[:, :, part], key[:, :, part], value[:, :, part]
            outs.append(causal(q, k, v, scale, 0.0))
            keys[prompt, :, :length], values[prompt, :, :length] = k[0], v[0]
            begin += length
        return torch.cat(outs, dim=2).transpose(1, 2).contiguous()

    def _append(self, layer: int, key_A: Tensor, value_A: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token to every row; the keys and values that each row has of its own (or a copy of)."""
        if layer == self.first_layer:
            self.drawn += 1
        end = self.copied + self.drawn
        if layer not in self.row_states or self.row_states[layer][0].shape[2] < end:
            self.row_states[layer] = self._enlarged(layer, key_A, value_A)
        keys, values = self.row_states[layer]
        keys[:, :, end - 1], values[:, :, end - 1] = key_A, value_A
        return keys[:, :, :end], values[:, :, :end]

    def _enlarged(self, layer: int, key_A: Tensor, value_A: Tensor) -> tuple[Tensor, Tensor]:
        """Room for twice as many drawn tokens, 64 at first, and for no more than a row can draw."""
        room = self.copied + min(max(64, 2 * (self.drawn - 1)), self.max_new_tokens)
        bigger = []
        for index, new in enumerate((key_A, value_A)):
            states = new.new_zeros((new.shape[0], new.shape[1], room, new.shape[2]))
            if layer in self.row_states:
                old = self.row_states[layer][index]
                states[:, :, : old.shape[2]] = old
            bigger.append(states)
        return bigger[0], bigger[1]

    def _arrange(self) -> None:
        """Copy the prompts to the rows if that has become cheap; else note where each row stands among its prompt's."""
        prompt = torch.searchsorted(self.prompts, self.owners)
        if len(prompt) * self.longest <= self.copy_below:
            self._copy_prompts(prompt)
            return
        counts = torch.bincount(prompt, minlength=len(self.prompts))
        self.width, fewest = torch.stack([counts.max(), counts.min()]).tolist()
        self.full = fewest == self.width
        first = counts.cumsum(0) - counts
        self.place = prompt * self.width + torch.arange(len(prompt), device=prompt.device) - first[prompt]

    def _copy_prompts(self, prompt: Tensor) -> None:
        for layer in list(self.prompt_states):
            copies = [part[prompt] for part in self.prompt_states.pop(layer)]
            if layer in self.row_states:
                copies = [
                    torch.cat([copy, own], dim=2) for copy, own in zip(copies, self.row_states[layer], strict=True)
                ]
            self.row_states[layer] = copies[0], copies[1]
        self.copied = self.longest
        if self.prompt_mask is not None:
            seen = ~self.prompt_mask[prompt]
            self.row_mask = torch.cat([seen, seen.new_ones(*seen.shape[:3], self.max_new_tokens)], dim=3)

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
