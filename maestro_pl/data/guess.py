"""Which columns hold what, guessed from their usual names and from what stands in them: how a source of them is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from maestro_pl.data.messages import is_chat, messages_in
from maestro_pl.data.readers import Values
from maestro_pl.data.template import filled, letters, value_at
from maestro_pl.errors import UserError

PROMPTS = ("question", "query", "problem", "instruction", "input", "user", "source", "src", "text", "title", "topic")
NESTED_PROMPTS = ("prompt", "question", "query", "problem", "instruction")
CHATS = ("messages", "conversations", "conversation")  # read without being mapped
REFERENCES = (
    "answer", "final_answer", "ground_truth", "gold", "golden_answers", "golden_answer", "answers", "target", "targets",
    "expected", "expected_answer", "expected_output", "completion", "response", "output", "solution", "correct_answer",
    "chosen", "story", "summary", "translation", "tgt", "label",
)  # fmt: skip
NESTED_REFERENCES = (
    "reward_model.ground_truth", "answers.text", "answer.value", "answer.text", "extra_info.answer", "ground_truth", "answer"
)  # fmt: skip
CHOICES = ("choices", "options", "choices.text", "options.text", "endings", "answer_choices", "alternatives")
LABELS = (
    "label", "answer_idx", "answer_index", "answerKey", "answer_key", "answer", "correct", "correct_answer", "correct_option",
    "gold", "target",
)  # fmt: skip
CONTEXTS = ("context", "passage", "article", "document")
LANGUAGES = {
    "ar": "Arabic", "cs": "Czech", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "fi": "Finnish",
    "fr": "French", "he": "Hebrew", "hi": "Hindi", "hu": "Hungarian", "it": "Italian", "ja": "Japanese", "ko": "Korean",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sv": "Swedish", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip

#: Where a reference stands inside a longer answer: a sign that all of them have -> the pattern whose group it is.
MARKS = {
    "####": r"####\s*(.+)",
    r"\boxed{": r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}",
}


@dataclass
class Guess:
    """How rows of one kind are read.

    Attributes:
        columns, prompt_template, reference_pattern, last_assistant: of the ``Source``.
        choices: whether the rows have options and say which is right.
        chat: whether the prompts are conversations.
        prompt, reference: in words, where they were found.
    """

    columns: dict[str, str] = field(default_factory=dict)
    prompt_template: str = ""
    reference_pattern: str = ""
    last_assistant: str = "refuse"
    choices: bool = False
    chat: bool = False
    prompt: str = ""
    reference: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """The keys of the source that differ from their defaults."""
        given = {
            "columns": self.columns,
            "prompt_template": self.prompt_template,
            "reference_pattern": self.reference_pattern,
            "last_assistant": self.last_assistant if self.last_assistant != "refuse" else "",
        }
        return {key: value for key, value in given.items() if value}


def guess_columns(rows: Sequence[Values], prompt: str | None = None, reference: str | None = None) -> Guess:
    """Guess what the columns of these rows are.

    Args:
        rows: as the readers give them.
        prompt: the column of the prompt, where the user has named it; a path goes into nested columns.
        reference: the column of the reference, likewise.

    Raises:
        UserError: no column looks like a prompt, or a named one is in no row.
    """
    for role, path in (("prompt", prompt), ("reference", reference)):
        check_named(rows, role, path)
    guess = Guess()
    if prompt is None and reference is None and _translation(guess, rows):
        return guess
    _find_prompt(guess, rows, prompt)
    if reference is None:
        _find_choices(guess, rows)
    if not guess.choices:
        _find_reference(guess, rows, reference)
    _add_context(guess, rows)
    _step_aside(guess, rows)
    return guess


def check_named(rows: Sequence[Values], role: str, path: str | None) -> None:
    """Raise where no row has the column that the user has named for this role."""
    if path is not None and not any(at(row, path) is not None for row in rows):
        raise UserError(f"--{role} {path!r}: no row has such a column; there are {', '.join(names(rows))}.")


def at(row: Values, path: str) -> Any:
    """What stands at a path; None where there is nothing, or nothing but blanks."""
    try:
        value = value_at(row, path)
    except KeyError:
        return None
    empty = (isinstance(value, (str, list, tuple, dict)) and not value) or value != value  # NaN: none, in Parquet files
    return None if empty or (isinstance(value, str) and not value.strip()) else value


def names(rows: Sequence[Values]) -> list[str]:
    """The names of all columns, in the order of the rows."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _everywhere(rows: Sequence[Values], path: str, fits: Callable[[Any], bool]) -> bool:
    return all((value := at(row, path)) is not None and fits(value) for row in rows)


def _somewhere(rows: Sequence[Values], path: str, fits: Callable[[Any], bool]) -> bool:
    """Whether a column holds something, and nothing but what fits."""
    found = [value for row in rows if (value := at(row, path)) is not None]
    return bool(found) and all(map(fits, found))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or is_chat(value)


def _is_answer(value: Any) -> bool:
    several = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(item, (str, bool, int, float)) for item in several)


def _chat(value: Any) -> list[Any] | None:
    """The messages of a value that is a conversation or writes one out."""
    if is_chat(value):
        return list(value)
    return messages_in(value) if isinstance(value, str) else None


def _nested(rows: Sequence[Values], wanted: Sequence[str]) -> Iterable[str]:
    """Paths one or two levels down whose end, or whose whole, is one of the wanted."""
    paths: dict[str, None] = {}
    for row in rows[:100]:
        for name, value in row.items():
            if isinstance(value, dict):
                for key, inner in value.items():
                    paths[f"{name}.{key}"] = None
                    if isinstance(inner, dict):
                        paths.update({f"{name}.{key}.{last}": None for last in inner})
    whole = [path for path in wanted if path in paths]
    ends = [path for name in wanted for path in paths if path.rsplit(".", 1)[-1] == name]
    return dict.fromkeys([*whole, *ends])


def _translation(guess: Guess, rows: Sequence[Values]) -> bool:
    """Pairs of one text in two languages: columns ``en`` and ``de``, or a column ``translation`` that holds them."""
    if any(at(row, name) is not None for row in rows for name in ("prompt", "reference", *CHATS)):
        return False
    top = [name for name in names(rows) if name in LANGUAGES and _everywhere(rows, name, _is_text)]
    inner = [
        path
        for path in (f"translation.{code}" for code in LANGUAGES)
        if "translation" in names(rows) and _everywhere(rows, path, _is_text)
    ]
    pair = top if len(top) == 2 else inner
    if len(pair) != 2:
        return False
    order = list(rows[0].get("translation", {})) if pair is inner else names(rows)
    source, target = sorted(pair, key=lambda path: order.index(path.rsplit(".", 1)[-1]))
    language = LANGUAGES[target.rsplit(".", 1)[-1]]
    guess.columns = {"reference": target}
    guess.prompt_template = f"Translate into {language}:\n{{{source}}}"
    guess.prompt, guess.reference = f"the column {source}", f"the column {target}"
    return True


def _find_prompt(guess: Guess, rows: Sequence[Values], named: str | None) -> None:
    found = named or _prompt_column(rows)
    if found is None:
        guess.prompt, guess.reference = "instruction and input (Alpaca's form)", "output"
        return
    if found != "prompt" and not (found in CHATS and _everywhere(rows, found, is_chat)):
        guess.columns["prompt"] = found
    guess.prompt = f"the column {found}"
    chats = [messages for row in rows[:2000] if (messages := _chat(at(row, found))) is not None]
    guess.chat = bool(chats)
    if any(messages[-1].get("role", messages[-1].get("from")) in ("assistant", "gpt") for messages in chats):
        guess.last_assistant = "reference"
        guess.reference = "the assistant's last turn"


def _prompt_column(rows: Sequence[Values]) -> str | None:
    """The column of the prompt; None for Alpaca's form.

    Raises:
        UserError: there is none.
    """
    for name in ("prompt", *CHATS):
        if _somewhere(rows, name, _is_prompt):
            return name
    if _somewhere(rows, "instruction", _is_text) and {"input", "output"} & set(names(rows)):
        return None
    top = [name for name in PROMPTS if _everywhere(rows, name, _is_prompt)]
    top += [name for name in names(rows) if _everywhere(rows, name, is_chat)]
    top += [path for path in _nested(rows, NESTED_PROMPTS) if _everywhere(rows, path, _is_prompt)]
    top += [name for name in PROMPTS if _somewhere(rows, name, _is_prompt)]
    texts = [name for name in names(rows) if _everywhere(rows, name, _is_text)]
    found = top or (texts if len(texts) == 1 else [])
    if not found:
        raise UserError(
            f"no column looks like a prompt; there are {', '.join(names(rows))}: name one with --prompt COLUMN, and the "
            "one of the reference, if there is one, with --reference COLUMN."
        )
    return found[0]


def _find_choices(guess: Guess, rows: Sequence[Values]) -> None:
    """A list of options with the right one's letter, index or text; or one column an option with its letter."""
    prompt = guess.columns.get("prompt", "prompt")
    for choices in CHOICES:
        if not _everywhere(rows, choices, lambda v: isinstance(v, (list, tuple)) and len(filled(v)) > 1):
            continue
        for label in (name for name in LABELS if name not in (prompt, choices)):
            if all(_names_option(at(row, label), filled(at(row, choices))) for row in rows):
                guess.columns |= {
                    ours: theirs for ours, theirs in (("choices", choices), ("label", label)) if ours != theirs
                }
                guess.choices, guess.reference = True, f"the columns {choices} and {label}"
                if not guess.chat and not _shown(rows, prompt, choices):
                    guess.prompt_template = f"{{{guess.columns.pop('prompt', 'prompt')}}}\n{{choices!o}}"
                return
    for form in ("{}", "option_{}", "choice_{}", "options.{}", "choices.{}"):
        paths = [form.format(letter) for letter in "ABCD"]
        paths = paths if _everywhere(rows, paths[0], _is_answer) else [path.lower() for path in paths]
        paths = [path for path in paths if _everywhere(rows, path, _is_answer)]
        label_of = (name for name in LABELS if _everywhere(rows, name, _is_letter))
        if len(paths) > 1 and (found := next(label_of, None)):
            guess.columns.pop("prompt", None)
            options = [f"{letters(place)}: {{{path}}}" for place, path in enumerate(paths)]
            guess.prompt_template = "\n".join([f"{{{prompt}}}", *options])
            guess.columns["reference"] = found
            guess.reference = f"the column {found}"
            return


def _is_letter(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z]", value.strip()))


def _names_option(label: Any, options: Sequence[Any]) -> bool:
    if isinstance(label, int) and not isinstance(label, bool):
        return 0 <= label < len(options)
    if not isinstance(label, str) or label.strip() in map(str, options):
        return isinstance(label, str)
    return _is_letter(label) and label.strip().upper() <= letters(len(options) - 1)


def _shown(rows: Sequence[Values], prompt: str, choices: str) -> bool:
    """Whether the prompts themselves list their options."""
    return all(str(at(row, choices)[0]) in str(at(row, prompt)) for row in rows[:50])


def _find_reference(guess: Guess, rows: Sequence[Values], named: str | None) -> None:
    if not guess.columns.get("reference"):
        found = named or _reference_column(rows, guess)
        if found is None:
            return
        if found != "reference":
            guess.columns["reference"] = found
        if found != "output" or guess.columns.get("prompt"):
            guess.reference = f"the column {found}"
    path = guess.columns.get("reference", "reference")
    texts = [str(text) for row in rows for text in _listed(at(row, path)) if text is not None]
    for mark, pattern in MARKS.items():
        if texts and all(mark in text and re.search(pattern, text) for text in texts):
            guess.reference_pattern = pattern


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _reference_column(rows: Sequence[Values], guess: Guess) -> str | None:
    prompt = guess.columns.get("prompt", "prompt")
    alpaca = not guess.columns and guess.prompt.startswith("instruction")
    if _somewhere(rows, "reference", _is_answer):
        return "reference"
    if alpaca:
        return None  # read without being mapped
    for name in REFERENCES:
        if name == prompt or name in guess.prompt_template:
            continue
        if _somewhere(rows, name, _is_answer):
            return name
        last = f"{name}[-1].content"
        if _somewhere(rows, name, is_chat) and _somewhere(rows, last, _is_text):
            return last
    nested = (path for path in _nested(rows, NESTED_REFERENCES) if path != prompt)
    return next((path for path in nested if _somewhere(rows, path, _is_answer)), None)


def _add_context(guess: Guess, rows: Sequence[Values]) -> None:
    """A text that the prompt asks about stands in front of it."""
    prompt = guess.columns.get("prompt", "prompt")
    taken = {guess.columns.get("reference"), prompt}
    found = next((name for name in CONTEXTS if name not in taken and _everywhere(rows, name, _is_text)), None)
    if found is None or guess.chat or guess.prompt_template or not _everywhere(rows, prompt, _is_text):
        return
    guess.prompt_template = f"{{{found}}}\n\n{{{guess.columns.pop('prompt', 'prompt')}}}"
    guess.prompt = f"the columns {found} and {prompt}"


def _step_aside(guess: Guess, rows: Sequence[Values]) -> None:
    """A column of theirs that has one of our names, and is not what we mean, gets another."""
    theirs = set(guess.columns.values())
    for ours in [name for name in guess.columns if name in names(rows) and name not in theirs]:
        guess.columns[f"their_{ours}"] = ours
