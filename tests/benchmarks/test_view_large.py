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
    assert len({json.loads(line)["response"] for line in path.read_text(encoding="utf-8").splitlines()}) > len(lines)
    found = opened(tmp_path / "large")
    assert {"groups_s", "disputed_s", "text_s"} <= set(found)
    assert all(value >= 0 for value in found.values())
