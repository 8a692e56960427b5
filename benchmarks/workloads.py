"""What the speed benchmarks share: workloads, their models and prompts, our side of a run, and how both are measured."""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # at run time only the side that needs them imports them: the memory of each side is measured
    import lightning as L

    from maestro_pl.conductor.weighers import Weigher
    from maestro_pl.module import MaestroModule
    from maestro_pl.policy.policy import LoRAPolicy

PAD, EOS = 0, 1
LEARNING_RATE = 1e-6  # so small that both sides keep the model they began with
SMOLLM2 = Path.home() / ".cache" / "maestro-models" / "SmolLM2-135M-Instruct"
SHARED = Path(os.environ.get("MAESTRO_SHARED", Path(__file__).parents[2] / "shared"))
REAL_PROMPTS = SHARED / "data" / "gsm8k" / "train.jsonl"
SETTINGS = (
    "float32",
    "float32+autocast",
    "bfloat16",
    "bfloat16+autocast",
)  # the base's dtype, under bf16 autocast or not


@dataclass(frozen=True)
class Workload:
    """One training step's shape.

    Attributes:
        name: of the workload.
        prompts: N, prompts a step.
        group: G, responses a prompt.
        prompt_tokens: length of each random prompt; real prompts have their own.
        new_tokens: limit of a response; with ``eos_share`` 0 the length of every response.
        vocabulary: of the random model.
        hidden: its width.
        layers: its depth.
        rank: of the adapters.
        eos_share: share of the vocabulary that ends a response, and so about the probability of an end at each token.
        model: folder of a real model, in place of a random one.
        prompt_file: real prompts.
        settings: precisions worth trying.
    """

    name: str
    prompts: int = 4
    group: int = 8
    prompt_tokens: int = 48
    new_tokens: int = 64
    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 4
    rank: int = 8
    eos_share: float = 0.0
    model: Path | None = None
    prompt_file: Path | None = None
    settings: tuple[str, ...] = SETTINGS

    @property
    def min_new_tokens(self) -> int:
        """What forces the lengths: as many as ``new_tokens``, or 0 where responses end at random."""
        return 0 if self.eos_share else self.new_tokens


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("base"),
        Workload("long_prompt", prompt_tokens=400),
        Workload("large_vocab", vocabulary=32_000),
        Workload("ragged", new_tokens=256, eos_share=0.03),
        Workload(
            "smollm2",
            prompts=2,
            new_tokens=32,
            rank=16,
            prompt_file=REAL_PROMPTS,
            settings=tuple(s for s in SETTINGS if "bf" in s),
        ),
    )
}
SIZES = ("prompts", "group", "prompt_tokens", "new_tokens", "vocabulary", "hidden", "layers")


def add_arguments(parser: argparse.ArgumentParser, workloads: Iterable[str] = WORKLOADS) -> None:
    """The arguments that all speed benchmarks have; those that shrink a workload are not shown."""
    parser.add_argument("--workload", choices=list(workloads), default="base")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--quick", action="store_true", help="one warm-up, two rounds, one thread: does it run?")
    parser.add_argument("--model", type=Path, help="folder of a real model; smollm2 also reads MAESTRO_SMOLLM2")
    parser.add_argument("--prompts-file", "--prompts", type=Path, help="real prompts: .jsonl, .json or .csv")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    for size in SIZES:
        parser.add_argument(f"--size-{size.replace('_', '-')}", type=int, help=argparse.SUPPRESS)


def chosen_workload(options: argparse.Namespace) -> Workload:
    """The workload that the arguments ask for; exits with a sentence where its files are missing."""
    workload = WORKLOADS[options.workload]
    sizes = {size: getattr(options, f"size_{size}") for size in SIZES}
    model = options.model
    if workload.name == "smollm2" and model is None:
        model = Path(os.environ.get("MAESTRO_SMOLLM2", SMOLLM2))
    prompt_file = options.prompts_file or workload.prompt_file
    if model is not None and not (model / "config.json").is_file():
        raise SystemExit(
            f"No model in {model}: give the folder of SmolLM2-135M-Instruct by --model or MAESTRO_SMOLLM2."
        )
    if model is not None and (prompt_file is None or not prompt_file.is_file()):
        raise SystemExit(f"No prompts in {prompt_file}: give a .jsonl, .json or .csv file by --prompts.")
    given = {size: value for size, value in sizes.items() if value is not None}
    return replace(workload, model=model, prompt_file=prompt_file, **given)


# -- models and prompts ----------------------------------------------------------------------------------------------


def model_folder(workload: Workload, folder: Path) -> Path:
    """The folder of the workload's model: the real one, or a random one that is made here the first time."""
    if workload.model is not None:
        return workload.model
    if not (folder / "config.json").is_file():
        _save_tokenizer(workload, folder)
        _save_model(workload, folder)
    return folder


def _save_tokenizer(workload: Workload, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<eos>": EOS} | {f"t{i}": i for i in range(2, workload.vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="t2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def _save_model(workload: Workload, folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    ends = [EOS]
    if workload.eos_share:
        ends += range(2, workload.vocabulary, round(1 / workload.eos_share))
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=workload.vocabulary,
            hidden_size=workload.hidden,
            intermediate_size=4 * workload.hidden,
            num_hidden_layers=workload.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=workload.hidden // 4,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=ends,
        )
    )
    model.generation_config.eos_token_id = ends
    model.save_pretrained(folder)


def prompt_texts(workload: Workload, folder: Path, steps: int) -> list[str]:
    """The prompts of so many steps: random words, or real ones in the model's chat template."""
    count = workload.prompts * steps
    if workload.model is None or workload.prompt_file is None:
        draw = random.Random(0)
        words = [[draw.randrange(2, workload.vocabulary) for _ in range(workload.prompt_tokens)] for _ in range(count)]
        return [" ".join(f"t{i}" for i in row) for row in words]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = _read_prompts(workload.prompt_file)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": questions[i % len(questions)]}], tokenize=False, add_generation_prompt=True
        )
        for i in range(count)
    ]


def _read_prompts(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".csv":
        rows: list[dict[str, str]] = list(csv.DictReader(text.splitlines(keepends=True)))
    else:
        rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    return [row["prompt"] if "prompt" in row else row["question"] for row in rows]


def even_ids(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def variety(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Another: the share of distinct tokens."""
    return [len(set(ids)) / len(ids) for ids in completion_ids]


def lora_options(workload: Workload) -> dict[str, Any]:
    """The adapters of both sides, in PEFT's words."""
    return {"r": workload.rank, "lora_alpha": 2 * workload.rank, "target_modules": "all-linear"}


# -- our side --------------------------------------------------------------------------------------------------------


@dataclass
class Ours:
    """Our side of a benchmark: a module, the callbacks around it, and the prompts of every step."""

    module: MaestroModule
    callbacks: list[L.Callback]
    steps: list[dict[str, Any]]
    device: str
    precision: str

    @property
    def policy(self) -> LoRAPolicy:
        """The policy that is trained."""
        return self.module.policy

    def fit(self, laps: Laps, steps: Sequence[dict[str, Any]] | None = None) -> None:
        """Train on these steps (default: all) by a Trainer of Lightning's, with ``laps`` as its first callback."""
        import lightning as L

        trainer = L.Trainer(
            accelerator="gpu" if self.device == "cuda" else "cpu",
            devices=1,
            precision=self.precision,  # type: ignore[arg-type]
            max_epochs=1,
            callbacks=[laps.callback(), *self.callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = [dict(step) for step in (self.steps if steps is None else steps)]
        trainer.fit(self.module, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def make_ours(
    workload: Workload, folder: Path, texts: list[str], setting: str, device: str, weigher: Weigher | None = None
) -> Ours:
    """Our side for this workload; the weigher is the Conductor unless one is given."""
    from callbacks.rewards import FunctionReward
    from callbacks.rollout import RolloutGenerator
    from maestro_pl.conductor.conductor import Conductor
    from maestro_pl.module import MaestroModule
    from maestro_pl.policy.loading import LoRA
    from maestro_pl.policy.policy import LoRAPolicy

    dtype, _, autocast = setting.partition("+")
    torch.manual_seed(0)
    adapters = lora_options(workload)
    lora = LoRA(adapters["r"], adapters["lora_alpha"], target_modules=adapters["target_modules"])
    policy = LoRAPolicy(str(folder), dtype=dtype, lora=lora)  # type: ignore[arg-type]
    module = MaestroModule(
        policy,
        weigher if weigher is not None else Conductor(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0),
    )
    rollout = RolloutGenerator(
        group_size=workload.group, max_new_tokens=workload.new_tokens, min_new_tokens=workload.min_new_tokens, seed=0
    )
    rewards = [FunctionReward(function, style="trl") for function in (even_ids, variety)]
    size = workload.prompts
    steps = [batch_of(policy, texts[start : start + size]) for start in range(0, len(texts), size)]
    return Ours(module, [rollout, *rewards], steps, device, "bf16-mixed" if autocast else "32-true")


def batch_of(policy: LoRAPolicy, texts: list[str]) -> dict[str, Any]:
    """The batch that a data module would give for these prompts."""
    return {
        "prompt": texts,
        "prompt_text": texts,
        "prompt_ids": [policy.encode(text) for text in texts],
        "reference": [None] * len(texts),
        "task": ["benchmark"] * len(texts),
    }


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Wall and processor time."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall - other.wall, self.cpu - other.cpu)


def now(device: str) -> Seconds:
    """The time, once the accelerator has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return Seconds(time.perf_counter(), time.process_time())


def measured(device: str, function: Callable[[], Any]) -> tuple[Seconds, Any]:
    """The seconds that a call took, and what it returned."""
    begin = now(device)
    result = function()
    return now(device) - begin, result


@dataclass
class Laps:
    """Measures every step of a fit, with all that Lightning does around it.

    ``between(step, batch)`` is run once a step and does not count: before the step in even steps, after it in odd ones.
    """

    device: str
    between: Callable[[int, dict[str, Any]], None] | None = None
    seconds: list[Seconds] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    started: Callable[[], None] = lambda: None
    _mark: Seconds = Seconds()

    def callback(self) -> L.Callback:
        """What Lightning calls; it must be the first of the callbacks."""
        from lightning.pytorch.callbacks import LambdaCallback

        return LambdaCallback(
            on_train_start=self._start, on_train_batch_start=self._begin_step, on_train_batch_end=self._end_step
        )

    def _start(self, *_: Any) -> None:
        self.started()
        self._mark = now(self.device)

    def _begin_step(self, trainer: Any, module: Any, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            self._step_aside(batch_idx, batch)

    def _end_step(self, trainer: Any, module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        end = now(self.device)
        self.seconds.append(end - self._mark)
        self._mark = end
        self.tokens.append(sum(len(ids) for ids in batch["rollout"].response_ids))
        logged = trainer.callback_metrics.items()
        self.stages.append({k.removeprefix("time/"): float(v) for k, v in logged if k.startswith("time/")})
        if batch_idx % 2 == 1:
            self._step_aside(batch_idx, batch)

    def _step_aside(self, step: int, batch: dict[str, Any]) -> None:
        if self.between is not None:
            begin = now(self.device)
            self.between(step, batch)
            self._mark += now(self.device) - begin


def memory_mib(device: str) -> tuple[float, float]:
    """Memory in use and its peak so far: of the process, or of the accelerator."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # not ru_maxrss: a child inherits its parent's
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) / 2**10, int(fields["VmHWM"].split()[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
    return peak, peak


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, min and max."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def mean_stages(stages: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean seconds of each stage."""
    names = dict.fromkeys(name for step in stages for name in step)
    return {name: round(statistics.fmean(step.get(name, 0.0) for step in stages), 4) for name in names}


def device_name(device: str) -> str:
    """What the tables call the device."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Print the result as the last line of output, and write it where it was asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)
