"""What a run must survive, tried.

    python -m benchmarks.faults --seeds 20                          # the campaign
    python -m benchmarks.faults --seeds 5 --only kill-save full-disk
    python -m benchmarks.faults --list

One JSON object on stdout: for each fault its promise, the trials, how many held, and for each that did not what was seen
and the command that tries it again. Progress is on stderr. Linux only. The exit status is 1 where a promise did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def environment() -> None:
    """What the campaign's processes find: one thread, because forks share none, and the sources from any folder."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    sources = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([sources, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("OPENAI_API_KEY", "none")  # of the campaign's own server


def all_faults() -> dict[str, Any]:
    """Every fault by its name."""
    from benchmarks.faults import files, growth, kills, readers, values

    return {fault.name: fault for part in (kills, files, values, readers, growth) for fault in part.FAULTS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign, print its JSON, and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how often each fault is tried; slow ones less often")
    parser.add_argument("--first_seed", type=int, default=0, help="the seed of the first trial")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults, or those whose names begin so")
    parser.add_argument("--out", metavar="FILE", help="write the JSON there as well, after each fault")
    parser.add_argument("--keep", action="store_true", help="leave the folders of trials that did not hold, in $TMPDIR")
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds: expected at least 1")
    environment()

    from benchmarks.faults.child import preload  # after the environment is set, which torch reads
    from benchmarks.faults.trial import campaign

    preload()
    faults = all_faults()
    chosen = [name for name in faults if not options.only or any(name.startswith(part) for part in options.only)]
    if unknown := [part for part in options.only or [] if not any(name.startswith(part) for name in faults)]:
        parser.error(f"there is no fault {', '.join(unknown)}: one of {', '.join(faults)}")
    if options.list:
        print("\n".join(f"{name:<18} {faults[name].promise}" for name in chosen))
        return 0

    def write(report: dict[str, Any]) -> None:
        if options.out:
            Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    result = campaign([faults[name] for name in chosen], options.seeds, options.first_seed, options.keep, write)
    print(json.dumps(result, indent=1))
    return int(result["held"] < result["trials"])


if __name__ == "__main__":
    sys.exit(main())
