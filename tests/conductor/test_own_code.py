"""Weighers, signals and learners of a user's own that go wrong: a sentence with the place, and nothing in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.rewards import FunctionReward
from maestro_pl import Meta
from maestro_pl.algorithm.simplex import on_simplex
from maestro_pl.conductor import AnchorSignal, Credit, GradientLearner, MetaSignal, RidgeLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.learners import Learner
from maestro_pl.conductor.signals import CombinedSignal
from maestro_pl.conductor.weighers import Weigher, Weighing
from maestro_pl.errors import UserError
from tests.support import rewards, sevens, watched_fit


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"word {i}", "split": "train"}) + "\n" for i in range(8)))
    return path


class Own(Weigher):
    """Weights as a function of the rewards and their mask."""

    def __init__(self, weigh: Any) -> None:
        super().__init__()
        self.weigh = weigh

    def forward(self, h_BD: Any, rewards_BK: torch.Tensor, mask_BK: torch.Tensor, sample: bool) -> Any:
        return self.weigh(rewards_BK, mask_BK)


def both(weights_BK: torch.Tensor) -> Weighing:
    return Weighing(weights_BK, weights_BK)


def fails(rewards_BK: torch.Tensor, mask_BK: torch.Tensor) -> Any:
    raise ZeroDivisionError("by hand")


class Bare(Weigher):
    pass


class Narrow(Weigher):
    def forward(self, rewards: Any) -> Any:  # type: ignore[override]
        return rewards


class Prepares(Own):
    def prepare(self, scored: Any) -> None:
        raise KeyError("scored")


class Observes(Own):
    def observe(self, seen: Any) -> Any:
        return 3


def equal(rewards_BK: torch.Tensor, mask_BK: torch.Tensor) -> Weighing:
    return both(on_simplex(torch.ones_like(rewards_BK), mask_BK))


@pytest.mark.parametrize(
    ("weigher", "sentence"),
    [
        (Own(lambda r, m: both(m.float() * torch.nan)), r"weights_BK gave response 0 the weights \[nan, nan\]"),
        (Own(lambda r, m: both(m.float() * 3)), r"the weights \[3, 3\] .* that add up to 1 over the rewards that apply"),
        (Own(lambda r, m: both(torch.tensor([[1.2, -0.2]]).expand_as(r))), r"the weights \[1.2, -0.2\] .* at least 0"),
        (Own(lambda r, m: Weighing(equal(r, m)[0], r * 0)), r"probabilities_BK gave response 0 the weights \[-?0, -?0\]"),
        (Own(lambda r, m: equal(r, m).weights_BK), "`forward` returned a Tensor. It is called as forward.h_BD, rewards_BK"),
        (Own(lambda r, m: both(torch.tensor([0.5, 0.5]))), r"weights_BK is the shape \[2\], expected .* shape \[8, 2\]"),
        (Own(lambda r, m: both([0.5, 0.5])), "weights_BK is a list, expected a tensor"),  # type: ignore[arg-type]
        (Own(fails), r"`forward` failed at .*test_own_code.py:\d+: ZeroDivisionError: by hand. It is called as forward"),
        (Narrow(), "`forward` failed at .* takes 2 positional arguments but 5 were given"),
        (Bare(), "has no `forward` of its own: give it forward"),
        (Prepares(equal), r"`prepare` failed at .*test_own_code.py:\d+: KeyError: 'scored'"),
        (Observes(equal), "`observe` failed at .* is not iterable. It is called as observe.seen., which returns a dictionary"),
    ],
)  # fmt: skip
def test_a_weigher_of_ones_own(weigher: Any, sentence: str, tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^model.weigher={type(weigher).__name__}.*{sentence}"):
        watched_fit(tmp_path, tiny_qwen3, prompts, rewards(), steps=1, weigher=weigher)


def test_weights_where_nothing_applies_are_none(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    _, watch = watched_fit(tmp_path, tiny_qwen3, prompts, rewards(), weigher=Own(equal))
    assert len(watch.rollouts) == 3
    seen: list[torch.Tensor] = []

    def some(rewards_BK: torch.Tensor, mask_BK: torch.Tensor) -> Weighing:
        seen.append(mask_BK)
        return equal(rewards_BK, mask_BK)

    chain = rewards()
    for reward in chain:
        reward.function = lambda completion, **_: None if sum(map(ord, completion)) % 2 else 1.0
    watched_fit(tmp_path, tiny_qwen3, prompts, chain, weigher=Own(some))
    assert not all(bool(mask_BK.any(1).all()) for mask_BK in seen)


class Says(MetaSignal):
    """A credit as a function of what is seen."""

    gives_values = True

    def __init__(self, say: Any) -> None:
        super().__init__()
        self.say = say

    def observe(self, seen: Any) -> Any:
        return self.say(seen)


@pytest.mark.parametrize(
    ("say", "sentence"),
    [
        (lambda seen: None, "`observe` returned a NoneType. It is called as observe.seen., which returns a maestro_pl"),
        (lambda seen: Credit(seen.z_BK[:, :1], seen.z_BK[:, 0]), r"credit_BK is the shape \[8, 1\], expected .*\[8, 2\]"),
        (lambda seen: Credit(seen.z_BK, seen.z_BK), r"value_B is the shape \[8, 2\], expected .*\[8\]"),
        (lambda seen: Credit(seen.z_BK), "says gives_values = True, and its Credit has no value_B"),
        (lambda seen: seen.nothing, r"`observe` failed at .*test_own_code.py:\d+: AttributeError"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("combined", [False, True])
def test_a_signal_of_ones_own(
    say: Any, sentence: str, combined: bool, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    signal = CombinedSignal([Says(say), Says(say)]) if combined else Says(say)
    with pytest.raises(UserError, match=f"^model.meta.signal=Says.*{sentence}"):
        watched_fit(
            tmp_path, tiny_qwen3, prompts, rewards(), weigher=Conductor(action="soft"),
            meta=Meta(signal, GradientLearner(), every=1),
        )  # fmt: skip


@pytest.mark.parametrize("learner", [GradientLearner(), RidgeLearner(target="covariance")])
def test_a_signal_that_says_nothing_is_named_at_the_end(
    learner: Any, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    silent = Says(lambda seen: Credit(seen.z_BK * torch.nan, seen.z_BK[:, 0] * torch.nan))
    with pytest.warns(UserWarning, match="The Conductor has not learned anything in 3 batches: .*signal=Says gave no"):
        module, _ = watched_fit(
            tmp_path,
            tiny_qwen3,
            prompts,
            rewards(),
            weigher=Conductor(action="soft"),
            meta=Meta(silent, learner, every=1),
        )
    assert module.outer.updates == 0


class Loses(GradientLearner):
    def loss(self, *args: Any, **kwargs: Any) -> Any:
        return None


@pytest.mark.parametrize(
    ("learner", "sentence"),
    [
        (
            type("Idle", (Learner,), {"__module__": "mine"})(),
            "Idle has no `learn` of its own: give it learn.conductor, signal",
        ),
        (Loses(), "Loses: `learn` failed at .* cannot unpack non-iterable NoneType"),
    ],
)
def test_a_learner_of_ones_own(learner: Any, sentence: str, tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    say = Says(lambda seen: Credit(seen.z_BK, seen.z_BK[:, 0]))
    with pytest.raises(UserError, match=f"^model.meta.learner={sentence}"):
        watched_fit(
            tmp_path, tiny_qwen3, prompts, rewards(), weigher=Conductor(action="soft"), meta=Meta(say, learner, every=1)
        )


def test_errors_of_the_projects_own_classes_pass_through(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, seen: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(AnchorSignal, "observe", broken)
    with pytest.raises(RuntimeError, match=r"^a fault of ours$"):
        watched_fit(
            tmp_path, tiny_qwen3, prompts, rewards(FunctionReward(sevens, name="anchor", role="anchor")),
            weigher=Conductor(action="soft"), meta=Meta(AnchorSignal(), GradientLearner(), every=1),
        )  # fmt: skip
