"""``fit``, ``validate``, ``test`` and ``predict`` on LightningCLI."""

from __future__ import annotations

import argparse
import importlib
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from callbacks.checkpoint import RunCheckpoint
from callbacks.memory import MemoryProbe
from callbacks.progress import StageProgressBar
from callbacks.records import ResponseRecorder
from callbacks.report import EvaluationReport
from callbacks.rewards import Reward
from callbacks.rollout import RolloutGenerator
from callbacks.weights import WeightDistributionLogger
from maestro_pl.cli.arguments import METHODS, method_of, take, trainer_defaults, whole_lists, with_config
from maestro_pl.cli.folder import SaveRunConfig, claim
from maestro_pl.cli.fresh import fresh_classes
from maestro_pl.cli.messages import condense
from maestro_pl.cli.quiet import quiet
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import RunStopped, UserError
from maestro_pl.module import MaestroModule
from maestro_pl.rollout import RewardSource
from maestro_pl.run.paths import last_checkpoint, run_dir
from maestro_pl.training.checkpointing import check_file

#: What is no plain value among the defaults of ``Meta``, as YAML says it: the parser can show an object of a class
#: only where its own default says how it was made.
META_DEFAULTS = {
    "signal": {"class_path": "maestro_pl.AdvantageSignal"},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-5}},
}


class Parser(LightningArgumentParser):
    """LightningArgumentParser, save that a file named under ``data`` is data and never a file of arguments, and that
    an optimizer or scheduler of another class starts from that class's own defaults.
    """

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        """Parse the command line."""
        return super().parse_args(None if args is None else fresh_classes(args), *others, **options)

    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, required: bool = True
    ) -> list[str]:
        """Add the arguments of the trainer, the model or the data module."""
        if nested_key == "data":  # otherwise `--data.sources mine.jsonl` would read the file as YAML
            return list(self.add_class_arguments(lightning_class, nested_key, fail_untyped=False))
        added = super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)
        if lightning_class is MaestroModule:
            self.set_defaults({f"{nested_key}.meta.{name}": value for name, value in META_DEFAULTS.items()})
        return added


class MaestroCLI(LightningCLI):
    """LightningCLI with the keys ``method``, ``rollout``, ``rewards``, ``anchors`` and ``metrics``.

    ``trainer.callbacks`` becomes [rollout, rewards, anchors, metrics, the user's, the observers the user has not given].
    """

    def __init__(self, command: str, *args: Any, **kwargs: Any) -> None:
        self.command, self.arguments = command, list(kwargs["args"])
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the top keys ``method``, ``rollout``, ``rewards``, ``anchors`` and ``metrics``."""
        parser.add_argument(
            "--method",
            type=Literal[tuple(METHODS)],
            default=method_of(self.arguments),
            help="How the policy is trained, which decides what stands under `model`: grpo (MaestroModule), sft (SFTModule).",
        )
        parser.add_class_arguments(RolloutGenerator, "rollout")
        parser.add_argument(
            "--rewards",
            type=list[Reward],
            sub_configs=True,
            default=[],
            help="Reward callbacks, in the order in which they score; a list, or the YAML file of one. "
            "`--rewards+=...` appends.",
        )
        parser.add_argument(
            "--anchors",
            type=list[Reward],
            sub_configs=True,
            default=[],
            help="What the Conductor learns from on a share of the groups (`model.anchoring.fraction`): reward callbacks, all "
            "taken with role `anchor`, so that another reward set under `rewards` leaves them alone.",
        )
        parser.add_argument(
            "--metrics",
            type=list[Reward],
            sub_configs=True,
            default=[],
            help="What responses are evaluated by: reward callbacks, all taken with role `metric`, so that another reward "
            "set under `rewards` leaves the evaluation alone.",
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in LightningCLI, called on self
        """Only the command at hand, because a parser takes its time to build.

        ``verbose`` and ``return_predictions`` are left out, since the observers decide them: a config then fits every
        command.
        """
        skip = {"model", "dataloaders", "datamodule", "verbose", "return_predictions"}
        return {self.command: {*LightningCLI.subcommands()[self.command], *skip}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and condense what is wrong.

        Raises:
            UserError: a key, value, class path or file that cannot be used.
        """
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            configs, _ = take(args, ("--config",))
            keys = [*self._parser(args[0]).get_defaults().keys(branches=True), "config", "print_config", "help"]
            raise UserError(condense(str(error), args[0], keys, configs)) from error

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
        metrics = self._get(self.config_init, "metrics")
        for metric in metrics:
            metric.be_metric()
        anchors = self._get(self.config_init, "anchors")
        for anchor in anchors:
            anchor.be_anchor()
        rewards = self._get(self.config_init, "rewards")
        chain = [self._get(self.config_init, "rollout"), *rewards, *anchors, *metrics, *users]
        check_reward_names(chain)
        check_trainer(given)
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
            claim(run_dir(self.trainer), fit=stage == "fit")
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
        check_file(given)
        return given

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """A run that ends early on bad input or Ctrl-C ends in a sentence that says what is kept."""
        try:
            yield
        except UserError as error:
            if not self._steps_done():
                raise
            raise RunStopped(f"{error}{_after(str(error))}{self._kept()}", status=1) from error
        except (MisconfigurationException, ValueError) as error:
            if self._steps_done() or not _from_lightning(error):
                raise
            raise UserError(f"trainer: {error}") from error
        except SystemExit as error:
            if not self.trainer.interrupted:
                raise
            name, status = ("SIGTERM", 143) if self.trainer.received_sigterm else ("Ctrl-C", 130)
            raise RunStopped(f"stopped by {name}. {self._kept()}", status=status) from error

    def _steps_done(self) -> bool:
        return self._saved is not None and self._saved.steps_done

    def _kept(self) -> str:
        checkpoint = next((c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)), None)
        path = (checkpoint.last_model_path or checkpoint.best_model_path) if checkpoint else ""
        if not path:
            return f"No checkpoint was written yet; the run's folder is {self._saved.folder if self._saved else '.'}."
        return f"Nothing is lost: go on from it with `maestro-pl fit --ckpt_path {path}`."


def _after(message: str) -> str:
    """What stands between a message and the sentence that follows it."""
    return "\n" if "\n" in message.strip() else " "


def _from_lightning(error: BaseException) -> bool:
    """Whether Lightning itself raised, on arguments that contradict each other, and not code it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def run(arguments: list[str]) -> None:
    """Run one of LightningCLI's subcommands.

    Args:
        arguments: the subcommand and its options.

    Raises:
        UserError: input that cannot be used, as one sentence.
        RunStopped: the run ended early; what it had done is kept.
    """
    make_cli(arguments, MaestroCLI)


def make_cli(arguments: list[str], cli: type[MaestroCLI]) -> MaestroCLI:
    """Parse the arguments of a subcommand and hand them to a ``MaestroCLI``, which runs it.

    Raises:
        UserError: as :func:`run`.
    """
    quiet()
    command, arguments = arguments[0], with_config(arguments)
    sub = {
        "exit_on_error": False,
        "allow_abbrev": False,
        "usage": f"maestro-pl {command} [--config FILE] [--key value ...]",
    }
    module, name = METHODS[method_of(arguments)].split(":")
    return cli(
        command,
        getattr(importlib.import_module(module), name),
        PromptDataModule,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults=trainer_defaults(arguments),
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=Parser,
        parser_kwargs={"prog": "maestro-pl", "exit_on_error": False, "allow_abbrev": False, command: sub},
        args=whole_lists(arguments),
    )


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


def check_trainer(arguments: Any) -> None:
    """Raise where Lightning's own argument has another place here, because the module optimises by hand.

    Raises:
        UserError: naming the argument to use.
    """
    if arguments.get("gradient_clip_val"):
        raise UserError("trainer.gradient_clip_val is not used here: give model.max_grad_norm.")
    if arguments.get("accumulate_grad_batches", 1) != 1:
        raise UserError(
            "trainer.accumulate_grad_batches is not used here: data.batch_size prompts make one step, in micro-batches "
            "of model.micro_batch_tokens tokens."
        )


OBSERVERS: tuple[type[Callback], ...] = (WeightDistributionLogger, ResponseRecorder, EvaluationReport, MemoryProbe)


def _missing_observers(users: Sequence[Callback], trainer: Any) -> list[Callback]:
    """The default observers of which the user gave none and did not switch off."""
    wanted: list[tuple[type[Callback], type[Callback]]] = []
    if trainer.get("enable_progress_bar") is not False and not trainer.get("barebones"):
        wanted.append((ProgressBar, StageProgressBar))
    if not trainer.get("fast_dev_run") and not trainer.get("barebones"):
        wanted += [(kind, kind) for kind in OBSERVERS]
        if trainer.get("enable_checkpointing") is not False:
            wanted.append((ModelCheckpoint, RunCheckpoint))
    return [default() for kind, default in wanted if not any(isinstance(user, kind) for user in users)]
