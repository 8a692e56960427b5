"""``maestro-pl compare``: statistics worked out by hand, refusals, and what is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maestro_pl.cli import main
from maestro_pl.cli.compare import compare, comparison_of
from maestro_pl.errors import UserError
from maestro_pl.evaluation.compare_runs import Evaluated, Run, read_records, records_path
from maestro_pl.evaluation.compare_statistics import (
    Difference,
    Mean,
    bootstrap_means,
    difference_of,
    holm,
    mean_of,
    paired_test,
)
from maestro_pl.evaluation.compare_tables import (
    Comparison,
    escape,
    figure,
    latex,
    markdown,
    number,
    p_text,
    text_tables,
)

NAN = float("nan")
HEADER: dict[str, Any] = {
    "split": "test",
    "model": "m",
    "data": {"eval_limit": 4},
    "rollout": {"eval_group_size": 1, "temperature": 1.0},
}


def run_of(name: str, *seeds: dict[str, list[float]], metric: str = "reward/x") -> Run:
    """A run whose prompts are called p0, p1, ... in each task; one dictionary of tasks a seed."""
    parts = []
    for tasks in seeds:
        values = {(task, f"p{i}"): v for task, numbers in tasks.items() for i, v in enumerate(numbers)}
        parts.append([Evaluated(Path(name, "test-0", "test_prompts.csv"), HEADER, {metric: values})])
    return Run(name, parts)


def write_run(folder: Path, values: dict[str, list[float]], metric: str = "reward/x", **header: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = {f"p{i}": f"the prompt {i}" for numbers in values.values() for i in range(len(numbers))}
    (folder / "test_prompts.json").write_text(json.dumps({**HEADER, **header, "prompts": prompts}))
    with (folder / "test_prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "task", "metric", "value"])
        writer.writerows([f"p{i}", task, metric, v] for task, numbers in values.items() for i, v in enumerate(numbers))
    return folder


def test_mcnemar_by_hand() -> None:
    # 8 discordant pairs, 1 against 7: 2 * (1 + 8) / 2**8
    ours = np.array([1.0] * 7 + [0.0] + [1.0] * 5)
    theirs = np.array([0.0] * 7 + [1.0] + [1.0] * 5)
    name, p = paired_test(ours, theirs)
    assert name == "mcnemar"
    assert p == pytest.approx(18 / 256)
    assert paired_test(ours, ours) == ("mcnemar", 1.0)


def test_wilcoxon_and_sign_by_hand() -> None:
    # five positive differences of different size: both tests have the smallest p of 5 pairs, 2 / 2**5
    ours, theirs = np.array([1.1, 2.2, 3.3, 4.4, 5.5]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert paired_test(ours, theirs) == ("wilcoxon", pytest.approx(2 / 32))
    assert paired_test(ours, theirs, "sign") == ("sign", pytest.approx(2 / 32))
    # differences +1, +2, -3: the ranks of the positives sum to 3, those of the negative to 3
    assert paired_test(np.array([1.0, 2.0, 0.0]), np.array([0.0, 0.0, 3.0])) == ("wilcoxon", pytest.approx(1.0))
    assert paired_test(theirs, theirs) == ("wilcoxon", 1.0)
    assert paired_test(theirs, theirs, "sign") == ("sign", 1.0)
    with pytest.raises(UserError, match="needs values of 0 and 1"):
        paired_test(ours, theirs, "mcnemar")


def row_of(task: str, p: float, metric: str = "m") -> Difference:
    return Difference("a", "b", metric, task, 0.1, 0.0, 0.2, 10, 0, "wilcoxon", p, p, 1.0, 5, 4, 1)


def test_holm_by_hand_and_in_families() -> None:
    rows = [row_of("t1", 0.01), row_of("t2", 0.04), row_of("t3", 0.03), row_of("all", 0.02), row_of("t1", 0.5, "n")]
    # 3 * 0.01; then 2 * 0.03; then max(1 * 0.04, 0.06)
    assert [row.p_holm for row in holm(rows)] == pytest.approx([0.03, 0.06, 0.06, 0.02, 0.5])


def test_a_paired_difference_by_hand() -> None:
    ours = np.array([[1.0], [2.0], [4.0], [NAN], [7.0]])
    theirs = np.array([[0.0], [2.0], [1.0], [5.0], [NAN]])
    row = difference_of(("a", "b"), "m", "t", ours, theirs, "auto", 1000, 0, 0.95)
    assert row is not None
    assert row.difference == pytest.approx(4 / 3)  # 1, 0 and 3
    assert (row.n, row.unpaired, row.better, row.worse, row.ties) == (3, 2, 2, 0, 1)
    assert row.effect == pytest.approx((4 / 3) / np.std([1, 0, 3], ddof=1))
    assert 0.0 <= row.low < 4 / 3 < row.high <= 3.0
    nothing = np.full((2, 1), NAN)
    assert difference_of(("a", "b"), "m", "t", nothing, np.ones((2, 1)), "auto", 100, 0, 0.95) is None
    assert mean_of("a", "m", "t", nothing, 100, 0, 0.95) is None


def test_equal_runs_differ_by_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(30, 1))
    row = difference_of(("a", "b"), "m", "t", values, values.copy(), "auto", 500, 0, 0.95)
    assert row is not None
    assert (row.difference, row.low, row.high, row.p, row.effect, row.ties) == (0.0, 0.0, 0.0, 1.0, None, 30)


def test_the_bootstrap_of_a_mean_has_its_standard_error() -> None:
    values = np.arange(50.0)[:, None]
    draws = bootstrap_means(values, None, 20_000, np.random.default_rng(0))
    assert draws.mean() == pytest.approx(24.5, abs=0.1)
    assert draws.std() == pytest.approx(np.arange(50.0).std() / np.sqrt(50), rel=0.03)


def test_seeds_are_drawn_too() -> None:
    # every prompt is alike, so all that varies is the seed: two seeds, 0 and 1, drawn with replacement
    values = np.tile([0.0, 1.0], (20, 1))
    draws = bootstrap_means(values, None, 4000, np.random.default_rng(0))
    assert sorted(set(draws)) == pytest.approx([0.0, 0.5, 1.0])
    assert (np.isclose(draws, 0.5)).mean() == pytest.approx(0.5, abs=0.03)
    mean = mean_of("a", "m", "t", values, 500, 0, 0.95)
    assert mean is not None
    assert (mean.mean, mean.seeds, mean.low, mean.high) == (0.5, 2, 0.0, 1.0)
    assert mean.seed_sd == pytest.approx(np.sqrt(0.5))


def test_a_value_that_one_seed_lacks_leaves_the_others() -> None:
    values = np.array([[1.0, NAN], [3.0, 5.0]])
    draws = bootstrap_means(values, None, 4000, np.random.default_rng(1))
    # prompt 0 is always 1 if it is seen; prompt 1 is 3, 4 or 5; twice prompt 0 and twice the seed without it is nothing
    assert np.nanmin(draws) == 1.0
    assert np.nanmax(draws) == 5.0
    assert np.isnan(draws).mean() == pytest.approx(1 / 16, abs=0.015)
    mean = mean_of("a", "m", "t", values, 200, 0, 0.95)
    assert mean is not None
    assert mean.mean == pytest.approx(2.5)


@pytest.mark.slow
def test_a_comparison_is_the_same_each_time_and_whatever_else_is_compared() -> None:
    rng = np.random.default_rng(3)
    runs = [run_of(name, {"t": list(rng.normal(size=20)), "u": list(rng.normal(size=20))}) for name in "abc"]
    three, two = comparison_of(runs, baseline="a", resamples=500), comparison_of(runs[:2], baseline="a", resamples=500)
    assert three == comparison_of(runs, baseline="a", resamples=500)
    assert [d.low for d in three.differences if d.run == "b"] == [d.low for d in two.differences]
    assert [(d.run, d.baseline) for d in comparison_of(runs, resamples=500).differences][:3] == [
        ("b", "a"), ("c", "a"), ("c", "b"),
    ]  # fmt: skip


def test_all_tasks_is_over_every_prompt() -> None:
    runs = [run_of("a", {"t": [1.0, 1.0], "u": [4.0]}), run_of("b", {"t": [0.0, 0.0], "u": [1.0]})]
    made = comparison_of(runs, baseline="b", resamples=100)
    assert {d.task: d.difference for d in made.differences} == pytest.approx({"t": 1.0, "u": 3.0, "all": 5 / 3})


def test_other_prompts_are_refused_with_counts_and_examples(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", {"t": [1.0, 2.0, 3.0], "u": [1.0]})
    other = write_run(tmp_path / "other", {"t": [1.0], "u": [1.0]})
    with pytest.raises(UserError) as caught:
        compare([str(one), str(other)])
    text = str(caught.value)
    assert "t: 2 only in one (such as p1: 'the prompt 1'), 1 in both" in text
    assert "u:" not in text
    with pytest.raises(UserError, match="not evaluated on the same prompts"):
        compare([f"a={one},{other}", str(one)])


def test_what_cannot_be_compared_is_a_sentence(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, {"t": [1.0, 0.0, 1.0]}) for name in ("one", "two"))
    half = write_run(tmp_path / "half", {"t": [0.5, 0.0, 1.0]})
    (tmp_path / "empty").mkdir()
    file = str(one / "test_prompts.csv")
    for arguments, sentence in (
        ([str(one)], "only the run 'one': give at least two"),
        ([str(one), str(one)], "Two runs are called 'one'"),
        ([str(one), str(tmp_path / "none")], "There is no folder"),
        ([str(one), str(tmp_path / "empty")], "maestro-pl test"),
        ([str(one), str(two), "--metric", "reward/y"], "did you mean reward/x"),
        ([str(one), str(two), "--baseline", "three"], "one of one, two"),
        ([str(one), str(half), "--test", "mcnemar"], "needs values of 0 and 1"),
        ([str(one), str(two), "--resamples", "1"], "at least 100"),
        ([f"a={one},{one}", str(two)], "names a folder twice"),
        (["a=", str(two)], "expected NAME=FOLDER"),
        ([str(one), str(two), "--nonsense"], "unrecognized arguments"),
        ([str(tmp_path), str(one)], "holds 3 evaluations"),
        (
            [str(one), str(two), "--out", file],
            f"argument --out: '{file}' cannot be a folder, because '{file}' is a file: name another;",
        ),
        (
            [str(one), str(two), "--out", f"{file}/x"],
            f"'{file}/x' cannot be a folder, because '{file}' is a file: name another;",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            compare(arguments)
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(one)])
    assert caught.value.code == 2


def test_a_spoiled_file_is_a_sentence(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", {"t": [1.0]})
    path = folder / "test_prompts.csv"
    for content, sentence in (
        ("prompt,task,value\n", "expected the columns"),
        ("prompt,task,metric,value\np0,t,m,abc\n", "line 2"),
        ("prompt,task,metric,value\np0,t\n", "line 2"),
        ("prompt,task,metric,value\n", "has no values"),
        ("", "expected the columns"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=sentence):
            read_records(path)
    for content, sentence in (
        (b"prompt,task,metric,value\np0,t,m,\xff\n", "cannot be read .*utf-8"),
        (b"prompt,task,metric,value\np0,t,m,1\np0,t,m,nan\n", "line 3: m of the prompt p0 of t stands twice"),
        (b"prompt,task,metric,value\np0,t,m,-inf\n", "line 2: m is -inf, expected a finite number or nan"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            read_records(path)
    for header, sentence in (
        ("[]", r"holds \[\], expected an object"),
        ('{"prompts": [1]}', r"prompts is \[1\], expected an object of texts"),
        ('{"prompts": {"p0": 1}}', "expected an object of texts"),
        ('{"data": 3}', "data is 3, expected an object of settings"),
        ('{"rollout": null}', "rollout is None, expected"),
    ):
        (folder / "test_prompts.json").write_text(header)
        with pytest.raises(UserError, match=sentence):
            read_records(path)
    (folder / "test_prompts.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_records(path)


def test_the_newest_file_of_a_folder_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"t": [1.0]})
    for place in (2, 10):
        (folder / f"test_prompts-{place}.csv").write_text("")
    assert records_path(folder, "test").name == "test_prompts-10.csv"
    assert records_path(tmp_path, "test").name == "test_prompts-10.csv"


def test_compare_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_run(tmp_path / "one", {"t_1": [1.0, 1.0, 1.0, NAN], "u": [1.0, 0.0]})
    two = write_run(tmp_path / "two", {"t_1": [0.0, 0.0, 1.0, 1.0], "u": [1.0, 0.0]}, data={"eval_limit": 9})
    compare([f"A&B={one}", f"base={two}", "--baseline", "base", "--resamples", "200", "--out", str(tmp_path / "out")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "data.eval_limit is 4 in A&B and 9 in base" in shown
    assert "1 prompts left out" in shown
    assert "exact McNemar" in shown
    with (tmp_path / "out/differences.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["t_1", "u", "all"]
    assert (rows[0]["n"], rows[0]["unpaired"], rows[0]["test"]) == ("3", "1", "mcnemar")
    assert float(rows[0]["p"]) == 0.5  # two discordant pairs, both in favour
    assert rows[1]["effect"] == ""
    tex = (tmp_path / "out/compare.tex").read_text()
    assert r"A\&B & \textbf{1.000}" in tex
    assert r" & t\_1 & u & all \\" in tex
    assert "% reward/x\n\\begin{tabular}{lccc}\n\\toprule\n" in tex
    assert "\n\\bottomrule\n\\end{tabular}\n\n% * differs from base" in tex
    assert (tmp_path / "out/compare.png").stat().st_size > 1000
    assert "| t_1 | A&B | +0.667 |" in (tmp_path / "out/compare.md").read_text()


def write_experiment(folder: Path, cells: dict[str, dict[str, str]], values: dict[str, dict[str, list[float]]]) -> Path:
    axes = {axis: [] for levels in cells.values() for axis in levels}
    listed = [{"name": name, "levels": levels} for name, levels in cells.items()]
    folder.mkdir()
    (folder / "experiment.json").write_text(json.dumps({"axes": axes, "cells": listed}))
    for name, numbers in values.items():
        write_run(folder / "cells" / name / "test-0", numbers)
        (folder / "cells" / name / "done.json").write_text("{}")
    return folder


def test_cells_of_an_experiment_are_grouped_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {f"{m}__seed{s}": {"method": m, "seed": str(s)} for m in ("a", "b") for s in (0, 1)}
    values = {"a__seed0": {"t": [1.0, 2.0]}, "a__seed1": {"t": [3.0, 4.0]}, "b__seed0": {"t": [1.0, 1.0]}}
    folder = write_experiment(tmp_path / "grid", cells, values)
    compare([str(folder), "--baseline", "b", "--resamples", "100", "--out", str(tmp_path / "out")])
    assert "1 cells are not done and left out: b__seed1" in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "out/means.csv").open(newline="") as file:
        means = {row["run"]: row for row in csv.DictReader(file)}
    assert (means["a"]["mean"], means["a"]["seeds"], means["b"]["seeds"]) == ("2.5", "2", "1")
    assert float(means["a"]["seed_sd"]) == pytest.approx(np.std([1.5, 3.5], ddof=1))
    with (tmp_path / "out/seeds.csv").open(newline="") as file:
        rows = [(row["run"], row["seed"], row["task"], float(row["mean"]), row["n"]) for row in csv.DictReader(file)]
    assert rows == [("a", "0", "t", 1.5, "2"), ("a", "1", "t", 3.5, "2"), ("b", "0", "t", 1.0, "2")]
    with pytest.raises(UserError, match="no such axis"):
        compare([str(folder), "--by", "methd"])


def test_the_means_of_seeds_say_which_seed(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{seed}/test-0", {"t": values, "u": [NAN, 0.25]}, seed=seed)
        for seed, values in ((7, [1.0, NAN]), (3, [2.0, 4.0]))
    ]
    bare = write_run(tmp_path / "bare/test-0", {"t": [0.0, 0.0], "u": [NAN, 1.0]})
    compare([f"a={folders[0]},{folders[1]}", f"b={bare}", "--resamples", "100", "--out", str(tmp_path / "out")])
    with (tmp_path / "out/seeds.csv").open(newline="") as file:
        rows = [(r["run"], r["seed"], r["task"], float(r["mean"]), r["n"]) for r in csv.DictReader(file)]
    assert rows == [
        *[("a", "7", "t", 1.0, "1"), ("a", "3", "t", 3.0, "2"), ("b", "0", "t", 0.0, "2")],
        *[("a", "7", "u", 0.25, "1"), ("a", "3", "u", 0.25, "1"), ("b", "0", "u", 1.0, "1")],
        *[("a", "7", "all", 0.625, "2"), ("a", "3", "all", 6.25 / 3, "3"), ("b", "0", "all", 1 / 3, "3")],
    ]


def test_a_spoiled_experiment_is_a_sentence(tmp_path: Path) -> None:
    folder = write_experiment(tmp_path / "grid", {"a": {"m": "a"}}, {"a": {"t": [1.0]}})
    for summary, sentence in (
        ("[]", "expected axes and a list of cells"),
        ('{"axes": 3, "cells": []}', "expected axes and a list of cells"),
        ('{"axes": {"m": []}, "cells": ["x"]}', "has the cell 'x', expected a name and a level of m"),
        ('{"axes": {"m": []}, "cells": [{"name": "x", "levels": {}}]}', "expected a name and a level of m"),
        ('{"axes": {}, "cells": [{"name": "x", "levels": {"seed": [0]}}]}', "expected a name and a level of each axis"),
        ('{"axes": {}, "cells": [{"name": 3, "levels": {}}]}', "expected a name"),
        ("{", "cannot be read"),
    ):
        (folder / "experiment.json").write_text(summary)
        with pytest.raises(UserError, match=sentence):
            compare([str(folder)])


def test_the_newest_evaluation_of_a_cell_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {name: {"m": name} for name in "ab"}
    folder = write_experiment(tmp_path / "grid", cells, {name: {"t": [1.0, 2.0]} for name in cells})
    write_run(folder / "cells/a/test-10", {"t": [5.0, 6.0]})
    write_run(folder / "cells/a/test-old", {"t": [7.0, 8.0]})  # not the scheduler's
    compare([str(folder), "--resamples", "100"])
    assert "5.500" in capsys.readouterr().out


def test_a_metric_without_a_value_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, {"t": [NAN, NAN]})) for name in ("one", "two")]
    compare([*runs, "--out", str(tmp_path / "out")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "reward/x: no prompt of any run has a value, so there is nothing to compare." in shown
    assert "two-sided" not in shown
    columns = "run,baseline,metric,task,difference,low,high,n,unpaired,test,p,p_holm,effect,better,worse,ties"
    assert (tmp_path / "out/differences.csv").read_text() == f"{columns}\n"
    half = str(write_run(tmp_path / "half", {"t": [NAN, 1.0]}))
    compare([runs[0], half])
    assert "no prompt has a value in both of two compared runs" in " ".join(capsys.readouterr().out.split())


def test_other_axes_must_hold_other_prompts(tmp_path: Path) -> None:
    cells = {f"{m}__{k}": {"method": m, "task": k} for m in ("a", "b") for k in ("t", "u")}
    apart = write_experiment(tmp_path / "apart", cells, {name: {name[-1]: [1.0, 2.0]} for name in cells})
    compare([str(apart), "--by", "method", "--resamples", "100"])
    same = write_experiment(tmp_path / "same", cells, {name: {"t": [1.0, 2.0]} for name in cells})
    with pytest.raises(UserError, match="name the axis in which they differ in --by"):
        compare([str(same), "--by", "method"])


def test_axes_are_of_experiments_only(tmp_path: Path) -> None:
    one, two = (str(write_run(tmp_path / name, {"t": [1.0, 0.0]})) for name in ("one", "two"))
    runs = f"{one}, {two} are runs, and only an experiment's folder has axes: give one, or leave"
    for options, sentence in (
        (["--by", "seed"], f"--by seed: {runs} it out."),
        (["--by", "a,b", "--where", "x=1"], f"--by a,b --where x=1: {runs} them out."),
    ):
        with pytest.raises(UserError) as caught:
            compare([one, two, *options])
        assert str(caught.value) == sentence
    cells = {name: {"m": name} for name in "ab"}
    grid = write_experiment(tmp_path / "grid", cells, {name: {"t": [1.0, 2.0]} for name in cells})
    compare([str(grid), one, "--where", "m=a", "--resamples", "100"])


def test_a_task_with_the_name_of_the_row_over_all_is_refused_beside_others() -> None:
    with pytest.raises(UserError) as caught:
        comparison_of([run_of(name, {"all": [1.0, 2.0], "t": [3.0]}) for name in "ab"], resamples=100)
    assert str(caught.value) == (
        "a has a task called 'all', the name of the row over all tasks: give it another name under data.sources, and "
        "evaluate the runs again."
    )
    alone = comparison_of([run_of(name, {"all": [1.0, 2.0]}) for name in "ab"], resamples=100)
    assert [(mean.task, mean.n) for mean in alone.means] == [("all", 2)] * 2


@pytest.mark.filterwarnings("error")
def test_a_seed_in_which_a_metric_applies_nowhere_does_not_count() -> None:
    nowhere = {"t": [NAN, NAN]}
    runs = [run_of("a", {"t": [1.0, 2.0]}, nowhere), run_of("b", {"t": [1.0, 2.0]}, {"t": [3.0, 4.0]}, nowhere)]
    first, second = comparison_of(runs, resamples=100).means
    assert (first.mean, first.seeds, first.seed_sd) == (1.5, 1, None)
    assert (second.mean, second.seeds, second.seed_sd) == (2.5, 2, pytest.approx(2**0.5))


def test_latex_is_escaped() -> None:
    assert escape(r"a_b & 50% $x^2$ {~} #1 \n") == (
        r"a\_b \& 50\% \$x\textasciicircum{}2\$ \{\textasciitilde{}\} \#1 \textbackslash{}n"
    )


def test_numbers_as_text() -> None:
    assert [number(value) for value in (9.9994, -10.0, 999.94, 1000.0)] == ["9.999", "-10.0", "999.9", "1000"]
    assert [p_text(p) for p in (0.00099, 0.001)] == ["<.001", "0.001"]


@pytest.mark.parametrize(("p", "star"), [(0.0499, "$^{*}$"), (0.05, "")])
def test_what_is_bold_starred_and_to_the_right(p: float, star: str) -> None:
    means = [Mean("a", "m", "t", 0.5, 0.4, 0.6, 5, 1, None), Mean("b", "m", "t", 0.25, 0.2, 0.3, 5, 1, None)]
    made = Comparison(["a", "b"], ["m"], ["t"], means, [row_of("t", p)], "b")
    assert rf"a & \textbf{{0.500}}{star} {{\scriptsize [0.400, 0.600]}} \\" in latex(made)
    assert r"b & 0.250 {\scriptsize [0.200, 0.300]} \\" in latex(made)
    alone = Comparison(["a"], ["m"], ["t"], means[:1], [], None)
    assert r"a & 0.500 {\scriptsize [0.400, 0.600]} \\" in latex(alone)  # best of one is no best
    assert "| task | run | mean |" in markdown(made)
    assert "\n| --- | --- | ---: | ---: |" in markdown(made)
    assert [column.justify for column in text_tables(made)[0].columns[:3]] == ["left", "left", "right"]


def test_a_task_that_no_run_has_a_value_for_is_a_dash() -> None:
    runs = [run_of(name, {"t": [NAN, NAN], "u": [1.0, 0.5]}) for name in "ab"]
    made = comparison_of(runs, baseline="a", resamples=100)
    assert "a & -- & " in latex(made)
    assert "| t |" not in markdown(made)
    assert len(figure(made).axes) == 1


def test_a_figure_of_many_runs_names_each_beside_its_mark() -> None:
    names = [f"a rather long name of run {i}" for i in range(17)]
    means = [mean_of(n, "m", t, np.array([[0.1 * i], [0.2]]), 100, 0, 0.95) for i, n in enumerate(names) for t in "tu"]
    made = Comparison(names, ["m"], ["t", "u"], [mean for mean in means if mean is not None], [], names[0])
    drawn = figure(made)
    drawn.canvas.draw()
    panels = drawn.get_axes()
    assert [axis.get_title() for axis in panels] == ["t", "u"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == names
    assert not drawn.legends
    inside = drawn.bbox
    for label in panels[0].get_yticklabels():
        box = label.get_window_extent()
        assert inside.x0 <= box.x0 < box.x1 <= inside.x1
