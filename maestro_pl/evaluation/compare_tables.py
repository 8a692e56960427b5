"""A comparison as text, CSV, Markdown, LaTeX and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from maestro_pl.errors import escaped
from maestro_pl.evaluation.compare_statistics import Difference, Mean, SeedMean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
LEVEL = 0.05
COLOURS = 10  # that can be told apart
NAMES = 2  # columns that hold names; the others hold numbers


@dataclass
class Comparison:
    """Means and paired differences, in the order in which they are shown.

    Attributes:
        baseline: the run that all others are compared with; None where every pair is.
        confidence: of the intervals.
        notes: sentences that belong below the tables.
        seeds: the mean of every seed of every run.
    """

    runs: list[str]
    metrics: list[str]
    tasks: list[str]
    means: list[Mean]
    differences: list[Difference]
    baseline: str | None
    confidence: float = 0.95
    notes: list[str] = field(default_factory=list)
    seeds: list[SeedMean] = field(default_factory=list)

    def mean(self, run: str, metric: str, task: str) -> Mean | None:
        """The mean of a run, if the metric applies."""
        return next((m for m in self.means if (m.run, m.metric, m.task) == (run, metric, task)), None)

    def difference(self, run: str, metric: str, task: str) -> Difference | None:
        """The difference of a run to the baseline, if there is one."""
        wanted = (run, self.baseline, metric, task)
        return next((d for d in self.differences if (d.run, d.baseline, d.metric, d.task) == wanted), None)


MEAN_HEAD = ("task", "run", "mean", "interval", "n", "seeds", "seed sd")
DIFFERENCE_HEAD = ("task", "run", "difference", "interval", "p Holm", "d_z", "+/-/=")
MORE_HEAD = ("p", "test", "unpaired")


def text_tables(comparison: Comparison) -> list[Table]:
    """Two tables a metric: the means, and the differences."""
    tables = []
    for metric in comparison.metrics:
        tables.append(table_of(metric, MEAN_HEAD, mean_lines(comparison, metric)))
        title = f"{metric}: difference" + (f" to {comparison.baseline}" if comparison.baseline else "s")
        tables.append(table_of(title, DIFFERENCE_HEAD, difference_lines(comparison, metric)))
    return tables


def mean_lines(comparison: Comparison, metric: str) -> list[list[str]]:
    """The means of a metric as text."""
    return [
        [
            mean.task,
            mean.run,
            number(mean.mean),
            _interval(mean.low, mean.high),
            str(mean.n),
            str(mean.seeds),
            "" if mean.seed_sd is None else number(mean.seed_sd),
        ]
        for mean in comparison.means
        if mean.metric == metric
    ]


def difference_lines(comparison: Comparison, metric: str, more: bool = False) -> list[list[str]]:
    """The differences of a metric as text; with ``more``, the columns for which a terminal has no room."""
    return [
        [
            row.task,
            row.run if comparison.baseline else f"{row.run} - {row.baseline}",
            f"{row.difference:+.3f}",
            _interval(row.low, row.high),
            p_text(row.p_holm),
            "" if row.effect is None else f"{row.effect:+.2f}",
            f"{row.better}/{row.worse}/{row.ties}",
            *([p_text(row.p), row.test, str(row.unpaired)] if more else []),
        ]
        for row in comparison.differences
        if row.metric == metric
    ]


def csv_text(
    rows: Sequence[Mean] | Sequence[Difference] | Sequence[SeedMean],
    kind: type[Mean] | type[Difference] | type[SeedMean],
) -> str:
    """Every number in full; an empty field where there is none."""
    columns = [f.name for f in fields(kind)]
    text: str = pd.DataFrame(map(asdict, rows), columns=columns).to_csv(index=False, lineterminator="\n")
    return text


def markdown(comparison: Comparison) -> str:
    """The tables of ``text_tables`` in Markdown, with the notes below."""
    parts = []
    for metric in comparison.metrics:
        parts.append(f"## {escape_pipe(metric)}\n\n" + markdown_table(MEAN_HEAD, mean_lines(comparison, metric)))
        title = f"Difference to {comparison.baseline}" if comparison.baseline else "Differences"
        parts.append(
            f"{escape_pipe(title)}:\n\n"
            + markdown_table((*DIFFERENCE_HEAD, *MORE_HEAD), difference_lines(comparison, metric, more=True))
        )
    return "\n\n".join([*parts, *comparison.notes]) + "\n"


def latex(comparison: Comparison) -> str:
    """A booktabs table: a row a run, a column a task; the best mean bold, a star where Holm's p is below 0.05."""
    blocks = []
    for metric in comparison.metrics:
        cells = [[_latex_cell(comparison, run, metric, task) for task in comparison.tasks] for run in comparison.runs]
        # our `escape`, and not `Styler.format(escape="latex")`, which leaves < and > as they are
        table = pd.DataFrame(cells, [*map(escape, comparison.runs)], [*map(escape, comparison.tasks)])
        drawn = table.style.to_latex(hrules=True, column_format="l" + "c" * len(comparison.tasks))
        blocks.append(f"% {metric}\n{drawn.rstrip()}")
    star = (
        f"% * differs from {comparison.baseline}, p < {LEVEL} after Holm's correction. "
        if comparison.baseline
        else "% "
    )
    return "\n\n".join([r"% \usepackage{booktabs}", *blocks, star + f"{comparison.confidence:.0%} intervals."]) + "\n"


def _latex_cell(comparison: Comparison, run: str, metric: str, task: str) -> str:
    mean = comparison.mean(run, metric, task)
    if mean is None:
        return "--"
    means = [m.mean for other in comparison.runs if (m := comparison.mean(other, metric, task))]
    shown = number(mean.mean)
    if len(means) > 1 and mean.mean == max(means):
        shown = rf"\textbf{{{shown}}}"
    difference = comparison.difference(run, metric, task)
    star = "$^{*}$" if difference is not None and difference.p_holm < LEVEL else ""
    return rf"{shown}{star} {{\scriptsize [{number(mean.low)}, {number(mean.high)}]}}"


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(LATEX.get(character, character) for character in text)


def figure(comparison: Comparison) -> Figure:
    """The mean of every run with its interval: a panel a metric, task by task; with more runs than there are colours, a
    panel a metric and task, run by run. Save it with ``savefig``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(comparison.runs) > COLOURS:
        return _run_by_run(comparison)
    tasks, runs = comparison.tasks, comparison.runs
    height = 1.0 + 0.22 * len(tasks) * (len(runs) + 1)
    drawn = Figure(figsize=(4.6 * len(comparison.metrics) + 0.6, max(2.4, height)), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, len(comparison.metrics), squeeze=False)[0]
    for axis, metric in zip(axes, comparison.metrics, strict=True):
        for index, run in enumerate(runs):
            offset = (index - (len(runs) - 1) / 2) * 0.8 / max(len(runs), 2)
            shown = [
                (place + offset, m) for place, task in enumerate(tasks) if (m := comparison.mean(run, metric, task))
            ]
            axis.errorbar(
                [m.mean for _, m in shown],
                [place for place, _ in shown],
                xerr=[[max(0.0, m.mean - m.low) for _, m in shown], [max(0.0, m.high - m.mean) for _, m in shown]],
                fmt="o",
                markersize=4,
                capsize=2,
                linewidth=1.2,
                color=f"C{index % 10}",
                label=run,
            )
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set_ylim(len(tasks) - 0.4, -0.6)
        axis.set_xlabel(f"{metric} (mean, {comparison.confidence:.0%} interval)")
        axis.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    drawn.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(runs)), frameon=False
    )
    return drawn


def _run_by_run(comparison: Comparison) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks, runs, metrics = comparison.tasks, comparison.runs, comparison.metrics
    size = (1.5 + 2.0 * len(tasks), len(metrics) * (1.0 + 0.24 * len(runs)))
    drawn = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawn)
    panels = drawn.subplots(len(metrics), len(tasks), squeeze=False, sharey=True, sharex="row")
    for row, metric in zip(panels, metrics, strict=True):
        for axis, task in zip(row, tasks, strict=True):
            for place, run in enumerate(runs):
                mean = comparison.mean(run, metric, task)
                if mean is None:
                    continue
                ends = [[max(0.0, mean.mean - mean.low)], [max(0.0, mean.high - mean.mean)]]
                axis.errorbar(
                    [mean.mean], [place], xerr=ends, fmt="o", markersize=4, capsize=2, linewidth=1.2, color="C0"
                )
                if run == comparison.baseline:
                    axis.axvline(mean.mean, color="gray", linewidth=0.8, linestyle="--")
            axis.set_title(task, fontsize="medium")
            axis.set_yticks(range(len(runs)), runs)
            axis.set_ylim(len(runs) - 0.4, -0.6)
            axis.grid(axis="x", alpha=0.3)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        row[len(row) // 2].set_xlabel(f"{metric} (mean, {comparison.confidence:.0%} interval)")
    return drawn


def number(value: float) -> str:
    """Three decimals, fewer for large values."""
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:.0f}"


def p_text(p: float) -> str:
    """Three decimals, or ``<.001``."""
    return "<.001" if p < 0.001 else f"{p:.3f}"


def _interval(low: float, high: float) -> str:
    return f"[{number(low)}, {number(high)}]"


def table_of(title: str, head: Sequence[str], lines: Sequence[Sequence[str]], names: int = NAMES) -> Table:
    """A table for the terminal, of which the first ``names`` columns hold names and the others numbers."""
    table = Table(
        title=Text(escaped(title)),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    # as they are: a name in brackets is no markup
    for index, column in enumerate(Text(escaped(name)) for name in head):  # numbers are never cut: names fold instead
        if index < names:
            table.add_column(column, overflow="fold", min_width=6)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(Text(escaped(text)) for text in line))
    return table


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]], names: int = NAMES) -> str:
    """The same in Markdown."""
    # not `DataFrame.to_markdown`, which leaves | in a name as it is and pads every cell to the widest
    rule = ["---" if index < names else "---:" for index in range(len(head))]
    return "\n".join("| " + " | ".join(map(escape_pipe, line)) + " |" for line in [head, rule, *lines])


def escape_pipe(text: str) -> str:
    """Text as a cell of a Markdown table shows it."""
    return text.replace("|", "\\|")
