"""Malformed files into every reader: each is read, or refused in a sentence, within seconds."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import sqlite3
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.faults.child import Child, limit_memory, tell
from benchmarks.faults.runs import JUDGE, config, uninterrupted, versions
from benchmarks.faults.trial import Fault, NotHeld, Trial
from maestro_pl.errors import UserError

INPUTS = 40  # malformed files a trial
EACH_S = 20.0  # that one may take, on a loaded machine
GIB = 8.0  # that a reader may take in all, libraries included
ROWS = [
    {"prompt": f"Say {i}", "response": "ä word", "reference": str(i), "score": i / 2, "task": "t"} for i in range(6)
]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PIECES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"[" * 300, b'"', b"\n", b",,,", b"\\ud800", b"NaN", b"1e999", b"&a *a ",
    b"\r",
)  # fmt: skip


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A file with one to three accidents: cut, bytes changed, dropped, doubled, put in, or nothing but noise."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        place = draw.randrange(len(found) + 1)
        length = draw.randint(1, 1 + len(found) // 4)
        match draw.randrange(7):
            case 0:
                found = found[:place]
            case 1 | 2:
                for _ in range(draw.randint(1, 8)):
                    if found:
                        found[draw.randrange(len(found))] = draw.randrange(256)
            case 3:
                del found[place : place + length]
            case 4:
                found[place:place] = found[place : place + length]
            case 5:
                found[place:place] = draw.choice(PIECES)
            case _:
                found = bytearray(draw.randbytes(length)) if draw.random() < 0.2 else found + found[:length]
    return bytes(found)


def rows_of(name: str) -> Callable[[Path, Path], None]:
    """The reader of data files."""

    def read(path: Path, home: Path) -> None:
        from maestro_pl.data.problems import Problems
        from maestro_pl.data.readers import read_file

        problems = Problems("cannot be used", "Mend them.")
        rows = read_file(path, problems)
        problems.settle("error", len(rows) + len(problems))
        json.dumps([values for _, values in rows], ensure_ascii=False, default=str).encode()

    return read


def yaml_file(path: Path, home: Path) -> None:
    """The reader of every YAML file."""
    from maestro_pl.run.yaml_files import read_yaml

    read_yaml(path, str(path))


def prompts_file(path: Path, home: Path) -> None:
    """The judge's prompts."""
    from maestro_pl.evaluation.judge import load_prompts

    load_prompts(str(path))


def checkpoint(path: Path, home: Path) -> None:
    """What is asked of a checkpoint before a run goes on from it, and all of its tensors."""
    from maestro_pl.training.checkpointing import check_file, config_of
    from maestro_pl.training.saving import WholeFileIO

    check_file(str(path), resume=True)
    config_of(str(path))
    WholeFileIO().load_checkpoint(str(path), map_location="cpu", weights_only=True)


def weights(path: Path, home: Path) -> None:
    """A policy from a model's folder with this file in it."""
    from maestro_pl.policy.policy import LoRAPolicy

    shutil.copy(path, home / path.name)
    LoRAPolicy(str(home), dtype="float32", lora=None)


def cache(path: Path, home: Path) -> None:
    """The judge's replies."""
    from maestro_pl.evaluation.judge import JudgeCache

    kept = JudgeCache(str(path))
    for key in ("a", "b", "z"):
        reply = kept.get(key)
        assert reply is None or isinstance(reply, str)
        kept.put(f"{key}2", "x")
    kept.close()


def labels(path: Path, home: Path) -> None:
    """Labels of people."""
    from maestro_pl.rewards.labels import read_labels

    for label in read_labels(path).values():
        assert abs(label.score) < float("inf")


def values(path: Path, home: Path) -> None:
    """What ``compare`` reads of an evaluation."""
    from maestro_pl.evaluation.compare_runs import read_records

    (home / "test_prompts.json").write_text('{"prompts": {"k": "Say"}}', encoding="utf-8")
    (home / "test_prompts.csv").write_bytes(path.read_bytes())
    read_records(home / "test_prompts.csv")


def progress(path: Path, home: Path) -> None:
    """What an experiment reads of a cell."""
    from maestro_pl.experiment.cell import CellFolder
    from maestro_pl.experiment.grid import read_grid

    (home / "grid.yaml").write_text("{name: g, stages: [fit], axes: {seed: [0]}}", encoding="utf-8")
    (home / "progress.json").write_bytes(path.read_bytes())
    folder = CellFolder(home, read_grid(home / "grid.yaml").cells[0])
    folder.state()
    folder.left()


def records(path: Path, home: Path) -> None:
    """The responses that an export compares the model's probabilities on."""
    from maestro_pl.export.check import _recorded

    _recorded(path)


def parquet_bytes() -> bytes:
    """A small Parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    return bytes(buffer.getvalue())


def sqlite_bytes(folder: Path) -> bytes:
    """A small cache of replies."""
    path = folder / "sound.sqlite"
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE judge_replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID")
        connection.executemany("INSERT INTO judge_replies VALUES (?, ?)", [("a", "Score: 1"), ("b", "Score: 2")])
    connection.close()
    return path.read_bytes()


def sandbox_file(name: str) -> Callable[[Trial], bytes]:
    """A file of the sandbox's policy."""

    def content(trial: Trial) -> bytes:
        from maestro_pl.run.paths import sandbox_model

        return (sandbox_model("policy") / name).read_bytes()

    return content


def whole_checkpoint(trial: Trial) -> bytes:
    """The last checkpoint of the run that nothing happens to."""
    (whole,) = versions(uninterrupted(trial, "whole-plain", config()))
    return (whole / "checkpoints/last.ckpt").read_bytes()


def as_text(content: bytes) -> Callable[[Trial], bytes]:
    """Content that is the same in every trial."""
    return lambda trial: content


CSV = b"prompt,response,reference,score,task\n" + b"".join(
    f'Say {i},"a, ""word""",{i},{i / 2},t\n'.encode() for i in range(6)
)
VALUES = b"prompt,task,metric,value\nk,t,reward/x,0.5\nl,t,reward/x,0.7\nk,t,reward/y,nan\n"
PROGRESS = b'{"cell": "seed0", "digest": "x", "stages": [{"stage": "fit", "outcome": "done"}]}'
#: Name to the name of the file, its sound content, and what reads it.
READERS: dict[str, tuple[str, Callable[[Trial], bytes], Callable[[Path, Path], None]]] = {
    "yaml": ("a.yaml", as_text(json.dumps(config()).replace("}, ", "},\n ").encode()), yaml_file),
    "prompts": ("a.yaml", as_text(json.dumps(JUDGE).encode()), prompts_file),
    "jsonl": ("a.jsonl", as_text(TEXT), rows_of("jsonl")),
    "json": ("a.json", as_text(json.dumps(ROWS, ensure_ascii=False).encode()), rows_of("json")),
    "csv": ("a.csv", as_text(CSV), rows_of("csv")),
    "gz": ("a.jsonl.gz", as_text(gzip.compress(TEXT, mtime=0)), rows_of("gz")),
    "parquet": ("a.parquet", lambda trial: parquet_bytes(), rows_of("parquet")),
    "labels": ("a.jsonl", as_text(TEXT), labels),
    "checkpoint": ("a.ckpt", whole_checkpoint, checkpoint),
    "safetensors": ("model.safetensors", sandbox_file("model.safetensors"), weights),
    "model-config": ("config.json", sandbox_file("config.json"), weights),
    "tokenizer": ("tokenizer.json", sandbox_file("tokenizer.json"), weights),
    "sqlite": ("a.sqlite", lambda trial: sqlite_bytes(trial.folder), cache),
    "values": ("a.csv", as_text(VALUES), values),
    "progress": ("a.json", as_text(PROGRESS), progress),
    "records": ("a.jsonl", as_text(TEXT), records),
}  # fmt: skip


def reads(name: str) -> Callable[[Trial], None]:
    """A trial that gives one reader many malformed files, in a child, because a library may crash on one."""
    file, content, read = READERS[name]

    def trial(trial: Trial) -> None:
        from maestro_pl.run.paths import sandbox_model

        sound, home = content(trial), trial.folder / "home"
        if read is weights:
            shutil.copytree(sandbox_model("policy"), home)
        home.mkdir(exist_ok=True)
        count = INPUTS // 4 if read in (weights, checkpoint) else INPUTS
        inputs = trial.folder / "inputs"
        inputs.mkdir()
        (inputs / "0").write_bytes(sound)
        for number in range(1, count):
            (inputs / str(number)).write_bytes(mutated(sound, trial.random))

        def work() -> None:
            limit_memory(GIB)
            warnings.simplefilter("ignore")
            torch.set_num_threads(1)
            for number in range(count):
                tell(f"begun {number}")
                tell(f"{_outcome(read, inputs / str(number), home, trial.folder / file)} {number}")

        child = Child(trial.folder, work)
        ended = child.wait(EACH_S * count)
        outcomes = Counter(event.split()[0] for _, event in ended.events)
        trial.counts.update(
            inputs=outcomes["begun"], read=outcomes["read"], refused=outcomes["refused"], failed=outcomes["begun"]
            - outcomes["read"] - outcomes["refused"],
        )  # fmt: skip
        if ended.status:
            raise NotHeld(f"input {ended.events[-1][1] if ended.events else '?'}: {ended.tail()}")
        pairs = zip(ended.events[::2], ended.events[1::2], strict=True)
        slow = [event for (begun, _), (end, event) in pairs if end - begun > EACH_S]
        trial.require(not slow, f"it took more than {EACH_S:g} s: {slow}")
        if outcomes["raised"]:
            raise NotHeld(
                f"{outcomes['raised']} of {count} inputs ended in a traceback; the last: {ended.said[-1500:]}"
            )
        trial.require(ended.events[1][1].startswith("read"), f"the sound file is not read: {ended.tail()}")

    return trial


def _outcome(read: Callable[[Path, Path], None], source: Path, home: Path, target: Path) -> str:
    """``read``, ``refused`` (in a sentence) or ``raised``."""
    shutil.copy(source, target)
    for extra in ("-wal", "-journal", "-shm"):
        target.with_name(target.name + extra).unlink(missing_ok=True)
    begun = time.monotonic()
    try:
        read(target, home)
    except UserError as error:
        if len(str(error)) > 4000:
            print(f"{source.name}: a sentence of {len(str(error))} characters: {str(error)[:300]}", flush=True)
            return "raised"
        return "refused"
    except BaseException:
        print(f"{source.name} after {time.monotonic() - begun:.1f} s", traceback.format_exc(limit=-5), flush=True)
        return "raised"
    return "read"


FAULTS = [
    Fault(f"fuzz-{name}", f"{INPUTS} malformed files ({name}) a seed are read, or refused in a sentence", reads(name))
    for name in READERS
]
