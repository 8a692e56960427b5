"""Labels that come while later batches are trained on: they count for the groups that the run has sampled, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from callbacks import PeopleAnchor
from callbacks.rewards import FunctionReward
from maestro_pl import Meta
from maestro_pl.conductor import AnchorSignal, RidgeLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.conductor.earlier import EarlierGroup, EarlierGroups
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import UserError
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import Click, LabelStore
from maestro_pl.rollout import Later, Rollout
from tests.support import elevens, module_of, sevens, trainer_of


class Person(L.Callback):
    """After the second batch, calls the last different answer to the first prompt of the first batch the best."""

    def __init__(self, store: LabelStore, checkpoint: Path | None = None) -> None:
        self.store, self.checkpoint = store, checkpoint
        self.rollouts: list[Rollout] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rollouts.append(batch["rollout"])
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if batch_idx == 1 and len(self.rollouts) == 2:
            texts = list(dict.fromkeys(self.rollouts[0].responses[:4]))
            asked = Question.of("a", self.rollouts[0].prompts[0], texts)
            best = asked.responses.index(texts[-1])
            self.store.click(Click(asked, "ann", "best", best, tuple(range(len(texts))), 1.0))
            if self.checkpoint is not None:
                trainer.save_checkpoint(self.checkpoint)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i}", "task": "ab"[i % 2], "split": "train"} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fit(tmp_path: Path, model: Path, prompts: Path, person: Person, steps: int = 4, **options: Any) -> Any:
    learner = options.pop("learner", None) or RidgeLearner(target="choice")
    weigher = Conductor(action="soft", norm="center", context="prompt")
    module = module_of(model, weigher=weigher, meta=Meta(signal=AnchorSignal(), learner=learner, every=1))
    scored = [FunctionReward(each, name=each.__name__, normalize="zscore") for each in (sevens, elevens)]
    anchor = PeopleAnchor(str(person.store.path), earlier=options.pop("earlier", 2048))
    trainer = trainer_of(tmp_path, [*scored, anchor, person], max_steps=steps, limit_val_batches=0)
    torch.manual_seed(0)
    trainer.fit(module, PromptDataModule(sources=str(prompts), batch_size=2, show=False, seed=1), **options)
    return module


def test_a_label_of_an_earlier_batch_teaches_and_is_counted(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    person = Person(LabelStore(tmp_path / "labels.db"))
    module = fit(tmp_path, tiny_qwen3, prompts, person)
    assert [each["anchor/earlier_choices"] for each in person.logged] == [
        0,
        0,
        1,
        1,
    ]  # once, at the step after the click
    assert [each.get("anchor/choices", 0) for each in person.logged] == [0, 0, 1, 1]
    assert module.outer.updates == 1
    counted = module.outer.counts.tasks[person.rollouts[0].tasks[0]]
    assert (counted.choices, counted.answered) == (1, 1)
    assert "0 choices of people, about 0 of 4 groups; 1 more came later" in capsys.readouterr().out

    # what was learned is what the first batch was: the contexts, rewards and ranks of the answers that were shown
    first, known = person.rollouts[0], module.outer.learner.remembered
    texts = first.responses[:4]
    rows = [texts.index(text) for text in dict.fromkeys(texts)]
    torch.testing.assert_close(known["h_BD"], first.hidden_BD[rows].float())
    torch.testing.assert_close(known["z_BK"], first.normalized_BK[rows])
    assert known["rank_B"].tolist() == [*[1] * (len(rows) - 1), 0]
    equal, taught = (person.rollouts[step].weights_BK for step in (2, 3))
    assert float((equal - 0.5).abs().max()) < 1e-6  # weighed before the label was read
    assert float((taught - 0.5).abs().max()) > 0.01


def test_a_resumed_run_knows_its_earlier_groups_bit_for_bit(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    whole = Person(LabelStore(tmp_path / "labels.db"), tmp_path / "after_two.ckpt")
    module = fit(tmp_path, tiny_qwen3, prompts, whole)
    again = Person(whole.store)  # it has the label, which this run has not read yet
    resumed = fit(tmp_path, tiny_qwen3, prompts, again, ckpt_path=tmp_path / "after_two.ckpt")
    assert len(again.rollouts) == 2
    assert resumed.outer.earlier.choices == resumed.outer.updates == 1
    states = [each.state_dict() for each in (module, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    learned = [each.outer.learner.remembered for each in (module, resumed)]
    assert all(torch.equal(value, learned[1][name]) or value.isnan().any() for name, value in learned[0].items())
    for before, after in zip(whole.rollouts[2:], again.rollouts, strict=True):
        assert before.responses == after.responses
        assert torch.equal(before.weights_BK, after.weights_BK)  # type: ignore[arg-type]
    # a label that was counted before the checkpoint is not counted again
    resumed.trainer.save_checkpoint(tmp_path / "end.ckpt")
    more = fit(tmp_path, tiny_qwen3, prompts, Person(whole.store), steps=5, ckpt_path=tmp_path / "end.ckpt")
    assert more.outer.earlier.choices == more.outer.counts.choices == 1


def test_what_is_old_is_forgotten_and_scores_alone_cannot_learn(
    tiny_qwen3: Path, prompts: Path, tmp_path: Path
) -> None:
    person = Person(LabelStore(tmp_path / "labels.db"))
    module = fit(tmp_path, tiny_qwen3, prompts, person, steps=3, earlier=8)  # one batch of 2 groups of 4
    assert len(module.outer.earlier.groups) == 2
    assert module.outer.earlier.choices == 0
    with pytest.raises(UserError, match="learns from scores only"):
        fit(tmp_path, tiny_qwen3, prompts, Person(LabelStore(tmp_path / "b.db")), learner=RidgeLearner())
    with pytest.raises(UserError, match="earlier is -1"):
        PeopleAnchor("labels.db", earlier=-1)


def test_two_people_count_twice_and_each_once() -> None:
    earlier = EarlierGroups()
    names = {"people": ["x", "y", "y", ""]}
    group = EarlierGroup("a", names, {}, False, False, 0, torch.zeros(1, 2), torch.ones(4, 1).bool(), torch.zeros(4, 1))
    earlier.groups = [group]

    def said(*choices: Any) -> list[list[int]]:
        found = earlier.said({"people": Later([], list(choices), 8)})
        return [rank_G.tolist() for each in found for rank_G in each.columns]

    choice, other = (("y", "x"), (0, 1)), (("x", "z"), (0, 1))
    assert said(other, (("", "x"), (0, 1))) == []  # of another group, or of no name
    assert said(choice) == [[1, 0, -1, -1]]
    assert said(choice) == []
    assert said(choice, choice) == [[1, 0, -1, -1]]
    restored = EarlierGroups()
    restored.load_state_dict(earlier.state_dict())
    earlier = restored
    assert said(choice, choice) == []
    assert earlier.choices == 2


def test_a_group_is_compared_with_the_choices_about_it_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 clicks about other texts, and as many groups as are kept: each looks at its own."""
    groups = EarlierGroups()
    for n in range(64):
        names = [f"{n}/{i}" for i in range(4)]
        z_GK = torch.zeros(4, 2)
        empty = {"people": []}
        groups.groups.append(
            EarlierGroup("a", {"people": names}, empty, True, False, 0, torch.zeros(1, 3), z_GK.bool(), z_GK)
        )
    looked = []
    new = EarlierGroup.new
    monkeypatch.setattr(
        EarlierGroup, "new", lambda self, name, given: (looked.append(len(given)), new(self, name, given))[1]
    )
    choices = [((f"other {n}", f"else {n}"), (0, 1)) for n in range(20_000)]
    choices += [(("7/2", "7/0"), (0, 1)), (("7/0", "8/0"), (0, 1)), (("9/1", "9/3"), (1, 0))]
    said = groups.said({"people": Later([], choices, 2048)})
    assert sum(looked) == 3
    assert [each.group.names["people"][0] for each in said] == ["7/0", "9/0"]
    assert [column.tolist() for each in said for column in each.columns] == [[1, -1, 0, -1], [-1, 1, -1, 0]]
    assert groups.choices == 2


def test_fewer_than_a_group_is_refused(tiny_qwen3: Path, prompts: Path, tmp_path: Path) -> None:
    person = Person(LabelStore(tmp_path / "labels.db"))
    with pytest.raises(UserError, match="earlier is 3, less than the 4 responses of one group"):
        fit(tmp_path, tiny_qwen3, prompts, person, steps=1, earlier=3)
