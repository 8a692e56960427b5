"""Parameters that are cut over the ranks: what they cannot be combined with, and saves of shares that fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import nn

from maestro_pl.errors import UserError
from maestro_pl.generation import cache
from maestro_pl.policy import packing
from maestro_pl.policy.sharding import blocks
from maestro_pl.training import checkpointing, sharded_files
from maestro_pl.training.fsdp import FSDP2Strategy, check_sharding, strategy_of
from maestro_pl.training.saving import WholeFileIO
from tests.support import data_of, module_of, ranks, rewards, trainer_of, write_rows

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


def fails_inside_a_pass(folder: Path, prompts: Path) -> None:
    def fail(*_: Any) -> None:
        raise UserError("the model cannot do that")

    class Fail(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            packing.causal = cache.causal = fail  # type: ignore[assignment]

    trainer = trainer_of(
        prompts.parent, [*rewards(), Fail()], strategy=FSDP2Strategy(), devices=1, max_steps=2, limit_val_batches=0
    )
    try:
        trainer.fit(module_of(folder), data_of(prompts))
    except BaseException as error:
        print(f"ended by {type(error).__name__}: {error}")


@pytest.mark.slow
def test_an_error_inside_a_pass_is_the_one_that_is_seen(tiny_qwen3: Path, tmp_path: Path) -> None:
    """FSDP2 cannot move a module in the middle of a pass, which is no answer to what went wrong."""
    write_rows(tmp_path / "prompts.jsonl", *({"prompt": f"word {i}", "task": "a"} for i in range(10)))
    arguments = (tiny_qwen3, tmp_path / "prompts.jsonl")
    assert ranks.ended([ranks.start(fails_inside_a_pass, *arguments, output=tmp_path / "said")]) == [0]
    assert "ended by UserError: the model cannot do that" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("fails", ["shares", "file"])
def test_a_save_of_shares_that_fails_leaves_those_before_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def write(folder: Path, parts: Any) -> None:
        folder.mkdir()
        (folder / "shard.safetensors").write_bytes(b"1")
        if fails == "shares" and full:
            raise UserError("No space left on device")

    def replace(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = False
    monkeypatch.setattr(sharded_files, "take_out", lambda checkpoint: {"state_dict/a": 1})
    monkeypatch.setattr(sharded_files, "write", write)
    strategy = FSDP2Strategy(sharded_checkpoints=True, checkpoint_io=WholeFileIO())
    target = tmp_path / "last.ckpt"
    for _ in range(2):
        strategy.save_checkpoint({"maestro": {}}, target)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(before) == 2
    full = True
    if fails == "file":
        monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="No space left on device"):
        strategy.save_checkpoint({"maestro": {}}, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    entry = torch.load(target, weights_only=True)["maestro"]["shards"]
    assert entry["folder"] in before
    assert list(entry["files"]) == ["shard.safetensors"]


def test_every_file_that_some_rank_sees_has_its_checksum_from_one_of_those() -> None:
    for seen in ([["a", "b", "c"]] * 3, [["a", "b"], ["c"], []], [["a"], ["a", "b", "c"], ["c"]]):
        own = [sharded_files.own_names(seen, rank) for rank in range(3)]
        assert sorted(name for names in own for name in names) == ["a", "b", "c"]
        assert all(set(names) <= set(files) for names, files in zip(own, seen, strict=True))


def test_a_checkpoint_whose_folder_is_gone_is_removed_without_an_error(tmp_path: Path) -> None:
    shares = tmp_path / "a[1].ckpt.shards-1"
    for folder in (shares, tmp_path / "a1.ckpt.shards-1"):
        folder.mkdir()
    WholeFileIO().remove_checkpoint(tmp_path / "a[1].ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a1.ckpt.shards-1"]
    WholeFileIO().remove_checkpoint(tmp_path / "gone" / "last.ckpt")


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="Linear names none"):
        blocks(nn.Linear(2, 2))


def test_a_file_that_is_read_without_its_shares_says_where_they_are() -> None:
    class Module(SimpleNamespace):
        pass

    module: Any = Module(
        reward_specs=[],
        run_config="",
        settings=dict,
        check_rewards=lambda specs: None,
        check_settings=lambda settings: None,
    )
    own = {"format": 1, "module": "Module", "rewards": [], "settings": {}, "shards": {"folder": "last.ckpt.shards-1"}}
    with pytest.raises(UserError, match=r"lie in the folder last\.ckpt\.shards-1 beside it"):
        checkpointing.restore(module, {"maestro": own, "state_dict": {"weigher.tau": torch.ones(1)}})


@pytest.mark.parametrize(
    "noted",
    [3, {}, {"folder": 1, "files": {}}, {"folder": "../a.shards-1", "files": {}}, {"folder": "a.shards-1", "files": 2}],
)
def test_an_entry_that_names_no_shares_is_a_sentence(noted: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say where its shares are"):
        sharded_files.check(tmp_path / "a.ckpt", {"shards": noted})
