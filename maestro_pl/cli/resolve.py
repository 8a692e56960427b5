"""From a cell's layers to the one config that all its commands read."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from maestro_pl.errors import UserError, check_seed
from maestro_pl.experiment.grid import LIST_KEYS, SEED_KEY, Cell, Layer, option_text
from maestro_pl.run.yaml_files import parse_yaml

Resolve: TypeAlias = Callable[[Cell], str]
CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"
REQUIRED = "the following arguments are required:"
REQUIRED_IN = ("model", *LIST_KEYS)  # all other keys have defaults


def resolve_config(cell: Cell) -> str:
    """The whole config of a cell as YAML, checked by the parser of the command line.

    The layers are parsed in their order, so that whatever the parser does with a class path that changes, it does
    here too.

    Raises:
        UserError: a key, value or class path that cannot be used, or a required key is missing; the sentence names the
            cell.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments: list[str] = []
        pending = False  # options given so far would override a config that comes after them
        for number, layer in enumerate(cell.layers):
            if pending and (layer.configs or layer.nested):
                arguments, pending = (
                    ["--config", _written(Path(folder) / f"{number}.yaml", _parse(cell, arguments))],
                    False,
                )
            arguments += _arguments(layer, Path(folder) / f"{number}.nested.yaml")
            pending = pending or bool(layer.options)
        config = parse_yaml(_parse(cell, arguments))
    check_seed(f"cell {cell.name}: {SEED_KEY}", config.get(SEED_KEY))  # a run looks at it after its config is printed
    _check_logger(cell, config["trainer"].get("logger"))
    _check_required(cell, config)
    config["trainer"]["logger"] = {
        "class_path": CSV_LOGGER,
        "init_args": {"save_dir": ".", "flush_logs_every_n_steps": 1},
    }
    config.pop("ckpt_path", None)
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def _arguments(layer: Layer, nested: Path) -> list[str]:
    configs = [part for config in layer.configs for part in ("--config", config)]
    if layer.nested:
        configs += ["--config", _written(nested, yaml.safe_dump(dict(layer.nested), sort_keys=False))]
    return configs + [f"--{key}={option_text(value)}" for key, value in layer.options.items()]


def _written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def _parse(cell: Cell, arguments: Sequence[str]) -> str:
    from maestro_pl.cli.run import run

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            run([cell.stages[0], *arguments, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            raise UserError(f"cell {cell.name}: its config cannot be printed (status {stop.code}).") from stop
    except UserError as error:
        raise UserError(f"cell {cell.name}: {error}") from error
    return printed.getvalue()


def _check_required(cell: Cell, config: Mapping[str, Any]) -> None:
    """Raise where a required key has no value: a config is printed without them."""
    parser = _parser(config["method"])
    given = {key: config.get(key) or ({} if key == "model" else []) for key in REQUIRED_IN}
    try:
        parser.parse_object(given)
    except argparse.ArgumentError as error:
        where, _, missing = str(error).partition(REQUIRED)
        if not missing:
            from maestro_pl.cli.messages import condense

            raise UserError(f"cell {cell.name}: {condense(str(error), cell.stages[0], ())}") from error
        missing = missing.splitlines()[0]  # behind it, what else the value could have been
        path = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', where)))
        owner = re.findall(r"class_path '([^']+)'", where)
        inside = f" of {path}, {owner[-1]}," if owner else ""
        raise UserError(
            f"cell {cell.name}: {missing.strip()}{inside} is required: give it in a config, in nested keys or in args."
        ) from error


@functools.cache
def _parser(method: str) -> Any:
    """A parser of the keys below which something is required."""
    from callbacks.rewards import Reward
    from maestro_pl.cli.arguments import METHODS
    from maestro_pl.cli.run import Parser

    module, name = METHODS[method].split(":")
    parser = Parser(exit_on_error=False)
    parser.add_lightning_class_args(getattr(importlib.import_module(module), name), "model")
    for key in LIST_KEYS:
        parser.add_argument(f"--{key}", type=list[Reward], default=[])
    return parser


def _check_logger(cell: Cell, logger: Any) -> None:
    if not isinstance(logger, Mapping) or logger.get("class_path") != CSV_LOGGER:
        raise UserError(
            f"cell {cell.name}: trainer.logger is given, but an experiment writes each run with a CSV logger into the folder "
            "of its cell: leave trainer.logger out of the configs."
        )
