"""Configs that are made of parts, lists of callbacks that are made of files, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_pl.cli import main
from maestro_pl.cli.compose import own_keys, with_parts
from maestro_pl.cli.resolve import resolve_config
from maestro_pl.cli.run import MaestroCLI
from maestro_pl.errors import UserError
from maestro_pl.experiment.grid import read_grid
from maestro_pl.run.paths import config_path

FILES: dict[str, Any] = {
    "whole.yaml": {
        "configs": ["parts/model.yaml", "parts/tombench.yaml"],
        "rewards": ["callbacks.FormatReward", "lists/two.yaml"],
        "metrics": "lists/nested.yaml",
    },
    "parts/model.yaml": {
        "configs": ["deeper/weigher.yaml"],
        "model": {"policy": {"model": "sandbox", "dtype": "float32"}, "weigher": {"init_args": {"norm": "center"}}},
        "rewards": [{"class_path": "callbacks.LengthReward", "init_args": {"max": 3}}],
    },
    "parts/deeper/weigher.yaml": {
        "model": {"weigher": {"class_path": "maestro_pl.Conductor", "init_args": {"action": "soft", "norm": "none"}}}
    },
    "parts/tombench.yaml": {
        "data": {"sources": [{"path": "tombench", "options": {"file": "x", "allow_training": True}}], "batch_size": 3},
        "trainer": {"callbacks": [{"class_path": "callbacks.RunCheckpoint", "init_args": {"every_n_train_steps": 7}}]},
    },
    "later.yaml": {
        "metrics+": ["lists/judge.yaml"],
        "data": {"sources": [{"path": "gsm8k"}]},
        "trainer": {"callbacks": ["callbacks.RunCheckpoint"]},
    },
    "lists/two.yaml": [{"class_path": "callbacks.LengthReward", "init_args": {"min": 2}}, "callbacks.EntropyReward"],
    "lists/nested.yaml": ["callbacks.MathReward", ["judge.yaml", ["../lists/choice.yaml"]]],
    "lists/judge.yaml": {
        "class_path": "callbacks.JudgeReward",
        "init_args": {"model": "m", "endpoint": "http://h", "name": "said"},
    },
    "lists/choice.yaml": ["callbacks.ChoiceReward"],
    "circle.yaml": {"configs": "parts/round.yaml"},
    "parts/round.yaml": {"configs": ["../circle.yaml"]},
    "missing.yaml": {"configs": ["parts/none.yaml"]},
    "list_as_part.yaml": {"configs": ["lists/two.yaml"]},
    "no_list.yaml": {"configs": {"model": "parts/model.yaml"}},
    "one_letter.yaml": {"config": ["parts/model.yaml"]},
    "keys_as_list.yaml": {"configs": ["parts/model.yaml"], "metrics": ["parts/tombench.yaml"]},
    "no_file.yaml": {"anchors": ["lists/none.yaml"]},
    "own_entry.yaml": {"rewards": "lists/own.yaml"},
    "lists/own.yaml": ["callbacks.FormatReward", "own.yaml"],
    "empty_entry.yaml": {"rewards": "lists/empty.yaml"},
    "twice.yaml": {"configs": ["whole.yaml"], "rewards": ["lists/two.yaml", "lists/two.yaml"]},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files below ``there``; the working folder is another one."""
    for name, content in FILES.items():
        path = tmp_path / "there" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "there/lists/empty.yaml").touch()
    (tmp_path / "there/lists/bad.yaml").write_text("- a: {b\n- c\n")
    (tmp_path / "there/bad_entry.yaml").write_text("metrics: [lists/bad.yaml]\n")
    (tmp_path / "there/bad_part.yaml").write_text("configs: [lists/bad.yaml]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAESTRO_DEBUG", raising=False)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *args, "--print_config"])
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["class_path"].rpartition(".")[2].removesuffix("Reward") for entry in entries]


def test_parts_are_merged_in_order_before_the_files_own_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, "--config", "there/whole.yaml")
    assert "configs" not in config
    conductor = config["model"]["weigher"]["init_args"]
    assert (conductor["action"], conductor["norm"]) == ("soft", "center")  # the deepest first
    assert config["data"]["batch_size"] == 3
    assert names(config["rewards"]) == ["Format", "Length", "Entropy"]
    length = config["rewards"][1]["init_args"]
    assert (length["min"], length["max"]) == (2, 512)  # the whole list is replaced, its arguments with it
    assert names(config["metrics"]) == ["Math", "Judge", "Choice"]
    assert config["trainer"]["logger"]["init_args"]["name"] == "whole"  # the run is called by the file that was given


def test_a_later_list_replaces_an_earlier_one_and_a_plus_appends(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--config", "there/whole.yaml", "--config", "there/later.yaml")
    config = printed(capsys, *given, "--metrics+=[callbacks.StoryReward, there/lists/choice.yaml]")
    assert names(config["metrics"]) == ["Math", "Judge", "Choice", "Judge", "Story", "Choice"]
    (source,) = config["data"]["sources"]
    assert (source["path"], source["options"]) == ("gsm8k", {})  # nothing of the source that stood in its place
    (checkpoint,) = config["trainer"]["callbacks"]
    assert checkpoint["init_args"]["every_n_train_steps"] != 7
    assert config["trainer"]["logger"]["init_args"]["name"] == "whole-later"
    assert names(printed(capsys, *given, "--metrics", "there/lists/nested.yaml")["metrics"]) == [
        "Math", "Judge", "Choice",
    ]  # fmt: skip


def test_paths_start_from_the_file_else_from_the_working_folder_else_from_the_shipped_configs(folder: Path) -> None:
    (folder / "mine.yaml").write_text(yaml.safe_dump({"configs": ["there/later.yaml", "configs/quickstart.yaml"]}))
    shipped = str(config_path("quickstart.yaml"))
    assert with_parts(["fit", "--config", "mine.yaml"])[2::2] == ["there/later.yaml", shipped, "mine.yaml"]
    (folder / "there/mine.yaml").write_text(yaml.safe_dump({"configs": ["there/later.yaml"]}))
    assert with_parts(["fit", "--config", "there/mine.yaml"])[2] == str(folder / "there/later.yaml")
    assert with_parts(["fit", "--config", "configs/quickstart.yaml"])[2] == shipped
    assert with_parts(["fit", "--config", "none.yaml", "--config", '{"seed_everything": 1}'])[2::2] == [
        "none.yaml", '{"seed_everything": 1}',
    ]  # fmt: skip


def test_a_config_without_files_keeps_its_text() -> None:
    text = "# a comment\nmodel: {kl: 1e-3}\nrewards: [callbacks.FormatReward]\n"
    assert own_keys(text, Path("x.yaml"), Path()) == text
    assert own_keys("a: {b\n", Path("x.yaml"), Path()) == "a: {b\n"  # the parser says what is wrong
    assert own_keys("configs: [a]\nlr: 1e-3\n", Path("x.yaml"), Path()) == "lr: 0.001\n"


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("circle", r"circle.yaml is a part of itself \(.*circle.yaml > .*round.yaml > .*circle.yaml\)"),
        ("missing", "missing.yaml: configs: the file 'parts/none.yaml' does not exist: a path starts from there, else"),
        ("list_as_part", "configs: there/lists/two.yaml holds a list: expected the keys of a config"),
        ("no_list", "no_list.yaml: configs is {'model': .*: expected a list of config files"),
        ("one_letter", "there is no key config: the files that a config is made of stand under `configs`"),
        ("keys_as_list", "metrics: parts/tombench.yaml holds the keys data, trainer: expected a list of class paths"),
        ("no_file", "no_file.yaml: anchors: the file 'lists/none.yaml' does not exist"),
        ("own_entry", "rewards: lists/own.yaml: the file 'own.yaml' is an entry of itself"),
        ("empty_entry", "rewards: lists/empty.yaml holds nothing: expected a list of class paths"),
        ("bad_entry", "metrics: the file 'lists/bad.yaml' is not valid YAML: .* at line 3"),
        ("bad_part", "bad_part.yaml: configs: .*lists/bad.yaml is not valid YAML: .* at line 3"),
    ],
)
def test_a_wrong_part_is_one_sentence(file: str, sentence: str, folder: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        with_parts(["fit", "--config", f"there/{file}.yaml"])


def test_a_wrong_file_of_an_option_is_one_sentence(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^metrics: the file 'none.yaml' does not exist"):
        with_parts(["fit", "--metrics+=[callbacks.MathReward,none.yaml]"])


def test_two_rewards_of_one_name_in_a_composed_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "there/twice.yaml"])
    said = capsys.readouterr().err
    assert "Two rewards are named 'length': LengthReward (number" in said
    assert "and LengthReward (number" in said


def test_the_runs_config_is_flat_and_runs_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaestroCLI, "fit", lambda self, **kwargs: self._saved.setup(self.trainer, self.model, "fit"))
    main(["fit", "--config", "there/whole.yaml", "--metrics", "[]"])
    saved = folder / "runs/whole/version_0/config.yaml"
    written = yaml.safe_load(saved.read_text())
    assert "configs" not in written
    assert names(written["rewards"]) == ["Format", "Length", "Entropy"]
    again = printed(capsys, "--config", str(saved))
    assert {key: again[key] for key in ("model", "data", "rewards")} == {
        key: written[key] for key in ("model", "data", "rewards")
    }


def test_cells_of_a_grid_take_parts_and_lists_of_files(folder: Path) -> None:
    grid = {
        "common": {"config": "whole.yaml"},
        "axes": {
            "data": {"tombench": {}, "gsm8k": {"config": "later.yaml"}},
            "metrics": {"other": {"metrics": ["callbacks.StoryReward", "lists/choice.yaml"]}},
        },
    }
    (folder / "there/grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    cells = read_grid(folder / "there/grid.yaml").cells
    digests = [cell.digest for cell in cells]
    config = yaml.safe_load(resolve_config(cells[1]))
    assert [source["path"] for source in config["data"]["sources"]] == ["gsm8k"]
    assert names(config["rewards"]) == ["Format", "Length", "Entropy"]
    assert names(config["metrics"]) == ["Story", "Choice"]
    assert "configs" not in config
    part = folder / "there/parts/deeper/weigher.yaml"
    part.write_text(part.read_text().replace("soft", "mix"))  # a part of a part changes the cell
    assert [cell.digest for cell in cells] != digests


def test_a_config_that_is_given_as_text_is_no_path(folder: Path) -> None:
    text = "model: {}\n" + "# longer than any path\n" * 1000  # as a checkpoint carries it
    assert with_parts(["test", "--config", text]) == ["test", "--config", text]
