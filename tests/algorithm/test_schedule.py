"""Learning rates by hand, and those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maestro_pl.algorithm.schedule import Schedule
from maestro_pl.errors import UserError
from tests.support import schedules


def rates(made_by: Any, steps: int | None, count: int) -> list[float]:
    return schedules.rates(made_by, steps, count, lr=2.0)


def test_by_hand() -> None:
    assert rates(Schedule(warmup=2, decay="linear"), 6, 7) == pytest.approx([0, 1, 2, 1.5, 1, 0.5, 0])
    assert rates(Schedule(warmup=0.25, decay="cosine", floor=0.5), 8, 8)[:5] == pytest.approx(
        [0, 1, 2, 1 + 0.5 * (1 + 0.75**0.5), 1.75]
    )
    assert rates(Schedule(warmup=3), None, 5) == pytest.approx([0, 2 / 3, 4 / 3, 2, 2])
    assert rates(Schedule(decay="linear"), 2, 4) == pytest.approx([2, 1, 0, 0])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_as_in_transformers(decay: Any) -> None:
    import transformers

    theirs = getattr(transformers, f"get_{decay}_schedule_with_warmup")
    expected = rates(lambda optimizer: theirs(optimizer, 3, 25), None, 25)
    assert rates(Schedule(warmup=0.1, decay=decay), 25, 25) == pytest.approx(expected)

    def told(optimizer: Any, num_training_steps: int) -> Any:
        return theirs(optimizer, 3, num_training_steps)

    assert rates(told, 25, 25) == pytest.approx(expected)


def test_what_it_refuses() -> None:
    for options, message in (
        ({"warmup": -1}, "warmup"),
        ({"warmup": 1.5}, "a share below 1, or a whole number of steps"),
        ({"decay": "square"}, "expected one of none, linear, cosine"),
        ({"floor": 2}, "from 0 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            Schedule(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"needs an end: give trainer\.max_steps"):
        rates(Schedule(decay="cosine"), None, 1)
    with pytest.raises(UserError, match=r"OneCycleLR of 5 steps, and it is stepped 6 times .* give total_steps: 6"):
        rates(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=5), 6, 1)
    assert len(rates(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=6), 6, 6)) == 6
    with pytest.raises(UserError, match="ReduceLROnPlateau"):
        rates(lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o), 6, 1)
    import transformers

    with pytest.raises(UserError, match=r"num_warmup_steps.*; scheduler: \{warmup: 0\.1, decay: cosine\} makes"):
        rates(transformers.get_cosine_schedule_with_warmup, 6, 1)
