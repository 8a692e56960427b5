"""Checkpoints on disk: whole or not at all, finite, of the warm-up too; and what is refused when one is read."""

from __future__ import annotations

import errno
import json
import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.checkpoint import RunCheckpoint
from maestro_pl import Meta
from maestro_pl.errors import UserError
from maestro_pl.training.checkpointing import check_file, config_of
from maestro_pl.training.saving import WholeFileIO, not_finite
from tests.support import data_of, module_of, rewards, trainer_of


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(10)))
    return path


ENTRY = {"format": 1, "module": "M", "rewards": [], "settings": {}, "optimizers": [], "rng": {}}
WHOLE = {
    "maestro": ENTRY,
    "state_dict": {},
    "pytorch-lightning_version": "2.5.0",
    "optimizer_states": [],
    "lr_schedulers": [],
}


def test_a_save_that_is_cut_off_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "checkpoints/last.ckpt"
    io = WholeFileIO()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))  # nothing goes through $TMPDIR
    io.save_checkpoint({**WHOLE, "step": 1}, target)
    assert [path.name for path in target.parent.iterdir()] == ["last.ckpt"]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written: No space left on device"):
        io.save_checkpoint({**WHOLE, "step": 2}, target)
    assert torch.load(target, weights_only=True)["step"] == 1
    assert [path.name for path in target.parent.iterdir()] == ["last.ckpt"]  # and no half file


def test_a_save_writes_beside_its_target_and_moves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, str]] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append((str(a), str(b))), replace(a, b)))
    WholeFileIO().save_checkpoint(dict(WHOLE), tmp_path / "a.ckpt")
    assert moved == [(str(tmp_path / ".a.ckpt.partial"), str(tmp_path / "a.ckpt"))]


class Runs:
    """Is run by a pickle that is loaded without care."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


def evil(path: Path) -> None:
    torch.save({**WHOLE, "x": Runs()}, path)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs()))


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)


def truncated(path: Path) -> None:
    torch.save(WHOLE, path)
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.touch()


def not_a_dict(path: Path) -> None:
    torch.save([1], path)


def odd_entry(path: Path) -> None:
    torch.save({**WHOLE, "maestro": 3}, path)


def odd_format(path: Path) -> None:
    torch.save({**WHOLE, "maestro": {**ENTRY, "format": "new"}}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (evil, r"no checkpoint of plain values and tensors, so it is not opened \(it holds \S+\)\.$"),
        (bare_pickle, "is not a checkpoint, or only a part of one"),
        (foreign_zip, "not opened"),
        (bomb, "an archive of another program"),
        (truncated, "only a part of one"),
        (empty, "only a part of one"),
        (not_a_dict, "no 'maestro' entry"),
        (odd_entry, "has no entry 'format', 'module'"),
        (odd_format, "has no entry 'format'"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_a_sentence(
    write: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=message) as caught:
        check_file("a.ckpt")
    assert len(str(caught.value)) < 400
    assert not Path("evil").exists()
    with pytest.raises(UserError, match=message):  # a plain Trainer is told the same
        WholeFileIO().load_checkpoint("a.ckpt")


@pytest.mark.parametrize("missing", WHOLE)
def test_a_checkpoint_that_lacks_an_entry_says_which(missing: str, tmp_path: Path) -> None:
    torch.save({name: value for name, value in WHOLE.items() if name != missing}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=missing):
        check_file(str(tmp_path / "a.ckpt"), resume=True)
    if missing in ("optimizer_states", "lr_schedulers"):
        check_file(str(tmp_path / "a.ckpt"))  # an evaluation needs no optimizer


def test_the_config_in_a_checkpoint(tmp_path: Path) -> None:
    torch.save(WHOLE, tmp_path / "without.ckpt")
    torch.save({**WHOLE, "maestro": {**ENTRY, "config": "seed: 3\n"}}, tmp_path / "with.ckpt")
    assert config_of(str(tmp_path / "without.ckpt")) is None
    assert config_of(str(tmp_path / "with.ckpt")) == "seed: 3\n"


def test_what_is_not_finite_is_named() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    assert not_finite([("weight", weight)], [optimizer]) == ""
    optimizer.state[weight]["exp_avg"][0] = float("nan")
    assert not_finite([("weight", weight)], [optimizer]) == "the state of AdamW"
    weight.data[1] = float("inf")
    assert not_finite([("weight", weight)], [optimizer]) == "weight"


class Break(L.Callback):
    """After so many batches, spoils the optimizer's state or raises."""

    def __init__(self, batches: int, error: BaseException | None = None) -> None:
        self.batches, self.error = batches, error

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.batches_done == self.batches:
            if self.error is not None:
                raise self.error
            next(iter(trainer.optimizers[0].state.values()))["exp_avg"].fill_(float("nan"))


def with_checkpoints(folder: Path, chain: list[Any], every: int, **options: Any) -> Any:
    saves = RunCheckpoint(every_n_train_steps=every)
    return trainer_of(folder, [*chain, saves], enable_checkpointing=True, limit_val_batches=0, **options)


def test_a_state_that_is_not_finite_never_takes_the_place_of_one_that_is(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    trainer = with_checkpoints(tmp_path, [*rewards(), Break(2)], every=1, max_steps=4)
    with (
        pytest.warns(UserWarning, match="since the last checkpoint is not saved"),
        pytest.raises(UserError, match="at policy step 2 the state of AdamW is not finite"),
    ):
        trainer.fit(module_of(tiny_qwen3), data_of(prompts))
    saved = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "checkpoints").iterdir()}
    assert {name: content["maestro"]["policy_steps"] for name, content in saved.items()} == {
        "step-000001.ckpt": 1, "last.ckpt": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("every", "batches", "kept"), [(50, 1, 1), (50, 2, 2), (1, 1, 1)])
def test_a_warm_up_that_is_cut_off_is_kept_and_gone_on_with(
    every: int, batches: int, kept: int, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    meta = Meta(every=2, warmup=3)
    trainer = with_checkpoints(tmp_path, [*rewards(), Break(batches, RuntimeError("lost"))], every, max_steps=1)
    with pytest.raises(RuntimeError, match="lost"):
        trainer.fit(module_of(tiny_qwen3, meta=meta), data_of(prompts))
    last = tmp_path / "checkpoints/last.ckpt"
    saved = torch.load(last, weights_only=True)["maestro"]
    assert (saved["warmup_done"], saved["policy_steps"]) == (kept, 0)
    module = module_of(tiny_qwen3, meta=meta)
    trainer_of(tmp_path / "again", rewards(), max_steps=1, limit_val_batches=0).fit(
        module, data_of(prompts), ckpt_path=last
    )
    assert (module.outer.warmup_done, module.policy_steps) == (3, 1)


def test_the_warm_up_is_saved_when_it_ends(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []
    last = tmp_path / "checkpoints/last.ckpt"

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append((pl_module.batches_done, last.is_file()))

    module = module_of(tiny_qwen3, meta=Meta(every=2, warmup=2))
    with_checkpoints(tmp_path, [*rewards(), Look()], every=50, max_steps=1).fit(module, data_of(prompts))
    assert seen == [(0, False), (1, False), (2, True)]
