"""docs/data.md: its examples parse, and it leaves out no option."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from maestro_pl.data import PromptDataModule, Source

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def parse(config: str) -> PromptDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PromptDataModule, "data")
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes
    data: PromptDataModule = instantiate(parser.parse_string(config)).data
    return data


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(example).sources


def test_every_option_is_shown() -> None:
    options = set(inspect.signature(PromptDataModule).parameters) | {field.name for field in dataclasses.fields(Source)}
    shown = set(re.findall(r"(\w+):", "\n".join(EXAMPLES)))
    assert options - shown == set()


def test_the_options_of_examples_arrive() -> None:
    data = parse(next(example for example in EXAMPLES if "reference_pattern" in example))
    assert [source.label for source in data.sources][:2] == ["gsm8k/train.jsonl", "ssgen/dev.jsonl"]
    assert data.sources[0].columns == {"prompt": "question", "reference": "answer"}
    assert data.sources[0].reference_pattern == r"####\s*(.+)"
    assert data.sources[2].prompt_template == "{scenario}\n{question type}?\n{choices!o}"


def test_every_argument_has_its_help() -> None:
    for kind in (PromptDataModule, Source):
        documented = set(re.findall(r"^\s{4,8}(\w+): ", inspect.getdoc(kind) or "", flags=re.MULTILINE))
        assert set(inspect.signature(kind).parameters) - documented == set()


def test_texts_that_begin_like_a_yaml_comment_arrive() -> None:
    texts = {name: f"# {name} (.)" for name in ("prompt_template", "reference_pattern", "cut_prompt_at")}
    options = "".join(f"    {name}: '{text}'\n" for name, text in texts.items())
    data = parse(f"data:\n  system_prompt: '# be brief'\n  sources:\n  - path: a.jsonl\n{options}")
    assert {name: getattr(data.sources[0], name) for name in texts} == texts
    assert data.system_prompt == "# be brief"
