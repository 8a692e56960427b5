"""SFT: the loss and the step against plain torch, and whole runs from the command line."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from maestro_pl.cli import main
from maestro_pl.cli.arguments import method_of
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import UserError
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.sft import SFTModule
from tests.support import make_policy, quiet_trainer, write_rows

ROWS = [
    {"prompt": "two and two", "reference": "four"},
    {"prompt": "say hello to me", "reference": "hello, you"},
    {"prompt": "silence", "reference": None},
    {"prompt": "one", "reference": "1"},
]


@pytest.fixture
def data(tmp_path: Path) -> PromptDataModule:
    return PromptDataModule(sources=write_rows(tmp_path / "rows.jsonl", *ROWS), batch_size=4, show=False)


def fit(module: SFTModule, data: PromptDataModule, tmp_path: Path, steps: int = 1) -> L.Trainer:
    trainer = quiet_trainer(tmp_path, max_steps=steps, max_epochs=-1)
    trainer.fit(module, data)
    return trainer


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 1])
def test_a_step_is_adamw_on_the_mean_likelihood_of_the_targets(
    tiny_qwen3: Path, tmp_path: Path, data: PromptDataModule, micro_batch_tokens: int
) -> None:
    policy = make_policy(tiny_qwen3, std=0.05, seed=1)
    before = deepcopy(policy)
    module = SFTModule(
        policy,
        target="So: {reference}",
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
        max_grad_norm=0.5,
        micro_batch_tokens=micro_batch_tokens,
    )
    trainer = fit(module, data, tmp_path)
    model, tokenizer = before.model, before.tokenizer
    total, tokens = torch.zeros(()), 0
    for row in ROWS:
        if row["reference"] is None:
            continue
        message = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        target = [*tokenizer(f"So: {row['reference']}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        total = total - logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].sum()
        tokens += len(target)
    loss = total / tokens
    loss.backward()
    theirs = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0).step()
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(trainer.callback_metrics["sft/without_reference"]) == 1
    for ours, expected in zip(policy.trained_parameters(), theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_it_learns_its_references(tmp_path: Path, data: PromptDataModule) -> None:
    module = SFTModule(LoRAPolicy(dtype="float32"), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    first = float(fit(deepcopy(module), data, tmp_path).callback_metrics["train/loss"])
    last = float(fit(module, data, tmp_path, steps=25).callback_metrics["train/loss"])
    assert last < 0.5 * first


def test_targets_end_a_turn_and_not_a_document(tiny_qwen3: Path) -> None:
    module = SFTModule(make_policy(tiny_qwen3, std=0.05, seed=1), target="{reference}")
    module.policy.eos_token_ids = [7, 257]  # as Qwen's: the end of a text stands before the end of a turn
    assert module.policy.tokenizer.eos_token_id == 257
    _, targets = module.examples({"prompt_ids": [[1]], "reference": ["ab"]})
    assert targets == [[*module.policy.encode("ab"), 257]]


def test_no_reference_is_kept_of_a_fully_trained_model(tiny_qwen3: Path) -> None:
    policy = LoRAPolicy(str(tiny_qwen3), dtype="float32", lora=None)
    SFTModule(policy)
    assert policy.reference_model is None
    with pytest.raises(UserError, match="keeps no reference"):
        policy.token_statistics([[1, 2]], [[3]], which="reference")


def test_a_batch_without_references_moves_nothing(tiny_qwen3: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p {i}", "reference": None}) + "\n" for i in range(4)))
    module = SFTModule(make_policy(tiny_qwen3, std=0.05, seed=1))
    before = [p.clone() for p in module.policy.trained_parameters()]
    fit(module, PromptDataModule(sources=str(path), batch_size=4, show=False), tmp_path)
    assert (module.policy_steps, module.skipped_steps) == (1, 1)
    for ours, then in zip(module.policy.trained_parameters(), before, strict=True):
        torch.testing.assert_close(ours, then, atol=0, rtol=0)


def test_what_it_refuses(tiny_qwen3: Path) -> None:
    policy = make_policy(tiny_qwen3, std=0.05, seed=1)
    with pytest.raises(UserError, match="where the reference goes"):
        SFTModule(policy, target="no slot")
    batch = {"prompt_ids": [[1, 2]], "reference": [["a", "b"]]}
    with pytest.raises(UserError, match="name a column of texts"):
        SFTModule(policy).examples(batch)
    with pytest.raises(UserError, match="no such column"):
        SFTModule(policy, column="gold").examples(batch)


@pytest.fixture
def config(tmp_path: Path, tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    rows = [{"prompt": f"Say {i}", "reference": str(i)} for i in range(20)]
    write_rows(tmp_path / "rows.jsonl", *rows)
    monkeypatch.chdir(tmp_path)
    return {
        "method": "sft",
        "model": {"policy": {"model": str(tiny_qwen3), "dtype": "float32"}},
        "data": {"sources": "rows.jsonl", "fractions": [0.6, 0.2, 0.2], "batch_size": 2, "show": False},
        "rollout": {"eval_group_size": 1, "max_new_tokens": 4},
        "rewards": [{"class_path": "callbacks.ExactMatchReward", "init_args": {"role": "metric"}}],
        "trainer": {"max_steps": 3, "val_check_interval": 3, "accelerator": "cpu"},
    }


@pytest.mark.slow
def test_fit_resume_and_test_from_the_command_line(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "sft.yaml"])
    last = Path("runs/sft/version_0/checkpoints/last.ckpt")
    saved = torch.load(last, weights_only=True)
    assert saved["maestro"]["policy_steps"] == 3
    assert all("lora" in name for name in saved["state_dict"])
    main(["fit", "--config", "sft.yaml", "--ckpt_path", str(last), "--trainer.max_steps", "5"])
    again = torch.load("runs/sft/version_1/checkpoints/last.ckpt", weights_only=True)
    assert again["maestro"]["policy_steps"] == 5
    main(["test", "--ckpt_path", str(last)])  # the method is that of the run's config
    table = Path("runs/config/version_0/test_metrics.csv")
    table = table if table.exists() else next(Path("runs").rglob("test_metrics.csv"))
    assert "reward/exact_match" in table.read_text()


def test_a_checkpoint_of_the_other_method_is_refused(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "sft.yaml", "--trainer.max_steps", "1"])
    capsys.readouterr()
    grpo = {**config, "method": "grpo", "rewards": ["callbacks.LengthReward"]}
    grpo["model"] = {**config["model"], "weigher": "maestro_pl.EqualWeights"}
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(grpo))
    with pytest.raises(SystemExit) as stopped:
        main(["test", "--config", "grpo.yaml", "--ckpt_path", "runs/sft/version_0/checkpoints/last.ckpt"])
    assert stopped.value.code == 2
    assert "is one of SFTModule, this run trains a MaestroModule" in capsys.readouterr().err


def test_the_method_comes_from_the_arguments_or_the_last_config(tmp_path: Path) -> None:
    first, second, plain = (str(tmp_path / name) for name in ("a.yaml", "b.yaml", "c.yaml"))
    Path(first).write_text("method: sft\n")
    Path(second).write_text("method: grpo\n")
    Path(plain).write_text("trainer: {max_steps: 1}\n")
    assert method_of(["fit"]) == "grpo"
    assert method_of(["fit", "--config", first, "--config", plain]) == "sft"
    assert method_of(["fit", "--config", first, "--config", second]) == "grpo"
    assert method_of(["fit", "--config", second, "--method=sft"]) == "sft"
    with pytest.raises(UserError, match="'ppo'"):
        method_of(["fit", "--method", "ppo"])


def test_keys_of_the_other_method_are_named(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["model"]["kl"] = {"coef": 0.1}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "sft.yaml"])
    assert stopped.value.code == 2
    assert "kl" in capsys.readouterr().err
