"""``maestro-pl view``: runs in a browser."""

from __future__ import annotations

import importlib.util

from maestro_pl.cli.parser import ToolParser
from maestro_pl.errors import UserError

#: What the extra ``app`` brings.
PACKAGES = ("fastapi", "uvicorn", "jinja2", "markdown_it", "mdit_py_plugins", "latex2mathml")


def view(arguments: list[str]) -> None:
    """Serve the pages of runs until Ctrl-C.

    Args:
        arguments: those after ``maestro-pl view``.

    Raises:
        UserError: an option or a run cannot be used, or the extra ``app`` is not installed.
    """
    options = _parser().parse_args(arguments)
    needs_app("view")
    from maestro_pl.app.serving import serve
    from maestro_pl.app.view import view_app
    from maestro_pl.report.run_files import named

    named(options.runs)  # what is wrong with a run is said before a port is taken
    serve(lambda token: view_app(options.runs, token), options.host, options.port)


def needs_app(command: str) -> None:
    """Raise where a page cannot be shown.

    Raises:
        UserError: the packages of the extra ``app`` are not installed.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"`maestro-pl {command}` needs {', '.join(missing)}: install the extra app, `pip install -e '.[app]'`."
        )


def add_address(parser: ToolParser) -> None:
    """Add ``--host`` and ``--port``, which every command with a page takes."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="what is bound; another than this machine's needs the token in the printed link",
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 8642 on")


def _parser() -> ToolParser:
    parser = ToolParser(prog="maestro-pl view", description="Curves, weights and responses of runs in a browser.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run; several are drawn together")
    add_address(parser)
    return parser
