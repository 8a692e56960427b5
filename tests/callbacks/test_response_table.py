"""A few responses in W&B, MLflow and TensorBoard: what each is sent, when, and that none of them can end a run."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from callbacks.response_table import LONGEST, ResponseTable, cells, markdown
from maestro_pl.rollout import RewardScores, RewardSpec, Rollout
from tests.support import make_rollout


@pytest.fixture
def rollout() -> Rollout:
    fields = {
        "prompts": ["2 + 2?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}]],
        "rewards": {
            "x": RewardScores.from_list(RewardSpec("x"), [1.0, 0.25, None, 0.5]),
            "gold": RewardScores.from_list(RewardSpec("gold", "metric"), [0.0, 1.0, 0.0, 1.0]),
        },
        "scalar_B": torch.tensor([0.5, 0.125, float("nan"), 0.0]),
        "advantages_B": torch.tensor([1.0, -1.0, 0.0, 0.0]),
        "weights_BK": torch.tensor([[1.0]] * 4),
        "weight_names": ["x"],
    }
    return make_rollout(["four", "4", "a|b\n<script>", "x" * 3000], group_size=2, fields=fields)


def trainer_of(*loggers: Any) -> Any:
    return SimpleNamespace(loggers=list(loggers), is_global_zero=True, global_step=0)


class FakeWandb(ModuleType):
    """``wandb`` as far as ``WandbLogger.log_table`` uses it: a table class, and a run that keeps what is logged."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[dict[str, Any]] = []
        self.Table = lambda columns=None, data=None, dataframe=None: SimpleNamespace(columns=columns, data=data)

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[WandbLogger, FakeWandb]:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(WandbLogger, "experiment", SimpleNamespace(log=fake.log))
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    logger = WandbLogger.__new__(WandbLogger)  # its constructor asks for the package's own settings
    logger._prefix, logger._wandb_init = "", {}
    return logger, fake


class FakeMlflowClient:
    """``MlflowClient.log_table``, whose artifact grows as the real one's does."""

    def __init__(self) -> None:
        self.artifacts: dict[tuple[str, str], dict[str, list[Any]]] = {}

    def log_table(self, run_id: str, data: dict[str, list[Any]], artifact_file: str) -> None:
        kept = self.artifacts.setdefault((run_id, artifact_file), {name: [] for name in data})
        assert list(kept) == list(data)
        for name, values in data.items():
            kept[name] = [*kept[name], *values]


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> tuple[MLFlowLogger, FakeMlflowClient]:
    client = FakeMlflowClient()
    monkeypatch.setattr(MLFlowLogger, "experiment", client)
    logger = MLFlowLogger.__new__(MLFlowLogger)
    logger._run_id = "run7"
    return logger, client


def test_a_table_by_hand(rollout: Rollout) -> None:
    table = cells(rollout, 2, 7)
    assert list(table) == [
        "step", "task", "prompt", "response", "finish_reason", "reward", "advantage", "rewards/x", "rewards/gold",
        "weights/x",
    ]  # fmt: skip
    assert table["step"] == [7] * 4
    assert table["prompt"][0] == "2 + 2?"
    assert table["prompt"][2] == "system: Be brief.\n\nuser: b"
    assert table["rewards/x"] == [1.0, 0.25, None, 0.5]
    assert table["reward"] == [0.5, 0.125, None, 0.0]
    assert table["advantage"] == [1.0, -1.0, 0.0, 0.0]
    assert table["weights/x"] == [1.0] * 4
    assert table["response"][3] == "x" * LONGEST + " … (1000 more characters)"
    assert cells(rollout, 1, 7)["response"] == ["four", "4"]


def test_wandb_gets_a_table(rollout: Rollout, wandb: tuple[WandbLogger, FakeWandb]) -> None:
    logger, fake = wandb
    ResponseTable().on_train_batch_end(
        trainer_of(logger), SimpleNamespace(policy_steps=1), None, {"rollout": rollout}, 0
    )
    (logged,) = fake.logged
    assert logged["trainer/global_step"] == 1
    assert logged["responses/train"].columns == list(cells(rollout, 2, 1))
    assert logged["responses/train"].data[1][:4] == [1, "a", "2 + 2?", "4"]


def test_mlflow_gets_an_artifact_that_grows(rollout: Rollout, mlflow: tuple[MLFlowLogger, FakeMlflowClient]) -> None:
    logger, client = mlflow
    table = ResponseTable(groups=1)
    for step in (3, 5):
        table.on_validation_batch_end(
            trainer_of(logger), SimpleNamespace(policy_steps=step), None, {"rollout": rollout}, 0
        )
    assert list(client.artifacts) == [("run7", "responses/val.json")]
    assert client.artifacts["run7", "responses/val.json"]["step"] == [3, 3, 5, 5]
    assert client.artifacts["run7", "responses/val.json"]["response"] == ["four", "4"] * 2


def test_tensorboard_gets_a_text(rollout: Rollout, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugin_util import markdown_to_safe_html

    logger = TensorBoardLogger(tmp_path)
    table = ResponseTable()
    table.on_test_batch_end(trainer_of(logger), SimpleNamespace(policy_steps=4), None, {"rollout": rollout}, 0)
    logger.experiment.flush()
    events = event_accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    (event,) = events.Tensors("responses/test/text_summary")
    assert event.step == 4
    text = event.tensor_proto.string_val[0].decode()
    assert text == markdown(cells(rollout, 2, 4))
    shown = markdown_to_safe_html(text)
    assert shown.count("<tr>") == 5  # no response breaks its row
    assert "<td>a|b<br>&lt;script&gt;</td>" in shown


def test_tables_come_every_n_steps_and_with_the_first_batch_of_an_evaluation(
    rollout: Rollout, mlflow: tuple[MLFlowLogger, FakeMlflowClient]
) -> None:
    logger, client = mlflow
    trainer, table = trainer_of(logger), ResponseTable(every_n_steps=3, groups=1)
    for step in (0, 1, 2, 3, 4, 5):  # 0: the warm-up
        table.on_train_batch_end(trainer, SimpleNamespace(policy_steps=step), None, {"rollout": rollout}, 0)
    for batch_idx in (0, 1):
        table.on_validation_batch_end(trainer, SimpleNamespace(policy_steps=5), None, {"rollout": rollout}, batch_idx)
    assert client.artifacts["run7", "responses/train.json"]["step"] == [1, 1, 4, 4]
    assert client.artifacts["run7", "responses/val.json"]["step"] == [5, 5]
    ResponseTable(every_n_steps=0).on_train_batch_end(
        trainer, SimpleNamespace(policy_steps=1), None, {"rollout": rollout}, 0
    )
    table.on_train_batch_end(trainer, SimpleNamespace(policy_steps=7), None, {}, 0)  # SFT: no rollout
    assert len(client.artifacts["run7", "responses/train.json"]["step"]) == 4


def test_a_logger_that_fails_is_warned_of_once_and_the_others_get_theirs(
    rollout: Rollout, mlflow: tuple[MLFlowLogger, FakeMlflowClient]
) -> None:
    class Down:
        def log_table(self, **_: Any) -> None:
            raise ConnectionError("no network")

    class Plain:
        """A logger that takes no tables."""

    logger, client = mlflow
    trainer, table = trainer_of(Down(), Plain(), logger), ResponseTable(every_n_steps=1)
    module = SimpleNamespace(policy_steps=1)
    with pytest.warns(UserWarning, match=r"Down did not take the table .* \(ConnectionError: no network\)"):
        table.on_train_batch_end(trainer, module, None, {"rollout": rollout}, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.on_train_batch_end(trainer, SimpleNamespace(policy_steps=2), None, {"rollout": rollout}, 0)
    assert client.artifacts["run7", "responses/train.json"]["step"] == [1] * 4 + [2] * 4
