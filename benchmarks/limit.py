"""How far our step is from the bare sum of its parts.

    python -m benchmarks.limit
    python -m benchmarks.limit --roofline --workload {sandbox,base,long_prompt,large_vocab,smollm2}

Between two steps of a ``Trainer.fit`` run, on the same prompts, a bare decoding loop (prefill, one token of every row
at a time, logits, a draw; nothing is recorded) and one forward and backward pass over as many response tokens with
nothing else. ``ratio`` is the median step over the sum of the medians of these two, in processor time (on cuda: wall
time); ``ratio_wall`` and ``ratio_cpu`` are round by round. Lengths are forced, so that all three work on the same
number of tokens. The last line of output is one JSON object.

``--roofline`` goes further down: every stage over what this machine's matrix products and memory reach at the same shapes
(``benchmarks/roofline.py``).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import roofline
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
    mean_stages,
    measured,
    model_folder,
    prompt_texts,
    show_table,
    spread,
)
from maestro_pl.generation.cache import GroupCache
from maestro_pl.policy.adapters import folded_adapters
from maestro_pl.policy.attention import no_mask


class BareParts:
    """Decoding alone, and forward and backward alone, measured between two steps."""

    def __init__(self, ours: Ours) -> None:
        self.ours = ours
        self.rollout: Any = ours.callbacks[0]
        self.decode: list[Seconds] = []
        self.forward_backward: list[Seconds] = []
        self.tokens: list[int] = []

    def __call__(self, step: int, batch: dict[str, Any]) -> None:
        """Run both on the prompts of this step."""
        prompts = batch["prompt_ids"]
        seconds, responses = measured(self.ours.device, lambda: self._generate(prompts))
        self.decode.append(seconds)
        self.ours.policy.train()
        seconds, _ = measured(self.ours.device, lambda: self._forward_and_backward(prompts, responses))
        self.forward_backward.append(seconds)
        self.ours.policy.zero_grad()
        self.tokens.append(sum(map(len, responses)))

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        policy, limit, rows = self.ours.policy.eval(), self.rollout.sampling.max_new_tokens, self.rollout.group_size
        cache = GroupCache([len(p) for p in prompts], [i for i in range(len(prompts)) for _ in range(rows)], limit)
        cache.begin_prefill(list(range(len(prompts))))
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=policy.device)
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(policy.device)
        ends = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
        begin_B = ends.repeat_interleave(rows)
        drawn: list[torch.Tensor] = []
        with folded_adapters(policy.model):
            hidden = self._forward(cache, ids, positions)[ends.cumsum(0) - 1].repeat_interleave(rows, 0)
            cache.begin_decoding(policy.device)
            while len(drawn) < limit:
                if drawn:
                    hidden = self._forward(cache, drawn[-1], begin_B + len(drawn) - 1)
                logits = policy.scorer.logits(policy.base_model, hidden)
                drawn.append(torch.multinomial(logits.softmax(-1), 1).squeeze(1))
        responses: list[list[int]] = torch.stack(drawn, 1).tolist()
        return responses

    def _forward(self, cache: GroupCache, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        policy = self.ours.policy
        output = policy.scorer.backbone(
            policy.base_model,
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=no_mask(policy.device),
            layout=cache,
        )
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    def _forward_and_backward(self, prompts: list[list[int]], responses: list[list[int]]) -> None:
        rows = [prompt for prompt in prompts for _ in range(self.rollout.group_size)]
        self.ours.policy.token_statistics(rows, responses, temperature=1.0).logps_T.sum().backward()


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the rounds."""
    workload = chosen_workload(options)
    folder = model_folder(workload, folder / "model")
    texts = prompt_texts(workload, folder, options.warmup + options.rounds)
    ours = make_ours(workload, folder, texts, options.dtype, options.device)
    parts = BareParts(ours)
    laps = Laps(options.device, parts)
    ours.fit(laps)
    return result_of(options, laps, parts)


def result_of(options: argparse.Namespace, laps: Laps, parts: BareParts) -> dict[str, Any]:
    """The JSON object."""
    kept = slice(options.warmup, None)
    timed = {"step": laps.seconds, "decode": parts.decode, "forward_backward": parts.forward_backward}
    wall = {name: [s.wall for s in seconds[kept]] for name, seconds in timed.items()}
    cpu = {name: [s.cpu for s in seconds[kept]] for name, seconds in timed.items()}
    return {
        "workload": options.workload,
        "device": device_name(options.device),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "tokens": {"step": sum(laps.tokens[kept]), "parts": sum(parts.tokens[kept])},
        "ratio": ratio_of_medians(wall if options.device == "cuda" else cpu),
        "ratio_wall": spread(ratios(wall)),
        "ratio_cpu": spread(ratios(cpu)),
        "seconds_wall": {name: spread(values, 4) for name, values in wall.items()},
        "seconds_cpu": {name: spread(values, 4) for name, values in cpu.items()},
        "stages": mean_stages(laps.stages[kept]),
    }


def ratio_of_medians(seconds: dict[str, list[float]]) -> float:
    """The median step over the sum of the medians of its parts."""
    step, *parts = (statistics.median(values) for values in seconds.values())
    return round(step / sum(parts), 3)


def ratios(seconds: dict[str, list[float]]) -> list[float]:
    """The step over the sum of its parts, round by round."""
    return [step / sum(parts) for step, *parts in zip(*seconds.values(), strict=True)]


def main(args: list[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, [*(name for name, load in WORKLOADS.items() if load.min_new_tokens), roofline.SANDBOX.name])
    parser.add_argument("--roofline", action="store_true", help="against the machine's products and memory, by stage")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(args)
    if options.quick:
        options.warmup, options.rounds = 1, 2
    torch.set_num_threads(options.threads)
    if options.roofline:
        with tempfile.TemporaryDirectory() as folder:
            result = roofline.roofline(options, Path(folder))
        roofline.show(result)
        return finish(result, options.out)
    if options.workload == roofline.SANDBOX.name:
        parser.error("--workload sandbox is for --roofline")
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, Path(folder))
    clock = "wall" if options.device == "cuda" else "cpu"
    rows = [(name, *values.values()) for name, values in result[f"seconds_{clock}"].items()]
    rows.append(("ratio", *result[f"ratio_{clock}"].values()))
    show_table(f"{options.workload} on {result['device']}, {clock} seconds", ("part", "median", "min", "max"), rows)
    finish(result, options.out)


if __name__ == "__main__":
    main()
