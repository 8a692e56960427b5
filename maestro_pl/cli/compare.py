"""``maestro-pl compare``: runs side by side on the same prompts."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import rich
from rich.text import Text

from maestro_pl.cli.parser import ToolParser, folder_to_write
from maestro_pl.errors import UserError
from maestro_pl.evaluation.compare_runs import (
    STEMS,
    Run,
    check_same_prompts,
    choose_metrics,
    read_runs,
    setting_warnings,
)
from maestro_pl.evaluation.compare_statistics import (
    Difference,
    Mean,
    SeedMean,
    TestName,
    difference_of,
    holm,
    mean_of,
    means_of_seeds,
)
from maestro_pl.evaluation.compare_tables import Comparison, csv_text, figure, latex, markdown, text_tables
from maestro_pl.evaluation.records import write_whole

ALL = "all"


def compare(arguments: list[str]) -> None:
    """Print the comparison of runs, and write it where ``--out`` is given.

    Args:
        arguments: those after ``maestro-pl compare``.

    Raises:
        UserError: an option or a run cannot be used, the runs' prompts differ, or ``--out`` cannot be written.
    """
    options = _parser().parse_args(arguments)
    if not 0 < options.confidence < 1 or options.resamples < 100 or options.seed < 0:
        raise UserError(
            f"--confidence {options.confidence}, --resamples {options.resamples}, --seed {options.seed}: expected between "
            "0 and 1, at least 100, and at least 0."
        )
    by = [axis for axis in (options.by or "").split(",") if axis]
    where = dict(_axis_and_level(text) for text in options.where)
    runs, notes = read_runs(options.runs, options.split, by, where)
    made = comparison_of(
        runs, options.metric, options.baseline, options.test, options.resamples, options.seed, options.confidence
    )
    made.notes += [*notes, *(f"Warning: {warning}" for warning in setting_warnings(runs))]
    for table in text_tables(made):
        rich.print("", table)
    for note in made.notes:
        rich.print(Text(note))
    if options.out is not None:
        try:
            _write(made, Path(options.out))
        except OSError as error:
            raise UserError(f"--out {options.out} cannot be written: {error}.") from error


def comparison_of(
    runs: Sequence[Run],
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    test: TestName = "auto",
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Compare runs that were evaluated on the same prompts.

    Args:
        runs: at least two, by name.
        metrics: those to compare; default: the rewards that all have.
        baseline: the run that the others are compared with; default: every pair.
        test: see :func:`maestro_pl.evaluation.compare_statistics.paired_test`.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        confidence: of the intervals.

    Raises:
        UserError: fewer than two runs, an unknown baseline or metric, prompts that differ, or a task of several that is called
            ``all``.
    """
    names = [run.name for run in runs]
    if len(runs) < 2:
        raise UserError(f"There is only the run {names[0]!r}: give at least two.")
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline}: there is no such run; one of {', '.join(names)}.")
    reference = runs[names.index(baseline)] if baseline is not None else runs[0]
    for run in runs:
        check_same_prompts(
            (reference.name, set(reference.keys_N), reference.texts), (run.name, set(run.keys_N), run.texts)
        )
    chosen = choose_metrics(runs, metrics)
    places = _places_of_tasks(reference)
    if baseline is not None:
        pairs = [(run, reference) for run in runs if run is not reference]
    else:
        pairs = [(later, earlier) for earlier, later in itertools.combinations(runs, 2)]
    means: list[Mean | None] = []
    differences: list[Difference | None] = []
    of_seeds: list[SeedMean] = []
    for metric in chosen:
        values = {run.name: run.matrix(metric) for run in runs}
        for task, rows in places.items():
            means += [
                mean_of(run.name, metric, task, values[run.name][rows], resamples, seed, confidence) for run in runs
            ]
            for run in runs:
                of_seeds += means_of_seeds(run.name, run.seed_numbers, metric, task, values[run.name][rows])
            for one, other in pairs:
                sides = values[one.name][rows], values[other.name][rows]
                named = (one.name, other.name)
                differences.append(difference_of(named, metric, task, *sides, test, resamples, seed, confidence))
    compared = holm([difference for difference in differences if difference is not None], ALL)
    shown = [mean for mean in means if mean is not None]
    notes = [_method(runs, compared, resamples, confidence)] if compared else []
    notes += [*_nothing(chosen, shown, compared), *_unpaired(compared)]
    return Comparison(names, chosen, list(places), shown, compared, baseline, confidence, notes, of_seeds)


def _axis_and_level(text: str) -> tuple[str, str]:
    axis, equals, level = text.partition("=")
    if not equals:
        raise UserError(f"--where {text}: expected AXIS=LEVEL, such as backbone=qwen3_8b.")
    return axis, level


def _places_of_tasks(run: Run) -> dict[str, list[int]]:
    """Task to the rows of its prompts; ``all`` last, unless there is a single task."""
    places: dict[str, list[int]] = {}
    for place, (task, _) in enumerate(run.keys_N):
        places.setdefault(task, []).append(place)
    if len(places) > 1 and ALL in places:
        raise UserError(
            f"{run.name} has a task called {ALL!r}, the name of the row over all tasks: give it another name under "
            "data.sources, and evaluate the runs again."
        )
    return places if len(places) == 1 else {**places, ALL: list(np.arange(len(run.keys_N)))}


def _method(runs: Sequence[Run], compared: Sequence[Difference], resamples: int, confidence: float) -> str:
    seeds = max(len(run.seeds) for run in runs)
    drawn = "prompts, and seeds within each run (hierarchical)" if seeds > 1 else "prompts"
    averaged = " Tests and effect sizes are of each prompt's mean over seeds." if seeds > 1 else ""
    tests = " and ".join(dict.fromkeys(_TESTS[row.test] for row in compared))
    return (
        f"{confidence:.0%} intervals: paired percentile bootstrap over {drawn}, {resamples} draws. p: two-sided {tests}, "
        f"Holm over the tasks and the compared runs of a metric. d_z: mean over standard deviation of the differences. "
        f"+/-/=: prompts that are higher, lower, equal.{averaged}"
    )


def _nothing(metrics: Sequence[str], means: Sequence[Mean], compared: Sequence[Difference]) -> list[str]:
    """A sentence for every metric whose tables are empty."""
    has, paired = {mean.metric for mean in means}, {row.metric for row in compared}
    return [
        f"{metric}: no prompt of any run has a value, so there is nothing to compare."
        if metric not in has
        else f"{metric}: no prompt has a value in both of two compared runs, so there are no differences."
        for metric in metrics
        if metric not in paired
    ]


def _unpaired(compared: Sequence[Difference]) -> list[str]:
    return [
        f"{row.metric}, {row.task}, {row.run} and {row.baseline}: {row.unpaired} prompts left out, because the metric applies "
        "in one of the two only."
        for row in compared
        if row.unpaired
    ]


_TESTS = {"mcnemar": "exact McNemar", "wilcoxon": "Wilcoxon signed-rank", "sign": "sign test"}


def _write(made: Comparison, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "means.csv", csv_text(made.means, Mean))
    write_whole(folder / "differences.csv", csv_text(made.differences, Difference))
    write_whole(folder / "seeds.csv", csv_text(made.seeds, SeedMean))
    write_whole(folder / "compare.md", markdown(made))
    write_whole(folder / "compare.tex", latex(made))
    figure(made).savefig(folder / "compare.png", dpi=150)
    print(
        f"Written to {folder}: means.csv, differences.csv, seeds.csv, compare.md, compare.tex, compare.png", flush=True
    )


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="maestro-pl compare",
        description="Compare runs prompt by prompt (docs/experiments.md): paired differences, intervals and tests.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, NAME=FOLDER, NAME=FOLDER,FOLDER (seeds), or an experiment's folder",
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="repeatable; default: all rewards"
    )
    parser.add_argument("--baseline", metavar="NAME", help="compare the others with this run; default: every pair")
    parser.add_argument("--by", metavar="AXIS,...", help="axes of an experiment that make a run; default: all but seed")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="AXIS=LEVEL",
        help="only these cells of an experiment; repeatable",
    )
    parser.add_argument("--split", default="test", choices=list(STEMS), help="default: test")
    parser.add_argument(
        "--test", default="auto", choices=get_args(TestName), help="default: McNemar for 0/1, else Wilcoxon"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals; default: 0.95")
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap draws; default: 10000")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: 0")
    parser.add_argument(
        "--out", type=folder_to_write, metavar="DIR", help="write CSV, Markdown, LaTeX and a figure there"
    )
    return parser
