"""The policy: a causal LM with LoRA adapters, its reference, and the statistics of tokens under either."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from maestro_pl.errors import OutOfMemory, UserError
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.loading import (
    ADAPTER,
    REFERENCE_ADAPTER,
    SANDBOX,
    LoRA,
    belongs_to,
    cast_adapters,
    changes_base,
    checkpoint_activations,
    eos_token_ids,
    frozen_copy,
    load_model,
    load_tokenizer,
    peft_config,
    resolve_model,
    with_adapters,
    without_computed_init,
)
from maestro_pl.policy.offload import on_host
from maestro_pl.policy.quantization import (
    DType,
    Quantization,
    keep_differentiable,
    loading_options,
    stored_quantization,
)
from maestro_pl.policy.scoring import Scorer, TokenStatistics, evaluating, in_row_order
from maestro_pl.policy.sharding import Shards, gathered_value, own_share
from maestro_pl.policy.stored_adapter import StoredAdapter, stored_adapter
from maestro_pl.policy.vocabulary import guard_ids
from maestro_pl.run.properties import PlainProperties
from maestro_pl.run.recovery import with_less

Which: TypeAlias = Literal["policy", "reference", "base"]
ReferenceKind: TypeAlias = Literal["base", "synced"]


class LoRAPolicy(PlainProperties, nn.Module):
    """A causal LM of transformers with LoRA adapters of PEFT.

    The base is frozen in ``dtype``, or in 4 or 8 bits (QLoRA); the adapters are float32 unless ``lora.dtype`` says
    otherwise. With ``lora: null`` the whole model is trained.

    Args:
        model: hub id or folder of a causal LM; ``sandbox`` is the tiny policy of the package. Where it holds LoRA adapters
            of PEFT, training goes on from them on their own base: their rank, scale and layers count, of ``lora`` only
            dropout and dtype, and the reference is the model with the adapters as they were. Every id that the
            tokenizer or the model calls end-of-sequence ends a response (``eos_token_ids``).
        dtype: of the base model; of what is left of it (embeddings, norms, output head) where it is quantised.
        quantization: store the base's linear layers in 4 bits (``nf4``, ``fp4``) or 8 (``int8``); needs adapters. The
            reference is the same base with the adapters off: there is no second copy of anything.
        double_quantization: of 4 bits, quantise the scales of the blocks too.
        compute_dtype: of 4 bits, what the linear layers compute in; default ``dtype``.
        lora: the adapters; null trains all parameters.
        reference: what "reference" means for the KL term. ``base``: the model as it was loaded (adapters switched off:
            no second copy; a frozen copy with ``lora: null``; the adapters as they began where their initialisation
            changes the base, as that of PiSSA and OLoRA). ``synced``: a frozen copy of the trained part, moved
            towards the policy every ``sync_every`` steps.
        sync_every: policy steps between two moves of a synced reference.
        sync_rate: share of the way it moves: reference <- (1 - rate) * reference + rate * policy; 1 copies.
        tokenizer: hub id or folder; default: that of the model.
        gradient_checkpointing: trade time for memory in the update (never during generation).
        activation_offload: keep what the checkpoints hold in host memory until the backward needs it.
        attn_implementation: passed to transformers (``sdpa``, ``eager``, ``flash_attention_2``).
        trust_remote_code: passed to transformers.
        model_options: further keyword arguments of ``from_pretrained``.
        packing: read a prompt once for all its responses and pad nothing, where the model's attention allows it (it is
            tried out on a few tokens first); false pads rows into a rectangle, prompts repeated.

    Attributes:
        settings: these arguments as plain values, compared when a run is resumed.
    """

    def __init__(
        self,
        model: str = SANDBOX,
        dtype: DType = "bfloat16",
        quantization: Quantization = "none",
        double_quantization: bool = True,
        compute_dtype: DType | None = None,
        lora: LoRA | None = LoRA(),  # noqa: B008 (read only; jsonargparse shows it as the default)
        reference: ReferenceKind = "base",
        sync_every: int = 6,
        sync_rate: float = 1.0,
        tokenizer: str | None = None,
        gradient_checkpointing: bool = False,
        activation_offload: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        model_options: dict[str, Any] | None = None,
        packing: bool = True,
    ) -> None:
        super().__init__()
        self.reference_model: nn.Module | None = None
        self.shards: Shards | None = None  # of parameters that are cut over the ranks
        if sync_every < 1 or not 0 < sync_rate <= 1:
            raise UserError(
                f"policy sync_every={sync_every}, sync_rate={sync_rate}: expected >= 1 and a share in (0, 1]."
            )
        if lora is not None:
            _check_reference(lora, reference)
        if quantization != "none" and lora is None:
            raise UserError(
                f"model.policy.quantization={quantization} freezes the base, and lora: null trains it: give adapters, or "
                "quantization: none."
            )
        if activation_offload and not gradient_checkpointing:
            raise UserError(
                "model.policy.activation_offload keeps what the checkpoints hold: give gradient_checkpointing: true too."
            )
        self.name_or_path = self.base_name = resolve_model(model)
        adapter = stored_adapter(self.name_or_path)
        if adapter is not None:
            lora = _continued(adapter, lora)
            self.base_name = resolve_model(adapter.base)
            tokenizer = tokenizer or (adapter.name if adapter.has_tokenizer else self.base_name)
            _check_reference(lora, reference)
        self.quantization: Quantization = quantization
        self.double_quantization, self.compute_dtype = double_quantization, compute_dtype
        self.activation_offload = activation_offload
        self.score_limit: int | None = None  # tokens of a scoring pass, once memory has run out in one
        self.reference: ReferenceKind = reference
        self.sync_every, self.sync_rate = sync_every, sync_rate
        self.lora = lora
        self.settings: dict[str, Any] = {
            "model": self.name_or_path,
            "dtype": dtype,
            "quantization": quantization,
            "double_quantization": double_quantization,
            "compute_dtype": compute_dtype,
            **({"lora": None} if lora is None else {f"lora.{name}": value for name, value in asdict(lora).items()}),
            "reference": reference,
            "sync_every": sync_every,
            "sync_rate": sync_rate,
            "tokenizer": tokenizer,
            "gradient_checkpointing": gradient_checkpointing,
            "activation_offload": activation_offload,
            "attn_implementation": attn_implementation,
            "trust_remote_code": trust_remote_code,
            "model_options": dict(model_options or {}),
            "packing": packing,
            **({} if adapter is None else {"base": self.base_name}),
        }
        if lora is None and dtype != "float32":
            rank_zero_warn(
                f"All parameters are trained in {dtype}, which rounds small updates away: use policy.dtype float32 (with "
                "trainer.precision bf16-mixed for speed)."
            )
        self.tokenizer = load_tokenizer(tokenizer or self.name_or_path, trust_remote_code)
        options = dict(model_options or {})
        compute = getattr(torch, compute_dtype or dtype)
        base = self.load_base(
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **options,
            **loading_options(quantization, compute, double_quantization, options),
        )
        self.stored_quantization = stored_quantization(base)
        if lora is None and self.stored_quantization is not None:
            raise UserError(
                f"The model {self.name_or_path!r} is stored quantised ({self.stored_quantization}), and lora: null trains all "
                "parameters, of which the quantised ones have no gradient: give adapters, or the 16-bit original."
            )
        guard_ids(base, self.tokenizer)
        keep_differentiable(base)
        if gradient_checkpointing:
            checkpoint_activations(base)
        self.model: Any = with_adapters(base, lora) if lora is not None else base
        self.starts_adapted = adapter is not None
        if adapter is not None:
            adapter.load_into(self.model)
        self.eos_token_ids = eos_token_ids(self.tokenizer, base)
        self.scorer = Scorer(base, self.pad_token_id, packing)
        self._make_reference()

    def load_base(self, **options: Any) -> Any:
        """The base model, before adapters are put on it; ``options`` go to ``from_pretrained``."""
        return load_model(self.base_name, **options)

    # -- what others ask of it ---------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def hidden_size(self) -> int:
        """D, the width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def pad_token_id(self) -> int:
        """What fills the gaps of a batch; never read, so any id serves where the tokenizer has none."""
        ids = [self.tokenizer.pad_token_id, *self.eos_token_ids]
        rows = self.base_model.get_input_embeddings().weight.shape[0]
        return next((int(pad) for pad in ids if pad is not None and pad < rows), 0)

    @property
    def base_model(self) -> Any:
        """The transformers model, under the adapters if there are any."""
        return self.model.get_base_model() if self.lora is not None else self.model

    @property
    def packs(self) -> bool:
        """Whether a prompt is read once for all its responses; tried out on a few tokens when first asked."""
        return self.scorer.abilities(self.base_model).packs

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths can share a forward pass."""
        return self.scorer.abilities(self.base_model).pads

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added around it."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that the policy's optimizer steps: the adapters, or the whole model."""
        if self.shards is not None and self.shards.trains_shares:
            return list(self.shards.trained)
        return [p for p in self.model.parameters() if p.requires_grad]

    def saved_names(self) -> set[str]:
        """Names in ``state_dict()`` that a checkpoint holds: what is trained, and a synced reference."""
        names = {name for name, p in self.named_parameters() if p.requires_grad}
        if self.reference == "synced":
            names |= {
                n for n in self.state_dict() if belongs_to(n, REFERENCE_ADAPTER) or n.startswith("reference_model.")
            }
        return names

    def saved_state(self, keep: bool = True) -> dict[str, Tensor]:
        """The tensors of :meth:`saved_names`, whole. Collective where they are cut.

        Args:
            keep: False: an empty dict, of a rank that takes part for the others.
        """
        if self.shards is None:
            state: dict[str, Tensor] = self.state_dict()
            return {name: value for name, value in state.items() if name in self.saved_names()} if keep else {}
        current = self._named_tensors()
        found: dict[str, Tensor] = {}
        for name in self._names_at_cut:
            whole = gathered_value(self._shares.get(name, current[name]))
            if keep:
                # the host keeps them: a device that holds shares has no room for all
                found[name] = whole.cpu() if name in self._shares else whole.detach()
        return found

    def saved_shares(self) -> dict[str, Tensor]:
        """The tensors of :meth:`saved_names`, of those that are cut this rank's shares (``DTensor``)."""
        current = self._named_tensors()
        return {name: self._shares.get(name, current[name]).detach() for name in self._names_at_cut}

    def _named_tensors(self) -> dict[str, Tensor]:
        return {
            **dict(self.named_parameters(remove_duplicate=False)),
            **dict(self.named_buffers(remove_duplicate=False)),
        }

    # -- parameters cut over the ranks ---------------------------------------------------------------------------------

    def shard(self, mesh: Any, gathered_dtype: torch.dtype | None = None, sync_every_pass: bool = True) -> None:
        """Cut the base, or with ``lora: null`` all that is trained and its reference, over the ranks. Collective.

        Args:
            mesh: a ``DeviceMesh`` of all ranks.
            gathered_dtype: see :class:`maestro_pl.policy.sharding.Shards`.
            sync_every_pass: likewise.
        """
        _ = self.packs  # tried out while everybody has the whole model
        self._names_at_cut = sorted(self.saved_names())
        kept: set[nn.Parameter] = set()
        if self.lora is not None:
            kept = {p for name, p in self.named_parameters() if p.requires_grad or belongs_to(name, REFERENCE_ADAPTER)}
        models = [self.base_model] if self.reference_model is None else [self.base_model, self.reference_model]
        self.shards = Shards(models, kept, mesh, gathered_dtype, sync_every_pass)
        self._shares = {
            name: p
            for name, p in self.named_parameters(remove_duplicate=False)
            if name in self._names_at_cut and own_share(p) is not p
        }

    def cut(self) -> None:
        """Before an update: this rank keeps its share of the parameters, where they are cut at all."""
        if self.shards is not None:
            self.shards.cut()

    def whole(self) -> None:
        """After an update: gather the parameters for all that only reads them. Collective where they are cut."""
        if self.shards is not None:
            self.shards.whole()

    def passes_together(self, own: int) -> Iterator[bool]:
        """Of the passes of an update, whether this rank has work in each. Collective where parameters are cut.

        A rank with fewer passes than another makes :meth:`idle_pass` for the rest: the others wait for its shares.
        """
        return iter([True] * own) if self.shards is None else self.shards.passes(own)

    def idle_pass(self) -> Tensor:
        """A loss without a gradient, from a pass over one token."""
        return 0.0 * self.token_statistics([[self.pad_token_id]], [[self.pad_token_id]]).logps_T.sum()

    def train(self, mode: bool = True) -> LoRAPolicy:
        """Switch dropout and checkpointing on or off; a frozen reference stays in eval mode."""
        super().train(mode)
        if self.reference_model is not None:
            self.reference_model.eval()
        return self

    # -- statistics --------------------------------------------------------------------------------------------------

    def token_statistics(
        self,
        prompt_ids_B: Sequence[Sequence[int]],
        response_ids_B: Sequence[Sequence[int]],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        context: HiddenContext | None = None,
        which: Which = "policy",
        max_tokens: int | None = None,
        hidden_grad: bool = False,
        tails_B: Sequence[int] | None = None,
    ) -> TokenStatistics:
        """Score given responses to given prompts: log-probabilities, entropies, and h(x, y) (Eq. 1).

        Rows that follow each other and share a prompt read it once, without padding, where the model can
        (``maestro_pl.policy.packing``); else rows are padded, prompts on the left. Position ids are explicit either
        way, so that a row's numbers do not depend on its neighbours. Gradients flow into ``logps_T`` where they are on.

        Args:
            prompt_ids_B: B prompts (already one a response).
            response_ids_B: B responses of at least one token each.
            temperature: logits are divided by it.
            entropy: also give ``entropies_T``.
            context: also give ``hidden_BD``, the hidden state it describes.
            which: the policy, or its reference, or the frozen base (both always without gradient).
            max_tokens: with gradients off, score in passes of at most this many tokens; half as many for the rest of
                the run where memory runs out.
            hidden_grad: let gradients flow into ``hidden_BD`` too.
            tails_B: give statistics of the last so many tokens of each response only; what stands before them is read,
                and never meets the output head.
        """
        asked: dict[str, Any] = {
            "temperature": temperature,
            "entropy": entropy,
            "context": context,
            "hidden_grad": hidden_grad,
        }
        if which != "policy":
            frozen = self.as_reference() if which == "reference" else self.as_base()
            with torch.no_grad(), evaluating(self), frozen as model:
                return self._sliced(model, prompt_ids_B, response_ids_B, asked, max_tokens, tails_B)
        keeping = on_host(self.model) if self.activation_offload and torch.is_grad_enabled() else nullcontext()
        with keeping:
            return self._sliced(self.model, prompt_ids_B, response_ids_B, asked, max_tokens, tails_B)

    def _sliced(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        asked: dict[str, Any],
        max_tokens: int | None,
        tails: Sequence[int] | None,
    ) -> TokenStatistics:
        base = model.get_base_model() if self.lora is not None else model
        if torch.is_grad_enabled() or max_tokens is None:
            slices, parts = self._passes(base, prompts, responses, asked, None, tails)
        else:

            def limit() -> int:
                return max_tokens if self.score_limit is None else min(self.score_limit, max_tokens)

            def longest_pass() -> int:
                return max(
                    self.scorer.tokens(base, [prompts[i] for i in rows], [responses[i] for i in rows])
                    for rows in self.scorer.slices(base, prompts, responses, limit())
                )

            def halve(message: str) -> None:
                longest, before = longest_pass(), self.score_limit
                self.score_limit = max(min(longest, limit()) // 2, 1)
                if longest_pass() >= longest:
                    self.score_limit = before
                    raise OutOfMemory(
                        f"Memory ran out while one response was scored ({message}): see `maestro-pl estimate`."
                    )
                rank_zero_warn(
                    f"Memory ran out while responses were scored, {longest} tokens a pass ({message}). They are scored again, "
                    f"and from now on {self.score_limit} at once."
                )

            slices, parts = with_less(lambda: self._passes(base, prompts, responses, asked, limit(), tails), halve)
        order = [i for chosen in slices for i in chosen]
        if order == list(range(len(prompts))) and len(parts) == 1:
            return parts[0]
        return in_row_order(parts, order, [len(responses[i]) if tails is None else tails[i] for i in order])

    def _passes(
        self,
        base: Any,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        asked: dict[str, Any],
        max_tokens: int | None,
        tails: Sequence[int] | None,
    ) -> tuple[list[list[int]], list[TokenStatistics]]:
        """Rows of each pass, and their statistics."""
        parts = []
        slices = self.scorer.slices(base, prompts, responses, max_tokens)
        for chosen in slices:
            rows = [prompts[i] for i in chosen], [responses[i] for i in chosen]
            kept = None if tails is None else [tails[i] for i in chosen]
            parts.append(self._scored(base, *rows, **asked, tails=kept))
        return slices, parts

    def _scored(self, base: Any, *rows: Any, **asked: Any) -> TokenStatistics:
        if self.shards is None or self.shards.is_whole:
            return self.scorer.score(base, *rows, **asked)

        def compute() -> tuple[Any, ...]:
            seen = self.scorer.score(base, *rows, **asked)
            return seen.logps_T, seen.entropies_T, seen.hidden_BD

        return TokenStatistics(*self.shards.call(base, compute))

    # -- the reference -----------------------------------------------------------------------------------------------

    def _make_reference(self) -> None:
        self.reference_adapter = False  # adapters that are never trained play the reference
        self._first_biases: list[str] = []
        if self.lora is None:
            self.reference_model = frozen_copy(self.model)
        elif self.reference == "synced" or self.starts_adapted or changes_base(self.lora) is not None:
            self.reference_adapter = True
            # a second initialisation from the base would change the base once more
            self.model.add_adapter(REFERENCE_ADAPTER, peft_config(without_computed_init(self.lora)))
            cast_adapters(self.model, self.lora)
            self.sync_reference(rate=1.0)
            self._activate(ADAPTER)
        self._keep_biases()

    def _keep_biases(self) -> None:
        """Keep the base's own biases where they are trained beside the adapters (``lora.options.bias``)."""
        if self.lora is None or self.lora.options.get("bias", "none") == "none":
            return
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not belongs_to(name, ADAPTER):
                self.register_buffer(f"first_bias_{len(self._first_biases)}", parameter.detach().clone(), False)
                self._first_biases.append(name)

    def drop_reference(self) -> None:
        """Give up the copy of a fully trained model that KL terms and proxies need, and its memory."""
        self.reference_model = None

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model that plays the reference, for the length of the block."""
        if self.reference_model is not None:
            yield self.reference_model
        elif self.lora is None:
            raise UserError(
                "This run keeps no reference of a fully trained model (SFT needs none): score with the policy itself "
                "(PerplexityReward(model: policy)), or train adapters."
            )
        elif not self.reference_adapter:
            with self._with_first_biases(), self.model.disable_adapter():
                yield self.model
        else:
            self._activate(REFERENCE_ADAPTER)
            try:
                yield self.model
            finally:
                self._activate(ADAPTER)

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference never moves, so that it is what a frozen base means."""
        return self.reference == "base"

    def check_base(self) -> None:
        """Raise where no model is kept that never moves.

        Raises:
            UserError: a synced reference is the only other copy.
        """
        if not self.reference_is_base and (self.lora is None or changes_base(self.lora) is not None):
            why = "trains the whole model" if self.lora is None else "changes the base when it is initialised"
            raise UserError(
                f"model.weigher.state=base reads a model that never moves, and model.policy.lora {why} while "
                "reference: synced moves the other copy: give reference: base, or state: policy."
            )

    @contextmanager
    def as_base(self) -> Iterator[Any]:
        """The model as it was loaded, for the length of the block; beside a synced reference, the base without adapters.

        Raises:
            UserError: see :meth:`check_base`.
        """
        self.check_base()
        if self.reference_is_base:
            with self.as_reference() as model:
                yield model
        else:
            with self._with_first_biases(), self.model.disable_adapter():
                yield self.model

    @contextmanager
    def _with_first_biases(self) -> Iterator[None]:
        """Let trained biases of the base be what they were at the beginning, which adapters switched off leave alone."""
        trained = [self.model.get_parameter(name) for name in self._first_biases]
        values = [parameter.data for parameter in trained]
        for number, parameter in enumerate(trained):
            parameter.data = self.get_buffer(f"first_bias_{number}")
        try:
            with warnings.catch_warnings():
                if trained:
                    warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
                yield
        finally:
            for parameter, value in zip(trained, values, strict=True):
                parameter.data = value

    @torch.no_grad()
    def sync_reference(self, rate: float | None = None) -> None:
        """Move a synced reference towards the policy: reference <- (1 - rate) * reference + rate * policy."""
        rate = self.sync_rate if rate is None else rate
        self.cut()  # what is whole is a copy
        for target, source in self._reference_pairs():
            own_share(target).lerp_(own_share(source).to(target.dtype), rate)

    def _reference_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.reference_model is not None:
            yield from zip(self.reference_model.parameters(), self.model.parameters(), strict=True)
            return
        parameters = dict(self.model.named_parameters())
        for name, source in parameters.items():
            if belongs_to(name, ADAPTER):
                other = ".".join(REFERENCE_ADAPTER if part == ADAPTER else part for part in name.split("."))
                yield parameters[other], source

    def _activate(self, adapter: str) -> None:
        """Make an adapter the one that computes; only the policy's own is ever trained."""
        self.model.set_adapter(adapter)
        for name, parameter in self.model.named_parameters():
            if belongs_to(name, REFERENCE_ADAPTER):
                parameter.requires_grad_(False)
            elif belongs_to(name, ADAPTER):
                parameter.requires_grad_(True)


def _continued(adapter: StoredAdapter, lora: LoRA | None) -> LoRA:
    """The settings of stored adapters that training goes on from, which is said.

    Raises:
        UserError: they cannot be trained on.
    """
    if lora is None:
        raise UserError(
            f"model.policy.model={adapter.name!r} holds adapters on {adapter.base}, and lora: null trains a whole model: merge "
            "them into their base first and give the merged model, or give adapters."
        )
    if stored_adapter(resolve_model(adapter.base)) is not None:
        raise UserError(
            f"model.policy.model={adapter.name!r} holds adapters on {adapter.base!r}, which are adapters themselves: merge "
            "those into their base first."
        )
    lora = adapter.lora(lora)
    rank_zero_warn(
        f"The policy goes on from the adapters {adapter.name} (rank {lora.r}) on {adapter.base}, and its reference is the "
        "model with them as they are: of model.policy.lora, only dropout and dtype count."
    )
    return lora


def _check_reference(lora: LoRA, reference: ReferenceKind) -> None:
    """Refuse adapters beside which no reference can be kept.

    Raises:
        UserError: naming the setting.
    """
    if reference == "synced" and (bias := lora.options.get("bias", "none")) != "none":
        raise UserError(
            f"model.policy.lora.options.bias={bias} trains the base's own biases, and a synced reference is a second set of "
            "adapters on the same base: give reference: base, or bias: none."
        )
    if changes_base(lora) == "kasa":
        raise UserError(
            "model.policy.lora.options.kasa_config changes the base, so that no reference would be left: use other adapters."
        )
