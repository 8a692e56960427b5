"""``report.html``: one file, small, without a network, in which no text of a run acts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.run_report import RunReport
from maestro_pl.report.chosen import SHARES, chosen
from maestro_pl.report.figures import Line, Mark, line_chart, number
from maestro_pl.report.page import report_html, short
from maestro_pl.report.responses import Responses
from maestro_pl.report.run_files import RunFiles, differences
from tests.support.run_folders import write_responses, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "version_0", steps=8, nasty=True)


def page_of(folder: Path, **options: Any) -> str:
    return report_html(RunFiles(folder), chosen(Responses([folder / "rollouts.jsonl"])), **options)


def test_a_report_has_every_part_and_needs_no_network(folder: Path) -> None:
    page = page_of(folder, defaults={"trainer": {"max_steps": 200}})
    for part in (
        "What was asked",
        "What came of it",
        "95 % intervals",
        "Health",
        "Weights per task",
        "Rewards in training",
    ):
        assert f">{part}" in page
    assert '<td class="key">200</td><td class="key">16</td>' in page
    assert page.count("<details") == sum(SHARES.values())
    assert not re.search(r"<(script|link(?! rel=\"icon\")|img|iframe)|url\(|@import|src=\"", page)
    assert "1.000 <small>[0.900, 1.100]</small>" in page
    assert "+1.000" in page  # from the first to the last validation


def test_no_text_of_a_run_acts_in_a_report(folder: Path) -> None:
    page = page_of(folder)
    assert "&lt;script&gt;window.pwned" in page
    for element in re.findall(r"<[a-zA-Z][^>]*>", page):
        assert not re.search(r"pwned|\son\w+\s*=|javascript:", element), element
    assert "\x1b" not in page


def test_a_report_of_long_texts_and_large_groups_stays_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "version_0", steps=2)
    path = folder / "rollouts.jsonl"
    path.unlink()
    write_responses(path, range(1, 6), group_size=16)
    rows = [{**json.loads(line), "response": "<&>" * 20_000} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folder)
    assert len(page.encode()) < 2_000_000
    assert "more characters" in page


def test_differences_name_what_was_changed() -> None:
    default = {"a": {"b": 1, "c": [1]}, "m": {"class_path": "x.A", "init_args": {"lr": 1, "k": 2}}, "same": 0}
    config = {"a": {"b": 2, "c": [1]}, "m": {"class_path": "x.B", "init_args": {"lr": 1}}, "same": 0, "new": True}
    assert differences(config, default) == [
        ("a.b", 1, 2), ("m", default["m"], config["m"]), ("new", None, True),
    ]  # fmt: skip
    near = {**default, "m": {"class_path": "x.A", "init_args": {"lr": 3, "k": 2}}}
    assert differences(near, default) == [("m.init_args.lr", 1, 3)]


def test_a_class_is_shown_with_what_differs_from_its_defaults() -> None:
    given = {"class_path": "callbacks.FormatReward", "init_args": {"normalize": "zscore", "name": None}}
    assert short([given]) == "[FormatReward(normalize=zscore)]"
    assert short({"class_path": "gone.Away", "init_args": {"x": 1}}) == "Away(x=1)"


def trainer_of(folder: Path, fn: str, report: RunReport) -> Any:
    state = SimpleNamespace(fn=TrainerFn(fn))
    return SimpleNamespace(
        log_dir=str(folder), default_root_dir=".", is_global_zero=True, callbacks=[report], state=state
    )


def test_the_callback_writes_beside_what_is_there(folder: Path, tmp_path: Path) -> None:
    report = RunReport()
    trainer = trainer_of(folder, "fit", report)
    text = yaml.safe_dump({"method": "sft"})
    module: Any = SimpleNamespace(run_config=text, run_defaults=yaml.safe_dump({"method": "grpo"}))
    report.setup(trainer, module, "fit")
    report.on_fit_end(trainer, module)
    report.on_fit_end(trainer, module)
    assert [path.name for path in sorted(folder.glob("report*"))] == ["report-1.html", "report.html"]
    assert '<td class="key">grpo</td><td class="key">sft</td>' in (folder / "report.html").read_text()


def test_a_report_that_fails_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("boom")

    monkeypatch.setattr("callbacks.run_report.report_html", broken)
    report = RunReport()
    trainer = trainer_of(folder, "fit", report)
    module: Any = SimpleNamespace()
    report.setup(trainer, module, "fit")
    with pytest.warns(UserWarning, match=r"report.html is not written \(KeyError: 'boom'\)"):
        report.on_fit_end(trainer, module)
    assert report.path is None


def test_a_chart_by_hand() -> None:
    chart = line_chart(
        [Line("<a>", [0, 1], [0.0, 1.0], [0.0, 0.5], [0.5, 1.0])], "t<", unit=(0, 1), marks=[Mark(1, "1")]
    )
    assert 'points="50.0,196.0 470.0,10.0"' in chart
    assert "&lt;a&gt; <small>0.000 to 1.000</small>" in chart
    assert "<a>" not in chart
    assert "Nothing recorded" in line_chart([Line("a", [0], [float("nan")])], "t")
    long = line_chart([Line("a", list(range(5000)), [1.0] * 5000)], "t")
    assert len(long) < 6000
    assert [number(v) for v in (None, 0.0, 1e-6, 0.5, 123.4, 1234.6)] == [
        "–",
        "0.000",
        "1e-06",
        "0.500",
        "123.4",
        "1235",
    ]


def test_steps_are_the_policys_also_where_a_warm_up_came_first(tmp_path: Path) -> None:
    """The logger counts batches from 0: two of a warm-up, three steps, and a validation after the second of them."""
    (tmp_path / "config.yaml").write_text("model: {meta: {warmup: 2}}\ntrainer: {max_steps: 3}\n")
    run = RunFiles(tmp_path)
    rows = ["step,anchor/mean,train/loss,val/reward/a", "0,1,,", "1,2,,", "2,3,0.1,", "3,4,0.2,", "4,,,0.7", "4,5,0.3,"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    assert run.metrics()["step"].tolist() == [0, 0, 1, 2, 2, 3]
    assert run.steps() == (3, 3)
    validated = run.curve("val/reward/a")
    assert validated is not None
    assert list(validated.xs) == [2]
