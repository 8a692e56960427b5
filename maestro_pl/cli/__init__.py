"""The command line: ``maestro-pl fit | validate | test | predict`` and the tools.

Nothing heavy is imported before the command is known, so that ``--version``, ``--help`` and a mistyped command answer
at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from maestro_pl import __version__
from maestro_pl.errors import RunStopped, UserError
from maestro_pl.run.loading import without_collector

STAGES = {
    "fit": "train a policy and its Conductor",
    "validate": "evaluate on the validation split",
    "test": "evaluate on the test split",
    "predict": "write one JSON line a response",
}

#: Tool name to ``"module:function"``; the function takes the remaining arguments, a list of strings.
TOOLS: dict[str, str] = {
    "init": "maestro_pl.cli.init:init",
    "rewards": "maestro_pl.cli.rewards:rewards_command",
    "label": "maestro_pl.cli.label:label",
    "experiment": "maestro_pl.cli.experiment:experiment",
    "compare": "maestro_pl.cli.compare:compare",
    "estimate": "maestro_pl.cli.estimate:estimate_command",
    "export": "maestro_pl.cli.export:export",
    "view": "maestro_pl.cli.view:view",
    "study": "maestro_pl.cli.study:study",
}

#: What each tool does, for ``--help``.
TOOLS_HELP: dict[str, str] = {
    "init": "look at your data and write a first config for it",
    "rewards": "what each reward is worth before anything is trained: spread, correlations, with or against the anchor",
    "label": "say in a browser which answers are best, and see what your clicks teach; export and import labels",
    "experiment": "run a grid of runs: resumable, several at once",
    "compare": "compare runs prompt by prompt, with paired tests",
    "estimate": "the memory of a run before it starts, and what to change where it does not fit",
    "export": "write what a run has learned as adapters or as a merged model",
    "view": "look at runs in a browser: curves, weights, every response with its rewards",
    "study": "let people compare the answers of runs blind, in a browser, and report what they say",
}

USAGE = """usage: maestro-pl COMMAND [--config FILE] [--key value ...]

commands:
{commands}

options:
  --config FILE     YAML with the keys method, model, data, rollout, rewards, anchors, metrics, trainer; several are merged;
                    without one, the sandbox
  --rewards FILE    another list of rewards, and nothing else changed; --anchors FILE, --metrics FILE likewise
  --method NAME     grpo (the default) or sft: what stands under model
  --ckpt_path PATH  the checkpoint to evaluate or to go on from; `fit --ckpt_path last` takes the newest
  --print_config    print the whole config and stop
  --version         print the version and stop
  -h, --help        this text; `maestro-pl COMMAND --help` lists every key

MAESTRO_DEBUG=1 shows the traceback behind an error."""


def main(args: list[str] | None = None) -> None:
    """Run one command, as the shell does.

    Args:
        args: the arguments after the program's name, such as ``["fit", "--config", "run.yaml"]``; None takes the
            shell's.

    Raises:
        SystemExit: 2 for input that cannot be used, 1 for a run that ended early on such input, 130 for Ctrl-C; what was
            wrong stands on stderr, most often in one sentence. With ``MAESTRO_DEBUG=1`` the exception itself is raised.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    formatted = warnings.formatwarning
    try:
        _dispatch(arguments)
    except UserError as error:
        if os.environ.get("MAESTRO_DEBUG", "0") not in ("", "0"):
            raise
        from maestro_pl.cli.text import headed

        print(headed("error", str(error)), file=sys.stderr)
        raise SystemExit(error.status if isinstance(error, RunStopped) else 2) from None
    except KeyboardInterrupt:  # while files and models are loaded; a run that has begun says what it keeps
        if os.environ.get("MAESTRO_DEBUG", "0") not in ("", "0"):
            raise
        print("maestro-pl: error: stopped by Ctrl-C.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        warnings.formatwarning = formatted  # a program that calls a command keeps its own


def _dispatch(arguments: Sequence[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_usage())
    elif command == "--version":
        print(f"maestro-pl {__version__}")
    elif command in TOOLS:
        _quiet()
        module, function = TOOLS[command].split(":")
        getattr(importlib.import_module(module), function)(list(arguments[1:]))
    elif command in STAGES:
        _quiet()
        with without_collector():
            from maestro_pl.cli.run import run

        run(list(arguments))
    else:
        raise UserError(_unknown_command(command))


def _quiet() -> None:
    from maestro_pl.cli.quiet import quiet  # half of the time of `--help` would be its import of logging

    quiet()


def _usage() -> str:
    commands = "\n".join(f"  {name:<10} {help_text}" for name, help_text in STAGES.items())
    tools = "".join(f"\n  {name:<10} {TOOLS_HELP.get(name, f'`maestro-pl {name} --help`')}" for name in TOOLS)
    return USAGE.format(commands=commands + tools)


def _unknown_command(command: str) -> str:
    import difflib

    names = [*STAGES, *TOOLS]
    if command.startswith("-"):
        return f"the command comes first, before {command}: one of {', '.join(names)}."
    close = difflib.get_close_matches(command, names, n=1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"there is no command {command!r}{meant}; the commands are {', '.join(names)}."
