"""``maestro-pl rewards``: what the rewards of a config are worth, before anything is trained."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from maestro_pl.cli.arguments import RUNS, method_of, run_name, take, with_config
from maestro_pl.errors import UserError, escaped

GROUPS = 16
HELP = """usage: maestro-pl rewards --config FILE [--groups N] [--csv FILE] [--json] [--key value ...]

Samples a few groups of each task as the first batches of `maestro-pl fit` with this config would, scores them with its
rewards, and says of each task and reward: on how many responses it applies, its mean, its spread inside groups, in how many
groups it can tell the responses apart, and its correlations inside groups with the other rewards and with the anchor, which
scores every group here. Nothing is trained and no run folder is made.

options:
  --config FILE     as for `fit`; so is every key (--rollout.group_size 4), and --ckpt_path PATH: the policy of a run
  --groups N        groups of each task; default: 16
  --csv FILE        write the table there as well
  --json            one JSON object instead of the tables
"""


def rewards_command(arguments: list[str]) -> None:
    """Print the report on the rewards of a config.

    Args:
        arguments: those after ``maestro-pl rewards``.

    Raises:
        UserError: a config or an option that cannot be used, or a config without rewards.
    """
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP)
        return
    counts, others = take(arguments, ("--groups",))
    files, others = take(others, ("--csv",))
    as_json = "--json" in others
    count = _count(counts[-1]) if counts else GROUPS
    file = Path(files[-1]) if files else None
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UserError(f"--csv {file}: expected the path of a file in a folder that exists.")

    with redirect_stdout(sys.stderr):  # what the run says on its way; the tables alone go to stdout
        found = sampled([word for word in others if word != "--json"], count)

    from maestro_pl.evaluation.records import write_whole
    from maestro_pl.evaluation.reward_report_tables import csv_table, json_report, report_text

    print(json_report(found) if as_json else escaped(report_text(found)), flush=True)
    if file is not None:
        write_whole(file, csv_table(found.rows()))


def _count(given: str) -> int:
    if not given.isdecimal() or int(given) < 1:
        raise UserError(
            f"--groups {given!r}: expected how many groups to sample of each task, a whole number from 1 on."
        )
    return int(given)


def sampled(arguments: list[str], count: int) -> Any:
    """The ``RewardStatistics`` of ``count`` groups of each task, sampled and scored as ``fit`` with these arguments would.

    Raises:
        UserError: as for ``fit``.
    """
    if method_of(with_config(["fit", *arguments])) == "sft":
        raise UserError(
            "`maestro-pl rewards` looks at what a policy is trained on, and method: sft trains on references: give a config "
            "with method: grpo."
        )
    # heavy imports only once the options are known to be good
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningCLI

    from callbacks.reward_report import asked_of
    from maestro_pl.cli.run import MaestroCLI, check_reward_names, check_trainer, make_cli
    from maestro_pl.evaluation.reward_report import RewardStatistics
    from maestro_pl.rollout import RewardSource, Rollout, rollout_of
    from maestro_pl.run.paths import assign_run_dir

    statistics = RewardStatistics()

    class SamplingCLI(MaestroCLI):
        """Builds what ``fit`` would, and stops each step before the rewards are weighed."""

        def before_instantiate_classes(self) -> None:
            """Refuse what has nothing to be looked at, before a model is loaded."""
            given = [self._get(self.config, key) for key in ("rewards", "anchors", "metrics")]
            if not any(given) and not self._get(self.config, "trainer").get("callbacks"):
                raise UserError(
                    "There are no rewards to look at: list at least one under `rewards`, for instance callbacks.FormatReward."
                )

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            """A trainer on one device that writes nothing, with the scoring callbacks only."""
            scoring, users = self.scoring_and_users()
            scoring += [each for each in users if isinstance(each, RewardSource)]
            check_reward_names(scoring)
            check_trainer(self._get(self.config_init, "trainer"))
            self.save_config_callback = None
            trainer = LightningCLI.instantiate_trainer(self, callbacks=scoring, **_SAMPLING, **kwargs)
            assign_run_dir(trainer, Path(RUNS, run_name(self.arguments)))  # where `--ckpt_path last` looks
            return trainer

        def fit(self, **kwargs: Any) -> None:
            """Sample and score until each task has its groups."""
            module, data = self.model, self.datamodule
            made = data.train_dataloader
            data.train_dataloader = lambda: Wanted(made(), count)

            def step(batch: dict[str, Any], batch_idx: int) -> None:
                rollout = rollout_of(batch)
                statistics.add(rollout, asked_of(self.trainer, rollout))
                module.policy_steps += 1  # the number of the next batch, which its samples are drawn by
                done = ", ".join(f"{task} {sums.groups}" for task, sums in statistics.tasks.items())
                print(escaped(f"groups sampled: {done}"), file=sys.stderr, flush=True)

            def labelled(rollout: Rollout) -> torch.Tensor:
                return torch.ones(len(rollout.prompts), dtype=torch.bool)  # the anchors score every group

            module.training_step, module.labelled = step, labelled
            module.weigher.reads_validation = False  # it learns nothing here
            module.on_train_epoch_end = lambda: setattr(self.trainer, "should_stop", True)  # one epoch has all prompts
            kwargs["ckpt_path"] = self._checkpoint(kwargs.get("ckpt_path"), resume=True)
            with self._sentences():
                self.trainer.fit(**kwargs)

        def _kept(self) -> str:
            return "Nothing was written."

    make_cli(["fit", *arguments], SamplingCLI)
    if not statistics.tasks:
        raise UserError("No group was sampled: the config's data have no training prompt.")
    return statistics


#: What a look at the rewards does differently from ``fit``: no files, no validation, one device, no end but the data's.
_SAMPLING: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "fast_dev_run": False,
    "barebones": False,
    "profiler": None,
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "limit_train_batches": None,
    "limit_val_batches": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": 0,
}


class Wanted:
    """The training batches without the prompts of tasks that have their groups; ends where all tasks have them.

    Args:
        loader: of the training stream.
        count: prompts of each task.
    """

    def __init__(self, loader: Any, count: int) -> None:
        self.loader, self.count = loader, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        open_tasks = {str(prompt.row.values["task"]) for prompt in self.loader.prompts}
        seen: Counter[str] = Counter()
        for batch in self.loader:
            kept = []
            for place, task in enumerate(map(str, batch["task"])):
                if task in open_tasks:
                    kept.append(place)
                    seen[task] += 1
                    open_tasks -= {task} if seen[task] >= self.count else set()
            if kept:
                yield {name: [values[place] for place in kept] for name, values in batch.items()}
            if not open_tasks:
                return

    def state_dict(self) -> dict[str, Any]:
        """Empty: where training stands is in the data module's state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""
