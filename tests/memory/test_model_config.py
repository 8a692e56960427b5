"""Which config an estimate takes for a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from maestro_pl.memory import workload
from maestro_pl.memory.workload import model_config


def test_a_published_model_is_known_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(name: str) -> None:
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(workload, "stored_adapter", asked)
    assert model_config("Qwen/Qwen3-0.6B").num_hidden_layers == 28
    with pytest.raises(AssertionError, match="somebody/adapters"):
        model_config("somebody/adapters")
