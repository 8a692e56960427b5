"""A study's results as tables, a figure, and rows that ``maestro-pl compare`` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from maestro_pl.errors import UserError, cell
from maestro_pl.evaluation.compare_tables import escape, escape_pipe, markdown_table, number, table_of
from maestro_pl.evaluation.records import PromptRecords, PromptValue, prompt_key, write_records, write_whole
from maestro_pl.study.report import MetricAgreement, RaterAgreement, Results, Strength, WinRate
from maestro_pl.study.votes import RaterRow, VoteRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC = "reward/people"
NONE = "–"


def tables(results: Results) -> list[tuple[str, tuple[str, ...], list[list[str]], int]]:
    """For each table its title, its head, its lines, and how many of the first columns hold names."""
    shown = number_or_none
    return [
        (
            "Win rates",
            ("task", "run", "against", "win rate", "interval", "wins/ties/losses", "prompts"),
            [
                [r.task, r.run, r.baseline, shown(r.win_rate), interval(r.low, r.high),
                 f"{r.wins}/{r.ties}/{r.losses}", str(r.prompts)]
                for r in results.win_rates
            ],
            3,
        ),
        (
            "Bradley-Terry strengths",
            ("task", "run", "strength", "interval"),
            [[r.task, r.run, shown(r.strength), interval(r.low, r.high)] for r in results.strengths],
            2,
        ),
        (
            "Agreement of raters",
            ("task", "alpha", "interval", "same vote", "questions"),
            [
                [r.task, shown(r.alpha), interval(r.low, r.high), shown(r.same), str(r.questions)]
                for r in results.agreement
            ],
            1,
        ),
        (
            "Agreement with people",
            ("task", "metric", "agreement", "interval", "n"),
            [
                [r.task, r.metric, shown(r.agreement), interval(r.low, r.high), str(r.n)]
                for r in results.metrics
            ],
            2,
        ),
        (
            "Raters",
            ("rater", "answered", "checks passed", "ties", "left chosen", "seconds", "counted"),
            [
                [r.rater, f"{r.answered}/{r.asked}", f"{r.passed}/{r.checks}", str(r.ties), shown(r.left),
                 shown(r.seconds), "yes" if r.counted else "no"]
                for r in results.raters
            ],
            1,
        ),
    ]  # fmt: skip


def number_or_none(value: float) -> str:
    """A number as ``compare`` shows it; a dash where there is none."""
    return number(value) if math.isfinite(value) else NONE


def interval(low: float, high: float) -> str:
    """``[low, high]``, or a dash."""
    return f"[{number(low)}, {number(high)}]" if math.isfinite(low) and math.isfinite(high) else NONE


def text_tables(results: Results) -> list[Table]:
    """For the terminal."""
    return [table_of(title, head, lines, names) for title, head, lines, names in tables(results) if lines]


def markdown(results: Results) -> str:
    """All tables, with the notes below."""
    study = results.study
    parts = [f"# Blind comparison of {escape_pipe(', '.join(study.systems))}"]
    parts.append(
        f"Drawn {study.created} with seed {study.seed}: {len({n for n, _ in _asked(results)})} prompts, "
        f"{len(study.raters)} raters, {study.votes} a question."
    )
    parts += [
        f"## {title}\n\n{markdown_table(head, lines, names)}" for title, head, lines, names in tables(results) if lines
    ]
    return "\n\n".join([*parts, *results.notes]) + "\n"


def _asked(results: Results) -> list[tuple[int, tuple[int, int]]]:
    items = [item for rater in results.study.raters for item in rater.items if item.check is None]
    return [(item.prompt, item.pair) for item in items]


def latex(results: Results) -> str:
    """Two booktabs tables: win rates (a row a pair, a column a task) and strengths (a row a run)."""
    tasks = list(dict.fromkeys(row.task for row in results.win_rates))
    pairs = list(dict.fromkeys((row.run, row.baseline) for row in results.win_rates))
    rates = {(row.run, row.baseline, row.task): _latex(row.win_rate, row.low, row.high) for row in results.win_rates}
    powers = {(row.run, row.task): _latex(row.strength, row.low, row.high) for row in results.strengths}
    blocks = [
        (
            "win rates",
            [f"{a} against {b}" for a, b in pairs],
            [[rates.get((*p, t), "--") for t in tasks] for p in pairs],
        ),
        (
            "Bradley-Terry strengths",
            results.study.systems,
            [[powers.get((name, t), "--") for t in tasks] for name in results.study.systems],
        ),
    ]
    parts = [r"% \usepackage{booktabs}"]
    for title, names, cells in blocks:
        table = pd.DataFrame(cells, [escape(name) for name in names], [escape(task) for task in tasks])
        drawn = table.style.to_latex(hrules=True, column_format="l" + "c" * len(tasks))
        parts.append(f"% {title}, {results.confidence:.0%} intervals\n{drawn.rstrip()}")
    return "\n\n".join(parts) + "\n"


def _latex(value: float, low: float, high: float) -> str:
    if not math.isfinite(value):
        return "--"
    return rf"{number(value)} {{\scriptsize [{number(low)}, {number(high)}]}}"


def csv_text(rows: Sequence[Any], kind: type[Any]) -> str:
    """Every number in full; an empty field where there is none; no text that a spreadsheet would compute."""
    lines = [{name: cell(value) for name, value in asdict(row).items()} for row in rows]
    text: str = pd.DataFrame(lines, columns=[f.name for f in fields(kind)]).to_csv(index=False, lineterminator="\n")
    return text


def figure(results: Results) -> Figure:
    """Win rates with their intervals beside strengths with theirs, task by task. Save it with ``savefig``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in results.win_rates))
    pairs = list(dict.fromkeys((row.run, row.baseline) for row in results.win_rates))
    rates = [(f"{r.run} against {r.baseline}", r.task, r.win_rate, r.low, r.high) for r in results.win_rates]
    powers = [(r.run, r.task, r.strength, r.low, r.high) for r in results.strengths]
    height = 1.2 + 0.24 * len(tasks) * (max(len(pairs), len(results.study.systems)) + 1)
    drawn = Figure(figsize=(9.6, max(2.6, height)), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, 2)
    for axis, rows, label, still in (
        (axes[0], rates, "win rate, a tie as half", 0.5),
        (axes[1], powers, "Bradley-Terry strength (log-odds)", 0.0),
    ):
        names = list(dict.fromkeys(row[0] for row in rows))
        for index, name in enumerate(names):
            offset = (index - (len(names) - 1) / 2) * 0.8 / max(len(names), 2)
            own = [row for row in rows if row[0] == name and math.isfinite(row[3])]
            axis.errorbar(
                [row[2] for row in own],
                [tasks.index(row[1]) + offset for row in own],
                xerr=[[max(0.0, row[2] - row[3]) for row in own], [max(0.0, row[4] - row[2]) for row in own]],
                fmt="osD^v<>"[index % 7],
                markersize=4,
                capsize=2,
                linewidth=1.2,
                color=f"C{index % 10}",
                label=name.replace("$", r"\$"),
            )
        axis.axvline(still, color="0.5", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(tasks)), [task.replace("$", r"\$") for task in tasks])
        axis.set_ylim(len(tasks) - 0.4, -0.6)
        axis.set_xlabel(f"{label}, {results.confidence:.0%} interval")
        axis.legend(frameon=False, fontsize="small")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return drawn


def records_of(results: Results, system: int) -> PromptRecords:
    """What an evaluation would have written of this system: ``reward/people``, the mean vote of people against the others
    (1 always preferred, 0.5 a tie, 0 never), and the recorded rewards of the same prompts.
    """
    entries, texts = [], {}
    names = [METRIC]
    for place, value in enumerate(results.people_SP[system]):
        prompt = results.study.prompts[place]
        key = prompt_key(prompt.prompt, prompt.reference, prompt.task)
        texts[key.number] = key.text
        values = {METRIC: float(value), **{f"reward/{n}": v for n, v in prompt.rewards_S[system].items()}}
        names += [name for name in values if name not in names]
        entries += [PromptValue(prompt.task, name, place, v, key.number) for name, v in values.items()]
    return PromptRecords(entries, names, texts)


FILES: Mapping[str, tuple[str, type[Any]]] = {
    "win_rates": ("win_rates", WinRate),
    "strengths": ("strengths", Strength),
    "agreement": ("agreement", RaterAgreement),
    "metrics": ("metrics", MetricAgreement),
    "raters": ("raters", RaterRow),
    "votes": ("votes", VoteRow),
}


def write_report(results: Results, folder: Path) -> list[str]:
    """Write all of it into ``folder``; returns the names of what was written.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem, (name, kind) in FILES.items():
            write_whole(folder / f"{stem}.csv", csv_text(getattr(results, name), kind))
        write_whole(folder / "study.md", markdown(results))
        write_whole(folder / "study.tex", latex(results))
        figure(results).savefig(folder / "study.png", dpi=150)
        for place in range(len(results.study.systems)):
            header = {"stage": "study", "split": "test", "run": results.study.systems[place]}
            path = compare_folder(results, folder, place) / "test_prompts.csv"
            write_records(path, records_of(results, place), header)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}.") from error
    return [*(f"{stem}.csv" for stem in FILES), "study.md", "study.tex", "study.png", "compare/"]


def compare_folder(results: Results, folder: Path, system: int) -> Path:
    """Where ``maestro-pl compare`` finds a system; its name as far as a path can hold it, with its number."""
    name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in results.study.systems[system])
    return folder / "compare" / f"{system + 1}-{name.strip('.')[:60]}"
