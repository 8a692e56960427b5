"""A policy that goes on from adapters that another program trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from maestro_pl.errors import UserError
from maestro_pl.evaluation.judge.local import LocalJudge
from maestro_pl.memory.workload import model_config
from maestro_pl.policy.loading import LoRA
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.policy.stored_adapter import StoredAdapter, stored_adapter

IDS = torch.tensor([[1, 2, 3, 11, 12, 13]])
PROMPTS, RESPONSES = [[1, 2, 3]], [[11, 12, 13]]


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits[0, 2:-1].log_softmax(-1).gather(-1, IDS[0, 3:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def adapter(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of rank 3 on two layers, as PEFT saves them after some training."""
    torch.manual_seed(2)
    model = get_peft_model(plain(tiny_qwen3), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def test_training_goes_on_from_the_adapters_and_they_are_the_reference(adapter: Path, tiny_qwen3: Path) -> None:
    expected = logps(PeftModel.from_pretrained(plain(tiny_qwen3), adapter).eval())
    assert float((expected - logps(plain(tiny_qwen3).eval())).abs().max()) > 0.1
    with pytest.warns(UserWarning, match=r"goes on from the adapters .* \(rank 3\) on .*only dropout and dtype count"):
        policy = LoRAPolicy(str(adapter), "float32", lora=LoRA(r=16, dropout=0.1)).eval()
    assert (policy.settings["lora.r"], policy.settings["lora.alpha"], policy.settings["lora.dropout"]) == (3, 6, 0.1)
    assert policy.settings["lora.target_modules"] == ["q_proj", "up_proj"]
    assert policy.tokenizer.pad_token == "<pad>"  # the base's: none was saved beside the adapters
    own = policy.token_statistics(PROMPTS, RESPONSES).logps_T
    torch.testing.assert_close(own.detach(), expected, atol=2e-5, rtol=0)
    with torch.no_grad():
        for parameter in policy.trained_parameters():
            parameter.add_(0.1)
    reference = policy.token_statistics(PROMPTS, RESPONSES, which="reference").logps_T
    torch.testing.assert_close(reference, expected, atol=2e-5, rtol=0)
    assert not torch.allclose(policy.token_statistics(PROMPTS, RESPONSES).logps_T, expected, atol=1e-2)
    assert not any(".reference." in name for name in policy.saved_names())


def test_a_judge_speaks_with_its_adapters(adapter: Path, tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "judge"))
    for file in tiny_qwen3.glob("tokenizer*"):
        shutil.copy(file, folder)
    expected = logps(PeftModel.from_pretrained(plain(tiny_qwen3), adapter).eval())
    torch.testing.assert_close(logps(LocalJudge(str(folder), dtype="float32").model), expected, atol=2e-5, rtol=0)


def test_settings_are_those_of_the_config(tmp_path: Path) -> None:
    config = LoraConfig(r=5, target_modules={"b", "a"}, use_rslora=True, rank_pattern={"a": 2}, modules_to_save=["c"])
    config.base_model_name_or_path = "owner/base"
    config.save_pretrained(tmp_path)
    found = stored_adapter(str(tmp_path))
    assert found is not None
    assert found.base == "owner/base"
    lora = found.lora(LoRA(r=1, alpha=1, dtype="bfloat16"))
    assert asdict(lora) == {
        "r": 5, "alpha": 8, "dropout": 0.0, "target_modules": ["a", "b"], "use_rslora": True, "use_dora": False,
        "dtype": "bfloat16", "options": {"rank_pattern": {"a": 2}, "modules_to_save": ["c"]},
    }  # fmt: skip


def test_a_folder_of_a_model_is_none(tiny_qwen3: Path) -> None:
    assert stored_adapter(str(tiny_qwen3)) is None


def test_the_estimate_reads_the_base(adapter: Path) -> None:
    assert model_config(str(adapter)).hidden_size == 32


def changed(adapter: Path, to: Path, **changes: Any) -> str:
    shutil.copytree(adapter, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(to)


def test_what_cannot_be_gone_on_from_is_a_sentence(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora: null trains a whole model: merge them"):
        LoRAPolicy(str(adapter), "float32", lora=None)
    for number, (changes, message) in enumerate(
        [
            ({"peft_type": "IA3"}, "adapters of the kind IA3, and only LoRA's"),
            ({"base_model_name_or_path": None}, "does not say which model the adapters stand on"),
            ({"base_model_name_or_path": str(adapter)}, "which are adapters themselves"),
            ({"base_model_name_or_path": "no/such"}, "No tokenizer could be loaded from the hub id 'no/such'"),
            ({"r": 4}, r"cannot be read \(.*size mismatch|cannot be read"),
            ({"target_modules": ["q_proj", "k_proj"]}, "are not those of their adapter_config.json"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            LoRAPolicy(changed(adapter, tmp_path / str(number), **changes), "float32")
    (tmp_path / "0" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        stored_adapter(str(tmp_path / "0"))


def test_a_base_beside_the_adapters_is_found(adapter: Path, tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = Path(changed(adapter, tmp_path / "moved", base_model_name_or_path="base"))
    shutil.copytree(tiny_qwen3, folder / "base")
    assert stored_adapter(str(folder)) == StoredAdapter(
        str(folder), str(folder / "base"), {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    )
