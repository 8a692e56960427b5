"""The same training step through TRL's GRPOTrainer and through us: time, memory, tokens a second.

    python -m benchmarks.trl_side_by_side --workload base

Both sides have the same model, adapters, prompts, sampling, rewards and optimizer, and take turns in one process: our
steps are those of a ``Trainer.fit`` of Lightning's, and between two of them runs one optimizer step of TRL's, which of
the two goes first alternating. Each number of threads has a fresh process. Responses are forced to one length, or
(``ragged``) end at random and every time is divided by the tokens sampled; ratios are TRL's time over ours in the same
round. Ours runs with its Conductor.

``--dtype best`` tries each precision on both sides and gives each the one in which it needs the least processor time
(on cuda: the least time); ``dtype_seconds`` holds the seconds for 1,000 tokens in each. Adapters are float32 in all of
them. The peak of memory is that of a process of its own for each side; ``above_start`` leaves out what it held before
the first step. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import (
    LEARNING_RATE,
    SETTINGS,
    Laps,
    Seconds,
    Workload,
    add_arguments,
    chosen_workload,
    device_name,
    even_ids,
    finish,
    lora_options,
    make_ours,
    mean_stages,
    measured,
    memory_mib,
    model_folder,
    prompt_texts,
    show_table,
    spread,
    variety,
)


class TRLSide:
    """TRL's trainer, stepped by hand as its ``train()`` does it."""

    def __init__(self, workload: Workload, folder: Path, texts: list[str], setting: str, device: str) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import GRPOConfig, GRPOTrainer

        dtype, _, autocast = setting.partition("+")
        rows = workload.prompts * workload.group
        forced = {"min_new_tokens": workload.min_new_tokens} if workload.min_new_tokens else None
        self.device = device
        self.seconds: list[Seconds] = []
        self.tokens: list[int] = []
        self.stages: list[dict[str, float]] = []
        self.trainer = GRPOTrainer(
            model=str(folder),
            reward_funcs=[even_ids, self._counted_variety],
            args=GRPOConfig(
                output_dir=str(folder.parent / "trl"),
                per_device_train_batch_size=rows,
                num_generations=workload.group,
                max_completion_length=workload.new_tokens,
                generation_kwargs=forced,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                beta=0.0,
                loss_type="dapo",
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                gradient_checkpointing=False,
                bf16=bool(autocast),
                model_init_kwargs={"dtype": dtype},
                use_cpu=device == "cpu",
                dataloader_pin_memory=False,
                shuffle_dataset=False,
                max_steps=len(texts) // workload.prompts,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            peft_config=LoraConfig(**lora_options(workload), lora_dropout=0.0, task_type="CAUSAL_LM"),
        )
        self.generate_seconds = 0.0
        self._generate, self.trainer._generate = self.trainer._generate, self._timed_generate

    def prepare(self) -> None:
        """What ``train()`` does before its first step: wrap the model, make optimizer and scheduler, begin the data."""
        trainer = self.trainer
        self.model, loader = trainer._prepare_for_training(trainer.args.max_steps, trainer.get_train_dataloader(), None)
        trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(loader)

    def step(self) -> None:
        """One optimizer step, measured."""
        self.generate_seconds = 0.0
        seconds, _ = measured(self.device, self._step)
        self.seconds.append(seconds)
        self.stages.append({"generate": self.generate_seconds, "rest": seconds.wall - self.generate_seconds})

    def _step(self) -> None:
        trainer = self.trainer
        trainer.training_step(self.model, next(self.batches), None)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        trainer.state.global_step += 1

    def _timed_generate(self, prompts: list[Any]) -> Any:
        begin = time.perf_counter()
        result = self._generate(prompts)
        self.generate_seconds = time.perf_counter() - begin
        return result

    def _counted_variety(self, completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.tokens.append(sum(map(len, completion_ids)))
        return variety(completions, completion_ids)


# -- in a process of its own -----------------------------------------------------------------------------------------


def run_sides(options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turn, or one alone: what was measured in each, by ``ours`` and ``trl``."""
    workload, setting, device = chosen_workload(options), options.dtype, options.device
    torch.set_num_threads(options.threads[0])
    folder = model_folder(workload, options.folder / "model")
    texts = prompt_texts(workload, folder, options.warmup + options.rounds)
    sides: dict[str, Any] = {}
    memory: list[float] = []
    if options.only != "ours":
        trl = sides["trl"] = TRLSide(workload, folder, texts, setting, device)
        trl.prepare()
    if options.only == "trl":
        memory.append(start_memory(device))
        for _ in range(options.warmup + options.rounds):
            trl.step()
    else:
        ours = make_ours(workload, folder, texts, options.ours or setting, device)
        between = None if options.only else lambda step, batch: trl.step()
        sides["ours"] = laps = Laps(device, between, started=lambda: memory.append(start_memory(device)))
        ours.fit(laps)
    peak = memory_mib(device)[1]
    return {
        "device": device_name(device),
        "mib": round(peak, 1),
        "above_start_mib": round(peak - memory[0], 1),
        **{name: record(side, options.warmup) for name, side in sides.items()},
    }


def start_memory(device: str) -> float:
    """Memory in use before the first step."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return memory_mib(device)[0]


def record(side: Laps | TRLSide, warmup: int) -> dict[str, Any]:
    """The measured rounds of a side, without the warm-up, as plain values."""
    return {
        "wall": [s.wall for s in side.seconds[warmup:]],
        "cpu": [s.cpu for s in side.seconds[warmup:]],
        "tokens": side.tokens[warmup:],
        "stages": mean_stages(side.stages[warmup:]),
    }


# -- the parent ------------------------------------------------------------------------------------------------------


def child_arguments(arguments: list[str], folder: Path, threads: int, **changed: object) -> list[str]:
    """The arguments of a child: ours, and after them those that are changed."""
    extra = [text for name, value in changed.items() for text in (f"--{name}", str(value))]
    return [*arguments, "--child", "--folder", str(folder), "--threads", str(threads), *extra]


def in_child(arguments: list[str], folder: Path, threads: int, **changed: object) -> dict[str, Any]:
    """Run :func:`run_sides` in a fresh process with so many threads."""
    command = [sys.executable, "-m", "benchmarks.trl_side_by_side"]
    command += child_arguments(arguments, folder, threads, **changed)
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def seconds_per_token(side: dict[str, Any], clock: str) -> list[float]:
    """Seconds for each sampled token, round by round."""
    return [seconds / tokens for seconds, tokens in zip(side[clock], side["tokens"], strict=True)]


def ratios(run: dict[str, Any], clock: str) -> list[float]:
    """TRL's time over ours, round by round."""
    pairs = zip(seconds_per_token(run["trl"], clock), seconds_per_token(run["ours"], clock), strict=True)
    return [trl / ours for trl, ours in pairs]


def ratio_of_totals(run: dict[str, Any]) -> dict[str, float]:
    """TRL's time over ours, all rounds together: steadier than the median where lengths are random."""
    found = {}
    for clock in ("wall", "cpu"):
        trl, ours = (sum(run[side][clock]) / sum(run[side]["tokens"]) for side in ("trl", "ours"))
        found[clock] = round(trl / ours, 3)
    return found


def per_second(side: dict[str, Any]) -> float:
    """Sampled tokens a second of a whole step."""
    return round(1 / statistics.median(seconds_per_token(side, "wall")), 1)


def dtype_seconds(options: argparse.Namespace, arguments: list[str], folder: Path, side: str) -> dict[str, float]:
    """One side's seconds for 1,000 tokens in each precision worth trying, with the first number of threads."""
    clock = "wall" if options.device == "cuda" else "cpu"
    found = {}
    for setting in chosen_workload(options).settings:
        run = in_child(
            arguments, folder, options.threads[0], dtype=setting, ours=setting, only=side, warmup=1, rounds=2
        )
        found[setting] = round(1000 * min(seconds_per_token(run[side], clock)), 4)
        print(f"{setting}: {side} needs {found[setting]:.3f} s for 1,000 tokens", flush=True)
    return found


def compare(options: argparse.Namespace, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Everything there is to measure, one child process after another."""
    fixed = {"trl": options.dtype, "ours": options.ours or options.dtype}
    tried = {
        side: dtype_seconds(options, arguments, folder, side) for side, setting in fixed.items() if setting == "best"
    }
    dtype = fixed | {side: min(found, key=found.__getitem__) for side, found in tried.items()}
    chosen = {"dtype": dtype["trl"], "ours": dtype["ours"]}
    measured_rounds = {"warmup": options.warmup, "rounds": options.rounds}
    runs = {
        str(threads): in_child(arguments, folder, threads, **chosen, **measured_rounds) for threads in options.threads
    }
    alone = {
        side: in_child(arguments, folder, options.threads[0], **chosen, only=side, warmup=0, rounds=2)
        for side in ("ours", "trl")
    }
    peak = {f"{side}_{name}": run[name] for name in ("mib", "above_start_mib") for side, run in alone.items()}
    return result_of(options, runs, peak) | {"dtype": dtype, "dtype_seconds": tried}


def result_of(options: argparse.Namespace, runs: dict[str, Any], peak: dict[str, float]) -> dict[str, Any]:
    """The JSON object, but for the precisions."""
    return {
        "workload": options.workload,
        "device": next(iter(runs.values()))["device"],
        "lengths": "forced" if chosen_workload(options).min_new_tokens else "per token",
        "rounds": options.rounds,
        "ratio_wall": {key: spread(ratios(run, "wall")) for key, run in runs.items()},
        "ratio_cpu": {key: spread(ratios(run, "cpu")) for key, run in runs.items()},
        "ratio_of_totals": {key: ratio_of_totals(run) for key, run in runs.items()},
        "tokens_per_s_ours": {key: per_second(run["ours"]) for key, run in runs.items()},
        "tokens_per_s_trl": {key: per_second(run["trl"]) for key, run in runs.items()},
        "sampled_tokens": {
            key: {side: sum(run[side]["tokens"]) for side in ("ours", "trl")} for key, run in runs.items()
        },
        "peak_rss_ratio": round(peak["ours_mib"] / peak["trl_mib"], 3),
        "peak_rss_above_start_ratio": round(peak["ours_above_start_mib"] / peak["trl_above_start_mib"], 3),
        "peak_rss": peak,
        "stages": {key: {side: run[side]["stages"] for side in ("ours", "trl")} for key, run in runs.items()},
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    rows = [
        (
            key,
            "{ours} | {trl}".format(**result["dtype"]),
            *("{median} ({min} to {max})".format(**result[name][key]) for name in ("ratio_wall", "ratio_cpu")),
            result["tokens_per_s_ours"][key],
            result["tokens_per_s_trl"][key],
        )
        for key in result["ratio_wall"]
    ]
    columns = (
        "threads",
        "precision, ours | TRL",
        "wall, TRL / ours",
        "CPU, TRL / ours",
        "tokens/s, ours",
        "tokens/s, TRL",
    )
    show_table("{workload} on {device}, lengths {lengths}".format(**result), columns, rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2 (1 on cuda and with --quick)")
    parser.add_argument("--dtype", choices=[*SETTINGS, "best"], default="best")
    parser.add_argument("--ours", choices=SETTINGS, help="our precision, where it is not to be chosen like TRL's")
    parser.add_argument("--only", choices=["ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick and not options.child:
        options.warmup, options.rounds = 1, 2
    if options.threads is None:
        options.threads = [1] if options.quick or options.device == "cuda" else [1, 2]
    return options


def main(args: list[str] | None = None) -> None:
    """Compare, or be one of the children that measure."""
    arguments = sys.argv[1:] if args is None else args
    options = parse(arguments)
    if options.child:
        print(json.dumps(run_sides(options)), flush=True)
        return
    chosen_workload(options)  # says what is missing before anything is started
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, arguments, Path(folder))
    show(result)
    finish(result, options.out)


if __name__ == "__main__":
    main()
