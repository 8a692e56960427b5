"""Weighers, signals and learners of a user's own that go wrong: a sentence with the place, and nothing in silence."""

from __future__ import annotations

import json
import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.rewards import FunctionReward, Reward
from maestro_pl import AdvantageSignal, Meta
from maestro_pl.algorithm.simplex import on_simplex
from maestro_pl.conductor import AnchorSignal, Credit, GradientLearner, MetaSignal, RidgeLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.learners import Learner
from maestro_pl.conductor.signals import CombinedSignal
from maestro_pl.conductor.weighers import Weigher, Weighing
from maestro_pl.errors import UserError
from maestro_pl.training.checkpointing import read_plain
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
        (Own(lambda r, m: equal(r, m).weights_BK), r"`forward` returned a tensor of the shape \[8, 2\]\. It is called as"),
        (Own(lambda r, m: both(torch.tensor([0.5, 0.5]))), r"weights_BK is the shape \[2\], expected .* shape \[8, 2\]"),
        (Own(lambda r, m: both([0.5, 0.5])), "weights_BK is a list, expected a tensor"),  # type: ignore[arg-type]
        (Own(fails), r"`forward` failed at .*test_own_code.py:\d+: ZeroDivisionError: by hand. It is called as forward"),
        (Narrow(), "`forward` failed at .* takes 2 positional arguments but 5 were given"),
        (Bare(), "has no `forward` of its own: give it forward"),
        (Prepares(equal), r"`prepare` failed at .*test_own_code.py:\d+: KeyError: 'scored'"),
        (Observes(equal), "`observe` returned 3. It is called as observe.seen., which returns a dictionary of numbers"),
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


class Changed(Weigher):
    """Equal weights, and attributes and methods as they are given."""

    def forward(self, h_BD: Any, rewards_BK: torch.Tensor, mask_BK: torch.Tensor, sample: bool) -> Any:
        return equal(rewards_BK, mask_BK)


def changed(base: type, **own: Any) -> Any:
    """Of a class of a user's own, derived from one of the project's."""
    return type("Mine", (base,), {"__module__": "mine", **own})()


def raises(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("by hand")


FAILED = rf"failed at {re.escape(__file__)}:\d+: KeyError: 'by hand'\. It"
PLAIN = "which alone a checkpoint can hold: numbers, strings, and lists or dictionaries of them"
NO_INIT = {"__init__": lambda self: None}


def exactly(option: str, sentence: str) -> str:
    return f"^{re.escape(option)}=Mine: {sentence} \\(docs/extending.md\\)\\.$"


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"gain": torch.ones(8)}, r"`gain` is a tensor of the shape \[8\], expected one finite number"),
        ({"gain": float("nan")}, "`gain` is nan, expected one finite number"),
        ({"gain": torch.tensor(torch.inf)}, "`gain` is inf, expected one finite number"),
        ({"gain": "2"}, "`gain` is '2', expected one finite number"),
        ({"gain": None}, "`gain` is a NoneType, expected one finite number"),
        ({"gain": property(raises)}, f"`gain` {FAILED} has to be one finite number"),
        ({"gain": property(lambda self: self.nothing)}, r"`gain` failed at .*AttributeError: .*'nothing'\. It has .*"),
        ({"context": "terminal"}, "`context` is 'terminal', expected None or a maestro_pl.policy.context.HiddenContext"),
        ({"check": raises}, rf"`check` {FAILED} is called as check\(policy\)"),
        ({"settings": None}, "`settings` is a NoneType, expected a dictionary of plain values"),
        ({"settings": property(raises)}, f"`settings` {FAILED} has to be a dictionary of plain values"),
        ({"settings": {"a": [object()]}}, rf"`settings` has an object at \['a'\]\[0\], expected plain values, {PLAIN}"),
        ({"settings": {"a": torch.ones(2)}}, r"`settings` has a tensor of the shape \[2\] at \['a'\], expected plain .*"),
        ({"state_dict": raises}, rf"`state_dict` {FAILED} is called as state_dict\(\), which returns a dictionary of .*"),
        ({"get_extra_state": lambda self: {"f": raises}},
         rf"`state_dict` has a function at \['_extra_state'\]\['f'\], .* {PLAIN}"),
        ({"observe": lambda self, seen: {"x": "3"}}, "`observe` gives '3' to be logged as 'x', expected one number"),
        ({"observe": lambda self, seen: {"x": torch.ones(3)}},
         r"`observe` gives a tensor of the shape \[3\] to be logged as 'x', .*"),
        (NO_INIT, r"its `__init__` does not call that of its base class: begin it with super\(\).__init__\(\)"),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_weigher(own: Any, sentence: str, tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=exactly("model.weigher", sentence)):
        watched_fit(tmp_path, tiny_qwen3, prompts, rewards(), steps=1, weigher=changed(Changed, **own))


def credit(seen: Any, **own: Any) -> Credit:
    return Credit(**{"credit_BK": seen.z_BK, "value_B": seen.z_BK[:, 0], **own})


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"check": raises}, rf"`check` {FAILED} is called as check\(policy, advantages, anchoring\)"),
        ({"settings": property(raises)}, f"`settings` {FAILED} has to be a dictionary of plain values"),
        ({"say": lambda seen: credit(seen, metrics={"a": "b"})},
         "`observe` gives 'b' to be logged as 'a', expected one number"),
        ({"say": lambda seen: credit(seen, value_B=seen.z_BK[:, 0] + torch.inf)},
         "value_B of response 0 is infinite, expected finite numbers, and NaN where it is not known"),
        ({"say": lambda seen: credit(seen, credit_BK=torch.where(torch.arange(8).unsqueeze(1) == 3, torch.inf, seen.z_BK))},
         "credit_BK of response 3 is infinite, expected finite numbers, and NaN where it is not known"),
        ({"say": lambda seen: credit(seen, rank_BJ=torch.zeros(3, 1, dtype=torch.long))},
         r"rank_BJ is torch.int64 of the shape \[3, 1\], expected torch.int64 of the shape \[8, J\], a column for each .*"),
        ({"say": lambda seen: credit(seen, rank_BJ=torch.rand(8, 1))}, r"rank_BJ is torch.float32 of the shape \[8, 1\], .*"),
        ({"say": lambda seen: credit(seen, rank_BJ=[1])}, "rank_BJ is a list, expected torch.int64 .*"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("combined", [False, True])
def test_what_is_asked_of_a_signal(
    own: Any, sentence: str, combined: bool, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    methods = {"observe": lambda self, seen: own["say"](seen)} if "say" in own else own
    signal = changed(MetaSignal, gives_values=True, **methods)
    with pytest.raises(UserError, match=exactly("model.meta.signal", sentence)):
        watched_fit(
            tmp_path, tiny_qwen3, prompts, rewards(), steps=1, weigher=Conductor(action="soft"),
            meta=Meta(CombinedSignal([signal]) if combined else signal, GradientLearner(), every=1),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"attach": raises}, rf"`attach` {FAILED} is called as attach\(conductor, signal\)"),
        ({"settings": property(raises)}, f"`settings` {FAILED} has to be a dictionary of plain values"),
        ({"learn": lambda self, *args, **kwargs: None}, r"`learn` returned a NoneType\. It is called as learn\(conductor, .*"),
        ({"learn": lambda self, *args, **kwargs: {"a": 10**400}}, "`learn` gives 10{59} to be logged as 'a', .*"),
        ({"learn": lambda self, *args, **kwargs: {"a": []}}, "`learn` gives a list to be logged as 'a', expected one number"),
        ({"nearest": raises}, rf"`nearest` {FAILED} is called as nearest\(conductor, h_BD\), which returns cosine_B or None"),
        ({"nearest": lambda self, conductor, h_BD: h_BD[:3, 0]},
         r"`nearest` is the shape \[3\], expected a tensor of the shape \[8\]"),
        ({"resume": raises}, rf"`resume` {FAILED} is called as resume\(conductor\)"),
        ({"state_dict": raises}, rf"`state_dict` {FAILED} is called as state_dict\(\), which returns a dictionary of plain .*"),
        ({"state_dict": lambda self: {"f": raises}},
         rf"`state_dict` has a function at \['f'\], expected plain values or tensors, {PLAIN}"),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_learner(own: Any, sentence: str, tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=exactly("model.meta.learner", sentence)):
        watched_fit(
            tmp_path, tiny_qwen3, prompts, rewards(), steps=1, weigher=Conductor(action="soft"),
            meta=Meta(changed(MetaSignal, gives_values=True, observe=lambda self, seen: credit(seen)),
                      changed(GradientLearner, **own), every=1),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("who", "build"),
    [
        ("model.meta.signal=Mine", lambda: Meta(changed(MetaSignal, **NO_INIT))),
        ("model.meta.signal=Mine", lambda: CombinedSignal([changed(AnchorSignal, **NO_INIT)])),
        ("model.meta.learner=Mine", lambda: Meta(learner=changed(Learner, **NO_INIT))),
        ("model.meta.learner=Mine", lambda: Meta(learner=changed(RidgeLearner, **NO_INIT))),
        ("Reward Mine", lambda: changed(Reward, score=raises, **NO_INIT).state_key),
        ("Reward Mine", lambda: changed(FunctionReward, **NO_INIT).spec),
    ],
)  # fmt: skip
def test_a_constructor_that_leaves_out_its_bases(who: str, build: Any) -> None:
    begin = r"its `__init__` does not call that of its base class: begin it with super\(\).__init__\(\)"
    with pytest.raises(UserError, match=rf"^{who}: {begin} \(docs/extending.md\)\.$"):
        build()


class Level(IntEnum):
    HIGH = 3


def test_numpy_numbers_of_ones_own_are_saved_as_plain_ones(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    import numpy as np

    weigher = changed(
        Conductor,
        gain=np.float32(0.5),
        settings={"a": np.float64(2), "b": {"c": (np.int64(1), np.str_("x"), Level.HIGH)}, np.str_("d"): {np.bool_(1)}},
        get_extra_state=lambda self: {"seen": np.float64(3)},
        set_extra_state=lambda self, state: None,
    )
    learner = changed(GradientLearner, state_dict=lambda self: {"f": np.float64(2), "t": torch.ones(2)})
    meta = Meta(AdvantageSignal(actions="expected"), learner)
    module, watch = watched_fit(tmp_path, tiny_qwen3, prompts, rewards(), steps=1, weigher=weigher, meta=meta)
    assert watch.rollouts[0].gain_B.unique().tolist() == [0.5]
    module.trainer.save_checkpoint(tmp_path / "own.ckpt")
    saved = read_plain(str(tmp_path / "own.ckpt"))
    settings = {name: value for name, value in saved["maestro"]["settings"].items() if name.startswith("weigher.")}
    assert settings == {"weigher.a": 2.0, "weigher.b": {"c": (1, "x", 3)}, "weigher.d": {True}}
    assert saved["state_dict"]["weigher._extra_state"] == {"seen": 3.0}
    assert {name: torch.as_tensor(value).tolist() for name, value in saved["maestro"]["learner"].items()} == {
        "f": 2.0,
        "t": [1.0, 1.0],
    }


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


@pytest.mark.parametrize("given", [2.5, raises])
def test_what_a_reward_of_ones_own_remembers_can_be_read_again(
    given: Any, tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    import numpy as np

    state = {"seen": [np.float64(given)] if isinstance(given, float) else given}
    own = changed(
        Reward, score=lambda self, rollout, rows, module: [0.0] * len(rows), state_dict=lambda self: dict(state)
    )
    module, _ = watched_fit(tmp_path, tiny_qwen3, prompts, rewards(own), steps=1)
    if isinstance(given, float):
        module.trainer.save_checkpoint(tmp_path / "own.ckpt")
        assert read_plain(str(tmp_path / "own.ckpt"))["callbacks"][own.state_key] == {"seen": [2.5]}
        return
    sentence = rf"^Mine\{{.*: `state_dict` has a function at \['seen'\], expected plain values or tensors, {PLAIN} \("
    with pytest.raises(UserError, match=sentence):
        module.trainer.save_checkpoint(tmp_path / "own.ckpt")
