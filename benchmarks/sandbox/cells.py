"""One training run in the sandbox, as a plain description, and what came of it as plain numbers."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
import zlib
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import lightning as L
import torch

import maestro_pl
from benchmarks.sandbox.build.scoring import MAX_TOKENS, MIN_TOKENS, REWARDS
from callbacks import (
    BestOfAnchor,
    EntropyReward,
    FormatReward,
    FunctionReward,
    LengthReward,
    PeopleAnchor,
    PerplexityReward,
    PreferenceReward,
    Reward,
)
from callbacks.rollout import RolloutGenerator
from maestro_pl.data.sources import Source
from maestro_pl.rollout import Rollout
from maestro_pl.sandbox import TASKS

Weights = dict[str, dict[str, float]]  # task to reward to weight
#: Test prompts in wordings that no policy was brought up with, of which a family's evaluation splits have about thirty.
NEW_WORDINGS = {"new_templates": True, "n_per_task": 24}


@dataclass(frozen=True)
class Protocol:
    """What all runs of an experiment share; fixed before the first run.

    Attributes:
        steps: policy steps.
        batch: prompts a step.
        group: responses a prompt.
        lr: of AdamW on the adapters.
        kl_coef: of the KL term in the loss.
        eval_prompts: test prompts a family.
        eval_group: responses to each of them.
    """

    steps: int = 60
    batch: int = 8
    group: int = 8
    lr: float = 1e-3
    kl_coef: float = 0.05
    eval_prompts: int = 64
    eval_group: int = 4

    @property
    def groups(self) -> int:
        """Groups that a run samples for its policy steps."""
        return self.steps * self.batch


@dataclass(frozen=True)
class Cell:
    """One run: a method, a seed and what differs from the protocol.

    Attributes:
        name: of the method.
        seed: of everything that is drawn.
        protocol: see :class:`Protocol`.
        weigher: ``equal``, ``random``, ``static`` (with ``weights``) or ``conductor`` (with ``conductor``).
        weights: of ``static``: one vector a task, or one under the key ``all``.
        conductor: arguments of the Conductor.
        signal: ``advantage``, ``anchor`` or ``lookahead``.
        signal_args: its arguments.
        learner: name of the learner.
        learner_args: its arguments.
        labels: labelled groups as a share of ``protocol.groups``, warm-up included; None: no anchor.
        anchor: ``ratings``: the anchor scores each response; ``choices``: it names the best of those that it is shown;
            ``people``: it reads the file of labels ``people``.
        people: see ``anchor``.
        labelled_tasks: families that the anchor knows; the others are trained without a label.
        rewards: ``five``, or ``against``: two that want what no family wants, few words and few different ones.
        warmup: batches of the warm-up, whose groups are all labelled.
        noise: of the anchor, in standard deviations of the utility.
        normalize: of the rewards.
        module: further arguments of the module.
        tasks: families of the training prompts.
        hidden: what the Conductor reads in place of h: its ``own`` h, ``noise``, the prompt's ``words``, or the
            ``task``.
        new_templates: test on prompts worded in new ways too.
    """

    name: str
    seed: int
    protocol: Protocol = Protocol()
    weigher: str = "equal"
    weights: Weights = field(default_factory=dict)
    conductor: dict[str, Any] = field(default_factory=dict)
    signal: str = "advantage"
    signal_args: dict[str, Any] = field(default_factory=dict)
    learner: str = "reinforce"
    learner_args: dict[str, Any] = field(default_factory=dict)
    labels: float | None = None
    anchor: str = "ratings"
    people: str = ""
    labelled_tasks: tuple[str, ...] = TASKS
    rewards: str = "five"
    warmup: int = 0
    noise: float = 0.0
    normalize: str = "zscore"
    module: dict[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = TASKS
    hidden: str = "own"
    new_templates: bool = False

    @property
    def key(self) -> str:
        """Unique in an experiment."""
        return f"{self.name}/{self.seed}"

    def with_seed(self, seed: int) -> Cell:
        """The same with another seed."""
        return replace(self, seed=seed)


def rewards_of(cell: Cell) -> list[Reward]:
    """The five rewards, once, or once a task where each task has static weights of its own; and the anchor."""
    made: list[Reward] = []
    if cell.rewards == "against":
        made = [FunctionReward(wanted, name=wanted.__name__, normalize=cell.normalize) for wanted in (brief, plain)]
        return [*made, *_judges(cell)]
    split = cell.weigher == "static" and "all" not in cell.weights
    for task in cell.weights if split else [None]:
        common: dict[str, Any] = {"normalize": cell.normalize}
        for name, kind, args in (
            ("format", FormatReward, {}),
            ("length", LengthReward, {"min": MIN_TOKENS, "max": MAX_TOKENS}),
            ("entropy", EntropyReward, {"direction": "maximize"}),
            ("perplexity", PerplexityReward, {"score": "log"}),
            ("preference", PreferenceReward, {"model": "sandbox", "dtype": "float32", "batch_size": 64}),
        ):
            own = {"name": f"{name}.{task}", "tasks": [task]} if task else {}
            made.append(kind(**args, **common, **own))
    return [*made, *_judges(cell)]


def brief(completion: str) -> float:
    """The fewer words, the better."""
    return -float(len(completion.split()))


def plain(completion: str) -> float:
    """The fewer different words, the better."""
    return -float(len(set(completion.split())))


def _judges(cell: Cell) -> list[Reward]:
    """The true utility, which is only reported, and the anchor."""
    made: list[Reward] = [FunctionReward("maestro_pl.sandbox.true_utility", name="utility", role="metric")]
    if cell.labels is None:
        return made
    noise, tasks = {"noise": cell.noise, "seed": cell.seed}, list(cell.labelled_tasks)
    if cell.anchor == "choices":
        made.append(BestOfAnchor("maestro_pl.sandbox.simulated_choice", name="anchor", kwargs=noise, tasks=tasks))
    elif cell.anchor == "people":
        made.append(PeopleAnchor(cell.people, name="anchor", tasks=tasks))
    else:
        function = "maestro_pl.sandbox.noisy_utility"
        made.append(FunctionReward(function, name="anchor", role="anchor", kwargs=noise, tasks=tasks))
    return made


def weigher_of(cell: Cell) -> Any:
    """The weigher that the cell describes."""
    if cell.weigher == "equal":
        return maestro_pl.EqualWeights()
    if cell.weigher == "random":
        return maestro_pl.RandomWeights()
    if cell.weigher == "static":
        if "all" in cell.weights:
            return maestro_pl.FixedWeights(cell.weights["all"])
        return maestro_pl.FixedWeights({f"{r}.{t}": w for t, row in cell.weights.items() for r, w in row.items()})
    return maestro_pl.Conductor(**cell.conductor)


def module_of(cell: Cell) -> maestro_pl.MaestroModule:
    """The module of a cell; labels of the warm-up count in its share of labels."""
    signals = {
        "advantage": maestro_pl.AdvantageSignal,
        "anchor": maestro_pl.AnchorSignal,
        "lookahead": maestro_pl.LookaheadSignal,
    }
    learners = {
        "reinforce": maestro_pl.ReinforceLearner,
        "gradient": maestro_pl.GradientLearner,
        "ridge": maestro_pl.RidgeLearner,
    }
    protocol, groups = cell.protocol, cell.module
    anchoring = dict(groups.get("anchoring", {}))
    if cell.labels is not None:
        left = cell.labels * protocol.groups - cell.warmup * protocol.batch
        anchoring |= {"fraction": max(left, 1.0) / protocol.groups, "seed": cell.seed}
    meta = dict(groups.get("meta", {}))
    rate = meta.pop("lr", 3e-3)
    return maestro_pl.MaestroModule(
        maestro_pl.LoRAPolicy("sandbox", dtype="float32"),
        weigher_of(cell),
        maestro_pl.Meta(
            signals[cell.signal](**cell.signal_args),
            learners[cell.learner](**cell.learner_args),
            warmup=cell.warmup,
            optimizer=partial(torch.optim.AdamW, lr=rate),
            **meta,
        ),
        maestro_pl.Anchoring(**anchoring),
        maestro_pl.Advantages(**groups.get("advantages", {})),
        kl=maestro_pl.KL(coef=protocol.kl_coef),
        optimizer=partial(torch.optim.AdamW, lr=protocol.lr, weight_decay=0.0),
    )


class _Replaced(L.Callback):
    """Puts something else in the place of h, with the same width."""

    def __init__(self, what: str, seed: int) -> None:
        self.what = what
        self.noise = torch.Generator().manual_seed(seed)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._replace(batch["rollout"])

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._replace(batch["rollout"])

    def _replace(self, rollout: Rollout) -> None:
        assert rollout.hidden_BD is not None
        count, width = len(rollout.prompts), rollout.hidden_BD.shape[1]
        if self.what == "noise":
            rows_ND = torch.randn(count, width, generator=self.noise)
        else:
            rows_ND = torch.zeros(count, width)
            texts = [[t] for t in rollout.columns["task"]] if self.what == "task" else map(str.split, rollout.prompts)
            for row, words in zip(rows_ND, texts, strict=True):
                for word in words:
                    row[zlib.crc32(word.encode()) % width] += 1.0
        rollout.hidden_BD = rows_ND.repeat_interleave(rollout.group_size, 0)


class _Watch(L.Callback):
    """Counts what a run costs, and keeps the mean weights of each task over its last steps."""

    def __init__(self, last: int = 10) -> None:
        self.last = last
        self.tokens = self.responses = 0
        self.recent: list[Rollout] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rollout: Rollout = batch["rollout"]
        self.tokens += int(rollout.lengths_B.sum())
        self.responses += len(rollout)
        self.recent = [*self.recent, rollout][-self.last :]

    def weights(self) -> dict[str, list[float]]:
        """Mean weights of each task, in the order of the weighed rewards."""
        rows: dict[str, list[torch.Tensor]] = {}
        for rollout in self.recent:
            for task, row in zip(rollout.tasks, rollout.probabilities_BK, strict=True):
                rows.setdefault(task, []).append(row)
        return {task: [round(float(w), 4) for w in torch.stack(parts).mean(0)] for task, parts in sorted(rows.items())}


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and test one cell; plain numbers, JSON-ready."""
    _quiet()
    L.seed_everything(cell.seed, verbose=False)
    began = time.perf_counter()
    module, watch, protocol = module_of(cell), _Watch(), cell.protocol
    data = maestro_pl.PromptDataModule(
        [Source("sandbox", options={"tasks": list(cell.tasks)})],
        batch_size=protocol.batch,
        eval_batch_size=64,
        eval_limit=protocol.eval_prompts,
        seed=cell.seed,
        show=False,
    )
    replaced = [] if cell.hidden == "own" else [_Replaced(cell.hidden, cell.seed)]
    rollout = RolloutGenerator(protocol.group, protocol.eval_group, max_new_tokens=64, seed=cell.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=protocol.steps,
            callbacks=[rollout, *replaced, *rewards_of(cell), watch],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            inference_mode=False,
            default_root_dir=folder,
        )
        trainer.fit(module, datamodule=data)
        trained = time.perf_counter()
        tested = _test(trainer, module, protocol)
        new = _test(trainer, module, protocol, new_templates=True) if cell.new_templates else None
    return {
        "cell": describe(cell),
        **tested,
        "new_templates": new,
        "weights": watch.weights(),
        "reward_names": module.weight_names,
        "labelled_groups": module.outer.labelled_groups,
        "labels": module.outer.counts.state_dict(),
        "unhelped": sorted(module.outer.unhelped),
        "context_drift": round(float(module.step_metrics.get("conductor/context_drift", float("nan"))), 4),
        "groups": watch.responses // protocol.group,
        "tokens": watch.tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "train_seconds": round(trained - began, 1),
    }


def _test(trainer: L.Trainer, module: Any, protocol: Protocol, new_templates: bool = False) -> dict[str, Any]:
    """Utility, length and mean weights of each family on test prompts."""
    source = Source("sandbox", options=NEW_WORDINGS if new_templates else {})
    data = maestro_pl.PromptDataModule([source], eval_batch_size=64, eval_limit=protocol.eval_prompts, show=False)
    trainer.test(module, datamodule=data, verbose=False)
    rows = module.evaluation
    return {
        "utility": {r["task"]: round(r["mean"], 5) for r in rows if r["metric"] == "reward/utility"},
        "length": next(round(r["mean"], 2) for r in rows if r["task"] == "all" and r["metric"] == "length/mean"),
        "test_weights": {
            f"{r['task']}:{r['metric'].removeprefix('weights/')}": round(r["mean"], 4)
            for r in rows
            if r["metric"].startswith("weights/")
        },
    }


def describe(cell: Cell) -> dict[str, Any]:
    """A cell as plain values."""
    described = asdict(cell)
    described["tasks"], described["labelled_tasks"] = list(cell.tasks), list(cell.labelled_tasks)
    return described


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


__all__ = ["REWARDS", "Cell", "Protocol", "describe", "run_cell"]
