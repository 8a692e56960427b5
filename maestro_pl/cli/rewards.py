"""``maestro-pl rewards``: what the rewards of a config are worth, before anything is trained."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from maestro_pl.cli.arguments import take
from maestro_pl.cli.sampling import Look, look_at
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
    from callbacks.reward_report import asked_of
    from maestro_pl.evaluation.reward_report import RewardStatistics

    statistics = RewardStatistics()

    def see(look: Look) -> None:
        statistics.add(look.rollout, asked_of(look.trainer, look.rollout))
        done = ", ".join(f"{task} {sums.groups}" for task, sums in statistics.tasks.items())
        print(escaped(f"groups sampled: {done}"), file=sys.stderr, flush=True)

    look_at(arguments, "rewards", see, batches=lambda loader: Wanted(loader, count), anchors=True)
    if not statistics.tasks:
        raise UserError("No group was sampled: the config's data have no training prompt.")
    return statistics


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
