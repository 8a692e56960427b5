"""BestOfAnchor: which of the responses that it is shown a function calls the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from callbacks.rewards.base import Reward
from maestro_pl.errors import RunStopped, UserError
from maestro_pl.rewards.function import (
    call_all,
    check_callable,
    load_function,
    select_arguments,
    signature_of,
    waits_by_nature,
)
from maestro_pl.rewards.scores import ScoresAndMetrics
from maestro_pl.rollout import Choice, Rollout
from maestro_pl.run.others import Raised, origin, told

if TYPE_CHECKING:
    from maestro_pl.module import MaestroModule


class BestOfAnchor(Reward):
    """An anchor that compares responses of a group instead of scoring each.

    The function is called once a labelled group, with the responses that ``model.anchoring.responses`` shows. Its arguments
    are filled by name: ``prompt``, ``prompt_text``, ``responses`` (the texts that are shown), ``reference``, ``task`` and
    every other column of the row. It returns places in ``responses``:

    - a number: that one is best;
    - a set of numbers: these are best, and tie;
    - a list or tuple: a ranking, the best first; an entry may be a set of responses that tie, and those that are not named
      are worse than all that are;
    - ``None``, or an empty list: no difference that counts, or all are bad; nothing is learned from it.

    It gives no scores, so that it is not asked in evaluations. Learned from by ``RidgeLearner(target: choice)``.

    Args:
        function: ``package.module.name``, ``path/to/file.py:name``, or (from Python) the function itself.
        kwargs: further keyword arguments of every call.
        timeout: seconds that the calls of one batch may take; null: no limit.
        name: see :class:`Reward`.
        tasks: see :class:`Reward`.

    Raises:
        UserError: the function cannot be imported; in a run, it raised something, or returned what is none of these.
    """

    default_name = "best_of"

    def __init__(
        self,
        function: str | Callable[..., Any],
        *,
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = 600.0,
        name: str | None = None,
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__(name=name, role="anchor", tasks=tasks)
        if timeout is not None and not timeout > 0:
            raise UserError(f"BestOfAnchor: timeout is {timeout}, expected seconds above 0, or null for no limit.")
        self.target = function if isinstance(function, str) else getattr(function, "__qualname__", repr(function))
        self.function = load_function(function) if isinstance(function, str) else function
        check_callable(self.function, self.target)
        self.signature = signature_of(self.function, self.target)
        self.kwargs, self.call_timeout = dict(kwargs or {}), timeout
        self.waits = waits_by_nature(self.function)

    def score(self, rollout: Rollout, rows: list[int], pl_module: MaestroModule) -> ScoresAndMetrics:
        """Call the function for each group, and say what it chose."""
        groups: dict[int, list[int]] = {}
        for row in rows if self.stage == "train" else []:
            groups.setdefault(row // rollout.group_size, []).append(row)
        shown = [group for group in groups.values() if len(group) > 1]
        results = call_all(
            self.function, [self._arguments(rollout, group) for group in shown], self.call_timeout, self.stopping
        )
        for group, result in zip(shown, results, strict=True):
            if isinstance(result, Raised):
                raise RunStopped(
                    f"Reward {self.name!r}: {self.target} raised {told(result.error)} ({origin(result.error)}) for "
                    f"{len(group)} responses, the first {self.describe(rollout, group[0])}.",
                    status=1,
                ) from result.error
            self.compare(rollout, Choice.of(group, self._stages(result, len(group))))
        return [None] * len(rows), {}

    def _arguments(self, rollout: Rollout, group: list[int]) -> tuple[list[Any], dict[str, Any]]:
        n = group[0] // rollout.group_size
        available: Mapping[str, Any] = {
            **{name: deepcopy(values[n]) for name, values in rollout.columns.items()},
            "prompt": deepcopy(rollout.prompts[n]),
            "prompt_text": rollout.prompt_texts[n],
            "responses": [rollout.responses[row] for row in group],
        }
        try:
            return select_arguments(self.signature, available, self.kwargs)
        except KeyError as missing:
            raise UserError(
                f"Reward {self.name!r}: {self.target} takes {missing.args[0]!r}, which is no column; there are "
                f"{sorted(available)}. Give it in kwargs, or a default."
            ) from None

    def _stages(self, result: object, count: int) -> list[list[int]]:
        """Places, the best first, those that tie together."""
        entries: list[Any] = [] if result is None else list(result) if isinstance(result, Sequence) else [result]
        stages = [list(entry) if isinstance(entry, Set) else [entry] for entry in entries]
        places = [place for stage in stages for place in stage]
        whole = all(isinstance(place, int) and not isinstance(place, bool) for place in places)
        if (
            isinstance(result, str)
            or not whole
            or len(set(places)) != len(places)
            or not set(places) <= {*range(count)}
        ):
            raise UserError(
                f"Reward {self.name!r}: {self.target} returned {result!r} for {count} responses: expected the place of the "
                f"best, 0 to {count - 1}, a set of places that tie, a list of places with the best first, or None."
            )
        return stages
