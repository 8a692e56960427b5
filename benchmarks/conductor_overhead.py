"""What the Conductor costs: the same steps with it and with equal weights.

    python -m benchmarks.conductor_overhead
    python -m benchmarks.conductor_overhead --grid   # the Conductor alone, by width, rewards, responses and labels

Two modules with the same model, adapters, prompts, seeds and forced lengths take turns in one process, each round three
steps of a ``Trainer.fit``, so that every round has one update of the Conductor. ``extra_forwards`` counts the passes of
the backbone over whole sequences that only the Conductor's side makes, ``extra_decode_calls`` those over at most one
token a row. ``overhead_pct`` is what only the Conductor's side does, timed where it is done: noting h, weighing,
remembering and updating beyond what equal weights take for it, and its extra decoding calls at the mean time of a call,
as a share of the rest of its steps. ``difference_pct`` compares whole rounds with those of equal weights (processor
time; on cuda: wall time); a percent is lost in its noise. ``conductor_share_pct`` and ``equal_share_pct`` are the
shares of weighing, remembering and updating. ``alone`` is the Conductor by itself, with five rewards, for two widths of
the policy. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.conductor_growth import grid
from benchmarks.workloads import (
    WORKLOADS,
    Laps,
    Ours,
    Seconds,
    add_arguments,
    chosen_workload,
    device_name,
    finish,
    make_ours,
    measured,
    model_folder,
    now,
    prompt_texts,
    show_table,
    spread,
)
from maestro_pl.conductor import AdvantageSignal, Decisions, MetaBuffer
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.generation.decoding import Decoding

EVERY = 3  # steps between two updates of the Conductor, the default of MaestroModule


@dataclass
class Side:
    """One of the two modules, and what was measured of it in each round."""

    ours: Ours
    seconds: list[Seconds] = field(default_factory=list)
    conducting: list[Seconds] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    calls: list[Counter[str]] = field(default_factory=list)
    decoding: list[Seconds] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._conducting = self._decoding = self._begin = Seconds()
        rollout: Any = self.ours.callbacks[0]
        self._rows = rollout.group_size * len(self.ours.steps[0]["prompt_ids"])
        base = self.ours.policy.base_model
        backbone = getattr(base, base.base_model_prefix)
        backbone.register_forward_pre_hook(self._begin_call)
        backbone.register_forward_hook(self._end_call, with_kwargs=True)
        module = self.ours.module
        for owner, name in ((module, "weigh"), (module.outer, "remember"), (module.outer, "update_if_due")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def round(self, steps: list[dict[str, Any]]) -> None:
        """Train on these steps."""
        self._calls, self._conducting, self._decoding = Counter(), Seconds(), Seconds()
        laps = Laps(self.ours.device)
        note = self._timed(Decoding._note)  # called only where a weigher reads h
        with patch.object(Decoding, "_note", lambda *args: note(*args)):
            self.ours.fit(laps, steps)
        self.seconds.append(sum(laps.seconds, Seconds()))
        self.conducting.append(self._conducting)
        self.tokens.append(sum(laps.tokens))
        self.calls.append(self._calls)
        self.decoding.append(self._decoding)

    def _timed(self, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            seconds, result = measured(self.ours.device, lambda: method(*args, **kwargs))
            self._conducting += seconds
            return result

        return timed

    def _begin_call(self, _module: Any, _args: tuple[Any, ...]) -> None:
        self._begin = now(self.ours.device)

    def _end_call(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        inputs = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        tokens = next(value for value in inputs if value is not None).shape[:2].numel()
        decoding = tokens <= self._rows  # a batch may be laid out as one flat row
        self._calls["decode" if decoding else "full"] += 1
        if decoding:
            self._decoding += now(self.ours.device) - self._begin


def alone(width: int, device: str, rewards: int = 5, rows: int = 32, times: int = 50) -> dict[str, float]:
    """The Conductor by itself: its parameters, and the milliseconds to weigh a batch and to learn from three."""
    conductor = Conductor()
    conductor.build(width, [f"reward_{k}" for k in range(rewards)])
    conductor.to(device)
    optimizer = torch.optim.AdamW(conductor.parameters(), lr=5e-5)
    h_BD, scores_BK = torch.randn(rows, width, device=device), torch.rand(rows, rewards, device=device)
    mask_BK = torch.ones(rows, rewards, dtype=torch.bool, device=device)

    def weigh() -> Any:
        with torch.no_grad():
            return conductor(h_BD, scores_BK, mask_BK, True)

    buffer, action_B = MetaBuffer(), weigh().action_B
    group_B = torch.arange(rows, device=device) // 8
    for _ in range(EVERY):
        buffer.add(Decisions(h_BD, mask_BK, action_B, torch.randn(rows, device=device), group_B, 0))

    def update() -> None:
        loss, _ = AdvantageSignal()(conductor, buffer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        conductor.constrain_()

    found: dict[str, float] = {"parameters": sum(p.numel() for p in conductor.parameters())}
    for name, action in (("weigh_ms", weigh), ("update_ms", update)):
        action()
        found[name] = round(1000 * statistics.median(measured(device, action)[0].wall for _ in range(times)), 4)
    return found


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the rounds, one side after the other."""
    workload, device = chosen_workload(options), options.device
    folder = model_folder(workload, folder / "model")
    rounds = options.warmup + options.rounds
    texts = prompt_texts(workload, folder, rounds * EVERY)
    with_conductor, equal = (
        Side(make_ours(workload, folder, texts, options.dtype, device, weigher))
        for weigher in (Conductor(), EqualWeights())
    )
    for number in range(rounds):
        steps = slice(number * EVERY, (number + 1) * EVERY)
        for side in (with_conductor, equal) if number % 2 else (equal, with_conductor):
            side.round(side.ours.steps[steps])
    return result_of(options, with_conductor, equal)


def result_of(options: argparse.Namespace, with_conductor: Side, equal: Side) -> dict[str, Any]:
    """The JSON object."""
    kept = slice(options.warmup, None)
    clock = "wall" if options.device == "cuda" else "cpu"
    pairs = list(zip(with_conductor.seconds[kept], equal.seconds[kept], strict=True))
    calls = {
        name: sum((calls for calls in side.calls[kept]), Counter())
        for name, side in (("conductor", with_conductor), ("equal", equal))
    }
    return {
        "workload": options.workload,
        "device": device_name(options.device),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "steps_per_round": EVERY,
        "tokens": {"conductor": sum(with_conductor.tokens[kept]), "equal": sum(equal.tokens[kept])},
        "backbone_calls": {name: dict(found) for name, found in calls.items()},
        "extra_forwards": calls["conductor"]["full"] - calls["equal"]["full"],
        "extra_decode_calls": calls["conductor"]["decode"] - calls["equal"]["decode"],
        "overhead_pct": spread(overheads_pct(with_conductor, equal, clock)[kept], 4),
        "difference_pct": spread([100 * (getattr(a, clock) / getattr(b, clock) - 1) for a, b in pairs]),
        "conductor_share_pct": share_pct(with_conductor, kept, clock),
        "equal_share_pct": share_pct(equal, kept, clock),
        "alone": {f"d={width}": alone(width, options.device) for width in (576, 4096)},
    }


def overheads_pct(with_conductor: Side, equal: Side, clock: str) -> list[float]:
    """What only the Conductor's side does, in percent of the rest of its step, round by round."""
    found = []
    for number, whole in enumerate(with_conductor.seconds):
        conducting = with_conductor.conducting[number] - equal.conducting[number]
        calls = with_conductor.calls[number]["decode"]
        extra = calls - equal.calls[number]["decode"]
        own = getattr(conducting, clock) + getattr(with_conductor.decoding[number], clock) * extra / calls
        found.append(100 * own / (getattr(whole, clock) - own))
    return found


def share_pct(side: Side, kept: slice, clock: str) -> dict[str, float]:
    """The share of a round that went into weighing, remembering and updating."""
    pairs = zip(side.conducting[kept], side.seconds[kept], strict=True)
    return spread([100 * getattr(part, clock) / getattr(whole, clock) for part, whole in pairs], 4)


def main(args: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, [name for name, workload in WORKLOADS.items() if workload.min_new_tokens])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--grid", action="store_true", help="how the Conductor's own cost grows, without a policy")
    options = parser.parse_args(args)
    if options.quick:
        options.warmup, options.rounds = 1, 2
    torch.set_num_threads(options.threads)
    if options.grid:
        small: dict[str, Any] = {"widths": (576,), "rewards": (2,), "rows": (16,), "windows": (32, 64), "times": 1}
        result = {"device": device_name(options.device), **grid(options.device, **(small if options.quick else {}))}
        for name in ("weigh", "fit"):
            columns = list(result[name][0])
            show_table(
                f"The Conductor's {name}, {result['device']}", columns, [list(row.values()) for row in result[name]]
            )
        finish(result, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, Path(folder))
    names = ["extra_forwards", "extra_decode_calls", "overhead_pct", "difference_pct", "conductor_share_pct"]
    names.append("equal_share_pct")
    rows = [*((name, result[name]) for name in names), *result["alone"].items()]
    show_table(f"The Conductor, {options.workload} on {result['device']}", ("what", "measured"), rows)
    finish(result, options.out)


if __name__ == "__main__":
    main()
