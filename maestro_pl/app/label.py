"""``maestro-pl label``: people say which answer is best, and see what their clicks teach."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response
from markupsafe import Markup

from maestro_pl.app.text import markdown
from maestro_pl.app.web import HERE, Page, web_app
from maestro_pl.errors import UserError
from maestro_pl.labelling.questions import Asked, Question
from maestro_pl.labelling.store import Click, LabelStore, Verdict, check_rater
from maestro_pl.rollout import Prompt

if TYPE_CHECKING:
    from maestro_pl.labelling.teaching import Teaching

OTHERS: dict[str, Verdict] = {"0": "tie", "x": "bad"}


class Labelling:
    """The questions of one server, and everybody's answers.

    Args:
        asked: the questions, in the order in which they are asked.
        store: where answers are kept.
        teaching: what they teach.
        rater: who answers where the address names nobody.
        next_command: what trains with the labels.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        store: LabelStore,
        teaching: Teaching,
        rater: str,
        next_command: Sequence[str] = (),
    ) -> None:
        check_rater(rater)
        self.questions = {each.question.key: each.question for each in asked}
        self.store, self.teaching, self.rater = store, teaching, rater
        self.next_command = shlex.join(next_command)
        self._texts: dict[str, tuple[Markup, list[Markup]]] = {}
        store.add(list(self.questions.values()))
        threading.Thread(target=self._prepare, daemon=True).start()

    def open(self, rater: str) -> list[Question]:
        """What this person has not answered, in order."""
        check_rater(rater)
        answered = self.store.answered(rater)
        return [question for key, question in self.questions.items() if key not in answered]

    def answer(self, key: str, rater: str, choice: str) -> None:
        """Keep an answer: the number of an answer as it was shown, ``0`` or ``x``.

        Raises:
            UserError: there is no such question or choice.
        """
        question = self.questions.get(key)
        if question is None:
            raise UserError(f"There is no question {key!r:.80}: open the page again.")
        check_rater(rater)
        shown = question.order(rater)
        if choice not in OTHERS and choice not in map(str, range(1, len(shown) + 1)):
            raise UserError(f"choice={choice!r:.80}: expected a number from 1 to {len(shown)}, 0, or x.")
        best = None if choice in OTHERS else shown[int(choice) - 1]
        verdict = OTHERS.get(choice, "best")
        self.store.click(Click(question, rater, verdict, best, tuple(shown), time.time()))

    def texts(self, question: Question) -> tuple[Markup, list[Markup]]:
        """Prompt and answers as HTML; made ahead, so that no click waits for a long one."""
        if question.key not in self._texts:
            self._texts[question.key] = (
                markdown(shown_prompt(question.prompt)), [markdown(text) for text in question.responses]
            )  # fmt: skip
        return self._texts[question.key]

    def _prepare(self) -> None:
        for question in self.questions.values():
            self.texts(question)


def shown_prompt(prompt: Prompt) -> str:
    """The prompt as people read it: one message as its text, several with who says them."""
    if isinstance(prompt, str):
        return prompt
    texts = [str(message.get("content") or "") for message in prompt]
    if len(prompt) == 1:
        return texts[0]
    roles = [str(message.get("role", "")) for message in prompt]
    return "\n\n".join(f"{role}:\n\n{text}" for role, text in zip(roles, texts, strict=True))


def label_app(labelling: Labelling, token: str | None = None) -> FastAPI:
    """The page for these questions.

    Args:
        labelling: questions, store and what is learned.
        token: what a request must know; None where only this machine can reach the server.
    """
    page = Page([HERE / "templates" / "label"], percent=lambda share: f"{100 * share:.0f} %")
    app = web_app(page, token)

    def answer(template: str, rater: str) -> Response:
        left = labelling.open(rater)
        question = left[0] if left else None
        values: dict[str, Any] = {"question": None, "prompt": "", "answers": []}
        if question is not None:
            prompt, answers = labelling.texts(question)
            order = question.order(rater)
            values = {"question": question, "prompt": prompt, "answers": [answers[place] for place in order]}
        count = len(labelling.questions)
        return page(template, rater=rater, done=count - len(left), count=count, next=labelling.next_command, **values)

    def moved(rater: str) -> Response:
        """The next question, and word to what stands beside it that there is something new."""
        next_one = answer("question.html", rater)
        next_one.headers["HX-Trigger-After-Settle"] = "clicked"
        return next_one

    @app.get("/")
    def first() -> Response:
        return RedirectResponse(f"/label?rater={labelling.rater}", 303)

    @app.get("/label")
    def label(rater: str) -> Response:
        return answer("label.html", rater)

    @app.post("/click")
    def click(key: str, rater: str, choice: str) -> Response:
        labelling.answer(key, rater, choice)
        return moved(rater)

    @app.post("/undo")
    def undo(rater: str) -> Response:
        check_rater(rater)
        labelling.store.undo(rater, list(labelling.questions))
        return moved(rater)

    @app.get("/side")
    def side() -> Response:
        clicks = labelling.store.clicks()
        return page("side.html", progress=labelling.teaching.progress(clicks), raters=len({c.rater for c in clicks}))

    return app
