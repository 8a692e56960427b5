"""A fault, its trials, and what is counted of them."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class NotHeld(Exception):
    """A promise that a trial found broken: the message says which, and what was seen."""


@dataclass
class Trial:
    """One trial of a fault.

    Attributes:
        seed: of everything that it draws.
        folder: empty, its own, removed when the promise held.
        shared: a folder that the trials of one campaign share, for what each of them would make alike.
        counts: what is summed over the trials and reported beside them.
    """

    seed: int
    folder: Path
    shared: Path
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def require(self, held: bool, what: str) -> None:
        """Raise :class:`NotHeld` unless a promise held."""
        if not held:
            raise NotHeld(what)


@dataclass(frozen=True)
class Fault:
    """What is done to a run, and what must come of it.

    Attributes:
        name: on the command line.
        promise: one sentence.
        trial: does it once, and raises :class:`NotHeld` where the promise is broken.
        share: trials of it for each seed of the campaign; below 1 where one takes long, and one at least.
        most: trials in all, where more would be the same again.
    """

    name: str
    promise: str
    trial: Callable[[Trial], None]
    share: float = 1.0
    most: int | None = None

    def trials(self, seeds: int) -> int:
        """How many trials a campaign of so many seeds makes."""
        count = max(1, round(seeds * self.share))
        return count if self.most is None else min(count, self.most)


def campaign(
    faults: Sequence[Fault],
    seeds: int,
    first_seed: int = 0,
    keep: bool = False,
    so_far: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Try each fault and report.

    Args:
        faults: which.
        seeds: see :meth:`Fault.trials`.
        first_seed: of the trials of each fault.
        keep: leave the folders of trials that failed.
        so_far: is given the report after each fault.

    Returns:
        ``faults`` (name to promise, trials, held, failures, counts and seconds), ``trials`` and ``held`` over all.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as shared:
        for fault in faults:
            found[fault.name] = _tried(fault, fault.trials(seeds), first_seed, Path(shared), keep)
            so_far(_report(found, seeds, first_seed))
    return _report(found, seeds, first_seed)


def _report(found: dict[str, Any], seeds: int, first_seed: int) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "first_seed": first_seed,
        "trials": sum(each["trials"] for each in found.values()),
        "held": sum(each["held"] for each in found.values()),
        "faults": found,
    }


def _tried(fault: Fault, trials: int, first_seed: int, shared: Path, keep: bool) -> dict[str, Any]:
    begun, counts, failures = time.monotonic(), Counter[str](), []
    for seed in range(first_seed, first_seed + trials):
        trial = Trial(seed, Path(tempfile.mkdtemp(prefix=f"faults-{fault.name}-{seed}-")), shared)
        try:
            fault.trial(trial)
            what = ""
        except NotHeld as error:
            what = str(error)
        except Exception:  # a bug of the campaign is counted against the promise, never for it
            what = traceback.format_exc(limit=-4)
        counts.update(trial.counts)
        if what:
            again = f"python -m benchmarks.faults --only {fault.name} --seeds 1 --first_seed {seed}"
            failures.append({"seed": seed, "what": what, "again": again})
        if not what or not keep:
            shutil.rmtree(trial.folder, ignore_errors=True)
        print(f"{fault.name} {seed}: {what or 'held'}", file=sys.stderr, flush=True)
    return {
        "promise": fault.promise,
        "trials": trials,
        "held": trials - len(failures),
        "failures": failures,
        **({"counts": dict(counts)} if counts else {}),
        "seconds": round(time.monotonic() - begun, 1),
    }
