"""What is kept of the Conductor's decisions until they are learned from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from maestro_pl.conductor.statistics import usable_states
from maestro_pl.errors import UserError
from maestro_pl.run.ranks import count_of, gathered


@dataclass
class Decisions:
    """Decisions of the Conductor on B responses and what became of them, detached from any graph.

    Attributes:
        h_BD: float32 hidden states that it read.
        mask_BK: bool, the rewards that it could choose among.
        action_B: int64 actions that it drew; -1 where none was drawn (``action: soft``).
        advantages_B: float32 group-relative advantages of the responses, which the policy was trained on too.
        group_B: int64, equal for responses to one prompt of one batch.
        version: how often the Conductor had been updated when it decided.
        version_B: the same of each response; differs inside :meth:`MetaBuffer.joined`.
        log_prob_B: float32 log pi(a | h) when the action was drawn, 0 without one.
        credit_BK: float32, what emphasising each reward was worth (:class:`maestro_pl.conductor.Credit`); NaN: not
            known.
        value_B: float32, what the response itself was worth, z-scored in its group; NaN: not known.
        z_BK: float32 rewards z-scored in their group, 0 where they do not apply.
        rank_BJ: int64 ranks in the anchors' comparisons, a column for each (:func:`maestro_pl.conductor.labels.choice_ranks`).
        task_B: int64, the task (:func:`maestro_pl.conductor.labels.task_id`).
    """

    h_BD: Tensor
    mask_BK: Tensor
    action_B: Tensor
    advantages_B: Tensor
    group_B: Tensor
    version: int
    version_B: Tensor = None  # type: ignore[assignment]  # filled in below
    log_prob_B: Tensor = None  # type: ignore[assignment]
    credit_BK: Tensor = None  # type: ignore[assignment]
    value_B: Tensor = None  # type: ignore[assignment]
    z_BK: Tensor = None  # type: ignore[assignment]
    rank_BJ: Tensor = None  # type: ignore[assignment]
    task_B: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Fill in what was not given: the credit of a drawn action is its advantage, nothing else is known."""
        if self.version_B is None:
            self.version_B = torch.full_like(self.action_B, self.version)
        if self.log_prob_B is None:
            self.log_prob_B = torch.zeros_like(self.advantages_B)
        if self.credit_BK is None:
            self.credit_BK = action_credit(self.action_B, self.advantages_B, self.mask_BK.shape[1])
        if self.value_B is None:
            self.value_B = torch.full_like(self.advantages_B, torch.nan)
        if self.z_BK is None:
            self.z_BK = torch.zeros_like(self.mask_BK, dtype=self.advantages_B.dtype)
        if self.rank_BJ is None:
            self.rank_BJ = torch.empty(len(self.action_B), 0, dtype=torch.long, device=self.action_B.device)
        if self.task_B is None:
            self.task_B = torch.zeros_like(self.action_B)

    def __len__(self) -> int:
        """B."""
        return len(self.action_B)

    @property
    def finite_B(self) -> Tensor:
        """Bool (B,): responses that can be learned from; NaN in a credit or a value means not known, and is no fault."""
        finite_B = usable_states(self.h_BD) & self.z_BK.isfinite().all(1) & self.advantages_B.isfinite()
        return finite_B & ~self.value_B.isinf() & ~self.credit_BK.isinf().any(1)

    def cpu(self) -> Decisions:
        """The same on the CPU."""
        return replace(self, **{f.name: getattr(self, f.name).cpu() for f in fields(self) if f.name != "version"})

    def rows(self, rows: Tensor) -> Decisions:
        """Some of the responses: a bool mask or indices."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)  # once for all fields: how many rows a mask chooses, the host waits for
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "version"})


def of_all_ranks(decisions: Decisions) -> Decisions:
    """Decisions of every rank in the order of the global batch, so that all learn the same from the same. Collective."""
    if count_of() == 1:
        return decisions
    device, ranks = decisions.h_BD.device, count_of()
    names = [f.name for f in fields(Decisions) if f.name != "version"]
    parts = gathered({name: getattr(decisions, name).cpu() for name in names})
    for rank, part in enumerate(parts):
        part["group_B"] = part["group_B"] * ranks + rank  # rank r has every R-th group
    most = max(part["rank_BJ"].shape[1] for part in parts)
    for part in parts:
        part["rank_BJ"] = torch.nn.functional.pad(part["rank_BJ"], (0, most - part["rank_BJ"].shape[1]), value=-1)
    whole = {name: torch.cat([part[name] for part in parts]) for name in names}
    order = whole["group_B"].argsort(stable=True)
    tensors: dict[str, Any] = {name: values[order].to(device) for name, values in whole.items()}
    return Decisions(**tensors, version=decisions.version)


class MetaBuffer:
    """The decisions since the Conductor's last update (the paper's buffer), or the last few batches of them."""

    def __init__(self) -> None:
        self.decisions: list[Decisions] = []

    def __len__(self) -> int:
        """How many batches are in it."""
        return len(self.decisions)

    def add(self, decisions: Decisions) -> None:
        """Keep one batch of decisions."""
        self.decisions.append(decisions)

    def drop_broken(self) -> int:
        """Forget the responses that hold a number that is not finite; how many there were."""
        before = sum(len(decisions) for decisions in self.decisions)
        self.decisions = [decisions.rows(decisions.finite_B) for decisions in self.decisions]
        return before - sum(len(decisions) for decisions in self.decisions)

    def clear(self, keep: int = 0) -> None:
        """Forget all but the newest ``keep`` batches; called after an update."""
        self.decisions = self.decisions[-keep:] if keep else []

    def joined(self) -> Decisions:
        """All batches as one, with the oldest version."""
        if not self.decisions:
            raise UserError("The meta-buffer is empty: there is nothing to update the Conductor on.")
        names = [f.name for f in fields(Decisions) if f.name not in ("version", "rank_BJ")]
        device = self.decisions[-1].h_BD.device  # a buffer from a checkpoint was loaded before the model was moved
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(d, name).to(device) for d in self.decisions]) for name in names
        }
        most = max(d.rank_BJ.shape[1] for d in self.decisions)
        tensors["rank_BJ"] = torch.cat(
            [
                torch.nn.functional.pad(d.rank_BJ.to(device), (0, most - d.rank_BJ.shape[1]), value=-1)
                for d in self.decisions
            ]
        )
        # groups are numbered batch by batch: the second batch's go on after the first's
        firsts = torch.tensor([0, *(int(d.group_B.max()) + 1 if len(d) else 0 for d in self.decisions[:-1])]).cumsum(0)
        sizes = torch.tensor([len(d.group_B) for d in self.decisions])
        tensors["group_B"] = tensors["group_B"] + firsts.repeat_interleave(sizes).to(device)
        return Decisions(**tensors, version=min(d.version for d in self.decisions))

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain tensors and integers, for a checkpoint."""
        return [{f.name: getattr(d, f.name) for f in fields(Decisions)} for d in self.decisions]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self.decisions = [Decisions(**entry) for entry in state]


def action_credit(action_B: Tensor, advantages_B: Tensor, rewards: int) -> Tensor:
    """credit_BK that knows only the drawn action: its advantage; NaN elsewhere, and everywhere without an action."""
    credit_BK = torch.full((len(action_B), rewards), torch.nan, device=action_B.device)
    known_B = advantages_B.float().masked_fill(action_B < 0, torch.nan)
    return credit_BK.scatter(1, action_B.clamp(min=0).unsqueeze(1), known_B.unsqueeze(1))
