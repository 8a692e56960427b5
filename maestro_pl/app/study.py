"""The page of ``maestro-pl study serve``: two answers, and which is better. It writes clicks and nothing else."""

from __future__ import annotations

import secrets
import threading
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from maestro_pl.app.web import HERE, Page, form_of, web_app
from maestro_pl.errors import UserError
from maestro_pl.report.responses import prompt_text
from maestro_pl.study.criteria import FILE as CRITERIA
from maestro_pl.study.criteria import read_criteria
from maestro_pl.study.plan import Rater, read_study, shown_answers
from maestro_pl.study.store import CHOICES, FILE, Clicks


class Desk:
    """The raters of a study and where each of them is."""

    def __init__(self, folder: Path) -> None:
        self.study, self.criteria = read_study(folder), read_criteria(folder / CRITERIA)
        self.clicks = Clicks(folder / FILE)
        self._shown: dict[tuple[str, int], float] = {}
        self._lock = threading.Lock()

    def rater(self, token: str) -> Rater:
        """Who has this secret.

        Raises:
            UserError: nobody.
        """
        for rater in self.study.raters:
            if secrets.compare_digest(rater.token.encode(), token.encode()):
                return rater
        raise UserError("This link belongs to no rater of the study: open the whole link that you were given.")

    def next_place(self, rater: Rater) -> int | None:
        """The first place without a click; None where all is answered."""
        done = self.clicks.of(rater.name)
        return next((place for place in range(len(rater.items)) if place not in done), None)

    def choose(self, rater: Rater, place: int, choice: str) -> None:
        """Keep a click.

        Raises:
            UserError: no such place or choice.
        """
        if not 0 <= place < len(rater.items) or choice not in CHOICES:
            raise UserError(
                f"{choice!r} at {place}: expected one of {', '.join(CHOICES)}, and a question of this study."
            )
        with self._lock:
            shown = self._shown.pop((rater.name, place), None)
        seconds = None if shown is None else round(time.monotonic() - shown, 2)
        self.clicks.add(rater.name, place, choice, seconds)  # type: ignore[arg-type]  # checked above

    def undo(self, rater: Rater) -> None:
        """Take back the newest click that stands, so that its question is asked again."""
        if done := list(self.clicks.of(rater.name)):
            self.clicks.add(rater.name, done[-1], None)

    def question(self, rater: Rater) -> dict[str, Any]:
        """What the page shows next."""
        place = self.next_place(rater)
        total = len(rater.items)
        done = len(self.clicks.of(rater.name))
        if place is None:
            return {"place": None, "done": done, "total": total}
        item = rater.items[place]
        prompt = self.study.prompts[item.prompt]
        with self._lock:
            self._shown.setdefault((rater.name, place), time.monotonic())
        return {
            "place": place,
            "done": done,
            "total": total,
            "prompt": prompt_text(prompt.prompt),
            "answers": shown_answers(self.study, item),
            "asked": self.criteria.of(prompt.task),
        }


def study_app(folder: Path, token: str | None = None) -> FastAPI:
    """The pages of a study.

    Args:
        folder: what ``maestro-pl study new`` wrote.
        token: what a request must know; None where only this machine can reach the server.

    Raises:
        UserError: the folder holds no study, or a file of it cannot be used.
    """
    desk = Desk(folder)
    page = Page([HERE / "templates" / "study"])
    app = web_app(page, token)

    @app.get("/")
    def nobody() -> Response:
        return page("error.html", 404, sentence="Open the link that you were given: it is yours alone.")

    @app.get("/r/{secret}")
    def welcome(secret: str) -> Response:
        rater = desk.rater(secret)
        done, total = len(desk.clicks.of(rater.name)), len(rater.items)
        return page("welcome.html", secret=rater.token, welcome=desk.criteria.welcome, done=done, total=total)

    @app.get("/r/{secret}/next")
    def next_question(secret: str) -> Response:
        rater = desk.rater(secret)
        return page("question.html", secret=rater.token, **desk.question(rater))

    @app.post("/r/{secret}/choose")
    def choose(secret: str, request: Request, form: Annotated[dict[str, list[str]], Depends(form_of)]) -> Response:
        rater = desk.rater(secret)
        place, choice = (form.get(name, [""])[-1] for name in ("place", "choice"))
        desk.choose(rater, int(place) if place.isascii() and place.isdigit() else -1, choice)
        return answer(rater, request)

    @app.post("/r/{secret}/undo")
    def undo(secret: str, request: Request) -> Response:
        rater = desk.rater(secret)
        desk.undo(rater)
        return answer(rater, request)

    def answer(rater: Rater, request: Request) -> Response:
        """The next question in place of the last one, or the page again where the browser runs no script."""
        if request.headers.get("hx-request") == "true":
            return page("question.html", secret=rater.token, **desk.question(rater))
        return RedirectResponse(f"/r/{rater.token}/next", 303)

    return app
