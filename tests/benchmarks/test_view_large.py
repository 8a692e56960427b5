"""The measurement of large runs: what it copies is a run whose pages open, and every response of it is there."""

import json
from pathlib import Path

from benchmarks.view_large import copied, opened
from maestro_pl.report.responses import Responses
from tests.support.run_folders import write_run


def test_a_copied_run_opens_and_has_as_many_responses(tmp_path: Path) -> None:
    source = write_run(tmp_path / "source")
    lines = (source / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "large").mkdir()
    path = copied(source, tmp_path / "large", 2 * len(lines) + 4)
    assert len(Responses([path])) == 2 * len(lines) + 4
    steps = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]
    first = [json.loads(line)["step"] for line in lines]
    assert steps[: len(lines)] == first
    assert min(steps[len(lines) :]) > max(first)  # a copy of a step is a step of its own
    found = opened(tmp_path / "large")
    assert {"groups_s", "disputed_s", "text_s"} <= set(found)
    assert all(value >= 0 for value in found.values())
