"""A first config for data that was looked at: each value with the reason for it, as YAML with comments."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import yaml  # type: ignore[import-untyped]

from maestro_pl.data.survey import Kind, Lengths, Piece, Survey, as_plain

WARMUP = 3  # batches of labelled groups before the policy moves
LAST_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
SANDBOX = "sandbox"

#: How a kind of reference is named, and which tokens of reasoning it is given.
WORDS: dict[Kind, str] = {
    "choice": "one of several options",
    "number": "numbers",
    "math": "mathematics",
    "short": "short texts",
    "long": "long texts",
    "none": "none",
}
REASONING: dict[Kind, int] = {"choice": 256, "number": 448, "math": 896, "short": 256}
ANSWERS: dict[Kind, str] = {
    "choice": "the letter of the right option alone",
    "number": "the number alone",
    "math": "the result alone",
    "short": "the answer alone",
}


@dataclass
class Reading:
    """What is known of the model's tokenizer.

    Attributes:
        exact: whether tokens were counted; else they are estimated from characters.
        reason: why not.
        positions: of the model; None where that is not known.
        overhead: tokens of the chat template and the system prompt around a prompt.
        refuses_system: the chat template takes no system message.
        thinks: the chat template knows ``enable_thinking``.
        opens_think: the chat template ends the prompt with an open think block.
    """

    exact: bool = False
    reason: str = ""
    positions: int | None = None
    overhead: int = 64
    refuses_system: bool = False
    thinks: bool = False
    opens_think: bool = False


@dataclass
class Entry:
    """A reward in the config, and why it is there."""

    kind: str
    arguments: dict[str, Any]
    why: str


@dataclass
class Plan:
    """What the config says, before it is text.

    Attributes:
        system_prompt: empty for none.
        rewards, anchors: what is weighed, and what the Conductor learns from.
        max_new_tokens, max_prompt_tokens, shortest, longest: the length limits, and the budget of the length reward.
        batch_size, total: prompts a step, and training batches, the warm-up's included.
        missing: what would be better with a package that is not installed, in sentences.
    """

    system_prompt: str = ""
    rewards: list[Entry] = field(default_factory=list)
    anchors: list[Entry] = field(default_factory=list)
    max_new_tokens: int = 512
    max_prompt_tokens: int = 512
    cut: bool = False
    shortest: int = 0
    longest: int = 256
    batch_size: int = 8
    total: int = 200
    missing: list[str] = field(default_factory=list)

    @property
    def warmup(self) -> int:
        """Batches of the Conductor's warm-up."""
        return WARMUP if self.anchors else 0


def system_prompt_for(found: Survey) -> str:
    """What asks for the tags that the rewards read; empty where none read them, or the prompts ask themselves."""
    kinds = [piece.kind for piece in found.pieces if piece.kind in ANSWERS]
    if not kinds or found.tagged or found.systems > 0.5:
        return ""
    answer = ANSWERS[kinds[0]] if len(set(kinds)) == 1 and len(found.pieces) == 1 else "the answer alone"
    return f"Reason first, between <think> and </think>. Then give {answer}, between <answer> and </answer>."


def plan_for(found: Survey, lengths: Lengths, reading: Reading, system_prompt: str) -> Plan:
    """Choose rewards, anchors, limits and sizes."""
    plan = Plan(system_prompt)
    tagged = bool(system_prompt) or (found.tagged and any(piece.kind in ANSWERS for piece in found.pieces))
    _choose_lengths(plan, found, lengths, reading, tagged)
    kinds: dict[Kind, list[Piece]] = {}
    for piece in found.pieces:
        kinds.setdefault(piece.kind, []).append(piece)
    for kind, pieces in kinds.items():
        tasks = None if len(kinds) == 1 else [task for piece in pieces for task in piece.tasks]
        _choose_correct(plan, kind, tasks)
    opened = {"think_in_prompt": True} if reading.opens_think else {}
    if tagged:
        plan.rewards.append(Entry("FormatReward", opened, "one think block, then one answer block: 1, else 0"))
        scored = [kind for kind in kinds if kind in ("number", "math", "short")]
        single = [piece for kind in scored for piece in kinds[kind] if not piece.several]
        if single:
            tasks = [task for piece in single for task in piece.tasks]
            of = {} if len(single) == len(found.pieces) else {"tasks": tasks}
            plan.rewards.append(
                Entry(
                    "PerplexityReward",
                    {"score": "log", **opened, **of},
                    "how probable the reasoning makes the reference: differs between responses that are all wrong",
                )
            )
    elif "long" in kinds and not plan.anchors:
        plan.rewards.append(
            Entry("PerplexityReward", {"score": "log"}, "how probable the response makes the reference")
        )
    band = {"min": plan.shortest} if plan.shortest else {}
    why = f"tokens, inside the {plan.max_new_tokens} of rollout.max_new_tokens, so that it is felt before a response is cut"
    if plan.shortest:
        why = "tokens: between the shortest and the longest tenth of the references"
    plan.rewards.append(Entry("LengthReward", {**band, "max": plan.longest}, why))
    if not plan.anchors:
        plan.rewards.append(
            Entry("EntropyReward", {"direction": "minimize"}, "how sure the policy is; needs no reference")
        )
    train = max(1, found.counts["train"])
    plan.batch_size = min(8, train)
    steps = min(200, max(20, math.ceil(3 * train / plan.batch_size)))
    plan.total = steps + steps % 2
    return plan


def _choose_lengths(plan: Plan, found: Survey, lengths: Lengths, reading: Reading, tagged: bool) -> None:
    slack = 1.0 if reading.exact else 1.5  # an estimate may be too low
    references = lengths.references
    room = max((REASONING[piece.kind] for piece in found.pieces if tagged and piece.kind in REASONING), default=0)
    written = int(slack * lengths.at(references, 0.95))
    texts = any(piece.kind == "long" for piece in found.pieces)
    if texts:
        room = max(room, written // 2 + 32)
    plan.max_new_tokens = min(2048, _rounded(room + written)) if room else 512 if not references else 256
    longest = int(slack * (lengths.prompts[-1] if lengths.prompts else 0)) + reading.overhead
    plan.max_prompt_tokens = min(4096, _rounded(longest))
    if reading.positions is not None:
        plan.max_new_tokens = max(8, min(plan.max_new_tokens, reading.positions // 2))
        plan.max_prompt_tokens = min(plan.max_prompt_tokens, reading.positions - plan.max_new_tokens)
    plan.cut = plan.max_prompt_tokens < longest
    plan.longest = max(1, 3 * plan.max_new_tokens // 4 if references else plan.max_new_tokens // 2)
    if texts and len(found.pieces) == 1 and not tagged:
        plan.longest = max(2, min(lengths.at(references, 0.9), 9 * plan.max_new_tokens // 10))
        plan.shortest = min(lengths.at(references, 0.1), plan.longest // 2)


def _rounded(tokens: int) -> int:
    return max(64, math.ceil(tokens / 64) * 64)


def _choose_correct(plan: Plan, kind: Kind, tasks: list[str] | None) -> None:
    """What says whether a response is right by its reference: weighed, and what the Conductor learns from."""
    arguments: dict[str, Any] = {}
    if kind == "none":
        return
    if kind == "choice":
        reward, why = "ChoiceReward", "the right option, by its letter or its text"
    elif kind == "number":
        reward, why = "ExactMatchReward", "the last number of the answer equals the reference"
        arguments = {"pattern": LAST_NUMBER}
    elif kind == "math" and find_spec("math_verify"):
        reward, why = "MathReward", "equal to the reference as mathematics: 1/2 and 0.5"
    elif kind == "long":
        if not find_spec("sacrebleu"):
            plan.missing.append(
                "long references can be compared once sacrebleu is there (pip install -e '.[benchmarks]'): run init again"
            )
            return
        reward, why = "TranslationReward", "overlap with the reference (chrF), from 0 to 1"
    else:
        reward, why = "ExactMatchReward", "the answer equals the reference, or one of them"
        if kind == "math":
            plan.missing.append(
                "mathematics is compared as text: with math-verify (pip install -e '.[benchmarks]') 1/2 and 0.5 are equal"
            )
    name = "overlap" if kind == "long" else "correct"
    end, of = ("", {}) if tasks is None else (f"_{kind}", {"tasks": tasks})
    plan.rewards.append(Entry(reward, {"name": name + end, **arguments, **of}, why))
    plan.anchors.append(Entry(reward, {"name": "anchor" + end, **arguments, **of}, "the same, never weighed"))


def text_of(found: Survey, lengths: Lengths, reading: Reading, plan: Plan, model: str, out: str, command: str) -> str:
    """The config as text."""
    parts = [
        _head(found, lengths, reading, plan, out, command),
        _model(plan, model),
        _data(found, reading, plan, model),
        _rollout(plan),
        _rewards("rewards", plan.rewards, "all z-scored inside the group, so that none is heavier by its scale"),
        _rewards("anchors", plan.anchors, "what the Conductor learns from; evaluations report it")
        if plan.anchors
        else [],
        _trainer(found, plan),
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(found: Survey, lengths: Lengths, reading: Reading, plan: Plan, out: str, command: str) -> list[str]:
    unit = "tokens" if reading.exact else "tokens, estimated from characters"
    lines = [f"Written by: {command}"]
    for piece in found.pieces:
        lines.append(describe(piece))
    longest = lengths.prompts[-1] if lengths.prompts else 0
    half, most = lengths.at(lengths.references, 0.5), lengths.at(lengths.references, 1.0)
    lines.append(
        f"Prompts of up to {longest} {unit}"
        + (f"; references of {half} at the median, up to {most}." if lengths.references else ".")
    )
    if not reading.exact:
        lines.append(f"The tokenizer could not be loaded ({reading.reason}): run init again where it can.")
    lines += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in plan.missing]
    lines.append("Next: " + "; ".join(next_commands(out)))
    return [f"# {' '.join(line.split())}" for line in lines]


def describe(piece: Piece) -> str:
    """What a piece of the data is, in a line."""
    rows = piece.all_rows
    where = f" where {', '.join(f'{k} is {v!r}' for k, v in piece.source.where.items())}" if piece.source.where else ""
    guess = piece.guess
    prompt = f"prompt: {guess.prompt}" + (", conversations" if guess.chat else "") if guess else "prompts of its own"
    kind = WORDS[piece.kind] + (", several accepted" if piece.several else "")
    reference = f"reference: {guess.reference}, {kind}" if guess and piece.kind != "none" else f"reference: {kind}"
    return f"{len(rows)} rows{where}; {prompt}; {reference}."


def next_commands(out: str) -> list[str]:
    """What to run next."""
    return [f"maestro-pl rewards --config {out}", f"maestro-pl fit --config {out}"]


def _model(plan: Plan, model: str) -> list[str]:
    lines = ["model:", "  policy:", f"    model: {flow(model)}"]
    if model == SANDBOX:
        lines.append("    dtype: float32 # the embedded policy is tiny")
    if plan.anchors:
        lines += [
            "  # The Conductor learns from the anchors which rewards go along with being right, and weighs by that.",
            "  weigher: { class_path: maestro_pl.Conductor, init_args: { action: soft, context: prompt, norm: center } }",
            f"  meta: {{ signal: maestro_pl.AnchorSignal, learner: ridge, every: 1, warmup: {WARMUP} }} # "
            f"{WARMUP} batches before the policy moves",
            "  anchoring: { fraction: 1.0 } # of the groups: a reference costs nothing; for a judge or people take 0.0625",
        ]
    else:
        lines += [
            "  # Equal weights: no reference, judge or label says here which reward to trust, and weights that are learned",
            "  # without one are no better than random. With `anchors`, leave the weigher out: a Conductor learns from them.",
            "  weigher: maestro_pl.EqualWeights",
        ]
    rate = "1.0e-3" if model == SANDBOX else "5.0e-5"
    lines.append(
        f"  optimizer: {{ class_path: torch.optim.AdamW, init_args: {{ lr: {rate}, weight_decay: 0.0 }} }} # of adapters; "
        "lower it if rewards fall"
    )
    return lines


def _data(found: Survey, reading: Reading, plan: Plan, model: str) -> list[str]:
    lines = ["data:", "  sources:"]
    if found.apart is not None:
        lines[1] += f" # one for each {found.apart!r}, because their rows differ in kind"
    for piece in found.pieces:
        keys = [f"{key}: {flow(value)}" for key, value in as_plain(piece.source).items()]
        lines += [f"    {'- ' if place == 0 else '  '}{key}" for place, key in enumerate(keys)]
    counts = ", ".join(f"{count} {split}" for split, count in found.counts.items())
    if found.fractions is not None:
        lines.append(f"  fractions: {flow(found.fractions)} # train, validation, test: {counts}")
        if found.split_seed:
            lines.append(f"  split_seed: {found.split_seed} # with which none of them is empty")
    else:
        by = next((piece.by for piece in found.pieces if piece.by), "not at all: too few prompts")
        lines.append(f"  # divided {by}: {counts}")
    lines.append(f"  batch_size: {plan.batch_size} # prompts a step")
    if found.counts["validation"]:
        lines += [
            "  eval_batch_size: 16",
            f"  eval_limit: {min(100, found.counts['validation'])} # validation prompts of each task, at most",
        ]
    if plan.system_prompt:
        lines += ["  # asks for the tags that the rewards below read", f"  system_prompt: {flow(plan.system_prompt)}"]
        if reading.refuses_system:
            lines.append("  system_role: user # the chat template takes no system message")
    if reading.thinks:
        lines.append("  chat_template_kwargs: { enable_thinking: false } # max_new_tokens is for the answer")
    room = (
        "what the longest needs"
        if not plan.cut
        else "the most that leaves room; longer prompts are left out, and counted"
    )
    lines += [f"  max_prompt_tokens: {plan.max_prompt_tokens} # {room}", "  overlong: drop"]
    return lines


def _rollout(plan: Plan) -> list[str]:
    return [
        "rollout:",
        "  group_size: 8 # responses to a prompt, which are compared with each other",
        f"  max_new_tokens: {plan.max_new_tokens}",
        "  eval_group_size: 1 # one answer a prompt, the most probable one",
        "  eval_temperature: 0.0",
    ]


def _rewards(key: str, entries: Sequence[Entry], why: str) -> list[str]:
    lines = [f"{key}: # {why}"]
    for entry in entries:
        arguments = dict(entry.arguments) | ({"normalize": "zscore"} if key == "rewards" else {})
        lines += [
            f"  # {entry.why}",
            f"  - {{ class_path: callbacks.{entry.kind}, init_args: {flow(arguments)} }}",
        ]
    return lines


def _trainer(found: Survey, plan: Plan) -> list[str]:
    steps = plan.total - plan.warmup
    passes = plan.total * plan.batch_size / max(1, found.counts["train"])
    lines = ["trainer:", f"  max_steps: {steps} # about {passes:.3g} times through the training prompts"]
    if not found.counts["validation"]:
        lines.append("  # no validation prompts, so nothing is evaluated before and after")
        return lines
    parts = 2 if plan.total >= 100 else 1
    counted = f"{plan.warmup} of warm-up and {steps} steps" if plan.warmup else f"{steps} steps"
    lines += [
        "  num_sanity_val_steps: -1 # evaluate before",
        f"  val_check_interval: {plan.total // parts} # and after: batches, {counted}"
        + (", once between" if parts == 2 else ""),
    ]
    return lines


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{flow(key)}: {flow(inner)}' for key, inner in value.items())} }}" if value else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(flow, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_./~][\w./~ -]*\w|[A-Za-z_]", value) and yaml.safe_load(value) == value:
        return value
    if "\\" in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted)
