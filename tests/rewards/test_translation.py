"""chrF and BLEU of sentences and of a split, beside sacrebleu's own values."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("sacrebleu")

import sacrebleu

from callbacks.rewards.translation import TranslationReward
from maestro_pl.cli import main
from maestro_pl.errors import UserError
from maestro_pl.rewards import translation
from maestro_pl.rewards.translation import Corpus, Translation, corpus_score, tokenizer_of, translation_score
from tests.support import given, make_rollout, reward_module

HYPOTHESES = ["the cat is on the mat", "There is a dog in the garden."]
REFERENCES = ["there is a cat on the mat", "A dog is in the garden today."]


def corpus(metric: Any, hypotheses: list[str], references: list[str], **options: Any) -> float:
    translations = [Translation(h, [r]) for h, r in zip(hypotheses, references, strict=True)]
    return corpus_score(translations, metric, **options)


def test_bleu_by_hand() -> None:
    # unigrams 3/4, bigrams 2/3, trigrams 1/2, 4-grams 0/1; equal lengths; add one above unigrams
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert translation_score("a b c x", ["a b c d"], "bleu") == pytest.approx(expected)
    assert translation_score("a b c d", ["a b c d"], "bleu") == pytest.approx(1.0)
    # of a corpus nothing is added, and the first precision without a match is half of one match
    assert corpus("bleu", ["a b c x"], ["a b c d"]) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_chrf_by_hand() -> None:
    # "abcx" and "abcd": n = 1 has 3/4, n = 2 has 2/3, n = 3 has 1/2, n = 4 has 0/1, longer ones neither side has
    mean = (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    assert translation_score("abcx", ["abcd"]) == pytest.approx(mean)  # precision and recall are equal
    # "ab" and "abcd": precision 1, 1; recall 2/4, 1/3; F_2 of the means 1 and 5/12
    assert translation_score("ab", ["abcd"]) == pytest.approx(5 * (5 / 12) / (4 + 5 / 12))
    assert translation_score("abcdefg", ["abcdefg"]) == pytest.approx(1.0)
    assert translation_score("xyzuvw", ["abcdef"]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf_is_sacrebleus(word_order: int) -> None:
    import sacrebleu

    expected = sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES], word_order=word_order).score / 100
    assert corpus("chrf", HYPOTHESES, REFERENCES, word_order=word_order) == pytest.approx(expected, abs=1e-6)
    own = sacrebleu.sentence_chrf(HYPOTHESES[0], [REFERENCES[0]], word_order=word_order).score / 100
    assert translation_score(HYPOTHESES[0], [REFERENCES[0]], word_order=word_order) == pytest.approx(own, abs=1e-6)


def test_bleu_is_sacrebleus() -> None:
    import sacrebleu

    hypotheses, references = [*HYPOTHESES, "It costs 3.50, he said."], [*REFERENCES, "It costs 3.50, she said."]
    expected = sacrebleu.corpus_bleu(hypotheses, [references]).score / 100
    assert corpus("bleu", hypotheses, references) == pytest.approx(expected, abs=1e-5)
    chinese, gold = (
        ["\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u3002"],
        ["\u732b\u5728\u57ab\u5b50\u4e0a\u9762\u5750\u7740\u3002"],
    )
    expected = sacrebleu.corpus_bleu(chinese * 2, [gold * 2], tokenize="zh").score / 100
    assert corpus("bleu", chinese * 2, gold * 2) == pytest.approx(expected, abs=1e-5)


def test_a_corpus_in_which_little_matches() -> None:
    references = ["the cat sat on the mat", "a second sentence that was not translated"]
    # the second answer has no n-gram, and its reference's count all the same
    assert corpus("chrf", [references[0], ""], references) == pytest.approx(0.35692, abs=5e-6)
    assert corpus("chrf", ["", ""], references) == corpus("bleu", ["", ""], references) == 0


def test_a_corpus_of_several_scripts_and_numbers_of_references() -> None:
    chinese = Translation(
        "\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u3002", ["\u732b\u5728\u57ab\u5b50\u4e0a\u9762\u5750\u7740\u3002"]
    )
    english = Translation("It costs 3.50, he said.", ["It costs 3.50, she said.", "She said it costs 3.50."])
    # cut as each language is: the same as one corpus of tokens
    texts = ["\u732b \u5750 \u5728 \u57ab \u5b50 \u4e0a \u3002", "It costs 3.50 , he said ."]
    first = ["\u732b \u5728 \u57ab \u5b50 \u4e0a \u9762 \u5750 \u7740 \u3002", "It costs 3.50 , she said ."]
    expected = sacrebleu.corpus_bleu(texts, [first, [None, "She said it costs 3.50 ."]], tokenize="none").score / 100
    assert corpus_score([chinese, english], "bleu") == pytest.approx(expected)
    expected = (
        sacrebleu.corpus_chrf(
            [c.text for c in (chinese, english)],
            [[c.references[0] for c in (chinese, english)], [None, english.references[1]]],
        ).score
        / 100
    )
    assert corpus_score([chinese, english]) == pytest.approx(expected)


def test_a_response_counts_once_and_ranks_are_one_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three = (Translation(text, ["r"]) for text in ("one", "two", "three"))
    here, there = Corpus(), Corpus()
    for corpus_, texts in ((here, (one, two)), (there, (two, three))):
        for place, text in zip((None, 4), texts, strict=True):
            corpus_.add("t", place, text)
    there.add("u", 4, one)
    assert here.tasks() == {"t": [one, two], "": [one, two]}
    monkeypatch.setattr(translation, "gathered", lambda mine: [mine, there._entries])
    assert here.tasks() == {"t": [one, three, two], "u": [one], "": [one, three, two, one]}
    here.reset()
    assert here.tasks() == {"t": [two, three], "u": [one], "": [two, three, one]}
    there.reset()
    assert here.tasks() == {}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"sacrebleu, which is not installed: run pip install -e '\.\[benchmarks\]'"):
        given(TranslationReward(), make_rollout(["x"], reference=["y"]))


def test_the_tokenizer_follows_the_script() -> None:
    assert tokenizer_of(["Hello"], "auto") == tokenizer_of(["\u041f\u0440\u0438\u0432\u0435\u0442"], "auto") == "13a"
    assert tokenizer_of(["\u732b"], "auto") == "zh"
    assert tokenizer_of(["\u732b\u3067\u3059"], "auto") == "char"
    assert tokenizer_of(["\u732b"], "intl") == "intl"


def test_empty_long_and_strange_answers() -> None:
    for metric in ("chrf", "bleu"):
        assert translation_score("", ["a b"], metric) == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
        assert 0 <= translation_score("ab " * 3500, ["a b"], metric) < 0.5  # type: ignore[arg-type]
        assert 0 <= translation_score("\U0001f600\n\t", ["\U0001f600"], metric) <= 1  # type: ignore[arg-type]


def test_the_callback_logs_the_corpus_per_task_and_over_all() -> None:
    reward, pl_module = TranslationReward(role="metric"), reward_module()
    logged = pl_module.logged
    first = {"rollout": make_rollout([HYPOTHESES[0]], reference=[REFERENCES[0]], task=["x"]), "position": [0]}
    second = {"rollout": make_rollout([HYPOTHESES[1], "z"], reference=[REFERENCES[1], None], task=["y", "y"])}
    second["position"] = [1, 2]
    reward.on_test_epoch_start(None, pl_module)  # type: ignore[arg-type]
    for batch in (first, second, second):  # a prompt that stands twice counts once
        reward.on_test_batch_start(None, pl_module, batch, 0)  # type: ignore[arg-type]
    reward.on_test_epoch_end(None, pl_module)  # type: ignore[arg-type]
    assert set(logged) == {"test/x/corpus_chrf", "test/y/corpus_chrf", "test/corpus_chrf"}
    assert logged["test/x/corpus_chrf"] == pytest.approx(translation_score(HYPOTHESES[0], [REFERENCES[0]]))
    assert logged["test/corpus_chrf"] == pytest.approx(corpus("chrf", HYPOTHESES, REFERENCES))
    reward.on_test_end(None, pl_module)  # type: ignore[arg-type]
    assert [(row["task"], row["metric"], row["n"]) for row in pl_module.evaluation] == [
        ("x", "corpus_chrf", 1),
        ("y", "corpus_chrf", 1),
        ("all", "corpus_chrf", 2),
    ]
    assert all(row["mean"] == row["low"] == row["high"] for row in pl_module.evaluation)


def test_the_callback_without_rows_and_its_options() -> None:
    reward, pl_module = TranslationReward(metric="bleu", name="b"), reward_module()
    reward.on_validation_epoch_start(None, pl_module)  # type: ignore[arg-type]
    reward.on_validation_epoch_end(None, pl_module)  # type: ignore[arg-type]
    assert pl_module.logged == {}
    assert given(reward, make_rollout(["x"], reference=[None])) == [None]
    assert given(reward, make_rollout(["<answer>a b c d</answer>"], reference=["a b c d"])) == [pytest.approx(1.0)]
    with pytest.raises(UserError, match="metric is 'ter'"):
        TranslationReward(metric="ter")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_corpus_of_a_mixed_split_stands_in_the_table(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole fit and test in which most batches hold no translation; what training scored stays out of the corpus."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {i}", "reference": f"word {i}", "task": "other"} for i in range(6)]
    rows += [{"prompt": "translate eins", "reference": "one more thing", "task": "opus"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"policy": {"model": str(tiny_qwen3), "dtype": "float32"}, "weigher": "maestro_pl.EqualWeights"},
        "data": {
            "sources": {"path": {"train": "rows.jsonl", "validation": "rows.jsonl", "test": "rows.jsonl"}},
            "batch_size": 4,
            "eval_batch_size": 2,
            "show": False,
        },
        "rollout": {"group_size": 2, "eval_group_size": 2, "max_new_tokens": 5},
        "rewards": ["callbacks.LengthReward"],
        "metrics": [{"class_path": "callbacks.TranslationReward", "init_args": {"tasks": ["opus"]}}],
        "trainer": {"max_steps": 2, "val_check_interval": 2, "accelerator": "cpu"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml"])
    main(["test", "--ckpt_path", "runs/run/version_0/checkpoints/last.ckpt"])
    for table in (Path("runs/run/version_0/val_metrics.csv"), next(Path("runs").rglob("test_metrics.csv"))):
        with table.open(newline="") as file:
            found = {row["task"]: row for row in csv.DictReader(file) if row["metric"] == "corpus_chrf"}
        assert set(found) == {"opus", "all"}
        assert found["opus"]["n"] == found["all"]["n"] == "2"
        assert 0 <= float(found["opus"]["mean"]) <= 1
