"""What the first batches of ``fit`` would be, for commands that look at them and train nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_pl.cli.arguments import RUNS, method_of, run_name, with_config
from maestro_pl.errors import UserError


@dataclass(frozen=True)
class Look:
    """A batch that was sampled and scored.

    Attributes:
        trainer: of the run that there is not.
        module: its ``MaestroModule``, never updated.
        rollout: with the scores of the rewards.
    """

    trainer: Any
    module: Any
    rollout: Any


def look_at(
    arguments: list[str],
    command: str,
    see: Callable[[Look], Any],
    batches: Callable[[Any], Any] = lambda loader: loader,
    anchors: bool = False,
) -> None:
    """Sample and score as ``fit`` with these arguments would, one epoch at most; nothing is trained or written.

    Args:
        arguments: of ``fit``.
        command: who asks, for the sentences.
        see: is shown each batch; True ends it.
        batches: the training batches that are sampled.
        anchors: whether the anchors score every group, or none.

    Raises:
        UserError: as for ``fit``; or the config trains without rewards.
    """
    if method_of(with_config(["fit", *arguments])) == "sft":
        raise UserError(
            f"`maestro-pl {command}` looks at what a policy is trained on, and method: sft trains on references: give a config "
            "with method: grpo."
        )
    # heavy imports only once the options are known to be good
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningCLI

    from maestro_pl.cli.run import MaestroCLI, check_trainer, make_cli
    from maestro_pl.rollout import RewardSource, Rollout, check_reward_names, rollout_of
    from maestro_pl.run.paths import assign_run_dir

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
            """Sample and score, until the one who looks has seen enough."""
            module, data = self.model, self.datamodule
            made = data.train_dataloader
            data.train_dataloader = lambda: batches(made())

            def step(batch: dict[str, Any], batch_idx: int) -> None:
                self.trainer.should_stop |= bool(see(Look(self.trainer, module, rollout_of(batch))))
                module.policy_steps += 1  # the number of the next batch, which its samples are drawn by

            def labelled(rollout: Rollout) -> torch.Tensor:
                return torch.full((len(rollout.prompts),), anchors)

            module.training_step, module.labelled = step, labelled
            module.weigher.reads_validation = False  # it learns nothing here, and nothing is said of labels
            module.outer.announce = module.outer.announce_end = lambda *_: None
            module.on_train_epoch_end = lambda: setattr(self.trainer, "should_stop", True)  # one epoch has all prompts
            kwargs["ckpt_path"] = self._checkpoint(kwargs.get("ckpt_path"), resume=True)
            with self._sentences():
                self.trainer.fit(**kwargs)

        def _kept(self) -> str:
            return "Nothing was written."

    make_cli(["fit", *arguments], SamplingCLI)


#: What a look does differently from ``fit``: no files, no validation, one device, no end but the data's.
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
