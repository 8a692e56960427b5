"""Runs that vLLM samples for, with the tiny model in its place: what is logged, corrected, recorded and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.records import records
from callbacks.rollout import RolloutGenerator
from maestro_pl import Loss, UserError, VLLMEngine
from maestro_pl.generation import Engine, Generation, NativeEngine
from maestro_pl.rollout import Rollout
from maestro_pl.run.joining import joined
from tests.support import data_of, fake_vllm, module_of, rewards, trainer_of
from tests.support.fake_vllm import FakeVLLM

ENGINE_KEYS = {"engine/kl", "engine/ratio_max", "engine/masked", "engine/adapter", "engine/difference"}


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "task": "ab"[i % 2]}) + "\n" for i in range(10)))
    return path


class Seen(L.Callback):
    """The rollouts, and what was logged."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.rollouts: list[Rollout] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rollouts.append(batch["rollout"])
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trained(folder: Path, prompts: Path, steps: int, tiny: Path, engine: Any, **options: Any) -> tuple[Any, Any, Seen]:
    seen, resumed = Seen(), options.pop("ckpt_path", None)
    module = module_of(tiny, **options)
    trainer = trainer_of(folder, [*rewards(), seen], max_steps=steps, limit_val_batches=0, engine=engine)
    trainer.fit(module, data_of(prompts), ckpt_path=resumed)
    return trainer, module, seen


def parameters(module: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.policy.trained_parameters()]


def test_a_run_logs_corrects_records_and_resumes(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, vllm: FakeVLLM
) -> None:
    def engine() -> VLLMEngine:
        return VLLMEngine(max_difference=2.0)

    vllm.shift = -1.0  # every ratio is e
    loss = Loss(mismatch="token_truncate", mismatch_cap=2.0)
    _, module, seen = trained(tmp_path, prompts, 2, tiny_qwen3, engine(), loss=loss)
    for number, (rollout, logged) in enumerate(zip(seen.rollouts, seen.logged, strict=True), start=1):
        assert logged.keys() >= ENGINE_KEYS
        assert logged["engine/ratio_max"] == pytest.approx(2.71828, rel=1e-3)
        assert logged["engine/masked"] == 1.0
        assert logged["engine/kl"] == pytest.approx(2.71828 - 2, rel=1e-3)
        assert logged["engine/adapter"] == number
        assert rollout.sampling_logps_T is not None
        torch.testing.assert_close(rollout.sampling_logps_T, rollout.logps_T - 1.0, atol=1e-4, rtol=0)  # type: ignore[operator]
        assert rollout.entropies_T is not None
        assert rollout.hidden_BD is not None  # the scoring pass fills in the rest
        assert {row["adapter"] for row in records(rollout)} == {number}
    assert vllm.llms[-1].calls == ["shutdown"]  # the run lets go of it

    first, _, _ = trained(tmp_path, prompts, 1, tiny_qwen3, engine(), loss=loss)
    first.save_checkpoint(tmp_path / "one.ckpt")
    _, again, later = trained(tmp_path, prompts, 2, tiny_qwen3, engine(), loss=loss, ckpt_path=tmp_path / "one.ckpt")
    assert later.rollouts[-1].response_ids == seen.rollouts[-1].response_ids
    assert all(map(torch.equal, parameters(module), parameters(again)))


class Masked(Engine):
    """The native engine, and ratios above every cap for the first half of the responses."""

    def generate(self, *asked: Any, **options: Any) -> Generation:
        made = NativeEngine().generate(*asked, **options)
        assert made.logps_T is not None
        ratio = torch.ones(len(made.response_ids))
        ratio[: len(ratio) // 2] = 50.0
        lengths = torch.tensor([len(ids) for ids in made.response_ids])
        made.sampling_logps_T = made.logps_T - ratio.log().repeat_interleave(lengths)
        return made


def test_masked_tokens_have_no_gradient_and_engines_without_numbers_change_no_bit(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    plain = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "max_grad_norm": 0.0}
    runs: dict[str, list[torch.Tensor]] = {}
    seen: dict[str, Seen] = {}
    for name, engine, kind in (
        ("native", "native", "none"),
        ("native, masked", "native", "token_mask"),
        ("measured", Masked(), "none"),
        ("masked", Masked(), "token_mask"),
    ):
        _, module, seen[name] = trained(tmp_path, prompts, 1, tiny_qwen3, engine, loss=Loss(mismatch=kind), **plain)  # type: ignore[arg-type]
        runs[name] = parameters(module)
    assert all(map(torch.equal, runs["native"], runs["native, masked"]))
    assert all(map(torch.equal, runs["native"], runs["measured"]))
    assert not all(map(torch.equal, runs["native"], runs["masked"]))
    assert not any(key.startswith("engine/") for key in seen["native, masked"].logged[0])
    assert 0 < seen["masked"].logged[0]["engine/masked"] < 1
    assert seen["measured"].logged[0]["engine/ratio_max"] == pytest.approx(50.0, rel=1e-3)


@pytest.mark.parametrize(
    ("logps", "message"),
    [
        (torch.zeros(3), r"sampling_logps_T of the shape \[3\] for \d+ response tokens"),
        (torch.nan, "gave log-probabilities that are no numbers"),
    ],
)
def test_numbers_that_cannot_be_right_are_refused(
    logps: Any, message: str, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    class Wrong(Engine):
        def generate(self, policy: Any, prompt_ids: Any, n: int, *rest: Any, **options: Any) -> Generation:
            ids = [[65, 66]] * (len(prompt_ids) * n)
            told = logps if isinstance(logps, torch.Tensor) else torch.full((2 * len(ids),), logps)
            return Generation(ids, ["length"] * len(ids), sampling_logps_T=told)

    with pytest.raises(UserError, match=message):
        trained(tmp_path, prompts, 1, tiny_qwen3, Wrong())


def test_what_does_not_fit_is_refused_before_the_first_batch(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, vllm: FakeVLLM
) -> None:
    with pytest.raises(UserError, match=r"model\.policy\.lora is null"):
        trained(tmp_path, prompts, 1, tiny_qwen3, VLLMEngine(), lora=None)
    assert not vllm.made
    assert RolloutGenerator(engine=VLLMEngine()).engine is not None


def test_rollouts_of_ranks_are_joined_with_what_engines_saw() -> None:
    def part(row: int) -> Rollout:
        return Rollout(
            ["p"], ["p"], [[1]], [[2, 3], [4]], ["a", "b"], ["stop", "stop"], 2, {"task": ["t"], "reference": [None]},
            sampling_logps_T=torch.tensor([row + 0.1, row + 0.2, row + 0.3]), engine={"adapter": 4.0},
        )  # fmt: skip

    both = joined([part(1), part(2)])
    torch.testing.assert_close(both.sampling_logps_T, torch.tensor([1.1, 1.2, 1.3, 2.1, 2.2, 2.3]))
    assert both.engine == {"adapter": 4.0}
