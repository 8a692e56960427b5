"""The measurement of engines, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engines import main


def test_engines_take_turns_and_vllm_is_left_out_in_a_sentence(
    tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engines.json"
    main(
        [
            "--model",
            str(tiny_qwen3),
            "--rows",
            "2",
            "9",
            "--prompt",
            "4",
            "--new",
            "3",
            "--repeats",
            "2",
            "--out",
            str(out),
        ]
    )
    told = capsys.readouterr().out
    assert "vLLM is not installed here" in told
    records = json.loads(out.read_text())["records"]
    assert [(r["engine"], r["rows"], len(r["tokens_per_s"])) for r in records] == [
        ("native", 2, 2), ("hf", 2, 2), ("native", 9, 2), ("hf", 9, 2),
    ]  # fmt: skip
    for per_second in ("tokens_per_s", "tokens_per_cpu_s"):
        assert all(rate > 0 for record in records for rate in record[per_second])
    assert told.count("| native |") == 2
