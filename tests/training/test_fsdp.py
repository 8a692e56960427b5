"""What cannot be combined with parameters that are cut over the ranks, before anything is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import nn

from maestro_pl.errors import UserError
from maestro_pl.policy.sharding import blocks
from maestro_pl.training.fsdp import FSDP2Strategy, check_sharding, strategy_of

PLAIN = {"quantization": "none", "stored_quantization": None, "activation_offload": False}


@pytest.mark.parametrize(
    ("strategy", "precision", "policy", "sentence"),
    [
        (FSDP2Strategy, "32-true", {"quantization": "nf4"}, "the base is quantised \\(nf4\\)"),
        (FSDP2Strategy, "32-true", {"stored_quantization": "gptq"}, "the base is quantised \\(gptq\\)"),
        (FSDP2Strategy, "32-true", {"activation_offload": True}, "leave one of them out"),
        (FSDP2Strategy, "16-mixed", {}, "give bf16-mixed or 32-true"),
        (FSDPStrategy, "32-true", {}, "--trainer.strategy fsdp"),
    ],
)
def test_what_cannot_be_cut_is_refused(strategy: Any, precision: str, policy: dict[str, Any], sentence: str) -> None:
    trainer = SimpleNamespace(strategy=strategy(), precision=precision)
    with pytest.raises(UserError, match=sentence):
        check_sharding(trainer, SimpleNamespace(**(PLAIN | policy)))  # type: ignore[arg-type]


def test_what_can_be_cut_is_not_refused() -> None:
    for precision in ("32-true", "bf16-mixed"):
        trainer = SimpleNamespace(strategy=FSDP2Strategy(), precision=precision)
        check_sharding(trainer, SimpleNamespace(**PLAIN))  # type: ignore[arg-type]
    quantised = SimpleNamespace(**(PLAIN | {"quantization": "nf4"}))
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy(torch.device("cpu")), precision="16-mixed")
    check_sharding(trainer, quantised)  # type: ignore[arg-type]


def test_the_short_name_is_ours_and_no_other_name_is() -> None:
    assert isinstance(strategy_of("fsdp"), FSDP2Strategy)
    assert strategy_of("auto") == "auto"


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Linear names none"):
        blocks(nn.Linear(2, 2))
