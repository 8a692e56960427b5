"""Mathematical equality in a child process, with answers that hang it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from callbacks.rewards.math import MathReward
from maestro_pl.errors import UserError
from maestro_pl.rewards import math as rewards_math
from maestro_pl.rewards.math import MathComparer, math_score
from tests.support import make_rollout, run


@pytest.fixture(scope="module")
def comparer() -> Iterator[MathComparer]:
    comparer = MathComparer(seconds=10.0)
    yield comparer
    comparer.close()


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("4", "4", "equal"),
        ("4.0", "4", "equal"),
        ("1/2", r"\frac{2}{4}", "equal"),
        (r"\frac{1}{2}", "0.5", "equal"),
        (r"\boxed{12}", "12", "equal"),
        (r"The answer is $x^2 + 2x + 1$.", "(x+1)^2", "equal"),
        ("x^2+1", "y+1", "different"),
        ("x+1", "1+x", "equal"),
        (r"\sqrt{8}", r"2\sqrt{2}", "equal"),
        ("1,000", "1000", "equal"),
        (r"\{1, 2\}", r"\{2, 1\}", "equal"),
        ("5", "4", "different"),
        ("-4", "4", "different"),
        ("", "4", "different"),
        ("no idea", "4", "different"),
        ("\u6c49\u5b57 \U0001f600", "4", "different"),
        ("word " * 2000, "4", "different"),
        ("4", "because of the rain", "no_reference"),
        ("\uff17", "7", "equal"),  # full width
        ("\uff11\uff18", "18", "equal"),
        ("7", "\uff17", "equal"),
        ("\u0667", "7", "equal"),  # Arabic
        ("\u22127", "-7", "equal"),
        ("`7`", "7", "equal"),
        ("7\x00", "7", "equal"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "equal"),
        (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "different"),
        ("7!!!!!!!!!", "7", "failed"),
        ("7", "7!!!!!!!!!", "unreadable_reference"),
    ],
)
def test_verdicts(comparer: MathComparer, answer: str, reference: str, verdict: str) -> None:
    assert comparer.compare(answer, [reference]) == verdict


def test_a_reference_that_takes_too_long_is_not_the_answers_fault(comparer: MathComparer) -> None:
    assert comparer.compare("4", ["4"]) == "equal"
    comparer.seconds = 0.5
    for answer in ("7", "8"):  # the second is not waited for
        assert comparer.compare(answer, ["9^{9^{9^9}}"]) == "unreadable_reference"
    assert comparer._process is None
    comparer.seconds = 10.0
    assert comparer.compare("9^{9}", ["387420489"]) == "equal"


def test_any_of_several_references(comparer: MathComparer) -> None:
    assert comparer.compare("7", ["no number", "3", "7"]) == "equal"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("10^{10^{10}}", "timed_out"),
        (r"\boxed{9^{9^{9^9}}}", "timed_out"),
        ("(" * 300 + "7" + ")" * 300, "timed_out"),
        ("9999999999!", "timed_out"),
        ("\\frac{" * 1000 + "1" + "}{2}" * 1000, "timed_out"),
        ("2^" * 600 + "1", "failed"),  # too deep for the interpreter's stack
        ("x" * 10_000, "different"),
    ],
)
def test_a_comparison_that_breaks_is_named_and_the_next_works(
    comparer: MathComparer, answer: str, verdict: str
) -> None:
    assert comparer.compare("4", ["4"]) == "equal"  # the process is there before the clock starts
    comparer.seconds = 0.5 if verdict == "timed_out" else 10.0
    assert comparer.compare(answer, ["17"]) == verdict
    comparer.seconds = 10.0
    assert comparer.compare("4", ["4"]) == "equal"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of address space")
def test_out_of_memory_is_a_failure() -> None:
    comparer = MathComparer(seconds=30.0, megabytes=300)
    assert comparer.compare("2^{1000000000}", ["17"]) == "failed"
    assert comparer.compare("4", ["4"]) == "equal"
    comparer.close()


@pytest.mark.slow
def test_the_process_is_killed_at_the_limit_and_at_the_end() -> None:
    comparer = MathComparer(seconds=0.001)
    assert comparer.compare(r"\frac{1}{2}+x", ["1"]) in ("timed_out", "unreadable_reference")
    comparer.seconds = 5.0
    comparer._unreadable.clear()
    assert comparer.compare("1", ["1"]) == "equal"
    process = comparer._process
    assert process is not None
    process.kill()
    assert comparer.compare("1", ["1"]) == "equal"  # another process answers
    process = comparer._process
    assert process is not None
    del comparer
    assert process.poll() is not None


def test_scores() -> None:
    assert [math_score(v) for v in ("equal", "different", "timed_out", "failed")] == [1, 0, 0, 0]
    assert [math_score(v) for v in ("no_reference", "unreadable_reference")] == [None, None]


def test_the_callback() -> None:
    reward = MathReward()
    texts = ["<think>2</think><answer>$0.5$</answer>", "<answer>2</answer>", "1/2", "1/2"]
    with pytest.warns(UserWarning, match=r"1 of 4 responses have a reference that holds no .* such as 'as it rains'"):
        scores = run(reward, make_rollout(texts, reference=["1/2", "1/2", "as it rains", None]))
    assert scores.values_B.tolist() == [1, 0, 0, 0]
    assert scores.mask_B.tolist() == [True, True, False, False]
    assert scores.metrics["timed_out"].tolist() == scores.metrics["failed"].tolist() == [0, 0, 0, 0]
    assert scores.metrics["unreadable_reference"].tolist() == [0, 0, 1, 0]
    process = reward._comparer._process  # type: ignore[union-attr]
    reward.teardown(None, None, "fit")  # type: ignore[arg-type]
    assert process is not None
    assert process.poll() is not None


def test_the_callback_warns_once_of_comparisons_without_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MathComparer, "compare", lambda self, answer, references: "timed_out")
    reward = MathReward(seconds=3)
    with pytest.warns(UserWarning, match="of 1 comparisons 1 took longer than 3 s and 0 failed"):
        scores = run(reward, make_rollout(["4"], reference=["4"]))
    assert (scores.values_B.tolist(), scores.mask_B.tolist()) == ([0], [True])
    assert scores.metrics["timed_out"].tolist() == [1]
    run(reward, make_rollout(["4"], reference=["4"]))


def test_references_are_compared_as_texts_where_asked() -> None:
    reward = MathReward(text=True)
    texts = ["As it rains.", "It is dry", "1/2", r"\text{Evelyn}", "Evelyn"]
    references = ["as it rains", "as it rains", "0.5", r"\text{Evelyn}", r"\text{Evelyn}"]
    scores = run(reward, make_rollout(texts, reference=references))
    assert scores.values_B.tolist() == [1, 0, 1, 1, 1]
    assert scores.mask_B.all()
    reward.close()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_math.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[benchmarks\]'"):
        MathComparer()
    with pytest.raises(UserError, match="seconds is 0"):
        MathReward(seconds=0)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_the_process_ends_when_its_parent_is_killed() -> None:
    code = (
        "from maestro_pl.rewards.math import MathComparer\n"
        "import time\n"
        "comparer = MathComparer()\n"
        "assert comparer.compare('1/2', ['0.5']) == 'equal'\n"
        "print(comparer._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by ten seconds")


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not collected by anybody yet does not."""
    status = Path(f"/proc/{pid}/stat")
    if status.parent.parent.is_dir() and Path("/proc/self/stat").exists():
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
