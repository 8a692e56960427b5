"""The report on the rewards as text to read, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from maestro_pl.errors import cell
from maestro_pl.evaluation.reward_report import ALL_TASKS, Agreement, ReportRow, RewardStatistics
from maestro_pl.evaluation.reward_table import aligned

NO_ANCHOR = (
    "No anchor, so nothing says which rewards help and the columns on it are left out: give a reward with role anchor "
    "(a verifier, a judge, labels of people) under `anchors`."
)
UNASKED = (
    "{} asked about none of these responses, so nothing says which rewards help and the columns on it are left out: "
    "`maestro-pl rewards` asks about every group, and training where a Conductor with signal AnchorSignal, or "
    "model.anchoring.hybrid, reads the answers."
)
PAIRS = "Correlations inside groups ± half of the 95 % interval:"
FIELDS = (
    "task", "reward", "role", "normalize", "n", "applied", "applied_share", "mean", "spread", "groups", "told_apart",
    "told_apart_share",
)  # fmt: skip
ANCHOR_FIELDS = ("anchor_r", "anchor_low", "anchor_high", "anchor_groups", "verdict", "because")


def report_text(statistics: RewardStatistics, anchors: Sequence[str] = ()) -> str:
    """Tables to read: for each task its rewards, then the correlations between them.

    Args:
        statistics: of all batches.
        anchors: names of the run's anchors, asked or not.
    """
    parts = []
    rows = statistics.rows()
    for task, sums in statistics.by_task().items():
        own = [row for row in rows if row.task == task]
        title = "all tasks" if task == ALL_TASKS and len(statistics.tasks) > 1 else task
        parts.append(f"{title}: {sums.responses} responses in {sums.groups} groups\n{_table(own)}")
        if pairs := _pairs(own):
            parts.append(f"{PAIRS}\n{pairs}")
    return "\n\n".join([*parts, *notes(rows, anchors)])


def notes(rows: Sequence[ReportRow], anchors: Sequence[str] = ()) -> list[str]:
    """What has to be said of the tables: how to read them, tasks without an anchor, pairs that are one and the same."""
    said = []
    anchored = {row.task for row in rows if row.anchor is not None}
    without = [task for task in dict.fromkeys(row.task for row in rows) if task not in {*anchored, ALL_TASKS}]
    if not any(row.role == "anchor" for row in rows):
        named = ", ".join(map(repr, anchors))
        were = f"The anchor {named} was" if len(anchors) == 1 else f"The anchors {named} were"
        said.append(UNASKED.format(were) if anchors else NO_ANCHOR)
    elif without:
        said.append(f"No anchor gave a score in {', '.join(without)}: its columns are left out there.")
    if anchored:
        said.append(
            "helps: goes along with the anchor (the interval is above 0); hurts: against it (below 0); silent: neither can be "
            "said."
        )
    return said


def _table(rows: Sequence[ReportRow]) -> str:
    anchored = any(row.anchor is not None for row in rows)
    heads = ("reward", "role", "applied", "mean", "spread", "groups told apart")
    lines: list[tuple[str, ...]] = [(*heads, "with the anchor", "verdict") if anchored else heads]
    for row in rows:
        cells: tuple[str, ...] = (
            row.reward,
            row.role,
            f"{row.applied} of {row.n}",
            _number(row.mean),
            _number(row.spread),
            f"{row.told_apart} of {row.groups}" if row.groups else "-",
        )
        if anchored:
            because = f" ({row.because})" if row.because else ""
            cells = (*cells, "-" if row.anchor is None else _agreement(row.anchor), f"{row.verdict or '-'}{because}")
        lines.append(cells)
    return aligned(lines)


def _pairs(rows: Sequence[ReportRow]) -> str:
    """The lower triangle of the correlations; empty with fewer than two rewards."""
    names = [row.reward for row in rows if row.role != "anchor"]
    found = {row.reward: row.others for row in rows}
    if len(names) < 2:
        return ""
    lines = [("", *names[:-1])]
    for place, name in enumerate(names[1:], start=1):
        cells = [_with_half_width(found[name][other]) for other in names[:place]]
        lines.append((name, *cells, *[""] * (len(names) - 1 - place)))
    return aligned(lines)


def _agreement(found: Agreement) -> str:
    if not found.groups:
        return "-"
    interval = "" if math.isnan(found.low) else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.r:+.2f}{interval} ({found.groups})"


def _with_half_width(found: Agreement) -> str:
    if not found.groups:
        return "-"
    half = max(found.r - found.low, found.high - found.r)  # one end may be cut at 1
    if half >= 1.0:  # a correlation that may be anything
        return "too few"
    return f"{found.r:+.2f}" + ("" if math.isnan(half) else f" ±{half:.2f}")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def csv_table(rows: Sequence[ReportRow]) -> str:
    """One line a task and reward; four columns for the correlation with each other reward."""
    names = list(dict.fromkeys(name for row in rows for name in row.others))
    anchored = any(row.anchor is not None for row in rows)
    parts = ("r", "low", "high", "groups")
    heads = [*FIELDS, *(ANCHOR_FIELDS if anchored else ()), *(f"{name} {part}" for name in names for part in parts)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([cell(head) for head in heads])
    for row in rows:
        line = [getattr(row, head) if hasattr(row, head) else _shares(row)[head] for head in FIELDS]
        if anchored:
            line += [*(row.anchor or ("",) * 4), row.verdict or "", row.because]
        line += [value for name in names for value in row.others.get(name, ("",) * 4)]
        writer.writerow(["" if _is_nan(value) else cell(value) for value in line])
    return file.getvalue()


def json_report(statistics: RewardStatistics) -> str:
    """One object: ``tasks``, each with its sizes and rewards, and the notes."""
    rows = statistics.rows()
    tasks = {
        task: {
            "responses": sums.responses,
            "groups": sums.groups,
            "rewards": {row.reward: _plain(row) for row in rows if row.task == task},
        }
        for task, sums in statistics.by_task().items()
    }
    return json.dumps({"tasks": tasks, "notes": notes(rows)}, ensure_ascii=False, allow_nan=False)


def _plain(row: ReportRow) -> dict[str, Any]:
    plain = {name: value for name, value in {**vars(row), **_shares(row)}.items() if name not in ("task", "reward")}
    plain["anchor"] = None if row.anchor is None else _without_nan(row.anchor._asdict())
    plain["others"] = {name: _without_nan(found._asdict()) for name, found in row.others.items()}
    return _without_nan(plain)


def _shares(row: ReportRow) -> dict[str, float]:
    return {
        "applied_share": row.applied / row.n if row.n else math.nan,
        "told_apart_share": row.told_apart / row.groups if row.groups else math.nan,
    }


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {name: None if _is_nan(value) else value for name, value in values.items()}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
