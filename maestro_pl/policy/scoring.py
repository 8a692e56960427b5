"""Token statistics of given rows: one pass through the backbone, flat or padded, and the output head in chunks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from maestro_pl.algorithm.losses import segment_sum
from maestro_pl.errors import UserError
from maestro_pl.policy import attention
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.head import token_logps
from maestro_pl.policy.packing import PackedGroups, group_rows
from maestro_pl.policy.padding import PaddedRows, greedy_slices, pad_rows, row_slices

Rows: TypeAlias = Sequence[Sequence[int]]
# what configs call a factor on the logits, a divisor of them, and their soft cap
LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
LOGIT_DIVISORS = ("logits_scaling",)
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


HALF_PRECISION_NOISE = 0.03  # mean difference of log-probabilities, relative; a wrong attention is ten times off


@dataclass
class TokenStatistics:
    """Statistics of the response tokens of B rows, laid end to end.

    Attributes:
        logps_T: float32 log-probability of each token at the given temperature.
        entropies_T: float32 entropy in nats of the distribution it was drawn from, if asked for (never with gradient).
        hidden_BD: float32 hidden state of each response, if a context was asked for (with gradient only if asked for).
    """

    logps_T: Tensor
    entropies_T: Tensor | None = None
    hidden_BD: Tensor | None = None


@dataclass(frozen=True)
class Abilities:
    """What of the fast path a model can take.

    Attributes:
        packs: a prompt is read once for its responses; else rows are padded.
        plain_head: logits are the head's product with the hidden states, scaled or capped as the config says; else the
            model computes them itself.
        pads: padding on the left changes nothing; else only prompts of one length share a pass.
    """

    packs: bool
    plain_head: bool
    pads: bool = True


class Scorer:
    """Runs a causal LM of transformers over rows of prompt and response.

    Args:
        base: the model, under any adapters.
        pad_token_id: fills the gaps of padded rows.
        packing: try the flat form of :class:`PackedGroups`.

    Attributes:
        sizes_only: of :func:`maestro_pl.policy.head.token_logps`: nothing is computed but what is allocated.
    """

    def __init__(self, base: Any, pad_token_id: int, packing: bool = True) -> None:
        parameters = inspect.signature(base.forward).parameters
        self.pad_token_id = pad_token_id
        self.takes_position_ids = "position_ids" in parameters
        self.takes_logits_to_keep = "logits_to_keep" in parameters
        config = base.config.get_text_config()
        self.softcap: float | None = _first(config, LOGIT_CAPS)
        self.logit_scale = (_first(config, LOGIT_FACTORS) or 1.0) / (_first(config, LOGIT_DIVISORS) or 1.0)
        self.packing = packing and self.takes_position_ids and attention.install(base)
        self._abilities: Abilities | None = None
        self.sizes_only = False

    def abilities(self, base: Any) -> Abilities:
        """What this model can do, tried out once on a few tokens."""
        if self._abilities is None:
            with torch.no_grad(), evaluating(base):
                self._abilities = self._try_out(base)
        return self._abilities

    def slices(self, base: Any, prompts: Rows, responses: Rows, max_tokens: int | None) -> list[list[int]]:
        """Row numbers of each forward pass, such that none holds more than ``max_tokens`` tokens (one row at least).

        Rows of one prompt stay together as far as the limit allows; padded rows are sorted by length.
        """
        count = len(prompts)
        if max_tokens is None:
            return [list(range(count))]
        lengths = [len(response) for response in responses]
        if self.abilities(base).packs:
            return _packed_slices(prompts, lengths, max_tokens)
        order = sorted(range(count), key=lambda row: len(prompts[row]) + lengths[row])
        cuts = row_slices([len(prompts[i]) for i in order], [lengths[i] for i in order], max_tokens)
        return [order[cut] for cut in cuts]

    def tokens(self, base: Any, prompts: Rows, responses: Rows) -> int:
        """Tokens that one forward pass over these rows computes, padding included."""
        if self.abilities(base).packs:
            return sum(group.tokens for group in group_rows(prompts, [len(response) for response in responses]))
        return len(prompts) * (max(map(len, prompts)) + max(map(len, responses)))

    def score(
        self,
        base: Any,
        prompts: Rows,
        responses: Rows,
        temperature: float = 1.0,
        entropy: bool = False,
        context: HiddenContext | None = None,
        hidden_grad: bool = False,
        tails: Sequence[int] | None = None,
    ) -> TokenStatistics:
        """Statistics of all rows, in one forward pass where the model allows it; see ``LoRAPolicy.token_statistics``."""
        abilities = self.abilities(base)
        asked = (temperature, entropy, context, abilities)
        if abilities.packs or abilities.pads:
            return self._score(base, prompts, responses, *asked, hidden_grad=hidden_grad, tails=tails)
        passes: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            passes.setdefault(len(prompt), []).append(row)
        parts = [
            self._score(
                base,
                [prompts[i] for i in rows],
                [responses[i] for i in rows],
                *asked,
                hidden_grad=hidden_grad,
                tails=None if tails is None else [tails[i] for i in rows],
            )
            for rows in passes.values()
        ]
        order = [row for rows in passes.values() for row in rows]
        return in_row_order(parts, order, [len(responses[i]) if tails is None else tails[i] for i in order])

    def logits(self, base: Any, hidden_BD: Tensor) -> Tensor:
        """float32 logits (B, V) of a few hidden states, for a model with a plain head."""
        head = base.get_output_embeddings()
        logits: Tensor = head(hidden_BD.to(head.weight.dtype)).float()
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def backbone(self, base: Any, layers: bool = False, **inputs: Any) -> Any:
        """The backbone's output: ``last_hidden_state`` after the final norm, and ``hidden_states`` if ``layers``."""
        return _backbone(base)(**inputs, use_cache=False, output_hidden_states=layers)

    def _score(
        self,
        base: Any,
        prompts: Rows,
        responses: Rows,
        temperature: float,
        entropy: bool,
        context: HiddenContext | None,
        abilities: Abilities,
        packed: PackedGroups | None = None,
        hidden_grad: bool = False,
        tails: Sequence[int] | None = None,
    ) -> TokenStatistics:
        device = next(base.parameters()).device
        rows: PackedGroups | PaddedRows
        inputs: dict[str, Any] = {}
        if abilities.packs:
            rows = inputs["layout"] = packed or PackedGroups(prompts, responses, device)
        else:
            rows = pad_rows(prompts, responses, self.pad_token_id, device)
        if self.takes_position_ids:
            inputs["position_ids"] = rows.position_ids
        inputs |= {"input_ids": rows.ids, "attention_mask": rows.attention_mask}
        layers = context is not None and context.layer != "last"
        lengths_B = torch.tensor([len(response) for response in responses], device=device)
        before_T, inside_T = rows.before_T, rows.inside_T
        if tails is not None:
            scored_T = _tail_mask(lengths_B, torch.tensor(tails, device=device))
            before_T, inside_T = before_T[scored_T], inside_T[scored_T]
        targets_T = rows.ids.flatten()[inside_T]
        if abilities.plain_head:
            output = self.backbone(base, layers, **inputs)
            last = output.last_hidden_state
            logps_T, entropies_T = token_logps(
                last.flatten(0, 1)[before_T],
                base.get_output_embeddings(),
                targets_T,
                temperature / self.logit_scale,
                entropy,
                self.softcap,
                self.sizes_only,
            )
        else:
            width = max(map(len, responses)) + 1
            if self.takes_logits_to_keep:
                inputs["logits_to_keep"] = width  # the response's columns, and the one that predicts the first of them
            with _LastHidden(base) as seen:
                output = base(**inputs, use_cache=False, output_hidden_states=layers)
            last = seen.state
            skipped = rows.ids.shape[1] - output.logits.shape[1]
            logits_TV = output.logits[_places(before_T, rows.ids.shape[1], skipped)]
            logps_T, entropies_T = read_logits(logits_TV, targets_T, temperature, entropy)
        statistics = TokenStatistics(logps_T, entropies_T)
        if context is not None:
            hidden = output.hidden_states[layer_index(context, output.hidden_states)] if layers else last
            hidden = hidden if hidden_grad else hidden.detach()
            statistics.hidden_BD = _context_states(hidden.flatten(0, 1), rows, lengths_B, context)
        return statistics

    def _try_out(self, base: Any) -> Abilities:
        """Compare every way of computing with the model's own logits of three short rows, one row at a time."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = base.config.get_text_config().vocab_size
        first, second, *responses = (
            torch.randint(vocabulary, (length,), generator=generator).tolist() for length in (3, 2, 3, 2, 1)
        )
        prompts = [first, first, second]

        def logps(abilities: Abilities, rows: slice = slice(None), packed: PackedGroups | None = None) -> Tensor:
            return self._score(base, prompts[rows], responses[rows], 1.0, False, None, abilities, packed).logps_T

        own = Abilities(packs=False, plain_head=False)
        truth = torch.cat([logps(own, slice(row, row + 1)) for row in range(3)])
        half = torch.is_autocast_enabled(truth.device.type) or getattr(base, "is_loaded_in_8bit", False)
        exact = next(base.parameters()).dtype == torch.float32 and not half
        tolerance = (3e-5 if exact else HALF_PRECISION_NOISE) * float(truth.abs().mean().clamp(min=1.0))

        def agrees(got: Tensor) -> bool:
            return float((got - truth).abs().mean()) <= tolerance

        # a decoder of BART's kin takes columns for positions, too little a difference to be seen in 16 bits
        columns = not self.takes_position_ids and hasattr(_backbone(base), "embed_positions")
        sparse = _first(base.config.get_text_config(), ("index_topk",)) is not None
        pads = agrees(logps(own)) and not columns and not sparse
        plain = self._has_plain_head(base, prompts[0] + responses[0], 1e-5 if exact else 1e-2)
        packs = False
        if self.packing and plain and pads:
            packed = PackedGroups(prompts, responses, truth.device)
            calls: list[int] = []
            attend = packed.attend

            def counted(layer: int, *rest: Any) -> Tensor:
                calls.append(layer)
                return attend(layer, *rest)

            vars(packed)["attend"] = counted
            try:
                packs = agrees(logps(Abilities(packs=True, plain_head=True), packed=packed))
            except Exception as error:  # whatever it is, padded rows do without it
                rank_zero_warn(f"{type(base).__name__} does not take packed rows: {type(error).__name__}: {error}")
            packs = packs and calls == list(range(base.config.get_text_config().num_hidden_layers))
        if self.packing and not packs:
            rank_zero_warn(
                f"{type(base).__name__} cannot read a prompt once for all its responses, so prompts are repeated and rows "
                "padded: slower, the same results."
            )
        if not pads:
            rank_zero_warn(
                f"{type(base).__name__} computes something else behind padding, so only prompts of one length share a "
                "forward pass: slower, the same results."
            )
        return Abilities(packs, plain, pads)

    def _has_plain_head(self, base: Any, ids: list[int], tolerance: float) -> bool:
        """Whether our product gives the logits that the model gives from the same hidden states."""
        if type(base.get_output_embeddings()) is not nn.Linear or (self.softcap is not None and self.logit_scale != 1):
            return False
        with _LastHidden(base) as seen:
            own = base(input_ids=torch.tensor([ids], device=base.device), use_cache=False).logits.float()
        ours = self.logits(base, seen.state)
        return ours.shape == own.shape and float((ours - own).abs().max()) <= tolerance * float(own.abs().max())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the length of the block; every submodule's own mode is restored."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


class _LastHidden:
    """Catches what the backbone hands to the output head."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.state: Any = None

    def __enter__(self) -> _LastHidden:
        def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.state = output[0] if isinstance(output, tuple) else output.last_hidden_state

        self.handle = _backbone(self.base).register_forward_hook(catch)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def read_logits(
    logits_TV: Tensor, targets_T: Tensor, temperature: float, entropy: bool, chunk: int = 512
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and, without gradient, the entropy: logps_T and entropies_T (or None), float32.

    The logits are turned into float32 ``chunk`` tokens at a time, so that a large vocabulary is never held twice.
    """
    logps, entropies = [], []
    for logits, targets in zip(torch.split(logits_TV, chunk), torch.split(targets_T, chunk), strict=True):
        scaled = logits.float() / temperature
        log_z = torch.logsumexp(scaled, dim=-1)
        logps.append(scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_z)
        if entropy:
            with torch.no_grad():
                entropies.append(log_z - (torch.exp(scaled - log_z.unsqueeze(-1)) * scaled).sum(-1))
    return torch.cat(logps), torch.cat(entropies) if entropy else None


def in_row_order(parts: list[TokenStatistics], order: list[int], lengths: list[int]) -> TokenStatistics:
    """Join statistics of rows that were scored in ``order`` (with these lengths) and put the rows back in place."""
    place = sorted(range(len(order)), key=order.__getitem__)  # where each row was scored

    def ragged(tensors: list[Tensor]) -> Tensor:
        rows = torch.split(torch.cat(tensors), lengths)
        return torch.cat([rows[i] for i in place])

    entropies = [p.entropies_T for p in parts if p.entropies_T is not None]
    hidden = [p.hidden_BD for p in parts if p.hidden_BD is not None]
    return TokenStatistics(
        ragged([p.logps_T for p in parts]),
        ragged(entropies) if entropies else None,
        torch.cat(hidden)[place] if hidden else None,
    )


def layer_index(context: HiddenContext, hidden_states: Sequence[Tensor]) -> int:
    """Index into transformers' ``hidden_states``, whose entry 0 is the embedding.

    Raises:
        UserError: the model has no such layer.
    """
    count = len(hidden_states)
    index = {"first": 1, "middle": count // 2, "last": count - 1}.get(str(context.layer), context.layer)
    if not isinstance(index, int) or not -count <= index < count:
        raise UserError(f"layer={context.layer!r}: this model has hidden states 0 to {count - 1} (0 is the embedding).")
    return index


def _backbone(base: Any) -> Any:
    """The module that the model calls for its hidden states."""
    named = (getattr(base, name, None) for name in (base.base_model_prefix, "model"))
    backbone = next((module for module in named if isinstance(module, nn.Module)), None)
    if backbone is None or base.get_output_embeddings() is None:
        raise UserError(
            f"{type(base).__name__}: no decoder was found under {base.base_model_prefix!r}, or no output head: use a causal "
            "language model of transformers."
        )
    # OPT and the decoders of BART's kin call what is inside, and never the module around it
    inner = getattr(backbone, "decoder", None)
    return inner if isinstance(inner, nn.Module) else backbone


def _places(before_T: Tensor, width: int, skipped: int) -> tuple[Tensor, Tensor]:
    """Row and column of flat positions, where the first ``skipped`` columns were left out."""
    return before_T // width, before_T % width - skipped


def _tail_mask(lengths_B: Tensor, tails_B: Tensor) -> Tensor:
    """Bool (T,) over responses laid end to end: the last ``tails_B`` tokens of each."""
    ends_T = lengths_B.cumsum(0).repeat_interleave(lengths_B)
    places_T = torch.arange(len(ends_T), device=lengths_B.device)
    return places_T >= ends_T - tails_B.repeat_interleave(lengths_B)


def _context_states(
    flat_TD: Tensor, rows: PackedGroups | PaddedRows, lengths_B: Tensor, context: HiddenContext
) -> Tensor:
    """H of each response: the prompt's last state, the response's, or both side by side."""
    states = []
    if context.place != "terminal":
        states.append(flat_TD[rows.before_T[lengths_B.cumsum(0) - lengths_B]].float())  # in front of the first token
    if context.place != "prompt":
        states.append(_pool(flat_TD, rows, lengths_B, context))
    return torch.cat(states, dim=1)


def _pool(flat_TD: Tensor, rows: PackedGroups | PaddedRows, lengths_B: Tensor, context: HiddenContext) -> Tensor:
    if context.pool == "last":
        return flat_TD[rows.last_B].float()
    return segment_sum(flat_TD[rows.inside_T].float(), lengths_B) / lengths_B.unsqueeze(-1)


def _packed_slices(prompts: Rows, lengths: list[int], max_tokens: int) -> list[list[int]]:
    parts: list[tuple[int, list[int]]] = []  # tokens and rows of groups, those cut up that are too long for one pass
    row = 0
    for group in group_rows(prompts, lengths):
        cut = group.tokens > max_tokens
        parts.append((group.prompt, []))
        for length in group.responses:
            tokens, rows = parts[-1]
            if cut and rows and tokens + length > max_tokens:
                tokens, rows = group.prompt, []
                parts.append((tokens, rows))
            rows.append(row)
            parts[-1] = (tokens + length, rows)
            row += 1
    return [[row for i in chosen for row in parts[i][1]] for chosen in greedy_slices([t for t, _ in parts], max_tokens)]


def _first(config: Any, names: Sequence[str]) -> Any:
    """The first of these settings that a config has, or None."""
    return next((value for value in (getattr(config, name, None) for name in names) if value is not None), None)
