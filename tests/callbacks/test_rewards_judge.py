"""JudgeReward: what a rollout and a config see of it, and whole runs with a server that fails in every way."""

from __future__ import annotations

import csv
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from callbacks import JudgeReward
from maestro_pl.cli import main
from maestro_pl.errors import UserError
from maestro_pl.rollout import Rollout
from tests.support import KEY, Server, listed, make_rollout, reward_module


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.yaml"
    entries = {
        "default": {"prompt": "{prompt}|{reference}|{answer}|{extra}"},
        "duel": {"mode": "compare", "prompt": "{answer_a}|{answer_b}"},
    }
    file.write_text(yaml.safe_dump(entries))
    return str(file)


def make_reward(server: Server, prompts: str, **options: Any) -> JudgeReward:
    quick: dict[str, Any] = {"backoff_s": 0.01, "timeout_s": 60.0, "deadline_s": 600.0, "prompts": prompts}
    reward = JudgeReward("m", endpoint=server.url, **(quick | options))

    class Trainer:
        callbacks = [type("Writer", (Callback,), {"writes_rollout": True})(), reward]
        strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

    reward.setup(Trainer, None, "fit")  # type: ignore[arg-type]
    return reward


def score(reward: JudgeReward, rollout: Rollout) -> dict[str, float]:
    module = reward_module()
    reward.on_train_batch_start(None, module, {"rollout": rollout}, 0)  # type: ignore[arg-type]
    return module.logged  # type: ignore[no-any-return]


def test_scores_and_what_is_logged(server: Server, prompts: str) -> None:
    reply = {"good": "Verdict: correct", "bad": "Verdict: incorrect", "odd": "Hm."}
    server.answer = lambda body, number: reply[body["messages"][-1]["content"].split("|")[2]]
    reward = make_reward(server, prompts, price_in=3.0, price_out=15.0, asks=1)
    responses = ["<think>x</think><answer>good</answer>", "bad", "odd", "good"]
    rollout = make_rollout(responses, group_size=2, reference=["r", "s"], extra=[1, 2])
    with pytest.warns(UserWarning, match="malformed"):
        logged = score(reward, rollout)
    assert listed(rollout.rewards["judge"]) == [1, 0, None, 1]
    assert rollout.rewards["judge"].metrics["failed"].tolist() == [0, 0, 1, 0]
    asked = sorted(body["messages"][-1]["content"] for body in server.bodies)
    assert asked == ["prompt 0|r|bad|1", "prompt 0|r|good|1", "prompt 1|s|good|2", "prompt 1|s|odd|2"]
    assert {key: logged[f"judge/{key}"] for key in ("requests", "malformed", "failed", "judged", "cached")} == {
        "requests": 4, "malformed": 1, "failed": 1, "judged": 3, "cached": 0,
    }  # fmt: skip
    assert (logged["judge/tokens_in"], logged["judge/tokens_out"]) == (400, 40)
    assert logged["judge/cost"] == pytest.approx((400 * 3 + 40 * 15) / 1e6)
    assert logged["judge/failures_malformed"] == 1
    assert logged["judge/failures_timeout"] == 0

    resumed = make_reward(server, prompts, price_in=3.0, price_out=15.0)
    resumed.load_state_dict(json.loads(json.dumps(reward.state_dict())))
    assert resumed.totals == reward.totals
    logged = score(resumed, make_rollout(["good"], reference=["r"], extra=[3]))
    assert (logged["judge/requests"], logged["judge/tokens_in"]) == (5, 500)


def test_a_baseline_column(server: Server, prompts: str) -> None:
    server.answer = lambda body, number: "A" if body["messages"][-1]["content"].startswith("mine") else "B"
    reward = make_reward(server, prompts, baseline_column="base", name="duel", role="anchor")
    rollout = make_rollout(["mine"] * 3, task=["duel"] * 3, base=["theirs", None, math.nan])
    score(reward, rollout)
    assert listed(rollout.rewards["duel"]) == [1, None, None]
    assert rollout.rewards["duel"].metrics["failed"].tolist() == [0, 0, 0]
    assert reward.spec.role == "anchor"
    assert len(server.bodies) == 2


@pytest.mark.parametrize("structured", [False, True])
def test_structured_replies_are_asked_for(server: Server, prompts: str, structured: bool) -> None:
    reward = make_reward(server, prompts, structured=structured)
    score(reward, make_rollout(["good"], reference=["r"], extra=[3]))
    assert ["response_format" in body for body in server.bodies] == [structured]


def test_the_key_stands_in_no_config_state_or_attribute(server: Server, prompts: str) -> None:
    reward = make_reward(server, prompts)
    assert KEY not in json.dumps(reward.state_dict())
    assert KEY not in repr(vars(reward))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"votes": 0}, "votes is 0, expected a whole number of at least 1"),
        ({"concurrency": True}, "concurrency is True"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"deadline_s": math.inf}, "deadline_s is inf"),
        ({"temperature": -1}, "temperature is -1"),
        ({"price_in": 1.0}, "give both, or neither"),
        ({"votes": 3, "temperature": 0.0}, "asks for the same reply 3 times"),
        ({"votes": 3, "endpoint": "local"}, "a local judge is greedy"),
        ({"structured": True, "endpoint": "local"}, "structured is true, which only a server knows"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "toaster"}, "device is 'toaster'"),
        ({"api_key_env": "sk-abc"}, "no name of an environment variable"),
        ({"api_key_env": KEY.replace("-", "")}, "not shown here"),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        JudgeReward("m", **options)
    assert KEY not in str(caught.value)


def test_without_setup_there_is_no_judge() -> None:
    with pytest.raises(UserError, match="has no judge yet"):
        JudgeReward("m").score(make_rollout(["x"]), [0], reward_module())


def test_defaults() -> None:
    assert (JudgeReward("m").temperature, JudgeReward("m", votes=3).temperature) == (0.0, 0.7)
    assert JudgeReward("m").spec.name == "judge"


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``tiny.yaml`` and its data."""
    rows = [{"prompt": f"Say {i}", "reference": str(i), "task": "even", "extra": 1} for i in range(10)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"policy": {"model": str(tiny_qwen3), "dtype": "float32"}, "weigher": "maestro_pl.Conductor"},
        "data": {"sources": "data.jsonl", "fractions": [0.6, 0.2, 0.2], "batch_size": 2, "show": False},
        "rollout": {"group_size": 4, "eval_group_size": 2, "max_new_tokens": 4},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "num_sanity_val_steps": 0, "val_check_interval": 2},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewards_file(folder: Path, **options: Any) -> str:
    rewards = [
        {"class_path": "callbacks.LengthReward", "init_args": {"max": 3}},
        {"class_path": "callbacks.JudgeReward", "init_args": {"model": "m", **options}},
    ]
    (folder / "rewards.yaml").write_text(yaml.safe_dump(rewards))
    return "rewards.yaml"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_survives_a_server_that_fails_half_of_the_time_in_every_way(
    folder: Path, server: Server, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [500, None, b"{", 429, "Hm.", 404, b'{"choices": []}', "slow", (503, {"Retry-After": "0.01"}), ""]
    lock, judged = threading.Lock(), {"good": 0, "failures": 0}

    def answer(body: Any, number: int) -> Any:
        with lock:
            bad = number % 2 == 1
            judged["failures" if bad else "good"] += 1
            failure = failures[number // 2 % len(failures)]
        if bad and failure == "slow":
            server.hang()
        return failure if bad else "Verdict: correct"

    server.answer = answer
    seen: list[Rollout] = []
    scored = JudgeReward._score_rollout
    monkeypatch.setattr(
        JudgeReward,
        "_score_rollout",
        lambda self, rollout, module: seen.append(rollout) or scored(self, rollout, module),  # type: ignore[func-returns-value]
    )
    options = {"endpoint": server.url, "prompts": prompts, "retries": 0, "asks": 1, "timeout_s": 1.0, "concurrency": 1}
    rewards = rewards_file(folder, **options, price_in=1.0, price_out=2.0, cache="judge.sqlite")
    main(["fit", "--config", "tiny.yaml", "--rewards", rewards])

    assert judged["failures"] >= 8
    for rollout in seen:
        scores = rollout.rewards["judge"]
        assert set(scores.values_B[scores.mask_B].tolist()) <= {1.0}  # the judge never said "incorrect"
        assert scores.mask_B.tolist() == [failed == 0 for failed in scores.metrics["failed"].tolist()]
        assert not rollout.scalar_B.isnan().any()  # the other reward still counts
    masked = sum(int((~rollout.rewards["judge"].mask_B).sum()) for rollout in seen)
    assert masked >= judged["failures"]

    run = folder / "runs/tiny/version_0"
    rows = [row for row in read_csv(run / "metrics.csv") if row.get("judge/requests")]
    trained = [rollout for rollout in seen if rollout.group_size == 4]
    assert len(trained) == 2
    failed = sum(int((~rollout.rewards["judge"].mask_B).sum()) for rollout in trained)
    assert float(rows[-1]["judge/failed"]) == failed
    assert float(rows[-1]["judge/cost"]) > 0
    values = {row["metric"]: float(row["mean"]) for row in read_csv(run / "val_metrics.csv") if row["task"] == "all"}
    assert values["reward/judge"] == 1
    assert any(row.get("val/judge/requests") for row in read_csv(run / "metrics.csv"))
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert all(KEY.encode() not in path.read_bytes() for path in written)

    asked = len(server.bodies)
    server.answer = lambda body, number: "Verdict: incorrect"
    main(["test", "--config", "tiny.yaml", "--rewards", rewards, "--ckpt_path", str(run / "checkpoints/last.ckpt")])
    assert len(server.bodies) > asked
    tested = read_csv(folder / "runs/tiny/version_1/test_metrics.csv")
    assert {float(row["mean"]) for row in tested if row["metric"] == "reward/judge"} == {0.0}


def test_a_wrong_key_ends_in_a_sentence(
    folder: Path, server: Server, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda body, number: 401
    rewards = rewards_file(folder, endpoint=server.url, prompts=prompts)
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", "tiny.yaml", "--rewards", rewards])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert "HTTP 401: check the key in $OPENAI_API_KEY" in shown.err
    assert KEY not in shown.err + shown.out


@pytest.mark.slow
def test_the_sandbox_as_judge_is_a_metric_that_never_applies(folder: Path, prompts: str) -> None:
    options = {"model": "sandbox", "endpoint": "local", "prompts": prompts, "max_tokens": 3, "role": "metric"}
    with pytest.warns(UserWarning, match="malformed"):
        main(["fit", "--config", "tiny.yaml", "--rewards", rewards_file(folder, **options)])
    rows = read_csv(folder / "runs/tiny/version_0/metrics.csv")
    totals = [row for row in rows if row.get("judge/judged")]
    assert float(totals[-1]["judge/judged"]) == 0
    assert float(totals[-1]["judge/failed"]) == 16
    assert not any(row.get("reward/judge") for row in rows)


def test_two_judges_are_asked_together(server: Server, prompts: str) -> None:
    both = threading.Barrier(2)

    def answer(body: dict[str, Any], number: int) -> str:
        both.wait(20)  # until the other judge's request is here as well
        return "Verdict: correct" if body["model"] == "a" else "Verdict: incorrect"

    server.answer = answer
    judges = [JudgeReward(name, endpoint=server.url, prompts=prompts, name=name) for name in "ab"]
    for judge in judges:
        judge._judge = make_reward(server, prompts)._judge
        judge._judge.backend = judge._backend(torch.device("cpu"))  # type: ignore[union-attr]
    trainer, rollout, module = (
        SimpleNamespace(callbacks=judges, received_sigterm=False),
        make_rollout(["x"], reference=["r"], extra=[1]),
        reward_module(),
    )
    for judge in judges:
        judge.on_train_batch_start(trainer, module, {"rollout": rollout}, 0)  # type: ignore[arg-type]
    assert {name: listed(scores) for name, scores in rollout.rewards.items()} == {"a": [1], "b": [0]}
    assert (module.logged["a/requests"], module.logged["b/requests"]) == (1, 1)
    assert {"reward/a", "reward/b", "rewards"} == set(module.clock.seconds)
