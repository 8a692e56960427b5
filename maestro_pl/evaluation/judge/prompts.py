"""What a judge is asked, task by task: prompt templates in a YAML file."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from maestro_pl.data.template import PromptTemplate
from maestro_pl.errors import UserError, check_choice
from maestro_pl.evaluation.judge.parsing import parse_label, parse_score, plain_label
from maestro_pl.evaluation.judge.rubrics import Criterion, listed, parse_rubric, read_criteria
from maestro_pl.rewards.exact_match import extract_answer
from maestro_pl.rollout import Message, Prompt
from maestro_pl.run.paths import config_path
from maestro_pl.run.yaml_files import read_yaml

Mode: TypeAlias = Literal["score", "verdict", "compare", "rubric", "best"]
Parsed: TypeAlias = float | str

DEFAULT = "default"
SHIPPED = ("paper", "best")
_KEYS = ("system", "prompt", "mode", "scale", "positive", "negative", "criteria")
_POSITIVE = ("correct", "yes", "true", "right")
_NEGATIVE = ("incorrect", "no", "false", "wrong", "not correct")
_TEXTS = (
    "prompt",
    "response",
    "answer",
    "response_a",
    "response_b",
    "answer_a",
    "answer_b",
    "answers",
    "responses",
    "criteria",
)
LETTERS = string.ascii_uppercase  # what the responses that mode `best` shows are called
NO_BEST = "none"
_NO_BEST = ("none", "tie", "equal", "draw", "neither", "all bad", "all equal", "no difference")
_COMPARE = {"a": "A", "b": "B", "tie": "tie", "c": "tie", "equal": "tie", "draw": "tie", "neither": "tie"}


@dataclass(frozen=True)
class Case:
    """One response to judge.

    Attributes:
        prompt: what was answered, a string or chat messages.
        response: the whole response.
        columns: the data row: ``task``, ``reference`` and every other column.
        baseline: what the response is compared with; only the mode ``compare`` reads it.
    """

    prompt: Prompt
    response: str
    columns: Mapping[str, Any]
    baseline: str | None = None


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge is asked about the responses of one task.

    Attributes:
        system: the system message; empty for none.
        template: the user message, over ``{prompt}``, ``{response}``, ``{answer}``, ``{reference}`` and any column; in
            the mode ``compare`` over ``{answer_a}`` and ``{answer_b}`` (or ``{response_a}``, ``{response_b}``).
            the mode ``best`` over ``{answers}`` (or ``{responses}``), all that are shown, each under its letter.
        mode: ``score`` on a scale, ``verdict`` (correct or not), ``compare`` (which of two is better), ``rubric`` (which
            of several criteria are met; the template shows them as ``{criteria}``), ``best`` (which of several responses to
            one prompt).
        scale: the lowest and the highest score.
        labels: word in lower case to the label it stands for.
        criteria: of a rubric.
        criteria_column: the column that holds a rubric's criteria for each prompt; None where they are the same for all.
    """

    system: str
    template: PromptTemplate
    mode: Mode
    scale: tuple[float, float] = (0.0, 10.0)
    labels: Mapping[str, str] | None = None
    criteria: tuple[Criterion, ...] = ()
    criteria_column: str | None = None

    def of(self, case: Case) -> JudgePrompt | None:
        """The prompt with the criteria of this case; None where its column is empty: the judge has nothing to say.

        Raises:
            UserError: the row lacks the column, or holds no criteria.
        """
        if self.criteria_column is None:
            return self
        where = f"The judge's rubric for the task {case.columns.get('task')!r}"
        if self.criteria_column not in case.columns:
            raise UserError(
                f"{where} reads the column {self.criteria_column!r}, and the data rows have {sorted(case.columns)}: map it "
                "under data.sources, or write the criteria into the prompts file."
            )
        value = case.columns[self.criteria_column]
        if value is None or value != value or value in ("", []):  # NaN is what Parquet has for "none"
            return None
        return replace(self, criteria=read_criteria(value, f"{where}, column {self.criteria_column!r}"))

    @property
    def columns(self) -> list[str]:
        """The columns that the template reads."""
        return template_columns(self.template.template)

    @property
    def reminder(self) -> str:
        """What is added when a reply could not be read."""
        if self.mode == "score":
            return (
                f"Reply with one line and nothing else: Score: <a number from {self.scale[0]:g} to {self.scale[1]:g}>"
            )
        if self.mode == "rubric":
            return f"Reply with {len(self.criteria)} lines and nothing else, one for each criterion: <its number>: <yes or no>"
        wanted = "A, B or tie" if self.mode == "compare" else "correct or incorrect"
        if self.mode == "best":
            wanted = f"one letter of {', '.join(self._letters)}, or none"
        return f"Reply with one line and nothing else: Verdict: <{wanted}>"

    @property
    def _letters(self) -> list[str]:
        return [label for label in dict.fromkeys((self.labels or {}).values()) if label != NO_BEST]

    def among(self, count: int) -> JudgePrompt:
        """The same question about so many responses: mode ``best``, whose replies are their letters.

        Raises:
            UserError: more than there are letters.
        """
        if count > len(LETTERS):
            raise UserError(
                f"The judge is shown {count} responses at once, and they are called by {len(LETTERS)} letters: give "
                "model.anchoring.responses: 4, say."
            )
        labels = {letter.lower(): letter for letter in LETTERS[:count]} | dict.fromkeys(_NO_BEST, NO_BEST)
        return replace(self, labels=labels)

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of a reply, one of the forms that :meth:`parse` reads: the reason, then the score or the label."""
        if self.mode == "rubric":
            numbers = [str(number) for number in range(1, len(self.criteria) + 1)]
            verdict = {"type": "string", "enum": ["yes", "no"]}
            return {
                "type": "object",
                "properties": {"reason": {"type": "string"}, **dict.fromkeys(numbers, verdict)},
                "required": ["reason", *numbers],
                "additionalProperties": False,
            }
        key = "verdict"
        value: dict[str, Any] = {"type": "string", "enum": ["A", "B", "tie"]}
        if self.mode == "score":
            key, value = "score", {"type": "number", "minimum": self.scale[0], "maximum": self.scale[1]}
        elif self.mode == "best":
            value = {"type": "string", "enum": [*self._letters, NO_BEST]}
        elif self.mode == "verdict":
            value = {"type": "string", "enum": list(self.labels or {})}
        return {
            "type": "object",
            "properties": {"reason": {"type": "string"}, key: value},
            "required": ["reason", key],
            "additionalProperties": False,
        }

    def parse(self, reply: str) -> Parsed | None:
        """The score in [0, 1] or the label (``yes``/``no``, ``A``/``B``/``tie``) of a reply, None if it is malformed."""
        if self.mode == "score":
            return parse_score(reply, *self.scale)
        if self.mode == "rubric":
            return parse_rubric(reply, self.criteria)
        return parse_label(reply, self.labels or _COMPARE)

    def messages(self, case: Case, *, swapped: bool = False, answer_tag: str = "answer") -> list[Message] | None:
        """The messages to send, or None where a column of the template is empty: the judge has nothing to say.

        Raises:
            UserError: the row lacks a column of the template.
        """
        values = dict(case.columns) | {
            "prompt": prompt_text(case.prompt),
            "response": case.response,
            "answer": extract_answer(case.response, answer_tag=answer_tag),
        }
        if self.mode == "rubric":
            values["criteria"] = listed(self.criteria)
        if self.mode == "compare":
            if case.baseline is None:
                return None
            pair = (case.baseline, case.response) if swapped else (case.response, case.baseline)
            for letter, text in zip("ab", pair, strict=True):
                values[f"response_{letter}"] = text
                values[f"answer_{letter}"] = extract_answer(text, answer_tag=answer_tag)
        return self._filled(case, values)

    def messages_among(self, cases: Sequence[Case], *, answer_tag: str = "answer") -> list[Message] | None:
        """The messages that ask which of several responses to one prompt is best, in the order given; see :meth:`messages`."""
        texts = [case.response for case in cases]
        answers = [extract_answer(text, answer_tag=answer_tag) for text in texts]
        values = dict(cases[0].columns) | {"prompt": prompt_text(cases[0].prompt)}
        for name, shown in (("responses", texts), ("answers", answers)):
            lettered = zip(LETTERS, shown, strict=False)
            values[name] = "\n\n".join(f"<answer_{letter}>\n{text}\n</answer_{letter}>" for letter, text in lettered)
        return self._filled(cases[0], values)

    def _filled(self, case: Case, values: dict[str, Any]) -> list[Message] | None:
        for column in self.columns:
            if column not in values:
                raise UserError(
                    f"The judge's prompt for the task {case.columns.get('task')!r} reads the column {column!r}, and the "
                    f"data rows have {sorted(values)}: map it under data.sources, or change the prompt."
                )
            if values[column] is None or values[column] != values[column]:  # NaN is what Parquet has for "none"
                return None
        try:
            content = self.template.fill(values)
        except ValueError as error:
            raise UserError(f"The judge's prompt for the task {case.columns.get('task')!r}: {error}.") from error
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": content}]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a judge reads it: the text, or the turns of a conversation with their roles."""
    if isinstance(prompt, str):
        return prompt.strip()
    if len(prompt) == 1:
        return str(prompt[0].get("content", "")).strip()
    return "\n\n".join(f"{message.get('role', 'user')}: {message.get('content', '')}" for message in prompt).strip()


def template_columns(template: str) -> list[str]:
    """The columns that a template names, without what follows a dot or a bracket."""
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    return list(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in fields))


def prompt_for(prompts: Mapping[str, JudgePrompt], task: str) -> JudgePrompt:
    """The prompt of a task, or the ``default``.

    Raises:
        UserError: there is neither.
    """
    found = prompts.get(task) or prompts.get(DEFAULT)
    if found is None:
        raise UserError(
            f"The judge has no prompt for the task {task!r}, only for {sorted(prompts)}: add it or a {DEFAULT!r} to the "
            "prompts file, or limit the judge with tasks: [...]."
        )
    return found


def load_prompts(path: str) -> dict[str, JudgePrompt]:
    """Read a prompts file: task name to ``{system, prompt, mode, scale, positive, negative, criteria}``.

    Args:
        path: a YAML file, or the bare name of one that comes with the package: ``paper`` is
            ``configs/judge/paper.yaml``, whatever the working folder.

    Raises:
        UserError: no such file, not YAML, or an entry that cannot be used.
    """
    file = Path(path)
    if path in SHIPPED:
        file = config_path(f"judge/{path}.yaml")
    elif not file.is_file() and path.startswith("configs/"):
        file = config_path(path.removeprefix("configs/"))
    try:
        entries = read_yaml(file, f"The judge's prompts file {path!r}")
    except FileNotFoundError as error:
        raise UserError(
            f"The judge's prompts file {path!r} cannot be read ({error.strerror}): give a YAML file, as a path from the "
            f"working folder, or the name of a shipped one ({', '.join(SHIPPED)})."
        ) from error
    if not isinstance(entries, Mapping) or not entries:
        raise UserError(
            f"The judge's prompts file {path!r} holds {type(entries).__name__}, expected task names, each with its prompt."
        )
    return {str(task): make_prompt(entry, f"{path}, task {task!r}") for task, entry in entries.items()}


def make_prompt(entry: object, where: str) -> JudgePrompt:
    """Check one entry of a prompts file.

    Args:
        entry: the mapping of the file.
        where: names the entry in errors.

    Raises:
        UserError: an unknown or missing key, an unknown mode, a scale that is none, words of one verdict that stand for
            the other, or a template that cannot be filled or never shows the response.
    """
    # by hand: jsonargparse takes ['1', '5'] for a scale and 'null' for no words, and has one sentence for all of this
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: {entry!r} is no prompt, expected the keys {', '.join(_KEYS)}.")
    if unknown := [str(key) for key in entry if key not in _KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}, expected some of {', '.join(_KEYS)}.")
    mode = entry.get("mode", "verdict")
    check_choice(f"{where}: mode", mode, Mode, form="{} is {!r}, expected one of {}.")
    text, system = entry.get("prompt"), entry.get("system") or ""
    if not isinstance(text, str) or not isinstance(system, str):
        raise UserError(f"{where}: prompt is {text!r} and system {system!r}, expected texts.")
    try:
        template = PromptTemplate(text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    _check_shows_response(text, mode, where)
    _check_fills(template, where)
    labels = None if mode != "verdict" else _verdict_labels(entry, where)
    scale = _scale(entry.get("scale", [0, 10]), where)
    return JudgePrompt(system.strip(), template, mode, scale, labels, *_criteria(entry, mode, where))


def _criteria(entry: Mapping[str, Any], mode: str, where: str) -> tuple[tuple[Criterion, ...], str | None]:
    """A rubric's criteria, or the column that has them."""
    given = entry.get("criteria")
    if mode != "rubric":
        if given is not None:
            raise UserError(f"{where}: criteria are of mode: rubric, and the mode is {mode}.")
        return (), None
    if "criteria" not in template_columns(entry["prompt"]):
        raise UserError(f"{where}: a prompt with mode rubric must show {{criteria}}.")
    if isinstance(given, str) and given.isidentifier():
        return (), given
    if given is None:
        raise UserError(f"{where}: mode rubric without criteria: list them, or name the column that has them.")
    return read_criteria(given, f"{where}: criteria"), None


def _check_shows_response(text: str, mode: str, where: str) -> None:
    columns = set(template_columns(text))
    if mode == "compare":
        if not (columns & {"answer_a", "response_a"} and columns & {"answer_b", "response_b"}):
            raise UserError(f"{where}: a prompt with mode compare must show {{answer_a}} and {{answer_b}}.")
    elif mode == "best":
        if not columns & {"answers", "responses"}:
            raise UserError(f"{where}: a prompt with mode best must show {{answers}}.")
    elif not columns & {"answer", "response"}:
        raise UserError(f"{where}: the prompt shows neither {{answer}} nor {{response}}: the judge would not see it.")


def _check_fills(template: PromptTemplate, where: str) -> None:
    """Refuse at load what would stop a run at its first response: an unknown conversion, a format that no text has."""
    for _, name, form, conversion in template.parse(template.template):
        if name is None:
            continue
        if conversion not in (None, "", *"rsaoj"):
            raise UserError(f"{where}: the prompt has {{{name}!{conversion}}}, and the conversions are !o and !j.")
        column = re.split(r"[.\[]", name)[0]
        if column in _TEXTS and (name != column or conversion in ("o", "j")):
            raise UserError(f"{where}: the prompt takes {column} apart, which is one text: write {{{column}}}.")
        if form and not any(_formats(value, form) for value in (("x",) if column in _TEXTS else ("x", 1, 1.0))):
            raise UserError(f"{where}: {form!r} in {{{name}:{form}}} is no format of such a value: write {{{name}}}.")


def _formats(value: object, form: str) -> bool:
    try:
        format(value, form)
    except ValueError:
        return False
    return True


def _scale(scale: object, where: str) -> tuple[float, float]:
    good = isinstance(scale, Sequence) and not isinstance(scale, str) and len(scale) == 2
    good = good and all(
        isinstance(end, int | float) and not isinstance(end, bool) and math.isfinite(end)
        for end in scale  # type: ignore[attr-defined]
    )
    if not good or not scale[0] < scale[1]:  # type: ignore[index]
        raise UserError(f"{where}: scale is {scale!r}, expected two numbers, the lower first, such as [0, 10].")
    return float(scale[0]), float(scale[1])  # type: ignore[index]


def _verdict_labels(entry: Mapping[str, Any], where: str) -> dict[str, str]:
    """The words of both verdicts; the file's own besides the usual ones."""
    labels = dict.fromkeys(_POSITIVE, "yes") | dict.fromkeys(_NEGATIVE, "no")
    for key, label in (("positive", "yes"), ("negative", "no")):
        for word in _own_words(entry.get(key), key, where):
            if labels.setdefault(word, label) != label:
                other = "negative" if label == "yes" else "positive"
                raise UserError(
                    f"{where}: {key} holds {word!r}, which is a {other} verdict: take it out of one of them."
                )
    return labels


def _own_words(words: object, key: str, where: str) -> list[str]:
    """The words of one verdict in lower case; a bare yes or no, which YAML reads as a boolean, is its word."""
    if words is None:
        return []
    own = []
    for word in words if isinstance(words, list | tuple) else [words]:
        if not isinstance(word, str | bool) or not plain_label(str(word)):
            raise UserError(f"{where}: {key} holds {word!r}, expected words such as correct.")
        own.append(("yes" if word else "no") if isinstance(word, bool) else plain_label(word))
    return own
