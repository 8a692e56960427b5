"""The quickstart over several seeds: what was run is not run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import sandbox_seeds

TABLE = "task,metric,before,after\nreply,reward/utility,0.2,0.4\nreply,length/mean,20,30\nreply,reward/format,0,1\n"


def test_a_seed_that_came_to_its_end_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        ran.append(command)
        made = tmp_path / "quickstart_0" / "version_0"
        made.mkdir(parents=True)
        (made / "before_after.csv").write_text(TABLE)

    monkeypatch.setattr("subprocess.run", run)
    expected = {
        "reply": {"utility_before": 0.2, "utility_after": 0.4, "length_before": 20.0, "length_after": 30.0},
    }
    assert sandbox_seeds.run("quickstart", 0, tmp_path, []) == expected
    assert sandbox_seeds.run("quickstart", 0, tmp_path, []) == expected
    assert len(ran) == 1
