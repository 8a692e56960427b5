"""An optimizer or scheduler of another class starts from its own defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maestro_pl.cli import main
from maestro_pl.cli.fresh import UNSET, fresh_classes

UNSET_POLICY = f"--model.optimizer={UNSET}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--model.optimizer", "SGD"], [UNSET_POLICY, "--model.optimizer", "SGD"]),
        (["--model.optimizer=torch.optim.SGD"], [UNSET_POLICY, "--model.optimizer=torch.optim.SGD"]),
        (["--model.optimizer.class_path=SGD"], [UNSET_POLICY, "--model.optimizer.class_path=SGD"]),
        (["--model.optimizer={class_path: SGD}"], [UNSET_POLICY, "--model.optimizer={class_path: SGD}"]),
        (["--model.optimizer", "AdamW"], ["--model.optimizer", "AdamW"]),  # the same class keeps what it has
        (["--model.optimizer=torch.optim.adamw.AdamW"], ["--model.optimizer=torch.optim.adamw.AdamW"]),
        (["--model.optimizer.lr", "1"], ["--model.optimizer.lr", "1"]),
        (
            ["--model.scheduler=StepLR", "--model.scheduler=StepLR"],
            ["--model.scheduler=null", "--model.scheduler=StepLR", "--model.scheduler=StepLR"],
        ),
    ],
)
def test_options(given: list[str], expected: list[str]) -> None:
    assert fresh_classes(["fit", *given]) == ["fit", *expected]


def test_configs_and_what_follows_them(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("model: {optimizer: {class_path: SGD}, meta: {optimizer: Adagrad}}")
    two.write_text("model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1}}, scheduler: null}")
    got = fresh_classes(["--config", str(one), "--config", str(two), "--model.optimizer=Adam"])
    meta = f"--model.meta.optimizer={UNSET}"
    assert got == [
        *(UNSET_POLICY, meta, "--config", str(one)),
        *("--config", str(two)),
        *(UNSET_POLICY, "--model.optimizer=Adam"),
    ]
    assert fresh_classes(["--config", "no.yaml", "--model.optimizer={"]) == [
        "--config",
        "no.yaml",
        "--model.optimizer={",
    ]


@pytest.mark.slow
def test_every_class_has_its_own_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit):
            main(["fit", *arguments, "--print_config"])
        model: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)["model"]
        return model

    config = tmp_path / "adagrad.yaml"
    adagrad = {"class_path": "torch.optim.Adagrad", "init_args": {"lr": 0.1}}
    config.write_text(yaml.safe_dump({"model": {"optimizer": adagrad, "meta": {"optimizer": adagrad}}}))
    model = printed("--config", "configs/quickstart.yaml", "--config", str(config))
    for options in (model["optimizer"]["init_args"], model["meta"]["optimizer"]["init_args"]):
        assert (options["lr"], options["eps"], options["weight_decay"]) == (0.1, 1e-10, 0)
    model = printed("--model.optimizer", "torch.optim.Adafactor", "--model.optimizer.lr", "0.01")
    options = model["optimizer"]["init_args"]
    assert (options["lr"], list(options["eps"]), options["weight_decay"]) == (0.01, [None, 1e-3], 0.0)
    torch.optim.Adafactor([torch.nn.Parameter(torch.zeros(1))], **{**options, "eps": tuple(options["eps"])})
    assert printed("--model.optimizer.lr", "0.3")["optimizer"]["init_args"]["weight_decay"] == 0.0  # ours, of AdamW
    options = printed("--model.scheduler={warmup: 0.1, decay: cosine}")["scheduler"]
    assert options == {"warmup": 0.1, "decay": "cosine", "floor": 0.0}
    options = printed("--model.scheduler=torch.optim.lr_scheduler.StepLR", "--model.scheduler.step_size=3")["scheduler"]
    assert (options["class_path"], options["init_args"]["step_size"]) == ("torch.optim.lr_scheduler.StepLR", 3)
