"""The best static weights of each family, by exhaustive search: ``python -m benchmarks.sandbox.build.search``.

For a fixed scalar reward R the KL-regularised objective E[R] - KL(p || policy) / beta has a closed-form optimum, the
policy tilted by exp(beta R). So no training is needed to rank weights: many responses of the shipped policy are scored
once, and for every weight vector on a grid over the simplex the true utility is averaged under the tilted distribution
of each prompt's responses.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.sandbox.build.scoring import REWARDS, Scored, sample_and_score
from benchmarks.sandbox.build.verify import Setting, verify
from maestro_pl.algorithm.advantages import normalize_rewards
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rewards.preference import load_pair_scorer
from maestro_pl.rollout import Normalization
from maestro_pl.sandbox import policy_path, preference_path
from maestro_pl.sandbox.utility import TASKS
from maestro_pl.sandbox.world import rows

STATIC_WEIGHTS = Path(__file__).with_name("static_weights.json")


def simplex_grid(size: int, steps: int) -> Tensor:
    """Every vector of ``size`` non-negative multiples of 1 / ``steps`` that add up to 1: (W, size)."""
    places = itertools.combinations(range(steps + size - 1), size - 1)
    counts = [[b - a - 1 for a, b in zip((-1, *bars), (*bars, steps + size - 1), strict=True)] for bars in places]
    return torch.tensor(counts, dtype=torch.float32) / steps


def tilted_utility(scalar_WNG: Tensor, utility_NG: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Expected utility under each prompt's responses tilted by exp(beta * advantage), and the KL to the uniform one.

    The advantage is the scalar reward z-scored inside the prompt's set, as in training.

    Returns:
        Utility (W, N) and KL in nats (W, N).
    """
    centred = scalar_WNG - scalar_WNG.mean(-1, keepdim=True)
    advantage = centred / (scalar_WNG.std(-1, keepdim=True) + 1e-4)
    log_p = torch.log_softmax(beta * advantage, dim=-1)
    p = log_p.exp()
    log_size = torch.log(torch.tensor(float(scalar_WNG.shape[-1])))
    return (p * utility_NG).sum(-1), (p * log_p).sum(-1) + log_size


def search(scored: Scored, normalize: Normalization, steps: int, beta: float) -> dict[str, Any]:
    """Score every weight vector of the grid for every family, and pick the best of each and of all together."""
    size, count = scored.group_size, len(scored.rows)
    applies_B = torch.ones(count * size, dtype=torch.bool)
    columns = [normalize_rewards(scored.rewards_BK[:, k], applies_B, size, normalize) for k in range(len(REWARDS))]
    rewards_NGK = torch.stack(columns, dim=1).view(count, size, len(REWARDS))
    utility_NG = scored.utility_B.view(count, size)
    grid_WK = simplex_grid(len(REWARDS), steps)
    named = {"equal": torch.full((len(REWARDS),), 1 / len(REWARDS))}
    named |= dict(zip(REWARDS, torch.eye(len(REWARDS)), strict=True))
    weights_WK = torch.cat([torch.stack(list(named.values())), grid_WK])
    utility_WN, kl_WN = tilted_utility(torch.einsum("wk,ngk->wng", weights_WK, rewards_NGK), utility_NG, beta)
    ideal_N, _ = tilted_utility(utility_NG.unsqueeze(0), utility_NG, beta)
    families: dict[str, Any] = {}
    per_task_WF = torch.stack([utility_WN[:, _prompts(scored, task)].mean(1) for task in TASKS], dim=1)
    everywhere = int(per_task_WF.mean(1).argmax())
    for f, task in enumerate(TASKS):
        best = int(per_task_WF[:, f].argmax())
        families[task] = {
            "best_weights": _weights(weights_WK[best]),
            "best": round(float(per_task_WF[best, f]), 4),
            "base": round(float(utility_NG[_prompts(scored, task)].mean()), 4),
            "one_for_all": round(float(per_task_WF[everywhere, f]), 4),
            **{name: round(float(per_task_WF[i, f]), 4) for i, name in enumerate(named)},
            "utility_itself": round(float(ideal_N[0, _prompts(scored, task)].mean()), 4),
            "kl_of_best": round(float(kl_WN[best, _prompts(scored, task)].mean()), 3),
        }
    return {
        "rewards": list(REWARDS),
        "normalize": normalize,
        "grid_step": 1 / steps,
        "vectors": len(grid_WK),
        "prompts_per_task": count // len(TASKS),
        "responses_per_prompt": size,
        "beta": beta,
        "mean_kl": round(float(kl_WN.mean()), 3),
        "one_for_all_weights": _weights(weights_WK[everywhere]),
        "tasks": families,
    }


def _prompts(scored: Scored, task: str) -> Tensor:
    return torch.tensor([row["task"] == task for row in scored.rows])


def _weights(vector_K: Tensor) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in zip(REWARDS, vector_K, strict=True)}


def print_table(result: dict[str, Any]) -> None:
    """Print utilities a family and weighing, and the weights found."""
    columns = ("base", "equal", *REWARDS, "one_for_all", "best", "utility_itself")
    print(f"{'true utility':14}" + "".join(f"{name:>15}" for name in columns))
    for task, row in result["tasks"].items():
        print(f"{task:14}" + "".join(f"{row[name]:15.3f}" for name in columns))
    for task, row in result["tasks"].items():
        print(f"best weights of {task}: {row['best_weights']} (KL {row['kl_of_best']:.2f} nats)")
    print(f"best weights for all: {result['one_for_all_weights']}; mean KL {result['mean_kl']:.2f} nats")


def main(args: list[str] | None = None) -> None:
    """Search and write the results file, or verify what is in it by training."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox.build.search", description=__doc__)
    parser.add_argument("--output", type=Path, default=STATIC_WEIGHTS)
    parser.add_argument("--prompts", type=int, default=32, help="training prompts a family")
    parser.add_argument("--responses", type=int, default=64, help="responses a prompt")
    parser.add_argument("--steps", type=int, default=10, help="the grid's step is one over this")
    parser.add_argument("--beta", type=float, default=2.0, help="strength of the tilt; 2 is a KL of 1 to 2 nats")
    parser.add_argument("--normalize", choices=get_args(Normalization), default="zscore")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verify", type=Path, metavar="DIR", help="train with the weights in the file, runs go to DIR")
    parser.add_argument("--verify-steps", type=int, default=80)
    options = parser.parse_args(args)
    if options.verify is not None:
        found = json.loads(options.output.read_text(encoding="utf-8"))
        verify(found, Setting(steps=options.verify_steps, seed=options.seed), options.verify)
        return
    policy = LoRAPolicy(str(policy_path()), dtype="float32", lora=None)
    preference = load_pair_scorer(str(preference_path()), dtype="float32", batch_size=64)
    prompts = rows("train", n_per_task=options.prompts, seed=options.seed)
    scored = sample_and_score(policy, preference, prompts, options.responses, options.seed)
    result = search(scored, options.normalize, options.steps, options.beta)
    print_table(result)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
