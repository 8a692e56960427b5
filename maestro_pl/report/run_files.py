"""What a run has written, read while it may still be running."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from maestro_pl.errors import UserError, from_cell
from maestro_pl.report.figures import Line, Mark
from maestro_pl.report.responses import STAGES, response_files
from maestro_pl.run.paths import holds_run

CONFIGS = ("config.yaml", "test.config.yaml", "validate.config.yaml", "predict.config.yaml")
#: What a reader looks at after the rewards, in this order, where a run has it.
LATER = ("reward/scalar", "group/dead_fraction", "policy/entropy", "length/mean")


class RunFiles:
    """The files of one run's folder; each call reads what is there now.

    Args:
        folder: of the run, such as ``runs/quickstart/version_0``.
        name: what it is called among others; default: the folder's last two parts.

    Raises:
        UserError: the folder holds no run.
    """

    def __init__(self, folder: str | Path, name: str = "") -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{folder}: there is no such folder; give one of a run, such as runs/quickstart/version_0.")
        if not holds_run(self.folder) and not self.stages() and not any(self.folder.glob("*_metrics.csv")):
            inside = sorted(path.parent.name for path in self.folder.glob("*/config.yaml"))
            meant = f": it has the runs {', '.join(inside)}" if inside else ", which has a config.yaml"
            raise UserError(f"{folder} holds no run; give the folder of one{meant}.")
        self.name = name or "/".join(self.folder.resolve().parts[-2:])

    def stages(self) -> list[str]:
        """The stages whose responses are recorded: keys of ``STAGES``."""
        return [stage for stage in STAGES if response_files(self.folder, stage)]

    def version(self) -> str:
        """Changes when one of the files does."""
        marks = []
        for path in sorted(self.folder.glob("*")):
            try:
                stat = path.stat()
            except OSError:
                continue
            if path.suffix in (".csv", ".jsonl", ".json", ".yaml"):
                marks.append(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}")
        return f"{hash(tuple(marks)) & 0xFFFFFFFF:x}"

    def metrics(self) -> pd.DataFrame:
        """``metrics.csv``: a row a logged step, a column a metric; empty where there is none.

        ``step`` is the policy step, as in every other file, 0 in the warm-up. The logger's own counts batches from 0, those
        of the Conductor's warm-up included, and calls a validation after the batch that it follows.
        """
        frame = _csv(self._newest("metrics"))
        if "step" in frame and len(frame):
            trained = [n for n in frame.columns if n not in ("step", "epoch") and not n.startswith(("val/", "test/"))]
            batches = frame["step"] + frame[trained].notna().any(axis=1).astype(int)
            frame["step"] = (batches - self._warm_up()).clip(lower=0)
        return frame

    def _warm_up(self) -> int:
        """Batches of the Conductor's warm-up."""
        given = self.config
        for name in ("model", "meta", "warmup"):
            given = given.get(name) if isinstance(given, dict) else None  # type: ignore[assignment]
        return given if isinstance(given, int) else 0

    def weights(self) -> pd.DataFrame:
        """``weights.csv``: ``step``, ``task``, ``reward``, ``mean``, ``std``; empty where there is none."""
        return _csv(self._newest("weights"), names=("task", "reward"))

    def evaluations(self, split: str) -> pd.DataFrame:
        """``val_metrics.csv`` or ``test_metrics.csv``: ``step``, ``task``, ``metric``, ``mean``, ``low``, ``high``, ``n``."""
        return _csv(self._newest(f"{split}_metrics"), names=("task", "metric"))

    def findings(self) -> list[dict[str, Any]]:
        """Of ``health.json``: ``key``, ``step``, ``text``, ``advice``; None is no file, an empty list a healthy run."""
        path = self._newest("health", ".json")
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path else {}
        except (OSError, ValueError):
            return []  # half written: the next look has it
        return [each for each in found.get("findings", []) if isinstance(each, dict)]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config that the run was started with; empty where none was saved."""
        for name in CONFIGS:
            path = self.folder / name
            if path.is_file():
                read = yaml.safe_load(path.read_text(encoding="utf-8"))
                return read if isinstance(read, dict) else {}
        return {}

    def steps(self) -> tuple[int | None, int | None]:
        """The last policy step that was logged, and the one that the run ends at."""
        metrics = self.metrics()
        last = int(metrics["step"].max()) if "step" in metrics and len(metrics) else None
        most = (self.config.get("trainer") or {}).get("max_steps")
        return last, most if isinstance(most, int) and most > 0 else None

    def summary(self) -> list[tuple[str, str]]:
        """What was asked of this run, in a few words each."""
        return summary(self.config)

    def metric_names(self, frame: pd.DataFrame | None = None) -> list[str]:
        """The metrics that have a value, the rewards in front and the means of each task behind.

        Args:
            frame: ``metrics()``, if it has been read already.
        """
        frame = self.metrics() if frame is None else frame
        names = [name for name in frame.columns if name not in ("step", "epoch") and frame[name].notna().any()]
        rewards = [
            n
            for n in names
            if n.startswith("reward/") and n not in LATER and not n.endswith("_std") and n.count("/") == 1
        ]
        ahead = [*rewards, *(name for name in LATER if name in names)]
        of_task = [n for n in names if n.startswith(("reward/", "length/")) and n.count("/") > 1]
        between = [name for name in names if name not in ahead and name not in of_task]
        return [*ahead, *between, *of_task]

    def curve(self, metric: str, name: str = "", frame: pd.DataFrame | None = None) -> Line | None:
        """One metric over the steps, with its ``_std`` as a band where it has one; of ``frame`` as in ``metric_names``."""
        frame = self.metrics() if frame is None else frame
        if metric not in frame or "step" not in frame:
            return None
        frame = frame[frame[metric].notna()]
        xs, ys = frame["step"].tolist(), pd.to_numeric(frame[metric], errors="coerce").tolist()
        spread = f"{metric}_std"
        if metric.startswith("reward/") and spread in frame and frame[spread].notna().all():
            stds = frame[spread].tolist()
            return Line(name or metric, xs, ys, *_band(ys, stds))
        return Line(name or metric, xs, ys)

    def weight_lines(self) -> Iterator[tuple[str, list[Line]]]:
        """Each task's weights over the steps, a line a reward, with one standard deviation around it."""
        frame = self.weights()
        for task in dict.fromkeys(frame["task"]) if len(frame) else ():
            lines = []
            for reward in dict.fromkeys(frame["reward"]):
                rows = frame[(frame["task"] == task) & (frame["reward"] == reward)]
                if len(rows):
                    means = rows["mean"].tolist()
                    low, high = _band(means, rows["std"].tolist())
                    edges = [max(0.0, v) for v in low], [min(1.0, v) for v in high]
                    lines.append(Line(reward, rows["step"].tolist(), means, *edges))
            yield task, lines

    def marks(self) -> list[Mark]:
        """The steps at which something was found, by the number that it has in the list of findings."""
        return [Mark(float(each.get("step", 0)), str(n)) for n, each in enumerate(self.findings(), 1)]

    def _newest(self, stem: str, suffix: str = ".csv") -> Path | None:
        """``stem.csv`` or the last of ``stem-1.csv``, ...: a second evaluation in this folder writes another file."""
        found = [p for p in self.folder.glob(f"{stem}*{suffix}") if _is_numbered(p.stem, stem)]
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def named(folders: Sequence[str | Path]) -> list[RunFiles]:
    """Runs with names that tell them apart.

    Raises:
        UserError: a folder holds no run, or is given twice.
    """
    runs = [RunFiles(folder) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is given twice: give each run once.")
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs


def differences(config: Mapping[str, Any], default: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where a config leaves another one: the key, its value there, its value here; None where a side has none.

    Lists are compared as a whole; a class whose path differs is named once, with what it was given.
    """
    return list(_differences(config, default, ""))


def _differences(here: Any, there: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    both = isinstance(here, Mapping) and isinstance(there, Mapping)
    if not both or here.get("class_path") != there.get("class_path"):
        if here != there:
            yield key, there, here
        return
    for name in dict.fromkeys([*there, *here]):
        yield from _differences(here.get(name), there.get(name), f"{key}.{name}" if key else str(name))


def summary(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a config asks, in a few words each: method, policy, weigher, signal, data, rewards, steps."""
    model, data = config.get("model") or {}, config.get("data") or {}
    meta = model.get("meta") or {}
    policy = (model.get("policy") or {}).get("init_args") or model.get("policy") or {}
    sources = data.get("sources") or []
    rollout, trainer = config.get("rollout") or {}, config.get("trainer") or {}
    weigher = model.get("weigher")
    lines = [
        ("Method", str(config.get("method", ""))),
        ("Policy", str(policy.get("model", ""))),
        ("Weights", _class(weigher)),
        ("Learns from", " with ".join(filter(None, [_class(meta.get("signal")), str(meta.get("learner") or "")]))),
        (
            "Data",
            ", ".join(str(s.get("name") or s.get("path")) if isinstance(s, dict) else str(s) for s in _list(sources)),
        ),
        ("Rewards", ", ".join(map(_reward, _list(config.get("rewards"))))),
        ("Anchors", ", ".join(map(_reward, _list(config.get("anchors"))))),
        ("Metrics", ", ".join(map(_reward, _list(config.get("metrics"))))),
        (
            "Groups",
            f"{data.get('batch_size')} prompts × {rollout.get('group_size')} responses a step" if rollout else "",
        ),
        ("Steps", str(trainer.get("max_steps", ""))),
        ("Seed", str(config.get("seed_everything", ""))),
    ]
    return [(name, text) for name, text in lines if text]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _class(value: Any) -> str:
    path = value.get("class_path", "") if isinstance(value, dict) else value or ""
    return str(path).rpartition(".")[2]


def _reward(value: Any) -> str:
    arguments = (value.get("init_args") or {}) if isinstance(value, dict) else {}
    name, kind = arguments.get("name"), _class(value)
    return f"{name} ({kind})" if name else kind


def _band(values: Sequence[float], stds: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = [(v, s if math.isfinite(s) else 0.0) for v, s in zip(values, stds, strict=True)]
    return [v - s for v, s in pairs], [v + s for v, s in pairs]


def _is_numbered(stem: str, name: str) -> bool:
    rest = stem.removeprefix(name)
    return rest == "" or (rest.startswith("-") and rest[1:].isdecimal())


def _csv(path: Path | None, names: Sequence[str] = ()) -> pd.DataFrame:
    if path is None:
        return pd.DataFrame()
    try:
        texts: dict[Any, Any] = dict.fromkeys(names, str)
        frame = pd.read_csv(path, keep_default_na=not names, na_values=[""], dtype=texts, on_bad_lines="skip")
    except (OSError, ValueError, pd.errors.ParserError):  # being written: the next look has it
        return pd.DataFrame()
    for name in names:
        frame[name] = frame[name].fillna("").map(from_cell)
    return frame
