"""One training step against the same step written by hand in plain torch: loss, gradients, updates, to 1e-6 in fp32.

The hand-written step shares no code with the package but the model: its own padding, log-probabilities, normalisation,
loss, clipping, AdamW calls and meta-loss.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import maestro_pl
from callbacks.rollout import RolloutGenerator
from maestro_pl import Meta
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import make_policy, module_of, quiet_trainer

GROUP, STEPS = 4, 2
LEARNING_RATE, CONDUCTOR_RATE, KL, ENTROPY, MIX = 1e-2, 3e-2, 0.05, 1e-3, 0.5


class ScriptedReward(L.Callback):
    """A reward computed from the token ids, so that it needs no text."""

    def __init__(self, name: str, normalize: str, modulus: int) -> None:
        self.spec = RewardSpec(name, "train", normalize)
        self.modulus = modulus

    @property
    def state_key(self) -> str:
        return self.spec.name

    def values(self, rollout: Rollout) -> list[float | None]:
        scores = [float(sum(ids) % self.modulus) for ids in rollout.response_ids]
        if self.modulus == 5:
            scores[2] = None  # does not apply to one response
        return scores

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        rollout = batch["rollout"]
        rollout.rewards[self.spec.name] = RewardScores.from_list(self.spec, self.values(rollout))


class Recorder(L.Callback):
    """Keeps what the hand-written step needs: the rollouts and the drawn actions."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.losses: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rollouts.append(batch["rollout"])
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        policy = {n: p.grad.clone() for n, p in pl_module.policy.named_parameters() if p.grad is not None}
        weigher = {n: p.grad.clone() for n, p in pl_module.weigher.named_parameters() if p.grad is not None}
        self.gradients.append({**policy, **{f"weigher.{n}": g for n, g in weigher.items()}})


class Prompts(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        policy = self.trainer.lightning_module.policy
        texts = [["one", "a longer prompt"], ["three", "4"]]
        batches = [
            {
                "prompt": row,
                "prompt_text": row,
                "prompt_ids": [policy.encode(text) for text in row],
                "reference": [None, None],
                "task": ["t", "u"],
            }
            for row in texts
        ]
        return torch.utils.data.DataLoader(batches, batch_size=None)


def by_hand(
    policy: LoRAPolicy, conductor: Conductor, rollouts: list[Rollout], actions: list[torch.Tensor], kl_unbiased: bool
) -> Any:
    """Two GRPO steps and, after them, one Conductor update, in plain torch on the raw model."""
    model = policy.model
    theta = [p for p in model.parameters() if p.requires_grad]
    phi = list(conductor.parameters())
    adam = torch.optim.AdamW(theta, lr=LEARNING_RATE, weight_decay=0.0)
    meta_adam = torch.optim.AdamW(phi, lr=CONDUCTOR_RATE)
    losses, gradients, memory = [], [], []
    for rollout, action in zip(rollouts, actions, strict=True):
        columns, masks = [], []
        for scores in rollout.rewards.values():
            column = []
            for g in range(0, len(rollout), GROUP):
                members = [i for i in range(g, g + GROUP) if scores.mask_B[i]]
                raw = torch.stack([scores.values_B[i] for i in members])
                if scores.spec.normalize == "zscore":
                    normal = (raw - raw.mean()) / raw.std() if raw.std() > 0 else raw * 0
                else:
                    normal = (raw - raw.min()) / (raw.max() - raw.min()) if raw.max() > raw.min() else raw * 0 + 0.5
                by_row = dict(zip(members, normal, strict=True))
                column += [by_row.get(i, torch.tensor(0.0)) for i in range(g, g + GROUP)]
            columns.append(torch.stack(column))
            masks.append(scores.mask_B)
        rewards, mask = torch.stack(columns, 1), torch.stack(masks, 1)
        hidden = torch.stack(
            [last_hidden(model, rollout.prompt_ids[i // GROUP], rollout.response_ids[i]) for i in range(len(rollout))]
        )
        soft = distribution(conductor, hidden, mask)
        weights = (1 - MIX) * soft.detach() + MIX * torch.eye(rewards.shape[1])[action]
        scalar = (weights * rewards * mask).sum(1)
        grouped = scalar.view(-1, GROUP)
        advantages = ((grouped - grouped.mean(1, True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1)

        total = sum(len(ids) for ids in rollout.response_ids)
        loss = torch.zeros(())
        for i in range(len(rollout)):
            prompt, response = rollout.prompt_ids[i // GROUP], rollout.response_ids[i]
            logps = response_logps(model, prompt, response)
            with torch.no_grad(), model.disable_adapter():
                ref = response_logps(model, prompt, response)
            ratio = torch.exp(logps - logps.detach())
            kl = torch.exp(ref - logps) - (ref - logps) - 1
            kl = kl * ratio if kl_unbiased else kl
            loss = loss + (-ratio * advantages[i] + KL * kl).sum() / total
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theta, 0.5)
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
        adam.step()
        losses.append(float(loss.detach()))
        memory.append((hidden, mask, action, advantages))
    hidden, mask, action, advantages = (torch.cat(parts) for parts in zip(*memory, strict=True))
    soft = distribution(conductor, hidden, mask)
    chosen = soft[torch.arange(len(action)), action]
    entropy = -(soft * soft.clamp(min=1e-30).log()).sum(1).mean()
    meta = -(advantages * chosen.log()).mean() - ENTROPY * entropy
    meta_adam.zero_grad()
    meta.backward()
    gradients[-1].update({f"weigher.{n}": p.grad.clone() for n, p in conductor.named_parameters()})
    meta_adam.step()
    return losses, gradients


def response_logps(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]


def last_hidden(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0, -1]


def distribution(conductor: Conductor, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    normal = hidden / (hidden.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    linear = conductor.net[0]
    logits = (normal @ linear.weight.T + linear.bias) / conductor.log_tau.exp()
    exp = torch.exp(logits) * mask
    floored = (exp / exp.sum(1, keepdim=True)).clamp(min=1e-4) * mask
    return floored / floored.sum(1, keepdim=True)


@pytest.mark.parametrize("micro_batch_tokens", [10_000, 1])
@pytest.mark.parametrize("kind", ["tiny_qwen3", "tiny_llama"])
def test_two_steps_and_a_conductor_update(
    kind: str,
    micro_batch_tokens: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kl_unbiased = kind == "tiny_qwen3"  # each form of the term once
    folder = request.getfixturevalue(kind)
    policy = make_policy(folder, std=0.05, seed=1)
    conductor = Conductor(action="mix", mix_rate=MIX)
    conductor.build(policy.hidden_size, ["x", "y", "z"])
    torch.nn.init.normal_(conductor.net[0].weight, std=0.3)
    policy_copy, conductor_copy = deepcopy(policy), deepcopy(conductor)

    actions: list[torch.Tensor] = []
    draw = torch.multinomial
    monkeypatch.setattr(
        "maestro_pl.conductor.conductor.torch.multinomial", lambda *a, **k: actions.append(draw(*a, **k)) or actions[-1]
    )
    module = module_of(
        policy,
        weigher=conductor,
        meta=Meta(every=STEPS, optimizer=lambda p: torch.optim.AdamW(p, lr=CONDUCTOR_RATE)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=LEARNING_RATE, weight_decay=0.0),
        kl=maestro_pl.KL(coef=KL, unbiased=kl_unbiased),
        max_grad_norm=0.5,
        micro_batch_tokens=micro_batch_tokens,
    )
    recorder = Recorder()
    trainer = quiet_trainer(
        tmp_path,
        max_steps=STEPS,
        callbacks=[
            RolloutGenerator(group_size=GROUP, max_new_tokens=7, seed=3),
            ScriptedReward("x", "zscore", 7),
            ScriptedReward("y", "minmax", 11),
            ScriptedReward("z", "zscore", 5),
            recorder,
        ],
    )
    trainer.fit(module, Prompts())
    assert trainer.global_step == STEPS

    # generation calls multinomial too, once a token: the Conductor's draws are those with one row a response
    drawn = [a[:, 0] for a in actions if a.shape[0] == 2 * GROUP and a.shape[1] == 1]
    conductor_draws = [weights_action(r) for r in recorder.rollouts]
    assert all(any(torch.equal(d, c) for d in drawn) for c in conductor_draws)

    losses, gradients = by_hand(policy_copy, conductor_copy, recorder.rollouts, conductor_draws, kl_unbiased)
    assert recorder.losses == pytest.approx(losses, abs=1e-6)
    for step, (ours, theirs) in enumerate(zip(recorder.gradients, gradients, strict=True)):
        keys = set(theirs) if step == STEPS - 1 else {k for k in theirs if not k.startswith("weigher.")}
        assert keys <= set(ours)
        for name in keys:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in ((policy, policy_copy), (conductor, conductor_copy)):
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def weights_action(rollout: Rollout) -> torch.Tensor:
    """The drawn action, read off the weights: w - (1 - eta) pi has its only mass at a."""
    assert rollout.weights_BK is not None
    return (rollout.weights_BK - (1 - MIX) * rollout.probabilities_BK).argmax(1)
