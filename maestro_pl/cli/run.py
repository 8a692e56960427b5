"""``fit``, ``validate``, ``test`` and ``predict`` on LightningCLI."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.utils.logging
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from callbacks.checkpoint import RunCheckpoint
from callbacks.progress import StageProgressBar
from callbacks.records import ResponseRecorder
from callbacks.report import EvaluationReport
from callbacks.rewards import Reward
from callbacks.rollout import RolloutGenerator
from callbacks.weights import WeightDistributionLogger
from maestro_pl.cli import RunStopped
from maestro_pl.cli.messages import condense
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import UserError
from maestro_pl.module import MaestroModule
from maestro_pl.paths import config_path, free_path, holds_run, last_checkpoint, run_dir
from maestro_pl.rollout import RewardSource

DEFAULT_CONFIG = "sandbox.yaml"

_NOISE = (
    r"LightningCLI's args parameter is intended",
    r".*does not have many workers.*",
    r".*Consider increasing the value of the `num_workers`.*",
    r".*smaller than the logging interval.*",
    r"Using ModelCheckpoint with manual optimization",
    r"Experiment logs directory .* exists and is not empty",  # `_claim` has refused folders that hold a run
    r"Checkpoint directory .* exists and is not empty",
    r"The dirpath has changed from",  # every run has its own folder
    r".*treespec, LeafSpec.*",
    r"Found \d+ module\(s\) in eval mode",  # the frozen base; the module sets its own mode
    r"`is_gradient_checkpointing` is deprecated",
)


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole config into the run's folder, never over another, and notes that work was done."""

    steps_done = False
    folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` (fit) or ``<stage>.config.yaml``."""
        self.folder = run_dir(trainer)  # on every rank: the folder's name is broadcast
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the file exclusively, so that of two runs started together one stops.

        Raises:
            UserError: another run has just taken the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = (
            self.folder / "config.yaml"
            if stage == "fit"
            else free_path(self.folder / f"{trainer.state.fn.value}.config.yaml")
        )
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self.parser.dump(self.config, skip_none=False))
        except FileExistsError:
            raise _taken(self.folder) from None
        print(f"Writing to {self.folder}", flush=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how much is trained: with adapters, a small share."""
        sizes = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        trained = sum(size for size, requires_grad in sizes if requires_grad)
        if trainer.is_global_zero:
            print(f"Training {trained:,} of {sum(size for size, _ in sizes):,} parameters", flush=True)

    def on_train_batch_end(self, *args: Any) -> None:
        """From here on a failure has something to keep."""
        self.steps_done = True


class MaestroCLI(LightningCLI):
    """LightningCLI with the keys ``rollout`` and ``rewards``; the chain of callbacks is built from them in order.

    ``trainer.callbacks`` becomes [rollout, rewards, the user's, the observers the user has not given].
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the top keys ``rollout`` and ``rewards``."""
        parser.add_class_arguments(RolloutGenerator, "rollout")
        parser.add_argument(
            "--rewards",
            type=list[Reward],
            sub_configs=True,
            default=[],
            help="Reward callbacks, in the order in which they score; a list, or the YAML file of one. "
            "`--rewards+=...` appends.",
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Leave out what ``EvaluationReport`` and ``ResponseRecorder`` decide: a config then fits every command."""
        skip = {"model", "dataloaders", "datamodule", "verbose", "return_predictions"}
        return {name: {*names, *skip} for name, names in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and condense what is wrong.

        Raises:
            UserError: a key, value, class path or file that cannot be used.
        """
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            keys = self._parser(args[0]).get_defaults().keys(branches=True)
            raise UserError(condense(str(error), args[0], keys)) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: hyper-parameters inside a checkpoint never override the config."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the whole chain of callbacks.

        Raises:
            UserError: two rewards have one name, or the trainer's arguments contradict each other.
        """
        given = self._get(self.config_init, "trainer")
        users = given.get("callbacks") or []
        users = users if isinstance(users, list) else [users]
        chain = [self._get(self.config_init, "rollout"), *self._get(self.config_init, "rewards"), *users]
        check_reward_names(chain)
        try:
            trainer = super().instantiate_trainer(callbacks=[*chain, *_missing_observers(users, given)], **kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {error}") from error
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside Trainer.__init__
        self._saved = next((c for c in callbacks if isinstance(c, SaveRunConfig)), None)
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Train, from ``ckpt_path`` if one is given."""
        self._start("fit", kwargs)

    def validate(self, **kwargs: Any) -> None:
        """Evaluate on the validation split; the table is ``EvaluationReport``'s."""
        self._start("validate", {**kwargs, "verbose": False})

    def test(self, **kwargs: Any) -> None:
        """Evaluate on the test split; the table is ``EvaluationReport``'s."""
        self._start("test", {**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
        """Generate and score; ``ResponseRecorder`` writes the responses."""
        self._start("predict", {**kwargs, "return_predictions": False})

    def _start(self, stage: str, kwargs: dict[str, Any]) -> None:
        kwargs["ckpt_path"] = self._checkpoint(kwargs.get("ckpt_path"))
        if not self._get(self.config_init, "trainer").get("fast_dev_run"):
            _claim(run_dir(self.trainer), fit=stage == "fit")
        with self._sentences():
            getattr(self.trainer, stage)(**kwargs)

    def _checkpoint(self, given: str | None) -> str | None:
        """The path of the checkpoint; ``last`` is the newest of this run's siblings, because each run has a new folder."""
        if given is None:
            return None
        logger = self.trainer.logger
        if given == "last":
            siblings = Path(self.trainer.default_root_dir) if logger is None else run_dir(self.trainer).parent
            return str(last_checkpoint(siblings))
        if not Path(given).is_file():
            raise UserError(f"--ckpt_path: there is no checkpoint {given!r}: give the path of a .ckpt file, or `last`.")
        if not zipfile.is_zipfile(given):
            raise UserError(f"--ckpt_path: {given!r} is not a checkpoint, or only a part of one.")
        return given

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """A run that ends early on bad input or Ctrl-C ends in a sentence that says what is kept."""
        handler = signal.getsignal(signal.SIGINT)
        try:
            yield
        except UserError as error:
            if self._saved is None or not self._saved.steps_done:
                raise
            raise RunStopped(f"{error} {self._kept()}", status=1) from error
        except MisconfigurationException as error:
            raise UserError(str(error)) from error
        except SystemExit as error:
            if not self.trainer.interrupted:
                raise
            raise RunStopped(f"stopped by Ctrl-C. {self._kept()}", status=130) from error
        finally:
            # Lightning ignores SIGINT while it shuts down, and would leave it ignored in a notebook
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)

    def _kept(self) -> str:
        checkpoint = next((c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        path = (checkpoint.last_model_path or checkpoint.best_model_path) if checkpoint else ""
        if not path:
            return f"No checkpoint was written yet; the run's folder is {self._saved.folder if self._saved else '.'}."
        return f"Nothing is lost: go on from it with `maestro-pl fit --ckpt_path {path}`."


def run(arguments: list[str]) -> None:
    """Run one of LightningCLI's subcommands.

    Args:
        arguments: the subcommand and its options.

    Raises:
        UserError: input that cannot be used, as one sentence.
        RunStopped: the run ended early; what it had done is kept.
    """
    quiet()
    command, arguments = arguments[0], with_config(arguments)
    sub = {"exit_on_error": False, "usage": f"maestro-pl {command} [--config FILE] [--key value ...]"}
    MaestroCLI(
        MaestroModule,
        PromptDataModule,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=trainer_defaults(arguments),
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"prog": "maestro-pl", "exit_on_error": False, command: sub},
        args=arguments,
    )


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--config`` first, so that what else is given overrides it wherever it stands.

    Without one, the config of the run that wrote ``--ckpt_path`` is taken, or else the sandbox's.
    """
    configs, others = _take(arguments[1:], ("--config", "-c"))
    if not configs and not {"-h", "--help"} & set(others):
        checkpoints, _ = _take(others, ("--ckpt_path",))
        saved = Path(checkpoints[-1]).resolve().parent.parent / "config.yaml" if checkpoints else Path()
        configs = [str(saved if saved.is_file() else config_path(DEFAULT_CONFIG))]
    return [arguments[0], *(part for config in configs for part in ("--config", config)), *others]


def _take(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of an option given as ``--name value`` or ``--name=value``, and the other arguments."""
    values, others, words = [], [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names:
            others.append(word)
        elif equals:
            values.append(value)
        elif (following := next(words, None)) is not None:
            values.append(following)
        else:
            raise UserError(f"{name} takes a file or path, and none is given.")
    return values, others


def trainer_defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """The trainer's defaults; runs go to ``runs/<the config's stem>/version_<n>``."""
    configs, _ = _take(arguments, ("--config",))
    name = Path(configs[-1]).stem if configs else "run"
    return {
        "accelerator": "auto",
        "devices": 1,
        "precision": "32-true",
        "max_epochs": -1,
        "max_steps": 200,
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": name, "flush_logs_every_n_steps": 1},
        },
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "enable_model_summary": False,
    }


def check_reward_names(chain: Sequence[Callback]) -> None:
    """Raise when two rewards of the chain have one name.

    Raises:
        UserError: naming the clash and both classes.
    """
    owners: dict[str, list[str]] = defaultdict(list)
    for callback in chain:
        if isinstance(callback, RewardSource):
            owners[callback.spec.name].append(type(callback).__name__)
    for name, classes in owners.items():
        if len(classes) > 1:
            raise UserError(
                f"rewards: {len(classes)} rewards are called {name!r} ({' and '.join(classes)}); "
                "reward names are unique in a run: give one of them another `name`."
            )


def _missing_observers(users: Sequence[Callback], trainer: Any) -> list[Callback]:
    """The default observers of which the user gave none and did not switch off."""
    wanted: list[tuple[type[Callback], type[Callback]]] = []
    if trainer.get("enable_progress_bar") is not False and not trainer.get("barebones"):
        wanted.append((ProgressBar, StageProgressBar))
    if not trainer.get("fast_dev_run") and not trainer.get("barebones"):
        wanted += [(kind, kind) for kind in (WeightDistributionLogger, ResponseRecorder, EvaluationReport)]
        if trainer.get("enable_checkpointing") is not False:
            wanted.append((ModelCheckpoint, RunCheckpoint))
    return [default() for kind, default in wanted if not any(isinstance(user, kind) for user in users)]


def _claim(folder: Path, fit: bool) -> None:
    """Refuse a folder that holds a run; evaluation may share it as long as no logger would replace ``metrics.csv``."""
    if holds_run(folder) if fit else (folder / "metrics.csv").exists():
        raise _taken(folder)


def _taken(folder: Path) -> UserError:
    return UserError(
        f"{folder} already holds a run, and a run is never overwritten: leave the logger's `version` out for a new "
        "folder, or name another with --trainer.logger.save_dir or --trainer.default_root_dir."
    )


def quiet() -> None:
    """Silence what a user of the command line cannot act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)
    if not sys.stderr.isatty():  # bars of loaded weights would fill a log file
        transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tips)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_no_kernel_hint)  # of no use on any other machine


def _no_tips(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(noise in text for noise in ("Tip:", "available: False", "`Trainer.fit` stopped: `max_steps="))


def _no_kernel_hint(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
