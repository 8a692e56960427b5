"""``maestro-pl experiment``: what a file asks for, and a scheduler that is cut off, fails, shares and resumes.

Most runs are of a stand-in for ``maestro-pl``: a script that writes what the scheduler looks at.
"""

from __future__ import annotations

import csv
import datetime
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_pl.cli.compare import compare
from maestro_pl.cli.experiment import _compare, _summary, experiment, out_file
from maestro_pl.cli.resolve import resolve_config
from maestro_pl.errors import RunStopped, UserError
from maestro_pl.experiment.cell import CellFolder, last_lines
from maestro_pl.experiment.grid import Cell, Grid, parse_shard, read_grid
from maestro_pl.experiment.lock import CellLock, holder
from maestro_pl.experiment.schedule import _reason, devices, duration, shares

# writes checkpoints and per-prompt values; fails, hangs or is slow where a file in its working folder says so
STAND_IN = """
import json, os, pathlib, signal, sys, time, zipfile
stage, options = sys.argv[1], dict(a.split("=", 1) for a in sys.argv[2:] if "=" in a)
folder = pathlib.Path(options["--trainer.logger.save_dir"], options["--trainer.logger.version"])
cell = folder.parent.name
folder.mkdir()
checkpoint = options.get("--ckpt_path", "")
with open("calls.txt", "a") as file:
    file.write(f"{cell} {stage} {checkpoint and pathlib.Path(checkpoint).parent.parent.name}\\n")
print("OMP", os.environ["OMP_NUM_THREADS"])
def save():
    (folder / "checkpoints").mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "checkpoints/last.ckpt", "w") as file:
        file.writestr("step", "1")
if pathlib.Path(f"hang.{cell}.{stage}").exists():
    def stop(*_):
        save()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    pathlib.Path(f"pid.{cell}").write_text(str(os.getpid()))
    os.replace(f"pid.{cell}", f"hanging.{cell}")
    time.sleep(600)
if pathlib.Path(f"fail.{cell}.{stage}").exists():
    print("maestro-pl: error: a bad score.", file=sys.stderr)
    sys.exit(1)
if stage == "fit":
    save()
else:
    prompts = {"k": "the prompt"}
    (folder / "test_prompts.json").write_text(json.dumps({"split": "test", "prompts": prompts}))
    (folder / "test_prompts.csv").write_text("prompt,task,metric,value\\nk,t,reward/x,0.5\\nl,t,reward/x,0.7\\n")
"""

GRID: dict[str, Any] = {
    "name": "small",
    "stages": ["fit", "test"],
    "common": {"args": {"trainer.max_steps": 1}},
    "axes": {
        "method": {"base": {"stages": ["test"]}, "eq": {"args": {"model.weigher": "maestro_pl.EqualWeights"}}},
        "seed": [0, 1],
    },
}


DATE = datetime.date(2020, 1, 1)
NO_ARGUMENT = "2020-01-01 is a date, which cannot be an argument: put it in quotes to give it as text.$"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    write(tmp_path, GRID)
    return tmp_path


def write(folder: Path, grid: dict[str, Any]) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    return path


def run(folder: Path, *options: str) -> None:
    experiment(
        [str(folder / "grid.yaml"), "--out", str(folder / "out"), *options],
        command=[sys.executable, str(folder / "stand_in.py")],
        resolve=lambda cell: f"name: {cell.name}\n",
    )


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []


def changed(**changes: Any) -> dict[str, Any]:
    return {**GRID, **changes}


def test_the_cells_of_a_grid(folder: Path) -> None:
    grid = read_grid(write(folder, changed(exclude=[{"method": "base", "seed": 1}])))
    assert [cell.name for cell in grid.cells] == ["base__seed0", "eq__seed0", "eq__seed1"]
    assert [cell.stages for cell in grid.cells] == [("test",), ("fit", "test"), ("fit", "test")]
    assert [dict(layer.options) for layer in grid.cells[2].layers] == [
        {"trainer.max_steps": 1}, {"model.weigher": "maestro_pl.EqualWeights"}, {"seed_everything": 1},
    ]  # fmt: skip
    only = read_grid(write(folder, changed(include=[{"method": "eq"}], exclude=[{"seed": [0]}])))
    assert [cell.name for cell in only.cells] == ["eq__seed1"]
    axes = {"kl": {"key": ["model.kl.coef", "model.clip"], "values": [0.1, True]}}
    listed = read_grid(write(folder, changed(axes=axes)))
    assert [cell.name for cell in listed.cells] == ["0.1", "true"]
    assert dict(listed.cells[0].layers[1].options) == {"model.kl.coef": 0.1, "model.clip": 0.1}


def test_the_digest_is_of_what_is_said_and_not_of_where(folder: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (folder / name).write_text("model: {kl_coef: 0.1}\n")
    one, two = (read_grid(write(folder, changed(common={"config": name}))).cells[0] for name in ("a.yaml", "b.yaml"))
    assert one.digest == two.digest
    (folder / "b.yaml").write_text("model: {kl_coef: 0.2}\n")
    assert one.digest != two.digest


@pytest.mark.parametrize("given", [{"metrics": "m/a.yaml"}, {"args": {"metrics": "m/a.yaml"}}])
def test_a_list_of_metrics_is_found_from_the_folder_of_the_experiment(
    folder: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "m").mkdir()
    (folder / "m/a.yaml").write_text("- class_path: callbacks.ExactMatchReward\n")
    path = write(folder, changed(common=given))
    monkeypatch.chdir("/")
    cell = read_grid(path).cells[0]
    assert dict(cell.layers[0].options) == {"metrics": str((folder / "m/a.yaml").resolve())}
    digest = cell.digest
    (folder / "m/a.yaml").write_text("- class_path: callbacks.MathReward\n")
    assert cell.digest != digest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"axis": {}}, "no key 'axis' .did you mean axes"),
        ({"axes": {}}, "give at least one"),
        ({"axes": {"lr": [1, 2]}}, "a list needs the key"),
        ({"axes": {"seed": [0, -1]}}, r"axes.seed: seeds are whole numbers from 0 to 4294967295, got \[0, -1\]\.$"),
        ({"axes": {"seed": [99999999999999]}}, r"from 0 to 4294967295, got \[99999999999999\]\.$"),
        ({"axes": {"seed": [0, 0]}}, "two levels have one name"),
        ({"axes": {"m": {"a b": {}}}}, "no name of a folder"),
        ({"axes": {"m": {"a": {"arg": {}}}}}, "did you mean args"),
        ({"axes": {"m": {"a": {"args": {"modle.kl_coef": 1}}}}}, "did you mean model"),
        ({"axes": {"m": {"a": {"args": {"trainer.logger": False}}}}}, "is the experiment's"),
        ({"axes": {"m": {"a": {"config": "none.yaml"}}}}, "there is no file"),
        ({"axes": {"m": {"a": {"rewards": "none.yaml"}}}}, "there is no file"),
        ({"axes": {"m": {"a": {"metrics": "none.yaml"}}}}, r"axes.m.a.metrics: there is no file"),
        ({"axes": {"m": {"a": {"stages": ["tset"]}}}}, "did you mean test"),
        ({"axes": {"k": {"key": "model.x", "values": [[1]]}}}, "has no name for a folder"),
        ({"stages": ["test", "test"]}, "stands twice"),
        ({"exclude": [{"methd": "base"}]}, "did you mean method"),
        ({"exclude": [{"method": "bas"}]}, "did you mean base"),
        ({"exclude": [{"method": ["base", "eq"]}]}, "leave none of the 4 cells"),
        ({"compare": {"by": "methd"}}, "did you mean method"),
        ({"compare": {"by": "method", "baseline": "eqq"}}, "did you mean eq"),
        ({"compare": {"by": 3}}, "expected a name or a list"),
        ({"compare": {"split": "train"}}, "not one of test, validation"),
        ({"compare": {"by": "method", "within": "method"}}, "'method' is not an axis beside those of `by`"),
        ({"compare": {"within": "sed"}}, "did you mean seed"),
        (
            {"compare": {"within": ["seed"]}},
            r"compare.within: \['seed'\] is not an axis beside those of `by`.*: one of method, seed\.$",
        ),
        ({"compare": {"within": {"seed": 1}}}, r"compare.within: \{'seed': 1\} is not an axis"),
        ({"compare": {"baseline": ["eq"]}}, r"compare.baseline: there is no .*; one of base, eq\.$"),
        ({"axes": {"k": {"key": "model.x", "values": [DATE]}}}, f"axes.k: {NO_ARGUMENT}"),
        ({"common": {"args": {"model.x": DATE}}}, f"common.args.model.x: {NO_ARGUMENT}"),
        (
            {"axes": {"k": {"key": "model.x", "values": [1, 1.0]}}},
            "axes.k: `values` has 1 and 1.0, which are one number: keep one of them.$",
        ),
        (
            {"axes": {"m": {"a" * 300: {}}}},
            "the cell '(a{300})' would have a folder whose name is longer than 200 bytes: shorten the names of its levels.$",
        ),
        ({"name": "a" * 300}, "name: '(a{300})' is longer than 200 bytes: shorten it.$"),
        ({"name": ".."}, "name: '..' is no name of a folder: use letters, digits, `_`, `-` and `.`.$"),
        ({"name": "."}, "name: '.' is no name of a folder"),
        ({"name": "a/b"}, "no name of a folder"),
        ({"common": 3}, "expected keys with values"),
    ],
)
def test_a_bad_file_is_a_sentence(folder: Path, change: dict[str, Any], sentence: str) -> None:
    write(folder, changed(**change))
    with pytest.raises(UserError, match=sentence):
        run(folder)
    assert calls(folder) == []


def test_bad_options_are_sentences(folder: Path) -> None:
    for options, sentence in (
        (["--jobs", "0"], "expected at least 1"),
        (["--jobs", "two"], "invalid int"),
        (["--shard", "3/2"], "i from 1 to n"),
        (["--shard", "0/2"], "i from 1 to n"),
        (["--nonsense"], "unrecognized"),
        (["--out", "grid.yaml"], "'grid.yaml' cannot be a folder, because 'grid.yaml' is a file: name another;"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(folder, *options)
    with pytest.raises(UserError, match="no experiment file"):
        experiment([str(folder / "none.yaml")])
    (folder / "grid.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        run(folder)


@pytest.mark.slow
def test_a_grid_runs_once_and_compares(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, changed(compare={"by": "method", "baseline": "eq", "metric": "reward/x"}))
    run(folder, "--dry_run")
    assert calls(folder) == []
    assert not (folder / "out").exists()
    run(folder, "--jobs", "2")
    assert sorted(calls(folder)) == [
        "base__seed0 test", "base__seed1 test", "eq__seed0 fit", "eq__seed0 test fit-0", "eq__seed1 fit",
        "eq__seed1 test fit-0",
    ]  # fmt: skip
    done = json.loads((folder / "out/cells/eq__seed0/done.json").read_text())
    assert [(s["stage"], s["status"], s["outcome"]) for s in done["stages"]] == [
        ("fit", 0, "done"), ("test", 0, "done"),
    ]  # fmt: skip
    assert done["levels"] == {"method": "eq", "seed": "0"}
    assert (folder / "out/compare/compare.tex").is_file()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"OMP {threads}" in (folder / "out/cells/eq__seed0/fit.log").read_text()
    before = calls(folder)
    run(folder)
    run(folder, "--status")
    assert calls(folder) == before
    assert "4 cells: 4 done" in capsys.readouterr().out


def test_thousands_of_cells_are_checked_by_some_that_have_every_level(folder: Path) -> None:
    (folder / "base.yaml").write_text("model: {}\n")
    methods = {f"m{i}": {"config": "base.yaml", "args": {"model.x": i}} for i in range(6)}
    axes = {"method": methods, "task": {f"t{i}": {"data": {"x": i}} for i in range(10)}, "seed": list(range(100))}
    grid = read_grid(write(folder, changed(common={"config": "base.yaml"}, axes=axes)))
    assert len(grid.cells) == 6000
    chosen = grid.sample(grid.cells)
    assert len(chosen) == 10
    for axis, ends in (("method", set(methods)), ("task", set(axes["task"])), ("seed", {"0", "99"})):
        assert ends <= {cell.levels[axis] for cell in chosen}
    assert grid.sample([]) == []


@pytest.mark.slow
def test_a_config_that_fails_when_its_cell_starts_leaves_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(cell: Cell) -> str:
        if cell.name == "eq__seed1":
            raise UserError("no such key")
        return f"name: {cell.name}\n"

    monkeypatch.setattr("maestro_pl.cli.experiment.ALL_CHECKED", 2)
    write(folder, changed(axes={**GRID["axes"], "seed": [0, 1, 2]}))
    with pytest.raises(RunStopped, match=r"1 of 6 runs failed \(eq__seed1\)"):
        experiment(
            [str(folder / "grid.yaml"), "--out", str(folder / "out"), "--jobs", "2"],
            command=[sys.executable, str(folder / "stand_in.py")],
            resolve=resolve,
        )
    said = capsys.readouterr().out
    assert "2 of the cells are checked, which have every level" in said
    assert "eq__seed1: FAILED in its config after 0 s: no such key" in said
    assert "eq__seed2 fit" in calls(folder)


def test_the_reason_is_the_whole_last_error(tmp_path: Path) -> None:
    log = tmp_path / "fit.log"
    log.write_text(
        "maestro-pl: error: an older one.\n"
        "maestro-pl: error: 2 of 9 rows cannot be used:\n    a.jsonl:1: no prompt\n  Mend them.\n"
        "after it\n  and more\n"
    )
    assert _reason(2, log) == "2 of 9 rows cannot be used: a.jsonl:1: no prompt Mend them."
    log.write_text("  nothing\n")
    assert _reason(3, log) == "exit status 3"


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_grid_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "fail.eq__seed0.test").touch()
    with pytest.raises(RunStopped, match=r"1 of 4 runs failed \(eq__seed0\)") as caught:
        run(folder)
    assert caught.value.status == 1
    shown = capsys.readouterr().out
    assert "eq__seed0 failed in test: a bad score." in shown
    assert "| maestro-pl: error: a bad score." in shown
    assert (folder / "out/cells/eq__seed1/done.json").is_file()
    run(folder, "--status")
    assert "3 done, 1 failed" in capsys.readouterr().out
    (folder / "fail.eq__seed0.test").unlink()
    before = len(calls(folder))
    run(folder)
    assert calls(folder)[before:] == ["eq__seed0 test fit-0"]  # fit is not run again


def test_evaluation_without_a_checkpoint_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "stand_in.py").write_text(
        STAND_IN.replace('if stage == "fit":\n    save()', 'if stage == "fit":\n    pass')
    )
    with pytest.raises(RunStopped):
        run(folder)
    assert "test needs a checkpoint and fit has left none" in capsys.readouterr().out


def test_changed_arguments_stop_the_grid_or_are_forced(folder: Path) -> None:
    write(folder, changed(axes={"seed": [0]}))
    run(folder)
    write(folder, changed(axes={"seed": [0, 1]}, common={"args": {"trainer.max_steps": 2}}))
    before = calls(folder)
    with pytest.raises(UserError, match=r"arguments of 1 cells have changed since they ran \(seed0\)"):
        run(folder)
    assert calls(folder) == before
    run(folder, "--force")
    assert len(calls(folder)) == len(before) + 4
    assert (folder / "out/cells/seed0.before-0/done.json").is_file()


def test_a_file_that_a_config_names_is_part_of_the_digest(folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / "a.yaml").write_text("model: parts/model.yaml\nrewards: parts/rewards.yaml\n")
    (folder / "parts/model.yaml").write_text("policy: {class_path: maestro_pl.LoRAPolicy}\nkl_coef: 0.1\n")
    (folder / "parts/rewards.yaml").write_text("- more.yaml\n")
    (folder / "parts/more.yaml").write_text("model: more.yaml\n")  # names itself
    path = write(folder, changed(common={"config": "a.yaml"}, axes={"seed": [0]}))
    (cell,) = read_grid(path).cells
    digests = [cell.digest]
    for name, text in (("model", "kl_coef: 0.2\n"), ("rewards", "- more.yaml\n- b\n"), ("more", "model: {}\n")):
        (folder / f"parts/{name}.yaml").write_text(text)
        digests.append(cell.digest)
    assert len(set(digests)) == 4
    run(folder)
    run(folder)
    assert len(calls(folder)) == 2
    (folder / "parts/more.yaml").write_text("model: {kl_coef: 1}\n")
    with pytest.raises(UserError, match="arguments of 1 cells have changed since they ran"):
        run(folder)
    (folder / "a.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(UserError, match=r"a\.yaml is not UTF-8 \(byte 0xff at 7\)"):
        run(folder)


@pytest.mark.parametrize("given", [{"args": {"model.policy": "p.yaml"}}, {"model": {"policy": "p.yaml"}}])
def test_a_file_that_an_argument_names_is_part_of_the_digest(folder: Path, given: dict[str, Any]) -> None:
    (folder / "p.yaml").write_text("class_path: maestro_pl.LoRAPolicy\n")
    cell = read_grid(write(folder, changed(common=given))).cells[0]
    digest = cell.digest
    (folder / "p.yaml").write_text("class_path: maestro_pl.FullPolicy\n")
    assert cell.digest != digest


def test_jobs_share_the_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(["0", "1"], 2) == ["0", "1"]
    assert shares(["0", "1"], 3) == ["0", "1", "0"]  # fewer GPUs than jobs take turns
    assert shares(["0", "1", "2", "3", "4"], 2) == ["0,1", "2,3,4"]
    assert shares([], 2) == [None, None]
    (folder / "stand_in.py").write_text(
        STAND_IN + "pathlib.Path(f'began.{cell}').touch()\n"
        "end = time.monotonic() + 300\n"
        "while len(list(pathlib.Path().glob('began.*'))) < 2 and time.monotonic() < end: time.sleep(0.01)\n"  # at once
        "print('GPU', os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    write(folder, changed(stages=["test"], axes={"seed": [0, 1, 2, 3]}))
    run(folder, "--jobs", "2")
    seen = [(folder / f"out/cells/seed{seed}/test.log").read_text().split("GPU ")[1].strip() for seed in range(4)]
    assert set(seen[:2]) == {"0", "1"}
    assert set(seen) == {"0", "1"}
    write(folder, changed(stages=["test"], name="alone", axes={"seed": [4]}))
    run(folder)
    assert "GPU 0,1" in (folder / "out/cells/seed4/test.log").read_text()  # one run has them all


def test_the_gpus_are_counted_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " GPU-a, GPU-b,")
    assert devices() == ["GPU-a", "GPU-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(folder))
    assert devices() == []  # no nvidia-smi
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H (UUID: a)'\necho '  MIG 1g: (UUID: b)'\necho 'GPU 1: H (UUID: c)'\n")
    tool.chmod(0o755)
    assert devices() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho 'GPU access blocked'\nexit 9\n")
    assert devices() == []


def test_shards_are_stable_and_make_the_whole(folder: Path) -> None:
    run(folder, "--shard", "1/2")
    first = {line.split()[0] for line in calls(folder)}
    assert first == {"base__seed0", "eq__seed0"}
    run(folder, "--shard", "2/2")
    assert {line.split()[0] for line in calls(folder)} - first == {"base__seed1", "eq__seed1"}
    assert parse_shard(None) == (0, 1)
    assert parse_shard("2/3") == (1, 3)


def start(folder: Path) -> subprocess.Popen[str]:
    """A scheduler in a process of its own."""
    script = (
        "import sys\nfrom maestro_pl.errors import RunStopped\nfrom maestro_pl.cli.experiment import experiment\n"
        "try: experiment(['grid.yaml', '--out', 'out', '--jobs', '2'], [sys.executable, 'stand_in.py'], lambda c: 'a: 1')\n"
        "except RunStopped as stop: sys.exit(stop.status)\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True)


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 300
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_stops_the_children_and_a_second_start_resumes(folder: Path) -> None:
    for seed in (0, 1):
        (folder / f"hang.eq__seed{seed}.fit").touch()
    scheduler = start(folder)
    wait_for(folder / "hanging.eq__seed0", folder / "hanging.eq__seed1")
    cell = CellFolder(folder / "out/cells/eq__seed0", read_grid(folder / "grid.yaml").cells[2])
    assert cell.state() == "running"
    assert f"process {scheduler.pid} on" in str(holder(cell.lock))
    scheduler.send_signal(signal.SIGINT)
    out, _ = scheduler.communicate(timeout=300)
    assert scheduler.returncode == 130
    assert "Stopping 2 runs" in out
    assert cell.state() == "interrupted"
    assert cell.progress()["stages"][-1]["status"] == 143  # it had the time to save
    for seed in (0, 1):
        (folder / f"hang.eq__seed{seed}.fit").unlink()
    run(folder)
    assert calls(folder)[4:] == [
        "eq__seed0 fit fit-0", "eq__seed0 test fit-1", "eq__seed1 fit fit-0", "eq__seed1 test fit-1",
    ]  # fmt: skip


def test_two_schedulers_and_an_orphan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, changed(axes={"seed": [0, 1]}))
    (folder / "hang.seed0.fit").touch()
    scheduler = start(folder)
    wait_for(folder / "hanging.seed0", folder / "out/cells/seed1/done.json")
    run(folder)  # the other cell is done, and this one is taken
    assert f"seed0: left to process {scheduler.pid}" in capsys.readouterr().out
    scheduler.kill()
    scheduler.communicate(timeout=300)
    run(folder)  # its child trains on
    assert "seed0: left to process" in capsys.readouterr().out
    assert sum("seed0 fit" in line for line in calls(folder)) == 1
    os.kill(int((folder / "hanging.seed0").read_text()), signal.SIGKILL)
    (folder / "hang.seed0.fit").unlink()
    deadline = time.monotonic() + 300
    while holder(folder / "out/cells/seed0/lock") and time.monotonic() < deadline:
        time.sleep(0.05)
    run(folder)
    assert calls(folder)[-2:] == ["seed0 fit", "seed0 test fit-1"]


def test_locks(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert holder(path) is None
    with CellLock(path) as lock:
        assert lock.acquire()
        assert f"process {os.getpid()} on" in str(holder(path))
        assert not CellLock(path).acquire()
    assert holder(path) is None
    path.write_text("cut o")  # left by a process that was killed while it wrote
    with CellLock(path) as lock:
        assert lock.acquire()
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    assert holder(path) == "process 1 on elsewhere"
    with pytest.raises(UserError, match="process 1 on elsewhere: if it no longer runs there, remove the file"):
        CellLock(path).acquire()
    with path.open() as file:  # and the refused lock is free again
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    import zipfile

    cell = CellFolder(tmp_path, Cell("c", {}, ("fit",), ()))
    assert cell.checkpoint() is None
    for number, name in enumerate(("step-000050.ckpt", "last.ckpt")):
        path = tmp_path / "fit-0/checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a", "b")
        os.utime(path, (number, number))
    assert str(cell.checkpoint()).endswith("last.ckpt")
    (tmp_path / "fit-0/checkpoints/last.ckpt").write_bytes(b"PK half")
    assert str(cell.checkpoint()).endswith("step-000050.ckpt")


def test_a_spoiled_progress_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text("{")
    with pytest.raises(UserError, match="remove the cell's folder"):
        CellFolder(tmp_path, Cell("c", {}, ("fit",), ())).state()


def test_durations_and_last_lines(tmp_path: Path) -> None:
    assert [duration(s) for s in (4.4, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 5 min"]
    (tmp_path / "log").write_text("a\n\nb\nc\n")
    assert last_lines(tmp_path / "log", 2) == ["b", "c"]
    assert last_lines(tmp_path / "none") == []


def test_layers_are_parsed_in_their_order(folder: Path) -> None:
    (folder / "base.yaml").write_text(
        "model: {kl: {coef: 0.5}, max_grad_norm: 2.0, policy: maestro_pl.LoRAPolicy}\ndata: {batch_size: 3}\n"
    )
    weigher = {"class_path": "maestro_pl.Conductor", "init_args": {"mix_rate": 0.4}}
    grid = changed(
        common={"config": "base.yaml", "args": {"model.kl.coef": 0.25, "data.batch_size": 4}},
        axes={"m": {"a": {"model": {"weigher": weigher, "kl": {"coef": 0.75}}}}, "seed": [7]},
    )
    config = yaml.safe_load(resolve_config(read_grid(write(folder, grid)).cells[0]))
    assert config["model"]["kl"]["coef"] == 0.75  # the level's, after the common options
    assert (config["model"]["max_grad_norm"], config["data"]["batch_size"]) == (2.0, 4)
    assert config["model"]["weigher"]["init_args"]["mix_rate"] == 0.4
    assert config["seed_everything"] == 7
    assert config["trainer"]["logger"]["class_path"].endswith("CSVLogger")

    grid["axes"]["m"]["a"] = {"args": {"model.kl.coeff": 1}}
    with pytest.raises(UserError, match=r"cell a__seed7: .*kl\.coeff"):
        resolve_config(read_grid(write(folder, grid)).cells[0])
    grid["axes"] = {"m": {"a": {"args": {"seed_everything": -1}}}}
    with pytest.raises(
        UserError, match=r"^cell a: seed_everything=-1: expected a whole number from 0 to 4294967295\.$"
    ):
        resolve_config(read_grid(write(folder, grid)).cells[0])
    (folder / "base.yaml").write_text("trainer: {logger: false}\n")
    grid["axes"]["m"]["a"] = {}
    with pytest.raises(UserError, match=r"leave trainer\.logger out"):
        resolve_config(read_grid(write(folder, grid)).cells[0])


@pytest.mark.parametrize(
    ("level", "sentence"),
    [
        ({"model": {"kl": {"coef": 3}}}, r"cell a: model\.policy is required: give it in"),
        ({"args": {"method": "sft"}, "data": {"batch_size": 2}}, r"cell a: model\.policy is required"),
        (
            {"model": {"policy": "maestro_pl.LoRAPolicy", "weigher": "maestro_pl.FixedWeights"}},
            r"cell a: weights of model\.weigher, maestro_pl\.FixedWeights, is required",
        ),
        (
            {
                "model": {"policy": "maestro_pl.LoRAPolicy", "weigher": "maestro_pl.EqualWeights"},
                "rewards": [{"class_path": "callbacks.JudgeReward"}],
            },
            r"cell a: model of rewards, callbacks\.JudgeReward, is required",
        ),
    ],
)
def test_a_required_key_that_is_missing_stops_the_grid(folder: Path, level: dict[str, Any], sentence: str) -> None:
    grid = {"axes": {"m": {"a": level}}}
    if "args" in level:  # a config of its own, or the sandbox's would be taken
        (folder / "base.yaml").write_text("method: sft\n")
        grid["common"] = {"config": "base.yaml"}
    with pytest.raises(UserError, match=sentence):
        experiment([str(write(folder, grid)), "--dry_run"])


CONFIGS = Path(__file__).parents[2] / "configs/experiments"
COMPARED = [p.name for p in sorted(CONFIGS.glob("*.yaml")) if (yaml.safe_load(p.read_text()) or {}).get("compare")]


def finish(path: Path, out: Path) -> Grid:
    """Every cell as if it had run: all methods of a benchmark see its two prompts, a cell without one sees them all."""
    grid = read_grid(path)
    out.mkdir(parents=True)
    out_file(out).write_text(json.dumps(_summary(grid, path)))
    metric = (grid.compare or {"metric": ["reward/judge"]})["metric"][0]
    for number, cell in enumerate(grid.cells):
        task = cell.levels.get("benchmark") or cell.levels.get("task") or "all_of_them"
        test = out / "cells" / cell.name / "test-0"
        test.mkdir(parents=True)
        done = {"digest": cell.digest, "stages": [{"stage": stage, "outcome": "done"} for stage in cell.stages]}
        (test.parent / "done.json").write_text(json.dumps(done))
        (test / "test_prompts.json").write_text(json.dumps({"split": "test", "prompts": {}}))
        (test / "test_prompts.csv").write_text(
            "prompt,task,metric,value\n" + "".join(f"p{i},{task},{metric},{(number + i) % 2}\n" for i in range(2))
        )
    return grid


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_the_comparison_of_a_shipped_grid_can_be_made(name: str, tmp_path: Path) -> None:
    grid = finish(CONFIGS / name, tmp_path / "out")
    _compare(grid, tmp_path / "out")
    assert grid.compare is not None
    (by,) = grid.compare["by"]
    folders = grid.axes[grid.compare["within"]] if "within" in grid.compare else [""]
    for folder in folders:
        with (tmp_path / "out/compare" / folder / "differences.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["run"] for row in rows} == set(grid.axes[by]) - {grid.compare["baseline"]}
        assert {row["baseline"] for row in rows} == {grid.compare["baseline"]}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["qwen3_8b", "llama31_8b"])
def test_sft_is_compared_with_the_main_table(backbone: str, tmp_path: Path) -> None:
    names = ["paper_table1", "paper_sft"]
    for name in names:
        finish(CONFIGS / f"{name}.yaml", tmp_path / name)
    folders = [str(tmp_path / name) for name in names]
    written = ["--resamples", "100", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="name the axis in which they differ"):
        compare([*folders, "--by", "method", "--baseline", "eq", *written])
    with pytest.raises(UserError, match=r"--where backbone=gpt: .* has no such cell; it has qwen3_8b, llama31_8b"):
        compare([*folders, "--where", "backbone=gpt"])
    with pytest.raises(UserError, match="--where gpt: expected AXIS=LEVEL"):
        compare([*folders, "--where", "gpt"])
    compare([*folders, "--where", f"backbone={backbone}", "--by", "method", "--baseline", "eq", *written])
    with (tmp_path / "out/means.csv").open(newline="") as file:
        means = [row for row in csv.DictReader(file) if row["run"] == "sft"]
    assert len(means) == 8  # the benchmarks, and all of them
    assert {row["seeds"] for row in means} == {"3"}


def test_the_commands_in_shipped_grids_name_the_grid_and_its_cells() -> None:
    for path in sorted(CONFIGS.glob("*.yaml")):
        text = path.read_text()
        for command, count in re.findall(r"#   (maestro-pl experiment \S+) --shard 1/(\d+)", text):
            assert command.endswith(f"configs/experiments/{path.name}")
            assert int(count) == len(read_grid(path).cells)


def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8")
    for name in ("quickstart.yaml", "rewards/brief.yaml", "experiments/grid.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "experiments/grid.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    grid = read_grid(tmp_path / "experiments/grid.yaml")
    assert len(grid.cells) == 13
    assert grid.compare == {
        "by": ["method"], "baseline": "equal", "metric": ["reward/utility"], "split": "test",
    }  # fmt: skip
