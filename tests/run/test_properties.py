"""A property of a module that fails is not reported as missing."""

from __future__ import annotations

import pytest
from torch import nn

from maestro_pl.policy.policy import LoRAPolicy
from maestro_pl.run.properties import PlainProperties
from maestro_pl.training.policy_module import PolicyModule


class Broken(PlainProperties, nn.Module):
    @property
    def packs(self) -> bool:
        missing: object = None
        return bool(missing.groups)  # type: ignore[attr-defined]


def test_the_error_of_a_property_is_its_own() -> None:
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'groups'"):
        _ = Broken().packs
    with pytest.raises(AttributeError, match="'Broken' object has no attribute 'unknown'"):
        _ = Broken().unknown
    broken = Broken()
    broken.layer = nn.Linear(1, 1)
    assert broken.layer.in_features == 1


def test_policy_and_module_have_it() -> None:
    assert issubclass(LoRAPolicy, PlainProperties)
    assert issubclass(PolicyModule, PlainProperties)
