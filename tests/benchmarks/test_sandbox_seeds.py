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
        made = tmp_path / "quickstart_0" / f"version_{len(ran)}"
        made.mkdir(parents=True)
        if killed:
            raise KeyboardInterrupt
        (made / "before_after.csv").write_text(TABLE)

    killed = True
    monkeypatch.setattr("subprocess.run", run)
    expected = {
        "reply": {"utility_before": 0.2, "utility_after": 0.4, "length_before": 20.0, "length_after": 30.0},
    }
    with pytest.raises(KeyboardInterrupt):
        sandbox_seeds.run("quickstart", 0, tmp_path, [])
    killed = False
    assert sandbox_seeds.run("quickstart", 0, tmp_path, []) == expected
    assert sandbox_seeds.run("quickstart", 0, tmp_path, []) == expected
    assert len(ran) == 2
    sandbox_seeds.run("quickstart", 0, tmp_path, ["--trainer.max_steps=3"])
    assert len(ran) == 3
