"""Tokens a second of the rollout engines: native, hf, and vLLM where it is installed.

    python -m benchmarks.engines --model sandbox --rows 8 32 128
    .venv-vllm/bin/python -m benchmarks.engines --model HuggingFaceTB/SmolLM2-135M-Instruct --dtype bfloat16

The engines take turns, so that a machine that is busy for a while is busy for all of them; no response ends early. Where other
work runs beside it, processor time (of one thread: ``OMP_NUM_THREADS=1``) tells more than the clock; on a GPU it tells nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from maestro_pl import LoRA, LoRAPolicy, VLLMEngine
from maestro_pl.generation import HFEngine, NativeEngine, Sampling

RESULTS = Path(__file__).parent / "results"
GROUP = 8


def measure(
    policy: LoRAPolicy, engines: dict[str, Any], rows: int, prompt: int, new: int, repeats: int
) -> list[dict[str, Any]]:
    """One record an engine: tokens a second, and a second of processor time, of every repeat after one that is not counted.

    Args:
        policy: what is sampled from.
        engines: by name.
        rows: responses at once, in groups of 8.
        prompt: tokens of a prompt.
        new: tokens of every response.
        repeats: turns of each engine.
    """
    draws = torch.Generator().manual_seed(rows)
    vocabulary = policy.base_model.get_input_embeddings().weight.shape[0]
    prompts = torch.randint(vocabulary, (-(-rows // GROUP), prompt), generator=draws).tolist()
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            asked = Sampling(max_new_tokens=new, min_new_tokens=new, seed=turn)
            begin, worked = time.perf_counter(), time.process_time()
            made = engine.generate(policy, prompts, min(rows, GROUP), asked)
            tokens = sum(map(len, made.response_ids))
            if turn:
                rates[name].append((tokens / (time.perf_counter() - begin), tokens / (time.process_time() - worked)))
    return [
        {
            "engine": name,
            "rows": rows,
            "tokens_per_s": [by for by, _ in both],
            "tokens_per_cpu_s": [by for _, by in both],
        }
        for name, both in rates.items()
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: the median of each, and the least and the most."""
    lines = ["| rows | engine | tokens a second | tokens a second of processor time |", "|---|---|---|---|"]
    for record in records:
        told = (
            f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            for rates in (record["tokens_per_s"], record["tokens_per_cpu_s"])
        )
        lines.append(f"| {record['rows']} | {record['engine']} | {' | '.join(told)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sandbox")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, default=RESULTS / f"engines_{device}.json")
    given = parser.parse_args(arguments)
    model = given.model if given.model == "sandbox" else str(Path(given.model).expanduser())
    policy = LoRAPolicy(model, dtype=given.dtype, lora=LoRA(r=16)).to(device).eval()
    engines: dict[str, Any] = {"native": NativeEngine(), "hf": HFEngine()}
    if device == "cuda":  # where native's cache is static and its steps are captured
        engines["native, growing"] = NativeEngine(cache="growing")
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here, and is left out: `make test-vllm` makes an environment that has it.")
    else:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # bound, the other engines' threads would be too
        engines["vllm"] = VLLMEngine(
            max_model_len=given.prompt + given.new, enforce_eager=not torch.cuda.is_available()
        )
    told = {key: value for key, value in vars(given).items() if key != "out"} | {"model": Path(given.model).name}
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],  # runnable processes before it begins
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for rows in given.rows:
        records += measure(policy, engines, rows, given.prompt, given.new, given.repeats)
        print(table(records[-len(engines) :]), flush=True)
        text = json.dumps({**told, "machine": machine, "records": records}, indent=1)
        given.out.write_text(text + "\n", encoding="utf-8")
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
