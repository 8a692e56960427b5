"""Memory of a run by part, from its settings and the model's config alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from maestro_pl.generation.cache import COPY_BELOW
from maestro_pl.memory.shadow import ModelSetting, Shadow, shadow_of

GIB = 2**30
OUTSIDE = int(0.6 * GIB)  # the CUDA context and its libraries, which no allocator counts
FRAGMENTATION = 1.05  # of what is allocated, for blocks that are reserved and cannot be used
VLLM_TOKENS = 8192  # of one pass over prompts (its max_num_batched_tokens)
WORKSPACE = int(0.035 * GIB)  # cuBLAS


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes that an optimizer keeps for each trained parameter.

    Attributes:
        states: numbers of the parameter's own dtype.
        fixed: bytes whatever the dtype, for 8-bit states.
        paged: they lie in host memory that the GPU reads.
    """

    states: int = 2
    fixed: float = 0.0
    paged: bool = False


def optimizer_memory(class_path: str, options: dict[str, Any] | None = None) -> OptimizerMemory:
    """What an optimizer keeps, by its name; an unknown one is taken for an Adam."""
    name = class_path.rsplit(".", 1)[-1]
    paged = name.startswith("Paged")
    if "8bit" in name:
        states = 1 if any(kind in name for kind in ("Lion", "SGD", "RMSprop", "Adagrad")) else 2
        return OptimizerMemory(0, states * (1 + 4 / 256), paged)
    if "SGD" in name:
        return OptimizerMemory(1 if (options or {}).get("momentum") else 0)
    if any(kind in name for kind in ("Lion", "Adagrad", "RMSprop")):
        return OptimizerMemory(1, 0.0, paged)
    return OptimizerMemory(2, 0.0, paged)


@dataclass(frozen=True)
class Workload:
    """One run on one device, as far as memory is concerned; the names are those of the config.

    Attributes:
        model: the policy's settings.
        optimizer: what its optimizer keeps.
        batch_size: prompts a step.
        group_size: G.
        max_prompt_tokens: of the longest prompt.
        max_new_tokens: of the longest response.
        max_batch: responses decoded at once; None decodes all together.
        score_tokens: of one pass that reads prompts or scores.
        micro_batch_tokens: of one pass of the update.
        scores_reference: a KL term has the reference scored.
        uncounted: rewards that may load models of their own.
        eval_batch_size, eval_group_size: of an evaluation.
        native: rollouts are sampled by our own loop; False: by transformers' ``generate``, which reads every row's
            prompt.
        elsewhere: rollouts are sampled on servers.
        vllm_share: of the card that vLLM may hold beside the trainer (``VLLMEngine``); 0: it is not used.
        vllm_sleeps: it lets go of that between rollouts.
        card_bytes: of the card, where it is known: vLLM takes its share of it, whatever it needs.
        whole_groups: a group is never cut (``coupling: joint``).
        keeps_reference: a run that trains all parameters keeps a frozen copy of them.
        ranks: over which ``trainer.strategy: fsdp`` cuts the parameters; 1: each rank has all of them.
    """

    model: ModelSetting
    optimizer: OptimizerMemory = field(default_factory=OptimizerMemory)
    batch_size: int = 8
    group_size: int = 8
    max_prompt_tokens: int = 512
    max_new_tokens: int = 512
    max_batch: int | None = None
    score_tokens: int = 16384
    micro_batch_tokens: int = 16384
    scores_reference: bool = False
    uncounted: tuple[str, ...] = ()
    eval_batch_size: int = 0
    eval_group_size: int = 1
    native: bool = True
    elsewhere: bool = False
    vllm_share: float = 0.0
    vllm_sleeps: bool = True
    card_bytes: int = 0
    whole_groups: bool = False
    keeps_reference: bool = True
    ranks: int = 1

    @property
    def group_tokens(self) -> int:
        """Tokens of the longest group in one pass of the update."""
        return self.max_prompt_tokens + self.group_size * self.max_new_tokens


@dataclass(frozen=True)
class Estimate:
    """Bytes by part.

    Attributes:
        lasting: parts that are there all the time.
        phases: for each phase of a step, the parts that come on top while it lasts.
        host: parts in host memory.
        passes: what the largest pass of the update holds, in words.
    """

    lasting: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: dict[str, int]
    passes: str = ""

    @property
    def phase(self) -> str:
        """The phase with the peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """The most that is allocated at once."""
        return sum(self.lasting.values()) + sum(self.phases[self.phase].values())

    def peak_of(self, phase: str) -> int:
        """The most that is allocated at once in one phase."""
        return sum(self.lasting.values()) + sum(self.phases[phase].values())

    @property
    def card_bytes(self) -> int:
        """What a card must have: the peak, fragmentation, and what lies outside the allocator."""
        return int(self.peak * FRAGMENTATION) + OUTSIDE

    def fits(self, card_gib: float) -> bool:
        """Whether a card of so many GiB is enough."""
        return self.card_bytes <= card_gib * GIB


def estimate(workload: Workload) -> Estimate:
    """Follow the run's own forward and backward passes on fake tensors, and add what is known by arithmetic.

    The activations of the update, of scoring and of reading prompts are followed (:class:`Shadow`); the weights are
    counted; the caches of decoding are arithmetic (``GroupCache``).

    Args:
        workload: the run.
    """
    setting = workload.model
    shadow = shadow_of(setting)
    workload = replace(workload, model=replace(setting, packing=shadow.packs))
    optimizer = workload.optimizer
    states = int(optimizer.states * shadow.trained_bytes + optimizer.fixed * shadow.trained)
    adapters = shadow.adapter_bytes
    lasting = {
        "base": shadow.base_bytes,
        "adapters": adapters,
        "gradients": shadow.trained_bytes,
        "optimizer": 0 if optimizer.paged else states,
        "reference": shadow.reference_bytes if workload.keeps_reference else 0,
        "workspace": WORKSPACE if setting.device == "cuda" else 0,
    }
    host = {"optimizer": states} if optimizer.paged else {}

    prompts, group = _pass_of(workload)
    update = shadow.update(prompts, workload.max_prompt_tokens, group, workload.max_new_tokens)
    host |= {"activations": update.host} if update.host else {}
    phases = {
        "update": {
            "activations kept": update.kept,
            "logits chunk" if update.forward > update.backward else "inside a layer": update.peak - update.kept,
        },
        "rollout": _rollout(workload, shadow),
    }
    if workload.eval_batch_size:
        evaluated = replace(workload, batch_size=workload.eval_batch_size, group_size=workload.eval_group_size)
        phases["validation"] = _rollout(evaluated, shadow)
    if workload.scores_reference or not workload.native:
        # a KL term scores in passes of the update's size, what an engine left out in those of rollout.score_tokens
        limits = [workload.micro_batch_tokens] * workload.scores_reference + [workload.score_tokens] * (
            not workload.native
        )
        count = max(1, max(limits) // workload.group_tokens)
        rows = min(count, workload.batch_size)
        part = min(workload.group_size, _rows_in(workload, max(limits)))
        phases["scoring"] = {
            "activations": shadow.scoring(
                rows, workload.max_prompt_tokens, workload.group_size if rows > 1 else part, workload.max_new_tokens
            )
        }
    if workload.vllm_share and workload.vllm_sleeps:
        host["vLLM's base, asleep"] = shadow.base_bytes
    elif workload.vllm_share:  # it holds the most that any rollout needs, all the time
        held = [phases.pop(name) for name in ("rollout", "validation") if name in phases]
        held.sort(key=lambda parts: sum(parts.values()))
        lasting |= held[-1]
        phases["rollout"] = {}
    found = Estimate(lasting, phases, host, f"{prompts} x {group} responses")
    return found if workload.ranks == 1 else _cut(found, workload, shadow)


def _cut(found: Estimate, workload: Workload, shadow: Shadow) -> Estimate:
    """The same where FSDP cuts the parameters over the ranks (``maestro_pl.policy.sharding``).

    Of what is cut a rank keeps its share; with adapters that is the base alone. In the update two blocks are whole at once
    (the next is gathered early) with all that is in no block, and so are their gradients until they are averaged, in
    float32. Outside the update everything is whole, in the precision in which it is computed.
    """
    setting = workload.model
    cut = ["base"] if setting.lora is not None else ["base", "gradients", "optimizer", "reference"]
    lasting = {name: -(-size // workload.ranks) if name in cut else size for name, size in found.lasting.items()}
    halved = 2 if setting.lora is None and setting.autocast and setting.dtype == "float32" else 1
    block, rest = shadow.block_bytes // halved, shadow.rest_bytes // halved
    whole = found.lasting["base"] // halved
    if setting.lora is None:
        whole += found.lasting["reference"] // halved
    update = {"gathered blocks": 2 * block + rest}
    if setting.lora is None:
        update["gradients before they are averaged"] = block + rest + max(shadow.block_bytes, shadow.rest_bytes)
    phases = {
        name: {**parts, **(update if name == "update" else {"gathered copy": whole})}
        for name, parts in found.phases.items()
    }
    return replace(found, lasting=lasting, phases=phases)


def _pass_of(workload: Workload) -> tuple[int, int]:
    """Groups, and responses a group, of the largest pass of the update."""
    tokens = workload.group_tokens
    if not workload.model.packing:
        tokens = workload.group_size * (workload.max_prompt_tokens + workload.max_new_tokens)
    if tokens <= workload.micro_batch_tokens or workload.whole_groups:
        return max(1, min(workload.micro_batch_tokens // tokens, workload.batch_size)), workload.group_size
    return 1, min(workload.group_size, _rows_in(workload, workload.micro_batch_tokens))


def _rows_in(workload: Workload, tokens: int) -> int:
    """Responses of one group that a pass of so many tokens holds."""
    if workload.model.packing:
        return max(1, (tokens - workload.max_prompt_tokens) // workload.max_new_tokens)
    return max(1, tokens // (workload.max_prompt_tokens + workload.max_new_tokens))


def vllm_needs(found: Estimate) -> int:
    """Bytes that vLLM needs of the card at least: base, cache of all responses at once, activations."""
    places = [found.lasting, *found.phases.values()]
    return max(sum(size for name, size in parts.items() if name.startswith("vLLM")) for parts in places)


def _rollout_of_vllm(workload: Workload, shadow: Shadow) -> dict[str, int]:
    """A base of its own, the cache with every prompt once for its group, and one pass over prompts."""
    rows, prompt = workload.batch_size * workload.group_size, workload.max_prompt_tokens
    at_once = min(workload.batch_size, max(1, VLLM_TOKENS // prompt))
    _, reading = shadow.prefill([prompt] * at_once)
    cache = (workload.batch_size * prompt + rows * workload.max_new_tokens) * shadow.state_bytes
    share = int(workload.vllm_share * workload.card_bytes)
    cache = max(cache, share - shadow.base_bytes - reading)
    return {"vLLM's base": shadow.base_bytes, "vLLM's KV cache": cache, "vLLM's activations": reading}


def _rollout(workload: Workload, shadow: Shadow) -> dict[str, int]:
    if workload.elsewhere:
        return {}
    if workload.vllm_share:
        return _rollout_of_vllm(workload, shadow)
    config = workload.model.config.get_text_config()
    rows = min(workload.max_batch or 10**9, workload.batch_size * workload.group_size)
    prompts = min(workload.batch_size, -(-rows // workload.group_size))
    prompt, new = workload.max_prompt_tokens, workload.max_new_tokens
    native = workload.native and shadow.packs
    at_once = min(prompts, max(1, workload.score_tokens // prompt)) if native else rows
    _, reading = shadow.prefill([prompt] * at_once)
    of_prompts = prompts * prompt * shadow.state_bytes
    copied = not native or rows * prompt <= COPY_BELOW
    of_rows = rows * (new + (prompt if copied else 0)) * shadow.state_bytes
    # drawing: logits in the base's dtype and in float32, their exponentials and one temporary
    drawing = rows * config.vocab_size * (4 + 4 + 4 + 2)
    scores = 0 if copied else rows * config.num_attention_heads * (prompt + new) * 12
    folded = shadow.adapter_bytes // 2  # the adapters in the base's dtype, their scale folded in
    decoding = (0 if copied else of_prompts) + of_rows
    if not native:
        of_prompts = rows * prompt * shadow.state_bytes
    if of_prompts + reading > decoding + drawing + scores + shadow.largest_layer:
        return {"KV cache": of_prompts, "reading prompts": reading + folded}
    return {"KV cache": decoding, "drawing tokens": drawing + scores + shadow.largest_layer + folded}
