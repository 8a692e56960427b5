"""The shapes in which a benchmark's rows come, told apart by their columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maestro_pl.data.named_sources.cards import BenchmarkCard
from maestro_pl.data.named_sources.choices import options_text
from maestro_pl.data.named_sources.options import BenchmarkOptions
from maestro_pl.data.readers import Values
from maestro_pl.data.template import PromptTemplate
from maestro_pl.errors import UserError

NOVER_INSTRUCTION = "Answer the question and return in the following format:"


# in a row that a form reads: how many empty options it has left out; `reading` takes it out and counts
BLANK_OPTIONS = "_blank_options"


class LeftOutError(ValueError):
    """A row that is sound but no part of the benchmark as it is read; the message says why, in words for a count."""


@dataclass(frozen=True)
class Form:
    """One published or derived shape of rows.

    Attributes:
        name: the form in messages.
        columns: what a row must have to be of this form.
        read: from a row to its mapped rows: the columns of the template and ``reference``, and for multiple choice
            ``choices`` and ``label``; raises ``ValueError`` for a row that cannot be used.
        template: the prompt, where the card's does not fit this form.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Values, BenchmarkOptions], list[Values]]
    template: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A named source.

    Attributes:
        card: what is known about it.
        forms: the shapes of rows it is read from.
        options: the options of its own, besides the common ones.
        group: rows of the same value stay in one split; None for a row without one, which goes by its prompt.
    """

    card: BenchmarkCard
    forms: tuple[Form, ...]
    options: tuple[str, ...] = ()
    group: Callable[[Values], str | None] = lambda values: None

    def detect(self, label: str, columns: list[str]) -> Form:
        """The form of rows with these columns.

        Raises:
            UserError: no form has them.
        """
        for form in self.forms:
            if set(form.columns) <= set(columns):
                return form
        raise UserError(f"{label} has the columns {_shown(columns)}; {self.card.name} is read from {self.accepted()}.")

    def accepted(self) -> str:
        """The forms, in words."""
        return " or ".join(f"{form.name} ({_shown(form.columns)})" for form in self.forms)

    def rows(self, form: Form, values: Values, options: BenchmarkOptions) -> list[Values]:
        """The finished rows of one row: with ``prompt``, ``reference``, ``task`` and all other columns.

        Raises:
            LeftOutError: the row is no part of what is read.
            ValueError: the row cannot be used.
        """
        if lost := [column for column in form.columns if column not in values]:
            raise ValueError(f"no column {lost[0]!r}; {form.name} has {_shown(form.columns)}")
        template = PromptTemplate(options.prompt_template or form.template or self.card.template)
        finished = []
        for row in form.read(values, options):
            fields: Values = {**values, **row}
            own = dict(fields)
            if "choices" in row:
                own["options"] = options_text(row["choices"])
            if "task" in values:  # ours is the name of the benchmark
                fields["published_task"] = values["task"]
            finished.append({**fields, "prompt": template.fill(own), "task": self.card.name})
        return finished


def _shown(columns: Any) -> str:
    return ", ".join(column.replace("\n", "\\n") for column in columns)


def text_of(values: Values, column: str) -> str:
    """The text of a column.

    Raises:
        ValueError: it is no text, or empty.
    """
    value = values.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{column} is {value!r}, expected text")
    if not value.strip():
        raise ValueError(f"{column} is empty")
    return value.strip()


def list_of(values: Values, column: str) -> list[str]:
    """The texts of a column that holds a list.

    Raises:
        ValueError: it is no list of at least two texts.
    """
    value = values.get(column)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{column} is {value!r}, expected a list of at least two texts")
    return [item.strip() for item in value]


def reference_of(values: Values, column: str) -> str:
    """The reference of a row.

    Raises:
        LeftOutError: there is none.
        ValueError: it is no text.
    """
    value = values.get(column)
    if value is None or value == "" or value != value or (isinstance(value, str) and not value.strip()):
        raise LeftOutError("without a reference")
    return text_of(values, column)


def nover_question(values: Values) -> str:
    """The question of a prompt in NOVER's wording: without its instruction block and its first word."""
    question = text_of(values, "prompt").partition(NOVER_INSTRUCTION)[0].strip().removeprefix("Question:").strip()
    if not question:
        raise ValueError("the prompt is empty before its instruction block")
    return question


def _read_nover(values: Values, options: BenchmarkOptions) -> list[Values]:
    return [{"question": nover_question(values), "reference": reference_of(values, "reference")}]


# a reader's prompt is kept as it is, but for the instruction block
NOVER = Form("NOVER's form", ("prompt", "reference"), _read_nover, template="{question}")


def question_form(name: str, question: str, reference: str) -> Form:
    """A published form with a question and a reference in columns of these names."""

    def read(values: Values, options: BenchmarkOptions) -> list[Values]:
        return [{"question": text_of(values, question), "reference": reference_of(values, reference)}]

    return Form(name, (question, reference), read)
