"""The small runs of the campaign, and how two of them are compared."""

from __future__ import annotations

import csv
import json
import zlib
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from benchmarks.faults.child import run
from benchmarks.faults.trial import NotHeld, Trial
from maestro_pl.errors import UserError
from maestro_pl.training.checkpointing import check_file

STEPS, WARMUP = 4, 2
RUN = Path("runs/run")  # under the folder of a trial
JUDGE = {"default": {"mode": "score", "scale": [0, 10], "prompt": "{prompt}|{answer}"}}


def config(**changes: Any) -> dict[str, Any]:
    """The sandbox over a few steps: a Conductor with a warm-up, an anchor, and a checkpoint after each step.

    Args:
        changes: dotted keys to values; one that ends in ``+`` is appended to.
    """
    content: dict[str, Any] = {
        "model": {
            "policy": {"model": "sandbox", "dtype": "float32", "lora": {"r": 4, "dropout": 0.1}},
            "weigher": {
                "class_path": "maestro_pl.Conductor",
                "init_args": {"action": "soft", "context": "prompt", "norm": "center"},
            },
            "meta": {"signal": "maestro_pl.AnchorSignal", "learner": "ridge", "every": 1, "warmup": WARMUP},
            "anchoring": {"fraction": 0.25},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "scheduler": {"decay": "cosine"},
        },
        "data": {"sources": [{"path": "sandbox"}], "batch_size": 2, "show": False},
        "rollout": {"group_size": 4, "eval_group_size": 1, "max_new_tokens": 24},
        "rewards": [
            {"class_path": "callbacks.FormatReward", "init_args": {"normalize": "zscore"}},
            {"class_path": "callbacks.LengthReward", "init_args": {"min": 8, "max": 16, "normalize": "zscore"}},
            {
                "class_path": "callbacks.FunctionReward",
                "init_args": {
                    "name": "drawing",
                    "function": "benchmarks.faults.rewards.drawing",
                    "normalize": "zscore",
                },
            },
        ],
        "anchors": [
            {
                "class_path": "callbacks.FunctionReward",
                "init_args": {"name": "anchor", "function": "maestro_pl.sandbox.noisy_utility"},
            }
        ],
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "limit_val_batches": 0,
            "callbacks": [
                {"class_path": "callbacks.RunCheckpoint", "init_args": {"every_n_train_steps": 1}},
                {"class_path": "callbacks.ResponseRecorder", "init_args": {"every_n_steps": 1}},
            ],
        },
    }
    for key, value in changes.items():
        *parents, name = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        if name.endswith("+"):
            place[name[:-1]] = [*place.get(name[:-1], []), value]
        else:
            place[name] = value
    return content


def judged(url: str) -> dict[str, Any]:
    """A reward that asks the server of the campaign and keeps its replies."""
    options = {"model": "m", "endpoint": url, "prompts": "prompts.yaml", "cache": "judge.sqlite", "normalize": "zscore"}
    return {"class_path": "callbacks.JudgeReward", "init_args": options}


def verdict(body: dict[str, Any]) -> str:
    """What the campaign's judge says: the same of the same question."""
    return f"Score: {zlib.crc32(json.dumps(body['messages']).encode()) % 11}"


def write(folder: Path, content: dict[str, Any]) -> None:
    """Write ``run.yaml`` and the judge's prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    (folder / "prompts.yaml").write_text(yaml.safe_dump(JUDGE), encoding="utf-8")


FIT = ["fit", "--config", "run.yaml"]


def uninterrupted(trial: Trial, name: str, content: dict[str, Any]) -> Path:
    """The folder of a run that nothing happens to, made once a campaign; its events are beside it."""
    folder = trial.shared / name
    if not (folder / "events.json").is_file():
        write(folder, content)
        ended = run(folder, FIT)
        if ended.status:
            raise NotHeld(f"the run that nothing happens to ended with {ended.tail()}")
        (folder / "events.json").write_text(json.dumps(ended.events), encoding="utf-8")
    return folder


def versions(folder: Path) -> list[Path]:
    """The runs in a trial's folder, the first first."""
    return sorted((folder / RUN).glob("version_*"), key=lambda path: int(path.name.rpartition("_")[2]))


def finish(folder: Path, limit: int = 5) -> None:
    """Go on until the run is done: from its newest checkpoint, or anew where nothing was saved yet.

    Raises:
        NotHeld: going on ends in an error.
    """
    for _ in range(limit):
        saved = list((folder / RUN).glob("*/checkpoints/*.ckpt"))
        ended = run(folder, [*FIT, *(["--ckpt_path", "last"] if saved else [])])
        if ended.status == 0:
            return
        raise NotHeld(f"going on {'from a checkpoint' if saved else 'anew'} ended with {ended.tail()}")


def check_same(reference: Path, folder: Path, rows: bool = True) -> None:
    """Raise unless the runs in ``folder`` come to what the uninterrupted one came to, bit for bit.

    The last checkpoint must hold the same tensors and counters, and the rows of ``metrics.csv`` and ``rollouts.jsonl``
    must be those of the uninterrupted run: of a run that was cut off its first ones, of the last run its last ones.

    Args:
        reference: the folder of the uninterrupted run.
        folder: of the runs that were cut off and went on.
        rows: whether the rows are compared too.

    Raises:
        NotHeld: naming the first difference.
    """
    (whole,), parts = versions(reference), versions(folder)
    expected, got = (state_of(path / "checkpoints/last.ckpt") for path in (whole, parts[-1]))
    if difference := differs(expected, got):
        raise NotHeld(f"the last checkpoint differs from the uninterrupted run's: {difference}")
    for name, read in (("metrics.csv", metric_rows), ("rollouts.jsonl", rollout_rows)) if rows else ():
        expected_rows, reached = read(whole / name), 0
        for number, part in enumerate(parts):
            own = read(part / name)
            last = number == len(parts) - 1
            begin = len(expected_rows) - len(own) if last else _begin(expected_rows, own, reached)
            if begin > reached or expected_rows[begin : begin + len(own)] != own:
                raise NotHeld(
                    f"the rows of {part.name}/{name} are not those of the uninterrupted run ({len(own)} rows of "
                    f"{len(expected_rows)}, {reached} known before): {_first_difference(expected_rows[max(begin, 0) :], own)}"
                )
            reached = max(reached, begin + len(own))
        if reached < len(expected_rows):
            raise NotHeld(
                f"{name}: {len(expected_rows) - reached} rows of the uninterrupted run are in none of the parts"
            )


def _begin(rows: list[Any], own: list[Any], reached: int) -> int:
    """Where the rows of a part stand among the whole run's."""
    return next((i for i in range(reached, -1, -1) if own and rows[i : i + len(own)] == own), 0)


def _first_difference(rows: list[Any], own: list[Any]) -> str:
    for expected, got in zip(rows, own, strict=False):
        if expected != got:
            keys = [key for key in {**expected, **got} if expected.get(key) != got.get(key)]
            return f"{keys[0]} is {got.get(keys[0])!r}, was {expected.get(keys[0])!r}"
    return "more rows than the run has"


def metric_rows(path: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without what a clock or a cache has measured; an absent value is no key."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = ("time/", "judge/requests", "judge/cached", "judge/tokens")
    return [{k: v for k, v in row.items() if k and v and not k.startswith(measured)} for row in rows]


def rollout_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of ``rollouts.jsonl``; the last line of a killed run may be half."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def state_of(path: Path) -> dict[str, Any]:
    """What must be the same in two checkpoints of one run."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    kept = {name: saved[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    return {**kept, "maestro": {k: v for k, v in saved["maestro"].items() if k != "config"}}


def differs(one: Any, other: Any, path: str = "") -> str:
    """Where two plain values differ, bit for bit; nothing where they do not."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return "" if one.shape == other.shape and torch.equal(one, other) else path
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{path}: keys {sorted(map(str, one.keys() ^ other.keys()))}"
        return next((found for key in one if (found := differs(one[key], other[key], f"{path}.{key}"))), "")
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return f"{path}: {len(other)} entries, not {len(one)}"
        pairs = enumerate(zip(one, other, strict=True))
        return next((found for i, (a, b) in pairs if (found := differs(a, b, f"{path}.{i}"))), "")
    return "" if one == other else f"{path}: {other!r}, not {one!r}"


def check_kept(folder: Path) -> None:
    """Raise unless every file that has a checkpoint's name is a whole one of finite numbers.

    Raises:
        NotHeld: naming the file.
    """
    for path in folder.rglob("*.ckpt"):
        try:
            check_file(str(path), resume=True)
        except UserError as error:
            raise NotHeld(f"a file that is no whole checkpoint has its name: {error}") from error
        state = state_of(path)
        for name, value in _tensors(state):
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise NotHeld(f"{path.name} holds a number that is not finite: {name}")


def _tensors(value: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return [found for key, entry in pairs for found in _tensors(entry, f"{path}.{key}")]
