"""Where TRL 1.16 and this package differ on purpose: one test for each difference, showing both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from callbacks.rollout import RolloutGenerator
from maestro_pl.algorithm.advantages import (
    batch_advantages,
    dead_groups,
    group_advantages,
    scalarise,
    standardize_rewards,
)
from maestro_pl.conductor.weighers import EqualWeights
from maestro_pl.generation import Sampling
from maestro_pl.policy.policy import LoRAPolicy
from tests.support import spread
from tests.trl.reference import Ids, Plan, furthest, make_policy, make_trainer, run_ours, run_trl, write_script

pytestmark = pytest.mark.slow

PAD = 258  # the pad token of conftest.py


def trl_logps(trainer: Any, prompts: list[Ids], responses: list[Ids]) -> list[Tensor]:
    """TRL's log-probabilities of each row of one padded batch, laid out as ``_generate_and_score_completions`` does."""
    left, right = max(map(len, prompts)), max(map(len, responses))
    pairs = list(zip(prompts, responses, strict=True))
    ids = torch.tensor([[PAD] * (left - len(p)) + p + r + [PAD] * (right - len(r)) for p, r in pairs])
    mask = torch.tensor([[0] * (left - len(p)) + [1] * len(p + r) + [0] * (right - len(r)) for p, r in pairs])
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, right)
    return [row[: len(response)] for row, response in zip(logps, responses, strict=True)]


def our_logps(policy: LoRAPolicy, prompts: list[Ids], responses: list[Ids]) -> list[Tensor]:
    with torch.no_grad():
        logps_T = policy.token_statistics(prompts, responses).logps_T
    return list(torch.split(logps_T, [len(r) for r in responses]))


def by_hand(model: nn.Module, prompt: Ids, response: Ids) -> Tensor:
    """One unpadded row through the plain model."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]


def test_position_ids_of_left_padded_rows(tiny_gpt2: Path, tmp_path: Path) -> None:
    """TRL hands GPT-2 no position ids, so a short prompt beside a long one is read at the wrong positions."""
    policy = make_policy(tiny_gpt2, "full").eval()
    with torch.no_grad():  # as decided about positions and next tokens as a model that was trained
        policy.model.transformer.wpe.weight.mul_(3.0)
        policy.model.transformer.ln_f.weight.mul_(3.0)
    trainer = make_trainer(policy, tiny_gpt2, tmp_path)
    short, long = [10, 20, 30], list(range(40, 70))
    response = [100, 110, 120, 130, 140]
    truth = by_hand(policy.model, short, response)
    alone, beside = (trl_logps(trainer, prompts, [response] * len(prompts))[0] for prompts in ([short], [short, long]))
    torch.testing.assert_close(alone, truth, atol=1e-5, rtol=0)
    assert float((beside - truth).abs().max()) > 1.0
    for prompts in ([short], [short, long]):
        mine = our_logps(policy, prompts, [response] * len(prompts))[0]
        torch.testing.assert_close(mine, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_rotary_models_need_no_position_ids(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Rotary positions are relative: there TRL's padded rows are right, and equal to ours."""
    folder = request.getfixturevalue(f"tiny_{kind}")
    policy = make_policy(folder, "full").eval()
    trainer = make_trainer(policy, folder, tmp_path)
    prompts, responses = [[10, 20, 30], list(range(40, 70))], [[100, 110, 120], [130, 140]]
    mine, expected = our_logps(policy, prompts, responses), trl_logps(trainer, prompts, responses)
    for row in range(2):
        torch.testing.assert_close(mine[row], by_hand(policy.model, prompts[row], responses[row]), atol=1e-5, rtol=0)
        torch.testing.assert_close(mine[row], expected[row], atol=1e-5, rtol=0)


def watch_dropout(model: nn.Module) -> list[bool]:
    """Notes at every pass through a LoRA dropout whether it was live."""
    live: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_pre_hook(lambda module, _: live.append(module.training))
    return live


def test_dropout_is_off_while_sampling(tiny_qwen3: Path, tmp_path: Path) -> None:
    """TRL generates from the model in train mode; our rollout is in eval mode and puts the mode back."""
    policy = spread(make_policy(tiny_qwen3, "lora", dropout=0.9), 1.0)  # adapters that matter
    greedy = {"do_sample": False}
    trainer = make_trainer(policy, tiny_qwen3, tmp_path, max_completion_length=6, generation_kwargs=greedy)
    prompt, rows, expected = list(range(65, 75)), 4, []
    policy.eval()
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(policy.model(torch.tensor([prompt + expected])).logits[0, -1].argmax()))
    assert 257 not in expected

    live = watch_dropout(trainer.model)
    theirs, _ = trainer._generate_single_turn([prompt] * rows, None, {}, rows)
    assert live
    assert all(live)
    assert len({tuple(ids) for ids in theirs}) > 1  # greedy decoding of one prompt: each row has its own dropout
    assert all(ids != expected for ids in theirs)

    policy.train()
    live = watch_dropout(policy.model)
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    mine = RolloutGenerator().engine.generate(policy, [prompt], rows, sampling).response_ids
    assert not any(live)
    assert mine == [expected] * rows
    assert policy.training
    assert all(module.training for module in policy.modules())


@pytest.mark.parametrize(("value", "group_size"), [(0.1, 7), (0.1 + 0.7, 8), (0.9, 3), (3.3, 16)])
def test_single_valued_groups_teach_nothing(value: float, group_size: int, tiny_qwen3: Path, tmp_path: Path) -> None:
    """A mean of equal numbers is off by rounding, which TRL divides by a standard deviation of next to nothing."""
    rows = 2 * group_size
    values = [value] * group_size + [float(row % 3) for row in range(group_size)]
    trainer = make_trainer(
        make_policy(tiny_qwen3, "lora"),
        tiny_qwen3,
        tmp_path,
        rewards=[lambda completions, **_: values],
        rollout=lambda prompts, _: {"prompt_ids": [[1]] * rows, "completion_ids": [[2]] * rows, "logprobs": None},
        num_generations=group_size,
        per_device_train_batch_size=rows,
    )
    rewards_BK = torch.tensor(values).unsqueeze(1)
    mask_BK = torch.ones_like(rewards_BK, dtype=torch.bool)
    inputs = [{"prompt": str(row // group_size)} for row in range(rows)]

    theirs = trainer._generate_and_score_completions(inputs)["advantages"]
    assert 1e-5 < float(theirs[:group_size].abs().max()) < 1e-2
    mine = group_advantages(scalarise(rewards_BK, torch.ones_like(rewards_BK), mask_BK), group_size)
    assert mine[:group_size].tolist() == [0.0] * group_size
    assert dead_groups(mine, group_size).tolist() == [True, False]
    torch.testing.assert_close(mine[group_size:], theirs[group_size:], atol=1e-6, rtol=1e-6)

    trainer.multi_objective_aggregation = "normalize_then_sum"
    theirs = trainer._generate_and_score_completions(inputs)["advantages"]
    mine = batch_advantages(standardize_rewards(rewards_BK, mask_BK, group_size)[:, 0], group_size)
    assert float(theirs[:group_size].abs().max()) > 1e-5
    assert mine[:group_size].tolist() == [0.0] * group_size


def test_a_rollout_without_signal_moves_nothing(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In TRL the rounding above is a gradient, which AdamW scales up to steps of the learning rate."""
    monkeypatch.setattr("tests.trl.reference.score", lambda ids, name: 0.7)
    monkeypatch.setattr("tests.trl.reference.ADAM_EPS", 1e-8)
    policy, start = make_policy(tiny_qwen3, "lora"), make_policy(tiny_qwen3, "lora")
    script = write_script(policy, group=7)
    weights = run_ours(Plan("adamw_torch"), policy, script, EqualWeights(), tmp_path)
    model = run_trl(Plan("adamw_torch"), start, script, weights, tiny_qwen3, tmp_path)
    assert weights.skipped == 2
    assert furthest(policy, start.model) == 0.0
    assert furthest(start, model) > 1e-3


def favour(model: Any, token: int) -> None:
    """Make a model say one token and no other."""

    def add(_module: nn.Module, _inputs: Any, logits: Tensor) -> Tensor:
        return logits + 100.0 * nn.functional.one_hot(torch.tensor(token), logits.shape[-1])

    model.get_output_embeddings().register_forward_hook(add)


def test_a_pad_token_at_the_limit_is_truncated(tiny_qwen3: Path, tmp_path: Path) -> None:
    """TRL tells a finished completion by its last token, the pad token included; ours by why decoding stopped."""
    policy = make_policy(tiny_qwen3, "lora").eval()
    trainer = make_trainer(
        policy, tiny_qwen3, tmp_path, max_completion_length=5, mask_truncated_completions=True, num_generations=4
    )
    favour(trainer.model, PAD)
    favour(policy.base_model, PAD)
    output = trainer._generate_and_score_completions([{"prompt": "ab"}] * 4)
    assert output["completion_ids"].tolist() == [[PAD] * 5] * 4
    assert output["completion_mask"].tolist() == [[1] * 5] * 4  # takes part in the loss all the same
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.0]

    generation = RolloutGenerator().engine.generate(policy, [[97, 98]], 4, Sampling(max_new_tokens=5))
    assert generation.response_ids == [[PAD] * 5] * 4
    assert generation.finish_reasons == ["length"] * 4


@pytest.mark.parametrize("pad", [257, 258])
def test_pad_tokens_inside_a_row_are_tokens(pad: int, tiny_qwen3: Path, tmp_path: Path) -> None:
    """Masks come from lengths on both sides: TRL 1.16 too counts a pad token that was sampled, or is the end token."""
    policy = make_policy(tiny_qwen3, "lora").eval()
    policy.tokenizer.pad_token_id = pad
    trainer = make_trainer(policy, tiny_qwen3, tmp_path)
    trainer._tokenizer.pad_token_id = pad
    prompts = [[10, pad, 30], list(range(40, 70)), [pad, pad]]
    responses = [[100, pad, 120, pad], [130, 140, 150, 160, 257], [257]]
    trainer.rollout_func = lambda *_: {"prompt_ids": prompts, "completion_ids": responses, "logprobs": None}
    trainer.num_generations = 3
    output = trainer._generate_and_score_completions([{"prompt": "a"}] * 3)
    assert output["prompt_mask"].sum(1).tolist() == [3, 30, 2]
    assert output["completion_mask"].sum(1).tolist() == [4, 5, 1]
    mine, expected = our_logps(policy, prompts, responses), trl_logps(trainer, prompts, responses)
    for row in range(3):
        truth = by_hand(policy.model, prompts[row], responses[row])
        torch.testing.assert_close(mine[row], truth, atol=1e-5, rtol=0)
        torch.testing.assert_close(expected[row], truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("plan", [{"loss_type": "bnpo"}, {"top_entropy": 0.4}], ids=["bnpo", "top_entropy"])
def test_micro_batches_do_not_change_the_step(plan: dict[str, Any], tiny_qwen3: Path, tmp_path: Path) -> None:
    """TRL takes bnpo's mean and the entropy threshold over each micro-batch; here they are those of the whole rollout."""
    mine, theirs = [], []
    start = make_policy(tiny_qwen3, "lora")
    script = write_script(start)
    for micro_batches in (1, 2):
        policy = make_policy(tiny_qwen3, "lora")
        weights = run_ours(Plan(**plan, micro_batches=micro_batches), policy, script, EqualWeights(), tmp_path)
        mine.append(policy)
        theirs.append(run_trl(Plan(**plan, micro_batches=micro_batches), start, script, weights, tiny_qwen3, tmp_path))
    assert furthest(mine[0], start.model) > 1e-4
    assert furthest(mine[0], mine[1].model) <= 1e-6
    assert furthest(mine[0], theirs[0]) <= 1e-6
    assert furthest(mine[0], theirs[1]) > 1e-5


def test_uncertain_tokens_are_those_of_the_rollout(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL chooses the tokens anew in every update, by the policy as it is by then; here they stay those of sampling."""
    from trl import GRPOTrainer

    plan = Plan(top_entropy=0.4, updates=2)
    policy, start = make_policy(tiny_qwen3, "lora"), make_policy(tiny_qwen3, "lora")
    script = write_script(policy)
    weights = run_ours(plan, policy, script, EqualWeights(), tmp_path)
    assert furthest(policy, run_trl(plan, start, script, weights, tiny_qwen3, tmp_path)) > 1e-5

    choose, chosen = GRPOTrainer.get_high_entropy_mask, []

    def keep(self: Any, *args: Any) -> Tensor:
        """The mask of the first update, for the second too."""
        chosen.append(choose(self, *args) if len(chosen) % 2 == 0 else chosen[-1])
        return chosen[-1]

    monkeypatch.setattr(GRPOTrainer, "get_high_entropy_mask", keep)
    assert furthest(policy, run_trl(plan, start, script, weights, tiny_qwen3, tmp_path)) <= 1e-6
    assert len(chosen) == 4


def test_first_ratio_is_one_under_dropout(tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several updates TRL takes the old log-probabilities from a pass of their own, with another dropout."""
    from trl import GRPOTrainer

    from maestro_pl.training import update

    plan = Plan(updates=2)
    policy = make_policy(tiny_qwen3, "lora", dropout=0.5)
    script = write_script(policy)
    mine, theirs = [], []
    loss, compute = update.grpo_loss, GRPOTrainer._compute_loss

    def our_loss(batch: Any, *settings: Any) -> Any:
        mine.append(float((batch.logps_T - batch.old_logps_T).abs().max()))
        return loss(batch, *settings)

    def trl_loss(self: Any, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width = inputs["completion_ids"].shape[1]
        state = torch.get_rng_state()
        with torch.no_grad():  # what _compute_loss sees: the same parameters, mode and random numbers
            logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, mask, width)
        torch.set_rng_state(state)
        theirs.append(float((logps - inputs["old_per_token_logps"]).abs().max()))
        return compute(self, model, inputs)

    monkeypatch.setattr(update, "grpo_loss", our_loss)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", trl_loss)
    start = make_policy(tiny_qwen3, "lora", dropout=0.5)
    weights = run_ours(plan, policy, script, EqualWeights(), tmp_path)
    run_trl(plan, start, script, weights, tiny_qwen3, tmp_path)
    assert len(mine) == len(theirs) == 4
    assert mine[0] == mine[2] == 0.0
    assert min(mine[1], mine[3]) > 0.0
    assert min(theirs) > 0.01
