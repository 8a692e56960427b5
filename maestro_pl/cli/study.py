"""``maestro-pl study``: people compare answers blind."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import rich
from rich.text import Text

from maestro_pl.cli.parser import ToolParser, folder_to_write
from maestro_pl.cli.view import add_address, needs_app
from maestro_pl.errors import UserError, escaped

#: What of the extra ``app`` a report needs.
STATISTICS = ("choix", "krippendorff")
HELP = """usage: maestro-pl study new A B [C ...] --out DIR    draw the questions and make a link for each rater
       maestro-pl study serve DIR                    show them in a browser, until Ctrl-C
       maestro-pl study report DIR                   win rates, strengths, agreement, as far as people have answered

`maestro-pl study new --help` lists the options of a command (docs/study.md)."""


def study(arguments: list[str]) -> None:
    """Run one of the three commands.

    Args:
        arguments: those after ``maestro-pl study``.

    Raises:
        UserError: an option, a run or a study cannot be used, or the extra ``app`` is not installed.
    """
    commands: dict[str, Callable[[list[str]], None]] = {"new": _new, "serve": _serve, "report": _report}
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(HELP)
    elif command in commands:
        commands[command](arguments[1:])
    else:
        raise UserError(f"study {command}: expected one of {', '.join(commands)}.")


def _new(arguments: list[str]) -> None:
    from maestro_pl.evaluation.records import write_whole
    from maestro_pl.study.answers import read_systems
    from maestro_pl.study.criteria import FILE, read_criteria, starting_text
    from maestro_pl.study.plan import FILE as PLAN
    from maestro_pl.study.plan import new_study, write_study

    options = _new_parser().parse_args(arguments)
    folder = Path(options.out)
    if (folder / PLAN).exists():
        raise UserError(f"{folder} already holds a study, and its votes belong to its questions: choose another --out.")
    drawn = new_study(
        read_systems(options.systems), options.per_task, options.raters, options.votes, options.checks, options.seed
    )
    files = [text for text in options.criteria if "=" not in text]
    if len(files) > 1 or (files and len(options.criteria) > 1):
        raise UserError("--criteria: give one YAML file, or TASK=DESCRIPTION once for each task.")
    if files:
        read_criteria(Path(files[0]))
        text = Path(files[0]).read_text(encoding="utf-8")
    else:
        text = starting_text(drawn.tasks, dict(each.split("=", 1) for each in options.criteria))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, text)
        write_study(drawn, folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}.") from error
    each = sorted({len(rater.items) for rater in drawn.raters})
    print(
        f"{len(drawn.raters)} raters with {' to '.join(map(str, each[:1] + each[1:][-1:]))} questions each, attention checks "
        f"included. What they are told stands in {folder / FILE}; change it before you begin."
    )
    if drawn.equal:
        print(f"{len(drawn.equal)} questions are not asked, because both answers are equal: they count as ties.")
    print(f"Next: maestro-pl study serve {folder}")


def _serve(arguments: list[str]) -> None:
    options = _serve_parser().parse_args(arguments)
    needs_app("study serve")
    from maestro_pl.app.serving import serve
    from maestro_pl.app.study import study_app
    from maestro_pl.study.plan import read_study

    folder = Path(options.study)
    drawn = read_study(folder)
    study_app(folder)  # what is wrong with a file is said before a port is taken
    paths = [(f"{rater.name}:  ", f"/r/{rater.token}") for rater in drawn.raters]
    serve(lambda token: study_app(folder, token), options.host, options.port, paths, drawn.token)


def _report(arguments: list[str]) -> None:
    options = _report_parser().parse_args(arguments)
    missing = [name for name in STATISTICS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"`maestro-pl study report` needs {' and '.join(missing)}: install the extra app, `pip install -e '.[app]'`."
        )
    from maestro_pl.study.plan import read_study
    from maestro_pl.study.report import results_of
    from maestro_pl.study.store import FILE, Clicks
    from maestro_pl.study.tables import text_tables, write_report

    folder = Path(options.study)
    drawn = read_study(folder)
    clicks = Clicks(folder / FILE).all()
    results = results_of(drawn, clicks, options.least_passed, options.resamples, options.seed, options.confidence)
    for table in text_tables(results):
        rich.print("", table)
    for note in results.notes:
        rich.print(Text(escaped(note)))
    out = folder / "report" if options.out is None else Path(options.out)
    names = write_report(results, out)
    print(f"Written to {out}: {', '.join(names)}")
    print(f"p-values: maestro-pl compare {out / 'compare'}/* --metric reward/people", flush=True)


def _new_parser() -> ToolParser:
    parser = ToolParser(prog="maestro-pl study new", description="Draw a blind comparison (docs/study.md).")
    parser.add_argument(
        "systems",
        nargs="+",
        metavar="RUN",
        help="a run's folder with recorded answers of its test, or a file of answers (JSON lines with prompt and response), "
        "or NAME= either",
    )
    parser.add_argument("--out", type=folder_to_write, required=True, metavar="DIR", help="the folder of the study")
    parser.add_argument("--per-task", type=int, default=20, metavar="N", help="prompts of each task; default: 20")
    parser.add_argument("--raters", type=int, default=3, metavar="N", help="how many links; default: 3")
    parser.add_argument("--votes", type=int, metavar="N", help="raters who see a question; default: all")
    parser.add_argument(
        "--checks", type=int, metavar="N", help="attention checks a rater; default: one in 12 questions, at least 2"
    )
    parser.add_argument(
        "--criteria",
        action="append",
        default=[],
        metavar="TASK=NAME",
        help="what a task's raters are asked: default, creative_writing or social; repeatable; or a YAML file",
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sides and orders; default: 0")
    return parser


def _serve_parser() -> ToolParser:
    parser = ToolParser(
        prog="maestro-pl study serve", description="Show a study in a browser; a link for each rater is printed."
    )
    parser.add_argument("study", metavar="DIR", help="what `study new` made")
    add_address(parser)
    return parser


def _report_parser() -> ToolParser:
    parser = ToolParser(prog="maestro-pl study report", description="What people have said so far (docs/study.md).")
    parser.add_argument("study", metavar="DIR", help="what `study new` made")
    parser.add_argument("--out", type=folder_to_write, metavar="DIR", help="default: report/ in the study's folder")
    parser.add_argument(
        "--least-passed",
        type=float,
        default=0.75,
        metavar="SHARE",
        help="attention checks that a rater has to pass to be counted; default: 0.75",
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals; default: 0.95")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap draws; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: 0")
    return parser
