"""The model card: what was trained on what, how far, how well, and how to load it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from maestro_pl.errors import from_cell
from maestro_pl.export.base import Base
from maestro_pl.export.trained_run import TrainedRun
from maestro_pl.policy.loading import SANDBOX, resolve_model

ROLES = {
    "train": "weighed",
    "gate": "multiplies the others",
    "anchor": "never weighed",
    "metric": "measured only",
}

LOAD_ADAPTER = """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, dtype=torch.{dtype}{trust})
model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{trust})"""

LOAD_MERGED = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype=torch.{dtype}{trust}).eval()
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER"{trust})"""

ASK = """
messages = {messages}
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{kwargs})
print(tokenizer.decode(model.generate(**ids, max_new_tokens={length})[0, ids["input_ids"].shape[1] :]))"""

ASK_PLAIN = """
ids = tokenizer("Why is the sky blue?", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens={length})[0, ids["input_ids"].shape[1] :]))"""


def card(run: TrainedRun, base: Base, kind: str, dtype: str, checks: Sequence[str], tokenizer: Any) -> str:
    """The text of ``README.md``.

    Args:
        run: its config and checkpoint.
        base: what was trained.
        kind: ``adapter`` or ``merged``.
        dtype: to load it in.
        checks: sentences on what the export has compared.
        tokenizer: whose chat template the example uses, if it has one.
    """
    parts = [
        f"---\n{yaml.safe_dump(front_matter(run, base, kind), sort_keys=False)}---",
        f"# {_name(run.folder.resolve())}",
        _what(run, base, kind),
        _where(base),
        *([] if run.soup else [_rewards(run), _table(run.folder)]),  # those of one run say nothing of an average
        "## Use",
        _code(run, base, kind, dtype, tokenizer),
        _prompts(run),
        "## Export",
        "\n".join(f"- {sentence}" for sentence in checks),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(run: TrainedRun, base: Base, kind: str) -> dict[str, Any]:
    """What the hub reads."""
    method = str(run.config.get("method", "grpo"))
    tags = ["maestro", "maestro_pl", method, *([] if run.lora is None else ["lora"])]
    return {
        "base_model": base.address,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }


def _what(run: TrainedRun, base: Base, kind: str) -> str:
    lora, saved = run.lora, run.saved
    settings = saved.get("settings", {})
    made = "LoRA adapters of" if kind == "adapter" else "The model" if lora is None else "LoRA adapters merged into"
    trained = "all parameters" if lora is None else f"adapters of rank {lora.r} (alpha {lora.alpha})"
    lines = [f"{made} `{_short(base)}`, trained with [maestro_pl](https://arxiv.org/abs/2601.07208)."]
    if saved.get("module") == "SFTModule":
        how = "supervised fine-tuning on the references"
    else:
        how = f"GRPO (loss `{settings['loss.type']}`)"
    skipped = int(saved.get("skipped_steps", 0))
    steps = f"{run.steps} policy steps" + (f", of which {skipped} did not move it" if skipped else "")
    lines += ["", f"- method: {how}, {trained}, {steps}"]
    if run.soup:
        lines.append(
            "- average of runs ([rewarded soups](https://arxiv.org/abs/2306.04488)), nothing was trained after it:"
        )
        lines += [f"    - {share:.3g} of `{Path(folder).resolve().name}`" for folder, share in run.soup]
    elif "weigher" in settings:
        learns = settings["weigher"] == "Conductor"
        lines.append(f"- weigher of the rewards: `{settings['weigher']}`" + (_conductor(run) if learns else ""))
    if run.quantization is not None or base.quantized is not None:
        lines += ["", _quantized(run, base, kind)]
    return "\n".join(lines)


def _conductor(run: TrainedRun) -> str:
    settings = run.saved["settings"]
    updates = run.saved.get("conductor_updates")
    done = "" if updates is None else f", {updates} updates"
    return f", meta-signal `{settings['meta.signal']}`, learner `{settings['meta.learner']}`{done}"


def _quantized(run: TrainedRun, base: Base, kind: str) -> str:
    how = run.quantization or base.quantized
    ends = {
        "adapter": "On the 16-bit base they give slightly other probabilities; load the base quantised in the same way for "
        "those of the run.",
        "merged": "Here they stand in the 16-bit base, which gives slightly other probabilities than the run.",
    }
    return f"The adapters were trained against the quantised weights of the base (`{how}`). {ends[kind]}"


def _where(base: Base) -> str:
    if not base.is_folder:
        return ""
    return "`base_model` is a folder of the machine that trained it: give a hub id instead before you publish this."


def _rewards(run: TrainedRun) -> str:
    rewards = run.saved.get("rewards", [])
    if not rewards or run.saved.get("module") == "SFTModule":
        return ""
    config = [entry for key in ("rewards", "anchors", "metrics") for entry in run.config.get(key) or []]
    classes = [str(entry.get("class_path", "")).rpartition(".")[2] for entry in config if isinstance(entry, dict)]
    classes = classes if len(classes) == len(rewards) else [""] * len(rewards)
    rows = [
        f"| {name} | {made} | {role} ({ROLES.get(role, role)}) | {normalize} |"
        for (name, role, normalize, *_), made in zip(rewards, classes, strict=True)
    ]
    return "\n".join(["| reward | class | role | normalised |", "|---|---|---|---|", *rows])


def _table(folder: Path) -> str:
    """The run's evaluation: before and after where it has both, else its last test or validation."""
    if rows := _read(folder / "before_after.csv"):
        return "\n".join(
            [
                "Evaluation before training and at the end of the run (95 % intervals, bootstrap over prompts):",
                "",
                "| task | metric | before | after | prompts |",
                "|---|---|---|---|---|",
                *(
                    f"| {r['task']} | {r['metric']} | {_cell(r, 'before')} | {_cell(r, 'after')} | {r['after_n']} |"
                    for r in _shown(rows)
                ),
            ]
        )
    for name, split in (("test_metrics", "test"), ("val_metrics", "validation")):
        files = sorted(folder.glob(f"{name}*.csv"), key=lambda path: path.stat().st_mtime)
        if files and (rows := _read(files[-1])):
            last = [row for row in rows if row["step"] == rows[-1]["step"]]
            return "\n".join(
                [
                    f"Evaluation on the {split} split at step {rows[-1]['step']} (95 % intervals, bootstrap over prompts):",
                    "",
                    "| task | metric | mean | prompts |",
                    "|---|---|---|---|",
                    *(f"| {r['task']} | {r['metric']} | {_cell(r, '')} | {r['n']} |" for r in _shown(last)),
                ]
            )
    return ""


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: from_cell(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _shown(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without what a reward counts besides its score."""
    return [row for row in rows if not (row["metric"].startswith("reward/") and row["metric"].count("/") > 1)]


def _cell(row: dict[str, str], side: str) -> str:
    mean, low, high = (row.get(f"{side}{end}" if side else name) for end, name in _COLUMNS)
    return "-" if not mean or not low or not high else f"{float(mean):.3f} [{float(low):.3f}, {float(high):.3f}]"


_COLUMNS = (("", "mean"), ("_low", "low"), ("_high", "high"))


def _code(run: TrainedRun, base: Base, kind: str, dtype: str, tokenizer: Any) -> str:
    trust = ", trust_remote_code=True" if base.trust_remote_code else ""
    text = (LOAD_ADAPTER if kind == "adapter" else LOAD_MERGED).format(
        base=json.dumps(base.address), dtype=dtype, trust=trust
    )
    length = int((run.config.get("rollout") or {}).get("max_new_tokens") or 256)
    if getattr(tokenizer, "chat_template", None):
        data = run.config.get("data") or {}
        system = data.get("system_prompt")
        asked = [{"role": "system", "content": system}] if system else []
        asked.append({"role": "user", "content": "Why is the sky blue?"})
        kwargs = "".join(f", {key}={value!r}" for key, value in (data.get("chat_template_kwargs") or {}).items())
        text += "\n" + ASK.format(messages=json.dumps(asked, ensure_ascii=False), kwargs=kwargs, length=length)
    else:
        text += "\n" + ASK_PLAIN.format(length=length)
    return f"```python\n{text}\n```"


def _prompts(run: TrainedRun) -> str:
    rollout = run.config.get("rollout") or {}
    if run.saved.get("module") == "SFTModule" or not rollout:
        return ""
    return (
        f"Responses were sampled at temperature {rollout.get('temperature', 1.0)} with at most "
        f"{rollout.get('max_new_tokens')} tokens."
    )


def _name(folder: Path) -> str:
    """``quickstart`` for runs/quickstart/version_0."""
    return folder.parent.name if folder.name.startswith("version_") else folder.name


def _short(base: Base) -> str:
    if base.name == resolve_model(SANDBOX):
        return SANDBOX
    return Path(base.name).name if base.is_folder else base.name
