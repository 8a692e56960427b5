"""A simulated person teaches the Conductor through the real page, by keyboard; then runs train with the clicks.

    python -m benchmarks.people --seeds 5 --first-seed 1 --jobs 2

For every seed and number of clicks: ``maestro-pl label`` is started as a command on the sandbox, a person who errs by one
standard deviation of the utility (``maestro_pl.sandbox.simulated_choice``) answers every question in headless Chromium
with the keys 1 to 4, the server is ended by SIGKILL, and a run of the protocol of ``benchmarks.sandbox.trust`` (60 steps)
learns from the file with ``callbacks.PeopleAnchor``. Beside it stand equal weights, the oracle and 240 ratings of that
protocol. Files of labels are kept in ``<folder>/people`` and runs in ``<folder>/runs.jsonl``, so that a stopped experiment
goes on where it was. A row a run is in ``benchmarks/results/people_clicks.csv``; the table is printed as Markdown.
``--quick`` runs a few steps, into the folder. Needs playwright and Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sandbox.cells import Cell, Protocol
from benchmarks.sandbox.methods import anchored, references, seeded
from benchmarks.sandbox.runner import run_all
from benchmarks.sandbox.trust import BASE, QUICK, of_groups, rows_of, summarise, table, write
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import LabelStore
from maestro_pl.sandbox import rows, simulated_choice

RESULTS = Path(__file__).parent / "results"
RATER = "simulated"
PATIENCE = 120_000  # milliseconds that a page may take on a machine with much else to do


class Person:
    """Somebody who looks at the answers on the page, errs by one standard deviation, and presses a key."""

    def __init__(self, labels: Path, seed: int) -> None:
        self.row_of = {row["prompt"]: row for row in rows("train", n_per_task=512)}
        self.questions = {each.key: each for each in LabelStore(labels, writes=False).questions()}
        self.seed = seed

    def key(self, page: Any) -> str:
        """The key for the question on the page.

        Raises:
            AssertionError: what is shown is not what will be learned from.
        """
        question = self.questions[page.locator("#question").get_attribute("data-question")]
        answers = [question.responses[place] for place in question.order(RATER)]
        shown = [
            answer.inner_text() for answer in page.locator("article.answer .markdown, article.answer .empty").all()
        ]
        assert [_words(text) for text in shown] == [_words(text or "(empty)") for text in answers]
        return str(1 + self._best(question, answers))

    def _best(self, question: Question, answers: list[str]) -> int:
        prompt = str(question.prompt)
        row = self.row_of[prompt]
        return simulated_choice(answers, row["task"], row["subject"], row["target"], prompt, seed=self.seed)


def taught(labels: Path, count: int, seed: int, protocol: Protocol) -> tuple[int, list[float]]:
    """Let a person answer ``count`` questions of the protocol's first batches into a new file.

    Returns:
        How many batches hold them, as the page says, and the milliseconds from each key to the next question.
    """
    command = [
        sys.executable, "-m", "maestro_pl", "label", "--questions", str(count), "--labels", str(labels), "--rater", RATER,
        "--port", "0", "--seed_everything", str(seed), "--data.seed", str(seed), "--rollout.seed", str(seed),
        "--data.batch_size", str(protocol.batch), "--rollout.group_size", str(protocol.group),
        "--rollout.max_new_tokens", "64", "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as server:
        assert server.stdout is not None
        address = next((line.split()[1] for line in server.stdout if line.startswith("Open ")), None)
        if address is None:
            raise RuntimeError(f"{shlex.join(command)} ended without a link")
        try:
            return _answered(address, Person(labels, seed), count)
        finally:
            server.send_signal(signal.SIGKILL)  # nothing that was answered may need a good end


def _answered(address: str, person: Person, count: int) -> tuple[int, list[float]]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("MAESTRO_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    took = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        for done in range(1, count + 1):
            key, began = person.key(page), time.perf_counter()
            page.keyboard.press(key)
            page.locator("#question [role=status]", has_text=f"{done} of {count} ").wait_for()
            took.append(1000 * (time.perf_counter() - began))
        command = shlex.split(page.locator("#question pre").inner_text())
        browser.close()
    warmup = next(word for word in command if word.startswith("--model.meta.warmup="))
    return int(warmup.partition("=")[2]), took


def labelled(folder: Path, count: int, seed: int, protocol: Protocol) -> tuple[Path, int]:
    """The file with a person's clicks, made where it is not whole yet, and the batches that hold its groups."""
    name = f"seed{seed}_{count}" if protocol == Protocol() else f"quick_seed{seed}_{count}"
    labels, note = folder / f"{name}.db", folder / f"{name}.json"
    if not note.exists():
        for path in folder.glob(f"{name}.db*"):
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        warmup, took = taught(labels, count, seed, protocol)
        clicks = LabelStore(labels, writes=False).clicks()
        assert len(clicks) == count, f"{len(clicks)} of {count} clicks are in {labels}"
        note.write_text(json.dumps({"warmup": warmup, "milliseconds": [round(each, 1) for each in took]}))
        print(f"{name}: {count} clicks, median {sorted(took)[count // 2]:.0f} ms from key to next question", flush=True)
    return labels, int(json.loads(note.read_text())["warmup"])


def cells_of(folder: Path, counts: Sequence[int], seed: int, protocol: Protocol) -> list[Cell]:
    """Equal weights, the oracle, 240 ratings, and a run for each number of clicks."""
    cells = seeded(
        [
            *references(protocol),
            anchored("240 ratings", protocol, conductor=BASE, **of_groups(min(30, protocol.groups), protocol)),
        ],
        [seed],
    )
    for count in counts:
        labels, warmup = labelled(folder / "people", count, seed, protocol)
        learned = {"learner_args": {"target": "choice"}, "conductor": BASE}
        people = {"anchor": "people", "people": str(labels), "labels": warmup * protocol.batch / protocol.groups}
        cells.append(anchored(f"{count} clicks", protocol, warmup=warmup, **people, **learned).with_seed(seed))
    return cells


def check(results: Sequence[dict[str, Any]]) -> None:
    """Raise where a run did not learn from every click: its texts would be others than those of the page."""
    for entry in results:
        if entry["cell"]["anchor"] == "people":
            used = sum(task["choices"] for task in entry["labels"].values())
            wanted = int(entry["name"].split()[0])
            if used != wanted:
                raise RuntimeError(f"{entry['name']}, seed {entry['seed']}: the run used {used} of {wanted} clicks")


def _words(text: str) -> list[str]:
    return text.split()


def main(args: list[str] | None = None) -> None:
    """Label and train what is missing, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.people", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--clicks", type=int, nargs="+", default=[20, 40])
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/sandbox_experiments"))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/people_clicks.csv")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed and 20 clicks, into the folder")
    options = parser.parse_args(args)
    protocol, name = QUICK if options.quick else Protocol(), "people_clicks.csv"
    counts = options.clicks[:1] if options.quick else options.clicks
    output = options.output or (options.folder / f"quick_{name}" if options.quick else RESULTS / name)
    results: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds)):
        cells = cells_of(options.folder, counts, seed, protocol)
        results += run_all(cells, options.folder / "runs.jsonl", options.jobs)
        check(results)
        write(output, rows_of(results))
    summary = summarise(rows_of(results))
    print(table(summary))
    print(f"written to {output}")
    print(json.dumps({"methods": summary}))


if __name__ == "__main__":
    main()
