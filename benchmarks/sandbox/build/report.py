"""What the sandbox is like before any training: ``python -m benchmarks.sandbox.build.report``."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.sandbox.build.preference import liking
from benchmarks.sandbox.build.scoring import MAX_NEW_TOKENS, REWARDS, SLICE, Scored, sample_and_score
from maestro_pl.algorithm.advantages import normalize_rewards
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rewards.preference import PairScorer, load_pair_scorer
from maestro_pl.sandbox import policy_path, preference_path
from maestro_pl.sandbox.utility import TASKS
from maestro_pl.sandbox.world import rows


@dataclass
class Models:
    """The shipped policy and preference model, in float32."""

    policy: LoRAPolicy
    preference: PairScorer


def load_models() -> Models:
    """Load the shipped models without adapters."""
    return Models(
        LoRAPolicy(str(policy_path()), dtype="float32", lora=None),
        load_pair_scorer(str(preference_path()), dtype="float32", batch_size=64),
    )


def family_numbers(scored: Scored) -> dict[str, dict[str, Any]]:
    """Utility, format, spread, length and the correlation of each reward with the utility inside groups, per family."""
    size = scored.group_size
    applies_B = torch.ones(len(scored.utility_B), dtype=torch.bool)
    z_utility_B = normalize_rewards(scored.utility_B, applies_B, size, "zscore")
    z_BK = torch.stack(
        [normalize_rewards(scored.rewards_BK[:, k], applies_B, size, "zscore") for k in range(len(REWARDS))], dim=1
    )
    table: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        of_task = scored.of(task)
        groups_NG = scored.utility_B[of_task].view(-1, size)
        products_BK = z_BK[of_task] * z_utility_B[of_task].unsqueeze(1)
        table[task] = {
            "utility": float(groups_NG.mean()),
            "best_in_group": float(groups_NG.amax(1).mean()),
            "best_seen": float(groups_NG.max()),
            "format": float(scored.rewards_BK[of_task, 0].mean()),
            "spread": float((groups_NG.amax(1) > groups_NG.amin(1)).float().mean()),
            "length": float(scored.lengths_B[of_task].float().mean()),
            "truncated": float((scored.lengths_B[of_task] == MAX_NEW_TOKENS).float().mean()),
            # sample z-scores: their products over G - 1 are correlations
            "correlation": dict(zip(REWARDS, (products_BK.mean(0) * size / (size - 1)).tolist(), strict=True)),
        }
    return table


def probe_accuracy(hidden_BD: Tensor, labels_B: Tensor, groups_B: Tensor, ridge: float = 1e-2) -> float:
    """Accuracy of a ridge classifier on one-hot labels, fitted on the even groups and tested on the odd ones."""
    fit_B = groups_B % 2 == 0
    centred_BD = (hidden_BD - hidden_BD[fit_B].mean(0)) / (hidden_BD[fit_B].std(0) + 1e-6)
    inputs_BD = torch.cat([centred_BD, torch.ones(len(centred_BD), 1)], dim=1)
    targets = torch.nn.functional.one_hot(labels_B).float()
    gram = inputs_BD[fit_B].T @ inputs_BD[fit_B] + ridge * fit_B.sum() * torch.eye(inputs_BD.shape[1])
    weights = torch.linalg.solve(gram, inputs_BD[fit_B].T @ targets[fit_B])
    guess_B = (inputs_BD[~fit_B] @ weights).argmax(1)
    return float((guess_B == labels_B[~fit_B]).float().mean())


@torch.no_grad()
def probes(policy: LoRAPolicy, scored: Scored) -> dict[str, float]:
    """Probe accuracy of the task at the last response token and at the prompt's last token, last layer."""
    size = scored.group_size
    prompts_B = [prompt for prompt in scored.prompt_ids for _ in range(size)]
    last = HiddenContext(layer="last", pool="last")
    labels_N = torch.tensor([TASKS.index(row["task"]) for row in scored.rows])
    # groups in blocks of one prompt a task, so that both halves of the split hold every task
    groups_N = torch.arange(len(scored.rows)) // len(TASKS)
    terminal = policy.token_statistics(prompts_B, scored.response_ids, context=last, max_tokens=SLICE)
    starts, ends = [p[:-1] for p in scored.prompt_ids], [p[-1:] for p in scored.prompt_ids]
    prompt = policy.token_statistics(starts, ends, context=last)
    labels_B, groups_B = labels_N.repeat_interleave(size), groups_N.repeat_interleave(size)
    return {
        "terminal": probe_accuracy(cast(Tensor, terminal.hidden_BD), labels_B, groups_B),
        "prompt": probe_accuracy(cast(Tensor, prompt.hidden_BD), labels_N, groups_N),
    }


def report(prompts: int = 32, seed: int = 0) -> dict[str, Any]:
    """All numbers of the report, on validation prompts and groups of 8."""
    models = load_models()
    scored = sample_and_score(
        models.policy, models.preference, rows("validation", n_per_task=prompts, seed=seed), 8, seed
    )
    liked_B = torch.tensor([liking(text) for text in scored.responses])
    pair = torch.stack([liked_B, scored.rewards_BK[:, REWARDS.index("preference")]])
    return {
        "parameters": sum(p.numel() for p in models.policy.model.parameters()),
        "preference_parameters": sum(p.numel() for p in models.preference.model.parameters()),
        "families": family_numbers(scored),
        "probe": probes(models.policy, scored),
        "preference_correlation_with_liking": float(torch.corrcoef(pair)[0, 1]),
        "preference_correlation_with_length": float(
            torch.corrcoef(torch.stack([pair[1], scored.lengths_B.float()]))[0, 1]
        ),
    }


def print_report(numbers: dict[str, Any]) -> None:
    """Print the numbers as tables."""
    keys = ("utility", "best_in_group", "best_seen", "format", "spread", "length", "truncated")
    print(f"policy {numbers['parameters']:,} parameters, preference model {numbers['preference_parameters']:,}\n")
    print(f"{'family':12}" + "".join(f"{key:>15}" for key in keys))
    for task, row in numbers["families"].items():
        print(f"{task:12}" + "".join(f"{row[key]:15.2f}" for key in keys))
    print("\ncorrelation of each reward with the true utility inside a group")
    print(f"{'family':12}" + "".join(f"{name:>15}" for name in REWARDS))
    for task, row in numbers["families"].items():
        print(f"{task:12}" + "".join(f"{row['correlation'][name]:15.2f}" for name in REWARDS))
    probe = numbers["probe"]
    print(
        f"\nlinear probe of the task: terminal state {probe['terminal']:.3f}, prompt's last state {probe['prompt']:.3f}"
    )
    print(
        f"preference model: correlation {numbers['preference_correlation_with_liking']:.2f} with what it was taught to like, "
        f"{numbers['preference_correlation_with_length']:.2f} with the length"
    )


def main(args: list[str] | None = None) -> None:
    """Print the report, or one JSON object with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox.build.report", description=__doc__)
    parser.add_argument("--prompts", type=int, default=32, help="validation prompts a family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(args)
    numbers = report(options.prompts, options.seed)
    if options.json:
        print(json.dumps(numbers))
    else:
        print_report(numbers)


if __name__ == "__main__":
    main()
