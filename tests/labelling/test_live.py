"""Questions about a run that is training: what is asked, and that the run learns from the answers without waiting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import lightning as L
import pytest
import torch
import yaml

from callbacks import PeopleAnchor, ResponseRecorder
from callbacks.rewards import FunctionReward
from maestro_pl import Meta
from maestro_pl.app.label import LiveLabelling, label_app
from maestro_pl.app.notebook import label
from maestro_pl.app.serving import running
from maestro_pl.cli import main
from maestro_pl.conductor import AnchorSignal, RidgeLearner
from maestro_pl.conductor.conductor import Conductor
from maestro_pl.data import PromptDataModule
from maestro_pl.labelling.live import LiveQuestions
from maestro_pl.labelling.store import LabelStore
from maestro_pl.report.run_files import RunFiles
from maestro_pl.run.paths import run_dir
from tests.support import elevens, module_of, sevens, trainer_of
from tests.support.run_folders import TASKS, write_responses, write_run


def live_run(folder: Path, earlier: int = 2048, nasty: bool = False) -> tuple[Path, LabelStore]:
    """A run whose config has a ``PeopleAnchor``, and its labels."""
    run, store = write_run(folder / "run" / "version_0", steps=3, nasty=nasty), LabelStore(folder / "labels.db")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    arguments = {"path": str(store.path), "earlier": earlier}
    config["anchors"] = [{"class_path": "callbacks.PeopleAnchor", "init_args": arguments}]
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return run, store


def test_the_newest_groups_come_first_and_tasks_are_covered(tmp_path: Path) -> None:
    run, _ = live_run(tmp_path)
    live = LiveQuestions(run, group_size=4)
    live.refresh()
    first = live.open(())
    assert [each.step for each in first] == [3, 3, 2, 2, 1, 1]
    assert [each.spread for each in first[:2]] == sorted((each.spread for each in first[:2]), reverse=True)
    assert sorted(each.question.task for each in first[:2]) == sorted(TASKS)
    # who has answered two of a task is asked about the other one first
    answered = [each.question.key for each in first[2:] if each.question.task == first[0].question.task]
    assert live.open(answered)[0].question.task != first[0].question.task
    write_responses(run / "rollouts.jsonl", range(4, 5))
    live.refresh()
    assert [each.step for each in live.open({first[0].question.key})] == [4, 4, 3, 2, 2, 1, 1]
    only = LiveQuestions(run, group_size=4, tasks=["story"])
    only.refresh()
    assert {each.question.task for each in only.open(())} == {"story"}


def test_only_whole_lines_and_whole_groups_are_asked(tmp_path: Path) -> None:
    path, other = tmp_path / "rollouts.jsonl", tmp_path / "whole.jsonl"
    live = LiveQuestions(tmp_path, group_size=4)
    live.refresh()  # nothing is recorded yet
    assert (live.open(()), live.newest) == ([], None)
    write_responses(other, range(1, 3))
    whole, seen = other.read_bytes(), []
    for end in range(0, len(whole), 97):  # as a writer leaves it at any time
        path.write_bytes(whole[:end])
        live.refresh()
        seen.append(len(live.open(())))
        lines = whole[:end].count(b"\n")
        assert seen[-1] == lines // 4
    path.write_bytes(whole[whole.index(b"\n") + 1 :])  # another file: its first group lacks a response
    fresh = LiveQuestions(tmp_path, group_size=4)
    fresh.refresh()
    assert len(fresh.open(())) == 3
    path.write_bytes(b"{broken\n" + whole)
    live.refresh()
    assert len(live.open(())) == 4


def test_groups_that_the_run_has_forgotten_are_not_asked(tmp_path: Path) -> None:
    run, _ = live_run(tmp_path)
    live = LiveQuestions(run, group_size=4, earlier=8)  # a batch has 2 groups
    live.refresh()
    assert {each.step for each in live.open(())} == {2, 3}
    live.earlier = 7
    assert {each.step for each in live.open(())} == {3}


def ask(address: str, path: str, post: bool = False, **query: str) -> str:
    request = Request(f"{address}{path}?{urlencode(query)}", method="POST" if post else "GET")
    with urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def key_of(page: str) -> str:
    return page.split('data-question="')[1].split('"')[0]


def test_the_page_goes_on_with_the_run_and_never_asks_twice(tmp_path: Path) -> None:
    run, store = live_run(tmp_path, nasty=True)
    labelling = LiveLabelling(RunFiles(run), LiveQuestions(run, 4), store, "ann")
    asked: list[str] = []
    with running(label_app(labelling)) as address:
        page = ask(address, "/")
        for n in range(6):
            assert f"{n} answered, {6 - n} open" in page
            assert "<script>window" not in page
            asked.append(key_of(page))
            page = ask(address, "/click", True, key=asked[-1], rater="ann", choice="1")
        assert "Nothing to be asked now" in page
        assert "every 3s" in page
        assert key_of(ask(address, "/next", rater="bob")) in asked  # bob has answered nothing
        write_responses(run / "rollouts.jsonl", range(4, 5))
        asked.append(key_of(ask(address, "/next", rater="ann")))
        page = ask(address, "/click", True, key=asked[-1], rater="ann", choice="2")
        assert key_of(page) not in asked
        assert key_of(ask(address, "/undo", True, rater="ann")) == asked[-1]  # what was taken back is asked again
        side = ask(address, "/side")
        assert "6 clicks of 1 person" in side
        assert "The run is at step <strong>3</strong> of 6" in side
        assert '<td class="number">50 %</td>' in side  # the weights of the run
    assert len(set(asked)) == 7
    # a server that is started again goes on where it was
    again = LiveLabelling(RunFiles(run), LiveQuestions(run, 4), LabelStore(store.path), "ann")
    assert {question.key for question in again.open("ann")}.isdisjoint(asked[:6])


class Clicks(L.Callback):
    """Answers every question of the page after each step, through the server, as a person beside the run would."""

    def __init__(self, store: LabelStore) -> None:
        self.store, self.said, self.logged = store, 0, []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        folder = run_dir(trainer)
        (folder / "config.yaml").touch()
        labelling = LiveLabelling(RunFiles(folder), LiveQuestions(folder, 4), self.store, "ann")
        with running(label_app(labelling)) as address:
            page = ask(address, "/")
            while key_of(page):
                page = ask(address, "/click", True, key=key_of(page), rater="ann", choice="1")
                self.said += 1


def test_a_run_learns_from_the_page_beside_it(tiny_qwen3: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"word {i}", "task": "ab"[i % 2], "split": "train"} for i in range(8)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clicks = Clicks(LabelStore(tmp_path / "labels.db"))
    module = module_of(
        tiny_qwen3,
        weigher=Conductor(action="soft", norm="center", context="prompt"),
        meta=Meta(signal=AnchorSignal(), learner=RidgeLearner(target="choice"), every=1),
    )
    scored = [FunctionReward(each, name=each.__name__, normalize="zscore") for each in (sevens, elevens)]
    chain = [*scored, PeopleAnchor(str(clicks.store.path)), ResponseRecorder(every_n_steps=1), clicks]
    trainer = trainer_of(tmp_path, chain, max_steps=3, limit_val_batches=0)
    trainer.fit(module, PromptDataModule(sources=str(prompts), batch_size=2, show=False))
    told = [each["anchor/earlier_choices"] for each in clicks.logged]
    assert told[0] == 0 < told[1] < told[2]
    assert (
        clicks.said == len(clicks.store.clicks()) > told[2]
    )  # those after the last step came too late, and nobody waited
    assert module.outer.counts.choices == told[2]
    assert clicks.logged[2]["conductor/choices"] == told[2]
    weights_BK = module.weigher.probabilities(module.outer.learner.remembered["h_BD"], torch.ones(1, 2).bool())
    assert float((weights_BK - 0.5).abs().max()) > 0.01


def test_a_notebook_shows_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, store = live_run(tmp_path)
    frame = label(run, "--live", "--rater", "bob", height=500)
    try:
        assert f'<iframe src="{frame.address}" width="100%" height="500"' in frame._repr_html_()
        page = ask(frame.address.rstrip("/"), "/")
        ask(frame.address.rstrip("/"), "/click", True, key=key_of(page), rater="bob", choice="x")
    finally:
        frame.stop()
    assert [(click.rater, click.verdict) for click in store.clicks()] == [("bob", "bad")]
    assert "which the run reads at each step" in capsys.readouterr().out


def test_what_cannot_be_asked_live_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store = live_run(tmp_path)
    plain = write_run(tmp_path / "plain" / "version_0", steps=1)
    lost = write_run(tmp_path / "lost" / "version_0", steps=1)
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (lost / "config.yaml").write_text(text.replace(str(store.path), "gone.db"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for arguments, expected in (
        (["--live"], "expected the folder of one run"),
        ([str(run), "--live", "--data.seed", "1"], "takes no key of `fit`"),
        ([str(run)], "add --live"),
        (["no/run", "--live"], "there is no such folder"),
        ([str(plain), "--live"], "reads no labels of people"),
        ([str(lost), "--live"], "The run reads labels from gone.db"),
        ([str(run), "--live", "--rater", "a b"], "expected a pseudonym"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["label", *arguments])
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err
