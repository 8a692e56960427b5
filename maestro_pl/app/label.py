"""``maestro-pl label``: people say which answer is best, and see what their clicks teach."""

from __future__ import annotations

import shlex
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI
from fastapi.responses import RedirectResponse, Response
from markupsafe import Markup

from maestro_pl.app.text import markdown
from maestro_pl.app.web import HERE, Page, form_of, web_app
from maestro_pl.errors import UserError
from maestro_pl.labelling.questions import Asked, Question
from maestro_pl.labelling.store import Click, LabelStore, Verdict, check_rater, choice_of
from maestro_pl.rollout import Prompt

if TYPE_CHECKING:
    from maestro_pl.labelling.live import LiveQuestions
    from maestro_pl.labelling.teaching import Teaching
    from maestro_pl.report.run_files import RunFiles

LETTERS = "abcdefghi"  # keys that call an answer as good as the best; those of `x` and `u` are taken
OTHERS: dict[str, Verdict] = {"0": "tie", "x": "bad"}


class Asking:
    """Questions, and everybody's answers to them.

    Args:
        store: where answers are kept.
        rater: who answers where the address names nobody.

    Attributes:
        questions: those that an answer is taken for, by key.
        live: whether more come by themselves.
        next_command: what trains with the labels; empty: it trains already.
    """

    live = False
    next_command = ""

    def __init__(self, store: LabelStore, rater: str) -> None:
        check_rater(rater)
        self.questions: dict[str, Question] = {}
        self.store, self.rater = store, rater
        self._texts: dict[str, tuple[Markup, list[Markup]]] = {}

    def open(self, rater: str) -> list[Question]:
        """What this person has not answered, in order."""
        raise NotImplementedError

    def side(self) -> tuple[str, dict[str, Any]]:
        """What stands beside the question: a template and its values."""
        raise NotImplementedError

    def answer(self, key: str, rater: str, choice: str, also: Sequence[str] = ()) -> bool:
        """Keep an answer; False where this person has answered the question already, and that stands.

        Args:
            key: of the question.
            rater: who answers.
            choice: the number of the best answer as it was shown, ``0`` or ``x``.
            also: numbers of those that are as good; the best one itself may be among them.

        Raises:
            UserError: there is no such question or choice.
        """
        question = self.questions.get(key)
        if question is None:
            raise UserError(f"There is no question {key!r:.80}: open the page again.")
        check_rater(rater)
        shown = question.order(rater)
        numbers = {str(n): place for n, place in enumerate(shown, 1)}
        if choice not in numbers and choice not in OTHERS:
            raise UserError(f"choice={choice!r:.80}: expected a number from 1 to {len(shown)}, 0, or x.")
        unknown = next((each for each in also if each not in numbers), None)
        if unknown is not None or (also and choice in OTHERS):
            raise UserError(
                f"choice={choice!r:.80} with also={unknown if unknown is not None else ', '.join(also)!r:.80}: expected "
                f"numbers from 1 to {len(shown)} beside a best answer."
            )
        said: tuple[Verdict, int | None, tuple[int, ...]] = (
            (OTHERS[choice], None, ())
            if choice in OTHERS
            else choice_of([numbers[each] for each in (choice, *also)], len(shown))
        )
        verdict, best, alike = said
        return self.store.click(Click(question, rater, verdict, best, tuple(shown), time.time(), also=alike)) > 0

    def texts(self, question: Question) -> tuple[Markup, list[Markup]]:
        """Prompt and answers as HTML; made ahead, so that no click waits for a long one."""
        if question.key not in self._texts:
            self._texts[question.key] = (
                markdown(shown_prompt(question.prompt)), [markdown(text) for text in question.responses]
            )  # fmt: skip
        return self._texts[question.key]


class Labelling(Asking):
    """The questions that were sampled for one server.

    Args:
        asked: the questions, in the order in which they are asked.
        store: see :class:`Asking`.
        teaching: what the answers teach.
        rater: see :class:`Asking`.
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
        super().__init__(store, rater)
        self.questions = {each.question.key: each.question for each in asked}
        self.teaching = teaching
        self.next_command = shlex.join(next_command)
        store.add(list(self.questions.values()))
        threading.Thread(target=self._prepare, daemon=True).start()

    def open(self, rater: str) -> list[Question]:
        """See :class:`Asking`."""
        check_rater(rater)
        answered = self.store.answered(rater)
        return [question for key, question in self.questions.items() if key not in answered]

    def side(self) -> tuple[str, dict[str, Any]]:
        """The weights that all clicks give by now."""
        clicks = self.store.clicks()
        return "side.html", {
            "progress": self.teaching.progress(clicks),
            "raters": len({click.rater for click in clicks}),
        }

    def _prepare(self) -> None:
        for question in list(self.questions.values()):
            self.texts(question)


class LiveLabelling(Asking):
    """The questions about a run that is training.

    Args:
        run: its files.
        live: what can be asked.
        store: see :class:`Asking`.
        rater: see :class:`Asking`.
    """

    live = True

    def __init__(self, run: RunFiles, live: LiveQuestions, store: LabelStore, rater: str) -> None:
        super().__init__(store, rater)
        self.run, self.asked = run, live
        self._look()

    def open(self, rater: str) -> list[Question]:
        """See :class:`Asking`; of what the run has recorded by now."""
        check_rater(rater)
        self._look()
        return [each.question for each in self.asked.open(self.store.answered(rater))]

    def side(self) -> tuple[str, dict[str, Any]]:
        """What the run has made of the labels."""
        self._look()
        clicks = [click for click in self.store.clicks() if click.question.key in self.questions]
        answered = Counter(click.question.task for click in clicks)
        tasks = sorted({question.task for question in self.questions.values()})
        hits, tried, chance = self.asked.foretold(clicks)
        step, most = self.run.steps()
        return "live.html", {
            "clicks": len(clicks),
            "raters": len({click.rater for click in clicks}),
            "hits": hits,
            "tried": tried,
            "chance": chance,
            "step": step,
            "most": most,
            "used": self._used(),
            "tasks": [(task, answered[task], self._weights(task)) for task in tasks],
        }

    def _look(self) -> None:
        self.asked.refresh()
        self.questions = {key: each.question for key, each in list(self.asked.known.items())}
        for key in self._texts.keys() - self.questions.keys():
            self._texts.pop(key, None)

    def _used(self) -> int | None:
        """Choices that the run has learned from by now; None: it has not said so yet."""
        frame = self.run.metrics()
        if "anchor/choices" not in frame:
            return None
        known = frame["anchor/choices"].dropna()
        return int(known.iloc[-1]) if len(known) else None

    def _weights(self, task: str) -> list[tuple[str, float]]:
        """The weights that the run gives the rewards of a task now."""
        frame = self.run.weights()
        if not len(frame):
            return []
        own = frame[frame["task"] == task]
        newest = own[own["step"] == own["step"].max()]
        return [(str(name), float(mean)) for name, mean in zip(newest["reward"], newest["mean"], strict=True)]


def shown_prompt(prompt: Prompt) -> str:
    """The prompt as people read it: one message as its text, several with who says them."""
    if isinstance(prompt, str):
        return prompt
    texts = [str(message.get("content") or "") for message in prompt]
    if len(prompt) == 1:
        return texts[0]
    roles = [str(message.get("role", "")) for message in prompt]
    return "\n\n".join(f"{role}:\n\n{text}" for role, text in zip(roles, texts, strict=True))


def label_app(labelling: Asking, token: str | None = None) -> FastAPI:
    """The page for these questions.

    Args:
        labelling: questions, store and what is learned.
        token: what a request must know; None where only this machine can reach the server.
    """
    page = Page([HERE / "templates" / "label"], percent=lambda share: f"{100 * share:.0f} %", letters=LETTERS)
    app = web_app(page, token)

    def answer(template: str, rater: str, first: str | None = None) -> Response:
        """A page with the next question; with the one of the key ``first``, where that is open."""
        left = labelling.open(rater)
        question = next((each for each in left if each.key == first), left[0] if left else None)
        values: dict[str, Any] = {"question": None, "prompt": "", "answers": []}
        if question is not None:
            prompt, answers = labelling.texts(question)
            order = question.order(rater)
            values = {"question": question, "prompt": prompt, "answers": [answers[place] for place in order]}
        done = len(labelling.questions.keys() & labelling.store.answered(rater))
        values |= {"rater": rater, "done": done, "count": len(left) + done, "next": labelling.next_command}
        return page(template, live=labelling.live, **values)

    def moved(rater: str, first: str | None = None, new: bool = True) -> Response:
        """The next question, and word to the page that there is something new, or that another answer stands."""
        next_one = answer("question.html", rater, first)
        next_one.headers["HX-Trigger-After-Settle"] = "clicked" if new else "clicked, standing"
        return next_one

    @app.get("/")
    def first() -> Response:
        return RedirectResponse(f"/label?rater={labelling.rater}", 303)

    @app.get("/label")
    def label(rater: str) -> Response:
        return answer("label.html", rater)

    @app.post("/click")
    def click(key: str, rater: str, choice: str, form: Annotated[dict[str, list[str]], Depends(form_of)]) -> Response:
        new = labelling.answer(key, rater, choice, form.get("also", ()))
        return moved(rater, new=new)

    @app.post("/undo")
    def undo(rater: str) -> Response:
        check_rater(rater)
        return moved(rater, labelling.store.undo(rater, list(labelling.questions)))

    @app.get("/next")
    def following(rater: str) -> Response:
        return answer("question.html", rater)

    @app.get("/side")
    def side() -> Response:
        template, values = labelling.side()
        return page(template, **values)

    return app
