"""``maestro-pl init``: what it finds in data of different kinds, and that a run starts from what it writes."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maestro_pl.cli import main
from maestro_pl.cli.first_config import flow
from maestro_pl.cli.init import init
from maestro_pl.data.survey import survey
from maestro_pl.errors import UserError

SUMS = [(f"What is {a} + {b}?", a + b) for a in range(2, 6) for b in range(3, 6)]
PLACES = ["Rome", "Paris", "Oslo", "Bern", "Lima", "Cairo", "Quito", "Delhi", "Seoul", "Tunis", "Minsk", "Sofia"]
STORY = "Once upon a time there was a small grey mouse who lived in a house by the sea and dreamed of cheese. "


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def gsm8k(folder: Path) -> str:
    rows = [{"question": q, "answer": f"We add <<them>>.\n#### {total}"} for q, total in SUMS]
    return jsonl(folder / "gsm8k.jsonl", rows)


def chat(folder: Path) -> str:
    rows = [
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Tell me of {place}."},
                      {"role": "assistant", "content": f"{place} is a city with many streets, and people who walk in them."}]}
        for place in PLACES
    ]  # fmt: skip
    return jsonl(folder / "chat.jsonl", rows)


def completions(folder: Path) -> str:
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion"])
        writer.writerows((f"The capital that begins with {place[0]}?", place) for place in PLACES)
    return str(folder / "pairs.csv")


def mmlu(folder: Path) -> str:
    rows = [
        {"question": q, "choices": [str(n + i) for i in range(-1, 3)], "answer": 1, "subject": "sums"} for q, n in SUMS
    ]
    (folder / "mmlu.json").write_text(json.dumps(rows))
    return str(folder / "mmlu.json")


def verl(folder: Path) -> str:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"data_source": "sums", "prompt": [{"role": "user", "content": q}], "ability": "math",
         "reward_model": {"style": "rule", "ground_truth": str(total)}, "extra_info": {"index": i, "answer": f"so {total}"}}
        for i, (q, total) in enumerate(SUMS)
    ]  # fmt: skip
    shards = folder / "verl"
    shards.mkdir()
    for name, part in (("part-0", rows[:6]), ("part-1", rows[6:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), shards / f"{name}.parquet")
    return str(shards)


def stories(folder: Path) -> str:
    with gzip.open(folder / "stories.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": f"Tell a story about {place}."}) + "\n" for place in PLACES)
    return str(folder / "stories.jsonl.gz")


def translation(folder: Path) -> str:
    rows = [{"translation": {"en": f"{STORY}{place}", "de": f"Es war einmal eine Maus in {place}, die von Käse träumte."}}
            for place in PLACES]  # fmt: skip
    return jsonl(folder / "books.jsonl", rows)


def mixed(folder: Path) -> str:
    rows: list[dict[str, Any]] = [{"kind": "sums", "question": q, "answer": str(total)} for q, total in SUMS]
    rows += [{"kind": "tales", "question": f"Write about {place}.", "answer": STORY + place} for place in PLACES]
    return jsonl(folder / "mixed.jsonl", rows)


def sharegpt(folder: Path) -> str:
    rows = [
        {
            "id": i,
            "conversations": [{"from": "human", "value": f"How is {place}?"}, {"from": "gpt", "value": STORY + place}],
        }
        for i, place in enumerate(PLACES)
    ]
    return jsonl(folder / "sharegpt.jsonl", rows)


def several(folder: Path) -> str:
    rows = [{"context": f"{place} lies in the hills.", "question": f"Where does {place} lie?", "id": place,
             "answers": {"text": ["in the hills", "the hills"], "answer_start": [1, 2]}} for place in PLACES]  # fmt: skip
    return jsonl(folder / "squad.jsonl", rows)


#: data -> (its source, the rewards, the kinds of reward among them that the Conductor is anchored on, the system prompt)
KINDS: dict[str, tuple[Callable[[Path], str], dict[str, Any], list[str], list[str], bool]] = {
    "gsm8k": (
        gsm8k,
        {"columns": {"prompt": "question", "reference": "answer"}, "reference_pattern": r"####\s*(.+)"},
        ["ExactMatchReward", "FormatReward", "PerplexityReward", "LengthReward"],
        ["ExactMatchReward"],
        True,
    ),
    "chat": (chat, {"last_assistant": "reference"}, ["TranslationReward", "LengthReward"], ["TranslationReward"], False),
    "completions": (
        completions,
        {"columns": {"reference": "completion"}},
        ["ExactMatchReward", "FormatReward", "PerplexityReward", "LengthReward"],
        ["ExactMatchReward"],
        True,
    ),
    "mmlu": (
        mmlu,
        {"columns": {"label": "answer"}, "prompt_template": "{question}\n{choices!o}"},
        ["ChoiceReward", "FormatReward", "LengthReward"],
        ["ChoiceReward"],
        True,
    ),
    "verl": (
        verl,
        {"columns": {"reference": "reward_model.ground_truth"}},
        ["ExactMatchReward", "FormatReward", "PerplexityReward", "LengthReward"],
        ["ExactMatchReward"],
        True,
    ),
    "stories": (stories, {}, ["LengthReward", "EntropyReward"], [], False),
    "translation": (
        translation,
        {"columns": {"reference": "translation.de"}, "prompt_template": "Translate into German:\n{translation.en}"},
        ["TranslationReward", "LengthReward"],
        ["TranslationReward"],
        False,
    ),
    "mixed": (
        mixed,
        {"task": "sums", "where": {"kind": "sums"}, "columns": {"prompt": "question", "reference": "answer"}},
        ["ExactMatchReward", "TranslationReward", "FormatReward", "PerplexityReward", "LengthReward"],
        ["ExactMatchReward", "TranslationReward"],
        True,
    ),
    "sharegpt": (
        sharegpt, {"last_assistant": "reference"}, ["TranslationReward", "LengthReward"], ["TranslationReward"], False,
    ),
    "several": (
        several,
        {"columns": {"reference": "answers.text"}, "prompt_template": "{context}\n\n{question}"},
        ["ExactMatchReward", "FormatReward", "LengthReward"],
        ["ExactMatchReward"],
        True,
    ),
}  # fmt: skip


def written(folder: Path, data: str, *options: str) -> dict[str, Any]:
    """The config that ``init`` writes."""
    out = folder / "mine.yaml"
    init([data, "--model", "sandbox", "--out", str(out), *options])
    text = out.read_text(encoding="utf-8")
    assert all(len(line) < 400 for line in text.splitlines())
    config: dict[str, Any] = yaml.safe_load(text)
    return config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def classes(config: dict[str, Any], key: str) -> list[str]:
    return [entry["class_path"].removeprefix("callbacks.") for entry in config.get(key, [])]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_chosen_for_data_of_each_kind(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, source, rewards, anchors, asks = KINDS[name]
    data = make(folder)
    config = written(folder, data)
    assert config["data"]["sources"][0] == {"path": data, **source}
    assert classes(config, "rewards") == rewards
    assert classes(config, "anchors") == anchors
    assert all(entry["init_args"]["normalize"] == "zscore" for entry in config["rewards"])
    assert bool(config["data"].get("system_prompt")) is asks is ("FormatReward" in rewards)
    weigher = config["model"]["weigher"]
    if anchors:
        assert weigher["class_path"] == "maestro_pl.Conductor"
        assert config["model"]["meta"]["signal"] == "maestro_pl.AnchorSignal"
        assert config["model"]["meta"]["learner"] == "ridge"
    else:
        assert weigher == "maestro_pl.EqualWeights"
        assert "meta" not in config["model"]
    length = next(entry["init_args"] for entry in config["rewards"] if entry["class_path"].endswith("LengthReward"))
    assert length.get("min", 0) < length["max"] < config["rollout"]["max_new_tokens"]
    total = config["trainer"]["max_steps"] + config["model"].get("meta", {}).get("warmup", 0)
    assert config["trainer"]["num_sanity_val_steps"] == -1
    assert total % config["trainer"]["val_check_interval"] == 0  # the last batch is evaluated
    printed = capsys.readouterr().out
    assert "maestro-pl rewards --config" in printed
    assert "maestro-pl fit --config" in printed


@pytest.mark.parametrize(
    "name", [n if n in ("gsm8k", "mixed") else pytest.param(n, marks=pytest.mark.slow) for n in KINDS]
)
def test_two_steps_are_trained_from_what_is_written(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(folder, KINDS[name][0](folder))
    small = {
        "data.batch_size": 2, "data.show": "false", "data.eval_limit": 2, "rollout.group_size": 2, "rollout.max_new_tokens": 8,
        "trainer.max_steps": 2, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
        "trainer.enable_checkpointing": "false", "model.policy.lora.r": 4,
    }  # fmt: skip
    if KINDS[name][3]:
        small |= {"model.meta.warmup": 1}
    small |= {"trainer.val_check_interval": 2 + bool(KINDS[name][3])}
    main(["fit", "--config", "mine.yaml", *(f"--{key}={value}" for key, value in small.items())])
    run = folder / "runs/mine/version_0"
    trained = list(csv.DictReader((run / "metrics.csv").open()))
    assert max(int(row["step"]) for row in trained) >= 1
    assert "before" in (run / "before_after.csv").read_text()


def test_the_mixed_file_has_a_source_and_rewards_for_each_kind(folder: Path) -> None:
    config = written(folder, mixed(folder))
    assert [source["task"] for source in config["data"]["sources"]] == ["sums", "tales"]
    named = {entry["init_args"].get("name"): entry["init_args"].get("tasks") for entry in config["rewards"]}
    assert named["correct_number"] == ["sums"]
    assert named["overlap_long"] == ["tales"]


def test_kinds_are_told_apart_by_columns_of_any_name(folder: Path) -> None:
    rows = [json.loads(line) for line in Path(mixed(folder)).read_text().splitlines()]
    theirs = {"prompt": "ask", "question": "ask", "reference": "truth", "answer": "truth"}
    renamed = jsonl(
        folder / "own.jsonl", [{theirs.get(name, name): value for name, value in row.items()} for row in rows]
    )
    config = written(folder, renamed, "--prompt", "ask", "--reference", "truth")
    assert [source["task"] for source in config["data"]["sources"]] == ["sums", "tales"]
    assert {tuple(source["columns"].items()) for source in config["data"]["sources"]} == {
        (("prompt", "ask"), ("reference", "truth"))
    }


def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "mine.yaml").write_text("mine: 1\n")
    with pytest.raises(UserError, match=r"mine\.yaml exists already, and nothing is overwritten"):
        init([gsm8k(folder), "--model", "sandbox"])
    assert (folder / "mine.yaml").read_text() == "mine: 1\n"


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ('{"a": 1}\n{"a": }\n', [], r"bad\.jsonl:2: not JSON"),
        ("", [], r"has no rows"),
        ('{"a": 1, "b": 2}\n', [], r"no column looks like a prompt; there are a, b: name one with --prompt"),
        ('{"a": "x", "b": "y"}\n', ["--prompt", "c"], r"--prompt 'c': no row has such a column; there are a, b"),
        ('{"a": "x"}\n', ["--out", "config.txt"], r"expected a name that ends in \.yaml"),
        ('{"a": "x"}\n', ["--out", "no/where.yaml"], r"there is no folder 'no'"),
    ],
)
def test_what_cannot_be_used_is_a_sentence(rows: str, options: list[str], sentence: str, folder: Path) -> None:
    (folder / "bad.jsonl").write_text(rows)
    with pytest.raises(UserError, match=sentence):
        init(["bad.jsonl", "--model", "sandbox", *options])
    assert not list(folder.glob("**/*.yaml"))


def test_a_missing_file_and_a_missing_model_are_sentences(folder: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        init(["none.jsonl", "--model", "sandbox"])
    with pytest.raises(UserError, match="--model"):
        init([gsm8k(folder)])
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="the tokenizer cannot be loaded"):
        init([gsm8k(folder), "--model", "empty"])


def test_without_the_tokenizer_lengths_are_estimated_and_it_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init([gsm8k(folder), "--model", "nobody/Qwen3-nothing"])
    text = (folder / "mine.yaml").read_text()
    assert "tokens, estimated from characters" in text
    assert "enable_thinking: false" in text
    assert "Lengths are estimated" in capsys.readouterr().out


def test_named_columns_are_taken(folder: Path) -> None:
    data = jsonl(folder / "odd.jsonl", [{"q": q, "meta": {"a": str(total)}, "note": "x"} for q, total in SUMS])
    config = written(folder, data, "--prompt", "q", "--reference", "meta.a")
    assert config["data"]["sources"][0]["columns"] == {"prompt": "q", "reference": "meta.a"}


def test_a_division_of_the_data_itself_is_kept(folder: Path) -> None:
    rows = [{"prompt": q, "reference": str(n), "split": ("train", "dev")[n % 2]} for q, n in SUMS]
    config = written(folder, jsonl(folder / "divided.jsonl", rows))
    assert "fractions" not in config["data"]
    assert config["trainer"]["num_sanity_val_steps"] == -1


def test_too_few_prompts_are_not_divided_and_it_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(folder, jsonl(folder / "one.jsonl", [{"prompt": "Say 1", "reference": "1"}]))
    assert "fractions" not in config["data"]
    assert "num_sanity_val_steps" not in config["trainer"]
    assert "no validation prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}], {"reference": "chosen"}),
        (
            [
                {
                    "prompt": [{"role": "user", "content": "Hi"}],
                    "completion": [{"role": "assistant", "content": "Hello"}],
                }
            ],
            {"reference": "completion[-1].content"},
        ),
        (
            [{"id": "a", "question": "2?", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"}],
            {"choices": "choices.text", "label": "answerKey", "their_choices": "choices"},
        ),
        ([{"question": "2?", "A": "1", "B": "2", "answer": "B"}], {"reference": "answer"}),
        ([{"problem": "x", "solution": r"so \boxed{\frac{1}{2}}."}], {"prompt": "problem", "reference": "solution"}),
        ([{"instruction": "Add", "input": "1 2", "output": "3"}], {}),
    ],
)
def test_the_columns_of_usual_forms(rows: list[dict[str, Any]], columns: dict[str, str], folder: Path) -> None:
    found = survey(jsonl(folder / "rows.jsonl", rows))
    assert found.pieces[0].source.columns == columns
    assert found.pieces[0].kind != "none"


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "yes",
        "1",
        "",
        "a: b",
        "# c",
        "####\\s*(.+)",
        "it's \\d",
        "line\nbreak",
        "\u2028",
        "é",
        "{x}",
        {"a b": ["c", 1]},
    ],
)
def test_values_are_read_back_as_they_are(value: Any) -> None:
    assert yaml.safe_load(f"{{ key: {flow(value)} }}") == {"key": value}


def test_the_example_of_the_readme_is_what_is_written(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = yaml.safe_load(page.split("it writes, with the reason")[1].split("```yaml\n")[1].split("```")[0])
    rows = [{"question": q, "answer": f"We add.\n#### {total}"} for q, total in SUMS]
    jsonl(folder / "prompts.jsonl", rows)
    init(["prompts.jsonl", "--model", "Qwen/Qwen3-0.6B"])
    config = yaml.safe_load((folder / "mine.yaml").read_text())
    assert shown["rewards"] == config["rewards"]
    assert shown["anchors"] == config["anchors"]
    for key in ("policy", "weigher", "meta"):
        assert shown["model"][key] == config["model"][key]
    for key in ("sources", "system_prompt"):
        assert shown["data"][key] == config["data"][key]
    assert config["rollout"]["max_new_tokens"] == 512
