"""Where the clicks of a study's raters are kept."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maestro_pl.study.store import Clicks


def test_raters_who_come_in_the_same_moment_all_find_the_file(tmp_path: Path) -> None:
    def clicks(path: Path, rater: str, together: threading.Barrier) -> None:
        together.wait(60)
        own = Clicks(path)
        own.add(rater, 0, "left")
        own.add(rater, 1, "tie")

    for attempt in range(30):
        path, together = tmp_path / f"{attempt}.db", threading.Barrier(3)
        with ThreadPoolExecutor(3) as people:
            done = [people.submit(clicks, path, name, together) for name in ("ann", "bob", "cem")]
        for person in done:
            person.result()
        assert len(Clicks(path).all()) == 6
