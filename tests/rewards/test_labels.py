"""LabelFileReward: what a file of labels says, what is refused, and the two runs that bring people's labels in."""

from __future__ import annotations

import contextlib
import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from callbacks import LabelFileReward
from callbacks.records import records
from maestro_pl.cli import main
from maestro_pl.errors import UserError
from maestro_pl.rewards.labels import LabelColumns, label_key, read_labels
from maestro_pl.rollout import Rollout
from tests.support import fuzz, make_rollout, reward_module

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say [hi]\nnow"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt: Any = "p", response: Any = "r", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, **more}


def rollout_of(prompts: list[Any], responses: list[str]) -> Rollout:
    return make_rollout(responses, group_size=len(responses) // len(prompts), fields={"prompts": prompts})


def module_of(stage: str = "test", warmup: tuple[int, int] = (0, 0)) -> Any:
    trainer = SimpleNamespace(training=stage == "train", testing=stage == "test", is_global_zero=True)
    return reward_module(trainer=trainer, warmup=warmup)


def set_up(path: Path, **options: Any) -> LabelFileReward:
    reward = LabelFileReward(str(path), **options)
    trainer: Any = SimpleNamespace(callbacks=[SimpleNamespace(writes_rollout=True), reward])
    reward.setup(trainer, module_of(), "fit")
    return reward


def scores_of(reward: LabelFileReward, rollout: Rollout, module: Any = None) -> list[float | None]:
    module = module or module_of()
    reward._write_scores(module.trainer, module, {"rollout": rollout}, "test", 0)
    return [r["rewards"][reward.name] for r in records(rollout)]


# -- the file --------------------------------------------------------------------------------------------------------


def test_several_annotators_by_hand(tmp_path: Path) -> None:
    rows = [row(score=1), row(score=0.0), row(score="0.5"), row(response="s", score=-2), row(response="t", score=True)]
    labels = read_labels(write(tmp_path / "l.jsonl", rows))
    assert labels[label_key("p", "r")].score == 0.5
    assert labels[label_key("p", "r")].disagreement == pytest.approx((1 / 6) ** 0.5)  # (0.25 + 0.25 + 0) / 3
    assert labels[label_key("p", "s")] == (-2.0, None)
    assert labels[label_key("p", "t")] == (1.0, None)


@pytest.mark.parametrize("empty", [None, "", "  "])
def test_an_empty_score_is_no_label(tmp_path: Path, empty: Any) -> None:
    rows = [row(score=empty), row(response="s", score=3), row(response="s", score=empty)]
    assert read_labels(write(tmp_path / "l.jsonl", rows)) == {label_key("p", "s"): (3.0, None)}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(score="good"), r"l\.jsonl:2: 'score' is 'good', expected a finite number"),
        (row(score="1,5"), r"l\.jsonl:2: 'score' is '1,5'"),
        (row(score=float("inf")), r"l\.jsonl:2: 'score' is inf"),
        (row(score=float("nan")), r"l\.jsonl:2: 'score' is nan"),
        (row(score=1e39), r"l\.jsonl:2: 'score' is 1e\+39"),
        (row(score=10**400), r"l\.jsonl:2: 'score' is 1000"),
        (row(score=[1]), r"l\.jsonl:2: 'score' is \[1\]"),
        (row(), r"l\.jsonl:2: no column 'score'; it has prompt, response"),
        ({"prompt": "p", "score": 1}, r"l\.jsonl:2: no column 'response'; it has prompt, score"),
        (row(prompt=None, score=1), r"l\.jsonl:2: 'prompt' is None, expected a text or a list of chat messages"),
        (row(prompt=["a"], score=1), r"l\.jsonl:2: 'prompt' is \['a'\]"),
        (row(response=7, score=1), r"l\.jsonl:2: 'response' is 7, expected a text"),
        (row(response=CHAT, score=1), r"l\.jsonl:2: 'response' is \[\{"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_value(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "l.jsonl", [row(response="fine", score=1), bad])
    with pytest.raises(UserError, match=message) as caught:
        read_labels(path)
    assert str(caught.value).startswith(f"1 of 2 rows of the labels {path} cannot be used:")
    assert str(caught.value).endswith("or leave their score empty: such a row counts as not labelled.")


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl", [row(score=1)])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match=r"(?s)1 of 2 rows.*l\.jsonl:2: not JSON"):
        read_labels(path)


def test_a_missing_file_says_what_to_do_and_an_empty_one_has_no_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file of labels .*none\.jsonl: give the path of one, or an empty file"):
        set_up(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert read_labels(tmp_path / "empty.jsonl") == {}


def test_columns_of_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "l.jsonl", [{"question": "p", "answer": "r", "stars": 4, "score": "unused"}])
    assert read_labels(path, LabelColumns("question", "answer", "stars")) == {label_key("p", "r"): (4.0, None)}
    reward = set_up(path, prompt_column="question", response_column="answer", score_column="stars")
    rollout = rollout_of(["p"], ["r"])
    assert scores_of(reward, rollout) == [4.0]
    assert rollout.rewards["labels"].metrics == {}  # nobody can disagree with one person


@fuzz
@given(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": st.text(max_size=6) | st.just(CHAT)},
            optional={"response": st.text(max_size=4) | st.none(), "score": st.floats() | st.text("1.e-x", max_size=4)},
        ),
        max_size=4,
    ),
    st.text("[]{}\"':,role ", max_size=30),
)
def test_any_labels_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], prompt: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    with contextlib.suppress(UserError):
        for key, label in read_labels(write(path, [*rows, row(prompt, score=1)])).items():
            assert all(isinstance(part, str) for part in key)
            assert abs(label.score) < float("inf")


# -- the reward ------------------------------------------------------------------------------------------------------


def test_a_response_is_looked_up_by_its_own_prompt_and_text(tmp_path: Path) -> None:
    rows = [
        row("a", " x\r\ny ", score=1),
        row("a\n", "z", score=2),
        row("b", "z", score=3),
        row("b", "z", score=5),
        row([{**CHAT[0]}, {**CHAT[1], "content": " Say [hi]\r\nnow\n"}], "x\ny", score=6),
    ]
    reward = set_up(write(tmp_path / "l.jsonl", rows))
    rollout = rollout_of([" a", "b", CHAT], ["x\ny\n", "z", "z", "x\ny", "z", "x\ny"])
    assert scores_of(reward, rollout) == [1.0, 2.0, 4.0, None, None, 6.0]
    scored = rollout.rewards["labels"]
    assert scored.mask_B.tolist() == [True, True, True, False, False, True]
    expected = torch.tensor([torch.nan, torch.nan, 1.0, torch.nan, torch.nan, torch.nan])
    torch.testing.assert_close(scored.metrics["disagreement"], expected, equal_nan=True)


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return write(path.with_suffix(".jsonl"), rows)


def as_csv(path: Path, rows: list[dict[str, Any]], text: Callable[[Any], str] = json.dumps) -> Path:
    flat = [{k: v if isinstance(v, str | int) else text(v) for k, v in r.items()} for r in rows]
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    return path.with_suffix(".csv")


def as_csv_of_python(path: Path, rows: list[dict[str, Any]]) -> Path:
    return as_csv(path, rows, str)  # what a table library writes for a cell that holds a list


@pytest.mark.parametrize("save", [as_jsonl, as_csv, as_csv_of_python])
def test_recorded_rows_with_one_more_column_are_labels(tmp_path: Path, save: Any) -> None:
    prompts = ["p", CHAT, '[{"no": "chat"}]', "[1, 2]", "[open"]
    responses = ["one", "two\nlines, and a comma", "", "[]", " x "] + ["y"] * 5
    recorded = [{"step": 0, **r} for r in records(rollout_of(prompts, responses))]
    labels = save(tmp_path / "rollouts", [{**r, "score": i} for i, r in enumerate(recorded)])
    expected = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 6.5, 8.5, 8.5]  # at the end two alike answers to one prompt each
    assert scores_of(set_up(labels), rollout_of(prompts, responses)) == expected


def test_the_role_is_anchor_unless_another_is_given(tmp_path: Path) -> None:
    assert LabelFileReward("l.jsonl").spec.role == "anchor"
    assert LabelFileReward("l.jsonl", role="metric", name="people").spec.role == "metric"
    with pytest.raises(UserError, match="its setup"):
        LabelFileReward("l.jsonl").score(rollout_of(["p"], ["r"]), [0], module_of())


def test_the_end_counts_the_warm_up_and_the_training_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = set_up(write(tmp_path / "l.jsonl", [row(score=1)]))
    scores_of(reward, rollout_of(["p"], ["r", "r"]), module_of("train", (1, 2)))
    scores_of(reward, rollout_of(["p"], ["r", "s", "s"]), module_of("train", (2, 2)))
    scores_of(reward, rollout_of(["p"], ["s", "s"]), module_of("validate"))  # other responses, and not the question
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.on_fit_end(module_of().trainer, module_of())
    assert capsys.readouterr().out == "Reward 'labels': responses with a label: warm-up 2 of 2, training 1 of 3\n"
    reward.on_test_end(module_of().trainer, module_of())  # no test has run
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("stage", "phase", "file"), [("fit", "train", "rollouts.jsonl"), ("test", "test", "samples_test.jsonl")]
)
def test_no_label_at_all_is_a_warning_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, phase: str, file: str
) -> None:
    reward = set_up(write(tmp_path / "l.jsonl", [row(score=1)]))
    scores_of(reward, rollout_of(["p"], ["s", "t"]), module_of(phase))
    with pytest.warns(UserWarning, match=rf"none of the 2 responses .* column 'score' to this run's {file}"):
        getattr(reward, f"on_{stage}_end")(module_of().trainer, module_of())
    assert capsys.readouterr().out.endswith("0 of 2\n")


# -- two runs --------------------------------------------------------------------------------------------------------


def run(folder: Path, command: str, name: str) -> list[dict[str, Any]]:
    """One run through the command line; the responses that it wrote."""
    main([command, "--config", "run.yaml", "--rewards+=anchor.yaml", "--trainer.logger.name", name])
    file = {"fit": "rollouts", "test": "samples_test"}[command]
    (path,) = folder.glob(f"runs/{name}/*/{file}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path, tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``run.yaml``, its rewards, the anchor, and labels that are still to be made."""
    prompts = [f"Say {i}" if i % 2 else [{"role": "user", "content": f"Say {i}"}] for i in range(24)]
    write(tmp_path / "data.jsonl", [{"prompt": prompt} for prompt in prompts])
    (tmp_path / "mine.py").write_text(
        "def sevens(completion):\n    return sum(map(ord, completion)) % 7\n"
        "def elevens(completion):\n    return sum(map(ord, completion)) % 11\n"
    )
    rewards = [
        {"class_path": "callbacks.FunctionReward", "init_args": {"function": f"mine.py:{name}", "normalize": "zscore"}}
        for name in ("sevens", "elevens")
    ]
    config = {
        "model": {
            "policy": {"model": str(tiny_qwen3), "dtype": "float32"},
            "weigher": {"class_path": "maestro_pl.Conductor", "init_args": {"action": "soft", "context": "prompt"}},
            "meta": {"signal": "maestro_pl.AnchorSignal", "learner": "ridge", "warmup": 2},
        },
        "data": {"sources": "data.jsonl", "fractions": [0.7, 0.0, 0.3], "batch_size": 2, "show": False},
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "trainer": {
            "accelerator": "cpu", "max_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False,
            "callbacks": [
                {"class_path": "callbacks.ResponseRecorder", "init_args": {"every_n_steps": 1, "evaluation": True}}
            ],
        },
        "rewards": "rewards.yaml",
    }  # fmt: skip
    anchor = [{"class_path": "callbacks.LabelFileReward", "init_args": {"path": "labels.jsonl"}}]
    (tmp_path / "rewards.yaml").write_text(yaml.safe_dump(rewards))
    (tmp_path / "anchor.yaml").write_text(yaml.safe_dump(anchor))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "labels.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_people_label_the_warm_up_of_one_run_and_the_next_learns_from_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match=r"none of the \d+ responses"):
        first = run(folder, "fit", "first")
    assert [r["step"] for r in first] == [0] * 16 + [1] * 8
    assert all(r["weights"] == {"sevens": 0.5, "elevens": 0.5} for r in first)  # nothing was learned without labels
    assert all(r["rewards"]["labels"] is None for r in first)

    # these people care for what `sevens` says
    people = [{**r, "score": r["rewards"]["sevens"]} for r in first if r["step"] == 0]
    write(folder / "labels.jsonl", people)
    capsys.readouterr()
    second = run(folder, "fit", "second")
    said = capsys.readouterr().out
    assert "warm-up 16 of 16" in said
    assert [(r["prompt"], r["response"]) for r in second] == [(r["prompt"], r["response"]) for r in first]
    assert [r["rewards"]["labels"] for r in second[:16]] == [r["score"] for r in people]
    assert all(r["weights"]["sevens"] > 0.6 for r in second[16:])


@pytest.mark.slow
def test_people_label_the_responses_of_a_test(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=r"column 'score' to this run's samples_test\.jsonl"):
        first = run(folder, "test", "first")
    assert first
    write(folder / "labels.jsonl", [{**r, "score": 2} for r in first])
    capsys.readouterr()
    second = run(folder, "test", "second")
    assert f"responses with a label: test {len(first)} of {len(first)}\n" in capsys.readouterr().out
    assert [r["rewards"]["labels"] for r in second] == [2.0] * len(first)
