"""Two ranks are one rank with the same global batch; they resume, run out of memory and end together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maestro_pl.errors import UserError
from maestro_pl.training import sharded_files
from maestro_pl.training.checkpointing import check_file, read_plain
from maestro_pl.training.saving import WholeFileIO
from tests.ranks.worker import CASES, run_case
from tests.support import make_model
from tests.support.ranks import ended, fit, start

pytestmark = pytest.mark.slow
MEMORY = "out of memory"
CUT = "fsdp, all parameters, adamw"
SHARES = "fsdp, shares"  # the same, and every rank saves its own
PARITY = [name for name in CASES if name not in ("dropout", SHARES)]
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_model("qwen3", folder / "model")
    rows = [
        {
            "prompt": f"word {i}", "task": "ab"[i % 3 == 0], "reference": f"seven {i}",
            "split": "train" if i < 12 else "validation",
        }
        for i in range(17)
    ]  # fmt: skip
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def alone(folder: Path, name: str, steps: int = 3, ckpt: str | None = None) -> dict[str, Any]:
    return run_case(name, folder / f"{name}.alone.{steps}", folder / "model", folder / "prompts.jsonl", steps, ckpt)


def together(folder: Path, *cases: str) -> None:
    """Run the cases on two ranks, as torchrun starts them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "tests.ranks.worker", str(folder), str(folder / "model"), str(folder / "prompts.jsonl"), *cases]
    done = subprocess.run(
        [*launch, *worker], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-4000:]


def saved(folder: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=False)
    return result


@pytest.fixture(scope="module")
def ran(folder: Path) -> Path:
    """The folder in which two ranks, started once, left every case: the imports of a process take longer than a run."""
    half, cut, shares = (folder / f"{label}.2" / LAST for label in ("half", "cut", "shares"))
    first = alone(folder, "dropout", 2)["checkpoint"]
    resumed = ["dropout@4@whole", "dropout@2@half", f"dropout@4@again@{half}", f"dropout@4@more@{first}"]
    resumed += [f"{CUT}@2@cut", f"{CUT}@3@cut again@{cut}", f"{CUT}@3@joined@{alone(folder, CUT, 2)['checkpoint']}"]
    resumed += [f"{SHARES}@2@shares", f"{SHARES}@3@shares again@{shares}", f"{CUT}@3@gathered again@{shares}"]
    resumed += [f"{SHARES}@3@shares of one file@{cut}"]
    together(folder, *PARITY, *resumed)
    return folder


@pytest.fixture(scope="module")
def both(ran: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What every case became on one rank, and on two."""
    return {name: (alone(ran, name), saved(ran, f"{name}.2")) for name in PARITY}


def assert_near(first: Any, second: Any, where: str = "") -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_near(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for place, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_near(a, b, f"{where}[{place}]")
    elif isinstance(first, float):
        assert second == pytest.approx(first, abs=1e-4), where
    else:
        assert first == second, where


@pytest.mark.parametrize("name", PARITY)
def test_two_ranks_are_one_with_the_same_global_batch(
    name: str, both: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    one, two = both[name]
    assert one["steps"] == two["steps"] == 3
    moved = 0.0
    for key, value in one["state"].items():
        torch.testing.assert_close(two["state"][key], value, atol=2e-5, rtol=1e-4, msg=f"{name}: {key}")
        moved += float(value.float().abs().sum())
    assert moved > 0
    for key in ("metrics", "rollouts", "evaluation", "labelled"):
        assert_near(one[key], two[key], key)
    if name in ("ridge", "gradient"):
        assert one["labelled"] > 0
    if name == "late":  # answered once its groups were trained on, and learned from at the next step
        told = [row["anchor/earlier_choices"] for row in two["metrics"] if "anchor/earlier_choices" in row]
        assert told[0] == 0 < told[1] == told[2]
    assert [line.split(",")[:3] for line in one["weights"].splitlines()] == [
        line.split(",")[:3] for line in two["weights"].splitlines()
    ]


def test_where_memory_runs_out_on_one_rank_all_halve_together(
    both: dict[str, tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    one, two = both[MEMORY]
    assert two["micro_batch_tokens"] < one["micro_batch_tokens"]  # rank 0's, which had memory enough


def test_a_run_of_two_ranks_resumes_on_two_on_one_and_from_one(ran: Path) -> None:
    whole, again, more = (saved(ran, f"{label}.2") for label in ("whole", "again", "more"))
    assert again["steps"] == whole["steps"] == more["steps"] == 4
    for key, value in whole["state"].items():
        assert torch.equal(again["state"][key], value), key
    half = ran / "half.2" / LAST
    assert alone(ran, "dropout", 4, str(half))["steps"] == 4


def test_parameters_cut_over_two_ranks_resume_whole_on_one_and_the_other_way_round(
    ran: Path, both: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    one, two = both[CUT]
    files = [torch.load(run["checkpoint"], weights_only=True) for run in (one, two)]
    torch.testing.assert_close(*(file["optimizer_states"] for file in files), atol=1e-5, rtol=1e-4)
    assert files[0]["state_dict"].keys() == files[1]["state_dict"].keys()
    for key, value in saved(ran, "cut again.2")["state"].items():
        assert torch.equal(two["state"][key], value), key  # 2 to 2, bit for bit
    for resumed in (saved(ran, "joined.2"), alone(ran, CUT, 3, str(ran / "cut.2" / LAST))):  # 1 to 2, 2 to 1
        assert resumed["steps"] == 3
        for key, value in one["state"].items():
            torch.testing.assert_close(resumed["state"][key], value, atol=1e-5, rtol=1e-4, msg=key)


def test_shares_that_every_rank_saves_resume_anywhere(
    ran: Path, both: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    one, two = both[CUT]
    for label in ("shares again", "gathered again", "shares of one file"):
        for key, value in saved(ran, f"{label}.2")["state"].items():
            assert torch.equal(two["state"][key], value), f"{label}: {key}"  # 2 to 2, bit for bit
    resumed = alone(ran, CUT, 3, str(ran / "shares.2" / LAST))  # on one process, without the strategy
    assert resumed["steps"] == 3
    for key, value in one["state"].items():
        torch.testing.assert_close(resumed["state"][key], value, atol=1e-5, rtol=1e-4, msg=key)


def test_a_checkpoint_of_shares_is_small_whole_and_checked(ran: Path, tmp_path: Path) -> None:
    file, gathered = (ran / f"{label}.2" / LAST for label in ("shares", "cut"))
    own, whole = read_plain(str(file)), read_plain(str(gathered))
    assert not [name for name in own["state_dict"] if name.startswith("policy.base_model.")]
    assert own["state_dict"].keys() < whole["state_dict"].keys()
    folders = sorted(path.name for path in file.parent.iterdir() if path.is_dir())
    assert len(folders) == len(list(file.parent.glob("*.ckpt")))  # those of earlier saves of last.ckpt are gone
    folder = sharded_files.folder_of(file, own["maestro"])
    assert folder is not None
    assert len(list(folder.iterdir())) == 2  # one a rank
    sharded_files.fill(own, file, own["maestro"])
    assert own["state_dict"].keys() == whole["state_dict"].keys()
    for key, value in whole["state_dict"].items():
        assert torch.equal(own["state_dict"][key], value), key
    torch.testing.assert_close(own["optimizer_states"], whole["optimizer_states"], atol=0, rtol=0)

    shutil.copytree(file.parent, tmp_path / "run")
    copy = tmp_path / "run" / file.name
    check_file(str(copy), resume=True)
    share = sorted((copy.parent / folder.name).iterdir())[1]
    content = bytearray(share.read_bytes())
    content[-3] ^= 1
    share.write_bytes(content)
    os.utime(copy)
    with pytest.raises(UserError, match=r"is damaged \(the checksum of \S+ is wrong\)"):
        check_file(str(copy))
    share.unlink()
    os.utime(copy)
    with pytest.raises(UserError, match=r"lacks the file \S+safetensors"):
        check_file(str(copy))
    shutil.rmtree(copy.parent / folder.name)
    os.utime(copy)
    with pytest.raises(UserError, match=r"the folder of their shares, .* is not there"):
        check_file(str(copy))
    WholeFileIO().remove_checkpoint(file.parent / "step-000002.ckpt")
    assert len([path for path in file.parent.iterdir() if path.is_dir()]) == len(folders) - 1


def test_a_reward_that_fails_on_one_rank_ends_all_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)  # Lightning starts the other rank
    (tmp_path / "mine.py").write_text(
        "import os\n\n\ndef mine(completions, **kwargs):\n    if os.environ.get('LOCAL_RANK', '0') == '1':\n"
        "        raise ValueError('no API key')\n    return [float(len(c)) for c in completions]\n"
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        "configs: [configs/quickstart.yaml]\ndata: {batch_size: 2}\nrollout: {group_size: 4, max_new_tokens: 8}\n"
        f"trainer: {{devices: 2, max_steps: 3, limit_val_batches: 0, default_root_dir: {tmp_path}}}\nanchors: []\n"
        "model: {weigher: maestro_pl.EqualWeights, meta: {signal: maestro_pl.AdvantageSignal, learner: reinforce}}\n"
        f"rewards:\n  - {{class_path: callbacks.FunctionReward, init_args: {{function: {tmp_path}/mine.py:mine}}}}\n"
    )
    first = start(fit, tmp_path, config, output=tmp_path / "said")
    assert ended([first]) == [1]
    said = (tmp_path / "said").read_text()  # rank 1 writes to the same place
    assert "raised ValueError: no API key" in said
    assert "another of the 2 ranks has ended" in said, said[-2000:]
    assert "Traceback" not in said
