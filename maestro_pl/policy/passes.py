"""Cutting the responses of a rollout into the forward passes of an update."""

from __future__ import annotations

from collections.abc import Sequence

from maestro_pl.policy.padding import greedy_slices, row_slices


def row_batches(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    groups: Sequence[int],
    max_tokens: int,
    packed: bool,
    whole_groups: bool = False,
) -> list[list[int]]:
    """Row numbers of each pass, such that none holds more than ``max_tokens`` tokens (one response at least).

    Groups stay whole where they fit; one that is too long alone is cut between its responses, its prompt read again.

    Args:
        prompt_lengths: of all N prompts.
        response_lengths: of the G responses to each.
        groups: the groups that are wanted.
        max_tokens: of one pass, padding included.
        packed: a prompt is read once for its responses of a pass; else rows are padded to the longest.
        whole_groups: never cut one.

    Returns:
        Rows n * G + g.
    """
    pieces: list[tuple[int, list[int]]] = []  # group, and the responses of it that stay together
    for n in groups:
        size = len(response_lengths[n])
        cuts = [list(range(size))]
        if not whole_groups and _tokens(prompt_lengths[n], response_lengths[n], packed) > max_tokens:
            cuts = _cut(prompt_lengths[n], response_lengths[n], max_tokens, packed)
        pieces += [(n, cut) for cut in cuts]
    if packed:
        sizes = [_tokens(prompt_lengths[n], [response_lengths[n][g] for g in cut], True) for n, cut in pieces]
        passes = greedy_slices(sizes, max_tokens)
    else:
        longest = [max(response_lengths[n][g] for g in cut) for n, cut in pieces]
        order = sorted(range(len(pieces)), key=lambda i: prompt_lengths[pieces[i][0]] + longest[i])  # less padding
        prompts = [prompt_lengths[pieces[i][0]] for i in order]
        passes = []
        for part in _padded_passes(
            prompts, [longest[i] for i in order], [len(pieces[i][1]) for i in order], max_tokens
        ):
            passes.append([order[i] for i in part])
    sizes_N = [len(lengths) for lengths in response_lengths]
    return [[n * sizes_N[n] + g for i in chosen for n, cut in [pieces[i]] for g in cut] for chosen in passes]


def pass_tokens(
    prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]], rows: Sequence[int], packed: bool
) -> int:
    """Tokens of one pass of :func:`row_batches`."""
    size = len(response_lengths[0])
    by_group: dict[int, list[int]] = {}
    for row in rows:
        by_group.setdefault(row // size, []).append(response_lengths[row // size][row % size])
    if packed:
        return sum(prompt_lengths[n] + sum(lengths) for n, lengths in by_group.items())
    return len(rows) * (max(prompt_lengths[n] for n in by_group) + max(max(lengths) for lengths in by_group.values()))


def _tokens(prompt: int, responses: Sequence[int], packed: bool) -> int:
    return prompt + sum(responses) if packed else len(responses) * (prompt + max(responses))


def _cut(prompt: int, responses: Sequence[int], max_tokens: int, packed: bool) -> list[list[int]]:
    if packed:
        return greedy_slices(responses, max(max_tokens - prompt, 1))
    order = sorted(range(len(responses)), key=responses.__getitem__)
    slices = row_slices([prompt] * len(order), [responses[g] for g in order], max_tokens)
    return [order[part] for part in slices]


def _padded_passes(prompts: list[int], longest: list[int], rows: list[int], max_tokens: int) -> list[list[int]]:
    passes: list[list[int]] = []
    count = left = right = 0
    for i, (prompt, response, more) in enumerate(zip(prompts, longest, rows, strict=True)):
        wide = max(left, prompt) + max(right, response)
        if not passes or (count + more) * wide > max_tokens:
            passes.append([])
            count = left = right = 0
        passes[-1].append(i)
        count, left, right = count + more, max(left, prompt), max(right, response)
    return passes
