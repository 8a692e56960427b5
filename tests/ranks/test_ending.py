"""However two ranks end, they end together, in a sentence and saved, and no process stays."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.ranks import ended, fit, start, start_ranks, wait_for

pytestmark = pytest.mark.slow

REWARD = """
import os, time
from pathlib import Path

HERE, RANK = Path(__file__).parent, os.environ.get("LOCAL_RANK", "0")
calls = 0


def mine(completions, **kwargs):
    global calls
    calls += 1
    if RANK in {hangs!r} and calls == 3:
        (HERE / f"hangs.{{RANK}}").write_text(str(os.getpid()))
        while True:
            time.sleep(600)
    (HERE / f"calls.{{RANK}}").write_text(str(calls))
    return [float(len(c)) for c in completions]
"""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def config(folder: Path, hangs: str = "", steps: int = 100_000, timeout: str = "null") -> Path:
    """A run of two ranks whose reward never comes back on some of them, in the third step."""
    (folder / "mine.py").write_text(REWARD.format(hangs=hangs))
    path = folder / "run.yaml"
    path.write_text(
        "configs: [configs/quickstart.yaml]\ndata: {batch_size: 2}\nrollout: {group_size: 4, max_new_tokens: 4}\n"
        f"trainer: {{devices: 2, max_steps: {steps}, limit_val_batches: 0, default_root_dir: {folder}}}\nanchors: []\n"
        "model: {weigher: maestro_pl.EqualWeights, meta: {signal: maestro_pl.AdvantageSignal, learner: reinforce}}\n"
        "rewards:\n  - class_path: callbacks.FunctionReward\n"
        f"    init_args: {{function: {folder}/mine.py:mine, timeout: {timeout}}}\n"
    )
    return path


def said(folder: Path) -> list[str]:
    texts = [path.read_text() for path in sorted(folder.glob("said.*"))]
    assert not any("Traceback" in text for text in texts), "\n".join(texts)[-4000:]
    return texts


def calls(folder: Path, rank: int) -> int:
    path = folder / f"calls.{rank}"
    return int(path.read_text() or 0) if path.exists() else 0


def test_sigterm_to_all_ranks_ends_all_after_the_same_batch(tmp_path: Path) -> None:
    ranks = start_ranks(fit, tmp_path, config(tmp_path), output=tmp_path / "said")
    wait_for(lambda: min(calls(tmp_path, 0), calls(tmp_path, 1)) > 2 or not all(r.is_alive() for r in ranks))
    for rank in ranks:
        os.kill(rank.pid or 0, signal.SIGTERM)
    assert ended(ranks, 120) == [143, 143], said(tmp_path)
    assert all("stopped by SIGTERM" in text for text in said(tmp_path))
    assert re.search(r"Nothing is lost: go on from it with .*last.ckpt", said(tmp_path)[0])
    assert calls(tmp_path, 0) == calls(tmp_path, 1)
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1


def test_a_rank_that_hangs_ends_all_at_its_limit(tmp_path: Path) -> None:
    ranks = start_ranks(fit, tmp_path, config(tmp_path, hangs="1", timeout="1.0"), output=tmp_path / "said")
    assert ended(ranks) == [1, 1], said(tmp_path)
    first, second = said(tmp_path)
    assert "mine did not come back within 1 s" in second
    assert "another of the 2 ranks has ended" in first
    assert "last.ckpt" in first


def test_sigterm_reaches_a_rank_that_hangs_while_the_other_waits_for_it(tmp_path: Path) -> None:
    # Lightning starts rank 1, and rank 0 alone is told, as the first process of a container is
    first = start(fit, tmp_path, config(tmp_path, hangs="1"), output=tmp_path / "said.0")
    wait_for(lambda: (tmp_path / "hangs.1").exists() or not first.is_alive())
    os.kill(first.pid or 0, signal.SIGTERM)
    assert ended([first], 120) == [143], said(tmp_path)
    (text,) = said(tmp_path)  # rank 1 writes to the same place
    assert "mine went on 10 s after SIGTERM" in text or "'mine' went on 10 s after SIGTERM" in text
    assert "stopped by SIGTERM" in text
    assert list(tmp_path.rglob("last.ckpt"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hangs.1").read_text()), 0)
