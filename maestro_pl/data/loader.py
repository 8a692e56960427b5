"""Rows to batches: dicts of lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from maestro_pl.data.rendering import RenderedPrompt
from maestro_pl.data.sampling import SequentialSampler, StreamSampler


def all_columns(prompts: Sequence[RenderedPrompt]) -> list[str]:
    """The union of the rows' columns, in the order in which they first appear."""
    return list(dict.fromkeys(column for prompt in prompts for column in prompt.row.values))


def collate(prompts: Sequence[RenderedPrompt], positions: Sequence[int], columns: Sequence[str]) -> dict[str, Any]:
    """A batch: every column as a list, None where a row lacks it, and what the policy reads.

    Args:
        prompts: the N rows of the batch.
        positions: the place of each in the training stream (in evaluation: in the split).
        columns: the columns that every batch of the split has.

    Returns:
        N values under each key: ``prompt``, ``reference``, ``task`` and the other columns, ``prompt_text``,
        ``prompt_ids`` (a list of token ids each) and ``position``.
    """
    batch: dict[str, Any] = {column: [p.row.values.get(column) for p in prompts] for column in columns}
    batch["prompt_text"] = [p.text for p in prompts]
    batch["prompt_ids"] = [p.ids.tolist() for p in prompts]
    batch["position"] = list(positions)
    return batch


class PromptLoader:
    """Iterates over the batches of a split.

    Not a ``DataLoader``: there is nothing to load in workers, and Lightning rebuilds the samplers of those it is given.
    """

    def __init__(self, prompts: Sequence[RenderedPrompt], batches: StreamSampler | SequentialSampler) -> None:
        self.prompts, self.batches = prompts, batches
        self.columns = all_columns(prompts)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for places in self.batches:
            positions = [position for position, _ in places]
            yield collate([self.prompts[row] for _, row in places], positions, self.columns)


class TrainLoader(PromptLoader):
    """The loader of the training stream.

    Lightning takes a loader with these two methods for one that can be resumed in the middle of an epoch. It can: the
    position is in the data module's state, which knows what was trained on; there is nothing to keep here.
    """

    def state_dict(self) -> dict[str, Any]:
        """Empty: see the class."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: see the class."""
