"""Runs on a pretend accelerator, all in one process of their own: torch knows such a device until its process ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration as backends

from tests.support import ranks

CASES = Path(__file__).with_name("on_device.py")


def child(folder: Path) -> None:
    """``pytest on_device.py`` without what this session's workers have set."""
    for name in [name for name in os.environ if name.startswith("PYTEST_") or name == "MAESTRO_DEVICE"]:
        del os.environ[name]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "--basetemp"]
    sys.exit(pytest.main([*options, str(folder / "made"), "--rootdir", str(CASES.parents[2]), str(CASES)]))


@pytest.mark.slow  # some forty runs of two steps
@pytest.mark.skipif(
    not hasattr(backends, "_setup_privateuseone_for_python_backend"), reason="this torch makes no device in Python"
)
def test_what_runs_on_an_accelerator(tmp_path: Path) -> None:
    """Each case by itself: ``pytest tests/pretend/on_device.py``."""
    said = tmp_path / "said"
    (status,) = ranks.ended([ranks.start(child, tmp_path, output=said)], seconds=3600.0)
    assert status == 0, said.read_text()
    assert " passed" in said.read_text()
