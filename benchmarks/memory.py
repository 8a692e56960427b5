"""Peak memory and speed of rollout and update, the estimate beside it.

    python -m benchmarks.memory                               # CPU: small shapes, checks the estimate and flat memory
    python -m benchmarks.memory --device cuda --limit-gb 12   # published shapes with random weights in NF4

Every case runs in a process of its own: the worst-case probe, then a few training steps whose responses all have full
length. On a GPU peaks are the allocator's, on a CPU the bytes of live tensors. ``--limit-gb`` caps the allocator, so
that a large card stands in for a small one. The table is printed as Markdown and kept in
``benchmarks/results/memory_<device>.json``; the last line is one JSON object. The exit status is 1 where an estimate is
more than 15 % off, memory grows, or a case does not fit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
TOLERANCE = 0.15
SMALL = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One measured run.

    Attributes:
        name: in the table.
        model: hub id whose published config is taken, or a model type with ``shape``.
        shape: of the config.
        prompt, response, group, batch: tokens and counts.
        policy: arguments of the policy.
        micro_batch_tokens: of the update.
        paged: the optimizer is bitsandbytes' PagedAdamW8bit.
        steps: training steps after the probe.
        target_gib: what the case should stay within, in all.
    """

    name: str
    model: str
    shape: dict[str, Any] = field(default_factory=dict)
    prompt: int = 512
    response: int = 512
    group: int = 8
    batch: int = 1
    policy: dict[str, Any] = field(default_factory=dict)
    micro_batch_tokens: int = 16384
    paged: bool = False
    steps: int = 3
    target_gib: float | None = None


QLORA: dict[str, Any] = {"quantization": "nf4", "gradient_checkpointing": True}


def cpu_cases(steps: int) -> list[Case]:
    """Small shapes that differ in what decides memory."""
    short: dict[str, Any] = {"prompt": 64, "response": 96, "batch": 2, "steps": 2}
    llama = {**SMALL, "tie_word_embeddings": False, "vocab_size": 16384}
    return [
        Case("qwen3, nf4", "qwen3", SMALL, **{**short, "steps": steps}, policy=QLORA),
        Case("qwen3, nf4, untied head", "qwen3", {**SMALL, "tie_word_embeddings": False}, **short, policy=QLORA),
        Case("qwen3, nf4, no checkpointing", "qwen3", SMALL, **short, policy={"quantization": "nf4"}),
        Case("qwen3, bf16", "qwen3", SMALL, **short, policy={"gradient_checkpointing": True}),
        Case("qwen3, int8", "qwen3", SMALL, **short, policy={"quantization": "int8", "gradient_checkpointing": True}),
        Case("llama, nf4", "llama", llama, **short, policy=QLORA),
        Case("llama, nf4, long prompt", "llama", llama, **{**short, "prompt": 384, "response": 32}, policy=QLORA),
        Case("qwen2, nf4, cut groups", "qwen2", SMALL, **short, policy=QLORA, micro_batch_tokens=400),
        Case("qwen3, nf4, offload", "qwen3", SMALL, **short, policy={**QLORA, "activation_offload": True}),
        Case("qwen3, nf4, 8-bit AdamW", "qwen3", SMALL, **short, policy=QLORA, paged=True),
        Case("qwen3, all parameters", "qwen3", SMALL, **short, policy={"dtype": "float32", "lora": None}),
    ]  # fmt: skip


def cuda_cases(steps: int) -> list[Case]:
    """The published shapes, and what they should stay within."""
    targets = {
        "Qwen/Qwen3-0.6B": (None, None), "Qwen/Qwen3-1.7B": (6.0, None), "Qwen/Qwen3-4B": (8.0, None),
        "Qwen/Qwen3-8B": (12.0, 16.0), "meta-llama/Llama-3.1-8B-Instruct": (12.0, 16.0),
        "Qwen/Qwen2.5-1.5B-Instruct": (6.0, None),
    }  # fmt: skip
    return [
        Case(
            f"{model.split('/')[1]}, {tokens}+{tokens}", model, prompt=tokens, response=tokens, policy=QLORA, steps=steps,
            target_gib=target,
        )
        for model, both in targets.items()
        for tokens, target in zip((512, 1024), both, strict=True)
    ]  # fmt: skip


def estimates() -> str:
    """What the published shapes need by the estimate, in GiB, as Markdown; nothing is run."""
    from maestro_pl.memory.estimate import Workload, estimate
    from maestro_pl.memory.shadow import ModelSetting
    from maestro_pl.memory.workload import model_config

    lines = [
        "| model | prompt + response | base | adapters, gradients, AdamW | activations kept | inside a layer | KV cache "
        "| rollout | update | card needs | target |",
        "|---" * 11 + "|",
    ]
    for case in cuda_cases(1):
        setting = ModelSetting(model_config(case.model), **case.policy)
        found = estimate(Workload(setting, batch_size=1, max_prompt_tokens=case.prompt, max_new_tokens=case.response))
        update, lasting = found.phases["update"], found.lasting
        kept = update["activations kept"]
        sizes = [
            lasting["base"], lasting["adapters"] + lasting["gradients"] + lasting["optimizer"], kept,
            sum(update.values()) - kept, found.phases["rollout"]["KV cache"], found.peak_of("rollout"),
            found.peak_of("update"),
        ]  # fmt: skip
        cells = [f"{size / GIB:.2f}" for size in sizes] + [f"{found.card_bytes / GIB:.1f}", f"{case.target_gib or '-'}"]
        lines.append("| " + " | ".join([case.model.split("/")[1], f"{case.prompt} + {case.response}", *cells]) + " |")
    return "\n".join(lines)


def run_case(case: Case, device: str, limit_gb: float | None) -> dict[str, Any]:
    """Probe, train, and say what it took."""
    import lightning as L
    import torch
    from transformers import AutoConfig

    import maestro_pl
    from benchmarks.random_models import RandomPolicy
    from callbacks import FunctionReward, MemoryProbe, RolloutGenerator
    from maestro_pl.data.sources import Source
    from maestro_pl.memory.workload import model_config

    warnings.filterwarnings("ignore")
    if device == "cpu":
        torch.set_num_threads(1)
    elif limit_gb is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * GIB / total))
    L.seed_everything(0, verbose=False)
    config = AutoConfig.for_model(case.model, **case.shape) if case.shape else model_config(case.model)
    policy = RandomPolicy(config, device, **case.policy)
    text = " ".join(["go"] * 20000)
    words = len(policy.encode(text)) / 20000
    prompt = policy.tokenizer.decode(policy.encode(text)[: case.prompt - int(8 * words)])
    optimizer: Any = partial(torch.optim.AdamW, lr=1e-5)
    if case.paged:
        import bitsandbytes as bnb

        optimizer = partial(bnb.optim.PagedAdamW8bit, lr=1e-5)
    module = maestro_pl.MaestroModule(
        policy, maestro_pl.Conductor(), optimizer=optimizer, micro_batch_tokens=case.micro_batch_tokens
    )
    probe, watch = MemoryProbe("always"), _watch(device)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "prompts.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"{i} {prompt}", "task": "t"}) + "\n" for i in range(64)))
        trainer = L.Trainer(
            max_steps=case.steps,
            callbacks=[
                RolloutGenerator(case.group, max_new_tokens=case.response, min_new_tokens=case.response, seed=0),
                FunctionReward("benchmarks.memory.chance", name="chance"),
                watch,  # before the probe, which begins a new count at the end of a step
                probe,
            ],
            accelerator=device,
            devices=1,
            precision="bf16-mixed",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        data = maestro_pl.PromptDataModule([Source(str(rows))], batch_size=case.batch, show=False)
        trainer.fit(module, datamodule=data)
    return {"case": asdict(case), "probe": probe.report, **watch.summary()}


def chance(response: str, prompt: str) -> float:
    """A reward that differs between the responses of a group."""
    return (hash((response, prompt)) % 1000) / 1000


def _watch(device: str) -> Any:
    import lightning as L
    import torch

    class Watch(L.Callback):
        """Bytes after each step, peaks, seconds of the stages, tokens."""

        def __init__(self) -> None:
            self.after: list[int] = []
            self.peaks: list[int] = []
            self.reserved: list[int] = []
            self.rollout: list[float] = []
            self.update: list[float] = []
            self.drawn: list[int] = []
            self.learned: list[int] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            rollout, metrics = batch["rollout"], trainer.callback_metrics
            self.drawn.append(int(rollout.lengths_B.sum()))
            self.learned.append(self.drawn[-1] + sum(map(len, rollout.prompt_ids)))
            self.rollout.append(float(metrics["time/rollout"]))
            self.update.append(float(metrics["time/update"]))
            if device == "cuda":
                self.peaks.append(torch.cuda.max_memory_allocated())
                self.reserved.append(torch.cuda.max_memory_reserved())
                self.after.append(torch.cuda.memory_allocated())
            else:
                self.after.append(_live_bytes())

        def summary(self) -> dict[str, Any]:
            last = max(1, len(self.rollout) // 2)  # the first steps warm up
            rollout, update = sum(self.rollout[-last:]), sum(self.update[-last:])
            return {
                "bytes_after_steps": self.after,
                "peak_allocated": max(self.peaks, default=None),
                "peak_reserved": max(self.reserved, default=None),
                "rollout_seconds": round(rollout / last, 4),
                "update_seconds": round(update / last, 4),
                "rollout_tokens_per_second": round(sum(self.drawn[-last:]) / rollout, 1),
                "update_tokens_per_second": round(sum(self.learned[-last:]) / update, 1),
            }

    return Watch()


def _live_bytes() -> int:
    """Bytes of every tensor that Python can still reach."""
    import gc

    import torch

    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def judged(result: dict[str, Any]) -> dict[str, Any]:
    """The result with its errors of estimation, its growth and whether it kept its target."""
    probe = result["probe"]
    errors = {name: probe["estimate"][name] / probe[name] - 1 for name in ("rollout", "update")}
    after = result["bytes_after_steps"]
    settled = after[min(2, len(after) - 1) :]  # the optimizer's states are made in the first step
    growth = settled[-1] - settled[0]
    peak = max(probe["rollout"], probe["update"], probe.get("reserved", 0), result["peak_reserved"] or 0)
    target = result["case"]["target_gib"]
    return {
        **result,
        "errors": {name: round(error, 4) for name, error in errors.items()},
        "growth_bytes": growth,
        "estimate_ok": all(abs(error) <= TOLERANCE for error in errors.values()),
        "flat": growth <= 0.01 * settled[0],
        "within_target": target is None or peak <= target * GIB,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| case | rollout, measured | estimated | update, measured | estimated | reserved | rollout tokens/s | update tokens/s "
        "| growth over steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['case']['name']} | {result['error']} |" + " |" * 7)
            continue
        probe, errors = result["probe"], result["errors"]
        cells = [result["case"]["name"]]
        for name in ("rollout", "update"):
            cells += [_size(probe[name]), f"{_size(probe['estimate'][name])} ({errors[name]:+.1%})"]
        cells += [_size(result["peak_reserved"]) if result["peak_reserved"] else "-"]
        cells += [f"{result[f'{name}_tokens_per_second']:,.0f}" for name in ("rollout", "update")]
        cells += [f"{result['growth_bytes']:,} bytes in {len(result['bytes_after_steps'])}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def main(args: list[str] | None = None) -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--limit-gb", type=float, help="cap of the GPU's allocator, in GiB")
    parser.add_argument("--cases", help="only those whose name contains this")
    parser.add_argument(
        "--steps", type=int, help="training steps of the case that watches growth; default 50 on a CPU, 3"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/memory_<device>.json")
    parser.add_argument("--estimate", action="store_true", help="print what the published shapes need, and run nothing")
    options = parser.parse_args(args)
    if options.estimate:
        print(estimates())
        return
    steps = options.steps or (50 if options.device == "cpu" else 3)
    cases = cpu_cases(steps) if options.device == "cpu" else cuda_cases(steps)
    cases = [case for case in cases if options.cases is None or options.cases in case.name]
    if not cases:
        parser.error(f"--cases {options.cases!r}: no case has that in its name")
    results: list[dict[str, Any]] = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                results.append(judged(pool.submit(run_case, case, options.device, options.limit_gb).result()))
            except Exception as error:
                results.append({"case": asdict(case), "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
        print(table(results[-1:]).splitlines()[-1], flush=True)
    output = options.output or RESULTS / f"memory_{options.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n", encoding="utf-8")
    good = [not any(key in r and not r[key] for key in ("estimate_ok", "flat", "within_target")) for r in results]
    ok = all(good) and not any("error" in result for result in results)
    print(table(results))
    print(f"written to {output}")
    worst = max((abs(e) for r in results for e in r.get("errors", {}).values()), default=None)
    print(json.dumps({"device": options.device, "cases": len(results), "worst_estimate_error": worst, "ok": ok}))
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
