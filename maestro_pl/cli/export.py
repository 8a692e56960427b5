"""``maestro-pl export``: what a run has learned, as adapters or as a whole model."""

from __future__ import annotations

import argparse

from maestro_pl.cli.parser import ToolParser
from maestro_pl.cli.quiet import quiet
from maestro_pl.errors import RunStopped


def export(arguments: list[str]) -> None:
    """Export a run.

    Args:
        arguments: those after ``maestro-pl export``.

    Raises:
        UserError: an option, the run or its base cannot be used; nothing was written.
        RunStopped: what was written is not what was trained (status 1), or Ctrl-C (130).
    """
    options = _parser().parse_args(arguments)
    from maestro_pl.export import Request, export_run  # torch is loaded once the options are known to be good
    from maestro_pl.export.place import CheckFailed

    quiet()
    try:
        export_run(Request(**vars(options)), say=lambda line: print(line, flush=True))
    except CheckFailed as error:
        raise RunStopped(str(error), status=1) from error
    except KeyboardInterrupt:
        raise RunStopped("stopped; nothing was written.", status=130) from None


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="maestro-pl export",
        description="Write what a run has learned in the formats of PEFT and transformers (docs/export.md), and check it.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's folder, or a checkpoint in it")
    parser.add_argument(
        "--average", nargs="+", metavar="RUN", help="export the average of these runs of one base (rewarded soups)"
    )
    parser.add_argument(
        "--shares", nargs="+", type=float, metavar="SHARE", help="of each of them; default: the same for all"
    )
    parser.add_argument(
        "--to", required=True, choices=["adapter", "merged"], help="the adapters, or the base with them merged in"
    )
    parser.add_argument("--checkpoint", default="last", metavar="last|best|PATH", help="default: last")
    parser.add_argument("--output", metavar="DIR", help="default: RUN/export/adapter or RUN/export/merged")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of merged weights; default: what they have in the base",
    )
    parser.add_argument("--base", metavar="MODEL", help="hub id or folder of the base, where the config's is not right")
    parser.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="of a file of merged weights; default: 5GB"
    )
    return parser
