"""One rank of a few short runs: ``torchrun --nproc-per-node N -m tests.ranks.worker FOLDER MODEL PROMPTS CASE ...``.

Rank 0 leaves what each run became in ``FOLDER/CASE.N.pt``. Every prompt is sampled with a seed of its own, so that the
responses of a batch do not depend on which rank has which prompt.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from callbacks import FunctionReward, PeopleAnchor, ResponseRecorder, RunCheckpoint, WeightDistributionLogger
from maestro_pl import KL, Advantages, Anchoring, Loss, Meta
from maestro_pl.conductor import AnchorSignal, GradientLearner, RidgeLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.data import PromptDataModule
from maestro_pl.generation.engine import Generation
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import Click, LabelStore
from maestro_pl.policy.loading import LoRA
from maestro_pl.sft import SFTModule
from maestro_pl.training.fsdp import FSDP2Strategy
from tests.support import module_of, rewards, sevens, trainer_of

GLOBAL_BATCH = 4


def some(completion: str, task: str, **_: Any) -> float | None:
    """A reward of one task, so that ranks see different counts of it."""
    return float(sum(map(ord, completion)) % 5) if task == "a" else None


def fives(completion: str, **_: Any) -> float:
    return float(sum(map(ord, completion)) % 5)


def lazy(completion: str, prompt: str, **_: Any) -> float | None:
    """The only reward of a run in which the second prompt of every pair teaches nothing."""
    return sevens(completion) if int(prompt.split()[-1]) % 2 == 0 else 1.0


def out_of_memory_once(loss_of: Any) -> Any:
    """A loss for whose first pass there is no memory."""
    calls = []

    def fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory on this rank")
        return loss_of(*args)

    return fails


class PerPrompt:
    """Samples every prompt alone, with a seed of its own."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def generate(
        self, policy: Any, prompt_ids: Any, n: int, sampling: Any, progress: Any = None, context: Any = None
    ) -> Generation:
        parts = [
            self.engine.generate(
                policy, [ids], n, replace(sampling, seed=zlib.crc32(repr(ids).encode())), None, context
            )
            for ids in prompt_ids
        ]
        return Generation(
            [ids for part in parts for ids in part.response_ids],
            [reason for part in parts for reason in part.finish_reasons],
        )


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def soft() -> Conductor:
    return Conductor(action="soft", norm="center", context="prompt")


def ridge() -> Meta:
    return Meta(AnchorSignal(), RidgeLearner(), every=1, warmup=1)


def choosing() -> Meta:
    return Meta(AnchorSignal(), RidgeLearner(target="choice"), every=1)


class Late(L.Callback):
    """Somebody who answers about every group of the first batch once it was trained on; rank 0 writes for all."""

    def __init__(self, labels: Path) -> None:
        self.store = LabelStore(labels)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx or not trainer.is_global_zero:
            return
        rollout = batch["rollout"].of_all_ranks
        for n, prompt in enumerate(rollout.prompts):
            texts = list(dict.fromkeys(rollout.responses[n * 4 : n * 4 + 4]))
            if len(texts) > 1:
                asked = Question.of("a", prompt, texts)
                best = asked.responses.index(texts[-1])
                self.store.click(Click(asked, "ann", "best", best, tuple(range(len(texts))), 1.0))


SYNCED = {"reference": "synced", "sync_every": 2, "sync_rate": 0.5, "gradient_checkpointing": True}
ANCHORED = {"weigher": soft, "meta": ridge}
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": sgd, "weigher": EqualWeights},
    "adamw, kl, dapo": {"weigher": EqualWeights, "kl": KL(coef=0.1), "loss": Loss(type="dapo")},
    "a rank without a group": {"weigher": EqualWeights, "rewards": [FunctionReward(function=lazy, name="lazy")]},
    "gdpo": {"weigher": EqualWeights, "advantages": Advantages(aggregation="normalize_then_sum")},
    "scaled by the batch": {"weigher": EqualWeights, "advantages": Advantages(scale="batch")},
    "ridge": {**ANCHORED, "anchoring": Anchoring(fraction=0.5)},
    "gradient": {
        "weigher": soft, "anchoring": Anchoring(),
        "meta": lambda: Meta(AnchorSignal(), GradientLearner(trust_region=0.1, target_entropy=0.5), every=2),
    },
    "late": {"weigher": soft, "meta": choosing, "people": True},
    "sft": {"sft": True},
    # passes of few tokens, so that ranks have several, and not as many as the other
    "fsdp, adapters": {
        "fsdp": {}, "weigher": EqualWeights, "kl": KL(coef=0.1), "micro_batch_tokens": 40,
        "rewards": [FunctionReward(function=lazy, name="lazy")],
    },
    "fsdp, all parameters": {
        "fsdp": {}, "weigher": EqualWeights, "optimizer": sgd, "lora": None, "micro_batch_tokens": 40, "kl": KL(coef=0.1),
    },
    "fsdp, all parameters, adamw": {
        **ANCHORED, "fsdp": {"sync_every_pass": False}, "anchoring": Anchoring(fraction=0.5), "lora": None,
        "micro_batch_tokens": 40, "kl": KL(coef=0.1, place="reward"), "policy_options": SYNCED,
    },
    "fsdp, shares": {
        **ANCHORED, "fsdp": {"sync_every_pass": False, "sharded_checkpoints": True}, "anchoring": Anchoring(fraction=0.5),
        "lora": None, "micro_batch_tokens": 40, "kl": KL(coef=0.1, place="reward"), "policy_options": SYNCED,
    },
    "fsdp, sft": {"sft": True, "fsdp": {}, "lora": None, "micro_batch_tokens": 40},
    "out of memory": {"weigher": EqualWeights, "fails_on": 1},
    "dropout": {**ANCHORED, "anchoring": Anchoring(fraction=0.5), "dropout": 0.1},
}  # fmt: skip


def run_case(
    name: str, folder: Path, model: Path, prompts: Path, steps: int = 3, ckpt: str | None = None
) -> dict[str, Any]:
    options = dict(CASES[name])
    L.seed_everything(0, verbose=False)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    fails_on = options.pop("fails_on", -1)
    dropout = options.pop("dropout", 0.0)
    lora = options.pop("lora", LoRA(r=4, dropout=dropout))
    made: dict[str, Any] = {"optimizer": options.pop("optimizer", adamw)}
    if "micro_batch_tokens" in options:
        made["micro_batch_tokens"] = options.pop("micro_batch_tokens")
    sharded = options.pop("fsdp", None)
    chain = options.pop("rewards", None) or [
        *rewards(FunctionReward(function=some, name="some", normalize="zscore")),
        FunctionReward(function=fives, name="fives", role="anchor"),
    ]
    people = options.pop("people", False)
    if people:
        folder.mkdir(parents=True, exist_ok=True)
        labels = folder / "labels.db"
        chain = [*rewards()[:1], *chain[-2:-1], Late(labels), PeopleAnchor(str(labels))]
    module: Any
    if options.pop("sft", False):
        policy = module_of(model, lora=lora).policy
        module = SFTModule(policy, **made)
    else:
        meta = options.pop("meta", Meta)()  # a learner remembers, so every run has its own
        module = module_of(model, lora=lora, weigher=options.pop("weigher")(), meta=meta, **made, **options)
    keeper = RunCheckpoint(every_n_train_steps=1, keep=-1)
    watch = [WeightDistributionLogger(plot=False), ResponseRecorder(every_n_steps=1), keeper]
    trainer = trainer_of(
        folder,
        [*chain, *watch],
        devices=ranks,
        strategy=FSDP2Strategy(**sharded) if sharded is not None and ranks > 1 else "auto",
        max_steps=steps,
        logger=CSVLogger(folder, flush_logs_every_n_steps=1),
        log_every_n_steps=1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        enable_checkpointing=True,
    )
    if fails_on == int(os.environ.get("RANK", "0")):
        module.inner.loss_of = out_of_memory_once(module.inner.loss_of)
    generator: Any = next(c for c in trainer.callbacks if hasattr(c, "engine"))
    generator.engine = PerPrompt(generator.engine)
    data = PromptDataModule(sources=str(prompts), batch_size=GLOBAL_BATCH // ranks, show=False)
    trainer.fit(module, data, ckpt_path=ckpt)
    run = Path(str(trainer.log_dir))
    return {
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "steps": module.policy_steps,
        "micro_batch_tokens": module.micro_batch_tokens,
        "metrics": [
            {k: float(v) for k, v in row.items() if v and not k.startswith("time/")}
            for row in csv.DictReader((run / "metrics.csv").open(newline=""))
        ],
        "rollouts": [json.loads(line) for line in (run / "rollouts.jsonl").open()]
        if (run / "rollouts.jsonl").exists()
        else [],
        "weights": (run / "weights.csv").read_text() if (run / "weights.csv").exists() else "",
        "evaluation": module.evaluation,
        "labelled": getattr(getattr(module, "outer", None), "labelled_groups", 0),
        "checkpoint": str(keeper.last_model_path),
    }


if __name__ == "__main__":
    out, folder_of_model, rows, *names = sys.argv[1:]
    for given in names:  # CASE@STEPS@LABEL@CHECKPOINT, all but the first may be left out
        case, steps, label, ckpt = (*given.split("@"), "", "", "")[:4]
        here = Path(out) / f"{label or case}.{os.environ.get('WORLD_SIZE', '1')}"
        result = run_case(case, here, Path(folder_of_model), Path(rows), int(steps or 3), ckpt or None)
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(result, here.with_suffix(here.suffix + ".pt"))
