"""What becomes of each tensor of the base when a run is merged into it, or why PEFT has to do it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from maestro_pl.errors import UserError
from maestro_pl.export.base import Base
from maestro_pl.policy.loading import ADAPTER, LoRA, changes_base

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRAUpdate:
    """W + scale * B A, where A is (r, in) and B is (out, r)."""

    a: Tensor
    b: Tensor
    scale: float

    def __call__(self, weight: Tensor) -> Tensor:
        """The merged weight in float32."""
        return weight.float() + (self.b.float() @ self.a.float()) * self.scale


@dataclass(frozen=True)
class Replacement:
    """A parameter that was itself trained."""

    trained: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """The trained parameter in float32."""
        return self.trained.float()


Edit: TypeAlias = LoRAUpdate | Replacement


@dataclass
class Plan:
    """How the files of a base become those of the trained model.

    Attributes:
        edits: name of a written tensor to what changes it; the others are copied.
        copies: name of a written tensor that the base's files lack to the one that it starts from: two tied weights
            part.
        dropped: names in the base's files that repeat a tied weight which was trained.
        unties: input and output embeddings are no longer one tensor.
        reason: why PEFT or transformers must merge in memory; None where it goes tensor by tensor.
    """

    edits: dict[str, Edit] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    unties: bool = False
    reason: str | None = None

    def sources(self, base: Base) -> dict[str, str]:
        """Name of every tensor that is written to the one in the base's files that it starts from."""
        return {name: name for name in base.stored if name not in self.dropped} | self.copies


def check_fits(skeleton: Any, lora: LoRA | None, state: dict[str, Tensor], base: Base) -> None:
    """Refuse parameters that are not those of this base and these adapters.

    Raises:
        UserError: naming the first that differs.
    """
    wanted = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if p.requires_grad}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    what = "trained parameters" if lora is None else "adapters"
    advice = "Give --base with the model that the run was trained on."
    for name in sorted(wanted.keys() & given.keys()):
        if wanted[name] != given[name]:
            raise UserError(
                f"The {what} do not fit the base {base.name}: {name} has the shape {given[name]} in the checkpoint and "
                f"{wanted[name]} here. {advice}"
            )
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        example = f"it lacks {missing[0]}" if missing else f"it has {unknown[0]}, which the base has no place for"
        raise UserError(
            f"The {what} of the checkpoint do not fit the base {base.name}: {len(missing)} are missing and {len(unknown)} "
            f"unknown ({example}). {advice}"
        )


def make_plan(base: Base, skeleton: Any, lora: LoRA | None, state: dict[str, Tensor]) -> Plan:
    """Decide tensor by tensor, where that is possible.

    Args:
        base: where the run is merged into.
        skeleton: the base and its adapters without weights.
        lora: the adapters, or None where the whole model was trained.
        state: the trained parameters.
    """
    if not base.stored:
        return Plan(reason="the base has no safetensors files")
    if any(stored.dtype is None for stored in base.stored.values()):
        return Plan(reason="the base's files hold a dtype that is copied by transformers only")
    groups = _tied_groups(skeleton if lora is None else skeleton.get_base_model())
    plan = Plan()
    if lora is None:
        for name, trained in state.items():
            _replace(plan, base, groups.get(name, [name]), name, trained)
        return plan
    plan.reason = _more_than_plain(skeleton, lora, state)
    if plan.reason is not None:
        return plan
    for key, (layer, update) in _updates(skeleton, state).items():
        if not isinstance(layer, nn.Linear):
            return Plan(reason=f"{key} belongs to a {type(layer).__name__} and not to a linear layer")
        _update(plan, base, groups.get(key, [key]), key, update)
    return plan


def _more_than_plain(skeleton: Any, lora: LoRA, state: dict[str, Tensor]) -> str | None:
    """Why B A is not all that was trained."""
    from peft.tuners.lora import LoraLayer

    if (init := changes_base(lora)) is not None:
        return f"the adapters were initialised by {init}, which changes the base's weights"
    layers = [module for module in skeleton.modules() if isinstance(module, LoraLayer)]
    if any(layer.lora_variant for layer in layers):
        return "the adapters are " + ("DoRA" if lora.use_dora else "a variant of LoRA")
    if any(len(layer.lora_embedding_A) for layer in layers):
        return "adapters stand on embeddings"
    if any(getattr(layer, "fan_in_fan_out", False) for layer in layers):
        return "the base's weights are transposed (fan_in_fan_out)"
    if any(any(layer.lora_bias.values()) for layer in layers):
        return "the adapters have biases"
    plain = {f"{kind}.{ADAPTER}.weight" for kind in ("lora_A", "lora_B")}
    other = sorted(name for name in state if not any(name.endswith(f".{end}") for end in plain))
    return f"{other[0]} was trained beside plain adapters" if other else None


def _updates(skeleton: Any, state: dict[str, Tensor]) -> dict[str, tuple[nn.Module, LoRAUpdate]]:
    """Name of each adapted weight in the base to its layer and its update."""
    from peft.tuners.lora import LoraLayer

    updates = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer):
            factors = [state[f"{name}.{kind}.{ADAPTER}.weight"] for kind in ("lora_A", "lora_B")]
            key = f"{name.removeprefix(PEFT_PREFIX)}.weight"
            updates[key] = (module.get_base_layer(), LoRAUpdate(factors[0], factors[1], float(module.scaling[ADAPTER])))
    return updates


def _tied_groups(model: Any) -> dict[str, list[str]]:
    """Name of each tied parameter to all the names that are one tensor with it, the one it is tied to first."""
    groups: dict[str, list[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        groups.setdefault(source, [source]).append(target)
    return {name: names for names in groups.values() for name in names}


def _update(plan: Plan, base: Base, group: list[str], name: str, update: LoRAUpdate) -> None:
    """Change one weight; those that were tied to it stay what they were, under their own names."""
    source = name if name in base.stored else next((other for other in group if other in base.stored), None)
    if source is None or not _fits(base, source, (update.b.shape[0], update.a.shape[1])):
        plan.reason = f"{name} does not stand under this name in the base's files"
        return
    plan.edits[name] = update
    if len(group) > 1:
        plan.unties = True
        plan.copies |= {other: source for other in group if other not in base.stored}


def _replace(plan: Plan, base: Base, group: list[str], name: str, trained: Tensor) -> None:
    """Write the trained parameter once, under the name that the base's files have for it."""
    present = [other for other in dict.fromkeys((name, *group)) if other in base.stored]
    if not present or not _fits(base, present[0], tuple(trained.shape)):
        plan.reason = f"{name} does not stand under this name in the base's files"
        return
    plan.edits[present[0]] = Replacement(trained)
    plan.dropped |= set(present[1:])


def _fits(base: Base, name: str, shape: tuple[int, ...]) -> bool:
    stored = base.stored[name]
    return stored.shape == shape and stored.dtype is not None and stored.dtype.is_floating_point
