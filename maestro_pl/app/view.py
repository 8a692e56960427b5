"""``maestro-pl view``: the curves, weights and responses of one run or several, in a browser."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from maestro_pl.app.web import HERE, Page, web_app
from maestro_pl.errors import UserError
from maestro_pl.report.figures import line_chart, number, part_bar
from maestro_pl.report.responses import STAGES, Responses, Wanted, prompt_text, response_files
from maestro_pl.report.run_files import RunFiles, named
from maestro_pl.report.sums import sums
from maestro_pl.run.others import told

PER_PAGE = 50
SHOWN_FIRST = 6  # curves before a metric is chosen
PATIENCE = 1.0  # seconds that a page waits for an index before it says that it is being made


class Index:
    """The responses of one stage, read in a thread of its own, so that no page waits for 100,000 of them."""

    def __init__(self, run: RunFiles, stage: str) -> None:
        self.folder = run.folder
        self.files = response_files(run.folder, stage)
        self.size = sum(path.stat().st_size for path in self.files)
        self._ready: Responses | None = None
        self._error: UserError | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def get(self) -> Responses | None:
        """The responses with all lines that are written by now; None while they are read for the first time.

        Raises:
            UserError: a line of the file is no record.
        """
        self._thread.join(timeout=PATIENCE)
        if self._error is not None:
            raise self._error
        with self._lock:
            newer = self._ready.copy() if self._ready is not None else None  # another page may be reading this one
            if newer is not None and newer.refresh():
                self._ready = newer
            return self._ready

    def _read(self) -> None:
        try:
            self._ready = Responses(self.files)
        except UserError as error:
            self._error = error
        except Exception as error:  # whatever it is: a page that is told nothing waits for ever
            self._error = UserError(f"The responses in {self.folder} cannot be read ({told(error)}).")


class Viewer:
    """The runs that are looked at, and their indices."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self.runs = named(folders)
        self._indices: dict[tuple[int, str], Index] = {}
        self._lock = threading.Lock()
        for place, run in enumerate(self.runs):  # what is most likely asked for next
            for stage in run.stages()[:1]:
                self.index(place, stage)

    def run(self, number: int) -> RunFiles:
        """One of the runs.

        Raises:
            UserError: there is no such run.
        """
        if not 0 <= number < len(self.runs):
            raise UserError(f"There is no run {number}: {len(self.runs)} were opened.")
        return self.runs[number]

    def stage(self, number: int, stage: str) -> str:
        """The stage asked for, or the first that the run has; empty where nothing is recorded.

        Raises:
            UserError: an unknown stage.
        """
        if stage and stage not in STAGES:
            raise UserError(f"stage={stage!r}: expected one of {', '.join(STAGES)}.")
        found = self.run(number).stages()
        return stage if stage in found else next(iter(found), "")

    def index(self, number: int, stage: str) -> Index:
        """The index of a stage that the run has."""
        with self._lock:
            if (number, stage) not in self._indices:
                self._indices[number, stage] = Index(self.run(number), stage)
            return self._indices[number, stage]

    def version(self) -> str:
        """Changes when a file of a run does."""
        return "-".join(run.version() for run in self.runs)


def view_app(folders: Sequence[str | Path], token: str | None = None) -> FastAPI:
    """The pages for these runs.

    Args:
        folders: of the runs.
        token: what a request must know; None where only this machine can reach the server.

    Raises:
        UserError: a folder holds no run.
    """
    viewer = Viewer(folders)
    page = Page(
        [HERE / "templates" / "view"], number=number, part_bar=part_bar, several=len(viewer.runs) > 1, stages=STAGES,
        percent=_percent,
    )  # fmt: skip
    app = web_app(page, token)

    def answer(request: Request, template: str, **values: Any) -> Response:
        version = viewer.version()
        if request.query_params.get("seen") == version and values.get("ready", True):
            return Response(status_code=204)  # nothing new: the page keeps what it shows
        kept = [(key, value) for key, value in request.query_params.multi_items() if key != "seen"]
        again = f"{request.url.path}?{urlencode([*kept, ('seen', version)])}"
        steps = [(run.name, *run.steps()) for run in viewer.runs]
        return page(template, path=request.url.path, again=again, steps=steps, runs=viewer.runs, **values)

    @app.get("/")
    def overview(request: Request) -> Response:
        names = _metric_names(viewer)[:SHOWN_FIRST]
        return answer(request, "overview.html", charts=[_chart(viewer, name) for name in names])

    @app.get("/curves")
    def curves(request: Request, metric: Annotated[list[str], Query()] = []) -> Response:  # noqa: B006 (FastAPI copies it)
        names = _metric_names(viewer)
        chosen = [name for name in metric if name in names] or names[:1]
        charts = [_chart(viewer, name) for name in chosen[:24]]
        return answer(request, "curves.html", names=names, chosen=chosen, charts=charts)

    @app.get("/weights")
    def weights(request: Request) -> Response:
        charts = [
            (
                run.name,
                [
                    line_chart(lines, _task(task), unit=(0.0, 1.0), marks=run.marks())
                    for task, lines in run.weight_lines()
                ],
            )
            for run in viewer.runs
        ]
        return answer(request, "weights.html", charts=charts)

    @app.get("/groups")
    def groups(request: Request, run: int = 0, stage: str = "", page: int = 1) -> Response:
        stage = viewer.stage(run, stage)
        found = viewer.index(run, stage).get() if stage else None
        wanted = _wanted(request)
        shown: dict[str, Any] = {"rows": [], "total": 0, "count": 0}
        if found is not None:
            shown = _listed(viewer.run(run), found, wanted, max(1, page))
        size = viewer.index(run, stage).size if stage else 0
        query = urlencode({**_asked(request), "run": run, "stage": stage})
        return answer(
            request, "groups.html", run=run, stage=stage, wanted=wanted, ready=found is not None or not stage, size=size,
            found=found, query=query, has=viewer.run(run).stages(), page=max(1, page), per_page=PER_PAGE, **shown,
        )  # fmt: skip

    @app.get("/group")
    def group(request: Request, id: int, run: int = 0, stage: str = "", show: str = "plain") -> Response:
        stage = viewer.stage(run, stage)
        found = viewer.index(run, stage).get() if stage else None
        if found is None:
            raise UserError("The responses are still being read; open the page again in a moment.")
        query = urlencode({**_asked(request), "run": run, "stage": stage})
        values = _group(viewer, found, _wanted(request), run, stage, id)
        return answer(request, "group.html", query=query, show=show, **values)

    @app.get("/side")
    def side(request: Request, stage: str = "", prompt: int = 0, show: str = "plain") -> Response:
        return answer(request, "side.html", show=show, **_side(viewer, stage, prompt))

    return app


def _metric_names(viewer: Viewer) -> list[str]:
    return list(dict.fromkeys(name for run in viewer.runs for name in run.metric_names()))


def _chart(viewer: Viewer, metric: str) -> Any:
    one = len(viewer.runs) == 1
    lines = [run.curve(metric, metric if one else run.name) for run in viewer.runs]
    return line_chart([line for line in lines if line is not None], metric, marks=viewer.runs[0].marks() if one else ())


def _task(task: str) -> str:
    return "all tasks" if task == "all" else task


def _asked(request: Request) -> dict[str, str]:
    """What of the address says which groups are wanted."""
    names = ("task", "first", "last", "only", "by", "low", "high", "q", "sort")
    return {name: value for name in names if (value := request.query_params.get(name, "").strip())}


def _wanted(request: Request) -> Wanted:
    asked = _asked(request)
    numbers: dict[str, Any] = {name: _number(name, asked[name]) for name in ("low", "high") if name in asked}
    numbers |= {name: int(_number(name, asked[name])) for name in ("first", "last") if name in asked}
    texts: dict[str, Any] = {name: asked[name] for name in ("task", "only", "by", "sort") if name in asked}
    return Wanted(text=asked.get("q", ""), **texts, **numbers)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{name}={text!r}: expected a number.")
    return value


def _percent(share: float) -> str:
    return "–" if not math.isfinite(share) else f"{100 * share:.0f} %"


def _listed(run: RunFiles, found: Responses, wanted: Wanted, page: int) -> dict[str, Any]:
    """One page of the list: groups, and between them what was found at their steps."""
    numbers = found.find(wanted)
    first = (page - 1) * PER_PAGE
    chosen = numbers[first : first + PER_PAGE]
    shown = found.standing(wanted.by)
    findings = list(enumerate(run.findings(), 1)) if wanted.sort == "step" else []
    before = int(found.groups["step"].iat[numbers[first - 1]]) if 0 < first <= len(numbers) else -1
    rows: list[dict[str, Any]] = []
    for each in chosen:
        row = found.groups.iloc[each].to_dict()
        rows += [{"finding": f, "n": n} for n, f in findings if before < int(f.get("step", 0)) <= row["step"]]
        before = int(row["step"])
        rows.append({"id": each, "finding": None, "shown": shown[each], **row})
    if first + PER_PAGE >= len(numbers):
        rows += [{"finding": f, "n": n} for n, f in findings if int(f.get("step", 0)) > before]
    return {"rows": rows, "total": len(numbers), "count": len(found)}


def _group(viewer: Viewer, found: Responses, wanted: Wanted, run: int, stage: str, chosen: int) -> dict[str, Any]:
    """One group with its sums, and its neighbours in the list that it was chosen from."""
    records = found.read(chosen)
    order = found.find(wanted)
    at = order.index(chosen) if chosen in order else -1
    return {
        "run": run,
        "stage": stage,
        "id": chosen,
        "records": list(zip(records, sums(records), strict=True)),
        "prompt": prompt_text(records[0]["prompt"]),
        "row": found.groups.iloc[chosen].to_dict(),
        "before": order[at - 1] if at > 0 else None,
        "after": order[at + 1] if 0 <= at < len(order) - 1 else None,
        "findings": viewer.run(run).findings(),
    }


def _side(viewer: Viewer, stage: str, chosen: int) -> dict[str, Any]:
    """The groups of every run for one of the prompts that all have."""
    if len(viewer.runs) < 2:
        raise UserError("Side by side needs two runs: `maestro-pl view RUN RUN`.")
    common = [s for s in STAGES if all(s in run.stages() for run in viewer.runs)]
    if stage and stage not in common:
        raise UserError(f"stage={stage!r}: all these runs recorded {', '.join(common) or 'nothing'}.")
    if not common:
        return {"stage": "", "common": [], "prompts": [], "columns": [], "chosen": 0}
    stage = stage or common[0]
    found = [viewer.index(number, stage).get() for number in range(len(viewer.runs))]
    ready = [each for each in found if each is not None]
    if len(ready) < len(found):
        raise UserError("The responses are still being read; open the page again in a moment.")
    tables = [each.prompts() for each in ready]
    prompts = [prompt for prompt in tables[0] if all(prompt in table for table in tables[1:])]
    if not prompts:
        return {"stage": stage, "common": common, "prompts": [], "columns": [], "chosen": 0}
    chosen = min(max(chosen, 0), len(prompts) - 1)
    columns = []
    for place, (run, each, table) in enumerate(zip(viewer.runs, ready, tables, strict=True)):
        ids = table[prompts[chosen]]
        records = each.read(ids[-1])  # the newest: what the run has come to
        newest = each.groups.iloc[ids[-1]]
        columns.append(
            {
                "run": place,
                "name": run.name,
                "id": ids[-1],
                "times": len(ids),
                "step": newest["step"],
                "mean": newest["mean"],
                "rewards": _means(records),
                "records": list(zip(records, sums(records), strict=True)),
            }
        )
    return {"stage": stage, "common": common, "prompts": prompts, "columns": columns, "chosen": chosen}


def _means(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of every raw reward over the responses that it applies to."""
    names = dict.fromkeys(name for record in records for name in record.get("rewards") or {})
    known = {n: [r["rewards"][n] for r in records if r["rewards"].get(n) is not None] for n in names}
    return {name: sum(values) / len(values) for name, values in known.items() if values}
