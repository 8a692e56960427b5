"""A class path that changes starts from the defaults of its own class."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import yaml  # type: ignore[import-untyped]

from maestro_pl.cli.arguments import content_of
from maestro_pl.run.yaml_files import parse_yaml

#: Keys of optimizers and schedulers, with the class that stands there where none is given.
CLASSES: dict[str, str | None] = {
    "model.optimizer": "torch.optim.AdamW",
    "model.meta.optimizer": "torch.optim.AdamW",
    "model.scheduler": None,
    "model.meta.scheduler": None,
}
UNSET = "maestro_pl.training.unset.Unset"


def fresh_classes(arguments: Sequence[str]) -> list[str]:
    """The arguments with an optimizer or scheduler taken away before another class is given in its place.

    jsonargparse hands to the new class every argument of the old one that it knows by name too, defaults included:
    Adagrad would run with the ``eps`` and ``weight_decay`` of AdamW.
    """
    current = dict(CLASSES)
    fresh: list[str] = []
    words = list(arguments)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        value = value if equals else "".join(words[place + 1 : place + 2])
        for key, given in _given(name, value):
            if given is not None and not _same(current[key], given):
                fresh.append(f"--{key}={UNSET if key.endswith('optimizer') else 'null'}")
            current[key] = given
        fresh.append(word)
    return fresh


def _given(name: str, value: str) -> Iterator[tuple[str, str | None]]:
    """Each key that an option gives, with its class."""
    if name in ("--config", "-c"):
        content = content_of(value)
        for key in CLASSES:
            part: Any = content
            for step in key.split("."):
                part = part.get(step, ...) if isinstance(part, dict) else ...
            if (found := _class_in(part)) is not ...:
                yield key, found
        return
    key = name.removeprefix("--").removesuffix(".class_path")
    if name.startswith("--") and key in CLASSES:
        try:
            found = _class_in(parse_yaml(value))
        except yaml.YAMLError:
            return
        if found is not ...:
            yield key, found


def _class_in(part: Any) -> Any:
    """The class path of a value, None for null, ``...`` where it gives no class."""
    if isinstance(part, dict):
        return part.get("class_path", ...)
    return part if part is None or isinstance(part, str) else ...


def _same(old: str | None, new: str) -> bool:
    return old is not None and (old == new or _resolved(old) is _resolved(new))


def _resolved(path: str) -> Any:
    module, _, name = path.rpartition(".")
    for owner in (module,) if module else ("torch.optim", "torch.optim.lr_scheduler"):
        try:
            return getattr(importlib.import_module(owner), name)
        except (ImportError, AttributeError):  # the parser says what is wrong with it
            continue
    return path
