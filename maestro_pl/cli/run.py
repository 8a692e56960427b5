"""``fit``, ``validate``, ``test`` and ``predict`` on LightningCLI."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from callbacks.checkpoint import RunCheckpoint
from callbacks.memory import MemoryProbe
from callbacks.progress import StageProgressBar
from callbacks.records import ResponseRecorder
from callbacks.report import EvaluationReport
from callbacks.response_table import ResponseTable
from callbacks.reward_report import RewardReport
from callbacks.reward_table import RewardTable
from callbacks.rewards import Reward
from callbacks.rollout import RolloutGenerator
from callbacks.run_report import RunReport
from callbacks.weights import WeightDistributionLogger
from maestro_pl.cli.arguments import (
    METHODS,
    RUNS,
    default_weigher,
    method_of,
    named_files,
    run_name,
    take,
    trainer_defaults,
    whole_lists,
    with_config,
)
from maestro_pl.cli.class_paths import allow_files, with_files
from maestro_pl.cli.compose import own_keys, with_parts
from maestro_pl.cli.constructors import own_error
from maestro_pl.cli.folder import Guarded, SaveRunConfig, claim, is_about
from maestro_pl.cli.fresh import fresh_classes
from maestro_pl.cli.messages import condense, no_keys, yaml_problem
from maestro_pl.cli.quiet import quiet
from maestro_pl.cli.text import headed
from maestro_pl.data import PromptDataModule
from maestro_pl.errors import LARGEST_SEED, RunStopped, UserError, check_seed
from maestro_pl.module import MaestroModule
from maestro_pl.rollout import check_reward_names
from maestro_pl.run.ending import asked_to_end, end_children, starts_ranks
from maestro_pl.run.others import OURS, origin, told
from maestro_pl.run.paths import (
    assign_run_dir,
    checkpoints_in,
    file_logger,
    fix_places,
    newest_checkpoint,
    run_dir,
    shown,
)
from maestro_pl.run.ranks import is_late_rank, is_lost_rank
from maestro_pl.run.yaml_files import guard_jsonargparse
from maestro_pl.training.checkpointing import check_file
from maestro_pl.training.fsdp import strategy_of

#: What is no plain value among the defaults of ``Meta``, as YAML says it: the parser can show an object of a class
#: only where its own default says how it was made.
META_DEFAULTS = {
    "signal": {"class_path": "maestro_pl.AdvantageSignal"},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 5e-5}},
}


class Parser(LightningArgumentParser):
    """LightningArgumentParser, save that a file under ``data`` is data, that a config may name files (compose.py), and that
    an optimizer or scheduler of another class starts from that class's own defaults (fresh.py).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._working = Path.cwd()  # while a file is parsed, its own folder is the current one

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Any:
        """Parse the command line."""
        return super().parse_args(None if args is None else fresh_classes(args), *others, **options)

    def parse_string(self, content: str, path: Any = "", **kwargs: Any) -> Any:
        """Parse the keys of a config; those of its parts have been given before it."""
        return super().parse_string(own_keys(content, Path(path).absolute(), self._working), path, **kwargs)

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

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """The config as text, with the files of classes that are given by their file."""
        return with_files(super().dump(*args, **kwargs))


class MaestroCLI(LightningCLI):
    """LightningCLI with the keys ``method``, ``rollout``, ``rewards``, ``anchors`` and ``metrics``.

    ``trainer.callbacks`` becomes [rollout, rewards, anchors, metrics, the user's, the observers the user has not given].
    """

    _saved: SaveRunConfig | None = None

    def __init__(self, command: str, *args: Any, **kwargs: Any) -> None:
        self.command, self.arguments = command, list(kwargs["args"])
        self._chosen: dict[str, Any] = {}  # under `model`, where the config names no weigher
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
        if method_of(self.arguments) == "grpo":
            self._chosen = default_weigher(self.arguments)
            parser.set_defaults({f"model.{key}": value for key, value in self._chosen.items()})
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
        configs, _ = take(args, ("--config",))
        for config in configs:
            if problem := yaml_problem(config):
                raise UserError(f"{config} is not valid YAML: {problem}.")
        try:
            super().parse_arguments(parser, args)
        except argparse.ArgumentError as error:
            if "codec can't decode" in str(error):  # in a file that a config or an argument names, and no word which
                for file in named_files(args, configs):
                    if problem := yaml_problem(file):
                        raise UserError(f"the file {file!r} is not valid YAML: {problem}.") from error
            keys = [*self._parser(args[0]).get_defaults().keys(branches=True), "config", "print_config", "help"]
            raise UserError(condense(str(error), args[0], keys, configs)) from error
        given = self.config.get(args[0], {})
        for key in sorted(self._parser(args[0]).groups):  # in a file, the parser lets null stand for all keys of one
            if key in given and given[key] is None:
                raise UserError(no_keys(key, "null"))

    def _set_seed(self) -> None:
        """Seed every generator.

        Raises:
            UserError: the seed, or the one in the environment that ``seed_everything: true`` takes, is out of bounds.
        """
        check_seed("seed_everything", self._get(self.config, "seed_everything"))
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(
                f"PL_GLOBAL_SEED={os.environ['PL_GLOBAL_SEED']}: expected a whole number from 0 to {LARGEST_SEED}."
            ) from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: hyper-parameters inside a checkpoint never override the config."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the whole chain of callbacks.

        Raises:
            UserError: names of rewards that cannot stand side by side, or the trainer's arguments contradict each other.
        """
        given = self._get(self.config_init, "trainer")
        scoring, users = self.scoring_and_users()
        chain = [*scoring, *users]
        check_reward_names(chain)
        check_trainer(given)
        if given.get("default_root_dir") and "://" not in str(given.get("default_root_dir")):
            kwargs["default_root_dir"] = os.path.abspath(given.get("default_root_dir"))
        kwargs["strategy"] = strategy_of(given.get("strategy", "auto"))
        try:
            trainer = super().instantiate_trainer(callbacks=[*chain, *_missing_observers(users, given)], **kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {error}") from error
        fix_places(trainer.loggers)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside Trainer.__init__
        self._saved = next((c for c in callbacks if isinstance(c, SaveRunConfig)), None)
        for callback in callbacks:
            callback.on_exception = Guarded(callback)  # type: ignore[method-assign]
        root = kwargs.get("default_root_dir") or given.get("default_root_dir")
        # without a logger, a folder that was named is the run's own
        if file_logger(trainer.loggers) is None and (trainer.loggers or not root) and not given.get("fast_dev_run"):
            places = [logger.save_dir for logger in trainer.loggers if logger.save_dir not in (None, ".", "./")]
            assign_run_dir(trainer, Path(*(places[:1] or [root or RUNS]), run_name(self.arguments)))
        return trainer

    def scoring_and_users(self) -> tuple[list[Callback], list[Callback]]:
        """[rollout, rewards, anchors, metrics], each with its role, and the callbacks that the user has given."""
        users = self._get(self.config_init, "trainer").get("callbacks") or []
        users = users if isinstance(users, list) else [users]
        metrics = self._get(self.config_init, "metrics")
        for metric in metrics:
            metric.be_metric()
        anchors = self._get(self.config_init, "anchors")
        for anchor in anchors:
            anchor.be_anchor()
        rewards = self._get(self.config_init, "rewards")
        return [self._get(self.config_init, "rollout"), *rewards, *anchors, *metrics], users

    def instantiate_classes(self) -> None:
        """Build everything that the config names.

        Raises:
            UserError: a class needs a package that is not installed, or one of the user's raised something.
        """
        try:
            super().instantiate_classes()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # an exit too: it would end the command without a word
            known = isinstance(error, (ModuleNotFoundError, ValueError))
            if known and (missing := _missing_package(error)) is not None:
                raise UserError(f"the config names a class whose package is missing: {first_line(missing)}") from error
            if (own := own_error(error)) is not None:
                raise own from error
            raise

    def fit(self, **kwargs: Any) -> None:
        """Train, from ``ckpt_path`` if one is given."""
        if self._chosen:
            _say_weigher(anchored="meta.learner" in self._chosen)
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
        kwargs["ckpt_path"] = self._checkpoint(kwargs.get("ckpt_path"), resume=stage == "fit")
        with self._sentences():
            if not self._get(self.config_init, "trainer").get("fast_dev_run"):
                claim(run_dir(self.trainer), fit=stage == "fit")
            starts_ranks(self.trainer)
            getattr(self.trainer, stage)(**kwargs)

    def _checkpoint(self, given: str | None, resume: bool) -> str | None:
        """The path of the checkpoint, which is a whole one.

        ``last`` is the newest of this run's siblings that is, because each run has a new folder.
        """
        if given is None:
            return None
        if given != "last":
            check_file(given, resume)
            return given
        folder = run_dir(self.trainer)
        own = str(folder) == self.trainer.default_root_dir  # no logger, and a folder that was named: the run's alone
        damaged: list[str] = []
        for path in checkpoints_in(folder if own else folder.parent):
            try:
                check_file(str(path), resume)
            except UserError as error:
                damaged.append(str(error))
                continue
            if damaged:
                rank_zero_warn(f"{' '.join(damaged)} `--ckpt_path last` takes {shown(path)}, the newest whole one.")
            return str(path)
        raise UserError(f"--ckpt_path last: no checkpoint is whole. {' '.join(damaged)}")

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """A run that ends early on bad input, a full disk or Ctrl-C ends in a sentence that says what is kept.

        It is about what happened first: loggers and observers that fail on the way out hide nothing.
        """
        try:
            yield
        except BaseException as last:
            first = (self._saved and self._saved.first_error) or last
            sentence = self._sentence(first)
            end_children(self.trainer)
            if sentence is not None:
                raise sentence from first
            self._say_kept(first)  # a bug keeps its traceback
            if first is last:
                raise
            raise first from first.__cause__

    def _sentence(self, error: BaseException) -> UserError | None:
        """What a user reads in place of this error; None where it is a bug."""
        if isinstance(error, UserError):
            if not self._steps_done() and not asked_to_end(self.trainer):
                return error
            status = 143 if asked_to_end(self.trainer) else 1
            return RunStopped(f"{error}{_after(str(error))}{self._kept()}", status=status)
        if isinstance(error, MisconfigurationException) or (
            isinstance(error, RuntimeError) and _from_lightning(error, "lightning.pytorch.callbacks.")
        ):  # such as a monitor that is not logged
            return (
                RunStopped(f"trainer: {error} {self._kept()}", 1)
                if self._steps_done()
                else UserError(f"trainer: {error}")
            )
        if isinstance(error, ValueError):
            return None if self._steps_done() or not _from_lightning(error) else UserError(f"trainer: {error}")
        if isinstance(error, KeyboardInterrupt):
            return RunStopped(f"stopped by Ctrl-C. {self._kept()}", status=130)
        if isinstance(error, SystemExit) and asked_to_end(self.trainer):
            return RunStopped(f"stopped by SIGTERM. {self._kept()}", status=143)
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):  # Lightning's
            return RunStopped(f"stopped by Ctrl-C. {self._kept()}", status=130)
        if isinstance(error, SystemExit | GeneratorExit):  # by code of others
            return RunStopped(f"{self._whose(error)} {self._kept()}", status=1)
        if isinstance(error, OSError) and is_about(error, run_dir(self.trainer)):
            return self._no_room(error)
        if is_lost_rank(error):
            others = f"another of the {self.trainer.world_size} ranks"
            if asked_to_end(self.trainer):
                return RunStopped(f"stopped by SIGTERM, and so was {others}. {self._kept()}", status=143)
            if is_late_rank(error):
                what = f"{others} did not answer within the limit of trainer.strategy (`timeout`); all are ended."
            else:
                what = f"{others} has ended; what it said stands above, or in its log."
            return RunStopped(f"{what} {self._kept()}", status=1)
        return None

    def _no_room(self, error: OSError) -> UserError:
        what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        if self._steps_done():
            return RunStopped(f"The run's folder cannot be written: {what}. {self._kept()}", status=1)
        return UserError(
            f"The run's folder {shown(run_dir(self.trainer))} cannot be written: {what}. Name another with "
            "--trainer.logger.save_dir or --trainer.default_root_dir."
        )

    def _owner(self, error: BaseException) -> str | None:
        """The user's callback, or what else of a foreign class the trainer calls, that an error came out of."""
        trace, owner = error.__traceback__, None
        while trace is not None:
            caller = trace.tb_frame.f_locals.get("self")
            module = type(caller).__module__.partition(".")[0]
            if isinstance(caller, Callback | Logger) and module not in (*OURS, "lightning"):
                owner = f"{type(caller).__module__}.{type(caller).__qualname__}.{trace.tb_frame.f_code.co_name}"
            trace = trace.tb_next
        return owner

    def _say_kept(self, error: BaseException) -> None:
        """Above a traceback: whose error it was, and what is kept."""
        if self._steps_done() or self._owner(error) is not None:
            print(headed("error", f"{self._whose(error)} {self._kept()}"), file=sys.stderr)

    def _whose(self, error: BaseException) -> str:
        """Whose error it was, and which."""
        return f"{with_files(self._owner(error) or 'The run')} raised {told(error)} ({origin(error)})."

    def _steps_done(self) -> bool:
        return self._saved is not None and self._saved.steps_done

    def _kept(self) -> str:
        path = newest_checkpoint(self.trainer)
        if not path:
            return f"No checkpoint was written yet; the run's folder is {shown(self._saved.folder) if self._saved else '.'}."
        saved = [c.saved_at for c in self.trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)]
        done = getattr(self.model, "batches_done", -1)
        kept = "Nothing is lost: go on from it" if done in saved else "Go on from the last state that was saved"
        return f"{kept} with `maestro-pl fit --ckpt_path {shown(path)}`."


@rank_zero_only  # type: ignore[untyped-decorator,unused-ignore]
def _say_weigher(anchored: bool) -> None:
    """Say who weighs where the config does not."""
    if anchored:
        print(
            "model.weigher is not given, and anchors are: a Conductor learns the weights from them (AnchorSignal, ridge, "
            "3 batches of warm-up)."
        )
    else:
        print("model.weigher is not given, and no anchors are: all rewards weigh the same (maestro_pl.EqualWeights).")


def _missing_package(error: BaseException | None) -> ModuleNotFoundError | None:
    """The error of a package that is not installed, which the parser hides behind its own."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _after(message: str) -> str:
    """What stands between a message and the sentence that follows it."""
    return "\n" if "\n" in message.strip() else " "


def _from_lightning(error: BaseException, within: str = "lightning.") -> bool:
    """Whether Lightning itself raised, on arguments that contradict each other, and not code it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(within)


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
    guard_jsonargparse()
    allow_files()
    command, given = arguments[0], with_config(arguments)
    arguments = with_parts(given)
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
        trainer_defaults=trainer_defaults(given),
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_class=Parser,
        parser_kwargs={"prog": "maestro-pl", "exit_on_error": False, "allow_abbrev": False, command: sub},
        args=whole_lists(arguments),
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
    interval = arguments.get("val_check_interval")
    if isinstance(interval, int | float) and not interval > 0:
        raise UserError(
            f"trainer.val_check_interval={interval}: expected batches above 0; --trainer.limit_val_batches 0 leaves validation "
            "out."
        )


OBSERVERS: tuple[type[Callback], ...] = (
    RewardTable,
    WeightDistributionLogger,
    ResponseRecorder,
    ResponseTable,
    RewardReport,
    RunReport,  # before the one that names it
    EvaluationReport,
    MemoryProbe,
)


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
