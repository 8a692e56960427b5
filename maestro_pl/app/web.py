"""A FastAPI application with what every page shares: templates, static files, safety, errors in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException

from maestro_pl import __version__
from maestro_pl.app.safety import Safety
from maestro_pl.app.text import markdown, plain
from maestro_pl.errors import UserError

HERE = Path(__file__).parent
LONGEST_FORM = 1000  # bytes


class Page:
    """Renders the templates of this package and of further folders; every value is escaped.

    Filters: ``plain`` (letter by letter) and ``markdown``, both of :mod:`maestro_pl.app.text`.

    Args:
        folders: where a page's own templates lie, looked into before ``app/templates``.
        always: names that every template sees.
    """

    def __init__(self, folders: Sequence[Path] = (), **always: Any) -> None:
        loaders = [FileSystemLoader(folder) for folder in (*folders, HERE / "templates")]
        self.environment = Environment(
            loader=ChoiceLoader(loaders),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.filters.update(plain=plain, markdown=markdown)
        self.environment.globals.update(version=__version__, **always)

    def __call__(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """The whole template as an answer."""
        return HTMLResponse(self.environment.get_template(template).render(**values), status)


def web_app(page: Page, token: str | None = None) -> FastAPI:
    """An application without routes of its own but ``/static``: add yours, then hand it to ``serve``.

    A ``UserError`` of a route becomes a page with its sentence and status 400; a path that does not exist a page with
    404. There are no generated docs pages: they load scripts from another server.

    Args:
        page: renders the errors.
        token: what a request must know; None where only this machine can reach the server.
    """
    app = FastAPI(title="maestro-pl", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    app.add_middleware(Safety, token=token)

    def sentence(request: Request, error: Exception) -> HTMLResponse:
        if isinstance(error, HTTPException):
            return page("error.html", error.status_code, sentence=str(error.detail))
        if isinstance(error, RequestValidationError):
            what = "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
            return page("error.html", 422, sentence=f"The address cannot be used: {what}.")
        return page("error.html", 400, sentence=str(error))

    for kind in (UserError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, sentence)
    return app


async def form_of(request: Request) -> dict[str, list[str]]:
    """The values of a small form, for ``Depends``: a route that takes them this way may wait for a disk.

    Raises:
        UserError: it is longer than a click.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_FORM:
            raise UserError("The form is longer than a click.")
    return parse_qs(body.decode("utf-8", "replace"))
