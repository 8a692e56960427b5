"""Prompts for training and evaluation: the Lightning data module."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.data.announce import announce_prompt, announce_sources, find_overlap, warn_of_overlap
from maestro_pl.data.fingerprint import fingerprint, warn_if_changed
from maestro_pl.data.loader import PromptLoader, TrainLoader
from maestro_pl.data.problems import BadRowPolicy
from maestro_pl.data.rendering import (
    Overlong,
    PromptRenderer,
    RenderedPrompt,
    SystemRole,
    check_limits,
    check_template_kwargs,
)
from maestro_pl.data.rows import Loaded, Row, evaluation_rows, load_source
from maestro_pl.data.sampling import PromptStream, SequentialSampler, StreamSampler
from maestro_pl.data.sources import Source
from maestro_pl.data.splits import SPLITS, Split, check_fractions
from maestro_pl.errors import UserError, check_choice

STAGE_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class PromptDataModule(LightningDataModule):
    """Prompts from files, ``datasets`` folders and hub ids or named sources, mixed, split, rendered and batched.

    Batches are dicts of lists: ``prompt``, ``reference``, ``task``, every other column of the rows, and
    ``prompt_text``, ``prompt_ids`` and ``position``. Training follows an endless stream that depends on ``seed`` alone;
    the checkpoint keeps the place in it, so that a resumed run sees each prompt of the epoch once.

    Args:
        sources: Where the prompts come from: one source or a list. A plain string is a source's path. In Python also rows
            themselves (``Source.of``): a list of dicts, a dict of columns, a ``datasets.Dataset``, or a dict of these by
            split.
        root: The folder from which relative paths of files and folders are taken. Default: the working folder.
        fractions: The shares of train, validation and test for sources that do not say how they are split. Default: all
            of their rows train.
        split_seed: Seed of ``fractions`` and ``eval_limit``. Keep it the same in runs that are compared.
        batch_size: Prompts a step and rank.
        eval_batch_size: Prompts a batch and rank in evaluation. Default: ``batch_size``.
        eval_limit: Validate, test and predict on at most this many prompts of each task, chosen by ``split_seed``.
        predict_split: The split that ``predict`` answers.
        system_prompt: Put in front of prompts that have no system message.
        system_role: Where system messages stand: ``system``, or in front of the first ``user`` message, for a chat
            template that knows no system role.
        chat_template_kwargs: Further arguments of the tokenizer's chat template, for instance ``{enable_thinking:
            false}``.
        max_prompt_tokens: The longest rendered prompt, in tokens. Default: any length.
        overlong: What happens to longer ones: ``error``, ``drop``, or ``truncate_left``, which takes words off the
            beginning of the last user message and leaves the chat template whole.
        on_bad_row: What happens to rows that cannot be used: ``error`` or ``drop``.
        overlap: What happens to training prompts that also stand in validation or test: ``report`` them, or ``drop``
            them from training.
        seed: Seed of the training order.
        tokenizer: A tokenizer, or its name or folder, for use without a trainer. Default: the policy's.
        show: Print the sources and the first rendered prompt at the start.
    """

    def __init__(
        self,
        sources: list[Source | str] | Source | str = "sandbox",
        root: str | None = None,
        fractions: list[float] | None = None,
        split_seed: int = 0,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        eval_limit: int | None = None,
        predict_split: Split = "test",
        system_prompt: str = "",
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_tokens: int | None = None,
        overlong: Overlong = "error",
        on_bad_row: BadRowPolicy = "error",
        overlap: Literal["report", "drop"] = "report",
        seed: int = 0,
        tokenizer: Any = None,
        show: bool = True,
        system_role: SystemRole = "system",
    ) -> None:
        super().__init__()
        self.sources = _as_sources(sources)
        if root is not None:
            if not Path(root).expanduser().is_dir():
                raise UserError(
                    f"data.root: there is no folder {root!r}; give the one that the sources' paths start from."
                )
            self.sources = [source.below(root) for source in self.sources]
        self.fractions, self.split_seed, self.seed = fractions, split_seed, seed
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.eval_limit, self.predict_split = eval_limit, predict_split
        self.system_prompt, self.chat_template_kwargs = system_prompt, chat_template_kwargs or {}
        self.system_role = system_role
        self.max_prompt_tokens, self.overlong = max_prompt_tokens, overlong
        self.on_bad_row, self.overlap = on_bad_row, overlap
        self.tokenizer, self.show = tokenizer, show
        self._check()
        self._rows: dict[Split, list[Row]] | None = None
        self._renderer: PromptRenderer | None = None
        self._rendered: dict[Split, list[RenderedPrompt]] = {}
        self._sampler: StreamSampler | None = None
        self._start = 0
        self._restored: dict[str, Any] = {}
        self._fingerprint: dict[str, Any] = {}

    def _check(self) -> None:
        if not self.sources:
            raise UserError("data.sources is an empty list; name at least one source.")
        for source in self.sources:
            source.check()
        for name in ("batch_size", "eval_batch_size", "eval_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}; expected at least 1.")
        check_limits(self.max_prompt_tokens)
        check_template_kwargs(self.chat_template_kwargs)
        check_choice("data.system_role", self.system_role, SystemRole)
        check_fractions(self.fractions, "data.fractions")
        source_weights = [source.weight for source in self.sources]
        if any(weight is None for weight in source_weights) and any(weight is not None for weight in source_weights):
            raise UserError(
                f"The weights of data.sources are {source_weights}; give every source a weight, or none of them."
            )
        if any(weight is not None for weight in source_weights) and not sum(weight or 0 for weight in source_weights):
            raise UserError(f"The weights of data.sources are {source_weights}; expected at least one above 0.")

    @property
    def rows(self) -> dict[Split, list[Row]]:
        """All rows by split; the sources are read at the first call."""
        if self._rows is None:
            loaded = [
                load_source(index, source, self.fractions, self.split_seed, self.on_bad_row)
                for index, source in enumerate(self.sources)
            ]
            if self.show:
                announce_sources(self.sources, loaded)
            self._rows = self._without_overlap(loaded)
        return self._rows

    def _without_overlap(self, loaded: list[Loaded]) -> dict[Split, list[Row]]:
        rows: dict[Split, list[Row]] = {
            split: [row for piece in loaded for row in piece.rows[split]] for split in SPLITS
        }
        overlap = find_overlap(rows)
        held_out = {key for (first, _), keys in overlap.items() if first == "train" for key in keys}
        kept = [row for row in rows["train"] if row.key not in held_out] if self.overlap == "drop" else rows["train"]
        warn_of_overlap(overlap, len(rows["train"]) - len(kept))
        if rows["train"] and not kept:
            raise UserError("Every training prompt also stands in validation or test; set data.overlap: report.")
        return {**rows, "train": kept}

    def setup(self, stage: str | None = None) -> None:
        """Read the sources, and render the prompts of the stage if the tokenizer is there.

        Raises:
            UserError: a source or row cannot be used, or a split that the stage needs is empty.
        """
        if stage == "fit" and not self._trained_before():
            self._start, self._sampler, self._restored = 0, None, {}
        if stage in ("fit", "validate", "test", "predict"):
            for split in STAGE_SPLITS.get(stage, (self.predict_split,)):
                # fit does without validation
                if self.rows[split] or not (stage == "fit" and split == "validation"):
                    self._check_not_empty(split, str(getattr(stage, "value", stage)))
                    if self._find_tokenizer() is not None:
                        self.prompts(split)
                elif getattr(self.trainer, "limit_val_batches", 1) != 0:
                    rank_zero_warn(
                        "The data have no validation prompts, so nothing is evaluated while training, and there is no table of "
                        "before and after: give a source with `split: validation` or set data.fractions, for instance "
                        "[0.9, 0.1, 0]; --trainer.limit_val_batches 0 says that none is wanted."
                    )

    def _check_not_empty(self, split: Split, stage: str) -> None:
        if not self.rows[split]:
            counts = ", ".join(f"{len(self.rows[s])} {s}" for s in SPLITS)
            if stage == "predict":
                raise UserError(
                    f"There are no {split} prompts to predict on ({counts}): new prompts are a source with `split: {split}`, "
                    f"for instance --data.sources '[{{path: new.jsonl, split: {split}}}]'; --data.predict_split train answers "
                    "those of another split."
                )
            raise UserError(
                f"There are no {split} prompts to {stage} on ({counts}): give a source a {split} file, a split_column, "
                "or set data.fractions, for instance [0.8, 0.1, 0.1]."
            )

    def _trained_before(self) -> bool:
        """Whether the trainer goes on with a fit of its own (``trainer.fit`` called again)."""
        return self.trainer is not None and self.trainer.fit_loop.epoch_loop.batch_progress.total.ready > 0

    def _find_tokenizer(self) -> Any:
        if isinstance(self.tokenizer, str):
            from transformers import AutoTokenizer

            try:
                self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"data.tokenizer {self.tokenizer!r} cannot be loaded: {reason}") from error
        if self.tokenizer is not None:
            return self.tokenizer
        policy = getattr(self.trainer.lightning_module, "policy", None) if self.trainer is not None else None
        return getattr(policy, "tokenizer", None)

    def _positions(self) -> int | None:
        """How many positions the policy's model has, if there is a policy and its config says so."""
        policy = getattr(self.trainer.lightning_module, "policy", None) if self.trainer is not None else None
        config: Any = getattr(getattr(policy, "model", None), "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        positions = getattr(config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) and positions > 0 else None

    def prompts(self, split: Split) -> list[RenderedPrompt]:
        """The rendered prompts of a split: all of them for train, at most ``eval_limit`` a task for the others.

        Raises:
            UserError: there is no tokenizer, or a prompt cannot be rendered or is too long.
        """
        tokenizer = self._find_tokenizer()
        if tokenizer is None:
            raise UserError(
                "There is no tokenizer to render prompts with: train a module with a policy, or set data.tokenizer."
            )
        if self._renderer is None or self._renderer.tokenizer is not tokenizer:
            self._renderer = PromptRenderer(
                tokenizer,
                self.system_prompt,
                self.chat_template_kwargs,
                self.max_prompt_tokens,
                self.overlong,
                self.system_role,
                self._positions(),
            )
            self._rendered = {}
        if split not in self._rendered:
            first = not self._rendered
            rows = (
                self.rows[split]
                if split == "train"
                else evaluation_rows(self.rows[split], self.eval_limit, self.split_seed)
            )
            self._rendered[split] = self._renderer.render(rows, split, self.on_bad_row)
            if rows and not self._rendered[split]:
                limit = self.max_prompt_tokens
                within = f"max_prompt_tokens={limit}; raise it" if limit is not None else "the model's positions"
                raise UserError(f"No {split} prompt is within {within}.")
            if first and self._rendered[split] and self.show:
                announce_prompt(self._rendered[split][0])
        return self._rendered[split]

    def train_dataloader(self) -> TrainLoader:
        """The batches of an epoch, from the first prompt not yet trained on."""
        prompts = self.prompts("train")
        sizes = [sum(prompt.row.source == index for prompt in prompts) for index in range(len(self.sources))]
        source_weights = [source.weight for source in self.sources if source.weight is not None]
        stream = PromptStream(sizes, source_weights or None, self.seed)
        start = self._start if self._sampler is None else self._sampler.start
        frozen = getattr(self.trainer, "overfit_batches", 0) > 0
        self._sampler = StreamSampler(stream, self.batch_size, *self._rank(), start=start, frozen=frozen)
        self._fingerprint = fingerprint(prompts, stream)
        self._compare_with_checkpoint()
        return TrainLoader(prompts, self._sampler)

    def val_dataloader(self) -> PromptLoader | list[PromptLoader]:
        """The validation batches; none if there are no validation prompts."""
        return self._evaluation_loader("validation") if self.rows["validation"] else []

    def test_dataloader(self) -> PromptLoader:
        """The test batches."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> PromptLoader:
        """The batches of ``predict_split``."""
        return self._evaluation_loader(self.predict_split)

    def _evaluation_loader(self, split: Split) -> PromptLoader:
        prompts = self.prompts(split)
        return PromptLoader(prompts, SequentialSampler(len(prompts), self.eval_batch_size, *self._rank()))

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave the batch as it is: it holds no tensors, and walking through its lists costs time."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note that training has taken up a batch: the last hook of a data module before the training step."""
        if self._sampler is not None and self.trainer is not None and self.trainer.training:
            self._sampler.advance()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The first position not yet trained on, and what tells whether the data is still the same."""
        if self._sampler is None:
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current if self.trainer is not None else None
        # a checkpoint saved on an exception: the batch was taken up, but its step is not done
        in_flight = progress is not None and progress.ready > progress.processed
        return {"position": self._sampler.position(in_flight), **self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the position of the checkpoint."""
        self._start, self._restored = state_dict["position"], state_dict
        if self._sampler is not None:
            self._sampler.start = self._sampler.before = self._start
            self._compare_with_checkpoint()

    def _compare_with_checkpoint(self) -> None:
        if self._restored and self._fingerprint:
            warn_if_changed(self._restored, self._fingerprint, self._start)
            self._restored = {}


def _as_sources(given: Any) -> list[Source]:
    """Sources out of what ``sources`` may be: sources, paths, and rows in memory."""
    rows = (
        isinstance(given, list) and bool(given) and all(isinstance(item, dict) and "path" not in item for item in given)
    )
    return [_as_source(item) for item in (given if isinstance(given, list) and not rows else [given])]


def _as_source(given: Any) -> Source:
    if isinstance(given, Source):
        return given
    if isinstance(given, str):
        return Source.from_text(given)
    if isinstance(given, dict) and isinstance(given.get("path"), (str, dict)):
        known = sorted(field.name for field in fields(Source))
        if strangers := sorted(set(given) - set(known)):
            raise UserError(f"data.sources: a source has no key {strangers[0]!r}; its keys may be {', '.join(known)}.")
        return Source(**given)
    if isinstance(given, dict) and given and all(isinstance(item, str) for item in given.values()):
        return Source(path=given)
    return Source.of(given)
