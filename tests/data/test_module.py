"""The data module under a real trainer: batches, splits by stage, and a training order that survives any interruption."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from maestro_pl.data import PromptDataModule, Source
from maestro_pl.errors import UserError
from tests.support import make_tokenizer, quiet_trainer

RESERVED = {"prompt_text", "prompt_ids", "position"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return AutoTokenizer.from_pretrained(path)


def write(path: Path, n: int, **columns: Any) -> str:
    rows = [{"prompt": f"{path.stem} {i}", **columns} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Recorder(L.LightningModule):
    """The smallest module with manual optimization; keeps what it trained on."""

    def __init__(self, tokenizer: Any, skip: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = SimpleNamespace(tokenizer=tokenizer)
        self.layer_ = torch.nn.Linear(1, 1)
        self.seen: list[str] = []
        self.positions: list[int] = []
        self.validated: list[int] = []
        self.tested: list[str] = []
        self.epochs: list[int] = []
        self.fail_at: int | None = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self.fail_at is not None and len(self.seen) >= self.fail_at:
            raise KeyboardInterrupt
        self.seen += batch["prompt"]
        self.positions += batch["position"]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.layer_.weight.sum())
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        self.epochs.append(len(self.seen))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated.append(len(self.seen))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.tested += batch["prompt"]

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[str]:
        return list(batch["prompt"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    return quiet_trainer(folder, callbacks=list(callbacks), **{"enable_checkpointing": bool(callbacks), **options})


def train_for(
    folder: Path, module: Recorder, data: PromptDataModule, steps: int, ckpt: Path | None = None, **options: Any
) -> Path:
    """Train until ``max_steps``, go on from a checkpoint if there is one, and save another."""
    saved = folder / f"{steps}.ckpt"
    run = trainer(folder, max_steps=steps, max_epochs=-1, **options)
    run.fit(module, data, ckpt_path=ckpt)
    run.save_checkpoint(saved)
    return saved


@pytest.fixture
def ten(tmp_path: Path) -> dict[str, Any]:
    """Ten training prompts and two of validation; four batches of three an epoch, the last one short."""
    return {
        "sources": {
            "train": write(tmp_path / "train.jsonl", 10),
            "validation": write(tmp_path / "validation.jsonl", 2),
            "test": write(tmp_path / "test.jsonl", 5),
        },
    }


def data_of(ten: dict[str, Any], **options: Any) -> PromptDataModule:
    return PromptDataModule(**{"sources": Source(ten["sources"]), "batch_size": 3, "show": False, **options})


def straight(folder: Path, ten: dict[str, Any], tokenizer: Any, epochs: int = 3, **options: Any) -> Recorder:
    module = Recorder(tokenizer)
    trainer(folder, max_epochs=epochs, num_sanity_val_steps=0).fit(module, data_of(ten, **options))
    return module


def test_each_epoch_has_each_prompt_once(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    module = straight(tmp_path, ten, tokenizer)
    assert module.positions == list(range(30))
    for epoch in range(3):
        assert sorted(module.seen[10 * epoch : 10 * epoch + 10]) == sorted(f"train {i}" for i in range(10))
    assert module.seen[:10] != module.seen[10:20]
    assert module.epochs == [10, 20, 30]
    assert sorted(set(module.validated)) == [10, 20, 30]


@pytest.mark.parametrize(
    "stops",
    [[1], [2], [3], [4], [5], [8], [2, 3], [1, 2, 3, 4, 5, 6], [4, 8], [3, 4, 6]],
    ids=lambda stops: "-".join(map(str, stops)),
)
def test_a_run_stopped_and_resumed_sees_what_a_straight_run_sees(
    tmp_path: Path, ten: dict[str, Any], tokenizer: Any, stops: list[int]
) -> None:
    expected = straight(tmp_path, ten, tokenizer).seen
    seen: list[str] = []
    ckpt = None
    for stop in [*stops, 12]:
        module = Recorder(tokenizer)
        ckpt = train_for(tmp_path, module, data_of(ten), stop, ckpt)
        seen += module.seen
    assert seen == expected


def test_validation_stays_at_the_ends_of_epochs_after_resuming(
    tmp_path: Path, ten: dict[str, Any], tokenizer: Any
) -> None:
    ckpt = train_for(tmp_path, Recorder(tokenizer), data_of(ten), 2)
    module = Recorder(tokenizer)
    train_for(tmp_path, module, data_of(ten), 8, ckpt)
    # six prompts were seen before: 4 more end the first epoch, 14 the second
    assert sorted(set(module.validated) - {0}) == [4, 14]
    assert module.epochs == [4, 14]


@pytest.mark.parametrize("every", [1, 3])
def test_checkpoints_written_inside_the_loop_resume_exactly(
    tmp_path: Path, ten: dict[str, Any], tokenizer: Any, every: int
) -> None:
    expected = straight(tmp_path, ten, tokenizer, epochs=2).seen
    saver = ModelCheckpoint(tmp_path / "in_loop", "{step}", every_n_train_steps=every, save_top_k=-1)
    trainer(tmp_path, saver, max_epochs=2).fit(Recorder(tokenizer), data_of(ten))
    files = sorted((tmp_path / "in_loop").glob("*.ckpt"))
    assert len(files) == 8 // every
    for file in files:
        step = int(file.stem.removeprefix("step="))
        done = step // 4 * 10 + step % 4 * 3
        module = Recorder(tokenizer)
        trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(module, data_of(ten), ckpt_path=file)
        assert module.seen == expected[done:], file.name


def test_checkpoint_after_validation_in_the_middle_of_an_epoch(
    tmp_path: Path, ten: dict[str, Any], tokenizer: Any
) -> None:
    expected = straight(tmp_path, ten, tokenizer, epochs=2).seen
    saver = ModelCheckpoint(tmp_path / "val", "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    trainer(tmp_path, saver, max_epochs=2, val_check_interval=2).fit(Recorder(tokenizer), data_of(ten))
    for file in sorted((tmp_path / "val").glob("*.ckpt")):
        step = int(file.stem.removeprefix("step="))
        module = Recorder(tokenizer)
        trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(module, data_of(ten), ckpt_path=file)
        assert module.seen == expected[step // 4 * 10 + step % 4 * 3 :], file.name


def test_a_batch_whose_step_was_interrupted_is_seen_again(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    class SaveOnException(Callback):
        def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    expected = straight(tmp_path, ten, tokenizer, epochs=2).seen
    first = Recorder(tokenizer)
    first.fail_at = 6
    run = trainer(tmp_path, SaveOnException(), max_epochs=2, num_sanity_val_steps=0)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit(first, data_of(ten))
    second = Recorder(tokenizer)
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(
        second, data_of(ten), ckpt_path=tmp_path / "interrupted.ckpt"
    )
    assert first.seen + second.seen == expected


def test_another_batch_size_after_resuming_still_shows_each_prompt_once(
    tmp_path: Path, ten: dict[str, Any], tokenizer: Any
) -> None:
    first, second = Recorder(tokenizer), Recorder(tokenizer)
    ckpt = train_for(tmp_path, first, data_of(ten), 2)
    train_for(tmp_path, second, data_of(ten, batch_size=2), 10, ckpt)
    assert first.positions + second.positions == list(range(len(first.seen) + len(second.seen)))
    assert len(second.seen) == 16
    assert sorted((first.seen + second.seen)[:10]) == sorted(f"train {i}" for i in range(10))


def test_limited_epochs_go_on_through_the_data(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    module = Recorder(tokenizer)
    trainer(tmp_path, max_epochs=3, limit_train_batches=3).fit(module, data_of(ten))
    # 4 batches an epoch: 3+3+3, 1 + 3+3, 3+1 ... -> nothing is left out, nothing comes twice
    assert module.positions == list(range(9 + 7 + 7))
    assert len(module.validated) == 1 + 3


def test_overfit_batches_repeat(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    module = Recorder(tokenizer)
    trainer(tmp_path, max_epochs=3, overfit_batches=1).fit(module, data_of(ten))
    assert module.seen == module.seen[:3] * 3


def test_the_same_data_module_starts_afresh_with_another_trainer(
    tmp_path: Path, ten: dict[str, Any], tokenizer: Any
) -> None:
    data, first, second = data_of(ten), Recorder(tokenizer), Recorder(tokenizer)
    train_for(tmp_path, first, data, 2)
    train_for(tmp_path, second, data, 2)
    assert first.seen == second.seen


def test_the_same_trainer_goes_on(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    data, module = data_of(ten), Recorder(tokenizer)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, data)
    run.fit_loop.max_epochs = 2
    run.fit(module, data)
    assert module.positions == list(range(20))


def test_weighted_runs_resume_too(tmp_path: Path, tokenizer: Any) -> None:
    sources = [
        Source(write(tmp_path / "a.jsonl", 4), weight=3.0),
        Source(write(tmp_path / "b.jsonl", 8), weight=1.0),
    ]

    def data() -> PromptDataModule:
        return PromptDataModule(sources, batch_size=5, show=False)

    whole, first, second = Recorder(tokenizer), Recorder(tokenizer), Recorder(tokenizer)
    trainer(tmp_path, max_epochs=2).fit(whole, data())
    # 12 rows, 3 : 1 -> 9 draws of a, 3 of b in every epoch
    for epoch in (whole.seen[:12], whole.seen[12:]):
        assert sum(prompt.startswith("a") for prompt in epoch) == 9
        assert sum(prompt.startswith("b") for prompt in epoch) == 3
    ckpt = train_for(tmp_path, first, data(), 2)
    train_for(tmp_path, second, data(), 6, ckpt)
    assert first.seen + second.seen == whole.seen


def test_changed_data_is_noticed_on_resuming(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    ckpt = train_for(tmp_path, Recorder(tokenizer), data_of(ten), 2)
    write(tmp_path / "train.jsonl", 9)
    with pytest.warns(
        UserWarning, match=r"not that of the checkpoint \(number of rows, rows changed; 10 rows then, 9 now\)"
    ):
        train_for(tmp_path, Recorder(tokenizer), data_of(ten), 3, ckpt)
    with pytest.warns(UserWarning, match=r"\(number of rows, rows, seed changed"):
        train_for(tmp_path, Recorder(tokenizer), data_of(ten, seed=1), 3, ckpt)


def test_the_state_is_plain_enough_for_safe_loading(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    ckpt = train_for(tmp_path, Recorder(tokenizer), data_of(ten), 2)
    state = torch.load(ckpt, weights_only=True)["PromptDataModule"]
    assert state["position"] == 6
    assert (state["rows"], state["draws"], state["seed"]) == (10, None, 0)


# batches


def test_a_batch_is_a_dict_of_lists_with_the_union_of_columns(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "reference": "r", "level": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": [{"role": "user", "content": "q"}], "meta": {"k": [1]}}\n')
    data = PromptDataModule(
        [str(tmp_path / "a.jsonl"), Source(str(tmp_path / "b.jsonl"))], tokenizer=tokenizer, show=False
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    order = [batch["task"].index("a"), batch["task"].index("b")]
    by_task = {key: [values[i] for i in order] for key, values in batch.items()}
    assert by_task.pop("prompt_ids") == [tokenizer(text)["input_ids"] for text in by_task["prompt_text"]]
    assert sorted(by_task.pop("position")) == [0, 1]
    assert by_task == {
        "prompt": ["p", [{"role": "user", "content": "q"}]],
        "prompt_text": ["<s>user\np</s>\n<s>assistant\n", "<s>user\nq</s>\n<s>assistant\n"],
        "reference": ["r", None],
        "task": ["a", "b"],
        "level": [1, None],
        "meta": [None, {"k": [1]}],
    }


def test_lightning_leaves_the_batch_as_it_is(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    class Types(Recorder):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            assert type(batch) is dict
            assert all(type(values) is list and len(values) in (3, 1) for values in batch.values())
            super().training_step(batch, batch_idx)

    train_for(tmp_path, Types(tokenizer), data_of(ten), 4)


def test_test_and_predict_use_their_splits(tmp_path: Path, ten: dict[str, Any], tokenizer: Any) -> None:
    module = Recorder(tokenizer)
    trainer(tmp_path).test(module, data_of(ten))
    assert module.tested == [f"test {i}" for i in range(5)]
    predicted = trainer(tmp_path).predict(module, data_of(ten))
    assert predicted is not None
    assert [prompt for batch in predicted for prompt in batch] == [f"test {i}" for i in range(5)]
    predicted = trainer(tmp_path).predict(module, data_of(ten, predict_split="validation", eval_batch_size=1))
    assert predicted == [["validation 0"], ["validation 1"]]


def test_evaluation_takes_tasks_in_turn_and_limits_each(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"{task} {i}", "task": task} for task in ("a", "b") for i in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def prompts(**options: Any) -> list[Any]:
        data = PromptDataModule(Source(str(path), split="test"), tokenizer=tokenizer, show=False, **options)
        data.setup("test")
        return [prompt for batch in data.test_dataloader() for prompt in batch["prompt"]]

    assert prompts()[:4] == ["a 0", "b 0", "a 1", "b 1"]
    assert len(prompts()) == 40
    few = prompts(eval_limit=3)
    assert [prompt[0] for prompt in few] == ["a", "b"] * 3
    assert few == prompts(eval_limit=3, seed=5)
    assert set(few) != set(prompts(eval_limit=3, split_seed=5))
    assert set(few) < set(prompts(eval_limit=4))


@pytest.mark.parametrize("kind", ["rows", "columns", "dataset", "splits", "dataset_splits", "source", "keys"])
def test_rows_in_memory_are_a_source(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    import datasets

    rows = [{"prompt": "a", "level": 1}, {"prompt": "b", "level": 2}]
    table = datasets.Dataset.from_list(rows)
    sources: Any = {
        "rows": rows,
        "columns": {"prompt": ["a", "b"], "level": [1, 2]},
        "dataset": table,
        "splits": {"train": rows, "test": rows[:1]},
        "dataset_splits": datasets.DatasetDict(train=table, test=table.select([0])),
        "source": Source.of(rows),
        "keys": {"path": write(tmp_path / "rows.jsonl", 2, level=1)},
    }[kind]
    data = PromptDataModule(sources, root=str(tmp_path), tokenizer=tokenizer, show=kind == "dataset")
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["prompt"]) == (["rows 0", "rows 1"] if kind == "keys" else ["a", "b"])
    assert batch["task"] == ["rows", "rows"]
    assert len(data.rows["test"]) == ("splits" in kind)
    with pytest.raises(UserError, match=r"rows:1: a text holds '\\ud800'"):
        PromptDataModule([{"prompt": "\ud800"}], show=False).setup("fit")
    with pytest.raises(UserError, match="a source has no key 'colums'"):
        PromptDataModule({"path": "a.csv", "colums": {}})  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_models_positions_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in (10, 100_000)))
    module = Recorder(tokenizer)
    module.policy.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    with pytest.raises(
        UserError,
        match=r"(?s)1 of 2 rows of train have prompts of more than 63 tokens, and the model has 64 positions.*:2: ",
    ):
        trainer(tmp_path, max_steps=1).fit(module, PromptDataModule(str(path), show=False))


# what is missing or wrong


def test_a_fit_without_validation_prompts_does_without(tmp_path: Path, tokenizer: Any) -> None:
    module = Recorder(tokenizer)
    trainer(tmp_path, max_epochs=1).fit(module, PromptDataModule(write(tmp_path / "a.jsonl", 3), show=False))
    assert len(module.seen) == 3
    assert module.validated == []


@pytest.mark.parametrize(
    ("stage", "split", "counts"),
    [
        ("validate", "validation", "3 train, 0 validation, 0 test"),
        ("test", "test", "3 train"),
    ],
)
def test_a_stage_without_its_split(tmp_path: Path, tokenizer: Any, stage: str, split: str, counts: str) -> None:
    data = PromptDataModule(write(tmp_path / "a.jsonl", 3), tokenizer=tokenizer, show=False)
    with pytest.raises(UserError, match=rf"no {split} prompts to {stage} on \({counts}.*data\.fractions"):
        data.setup(stage)


def test_predict_says_how_new_prompts_are_given(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", 3)
    data = PromptDataModule(path, tokenizer=tokenizer, show=False)
    with pytest.raises(
        UserError, match=r"no test prompts to predict on \(3 train.*`split: test`.*--data.predict_split"
    ):
        data.setup("predict")
    PromptDataModule(Source(path, split="test"), tokenizer=tokenizer, show=False).setup("predict")
    PromptDataModule(path, tokenizer=tokenizer, show=False, predict_split="train").setup("predict")


def test_a_fit_without_training_prompts(tmp_path: Path, tokenizer: Any) -> None:
    data = PromptDataModule(Source(write(tmp_path / "a.jsonl", 3), split="test"), tokenizer=tokenizer, show=False)
    with pytest.raises(UserError, match=r"no train prompts to fit on \(0 train, 0 validation, 3 test\)"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sources": []}, r"data\.sources is an empty list"),
        ({"sources": '{"path": "a", "wait": 1}'}, r"is not a source that can be read; its keys may be path, name"),
        ({"sources": Source("a", limit=0)}, r"data\.sources a: limit is 0"),
        ({"sources": [Source("a", weight=1), "b"]}, r"\[1, None\]; give every source a weight, or none"),
        ({"sources": [Source("a", weight=0), Source("b", weight=0)]}, r"\[0, 0\]; expected at least one above 0"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs has tokenize, which is not the chat template's",
        ),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs has add_generation_prompt"),
        ({"system_role": "tool"}, r"data\.system_role='tool': expected one of system, user"),
        ({"batch_size": 0}, r"data\.batch_size is 0; expected at least 1"),
        ({"eval_batch_size": -1}, r"data\.eval_batch_size is -1"),
        ({"eval_limit": 0}, r"data\.eval_limit is 0"),
        ({"max_prompt_tokens": 0}, r"data\.max_prompt_tokens is 0"),
        ({"fractions": [1, 1, 1]}, r"data\.fractions is \[1, 1, 1\]"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        PromptDataModule(**options)


def test_no_tokenizer(tmp_path: Path) -> None:
    data = PromptDataModule(write(tmp_path / "a.jsonl", 3), show=False)
    data.setup("fit")
    with pytest.raises(UserError, match="no tokenizer to render prompts with"):
        data.train_dataloader()
    data = PromptDataModule(write(tmp_path / "a.jsonl", 3), tokenizer=str(tmp_path / "none"), show=False)
    with pytest.raises(UserError, match=r"data\.tokenizer '.*none' cannot be loaded"):
        data.setup("fit")


def test_a_tokenizer_by_folder(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = PromptDataModule(
        write(tmp_path / "a.jsonl", 3), tokenizer=str(tmp_path / "tokenizer"), batch_size=3, show=False
    )
    (batch,) = data.train_dataloader()
    assert batch["prompt_text"][0].startswith("<s>user\na ")


def test_no_prompt_is_short_enough(tmp_path: Path, tokenizer: Any) -> None:
    data = PromptDataModule(
        write(tmp_path / "a.jsonl", 3), tokenizer=tokenizer, max_prompt_tokens=5, overlong="drop", show=False
    )
    with (
        pytest.warns(UserWarning, match="3 of 3 rows of train"),
        pytest.raises(UserError, match="No train prompt is within max_prompt_tokens=5; raise it"),
    ):
        data.setup("fit")


def test_prompts_in_two_splits_are_reported_and_can_be_dropped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        ("a", "train"),
        ("a", "train"),
        ("b", "train"),
        ("c", "train"),
        ("a", "test"),
        ("b", "validation"),
        ("d", "test"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "split": split}) + "\n" for prompt, split in rows))
    data = PromptDataModule(str(path), show=False)
    with pytest.warns(
        UserWarning, match=r"2 prompts stand in more than one split \(1 in train and validation, 1 in train and test\)"
    ):
        assert len(data.rows["train"]) == 4
    data = PromptDataModule(str(path), overlap="drop", show=False)
    with pytest.warns(UserWarning, match=r"3 training rows are left out"):
        assert [row.prompt for row in data.rows["train"]] == ["c"]
    some = write(tmp_path / "some.jsonl", 4)
    data = PromptDataModule(Source({"train": some, "test": some}), overlap="drop", show=False)
    with (
        pytest.warns(UserWarning, match="4 training rows are left out"),
        pytest.raises(UserError, match="Every training prompt also stands in"),
    ):
        data.setup("fit")


def test_the_start_shows_sources_and_one_prompt_once(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a [bold]markup[/bold] [/think] stays"}\n')
    data = PromptDataModule(str(tmp_path / "rows.jsonl"), tokenizer=tokenizer)
    data.setup("fit")
    data.setup("fit")
    printed = capsys.readouterr().out
    assert printed.count("<s>user") == 1
    assert "a [bold]markup[/bold] [/think] stays</s>" in printed
    assert "all train" in printed


# the benchmarks' files


def test_real_files(shared: Path, tokenizer: Any) -> None:
    data = PromptDataModule(
        [
            Source(
                str(shared / "nover/webit.csv"), cut_prompt_at="Answer the question and return in the following format:"
            ),
            Source(
                str(shared / "ssgen/dev.jsonl"),
                columns={"reference": "story_content"},
                prompt_template="Write a Social Story titled {title} ({chapter}: {explanation})",
                fractions=[0.8, 0.1, 0.1],
            ),
            Source(
                str(shared / "gsm8k/train.jsonl"),
                columns={"prompt": "question", "reference": "answer"},
                reference_pattern=r"####\s*(.+)",
            ),
            Source(
                str(shared / "emobench/EA.jsonl"),
                where={"language": "en"},
                columns={"reference": "label"},
                prompt_template="{scenario}\n{question type}?\n{choices!o}",
                task="emobench",
            ),
        ],
        tokenizer=tokenizer,
        overlap="drop",
        eval_limit=10,
        max_prompt_tokens=600,
        overlong="truncate_left",
        show=False,
    )
    with pytest.warns(UserWarning, match="80 prompts stand in more than one split"):
        rows = data.rows
    train = {
        task: [row for row in rows["train"] if row.task == task] for task in ("webit", "ssgen", "gsm8k", "emobench")
    }
    assert len(train["gsm8k"]) == 1500
    assert len(train["emobench"]) == 200
    assert sum(len(rows[s]) for s in rows if s) == len(rows["train"]) + len(rows["validation"]) + len(rows["test"])
    assert sum(row.task == "webit" for row in rows["test"]) == 1000
    assert train["gsm8k"][0].values["reference"] == "72"
    assert "following format" not in str(train["webit"][0].prompt)
    assert train["emobench"][0].values["choices"][0] == "Promise to keep the secret"
    assert "A: Promise to keep the secret\nB: Inform" in str(train["emobench"][0].prompt)
    with pytest.warns(UserWarning, match="validation prompts were cut on the left to 600 tokens"):
        prompts = data.prompts("validation")
    assert max(len(prompt.ids) for prompt in prompts) == 600
    assert [prompt.row.task for prompt in prompts[:2]] == ["webit", "ssgen"]


@pytest.fixture
def shared() -> Path:
    import os

    root = Path(os.environ.get("MAESTRO_SHARED", Path(__file__).parents[3] / "shared")) / "data"
    if not (root / "nover").is_dir():
        pytest.skip(f"the benchmark files are not at {root}; MAESTRO_SHARED names another folder")
    return root
