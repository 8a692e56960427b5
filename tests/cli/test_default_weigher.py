"""Who weighs where the config names nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_pl.cli.arguments import ANCHORED, default_weigher, whole_lists
from maestro_pl.cli.compose import with_parts
from maestro_pl.cli.estimate import parsed_config
from maestro_pl.run.paths import config_path

EQUAL = {"weigher": {"class_path": "maestro_pl.EqualWeights"}}
CONTAINS = {"class_path": "callbacks.ContainsReward", "init_args": {"strings": ["a"]}}
PLAIN: dict[str, Any] = {"model": {"policy": {"model": "sandbox"}}, "rewards": ["callbacks.LengthReward"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    anchors = [CONTAINS]
    configs = {
        "plain": PLAIN,
        "anchored": {**PLAIN, "anchors": anchors},
        "role": {
            **PLAIN,
            "rewards": [*PLAIN["rewards"], {**CONTAINS, "init_args": {"strings": ["a"], "role": "anchor"}}],
        },
        "list": anchors,
        "empty": {"anchors": []},
        "named": {"model": {"weigher": "maestro_pl.RandomWeights"}},
        "null": {"model": {"weigher": None}},
        "meta": {"model": {"meta": {"warmup": 5}}},
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ("--config plain.yaml", EQUAL),
        ("--config anchored.yaml", ANCHORED),
        ("--config=anchored.yaml", ANCHORED),
        ("--config role.yaml", ANCHORED),
        ("--config plain.yaml --anchors list.yaml", ANCHORED),
        ("--config plain.yaml --anchors+=callbacks.ContainsReward", ANCHORED),
        ("--config anchored.yaml --anchors []", EQUAL),
        ("--config anchored.yaml --config empty.yaml", EQUAL),
        ("--config empty.yaml --config anchored.yaml", ANCHORED),
        ("--config anchored.yaml --config null.yaml", ANCHORED),
        ("--config anchored.yaml --config named.yaml", {}),
        ("--config anchored.yaml --model.weigher maestro_pl.EqualWeights", {}),
        ("--config anchored.yaml --model.weigher.action=mix", {}),
    ],
)
def test_the_anchors_decide_where_no_weigher_is_named(arguments: str, chosen: dict[str, Any], folder: Path) -> None:
    assert default_weigher(whole_lists(["fit", *arguments.split()])) == chosen


def test_what_the_config_says_of_the_meta_signal_is_laid_over_it(folder: Path) -> None:
    config = parsed_config(["--config", "anchored.yaml", "--config", "meta.yaml"])["model"]
    assert config["weigher"]["class_path"] == "maestro_pl.Conductor"
    assert config["weigher"]["init_args"]["action"] == "soft"
    assert (config["meta"]["signal"]["class_path"], config["meta"]["learner"]) == ("maestro_pl.AnchorSignal", "ridge")
    assert (config["meta"]["every"], config["meta"]["warmup"]) == (1, 5)


def test_it_is_what_the_anchored_config_says() -> None:
    said = yaml.safe_load(config_path("conductor/anchored.yaml").read_text())["model"]
    meta = said["meta"]
    assert ANCHORED["weigher"] == said["weigher"]
    assert ANCHORED["meta.signal"]["class_path"] == meta["signal"]
    assert {key: ANCHORED[f"meta.{key}"] for key in ("learner", "every", "warmup")} == {
        key: meta[key] for key in ("learner", "every", "warmup")
    }


@pytest.mark.parametrize("name", ["ss_gen", "natural_reasoning", "general_thoughts"])
def test_the_papers_configs_name_the_papers_conductor(name: str) -> None:
    arguments = with_parts(["fit", "--config", str(config_path(f"paper/{name}.yaml"))])
    assert default_weigher(whole_lists(arguments)) == {}
    paper = yaml.safe_load(config_path("conductor/paper.yaml").read_text())["model"]
    assert paper["weigher"]["init_args"]["action"] == "one_hot"
    assert paper["meta"]["learner"] == "reinforce"
    assert paper["meta"]["signal"]["class_path"] == "maestro_pl.AdvantageSignal"


@pytest.mark.slow
def test_a_run_says_once_who_weighs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from maestro_pl.cli import main

    quick = ["--data.batch_size=1", "--rollout.group_size=2", "--rollout.max_new_tokens=2", "--trainer.accelerator=cpu"]
    quick += [
        "--trainer.max_steps=1",
        "--trainer.fast_dev_run=true",
        "--model.policy.dtype=float32",
        "--data.show=false",
    ]
    for config, said in (("plain", "all rewards weigh the same"), ("anchored", "a Conductor learns the weights")):
        main(["fit", "--config", f"{config}.yaml", *quick])
        printed = capsys.readouterr().out
        assert printed.count("model.weigher is not given") == 1
        assert said in printed
