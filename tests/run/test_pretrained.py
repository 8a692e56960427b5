"""Model folders that are not whole: what is missing is named, and nothing starts at random."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from maestro_pl.errors import OutOfMemory, UserError
from maestro_pl.evaluation.judge.local import LocalJudge
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rewards.embedding import load_sentence_encoder
from maestro_pl.rewards.preference import load_pair_scorer
from maestro_pl.run.pretrained import NotLoaded, pretrained_model, pretrained_tokenizer
from tests.support import make_model

UP = "model.layers.1.mlp.up_proj.weight"


def without(folder: Path, *names: str) -> Path:
    """Take tensors out of a model's file."""
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def configured(folder: Path, **changes: Any) -> Path:
    """Change a model's config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture
def folder(tiny_qwen3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_qwen3, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> Any:
    return pretrained_model(AutoModelForCausalLM, str(folder), **options)


def test_a_whole_model_is_loaded(folder: Path) -> None:
    assert load(folder).config.model_type == "qwen3"


@pytest.mark.parametrize("make", [LoRAPolicy, LocalJudge])
def test_a_tensor_that_is_not_there_is_named(folder: Path, make: Callable[[str], Any]) -> None:
    without(folder, UP)
    with pytest.raises(UserError, match=rf"1 tensor is not in its files and would start at random: {UP}"):
        make(str(folder))


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    names = [name for name in load_file(folder / "model.safetensors") if "layers.1" in name]
    with pytest.raises(NotLoaded, match=rf"^{len(names)} tensors are not in its files .* and {len(names) - 5} more$"):
        load(without(folder, *names))


def test_a_reward_model_and_an_encoder_that_lack_a_tensor(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    base = make_model("llama", tmp_path / "llama")
    config = AutoConfig.from_pretrained(base, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    load_pair_scorer(str(base))
    with pytest.raises(UserError, match=rf"lacks trained weights for \['{UP}'\]"):
        load_pair_scorer(str(without(base, UP)))

    encoder = make_model("gpt2", tmp_path / "encoder")  # for its tokenizer
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("bert", vocab_size=264, max_position_embeddings=64, **small)
    AutoModel.from_config(config).save_pretrained(encoder)
    load_sentence_encoder(str(without(encoder, "pooler.dense.weight", "pooler.dense.bias")))  # nobody reads the pooler
    with pytest.raises(UserError, match=r"cannot be loaded as an encoder: 1 tensor is .*: encoder\.layer\.0\.output"):
        load_sentence_encoder(str(without(encoder, "encoder.layer.0.output.dense.weight")))


def test_tensors_of_another_shape_are_named(folder: Path) -> None:
    configured(folder, intermediate_size=48)
    message = r"6 tensors are in its files with another shape .*: model\S+ is \(32, 64\) and should be \(32, 48\)"
    with pytest.raises(NotLoaded, match=message):
        load(folder)
    with pytest.raises(NotLoaded, match=message):  # what would start at random does so for nobody
        load(folder, ignore_mismatched_sizes=True)


def test_a_part_of_a_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(UserError, match=r"No causal language model .*copy' \(SafetensorError: .*: give a folder"):
        LoRAPolicy(str(folder))


@pytest.mark.parametrize(
    "config", ["[1, 2]", '"text"', "{}", "{", '{"model_type": ["a"]}', '{"model_type": "qwen3", "hidden_size": "x"}']
)
def test_a_config_that_is_no_models_is_a_sentence(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(NotLoaded):
        load(folder)
    with pytest.raises(UserError, match=r"No (tokenizer|causal language model) could be loaded from the folder"):
        LoRAPolicy(str(folder))


def test_a_tokenizer_file_that_is_none(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(NotLoaded):
        pretrained_tokenizer(str(folder))


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum|gptqmodel"), ("awq", "gptqmodel|autoawq")])
def test_a_quantisation_without_its_package_names_it(folder: Path, method: str, package: str) -> None:
    configured(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 128, "zero_point": True})
    with pytest.raises(UserError, match=rf"No causal language model .*pip install ({package})"):
        LoRAPolicy(str(folder))


def test_an_attention_without_its_package_names_it(folder: Path) -> None:
    with pytest.raises(UserError, match=r"pip install flash-attn` or choose sdpa"):
        LoRAPolicy(str(folder), attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match="unexpected keyword argument 'colour'"):
        LoRAPolicy(str(folder), model_options={"colour": 1})


def test_memory_that_runs_out_is_no_bad_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(OutOfMemory, match="Memory ran out while a model was loaded"):
        load(folder)
