"""``report.html``: what a run was asked and what came of it, in one file that opens without a network."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from maestro_pl import __version__
from maestro_pl.errors import escaped
from maestro_pl.report.chosen import Group
from maestro_pl.report.figures import line_chart, number, part_bar
from maestro_pl.report.responses import prompt_text
from maestro_pl.report.run_files import RunFiles, differences
from maestro_pl.report.sums import sums

LARGEST = 1_900_000  # bytes: the file is sent by mail
#: Letters of a text, responses of a group and figures that are shown; the next are tried where a report grows too large.
SIZES = ((3000, 8, 16), (800, 6, 8), (200, 4, 2))


def report_html(
    run: RunFiles,
    groups: Sequence[Group],
    evaluation: Sequence[Mapping[str, Any]] = (),
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """The whole page, of less than two million bytes.

    Args:
        run: whose files are read.
        groups: the ten that are shown.
        evaluation: rows ``task``, ``metric``, ``mean``, ``low``, ``high``, ``n``; without any, the first and the last
            validation of the run stand side by side.
        defaults: the config that this one's differences are named from; None: they are not known.
    """
    template = _environment().get_template("report.html")
    tables = _tables(run, evaluation)
    shown_groups = [(group, list(zip(group.records, sums(group.records), strict=True))) for group in groups]
    page = ""
    for letters, responses, figures in SIZES:
        page = template.render(
            run=run, version=__version__, tables=tables, groups=shown_groups, letters=letters, most=responses,
            weights=_weights(run, figures), curves=_curves(run, figures), findings=run.findings(),
            changed=None if defaults is None else _changed(run.config, defaults), steps=run.steps(),
        )  # fmt: skip
        if len(page.encode()) <= LARGEST:
            break
    return page


def write_report(path: Path, page: str) -> None:
    """Write the page whole: a reader never meets half of one."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(page, encoding="utf-8", errors="backslashreplace")
    beside.replace(path)


def _environment() -> Environment:
    folder = Path(__file__).parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=_plain, cut=_cut, prompt=prompt_text, short=short)
    environment.globals.update(number=number, part_bar=part_bar, interval=_interval)
    return environment


def _plain(text: Any) -> Markup:
    return escape(escaped(str(text)))


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[:letters]} … ({len(text) - letters} more characters)"


def _tables(run: RunFiles, evaluation: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One table a task: rows with one evaluation, or with two and their difference."""
    measured = [{"step": 0, **row} for row in evaluation]
    frame = pd.DataFrame(measured) if measured else run.evaluations("val")
    if frame.empty:
        return []
    steps = sorted(frame["step"].unique())
    sides = [steps[0], steps[-1]] if len(steps) > 1 else [steps[-1]]
    tasks = [task for task in dict.fromkeys(frame["task"]) if task != "all"]
    tables = []
    for task in tasks if len(tasks) == 1 else ["all", *tasks]:
        rows = []
        of_task = frame[frame["task"] == task]
        for metric in dict.fromkeys(of_task["metric"]):
            found = [of_task[(of_task["metric"] == metric) & (of_task["step"] == step)] for step in sides]
            values = [each.iloc[-1].to_dict() if len(each) else None for each in found]
            ends = [
                value[end] for value in values if value for end in ("low", "high", "mean") if math.isfinite(value[end])
            ]
            change = values[-1]["mean"] - values[0]["mean"] if len(values) > 1 and all(values) else None  # type: ignore[index]
            rows.append(
                {
                    "metric": metric,
                    "values": values,
                    "ends": (min(ends), max(ends)) if ends else (0, 1),
                    "change": change,
                }
            )
        tables.append(
            {"task": "all tasks" if task == "all" else task, "rows": rows, "steps": sides if not evaluation else []}
        )
    return tables


def _interval(values: Sequence[Mapping[str, Any] | None], ends: tuple[float, float]) -> Markup:
    """Means as dots on their intervals, before above after."""
    low, high = ends
    span = (high - low) or 1.0
    parts = []
    for line, value in enumerate(values):
        if value is None or not all(math.isfinite(value[end]) for end in ("low", "high", "mean")):
            continue
        a, b, m = (round(3 + 94 * (value[end] - low) / span, 1) for end in ("low", "high", "mean"))
        y = 5 if len(values) == 1 else 3.5 + 5 * line
        fill = "var(--page)" if line + 1 < len(values) else "currentColor"
        parts.append(
            Markup(
                '<line x1="{}" x2="{}" y1="{y}" y2="{y}" stroke="currentColor"/>'
                '<circle cx="{}" cy="{y}" r="2" fill="{}" stroke="currentColor"/>'
            ).format(a, b, m, fill, y=y)
        )
    return Markup('<svg class="interval" viewBox="0 0 100 12" aria-hidden="true">{}</svg>').format(
        Markup("").join(parts)
    )


def _weights(run: RunFiles, most: int) -> list[Markup]:
    titles = {"all": "all tasks"}
    lines = list(run.weight_lines())[:most]
    marks = run.marks()
    return [line_chart(each, titles.get(task, task), unit=(0.0, 1.0), marks=marks) for task, each in lines]


def _curves(run: RunFiles, most: int) -> list[Markup]:
    frame, marks = run.metrics(), run.marks()  # of a long run, half a second to read
    found = run.metric_names(frame)
    names = [n for n in found if n.startswith("reward/") and n.count("/") == 1 and not n.endswith("_std")]
    names += [n for n in found if n in ("length/mean", "group/dead_fraction", "policy/kl", "policy/entropy")]
    curves = [run.curve(name, frame=frame) for name in names[:most]]
    return [line_chart([curve], curve.name, marks=marks) for curve in curves if curve is not None]


def _changed(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    return [(key, short(there), short(here)) for key, there, here in differences(config, defaults)]


def short(value: Any) -> str:
    """A value of a config in one line, without what is empty; a class with the arguments that differ from its own defaults."""
    if isinstance(value, Mapping) and "class_path" in value:
        path, given = str(value["class_path"]), value.get("init_args") or {}
        own = _own_defaults(path)
        kept = [f"{name}={short(each)}" for name, each in given.items() if name not in own or own[name] != each]
        return f"{path.rpartition('.')[2]}({', '.join(kept)})"
    if isinstance(value, Mapping):
        told = {name: each for name, each in value.items() if each not in (None, "", [], {})}
        return "{" + ", ".join(f"{name}: {short(each)}" for name, each in told.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(short, value)) + "]"
    return "–" if value is None else str(value)


def _own_defaults(path: str) -> dict[str, Any]:
    module, _, name = path.rpartition(".")
    try:
        parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):  # a class of the run that is not here any more
        return {}
    return {n: p.default for n, p in parameters.items() if isinstance(p.default, (str, int, float, bool, type(None)))}
