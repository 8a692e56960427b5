"""Torn files, a full disk and folders that cannot be written."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.child import Child, Ended, command, run
from benchmarks.faults.runs import (
    FIT,
    RUN,
    check_kept,
    check_same,
    config,
    finish,
    metric_rows,
    uninterrupted,
    versions,
    write,
)
from benchmarks.faults.trial import Fault, NotHeld, Trial

NOBODY = 65534  # the superuser may write everywhere


def tear(path: Path, draw: random.Random) -> str:
    """Cut a file short, empty it, or change one byte of it; what was done."""
    content = bytearray(path.read_bytes())
    how = draw.choice(("cut", "emptied", "flipped", "flipped"))
    if how == "cut":
        content = content[: draw.randrange(len(content))]
    elif how == "emptied":
        content = bytearray()
    else:
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        how += f" at {place} of {len(content)}"
    path.write_bytes(content)
    return f"{path.name} {how}"


def expect_sentence(ended: Ended, what: str, statuses: tuple[int, ...] = (1, 2)) -> None:
    """Raise unless a command ended in a sentence.

    Raises:
        NotHeld: it ended otherwise.
    """
    if ended.is_bug or ended.status not in statuses or not ended.sentence:
        raise NotHeld(f"{what}: no sentence but {ended.tail()}")


def torn_last(trial: Trial) -> None:
    """A torn ``last.ckpt``: ``--ckpt_path last`` goes on from the newest whole one; by its path it is refused."""
    reference = uninterrupted(trial, "whole-plain", config())
    folder = trial.folder / "run"
    shutil.copytree(reference, folder)
    (whole,) = versions(folder)
    last = whole / "checkpoints/last.ckpt"
    what = tear(last, trial.random)
    more = ["--trainer.max_steps", "5"]
    named = run(folder, [*FIT, "--ckpt_path", str(last), *more])
    if named.status:  # a changed byte between the entries of the archive changes nothing
        trial.counts["refused by its path"] += 1
        expect_sentence(named, f"{what}, by its path", (2,))
    else:
        trial.counts["a byte that means nothing"] += 1
    newest = run(folder, [*FIT, "--ckpt_path", "last", *more])
    trial.require(newest.status == 0, f"{what}: `--ckpt_path last` ended with {newest.tail()}")
    trial.require(bool(named.status == 0) or "takes" in newest.said, f"{what}: not said: {newest.tail()}")
    expected = run_on(trial, reference)
    got = torch.load(versions(folder)[-1] / "checkpoints/last.ckpt", weights_only=True)
    same = all(torch.equal(got["state_dict"][name], value) for name, value in expected["state_dict"].items())
    trial.require(same, f"{what}: the run that went on from the newest whole checkpoint is another one")


def run_on(trial: Trial, reference: Path) -> dict[str, Any]:
    """What the uninterrupted run comes to one step later, made once."""
    folder = trial.shared / "one-more"
    if not folder.is_dir():
        shutil.copytree(reference, folder)
        ended = run(folder, [*FIT, "--ckpt_path", "last", "--trainer.max_steps", "5"])
        if ended.status:
            raise NotHeld(f"one more step ended with {ended.tail()}")
    content: dict[str, Any] = torch.load(versions(folder)[-1] / "checkpoints/last.ckpt", weights_only=True)
    return content


def torn_all(trial: Trial) -> None:
    """Every checkpoint is torn: a sentence, before anything is trained."""
    reference = uninterrupted(trial, "whole-plain", config())
    folder = trial.folder / "run"
    shutil.copytree(reference, folder)
    for path in folder.rglob("*.ckpt"):
        content = path.read_bytes()
        path.write_bytes(content[: trial.random.randrange(len(content))])
    ended = run(folder, [*FIT, "--ckpt_path", "last", "--trainer.max_steps", "5"])
    expect_sentence(ended, "every checkpoint cut", (2,))


def missing_entry(trial: Trial) -> None:
    """A checkpoint that lacks an entry, as one of another version may: a sentence, or the run goes on."""
    reference = uninterrupted(trial, "whole-plain", config())
    folder = trial.folder / "run"
    shutil.copytree(reference, folder)
    path = versions(folder)[0] / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    places = [(content, name) for name in content]
    places += [(content["maestro"], name) for name in content["maestro"]]
    places += [(content["state_dict"], name) for name in content["state_dict"]]
    place, name = places[trial.random.randrange(len(places))]
    del place[name]
    torch.save(content, path)
    ended = run(folder, [*FIT, "--ckpt_path", str(path), "--trainer.max_steps", "5"])
    trial.counts["went on" if ended.status == 0 else "refused"] += 1
    if ended.status:
        expect_sentence(ended, f"without {name}")


def torn_rows(trial: Trial) -> None:
    """Torn ``metrics.csv``, ``rollouts.jsonl``, ``weights.csv`` or ``config.yaml`` of a run: going on from it is the same."""
    reference = uninterrupted(trial, "whole-plain", config())
    folder = trial.folder / "run"
    shutil.copytree(reference, folder)
    (whole,) = versions(folder)
    names = ("metrics.csv", "rollouts.jsonl", "weights.csv", "config.yaml")
    what = tear(whole / trial.random.choice(names), trial.random)
    ended = run(folder, [*FIT, "--ckpt_path", "last", "--trainer.max_steps", "5"])
    trial.require(ended.status == 0, f"{what}: going on ended with {ended.tail()}")
    expected = run_on(trial, reference)
    got = torch.load(versions(folder)[-1] / "checkpoints/last.ckpt", weights_only=True)
    same = all(torch.equal(got["state_dict"][name], value) for name, value in expected["state_dict"].items())
    trial.require(same, f"{what}: the run that went on is another one")


def torn_labels(trial: Trial) -> None:
    """Torn files of labels and of data: the run starts with what can be read, or ends in a sentence before it does."""
    content = config(
        anchors=[{"class_path": "callbacks.LabelFileReward", "init_args": {"file": "labels.jsonl"}}],
        **{"trainer.max_steps": 1, "data.sources": "data.jsonl", "data.fractions": [0.5, 0.25, 0.25]},
    )
    folder = trial.folder / "run"
    write(folder, content)
    rows = "".join(f'{{"prompt": "Say {i}", "response": "word {i}", "score": {i % 3}}}\n' for i in range(20))
    (folder / "labels.jsonl").write_text(rows, encoding="utf-8")
    (folder / "data.jsonl").write_text(rows, encoding="utf-8")
    what = tear(folder / trial.random.choice(("labels.jsonl", "data.jsonl")), trial.random)
    ended = run(folder, FIT)
    trial.counts["read" if ended.status == 0 else "refused"] += 1
    if ended.status:
        expect_sentence(ended, what, (2,))


# -- disks and folders -----------------------------------------------------------------------------------------------


def full_disk(trial: Trial) -> None:
    """The disk of the run fills up at some moment: a sentence, whole files only, and going on when there is room."""
    reference = uninterrupted(trial, "whole-plain", config())
    folder = trial.folder / "run"
    write(folder, config())
    used = sum(path.stat().st_size for path in (reference / RUN).rglob("*") if path.is_file())
    size = trial.random.randrange(used // 20, used)
    place = folder / "runs"
    place.mkdir()
    if mounted(place, size):
        try:
            ended = run(folder, FIT)
            hurt(trial, folder, ended, f"a disk of {size} bytes")
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            finish_after(reference, folder)
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)
        trial.counts["on a tmpfs"] += 1
        return
    largest = max(path.stat().st_size for path in (reference / RUN).rglob("*.ckpt"))
    limit = trial.random.randrange(largest // 20, largest)
    ended = run(folder, FIT, lambda: limit_files(limit))
    hurt(trial, folder, ended, f"files of at most {limit} bytes")
    finish_after(reference, folder)
    trial.counts["by RLIMIT_FSIZE"] += 1


def hurt(trial: Trial, folder: Path, ended: Ended, what: str) -> None:
    """Raise unless a run on a disk that is too small has ended as it should."""
    if ended.status:
        expect_sentence(ended, what)
        trial.counts["ended in a sentence"] += 1
    else:
        trial.counts["done in spite of it"] += 1
    check_kept(folder)
    for path in folder.rglob("*.partial"):
        raise NotHeld(f"{what}: {path.name} was left behind")


def finish_after(reference: Path, folder: Path) -> None:
    """Go on where there is room again; tensors must be those of the uninterrupted run, and no row another one."""
    expected = metric_rows(versions(reference)[0] / "metrics.csv")
    for part in versions(folder):
        rows = metric_rows(part / "metrics.csv")
        if rows[:-1] != expected[: len(rows[:-1])]:  # the last one may be cut off
            raise NotHeld("metrics.csv holds rows that are not the uninterrupted run's")
    finish(folder)
    check_same(reference, folder, rows=False)


def mounted(place: Path, size: int) -> bool:
    """Put a small file system there, where this user may."""
    if os.geteuid():
        return False
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    return done.returncode == 0


def limit_files(size: int) -> None:
    """Called in a child: no file becomes larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only(trial: Trial) -> None:
    """The run's folder cannot be written, from the start or from some save on: a sentence that says what is kept."""
    reference = uninterrupted(trial, "whole-plain", config())
    folder = trial.folder / "run"
    write(folder, config())
    user = None if os.geteuid() else NOBODY
    trial.folder.chmod(0o755)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user if user is not None else -1, -1)
    saves = trial.random.randrange(4)
    if not saves:
        (folder / "runs").mkdir()
        (folder / "runs").chmod(0o555)
        ended = run(folder, FIT, user=user)
        expect_sentence(ended, "read-only from the start", (2,))
        trial.require("cannot be written" in ended.sentence, f"not said what is wrong: {ended.tail()}")
        return
    child = Child(folder, command(FIT), user)
    child.listen(until=lambda: child.count("saved") >= saves)
    places = [path for path in (folder / RUN).rglob("*") if path.is_dir()]
    for path in places:
        path.chmod(0o555)
    ended = child.wait()
    for path in places:
        path.chmod(0o755)
    if ended.status:
        expect_sentence(ended, f"read-only from save {saves} on", (1,))
        trial.require("--ckpt_path" in ended.said, f"not said what is kept: {ended.tail()}")
    check_kept(folder)
    finish(folder)
    check_same(reference, folder, rows=False)


FAULTS = [
    Fault("torn-last", "a torn last.ckpt is refused by its path, and `last` takes the newest whole one", torn_last),
    Fault("torn-all", "where every checkpoint is torn, going on ends in a sentence", torn_all, share=0.25),
    Fault("torn-entry", "a checkpoint that lacks an entry is refused in a sentence, or goes on", missing_entry),
    Fault("torn-rows", "torn tables and records of a run change nothing of the run that goes on from it", torn_rows),
    Fault("torn-labels", "torn labels and data are read, or refused in a sentence before the run", torn_labels),
    Fault("full-disk", "a disk that fills up ends the run in a sentence; files are whole; it goes on later", full_disk),
    Fault("read-only", "a folder that cannot be written ends the run in a sentence that says what is kept", read_only),
]
