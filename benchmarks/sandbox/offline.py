"""What weights are worth without training: draws of labelled groups, a fitted Conductor, and the tilt of the untrained policy.

Many responses of the untrained policy are sampled once. A draw labels a few groups of them, fits a Conductor on these
labels with the package's own learners, lets it weigh held-out prompts, and takes the true utility of their responses
tilted by the weighed reward (``benchmarks.sandbox.build.search``). No policy is trained, so that hundreds of draws cost
seconds and the intervals are narrow; what training adds (a policy that moves under the Conductor) is left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import maestro_pl
from benchmarks.sandbox.build.scoring import REWARDS, SLICE, sample_and_score
from benchmarks.sandbox.build.search import simplex_grid, tilted_utility
from maestro_pl.algorithm.advantages import group_advantages, normalize_rewards
from maestro_pl.conductor import AnchorSignal, Decisions, MetaBuffer
from maestro_pl.conductor.choices import spread_rows
from maestro_pl.conductor.credits import group_covariance, zscores
from maestro_pl.conductor.meta import make_learner
from maestro_pl.policy.context import HiddenContext
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rewards.preference import load_pair_scorer
from maestro_pl.sandbox import TASKS, policy_path, preference_path, rows
from maestro_pl.sandbox.utility import UTILITY_SD

BETA = 2.0
RESPONSES = 240  # labelled responses of a draw: 30 groups of 8, or 60 of 4


@dataclass(frozen=True)
class Variant:
    """One change of the base.

    Attributes:
        name: of the variant.
        state: which hidden state: a key of :class:`World`'s ``states``.
        conductor: arguments of the Conductor.
        learner: name or learner.
        group: responses of a labelled group.
        responses: labelled responses in all.
        noise: of the anchor, in standard deviations of the utility.
        normalize: of the rewards, in what the weights are judged by.
        label: ``rating`` of each response that is shown, or the ``best`` of them, or a ``ranking``.
        shown: responses of a labelled group that the anchor is shown; 0: all.
        by: which: those that differ most (``spread``), or drawn at ``random``.
    """

    name: str
    state: str = "prompt"
    conductor: dict[str, Any] = field(default_factory=dict)
    learner: Callable[[], Any] = lambda: "ridge"
    group: int = 8
    responses: int = RESPONSES
    noise: float = 1.0
    normalize: Any = "zscore"
    label: str = "rating"
    shown: int = 0
    by: str = "spread"


class World:
    """Responses of the untrained policy to some prompts, their scores and their hidden states.

    Args:
        split: of the prompts.
        prompts: a family.
        responses: to each.
        seed: of both.
        new_templates: prompts in new wordings.
    """

    def __init__(self, split: str, prompts: int, responses: int, seed: int, new_templates: bool = False) -> None:
        self.name = f"{split}, seed {seed}, new wordings {new_templates}"
        policy = LoRAPolicy(str(policy_path()), dtype="float32", lora=None)
        preference = load_pair_scorer(str(preference_path()), dtype="float32", batch_size=64)
        drawn = rows(split, n_per_task=prompts, seed=seed, new_templates=new_templates)
        scored = sample_and_score(policy, preference, drawn, responses, seed)
        self.rewards_NGK = scored.rewards_BK.view(len(drawn), responses, len(REWARDS))
        self.utility_NG = scored.utility_B.view(len(drawn), responses)
        self.tasks = [row["task"] for row in drawn]
        self.task_N = torch.tensor([TASKS.index(task) for task in self.tasks])
        self.normal: dict[str, Tensor] = {}
        self.states = self._states(policy, scored, [row["prompt"] for row in drawn])

    @torch.no_grad()
    def _states(self, policy: LoRAPolicy, scored: Any, prompts: list[str]) -> dict[str, Tensor]:
        count, size = self.utility_NG.shape
        prompts_B = [ids for ids in scored.prompt_ids for _ in range(size)]
        states = {}
        for name, context in {
            "prompt": HiddenContext(place="prompt"),
            "prompt, layer middle": HiddenContext("middle", place="prompt"),
            "prompt, layer first": HiddenContext("first", place="prompt"),
            "terminal": HiddenContext(),
            "terminal, pool mean": HiddenContext(pool="mean"),
            "both": HiddenContext(place="both"),
        }.items():
            got = policy.token_statistics(prompts_B, scored.response_ids, context=context, max_tokens=SLICE).hidden_BD
            assert got is not None
            states[name] = got.view(count, size, -1)
        width = policy.hidden_size
        noise = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))  # other rows in training than in test
        states["noise"] = torch.randn(count, 1, width, generator=noise).expand(-1, size, -1)
        for name, texts in {"words": [p.split() for p in prompts], "task": [[task] for task in self.tasks]}.items():
            bag = torch.zeros(count, width)
            for row, words in zip(bag, texts, strict=True):
                for word in words:
                    row[zlib.crc32(word.encode()) % width] += 1.0
            states[name] = bag.unsqueeze(1).expand(-1, size, -1)
        return states

    def normalized(self, how: Any) -> Tensor:
        """The rewards normalised inside each prompt's set of responses: (N, G, K)."""
        if how not in self.normal:
            count, size, rewards = self.rewards_NGK.shape
            everywhere = torch.ones(count * size, dtype=torch.bool)
            flat_BK = self.rewards_NGK.reshape(-1, rewards)
            columns = [normalize_rewards(flat_BK[:, k], everywhere, size, how) for k in range(rewards)]
            self.normal[how] = torch.stack(columns, dim=1).view(count, size, rewards)
        return self.normal[how]

    def value(self, weights_NGK: Tensor, normalize: Any = "zscore") -> Tensor:
        """Tilted utility of each prompt under weights that may differ from response to response: (N,)."""
        scalar_NG = (weights_NGK * self.normalized(normalize)).sum(-1)
        return tilted_utility(scalar_NG.unsqueeze(0), self.utility_NG, BETA)[0][0]

    def best_static(self) -> tuple[Tensor, Tensor]:
        """The best vector of each family on these prompts, and its tilted utility: (F, K) and (F,)."""
        grid_WK = simplex_grid(len(REWARDS), 10)
        scalar = torch.einsum("wk,ngk->wng", grid_WK, self.normalized("zscore"))
        value_WN = tilted_utility(scalar, self.utility_NG, BETA)[0]
        value_WF = torch.stack([value_WN[:, self.task_N == f].mean(1) for f in range(len(TASKS))], dim=1)
        best_F = value_WF.argmax(0)
        return grid_WK[best_F], value_WF.amax(0)


def fitted(world: World, variant: Variant, draw: int, leave_out: str | None = None) -> maestro_pl.Conductor:
    """A Conductor fitted on one draw of labelled groups."""
    generator = torch.Generator().manual_seed(draw)
    torch.manual_seed(draw)
    pool = [n for n, task in enumerate(world.tasks) if task != leave_out]
    groups = variant.responses // variant.group
    chosen = torch.tensor(pool)[torch.randperm(len(pool), generator=generator)[:groups]]
    size = world.utility_NG.shape[1]
    index = torch.stack([torch.randperm(size, generator=generator)[: variant.group] for _ in chosen])
    rows_N1 = chosen.unsqueeze(1)
    h_BD = world.states[variant.state][rows_N1, index].flatten(0, 1)
    reward_BK = world.rewards_NGK[rows_N1, index].flatten(0, 1)
    mask_BK = torch.ones_like(reward_BK, dtype=torch.bool)
    utility_B = world.utility_NG[rows_N1, index].flatten()
    label_B = utility_B + variant.noise * UTILITY_SD * torch.randn(utility_B.shape, generator=generator)
    z_BK = zscores(reward_BK, mask_BK, variant.group)
    value_B, rank_BJ = labels_of(variant, label_B, z_BK, generator)
    every_BD = world.states[variant.state].flatten(0, 1)
    return taught(variant, list(REWARDS), every_BD, h_BD, z_BK, value_B, rank_BJ)


def taught(
    variant: Variant,
    names: list[str],
    every_BD: Tensor,
    h_BD: Tensor,
    z_BK: Tensor,
    value_B: Tensor,
    rank_BJ: Tensor | None,
) -> maestro_pl.Conductor:
    """A Conductor of these rewards, fitted on labelled groups.

    Args:
        variant: whose Conductor and learner; ``group`` responses are a group.
        names: K rewards.
        every_BD: states of all prompts of the run, those without labels too: its centre.
        h_BD: states of the labelled groups' responses.
        z_BK: their rewards, z-scored in the group.
        value_B: what they are worth, NaN where nothing was said.
        rank_BJ: their ranks in comparisons, or None.
    """
    made = maestro_pl.Conductor(**{"action": "soft", "norm": "center", **variant.conductor})
    made.build(h_BD.shape[1] // made.context.parts, names)
    signal, learner = AnchorSignal(), make_learner(variant.learner())
    learner.attach(made, signal)
    nothing_BK = torch.zeros(len(every_BD), len(names))
    made(every_BD, nothing_BK, torch.ones_like(nothing_BK, dtype=torch.bool), True)
    mask_BK = torch.ones_like(z_BK, dtype=torch.bool)
    made.observe_rewards(z_BK, mask_BK)
    buffer = MetaBuffer()
    count = len(z_BK)
    group_B = torch.arange(count // variant.group).repeat_interleave(variant.group)
    credit_BK = group_covariance(z_BK, mask_BK, value_B, variant.group)
    buffer.add(
        Decisions(
            h_BD, mask_BK, torch.full((count,), -1), torch.zeros(count), group_B, 0,
            credit_BK=credit_BK, value_B=value_B, z_BK=z_BK, rank_BJ=rank_BJ,
        )
    )  # fmt: skip
    learner.learn(made, signal, buffer, step=_step_of(made), batch=0)
    return made


def labels_of(
    variant: Variant, label_B: Tensor, z_BK: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Values of the responses that are shown (NaN elsewhere), or ranks in a column (-1 elsewhere)."""
    size = variant.group
    mask_B1 = torch.ones(len(label_B), 1, dtype=torch.bool)
    if not variant.shown and variant.label == "rating":
        return zscores(label_B.unsqueeze(1), mask_B1, size)[:, 0], None
    count = variant.shown or size
    shown_B = torch.zeros(len(label_B), dtype=torch.bool)
    for n in range(len(label_B) // size):
        rows = slice(n * size, (n + 1) * size)
        random = torch.randperm(size, generator=generator)[:count].tolist()
        places = spread_rows(z_BK[rows], count) if variant.by == "spread" else random
        shown_B[[n * size + place for place in places]] = True
    unknown_B = torch.full_like(label_B, torch.nan)
    if variant.label == "rating":
        centred_B = group_advantages(torch.where(shown_B, label_B, unknown_B), size, "none")
        deviation = centred_B[shown_B].square().sum().div(len(label_B) // size * (count - 1)).sqrt()
        return torch.where(shown_B, centred_B / deviation, unknown_B), None
    label_NG = torch.where(shown_B, label_B, torch.full_like(label_B, -torch.inf)).view(-1, size)
    rank_NG = label_NG.argsort(1, descending=True).argsort(1)
    rank_NG = rank_NG if variant.label == "ranking" else rank_NG.clamp(max=1)
    return unknown_B, torch.where(shown_B, rank_NG.flatten(), -1).unsqueeze(1)


def _step_of(made: maestro_pl.Conductor) -> Callable[[Tensor], Any]:
    """A step of an optimizer of the Conductor's own."""
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3) if trained else None

    def step(loss: Tensor) -> dict[str, float]:
        assert optimizer is not None  # a fit in closed form steps none
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.constrain_()
        return {}

    return step


@torch.no_grad()
def weights_of(made: maestro_pl.Conductor, world: World, state: str) -> Tensor:
    """The weights that a Conductor gives to every response: (N, G, K)."""
    h = world.states[state]
    mask_BK = torch.ones(h.shape[0] * h.shape[1], len(REWARDS), dtype=torch.bool)
    return made.probabilities(h.flatten(0, 1), mask_BK).view(h.shape[0], h.shape[1], -1)


def shares(train: World, test: World, variant: Variant, draws: int) -> list[float]:
    """For each draw, the share of the best static vectors' gain over equal weights (z-scored rewards) on the test prompts."""
    equal = torch.full_like(test.rewards_NGK, 1 / len(REWARDS))
    low, best = float(test.value(equal).mean()), float(test.best_static()[1].mean())
    found = []
    for draw in range(draws):
        made = fitted(train, variant, draw)
        value = float(test.value(weights_of(made, test, variant.state), variant.normalize).mean())
        found.append((value - low) / (best - low))
    return found


def family_shares(train: World, test: World, variant: Variant, draws: int) -> list[dict[str, float]]:
    """As :func:`shares`, with each family's share of its own gain beside the whole's, ``all``."""
    equal = torch.full_like(test.rewards_NGK, 1 / len(REWARDS))
    low_N, best_F = test.value(equal), test.best_static()[1]
    found = []
    for draw in range(draws):
        value_N = test.value(weights_of(fitted(train, variant, draw), test, variant.state), variant.normalize)
        row = {"all": float((value_N.mean() - low_N.mean()) / (best_F.mean() - low_N.mean()))}
        for f, task in enumerate(TASKS):
            low, value = low_N[test.task_N == f].mean(), value_N[test.task_N == f].mean()
            row[task] = float((value - low) / (best_F[f] - low))
        found.append(row)
    return found


def unseen_family(train: World, test: World, task: str, draws: int) -> list[float]:
    """The same on a family whose groups were never labelled, against that family's own best vector."""
    of_task = test.task_N == TASKS.index(task)
    equal = torch.full_like(test.rewards_NGK, 1 / len(REWARDS))
    low = float(test.value(equal)[of_task].mean())
    best = float(test.best_static()[1][TASKS.index(task)])
    base = Variant("base")
    return [
        (float(test.value(weights_of(fitted(train, base, d, leave_out=task), test, base.state))[of_task].mean()) - low)
        / (best - low)
        for d in range(draws)
    ]
