"""300 steps, after which memory, open files and threads are where they were after 50."""

from __future__ import annotations

from benchmarks.faults.child import run, serving
from benchmarks.faults.kills import judge_server
from benchmarks.faults.runs import FIT, config, judged, write
from benchmarks.faults.trial import Fault, Trial

STEPS, FROM = 300, 50
MIB = 16  # that memory may grow by: what the allocator keeps, and the rows that Lightning's loggers hold


def trial(trial: Trial) -> None:
    """One run, with a judge, validations, checkpoints and records on the way."""
    with serving(judge_server, trial.folder / "server") as url:
        hook = {"class_path": "benchmarks.faults.hooks.Grows", "init_args": {"steps": [FROM, 175, STEPS]}}
        content = config(
            **{
                "rewards+": judged(url),
                "trainer.callbacks+": hook,
                "trainer.max_steps": STEPS,
                "trainer.limit_val_batches": 1,
                "trainer.val_check_interval": 25,
                "data.batch_size": 1,
                "rollout.group_size": 2,
                "rollout.max_new_tokens": 8,
            }
        )
        content["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 10
        folder = trial.folder / "run"
        write(folder, content)
        ended = run(folder, FIT)
    trial.require(ended.status == 0, f"the run ended with {ended.tail()}")
    seen = [list(map(int, name.split()[1:])) for _, name in ended.events if name.startswith("grows ")]
    trial.require([step for step, *_ in seen] == [FROM, 175, STEPS], f"steps told: {seen}")
    (_, kib, files, threads), *_, (_, kib_after, files_after, threads_after) = seen
    trial.counts["KiB after 50 steps"], trial.counts["KiB after 300 steps"] = kib, kib_after
    trial.counts["open files after 50 steps"], trial.counts["open files after 300 steps"] = files, files_after
    trial.counts["threads after 50 steps"], trial.counts["threads after 300 steps"] = threads, threads_after
    trial.require(
        kib_after - kib <= MIB * 1024, f"memory grew by {(kib_after - kib) / 1024:.1f} MiB in 250 steps: {seen}"
    )
    trial.require(files_after <= files, f"open files grew: {seen}")
    trial.require(threads_after <= threads, f"threads grew: {seen}")


FAULTS = [
    Fault(
        "growth", f"{STEPS} steps: no more memory (within {MIB} MiB), files or threads than after {FROM}", trial, most=1
    )
]
