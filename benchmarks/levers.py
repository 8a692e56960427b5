"""What each lever of speed gives: our step without it, over our step with all of them.

    python -m benchmarks.levers --workload long_prompt

Decoding and one forward and backward pass on the same prompts, once with everything and once without each lever, in
turn, in one process. ``cost_decode`` and ``cost_update`` are ratios of processor time (on cuda: wall time) without the
lever to that with all, round by round; above 1 the lever pays. The last line of output is one JSON object.

- ``native``: transformers' ``generate`` and the scoring pass that it needs, in place of our loop;
- ``packing``: prompts repeated and rows padded, in the update (and so also ``generate``);
- ``head``: the logits of all response tokens at once, from the model itself;
- ``folding``: PEFT's forward of the adapters while decoding;
- ``copied`` and ``apart``: the keys of prompts copied to every row from the start, or never;
- ``leaving``: finished rows stay in the decoding batch (counts where lengths differ);
- ``growing`` and ``compiled``: a static cache in place of the growing one, and its steps compiled.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.workloads import (
    Ours,
    add_arguments,
    chosen_workload,
    device_name,
    finish,
    make_ours,
    measured,
    model_folder,
    prompt_texts,
    show_table,
    spread,
)
from maestro_pl.generation import HFEngine, NativeEngine
from maestro_pl.generation.cache import GroupCache
from maestro_pl.generation.decoding import Decoding
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.scoring import Abilities, evaluating

Way = Callable[["Steps"], Any]


class Steps:
    """Decoding and updating on one batch after the other."""

    def __init__(self, ours: Ours) -> None:
        self.policy: LoRAPolicy = ours.policy
        self.rollout: Any = ours.callbacks[0]
        self.device = ours.device
        self.autocast = ours.precision == "bf16-mixed"

    def run(self, prompts: list[list[int]]) -> dict[str, float]:
        """Seconds for each token of decoding, with what a Conductor wants of it, and of forward and backward."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            decode, responses = measured(self.device, lambda: self._decode(prompts))
            self.policy.train()
            update, _ = measured(self.device, lambda: self._update(prompts, responses))
        self.policy.zero_grad()
        clock = "wall" if self.device == "cuda" else "cpu"
        tokens = sum(map(len, responses))
        return {"decode": getattr(decode, clock) / tokens, "update": getattr(update, clock) / tokens}

    @torch.no_grad()
    def _decode(self, prompts: list[list[int]]) -> list[list[int]]:
        group, context = self.rollout.group_size, HiddenContext()
        found = self.rollout.engine.generate(self.policy, prompts, group, self.rollout.sampling, None, context)
        if found.logps_T is None:
            rows = [prompt for prompt in prompts for _ in range(group)]
            with evaluating(self.policy):
                self.policy.token_statistics(rows, found.response_ids, entropy=True, context=context)
        responses: list[list[int]] = found.response_ids
        return responses

    def _update(self, prompts: list[list[int]], responses: list[list[int]]) -> None:
        rows = [prompt for prompt in prompts for _ in range(self.rollout.group_size)]
        self.policy.token_statistics(rows, responses).logps_T.sum().backward()


def copying(limit: int) -> Any:
    """Prompts are copied to rows below this many tokens."""
    original = GroupCache.__init__
    return patch.object(GroupCache, "__init__", lambda self, *args: original(self, *args, copy_below=limit))


@contextmanager
def abilities(steps: Steps, packs: bool, plain_head: bool) -> Iterator[None]:
    """The policy's scorer with these abilities."""
    steps.policy.packs  # noqa: B018 (tried out first)
    with patch.object(steps.policy.scorer, "_abilities", Abilities(packs, plain_head)):
        yield


def staying() -> Any:
    """Finished rows are never taken out of the batch before all have finished."""
    return patch.object(Decoding, "leave_at", 1.0)


_compiling = NativeEngine(cache="static", compile=True)  # one, since it keeps what it has compiled


WAYS: dict[str, Way] = {
    "all": lambda steps: nullcontext(),
    "native": lambda steps: patch.object(steps.rollout, "engine", HFEngine()),
    "packing": lambda steps: abilities(steps, False, True),
    "head": lambda steps: abilities(steps, False, False),
    "folding": lambda steps: patch("maestro_pl.generation.native.folded_adapters", lambda model: nullcontext()),
    "copied": lambda steps: copying(10**9),
    "apart": lambda steps: copying(0),
    "leaving": lambda steps: staying(),
    "growing": lambda steps: patch.object(steps.rollout, "engine", NativeEngine(cache="static")),
    "compiled": lambda steps: patch.object(steps.rollout, "engine", _compiling),
}


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the rounds."""
    workload = chosen_workload(options)
    folder = model_folder(workload, folder / "model")
    rounds = options.warmup + options.rounds
    ours = make_ours(workload, folder, prompt_texts(workload, folder, rounds), options.dtype, options.device)
    ours.module.to(options.device)
    steps = Steps(ours)
    names = [name for name in WAYS if name in (*options.levers, "all")]
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            with WAYS[name](steps):
                seconds[name].append(steps.run(ours.steps[number]["prompt_ids"]))
    kept = {name: found[options.warmup :] for name, found in seconds.items()}
    result: dict[str, Any] = {
        "workload": options.workload,
        "device": device_name(options.device),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "ms_per_token": {
            part: round(1e3 * statistics.median(s[part] for s in kept["all"]), 4) for part in kept["all"][0]
        },
    }
    for part in ("decode", "update"):
        result[f"cost_{part}"] = {
            name: spread([a[part] / b[part] for a, b in zip(found, kept["all"], strict=True)])
            for name, found in kept.items()
            if name != "all"
        }
    return result


def main(args: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16, either with +autocast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--levers", nargs="+", choices=list(WAYS), default=list(WAYS))
    options = parser.parse_args(args)
    if options.quick:
        options.warmup, options.rounds = 1, 2
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, Path(folder))
    rows = [
        (name, *("{median} ({min} to {max})".format(**result[part][name]) for part in ("cost_decode", "cost_update")))
        for name in result["cost_decode"]
    ]
    show_table(f"{options.workload}: time without the lever / with all", ("lever", "decode", "update"), rows)
    finish(result, options.out)


if __name__ == "__main__":
    main()
