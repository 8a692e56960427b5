"""From clicks in the page to a run that learns from them."""

from __future__ import annotations

import socket
import statistics
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import torch

from callbacks import PeopleAnchor
from maestro_pl.app.label import Labelling, label_app
from maestro_pl.app.serving import running
from maestro_pl.cli import main
from maestro_pl.cli.label import Sampled, next_command, sampled_questions
from maestro_pl.cli.run import MaestroCLI, make_cli
from maestro_pl.errors import UserError
from maestro_pl.labelling.questions import Question
from maestro_pl.labelling.store import Click, LabelStore
from maestro_pl.rollout import Rollout
from maestro_pl.sandbox import rows, simulated_choice
from tests.support.rollouts import make_rollout, reward_module

TEXTS = ["x", "y", "z", "y", "u", "v"]


def labels(path: Path) -> LabelStore:
    return LabelStore(path / "labels.db")


def choose(store: LabelStore, prompt: str, responses: list[str], best: str | None, rater: str = "ann") -> None:
    asked = Question.of("a", prompt, responses)
    place = None if best is None else asked.responses.index(best)
    verdict: Any = "tie" if best is None else "best"
    store.click(Click(asked, rater, verdict, place, tuple(range(len(responses))), 1.0))


def choices(anchor: PeopleAnchor, rollout: Rollout, labelled_N: torch.Tensor | None = None) -> list[dict[str, int]]:
    anchor.stage, anchor._notes, anchor._choices = "train", {}, []
    module = reward_module(labelled=lambda _: labelled_N)
    return [
        {f"{row}{rollout.responses[row]}": rank for row, rank in zip(c.rows, c.ranks, strict=True)}
        for c in anchor._score_rollout(rollout, module).choices
    ]


def test_choices_of_people_meet_the_rows_of_a_run(tmp_path: Path) -> None:
    store = labels(tmp_path)
    anchor = PeopleAnchor(str(store.path))
    rollout = make_rollout(TEXTS, group_size=3)  # groups x y z and y u v
    assert choices(anchor, rollout) == []
    choose(store, "prompt 0", ["z", " x\n"], "z")  # new clicks are read at the next step
    assert choices(anchor, rollout) == [{"2z": 0, "0x": 1}]
    choose(store, "prompt 0", ["z", "x"], None, "bob")
    choose(store, "prompt 1", ["x", "y"], "y")  # the second group has no x
    choose(store, "prompt 2", ["x", "y"], "y")
    found = choices(anchor, rollout)
    assert found == [{"2z": 0, "0x": 1}, {"2z": 0, "0x": 0}]
    assert choices(anchor, rollout, torch.tensor([False, True])) == []
    store.undo("ann", [click.question.key for click in store.clicks()][:1])
    assert choices(anchor, rollout) == [{"2z": 0, "0x": 0}]
    anchor.stage = "validation"
    anchor._choices = []
    assert anchor.score(rollout, [0, 1], reward_module()) == ([None, None], {})
    assert anchor._choices == []


def test_a_file_that_breaks_while_a_run_goes_on_leaves_what_was_read(tmp_path: Path) -> None:
    store = labels(tmp_path)
    choose(store, "prompt 0", ["x", "y"], "x")
    anchor = PeopleAnchor(str(store.path))
    rollout = make_rollout(TEXTS, group_size=3)
    before = choices(anchor, rollout)
    store.close()
    for path in tmp_path.glob("labels.db*"):
        path.unlink()
    store.path.write_text("broken " * 1000)
    with pytest.warns(UserWarning, match="goes on with what it has read"):
        assert choices(anchor, rollout) == before == [{"0x": 0, "1y": 1}]
    with pytest.raises(UserError, match="no file of labels"):
        PeopleAnchor(str(store.path))._read_new()


SMALL = [
    "--config", "configs/quickstart.yaml", "--rollout.group_size", "4", "--data.batch_size", "4", "--data.show", "false",
    "--model.meta.warmup", "1", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0",
    "--trainer.num_sanity_val_steps", "0", "--trainer.accelerator", "cpu", "--rollout.max_new_tokens", "40",
]  # fmt: skip


def ask(address: str, path: str, post: bool = False, **query: str) -> str:
    request = Request(f"{address}{path}?{urlencode(query)}", method="POST" if post else "GET")
    with urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def key_of(page: str) -> str:
    return page.split('data-question="')[1].split('"')[0]


@pytest.mark.slow  # a sampling and a run of the sandbox
def test_a_person_teaches_a_run_through_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = labels(tmp_path)
    sampled = sampled_questions(SMALL, store.path, 8, 4)
    asked, teaching = sampled.asked, sampled.teaching
    assert (len(asked), sampled.warmup) == (8, 2)
    assert not list(tmp_path.glob("runs"))
    row_of = {row["prompt"]: row for row in rows("train", n_per_task=512)}
    labelling = Labelling(asked, store, teaching, "ann", next_command(SMALL, store.path, sampled))
    took = []
    with running(label_app(labelling)) as address:
        page = ask(address, "/")
        for n in range(8):
            assert f"{n} of 8 answered" in page
            question = labelling.questions[key_of(page)]
            shown = [question.responses[place] for place in question.order("ann")]
            row = row_of[str(question.prompt)]
            best = simulated_choice(shown, row["task"], row["subject"], row["target"], str(question.prompt), seed=1)
            start = time.perf_counter()
            page = ask(address, "/click", True, key=question.key, rater="ann", choice=str(1 + best))
            took.append(time.perf_counter() - start)
        assert "callbacks.PeopleAnchor" in page
        side = ask(address, "/side")
        assert "8 clicks of 1 person" in side
        assert "Predicted before it was made" in side
        page = ask(address, "/undo", True, rater="ann")
        assert key_of(page) == question.key
        ask(address, "/click", True, key=question.key, rater="ann", choice=str(1 + best))
        for wrong in ({"choice": "5"}, {"choice": ""}, {"key": "7"}, {"rater": "a b"}):
            with pytest.raises(HTTPError) as refused:
                ask(address, "/click", True, **{"key": question.key, "rater": "bob", "choice": "1", **wrong})
            assert refused.value.code == 400
    print(f"seconds of a click: median {statistics.median(took):.3f}, largest {max(took):.3f}")
    assert len(store.clicks()) == 8

    command = next_command(SMALL, store.path, sampled)
    assert command[:2] == ["maestro-pl", "fit"]
    cli = make_cli([*command[1:], f"--trainer.logger.save_dir={tmp_path}"], MaestroCLI)
    outer = cli.model.outer
    assert outer.counts.choices == 8
    assert sum(task.answered for task in outer.counts.tasks.values()) == 8
    assert "8 choices of people, about 8 of" in capsys.readouterr().out
    # the run learned from the very rewards and ranks that the page has shown the weights of
    known = outer.learner.remembered
    ranks = {click.question.key: click.ranks for click in store.clicks()}
    ours = [(teaching.groups[each.group].z_GK[list(each.rows)], ranks[each.question.key]) for each in asked]
    expected = torch.cat([torch.cat([z_SK, torch.tensor(own).unsqueeze(1)], 1) for z_SK, own in ours])
    learned = torch.cat([known["z_BK"], known["rank_B"].unsqueeze(1)], 1)
    torch.testing.assert_close(_sorted(learned), _sorted(expected), rtol=1e-3, atol=1e-3)
    weights = cli.model.weigher.probabilities(known["h_BD"], known["mask_BK"])
    assert float((weights - 1 / weights.shape[1]).abs().max()) > 0.05


def _sorted(rows_WK: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted((rows_WK * 1000).round().tolist())) / 1000


def test_options_that_cannot_be_used_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = socket.create_server(("127.0.0.1", 0))
    for arguments, expected in (
        (["--questions", "0"], "expected at least one question, of 2 to 9 answers"),
        (["--of", "many"], "--of"),
        (["--rater", "a b"], "expected a pseudonym"),
        (["--labels", "no/such/labels.db"], "in a folder that exists"),
        (["export", "none.db", "out.csv"], "There is no file of labels none.db"),
        (["import", "labels.db", "none.csv"], "none.csv cannot be read: No such file or directory."),
        (["import", "labels.db", "none.csv", "--rater", "a b"], "expected a pseudonym"),
        (["--port", "99999999"], "--port 99999999: expected a number from 0 (any free one) to 65535"),
        (["--port", str(taken.getsockname()[1])], "Address already in use; choose another"),
        (["--host", "\x00"], "host name must not contain null character; choose another"),
        (["--config", "none.yaml"], "none.yaml"),  # read while it samples, when the file of labels is there
        (["--host", "203.0.113.7"], "Cannot assign requested address; choose another"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["label", *arguments])
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    taken.close()
    main(["label", "--help"])
    assert "--questions N" in capsys.readouterr().out


def test_labels_are_exported_and_imported_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = labels(tmp_path)
    choose(store, "p", ["x", "y"], "x")
    main(["label", "export", str(store.path), str(tmp_path / "out.jsonl")])
    main(["label", "import", str(tmp_path / "other.db"), str(tmp_path / "out.jsonl")])
    shown = capsys.readouterr().out
    assert "1 labels written" in shown
    assert "1 labels read" in shown
    assert len(LabelStore(tmp_path / "other.db").clicks()) == 1


def test_the_next_command_of_quickstart_and_readme_is_this_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    assert (
        "maestro-pl label" in (root / "Makefile").read_text(encoding="utf-8").split("quickstart:")[1].split("\n\n")[0]
    )
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert readme.index("maestro-pl label  ") < readme.index("## What it prints")
    # without a config the sandbox is asked about, and the command that trains with the labels names it
    command = next_command([], tmp_path / "labels.db", Sampled([], None, 6, []))  # type: ignore[arg-type]
    assert command[:3] == ["maestro-pl", "fit", "--config"]
    assert command[3].endswith("configs/quickstart.yaml")
    assert "--model.meta.warmup=6" in command
