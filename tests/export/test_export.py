"""``maestro-pl export``: what it writes computes what the run computes, and what is wrong never looks finished."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from maestro_pl.cli import main
from maestro_pl.errors import UserError
from maestro_pl.export import Request, export_run, merged, steps
from maestro_pl.export.base import find_base
from maestro_pl.export.check import LogProbabilityDifference, examples, log_probability_difference
from maestro_pl.export.merged import Rounding
from maestro_pl.export.place import CheckFailed, making
from maestro_pl.export.plan import LoRAUpdate, make_plan
from maestro_pl.export.shards import Entry, write_shards
from maestro_pl.export.trained_run import read_trained_run
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.sandbox import policy_path
from maestro_pl.training import sharded_files
from tests.support import make_model, make_tokenizer, store_in_four_bits

IDS = torch.tensor([[1, 2, 3, 40, 50, 60, 7, 8, 257, 9]])
PLAIN = LoRA(r=4)
SETTINGS = {"weigher": "Conductor", "meta.signal": "AnchorSignal", "meta.learner": "RidgeLearner", "loss.type": "dapo"}


def make_base(
    path: Path, kind: str = "qwen3", dtype: torch.dtype = torch.float32, shard: str = "50GB", **changes: Any
) -> Path:
    """A tiny base, saved in several shards if ``shard`` is small."""
    whole = make_model(kind, path.with_name(f"{path.name}_whole"), **changes)
    make_tokenizer(path)
    AutoModelForCausalLM.from_pretrained(whole, dtype=dtype).save_pretrained(path, max_shard_size=shard)
    return path


def make_run(
    folder: Path, base: Path, lora: LoRA | None = PLAIN, std: float = 0.1, data: Any = None, **options: Any
) -> LoRAPolicy:
    """A run's folder with the checkpoint of a policy that was moved at random; returns the policy."""
    options.setdefault("dtype", "float32")
    policy = LoRAPolicy(str(base), lora=lora, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(std * torch.randn_like(parameter))
    state = policy.state_dict()
    saved = {"format": 1, "module": "MaestroModule", "policy_steps": 7, "skipped_steps": 0, "settings": SETTINGS}
    content = {
        "state_dict": {f"policy.{name}": state[name] for name in policy.saved_names()} | {"weigher.tau": torch.ones(1)},
        "maestro": {**saved, "rewards": [["brief", "train", "zscore", False]], "optimizers": ["AdamW"], "rng": {}},
        "callbacks": {},
        "pytorch-lightning_version": "2.6.6",
    }
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    given = {"model": str(base), "lora": None if lora is None else asdict(lora), **options}
    config = {"model": {"policy": {"class_path": "maestro_pl.LoRAPolicy", "init_args": given}}, "data": data or {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return policy.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits.float()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def export(run: Path, to: str, *more: str) -> Path:
    main(["export", str(run), "--to", to, *more])
    return run / "export" / to


def fail(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["export", *args])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("maestro-pl: error: ")]
    assert len(lines) == 1
    return caught.value.code, lines[0].removeprefix("maestro-pl: error: ")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def equals_pefts_merge(policy: LoRAPolicy, folder: Path, dtype: torch.dtype) -> None:
    wanted = policy.model.merge_and_unload().state_dict()
    got = load(folder, dtype).state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@pytest.fixture(scope="module", autouse=True)
def _imported_objects_stay() -> None:
    """An export frees a model before it loads the next; without this, every time by way of what was imported since."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoRAPolicy]:
    """A run on a base of several bfloat16 shards with tied embeddings; tests copy it."""
    folder = tmp_path_factory.mktemp("plain")
    base = make_base(folder / "base", dtype=torch.bfloat16, shard="20KB", tie_word_embeddings=True)
    return folder, make_run(folder / "run", base, std=0.05)


@pytest.fixture
def run(plain: tuple[Path, LoRAPolicy], tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain[0] / "run", tmp_path / "runs" / "named" / "version_0"))


# -- a real run
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_the_sandbox_is_exported_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--data.batch_size", "2", "--rollout.group_size", "4", "--rollout.max_new_tokens", "24"]
    short = ["--trainer.max_steps", "2", "--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
    main(["fit", *small, *short, "--model.optimizer.lr", "0.05", "--model.meta.warmup", "0"])
    run = tmp_path / "runs/quickstart/version_0"
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert any(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)
    policy = LoRAPolicy(dtype="float32")
    policy.load_state_dict(
        {name.removeprefix("policy."): t for name, t in state.items() if "lora" in name}, strict=False
    )
    policy.eval()

    adapter = export(run, "adapter")
    assert names(adapter) == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32)
    before = logits(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter)), logits(policy.model))
    assert (logits(policy.model) - before).abs().max() > 0.1  # the adapters matter
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(policy_path())

    written = export(run, "merged", "--dtype", "float32")
    torch.testing.assert_close(logits(load(written)), logits(policy.model), atol=2e-4, rtol=0)
    out = capsys.readouterr().out
    assert out.count("log-probabilities of ") == 2
    assert "differ by 0.0e+00 in the mean" in out
    assert AutoTokenizer.from_pretrained(written).chat_template == policy.tokenizer.chat_template
    assert json.loads((written / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((written / "generation_config.json").read_text())["eos_token_id"] == 1720

    card = (written / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(policy_path())
    assert front["library_name"] == "transformers"
    assert {"maestro", "grpo", "lora"} <= set(front["tags"])
    assert "2 policy steps" in card
    assert "`Conductor`, meta-signal `AnchorSignal`, learner `RidgeLearner`" in card
    assert "| anchor | FunctionReward | anchor (never weighed) |" in card
    assert names(run / "export") == {"adapter", "merged"}  # nothing half done is left


def test_a_soup_is_exported_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base")
    folders = [tmp_path / name / "version_0" for name in ("first", "second")]
    for folder, lora in zip(folders, (LoRA(r=4), LoRA(r=2, alpha=8)), strict=True):
        make_run(folder, base, lora)
    given = ["export", "--average", *map(str, folders), "--shares", "0.25", "0.75"]
    main([*given, "--to", "adapter", "--output", str(tmp_path / "soup")])
    main([*given, "--to", "merged", "--output", str(tmp_path / "merged")])
    out = capsys.readouterr().out
    assert out.count("share 0.25") == 2
    assert yaml.safe_load((tmp_path / "soup/adapter_config.json").read_text())["r"] == 6
    card = (tmp_path / "merged/README.md").read_text()
    assert "average of runs" in card
    assert "- 0.75 of `version_0`" in card
    name = "model.layers.0.self_attn.q_proj"
    runs = [read_trained_run(str(folder)) for folder in folders]
    change = sum(
        share
        * scale
        * run.state[f"base_model.model.{name}.lora_B.default.weight"]
        @ run.state[f"base_model.model.{name}.lora_A.default.weight"]
        for share, scale, run in zip((0.25, 0.75), (32 / 4, 8 / 2), runs, strict=True)
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()[f"{name}.weight"]
    got = load(tmp_path / "merged").state_dict()[f"{name}.weight"]
    torch.testing.assert_close(got, plain + change, atol=1e-5, rtol=1e-5)


# -- merging
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_pefts_merge_to_the_last_bit(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", "llama", dtype, "20KB", tie_word_embeddings=tied)
    assert len(list(base.glob("*.safetensors"))) > 2
    name = str(dtype).removeprefix("torch.")
    policy = make_run(tmp_path / "run", base, std=0.05, dtype=name)
    expected = logits(policy.model)
    folder = export(tmp_path / "run", "merged", "--max_shard_size", "30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {key: path.name for path in folder.glob("*.safetensors") for key in load_file(path)}
    assert index["weight_map"] == held
    assert ("lm_head.weight" in held) is not tied
    model = load(folder, dtype)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=0)
    equals_pefts_merge(policy, folder, dtype)


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=4, alpha=6, use_rslora=True),
        LoRA(
            r=4, alpha=8, options={"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 8}, "alpha_pattern": {"v_proj": 3}}
        ),
        LoRA(r=2, target_modules=["q_proj", "down_proj"], options={"layers_to_transform": [1]}),
    ],
    ids=["rslora", "patterns", "few"],
)
def test_scales_and_targets(tmp_path: Path, tiny_qwen3: Path, lora: LoRA) -> None:
    policy = make_run(tmp_path / "run", tiny_qwen3, lora)
    expected = logits(policy.model)
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    beside = PeftModel.from_pretrained(base, export(tmp_path / "run", "adapter"))
    assert torch.equal(logits(beside), expected)
    folder = export(tmp_path / "run", "merged")
    torch.testing.assert_close(logits(load(folder)), expected, atol=2e-4, rtol=0)
    equals_pefts_merge(policy, folder, torch.float32)


def test_adapters_in_bfloat16_keep_their_dtype(tmp_path: Path, tiny_qwen3: Path) -> None:
    policy = make_run(tmp_path / "run", tiny_qwen3, LoRA(r=4, dtype="bfloat16"))
    state = load_file(export(tmp_path / "run", "adapter") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    folder = export(tmp_path / "run", "merged")
    torch.testing.assert_close(
        logits(load(folder)), logits(policy.model), atol=0.1, rtol=0
    )  # the run's own are rounded


def test_an_update_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-1.0]])
    merged_weight = LoRAUpdate(a, b, 0.5)(torch.eye(2, dtype=torch.bfloat16))
    assert merged_weight.dtype == torch.float32
    assert merged_weight.tolist() == [[2.5, 3.0], [-0.5, 0.0]]


def test_rounding_is_the_error_over_the_update() -> None:
    rounding = Rounding()
    exact = torch.tensor([1.0 + 2**-10, 1.0 + 2**-7])  # bfloat16 knows 1 and 1 + 2^-7 and nothing between
    rounding.add(torch.ones(2), exact, exact.to(torch.bfloat16))
    assert rounding.share == pytest.approx(2**-10 / math.hypot(2**-10, 2**-7))


def test_a_small_update_that_rounding_swallows_is_said(
    tmp_path: Path, plain: tuple[Path, LoRAPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", plain[0] / "base", std=1e-5)
    export(tmp_path / "run", "merged")
    out = capsys.readouterr().out
    assert "bfloat16 on disk, bfloat16 is written" in out
    assert "--dtype float32 or --to adapter keeps all of it" in out


def test_adapters_on_a_tied_head_part_it_from_the_embedding(
    tmp_path: Path, plain: tuple[Path, LoRAPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    lora = LoRA(r=4, target_modules=["q_proj", "lm_head"])
    policy = make_run(tmp_path / "run", plain[0] / "base", lora)
    folder = export(tmp_path / "run", "merged", "--dtype", "float32")
    assert "one after the other" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    model = load(folder)
    torch.testing.assert_close(logits(model), logits(policy.model), atol=2e-4, rtol=0)
    before = AutoModelForCausalLM.from_pretrained(plain[0] / "base", dtype=torch.float32)
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)


def _bin_only(base: Path) -> None:
    state = {key: tensor for path in base.glob("*.safetensors") for key, tensor in load_file(path).items()}
    for path in [*base.glob("*.safetensors"), *base.glob("*.index.json")]:
        path.unlink()
    torch.save(state, base / "pytorch_model.bin")


def _other_names(base: Path) -> None:
    """Without the prefix ``model.``, which transformers finds nevertheless."""
    state = load_file(base / "model.safetensors")
    save_file({k.removeprefix("model."): t for k, t in state.items()}, base / "model.safetensors", {"format": "pt"})


MORE_THAN_PLAIN: dict[str, tuple[str, LoRA, Callable[[Path], None] | None, str]] = {
    "dora": ("llama", LoRA(r=2, use_dora=True), None, "DoRA"),
    "biases": ("llama", LoRA(r=2, options={"lora_bias": True}), None, "biases"),
    "base_biases": ("llama", LoRA(r=2, options={"bias": "all"}), None, "was trained beside plain adapters"),
    "saved": ("qwen3", LoRA(r=2, options={"modules_to_save": ["lm_head"]}), None, "was trained beside"),
    "embeddings": ("qwen3", LoRA(r=2, target_modules=["embed_tokens", "q_proj"]), None, "on embeddings"),
    "conv1d": ("gpt2", LoRA(r=2), None, "fan_in_fan_out"),
    "bin": ("qwen3", LoRA(r=2), _bin_only, "no safetensors"),
    "names": ("qwen3", LoRA(r=2), _other_names, "does not stand under this name"),
    "pissa": ("qwen3", LoRA(r=2, options={"init_lora_weights": "pissa"}), None, "pissa"),
}


@pytest.mark.parametrize("case", MORE_THAN_PLAIN)
def test_what_is_more_than_plain_adapters_is_merged_by_peft(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, lora, change, reason = MORE_THAN_PLAIN[case]
    bias = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    tied = {"tie_word_embeddings": True} if case in ("saved", "embeddings") else {}
    base = make_base(tmp_path / "base", kind, **bias, **tied)
    if change is not None:
        change(base)
    policy = make_run(tmp_path / "run", base, lora, std=0.05)
    folder = export(tmp_path / "run", "merged")
    assert f"because {reason}" in (said := capsys.readouterr().out) or reason in said.split("because ")[1]
    torch.testing.assert_close(logits(load(folder)), logits(policy.model), atol=2e-4, rtol=0)
    assert json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False) is (kind == "gpt2")
    if case in ("dora", "saved", "base_biases", "embeddings"):
        beside = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(beside, export(tmp_path / "run", "adapter"))
        assert torch.equal(logits(adapted), logits(policy.model))


def test_a_fully_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    state = load_file(base / "model.safetensors")
    twice = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}  # some bases repeat a tied weight
    save_file(twice, base / "model.safetensors", {"format": "pt"})
    policy = make_run(tmp_path / "run", base, None, std=0.01)
    folder = export(tmp_path / "run", "merged")
    assert "one after the other" in (out := capsys.readouterr().out)
    assert "differ by 0.0e+00" in out
    assert torch.equal(logits(load(folder)), logits(policy.model))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    status, sentence = fail([str(tmp_path / "run"), "--to", "adapter"], capsys)
    assert status == 2
    assert "lora: null" in sentence
    _other_names(base)
    folder = export(tmp_path / "run", "merged", "--overwrite")
    assert "does not stand under this name" in capsys.readouterr().out
    assert torch.equal(logits(load(folder)), logits(policy.model))


def test_shares_of_several_ranks_are_put_together(tmp_path: Path, tiny_qwen3: Path) -> None:
    run = tmp_path / "run"
    make_run(run, tiny_qwen3, None, std=0.01)
    expected = load_file(export(run, "merged") / "model.safetensors")
    path = run / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    parts = {f"state_dict/{name}": saved["state_dict"].pop(name) for name in list(saved["state_dict"])}
    folder = path.with_name("last.ckpt.shards-1")
    sharded_files.write(folder, parts)
    sums = sharded_files.checksums(folder, [file.name for file in folder.iterdir()])
    saved["maestro"]["shards"] = {"folder": folder.name, "files": sums}
    torch.save(saved, path)
    found = load_file(export(run, "merged", "--overwrite") / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_runs_other_parameters_are_left_out(tmp_path: Path, tiny_qwen3: Path) -> None:
    policy = make_run(tmp_path / "run", tiny_qwen3, reference="synced")
    state = load_file(export(tmp_path / "run", "adapter") / "adapter_model.safetensors")
    assert state.keys() == {
        name.removeprefix("model.").replace(".default.", ".")
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    }
    torch.testing.assert_close(
        logits(load(export(tmp_path / "run", "merged"))), logits(policy.model), atol=2e-4, rtol=0
    )


def test_changes_of_the_config_are_kept_and_quantisation_is_not(tmp_path: Path, tiny_qwen3: Path) -> None:
    options = {"rms_norm_eps": 1e-2, "device_map": None}
    policy = make_run(tmp_path / "run", tiny_qwen3, model_options=options)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    policy_config = config["model"]["policy"]["init_args"]
    policy_config["model_options"]["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    folder = export(tmp_path / "run", "merged")
    written = json.loads((folder / "config.json").read_text())
    assert written["rms_norm_eps"] == 1e-2
    assert "quantization_config" not in written
    torch.testing.assert_close(logits(load(folder)), logits(policy.model), atol=2e-4, rtol=0)
    assert "trained against the quantised weights of the base (`nf4`)" in (folder / "README.md").read_text()
    policy_config["model_options"], policy_config["quantization"] = None, "int8"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    assert read_trained_run(str(tmp_path / "run")).quantization == "int8"


def test_a_base_that_has_moved(run: Path, plain: tuple[Path, LoRAPolicy], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(plain[0] / "base", tmp_path / "moved"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["policy"]["init_args"]["model"] = "nobody/nothing"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    adapter = export(run, "adapter", "--base", str(moved))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)


def test_generation_ends_where_the_run_ended(run: Path, plain: tuple[Path, LoRAPolicy], tmp_path: Path) -> None:
    base = Path(shutil.copytree(plain[0] / "base", tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "top_k": 3}))
    config = json.loads((export(run, "merged", "--base", str(base)) / "generation_config.json").read_text())
    assert config == {"eos_token_id": [5, 257], "top_k": 3}  # the tokenizer's too, which ended responses in the run


# -- the check
# -----------------------------------------------------------------------------------------------------------


def damage(folder: Path, name: str, change: Callable[[Tensor], Any]) -> None:
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    state = load_file(path)
    change(state[name])
    save_file(state, path, {"format": "pt"})


def test_a_single_wrong_number_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(folder: Path, *args: Any) -> Rounding:
        rounding = merged.write_merged(folder, *args)
        damage(folder, name, lambda tensor: tensor.view(-1)[5].mul_(1.02))
        return rounding

    monkeypatch.setattr(steps, "write_merged", damaged)
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight"):
        status, sentence = fail([str(run), "--to", "merged"], capsys)
        assert status == 1
        assert f"{name} in model" in sentence
        assert "kept for a look in" in sentence
    assert names(run / "export") == {"merged.failed", "merged-1.failed"}
    assert "README.md" not in names(run / "export" / "merged.failed")


def test_a_tensor_that_was_not_written_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgetful(folder: Path, base: Any, plan: Any, *args: Any) -> Rounding:
        plan.dropped.add("model.norm.weight")
        rounding = merged.write_merged(folder, base, plan, *args)
        plan.dropped.clear()
        return rounding

    monkeypatch.setattr(steps, "write_merged", forgetful)
    status, sentence = fail([str(run), "--to", "merged"], capsys)
    assert status == 1
    assert "model.norm.weight was not written" in sentence


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_log_probabilities_alone_find_a_lost_weight(
    run: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(folder: Path, *args: Any) -> Rounding:
        rounding = merged.write_merged(folder, *args)
        damage(folder, "model.norm.weight", Tensor.zero_)
        return rounding

    monkeypatch.setattr(steps, "check_model_weights", lambda *_: 0)
    asked = [str(run), "--to", "merged", "--dtype", dtype]
    export(run, "merged", "--dtype", dtype)
    monkeypatch.setattr(steps, "write_merged", damaged)
    status, sentence = fail([*asked, "--overwrite"], capsys)
    assert status == 1
    assert "not what the run trained: log-probabilities" in sentence
    assert "README.md" in names(run / "export/merged")  # the earlier export is still there


def test_a_lost_adapter_is_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(folder: Path, *args: Any) -> None:
        original(folder, *args)
        damage(folder, "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight", Tensor.zero_)

    original = steps.write_adapter
    monkeypatch.setattr(steps, "write_adapter", damaged)
    status, sentence = fail([str(run), "--to", "adapter"], capsys)
    assert status == 1
    assert "adapter.failed" in sentence
    assert names(run / "export") == {"adapter.failed"}
    assert ".lock" not in names(run / "export/adapter.failed")


def test_a_difference_by_hand() -> None:
    ours, theirs, base = (torch.tensor(v) for v in ([-4.0, -8.0], [-4.5, -8.0], [-5.0, -8.0]))
    got = log_probability_difference(ours, theirs, torch.bfloat16, base)
    assert got == LogProbabilityDifference(tokens=2, mean=0.25, largest=0.5, tolerance=0.15, learned=0.5)
    assert not got.holds
    assert log_probability_difference(ours, ours + 0.1, torch.bfloat16).holds
    assert not log_probability_difference(ours, ours + 0.1, torch.float16).holds
    assert not log_probability_difference(ours, torch.tensor([float("nan"), -8.0]), torch.bfloat16).holds
    late = torch.cat([torch.zeros(999), torch.tensor([-4.0])])
    assert not log_probability_difference(
        torch.zeros(1000), late, torch.bfloat16
    ).holds  # one token far away, in the mean next to nothing


def test_what_the_run_has_recorded_is_what_is_compared(run: Path) -> None:
    rows = [{"prompt": f"word {i % 6} " + "o" * 300, "response": f"answer {i}"} for i in range(12)]
    lines = [json.dumps(row) + "\n" for row in rows] + ['{"prompt": "cut o']
    torn = [
        b"\xff\xfe\n",
        b"3\n",
        b'{"prompt": "p"}\n',
        b'{"prompt": [{"role": 3}], "response": "r"}\n',
        b"{" * 10_000 + b"\n",
    ]
    (run / "rollouts.jsonl").write_bytes(b"".join([*torn, "".join(lines).encode()]))
    source = read_trained_run(str(run))
    tokenizer = AutoTokenizer.from_pretrained(find_base(source).name)
    pairs = examples(source, tokenizer)
    assert [tokenizer.decode(response) for _, response in pairs] == [f"answer {i}" for i in (8, 9, 10, 11)]
    assert [len(prompt) for prompt, _ in pairs] == [256] * 4  # longer than the model can read with the answer
    export(run, "adapter")


# -- nothing half done
# ---------------------------------------------------------------------------------------------------


def test_a_killed_export_leaves_nothing_that_looks_finished(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(str(run), "merged")
    child = os.fork()
    if child == 0:
        try:
            steps.write_generation_config = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            export_run(request, say=lambda _: None)
        finally:
            os._exit(0)  # whatever happens: a child that returns would go on with the other tests
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = (run / "export").iterdir()
    assert left.name == f".merged.partial-{child}"
    assert "config.json" in names(left)
    export_run(request, say=lambda _: None)
    assert names(run / "export") == {"merged"}


def test_an_interrupted_export_removes_what_it_wrote(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "write_config", interrupted)
    status, sentence = fail([str(run), "--to", "merged"], capsys)
    assert status == 130
    assert "nothing was written" in sentence
    assert names(run / "export") == set()


def test_two_exports_to_one_place(run: Path) -> None:
    request = Request(str(run), "adapter")

    def second(line: str) -> None:
        if line.startswith("Check"):
            with pytest.raises(UserError, match="Another export is writing"):
                export_run(request, say=lambda _: None)

    export_run(request, say=second)
    assert names(run / "export") == {"adapter"}
    assert ".lock" not in names(run / "export/adapter")


# -- what is asked for
# ---------------------------------------------------------------------------------------------------


def test_which_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = run / "checkpoints"
    content = torch.load(saved / "last.ckpt", weights_only=True)
    content["maestro"]["policy_steps"] = 5
    shutil.copy(saved / "last.ckpt", saved / "step-000007.ckpt")
    torch.save(content, saved / "step-000005.ckpt")
    assert read_trained_run(str(run)).steps == 7
    assert read_trained_run(str(run.parent)).folder == run  # the newest of its versions
    assert read_trained_run(str(saved / "step-000005.ckpt")).folder == run
    for asked in ("step-000005.ckpt", "checkpoints/step-000005.ckpt", str(saved / "step-000005.ckpt")):
        assert read_trained_run(str(run), asked).steps == 5
    with pytest.raises(UserError, match="has watched no metric"):
        read_trained_run(str(run), "best")
    content["callbacks"]["ModelCheckpoint"] = {"monitor": "x", "best_model_path": "runs/old/step-000005.ckpt"}
    torch.save(content, saved / "last.ckpt")
    assert read_trained_run(str(run), "best").checkpoint == saved / "step-000005.ckpt"
    (saved / "step-000005.ckpt").unlink()
    with pytest.raises(UserError, match="is gone"):
        read_trained_run(str(run), "best")


def test_overwriting(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export(run, "adapter")
    assert "is not empty: give --overwrite" in fail([str(run), "--to", "adapter"], capsys)[1]
    (out / "README.md").write_text("old")
    export(run, "adapter", "--overwrite")
    assert (out / "README.md").read_text() != "old"
    (out / "mine").mkdir()
    assert "holds mine and is no earlier export" in fail([str(run), "--to", "adapter", "--overwrite"], capsys)[1]
    other = run / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    asked = [str(run), "--to", "adapter", "--overwrite", "--output", str(other)]
    assert "is no earlier export" in fail(asked, capsys)[1]
    (other / "README.md").unlink()
    main(["export", *asked])  # an empty folder is as good as none
    assert "adapter_config.json" in names(other)


def _config(run: Path, **changes: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["policy"]["init_args"].update(changes)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def _flip_bytes(run: Path, *, header: bool = False) -> None:
    """Damage the largest entry of the checkpoint, in its middle or in the header before it, where its name is no text then."""
    path = run / "checkpoints/last.ckpt"
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda one: one.file_size)
    content = bytearray(path.read_bytes())
    start = entry.header_offset + (30 if header else 256 + entry.file_size // 2)
    content[start : start + 4] = bytes(byte ^ 255 for byte in content[start : start + 4])
    path.write_bytes(content)


def _infinite(run: Path) -> None:
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    next(tensor for name, tensor in content["state_dict"].items() if "lora_B" in name)[0, 0] = float("inf")
    torch.save(content, run / "checkpoints/last.ckpt")


SENTENCES: dict[str, tuple[Callable[[Path], Any] | None, list[str], str]] = {
    "no run": (None, ["nowhere", "--to", "merged"], "There is no run 'nowhere'"),
    "unknown --to": (None, ["{run}", "--to", "gguf"], "argument --to: invalid choice: 'gguf'"),
    "no --to": (None, ["{run}"], "the following arguments are required: --to"),
    "no checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints"), ["{run}", "--to", "merged"], "There is no last checkpoint in",
    ),
    "another checkpoint": (
        lambda run: (run / "checkpoints/last.ckpt").rename(run / "checkpoints/step-1.ckpt"),
        ["{run}", "--to", "merged"], "(there is step-1.ckpt)",
    ),
    "no such checkpoint": (None, ["{run}", "--to", "merged", "--checkpoint", "x.ckpt"], "--checkpoint x.ckpt: there is no"),
    "a checkpoint of a checkpoint": (
        None, ["{run}/checkpoints/last.ckpt", "--to", "merged", "--checkpoint", "best"], "is a checkpoint already",
    ),
    "damaged": (_flip_bytes, ["{run}", "--to", "merged"], "is damaged"),
    "a damaged header": (lambda run: _flip_bytes(run, header=True), ["{run}", "--to", "merged"], "is damaged"),
    "cut off": (
        lambda run: os.truncate(run / "checkpoints/last.ckpt", 999), ["{run}", "--to", "merged"], "only a part of one",
    ),
    "foreign": (
        lambda run: torch.save({"a": 1}, run / "checkpoints/last.ckpt"), ["{run}", "--to", "merged"], "no 'maestro' entry",
    ),
    "no config": (lambda run: (run / "config.yaml").unlink(), ["{run}", "--to", "merged"], "config.yaml is missing"),
    "no base": (None, ["{run}", "--to", "merged", "--base", "nobody/nothing"], "The base model 'nobody/nothing' was not found"),
    "another base": (None, ["{run}", "--to", "merged", "--base", str(policy_path())], "The adapters do not fit the base"),
    "another rank": (
        lambda run: _config(run, lora={"r": 2}), ["{run}", "--to", "adapter"],
        "has the shape (4, 64) in the checkpoint and (2, 64)",
    ),
    "unknown setting": (
        lambda run: _config(run, lora={"r": 4, "spin": 2}), ["{run}", "--to", "adapter"], "model.policy.lora.spin",
    ),
    "pissa": (
        lambda run: _config(run, lora={"r": 4, "options": {"init_lora_weights": "pissa"}}),
        ["{run}", "--to", "adapter"], "initialised by pissa",
    ),
    "dtype of an adapter": (None, ["{run}", "--to", "adapter", "--dtype", "float32"], "--dtype float32 is of merged weights"),
    "shard size": (None, ["{run}", "--to", "merged", "--max_shard_size", "big"], "--max_shard_size big: expected a size"),
    "output is the run": (None, ["{run}", "--to", "merged", "--output", "{run}"], "is in use: the export reads"),
    "output holds the run": (None, ["{run}", "--to", "merged", "--output", "{run}/.."], "is in use: the export reads"),
    "output among checkpoints": (None, ["{run}", "--to", "merged", "--output", "{run}/checkpoints/x"], "is in use"),
    "output is a file": (None, ["{run}", "--to", "merged", "--output", "{run}/config.yaml"], "is no folder"),
    "output is under a file": (
        None, ["{run}", "--to", "merged", "--output", "{run}/config.yaml/x"],
        "config.yaml/x cannot be a folder, because {run}/config.yaml is a file: give another.",
    ),
    "adapters that are not finite": (
        _infinite, ["{run}", "--to", "adapter"],
        ".lora_B.default.weight has values that are not finite in float32: {run}/checkpoints/last.ckpt is of a run that broke; "
        "give an earlier checkpoint.",
    ),
    "infinite": (_infinite, ["{run}", "--to", "merged"], "values that are not finite in float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_bad_input_is_one_sentence(run: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, arguments, expected = SENTENCES[case]
    if change is not None:
        change(run)
    status, sentence = fail([word.replace("{run}", str(run)) for word in arguments], capsys)
    assert status == 2
    assert expected.replace("{run}", str(run)) in sentence
    assert sentence.endswith(".")
    assert not (run / "export").exists() or names(run / "export") == set()


def test_a_quantised_base_is_refused(run: Path, plain: tuple[Path, LoRAPolicy], tmp_path: Path, capsys: Any) -> None:
    base = Path(shutil.copytree(plain[0] / "base", tmp_path / "four_bit"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    status, sentence = fail([str(run), "--to", "merged", "--base", str(base)], capsys)
    assert status == 2
    assert "is itself quantised (bitsandbytes)" in sentence
    assert "give --base with the 16-bit original" in sentence


def test_adapters_on_a_base_that_is_stored_in_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # on a processor with these instructions whoever never trains is given a kernel that rounds otherwise
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    stored = store_in_four_bits(make_model("qwen3", tmp_path / "whole", **wide), tmp_path / "stored")
    policy = make_run(tmp_path / "run", stored, dtype="bfloat16")
    folder = export(tmp_path / "run", "adapter")
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, folder).eval()
    assert (logits(adapted) - logits(policy.model)).abs().max() < 1e-3
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(stored)


def test_values_that_float16_lacks_are_refused(tmp_path: Path, tiny_qwen3: Path, capsys: Any) -> None:
    make_run(tmp_path / "run", tiny_qwen3, std=1e5)
    status, sentence = fail([str(tmp_path / "run"), "--to", "merged", "--dtype", "float16"], capsys)
    assert status == 2
    assert "not finite in float16: give --dtype bfloat16" in sentence


# -- files
# ---------------------------------------------------------------------------------------------------------------


def test_shards_are_read_back_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "bf": torch.randn(3, 5).bfloat16(), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]), "long": torch.arange(6).reshape(2, 3), "view": torch.randn(4, 6).t(),
    }  # fmt: skip
    entries = {name: Entry(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}
    for size, several in (("1GB", False), ("0.05KB", True)):
        folder = tmp_path / size
        folder.mkdir()
        write_shards(folder, entries, size)
        paths = list(folder.glob("*.safetensors"))
        assert (len(paths) > 1) is several
        read = {name: tensor for path in paths for name, tensor in load_file(path).items()}
        assert read.keys() == tensors.keys()
        assert all(
            torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )


def test_only_what_changed_is_computed(run: Path) -> None:
    source = read_trained_run(str(run))
    base = find_base(source)
    plan = make_plan(base, base.skeleton(source.lora), source.lora, source.state)
    assert plan.reason is None
    assert len(plan.edits) == 14  # seven linear layers in each of two
    assert base.dtype == torch.bfloat16
    assert all(isinstance(edit, LoRAUpdate) and edit.scale == 8.0 for edit in plan.edits.values())  # alpha 32 over r 4


def test_the_card_has_the_runs_table(run: Path) -> None:
    with (run / "val_metrics.csv").open("w", newline="") as file:
        rows = [("step", "task", "metric", "mean", "low", "high", "n")]
        rows += [(step, "all", "reward/brief", step, 0, 1, 9) for step in (0, 7)]
        csv.writer(file).writerows(rows)
    card = (export(run, "adapter") / "README.md").read_text()
    assert card.splitlines()[0] == "---"
    assert "# named" in card.splitlines()
    assert "validation split at step 7" in card
    assert "| all | reward/brief | 7.000 [0.000, 1.000] | 9 |" in card
    assert "| brief |  | train (weighed) | zscore |" in card
    columns = ["task", "metric"] + [
        f"{side}{end}" for side in ("before", "after") for end in ("", "_low", "_high", "_n")
    ]
    with (run / "before_after.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, ("all", "reward/brief", "", "", "", "", 0.5, 0.25, 0.75, 9)])
    card = (export(run, "adapter", "--overwrite") / "README.md").read_text()
    assert "| all | reward/brief | - | 0.500 [0.250, 0.750] | 9 |" in card


def test_the_cards_example_runs(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"data": {"system_prompt": 'Be "brief"', "chat_template_kwargs": {"shout": False}}}
    config |= {"rollout": {"max_new_tokens": 3}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for to in ("adapter", "merged"):
        folder = export(run, to)
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        exec(code.replace("THIS_FOLDER", str(folder)), {})
        assert '"content": "Be \\"brief\\""' in code
        assert "max_new_tokens=3" in code


def test_the_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "export     write what a run has learned" in capsys.readouterr().out


def test_check_failed_is_a_user_error() -> None:
    assert issubclass(CheckFailed, UserError)


def test_what_is_exported_can_be_read_by_whom_the_folder_lets_in(tmp_path: Path) -> None:
    with making(tmp_path / "out") as folder:
        save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").chmod(0o600)
    expected = (tmp_path / "out").stat().st_mode & 0o666
    assert (tmp_path / "out/adapter_model.safetensors").stat().st_mode & 0o777 == expected
