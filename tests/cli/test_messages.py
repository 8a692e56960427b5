"""Bad input to ``maestro-pl``: one sentence and status 2; the sentence names what is wrong and what is right."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import yaml

from maestro_pl.cli import main, text
from maestro_pl.cli.arguments import take, with_config
from maestro_pl.cli.messages import condense
from maestro_pl.cli.renamed import FORMER, TRL
from maestro_pl.cli.run import MaestroCLI, make_cli
from maestro_pl.errors import UserError
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.run.paths import free_path, last_checkpoint

ROOT = Path(__file__).parents[2]

CONFIG = {
    "model": {"policy": {"model": "no_such_folder"}, "weigher": "maestro_pl.Conductor"},
    "data": {"sources": "data.jsonl"},
    "rewards": [{"class_path": "callbacks.LengthReward", "init_args": {"max": 8}}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAESTRO_DEBUG", raising=False)
    Path("good.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("wrong_syntax.yaml").write_text("model: {policy: {model: a}\nrewards: []\n")
    Path("wrong_class.yaml").write_text("- class_path: callbacks.LenghtReward\n")
    Path("wrong_argument.yaml").write_text("- class_path: callbacks.LengthReward\n  init_args: {maximum: 3}\n")
    Path("wrong_key.yaml").write_text("model:\n  clip_lo: 0.1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("--config none.yaml", ["none.yaml' does not exist"]),
        ("--config wrong_syntax.yaml", ["wrong_syntax.yaml is not valid YAML", "line 2"]),
        ("--config good.yaml --config wrong_key.yaml", ["no key model.clip_lo", "did you mean model.loss.clip_low?"]),
        ("--config good.yaml --rewards wrong_syntax.yaml", ["rewards", "'wrong_syntax.yaml' is not valid YAML"]),
        ("--config good.yaml --rewards wrong_class.yaml", ["'callbacks.LenghtReward'", "callbacks.LengthReward?"]),
        ("--config good.yaml --rewards wrong_argument.yaml", ["'maximum'", "LengthReward takes min, max, unit"]),
        ("--config good.yaml --rewards none.yaml", ["rewards: the file 'none.yaml' does not exist"]),
        ("--config good.yaml --rollout.max_tokens 3", ["--rollout.max_tokens", "--rollout.max_new_tokens?"]),
        (
            "--config good.yaml --model.max_grad_nor 0.7",
            ["--model.max_grad_nor", "did you mean --model.max_grad_norm?"],
        ),
        (
            "--config good.yaml --model.max_grad_nor=0.7",
            ["--model.max_grad_nor", "did you mean --model.max_grad_norm?"],
        ),
        ("--config good.yaml --reward []", ["--reward", "did you mean --rewards?"]),
        ("--config good.yaml --modle.clip_low 3", ["--modle.clip_low", "did you mean --model.loss.clip_low?"]),
        ("--config good.yaml --model.loss.clip_low abc", ["model.loss.clip_low takes float, not 'abc'."]),
        ("--config good.yaml --model.policy.dtype fp8", ["model.policy.dtype takes 'bfloat16', 'float32'", "'fp8'"]),
        ("--config good.yaml --model.policy.modle x", ["model.policy", "'modle' (did you mean model?)"]),
        ("--config good.yaml --model.weigher maestro_pl.LoRAPolicy", ["'maestro_pl.LoRAPolicy' is not a Weigher"]),
        ("--config good.yaml stray", ["'stray' is not an option"]),
        (
            "--config good.yaml --seed_everything=-1",
            ["error: seed_everything=-1: expected a whole number from 0 to 4294967295."],
        ),
        ("--config good.yaml --seed_everything=4294967296", ["seed_everything=4294967296: expected a whole number"]),
        ("--config", ["--config takes a file"]),
        ("--config good.yaml", ["no_such_folder"]),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    args: str, parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fit", *args.split()])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("maestro-pl: error: ")
    for part in parts:
        assert part in lines[0]
    assert not Path("runs").exists()


def test_a_seed_of_the_environment_is_one_that_generators_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("-1", "seven"):
        monkeypatch.setenv("PL_GLOBAL_SEED", given)
        with pytest.raises(UserError) as caught:
            make_cli(["fit", "--config", "good.yaml", "--seed_everything=true"], MaestroCLI)
        assert str(caught.value) == f"PL_GLOBAL_SEED={given}: expected a whole number from 0 to 4294967295."


@pytest.mark.parametrize(
    "command",
    ["compare a b --metri x", "experiment grid.yaml --dry", "export run --to adapter --over"],
)
def test_a_tool_takes_no_part_of_an_options_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"unrecognized arguments: --{command.partition(' --')[2].rpartition('--')[2]}" in error


@pytest.mark.slow
def test_what_lightning_and_the_rewards_refuse(
    folder: Path, tiny_qwen3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clash = '{"class_path": "callbacks.FormatReward", "init_args": {"name": "length"}}'
    Path("data.jsonl").write_text(json.dumps({"prompt": "a", "reference": "b"}) + "\n")
    for args, part in [
        (
            [f"--rewards+={clash}"],
            "Two rewards are named 'length': LengthReward (number 1 of the rewards) and FormatReward",
        ),
        (["--trainer.gradient_clip_val", "1"], "model.max_grad_norm"),
        (["--trainer.accumulate_grad_batches", "2"], "data.batch_size"),
        (["--trainer.val_check_interval", "0.5"], "val_check_interval"),
        (["--trainer.val_check_interval", "0"], "expected batches above 0; --trainer.limit_val_batches 0 leaves"),
        (["--trainer.accelerator", "abacus"], "accelerator='abacus'"),
        (["--ckpt_path", "none.ckpt"], "no checkpoint 'none.ckpt'"),
        (["--ckpt_path", "good.yaml"], "'good.yaml' is not a checkpoint"),
        (["--ckpt_path", "last"], "no last checkpoint in runs/good"),
    ]:
        policy = ["--model.policy.model", str(tiny_qwen3)]
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--config", "good.yaml", *policy, *args])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (caught.value.code, len(lines)) == (2, 1), lines
        assert part in lines[0]
    assert not Path("runs").exists()


def test_condense_a_union_names_every_accepted_type() -> None:
    message = """Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Subtypes: [typing.Literal['16', '32'], <class 'NoneType'>]
  Errors:
    - Expected a typing.Literal['16', '32']
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: 16-foo"""
    assert condense(message, "fit", []) == "trainer.precision takes '16', '32' or null, not '16-foo'."


NEW_KEYS = [*FORMER.values(), "model", "model.policy", "model.kl", "model.meta", "model.weigher", "model.max_grad_norm"]
OTHER_KEYS = [key for key, _ in TRL.values() if not key.startswith("model.policy.")]


@pytest.mark.parametrize(("old", "new"), FORMER.items())
def test_a_former_key_is_answered_with_the_one_of_today(old: str, new: str) -> None:
    listed = "`maestro-pl fit --help` lists all."
    option = condense(f"unrecognized arguments: --{old} 0.1 --other 3", "fit", NEW_KEYS)
    assert option == f"there is no option --{old}: it is --{new} now; {listed}"
    in_yaml = condense(f"Subcommand 'fit' does not accept option '{old}'", "fit", NEW_KEYS)
    assert in_yaml == f"there is no key {old}: it is {new} now; {listed}"
    bare = condense(f"unrecognized arguments: --{old.rpartition('.')[2]}=0.1", "fit", NEW_KEYS)
    assert f"it is --{new} now" in bare
    inside = condense(f"Subcommand 'fit' does not accept option '{old}.init_args.lr'", "fit", NEW_KEYS)
    assert f"it is {new}.init_args.lr now" in inside
    assert "now" not in condense(f"unrecognized arguments: --{old} 0.1", "fit", ["model", "model.policy"])  # SFTModule


@pytest.mark.parametrize("name", TRL)
@pytest.mark.parametrize("branch", ["", "model.", "trainer.", "rollout."])
def test_a_name_of_trl_is_answered_with_ours(name: str, branch: str) -> None:
    key, differs = TRL[name]
    if f"{branch}{name}" in (key, *FORMER):
        return
    known = [*NEW_KEYS, *OTHER_KEYS]
    option = condense(f"unrecognized arguments: --{branch}{name} 0.1", "fit", known)
    if not branch and f"model.{name}" in FORMER:  # a name that was ours too
        assert f"--{name}: it is --{key} now" in option
        return
    assert f"--{branch}{name}: TRL's {name} is --{key} here{f' ({differs})' if differs else ''}; " in option


def test_the_keys_that_trl_s_names_lead_to_exist() -> None:
    cli = make_cli(["fit"], _Parsed)
    known = set(cli._parser("fit").get_defaults().keys(branches=True))
    policy = {f"model.policy.{name}" for name in inspect.signature(LoRAPolicy).parameters}
    elsewhere = {key for key, _ in TRL.values()} - known - policy
    assert elsewhere <= set(FORMER.values())


class _Parsed(MaestroCLI):
    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def test_trl_has_the_names_that_are_answered() -> None:
    trl = pytest.importorskip("trl")
    arguments = set(inspect.signature(trl.GRPOConfig).parameters) | set(inspect.signature(trl.GRPOTrainer).parameters)
    assert set(TRL) - arguments <= {"lr", "max_prompt_length", "model_name_or_path"}


@pytest.mark.parametrize(
    ("key", "owner", "lacks"),
    [
        ("model.weigher", "maestro_pl.FixedWeights", "weights"),
        ("model.scheduler", "torch.optim.lr_scheduler.StepLR", "step_size"),
    ],
)
def test_what_a_class_of_an_optional_key_lacks_is_named(
    key: str, owner: str, lacks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), f"--{key}", owner])
    assert f"{key}: {owner} requires {lacks}: give it with --{key}.{lacks}" in " ".join(capsys.readouterr().err.split())


def test_condense_required_keys() -> None:
    message = "the following arguments are required: fit.model.policy, fit.model.weigher"
    assert condense(message, "fit", []).startswith("model.policy, model.weigher is required")


def test_condense_what_it_does_not_know_is_shortened() -> None:
    assert condense("some\n  new   report", "fit", []) == "some new report"
    assert len(condense("x" * 1000, "fit", [])) == 320


def test_config_comes_first_and_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_config(["fit", "--a", "1", "-c", "x.yaml", "--config=y.yaml"]) == [
        "fit", "--config", "x.yaml", "--config", "y.yaml", "--a", "1",
    ]  # fmt: skip
    run = tmp_path / "runs/a/version_3"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = run / "checkpoints/last.ckpt"
    filled = with_config(["test", "--ckpt_path", str(checkpoint)])
    assert filled[2].endswith("configs/quickstart.yaml")
    (run / "config.yaml").touch()
    filled = with_config(["test", "--ckpt_path", str(checkpoint)])
    assert filled == ["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    assert with_config(["fit", "--help"]) == ["fit", "--help"]


def test_take_leaves_the_other_arguments_in_order() -> None:
    assert take(["a", "--x", "1", "--y=2", "--x=3"], ("--x",)) == (["1", "3"], ["a", "--y=2"])
    with pytest.raises(UserError, match="--x takes"):
        take(["--x"], ("--x",))


def test_free_path_numbers_and_last_checkpoint_is_the_newest(tmp_path: Path) -> None:
    import os

    assert free_path(tmp_path / "a.csv").name == "a.csv"
    (tmp_path / "a.csv").touch()
    (tmp_path / "a-1.csv").touch()
    assert free_path(tmp_path / "a.csv").name == "a-2.csv"
    for version, time in ((0, 50), (1, 100), (2, 60)):
        path = tmp_path / f"version_{version}/checkpoints/last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    assert last_checkpoint(tmp_path).parents[1].name == "version_1"


def test_a_message_of_several_lines_keeps_them(
    folder: Path, tiny_qwen3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n{"text": "b"}\n')
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "good.yaml", "--model.policy.model", str(tiny_qwen3)])
    lines = capsys.readouterr().err.rstrip().splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith("maestro-pl: error: ")) :]
    assert caught.value.code == 2
    assert lines[0] == "maestro-pl: error: 2 of 3 rows cannot be used:"
    assert [line[:18] for line in lines[1:3]] == ["    data.jsonl:2: ", "    data.jsonl:3: "]
    assert lines[3:] == ["  Mend the rows, or set data.on_bad_row: drop to go on without them."]


def test_a_yaml_excerpt_is_shown_as_it_stands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("grid.yaml").write_text("name: a\naxes: {seed: [0, 1}\n")
    with pytest.raises(SystemExit):
        main(["experiment", "grid.yaml"])
    lines = capsys.readouterr().err.rstrip().splitlines()
    assert lines[0].startswith("maestro-pl: error: grid.yaml is not YAML: ")
    at = lines.index("      axes: {seed: [0, 1}")
    assert lines[at + 1].index("^") == lines[at].index("[")  # the mark stays under what it points at


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("one sentence.", "one sentence."),
        ("\n  one  \r\n  two\t.\n\n", "one\n  two   ."),
        ("\x1b[2Ja\rb\x08c\x9b\x7f", "\\x1b[2Ja\\rb\\x08c\\x9b\\x7f"),
        ("a\u202eb\u2028c\ud800", "a\\u202eb\\u2028c\\ud800"),
        ("答案 é 😀 \u00a0", "答案 é 😀"),
        ("x" * 4003, "x" * 4000 + " … (3 more characters)"),
        ("", ""),
    ],
)
def test_printable(given: str, shown: str) -> None:
    assert text.printable(given) == shown


def test_headed() -> None:
    assert text.headed("error", "one\n\n two") == "maestro-pl: error: one\n\n   two"
