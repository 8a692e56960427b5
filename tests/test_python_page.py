"""The program of docs/python.md runs as it stands, and the names beside TRL's are arguments that exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import lightning
import pytest

import callbacks
import maestro_pl
from maestro_pl.cli.renamed import TRL

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.mark.slow
def test_the_program_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    trainer: Any = names["trainer"]
    assert trainer.global_step == trainer.max_steps > 0


def test_each_name_of_trl_stands_beside_an_argument_of_ours() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Beside TRL")[2]
    rows = re.findall(r"^\| (`.+) \| (.+) \|$", section, flags=re.MULTILINE)
    known = {*TRL, "model", "peft_config", "processing_class", "eval_dataset", "max_grad_norm"}  # the last is ours too
    named = [name for left, _ in rows for name in re.findall(r"`(\w+)(?:=[^`]*)?`", left)]
    assert len(named) > 25
    assert set(named) <= known
    for _, right in rows:
        for owner, argument in re.findall(r"`(?:callbacks=\[\.\.\., )?(\w+)\((\w+)=", right):
            found = [getattr(place, owner) for place in (maestro_pl, callbacks, lightning) if hasattr(place, owner)]
            assert argument in inspect.signature(found[0]).parameters, (owner, argument)
