"""PreferenceReward: the score of a pretrained reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.rewards.base import Reward
from callbacks.rewards.checks import check_choice, check_number
from maestro_pl.errors import UserError
from maestro_pl.rewards.preference import PairScorer, PairTemplate, PreferenceDType, load_pair_scorer
from maestro_pl.rewards.scores import ScoresAndMetrics
from maestro_pl.rollout import Normalization, Role, Rollout

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule

SANDBOX = "sandbox"


class PreferenceReward(Reward):
    """The score that a sequence classifier with one label gives to (prompt, response).

    The model is loaded when the run starts. It belongs to this callback, not to the module: it is never trained and
    never part of a checkpoint. The share of pairs that were cut to ``max_length`` is logged as the metric
    ``truncated``.

    Args:
        model: hub id or folder of the reward model; ``sandbox`` is the one that comes with the package.
        device: where it runs, such as ``cpu`` or ``cuda:1``; default: the trainer's device.
        dtype: of its weights; ``auto`` as they were saved.
        batch_size: pairs in one forward pass.
        max_length: tokens of a pair; a longer one loses the beginning of its prompt. Default: what the model takes.
        template: ``chat`` renders user and assistant turns with the model's chat template (``concat`` if it has none),
            ``concat`` encodes the prompt, a newline and the response.
        trust_remote_code: run the modelling code that comes with the weights.
        name: see :class:`Reward`.
        role: see :class:`Reward`.
        normalize: see :class:`Reward`; the scores have no fixed scale, hence z-scores inside the group by default.
        tasks: see :class:`Reward`.

    Raises:
        UserError: an unknown option, a device that torch does not know, or a number below 1.
    """

    default_name = "preference"

    def __init__(
        self,
        model: str = SANDBOX,
        *,
        device: str | None = None,
        dtype: PreferenceDType = "auto",
        batch_size: int = 8,
        max_length: int | None = None,
        template: PairTemplate = "chat",
        trust_remote_code: bool = False,
        name: str | None = None,
        role: Role = "train",
        normalize: Normalization = "zscore",
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role=role, normalize=normalize, tasks=tasks)
        check_choice("PreferenceReward", "dtype", dtype, PreferenceDType)
        check_choice("PreferenceReward", "template", template, PairTemplate)
        check_number("PreferenceReward", "batch_size", batch_size, at_least=1, integer=True)
        if max_length is not None:
            check_number("PreferenceReward", "max_length", max_length, at_least=1, integer=True)
        try:
            self.device = torch.device(device) if device is not None else None
        except RuntimeError as error:
            raise UserError(
                f"PreferenceReward: device is {device!r}, expected one such as cpu, cuda or cuda:1."
            ) from error
        self.model, self.dtype, self.template = model, dtype, template
        self.batch_size, self.max_length, self.trust_remote_code = batch_size, max_length, trust_remote_code
        self._scorer: PairScorer | None = None
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the callbacks around this one and load the reward model, once."""
        super().setup(trainer, pl_module, stage)
        if self._scorer is None:
            self._scorer = load_pair_scorer(
                _resolve(self.model),
                device=self.device or trainer.strategy.root_device,
                dtype=self.dtype,
                template=self.template,
                batch_size=self.batch_size,
                max_length=self.max_length,
                trust_remote_code=self.trust_remote_code,
            )

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """The reward model's score of each response, and whether its pair was cut."""
        if self._scorer is None:
            raise UserError(f"Reward {self.name!r} has no model yet: its setup() loads it when a Trainer starts a run.")
        scores, cut = self._scorer(
            [rollout.prompts[row // rollout.group_size] for row in rows],
            [rollout.responses[row] for row in rows],
            progress=lambda done: pl_module.clock.note(f"{self.name}: {done}/{len(rows)}"),
        )
        if bool(cut.any()) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"Reward {self.name!r}: {int(cut.sum())} of {len(rows)} pairs are longer than {self._scorer.max_length} tokens "
                "and lose the beginning of their prompt; the metric `truncated` counts them from here on.",
                category=UserWarning,
            )
        return scores.tolist(), {"truncated": cut.float().tolist()}


def _resolve(model: str) -> str:
    """The folder behind ``sandbox``, or the name itself."""
    if model != SANDBOX:
        return model
    from maestro_pl.sandbox import preference_path

    return str(preference_path())
