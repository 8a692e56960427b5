"""How long `maestro-pl view` takes to open a run of many recorded responses, for the first time and again.

    python -m benchmarks.view_large RUN --responses 100000

Copies the recorded responses of a real run, step by step with other numbers and words, until there are as many as asked for,
and asks the application (in this process, without a browser) for the first page of responses, then for one that is
filtered and sorted; a fresh process for each way of opening. ``first``: no index is there yet; ``again``: it lies beside the
lines. Wall and processor seconds are of everything from making the application to the last byte of the page. The last line
of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from maestro_pl.report.responses import index_path

PAGES = {"groups": "/groups", "disputed": "/groups?sort=disputed", "text": "/groups?q=books"}


def copied(source: Path, folder: Path, responses: int) -> Path:
    """A run's folder whose ``rollouts.jsonl`` has so many lines; every copy of a step is a step of its own."""
    lines = [json.loads(line) for line in (source / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = max(line["step"] for line in lines) + 1
    for name in ("config.yaml", "metrics.csv"):
        (folder / name).write_bytes((source / name).read_bytes())
    path = folder / "rollouts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(responses):
            line, again = lines[number % len(lines)], number // len(lines)
            rewards = {
                name: None if value is None else value + 0.001 * again for name, value in line["rewards"].items()
            }
            changed = {
                "step": line["step"] + steps * again,
                "response": f"{line['response']} ({again})",
                "rewards": rewards,
            }
            file.write(json.dumps({**line, **changed}) + "\n")
    return path


def opened(folder: Path) -> dict[str, Any]:
    """Seconds until each page is there, in this process."""
    from fastapi.testclient import TestClient

    from maestro_pl.app.view import view_app

    started, computed = time.perf_counter(), time.process_time()
    client = TestClient(view_app([folder]), base_url="http://127.0.0.1")
    found: dict[str, Any] = {}
    for name, address in PAGES.items():
        page = client.get(address)
        while "of responses for the first time" in page.text:
            page = client.get(address)
        page.raise_for_status()
        found[f"{name}_s"], found[f"{name}_cpu_s"] = time.perf_counter() - started, time.process_time() - computed
        started, computed = time.perf_counter(), time.process_time()
    return found


def main(args: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.view_large",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="folder of a run that has a rollouts.jsonl")
    parser.add_argument("--responses", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=3, help="openings of each kind, one after the other")
    parser.add_argument("--opened", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.opened:
        print(json.dumps(opened(options.run)))
        return
    if not (options.run / "rollouts.jsonl").is_file():
        parser.error(f"{options.run} has no rollouts.jsonl: give the folder of a run that recorded responses")
    rows: dict[str, list[dict[str, Any]]] = {"first": [], "again": []}
    with tempfile.TemporaryDirectory() as folder:
        path = copied(options.run, Path(folder), options.responses)
        size = path.stat().st_size
        for _ in range(options.times):
            index_path(path).unlink(missing_ok=True)
            for kind in rows:
                child = [sys.executable, "-m", "benchmarks.view_large", folder, "--opened"]
                made = subprocess.run(child, check=True, capture_output=True, text=True, env=os.environ)
                rows[kind].append(json.loads(made.stdout.splitlines()[-1]))
    middle = {
        kind: {name: round(statistics.median(row[name] for row in of), 3) for name in of[0]}
        for kind, of in rows.items()
    }
    for kind, row in middle.items():
        print(kind, *(f"{name} {value:.2f}" for name, value in row.items()), sep="  ")
    print(json.dumps({"responses": options.responses, "bytes": size, "times": options.times, **middle}))


if __name__ == "__main__":
    main()
