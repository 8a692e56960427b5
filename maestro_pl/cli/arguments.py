"""What the command line adds to the arguments: a config where none is given, and the trainer's defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from maestro_pl.errors import UserError
from maestro_pl.run.paths import config_path
from maestro_pl.run.yaml_files import parse_yaml, read_yaml

DEFAULT_CONFIG = "quickstart.yaml"
RUNS = "runs"

#: Keys whose value is a list of reward callbacks.
LISTS = ("rewards", "anchors", "metrics")

#: Keys whose list replaces an earlier one as a whole.
WHOLE = (*LISTS, "data.sources", "trainer.callbacks")

#: What learns from anchors where no weigher is named: the values of configs/conductor/anchored.yaml.
ANCHORED: dict[str, Any] = {
    "weigher": {
        "class_path": "maestro_pl.Conductor",
        "init_args": {"action": "soft", "norm": "center", "context": "prompt"},
    },
    "meta.signal": {"class_path": "maestro_pl.AnchorSignal"},
    "meta.learner": "ridge",
    "meta.every": 1,
    "meta.warmup": 3,
}

#: How the policy is trained -> ``"module:class"`` of the LightningModule whose arguments stand under ``model``.
METHODS = {"grpo": "maestro_pl.module:MaestroModule", "sft": "maestro_pl.sft:SFTModule"}


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments with ``--config`` first, so that what else is given overrides it wherever it stands.

    Without one, the config of the run that wrote ``--ckpt_path`` is taken: the one that the checkpoint carries (its text),
    or the file in the run's folder. Without a checkpoint it is the sandbox's.

    Raises:
        UserError: the checkpoint is none of ours, or no config is known for it.
    """
    configs, others = take(arguments[1:], ("--config", "-c"))
    if not configs and not {"-h", "--help"} & set(others):
        checkpoints, _ = take(others, ("--ckpt_path",))
        configs = [_config_behind(checkpoints[-1]) if checkpoints else str(config_path(DEFAULT_CONFIG))]
    return [arguments[0], *(part for config in configs for part in ("--config", config)), *others]


def _config_behind(checkpoint: str) -> str:
    in_folder = Path(checkpoint).resolve().parent.parent / "config.yaml"
    if Path(checkpoint).is_file():
        from maestro_pl.training.checkpointing import config_of  # torch, which `--help` does not wait for

        carried = config_of(checkpoint)
        if carried is None and not in_folder.is_file():
            raise UserError(
                f"The checkpoint {checkpoint} carries no config, and there is none in the folder of its run: give the "
                "config that it was trained with, --config FILE."
            )
        return carried or str(in_folder)
    # `last`, or a path where nothing is, which is said once the run is known
    return str(in_folder if checkpoint != "last" and in_folder.is_file() else config_path(DEFAULT_CONFIG))


def whole_lists(arguments: Sequence[str]) -> list[str]:
    """The arguments with every list of rewards, anchors, metrics, sources or callbacks emptied before it is given anew.

    jsonargparse merges a list into an earlier one of the same length, entry by entry: a reward or a source would keep the
    arguments of the one that stood in its place.
    """
    emptied: list[str] = []
    words = list(arguments)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("--config", "-c"):
            content = content_of(value if equals else "".join(words[place + 1 : place + 2]))
            emptied += [f"--{key}=[]" for key in WHOLE if _holds(content, key)]
        elif name.removeprefix("--") in WHOLE and name.startswith("--"):
            emptied.append(f"{name}=[]")
        emptied.append(word)
    return emptied


def method_of(arguments: Sequence[str]) -> str:
    """The training method that these arguments ask for: ``--method``, else the last config's key ``method``, else GRPO.

    It is needed before the parser exists, since it decides what stands under ``model``.

    Raises:
        UserError: there is no such method.
    """
    given, others = take(arguments, ("--method",))
    configs, _ = take(others, ("--config", "-c"))
    method = given[-1] if given else next((m for m in map(_method_in, reversed(configs)) if m), "grpo")
    if method not in METHODS:
        raise UserError(f"method is {method!r}: expected one of {', '.join(METHODS)}.")
    return method


def default_weigher(arguments: Sequence[str]) -> dict[str, Any]:
    """Defaults under ``model`` of a config that names no weigher: a Conductor where there are anchors, else equal weights.

    Not the paper's drawn weights, which learn from the policy's own advantages: configs/conductor/paper.yaml names those.

    Args:
        arguments: with the parts of the configs, and every list emptied before it is given anew, as the parser gets them.

    Returns:
        Empty where a weigher is named.
    """
    anchored, words = False, list(arguments)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        value = value if equals else "".join(words[place + 1 : place + 2])
        if name in ("--config", "-c"):
            content = content_of(value)
            model = content.get("model")
            if isinstance(model, dict) and model.get("weigher") is not None:
                return {}
            given = [content[key] for key in ("anchors", "anchors+") if key in content]
            given += [True] if _has_anchor_role(content.get("rewards")) else []
        elif name == "--model.weigher" or name.startswith("--model.weigher."):
            return {}
        else:
            given = [None if value == "[]" else value] if name in ("--anchors", "--anchors+") else []
        for value in given:
            anchored = bool(value) or (anchored and name.endswith("+"))
    return ANCHORED if anchored else {"weigher": {"class_path": "maestro_pl.EqualWeights"}}


def _has_anchor_role(rewards: Any) -> bool:
    """Whether a list of rewards holds one whose ``role`` is ``anchor``."""
    entries = rewards if isinstance(rewards, list) else []
    arguments = [entry.get("init_args") for entry in entries if isinstance(entry, dict)]
    return any(isinstance(given, dict) and given.get("role") == "anchor" for given in arguments)


def _method_in(config: str) -> str:
    return str(content_of(config).get("method") or "")


def _holds(content: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(content, dict) or name not in content:
            return False
        content = content[name]
    return True


def content_of(config: str) -> dict[str, Any]:
    """The keys of a config file; none of one that cannot be read, of which the parser says what is wrong."""
    try:
        loaded = parse_yaml(config) if is_text(config) else read_yaml(Path(config), config)
    except (FileNotFoundError, UserError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def named_files(arguments: Sequence[str], configs: Sequence[str]) -> list[str]:
    """The YAML files that the arguments, and the lists in the configs, name."""
    words = [word.partition("=")[2] or word for word in arguments]
    words += [str(content.get(key)) for content in map(content_of, configs) for key in LISTS]
    return [word for word in words if word.endswith((".yaml", ".yml"))]


def is_text(config: str) -> bool:
    """Whether this is a config itself, as a checkpoint carries it, and not the name of a file."""
    return "\n" in config


def take(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of an option given as ``--name value`` or ``--name=value``, and the other arguments."""
    values, others, words = [], [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names:
            others.append(word)
        elif equals:
            values.append(value)
        elif (following := next(words, None)) is not None:
            values.append(following)
        else:
            raise UserError(f"{name} takes a file or path, and none is given.")
    return values, others


def run_name(arguments: Sequence[str]) -> str:
    """What runs with these arguments are called: the stems of their configs."""
    configs, _ = take(arguments, ("--config",))
    return "-".join(Path(config).stem for config in configs if not is_text(config)) or "run"


def trainer_defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """The trainer's defaults; runs go to ``runs/<stems of the configs>/version_<n>``."""
    return {
        "accelerator": "auto",
        "devices": 1,
        "precision": "32-true",
        "max_epochs": -1,
        "max_steps": 200,
        "val_check_interval": 50,
        "check_val_every_n_epoch": None,  # so that the interval counts steps, whatever the epoch's length
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": RUNS, "name": run_name(arguments), "flush_logs_every_n_steps": 1},
        },
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "enable_model_summary": False,
    }
