"""From what a file says to the one row schema of the project: prompt, reference, task, and the other columns untouched."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from maestro_pl.data.messages import is_chat, looks_like_chat, messages_in, plain_message, short
from maestro_pl.data.named_sources.settling import settle
from maestro_pl.data.patterns import search_within
from maestro_pl.data.problems import BadRowPolicy, Problems
from maestro_pl.data.readers import Values, unsound
from maestro_pl.data.sources import Part, Source, read_parts
from maestro_pl.data.splits import SPLITS, Split, as_split, prompt_key, split_by_fraction, stable_unit
from maestro_pl.data.template import PromptTemplate, value_at
from maestro_pl.errors import UserError
from maestro_pl.rollout import Prompt

# keys of a batch that the data module and the rollout write themselves
RESERVED = ("prompt_text", "prompt_ids", "position", "rollout")
ALL_TASKS = "all"  # stands for every task in tables and logs


@dataclass
class Row:
    """One prompt: ``values`` has ``prompt``, ``reference``, ``task`` and the source's other columns.

    Attributes:
        values: ``reference`` is a text, a list of several right ones, or None.
        file: where it comes from.
        number: its place there.
        source: the place of its source in the list.
        rendered: the prompt is read as it is, without the chat template.
        continues: its last message is the assistant's, to be gone on with.
    """

    values: Values
    file: str
    number: int
    source: int
    rendered: bool = False
    continues: bool = False

    @property
    def prompt(self) -> Prompt:
        """The prompt as the source gave or built it: a string or chat messages."""
        value: Prompt = self.values["prompt"]
        return value

    @property
    def task(self) -> str:
        """The task tag."""
        return str(self.values["task"])

    @property
    def key(self) -> str:
        """What makes two prompts the same."""
        return prompt_key(self.prompt)


@dataclass
class Loaded:
    """The rows of one source by split, in words how they were split, and what else there is to say about them."""

    rows: dict[Split, list[Row]]
    how: str
    notes: list[str] = field(default_factory=list)


def load_source(
    index: int,
    source: Source,
    fractions: Sequence[float] | None = None,
    split_seed: int = 0,
    on_bad_row: BadRowPolicy = "error",
) -> Loaded:
    """Read, map, check and split the rows of one source.

    Args:
        index: the source's place in the list, kept in its rows.
        source: what to read.
        fractions: how to split if neither the source nor its rows say so; None: everything trains.
        split_seed: seed of the split by fractions.
        on_bad_row: ``error`` raises for the first rows that cannot be used, ``drop`` warns with their count.

    Raises:
        UserError: the source cannot be read, has rows that cannot be used, or has no rows left.
    """
    problems = Problems("cannot be used", "Mend the rows, or set data.on_bad_row: drop to go on without them.")
    benchmark = source.benchmark
    if benchmark is not None:  # its rows come with their prompts, and are divided once all are there
        builder, fractions = _RowBuilder(index, replace(source, prompt_template="")), None
    else:
        builder = _RowBuilder(index, source)
    left_out: Counter[str] = Counter()
    blank_options = 0
    rows: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    ways: list[str] = []
    for part in read_parts(source, problems):
        splitter = _Splitter(part, source, fractions, split_seed)
        builder.look_at(part)
        for number, values in part.rows:
            if not _wanted(values, source.where):
                continue
            try:
                row = builder.build(part, number, values)
                rows[splitter.split(row)].append(row)
            except UserError:  # about the source, not the row: a pattern whose search does not end
                raise
            except ValueError as error:
                problems.add(part.label, number, str(error))
        ways.append(splitter.how)
        left_out.update(part.left_out)
        blank_options += part.blank_options
    problems.settle(on_bad_row, sum(map(len, rows.values())) + len(problems))
    builder.check_cut()
    notes = [f"{count} rows {reason} are left out" for reason, count in left_out.items()]
    notes += [f"{count} rows {what}" for what, count in builder.told.items()]
    if blank_options := blank_options + (builder.template.blank_options if builder.template else 0):
        notes.append(f"{blank_options} empty options (nan) are left out")
    if not any(rows.values()):
        filtered = f" after where: {source.where}" if source.where else ""
        filtered += "".join(f"; {note}" for note in notes)
        raise UserError(f"{source.label} has no rows that can be used{filtered}.")
    if benchmark is not None:
        own = any(way.startswith("by ") for way in ways)
        rows, how, said = settle(benchmark, source.benchmark_options, rows, own, split_seed)
        ways, notes = [how] if how else ways, notes + said
    limited = {split: part_rows[: source.limit] for split, part_rows in rows.items()}
    return Loaded(limited, ", ".join(dict.fromkeys(ways)), notes)


def _wanted(values: Values, where: dict[str, Any]) -> bool:
    # as text: the command line turns "1" into 1, and a CSV file has nothing but text
    return all(
        str(value_at(values, column) if _has(values, column) else None)
        in map(str, wanted if isinstance(wanted, list) else [wanted])
        for column, wanted in where.items()
    )


def evaluation_rows(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """The rows to evaluate on: at most ``limit`` of each task, the same for a seed whatever the other rows are.

    The tasks come in turn, so that the first batches speak for all of them.
    """
    tasks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        tasks[row.task].append(row)
    if limit is not None:
        tasks = {task: sorted(of, key=lambda row: stable_unit(row.key, seed))[:limit] for task, of in tasks.items()}
    return [row for turn in zip_longest(*tasks.values()) for row in turn if row is not None]


class _Splitter:
    """Decides the split of each row of a part; ``how`` says by what, in words."""

    def __init__(self, part: Part, source: Source, fractions: Sequence[float] | None, seed: int) -> None:
        self.source, self.seed = source, seed
        self.fixed: Split | None = part.split
        self.fractions = source.fractions
        self.column = source.split_column
        if source.split is not None:
            self.fixed = source.split
        if self.fixed is None and self.column is None and self.fractions is None:
            # a column named split is believed: training on what a file marks as test must not happen by oversight
            if any("split" in values for _, values in part.rows):
                self.column = "split"
            elif fractions is not None:
                self.fractions = list(fractions)
            else:
                self.fixed = "train"
        self.how = self._words(part)

    def _words(self, part: Part) -> str:
        if part.split is not None:
            by_file = (
                isinstance(self.source.path, dict) and not self.source.in_memory
            ) or "file" in self.source.options
            return "by file" if by_file else "its own splits"
        if self.fixed is not None:
            return f"all {self.fixed}"
        return f"by column {self.column!r}" if self.column else f"by fractions {self.fractions}"

    def split(self, row: Row) -> Split:
        if self.fixed is not None:
            return self.fixed
        if self.column is None:
            assert self.fractions is not None
            return split_by_fraction(row.key, self.fractions, self.seed)
        if not _has(row.values, self.column):
            raise ValueError(f"no column {self.column!r} to split by; the row has {list(row.values)}")
        value = value_at(row.values, self.column)
        split = as_split(value, self.source.split_names)
        if split is None:
            raise ValueError(
                f"{self.column} is {value!r}, which is none of train, validation and test: map it with split_names, "
                "or set split or fractions on the source"
            )
        return split


class _RowBuilder:
    """Builds rows of the project's schema; a row that cannot be used is a ``ValueError`` with the reason."""

    def __init__(self, index: int, source: Source) -> None:
        self.index, self.source = index, source
        self.template = PromptTemplate(source.prompt_template) if source.prompt_template else None
        self.pattern = re.compile(source.reference_pattern) if source.reference_pattern else None
        self.cuts = self.seen = 0
        self.known: set[str] = set()  # the mapped columns that the part at hand has in some row
        self.has_reference = False  # in some row of it
        self.told: Counter[str] = Counter()  # what is said about rows, in words for a count

    def look_at(self, part: Part) -> None:
        """See which columns a part has in any of its rows: what one row lacks is then empty in it, and no mistake."""
        columns = self.source.columns
        self.known = {path for path in columns.values() if any(_has(values, path) for _, values in part.rows)}
        reference = columns.get("reference", "reference")
        self.has_reference = any(
            _has(values, reference) and not _is_none(value_at(values, reference)) for _, values in part.rows
        )

    def build(self, part: Part, number: int, values: Values) -> Row:
        mapped = self._map(values)
        if taken := [name for name in RESERVED if name in mapped]:
            raise ValueError(
                f"the column name {taken[0]!r} is taken; map it: columns: {{their_{taken[0]}: {taken[0]}}}"
            )
        prompt, last = self._prompt(values, mapped)
        if last is not None and _is_none(mapped.get("reference")):
            mapped["reference"] = last
        mapped["prompt"] = prompt
        mapped["reference"] = self._reference(mapped, f"{part.label}:{number}")
        given = mapped.get("task")
        task = self.source.task or (None if _is_none(given) else given) or part.stem
        mapped["task"] = str(task)
        if mapped["task"] == ALL_TASKS:
            raise ValueError(
                f"the task is {ALL_TASKS!r}, which stands for every task in tables and logs: give the source a task of "
                "another name, or rename its file"
            )
        continues = isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
        return Row(mapped, part.label, number, self.index, self.source.prompt_form == "rendered", continues)

    def _map(self, values: Values) -> Values:
        columns = self.source.columns
        named: Values = {}
        for ours, theirs in columns.items():
            try:
                named[ours] = value_at(values, theirs)
            except KeyError:
                if ours == "prompt" or theirs not in self.known:
                    raise ValueError(f"no column {theirs!r} (for {ours}); the row has {list(values)}") from None
                named[ours] = None
                self.told[f"lack the column {theirs!r}: their {ours} is empty"] += 1
        rest = {name: value for name, value in values.items() if name not in columns.values()}
        if lost := [ours for ours in columns if ours in rest]:
            raise ValueError(
                f"{lost[0]!r} is mapped, but the row has its own {lost[0]!r}: map that one to another name"
            )
        return self._known_form({**named, **rest})

    def _known_form(self, mapped: Values) -> Values:
        """The row with a prompt out of the columns of a known form, if it has none: conversations, or Alpaca's."""
        if self.template is not None:
            return mapped
        if "prompt" in mapped:
            if self.source.columns.get("prompt") == "instruction" and str(mapped.get("input") or "").strip():
                self.told[
                    "have an input that is not in the prompt: leave out columns to read Alpaca's form, or set prompt_template"
                ] += 1
            return mapped
        for name in ("messages", "conversations", "conversation"):
            if is_chat(mapped.get(name)):
                self.told[f"have their prompt in the column {name}"] += 1
                return {**mapped, "prompt": mapped[name]}
        if isinstance(mapped.get("instruction"), str) and {"input", "output"} & mapped.keys():
            self.told["are in Alpaca's form: the prompt is instruction and input, the reference output"] += 1
            asked = [mapped["instruction"], mapped.get("input")]
            text = "\n\n".join(part for part in asked if isinstance(part, str) and part.strip())
            return {**mapped, "prompt": text, "reference": mapped.get("reference", mapped.get("output"))}
        return mapped

    def _prompt(self, values: Values, mapped: Values) -> tuple[Prompt, str | None]:
        """The prompt, and the assistant's last words if they are the reference."""
        prompt = mapped.get("prompt")
        last = None
        if self.template is None or self.source.cut_prompt_at:
            if "prompt" not in mapped:
                raise ValueError(
                    f"no column 'prompt'; the row has {list(mapped)}: map one with columns: {{prompt: ...}}"
                )
            if isinstance(prompt, str) and self.source.prompt_form != "rendered":
                prompt = self._unwritten(prompt)
            prompt, last = self._checked(prompt)
            prompt = self._cut(prompt)
            if self.template is None:
                return self._formed(prompt), last
        own = {} if prompt is None else {"prompt": prompt}
        return self._formed(self._checked(self.template.fill({**values, **mapped, **own}))[0]), last

    def _unwritten(self, text: str) -> Prompt:
        """The messages that a text writes out, as a CSV file holds them; any other text as it is."""
        messages = messages_in(text)
        if messages is not None:
            if reason := unsound({"prompt": messages}):
                raise ValueError(f"the prompt holds messages as text: {reason}")
            self.told["have chat messages written as text, which are read as messages"] += 1
            return messages
        if looks_like_chat(text):
            raise ValueError(
                f"the prompt {short(text)} looks like chat messages written as text, and is neither JSON nor Python: save it "
                "as JSON, or set prompt_form: rendered if it is to be read as it is"
            )
        return text

    def _formed(self, prompt: Prompt) -> Prompt:
        form = self.source.prompt_form
        if form == "rendered" and not isinstance(prompt, str):
            raise ValueError("the prompt is a list of messages, and prompt_form: rendered takes texts")
        return [{"role": "user", "content": prompt}] if form == "messages" and isinstance(prompt, str) else prompt

    def _cut(self, prompt: Prompt) -> Prompt:
        mark = self.source.cut_prompt_at
        if not mark:
            return prompt
        self.seen += 1
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        head, found, _ = text.partition(mark)
        self.cuts += bool(found)
        if not head.strip():
            raise ValueError(f"the prompt is empty once it is cut at {mark!r}")
        return head.strip() if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": head.strip()}]

    def check_cut(self) -> None:
        """Say so if ``cut_prompt_at`` is a text that hardly ever occurs: it is misspelt more often than it is rare."""
        if self.seen and not self.cuts:
            raise UserError(
                f"{self.source.label}: cut_prompt_at {self.source.cut_prompt_at!r} is in none of {self.seen} prompts."
            )
        if self.cuts < self.seen:
            rank_zero_warn(
                f"{self.source.label}: cut_prompt_at is missing from {self.seen - self.cuts} of {self.seen} prompts, "
                "which are kept whole."
            )

    def _reference(self, mapped: Values, where: str) -> str | list[str] | None:
        value = mapped.get("reference")
        value = value.tolist() if value is not None and hasattr(value, "tolist") else value
        if not isinstance(value, (list, tuple)):
            return self._reference_text(value, where)
        texts = [text for item in value if (text := self._reference_text(item, where)) is not None]
        return texts if len(texts) > 1 else texts[0] if texts else None

    def _reference_text(self, value: Any, where: str) -> str | None:
        if _is_none(value):
            text = None
        elif isinstance(value, str):
            text = value
        elif isinstance(value, (bool, int, float)):
            text = str(value)
        else:
            kind = type(value).__name__
            raise ValueError(
                f"reference is a {kind}, expected text or a list of texts: give that column another name for your reward"
            )
        if self.pattern is None or (text is None and self.has_reference):
            return text
        match = search_within(self.pattern, text or "", f"{where}: reference_pattern")
        if match is None or match.group(1) is None:
            raise ValueError(f"reference_pattern {self.pattern.pattern!r} does not match the reference {short(text)}")
        return match.group(1).strip()

    def _checked(self, prompt: Any) -> tuple[Prompt, str | None]:
        """A string with text in it, or messages whose last one is to be answered, or to be gone on with."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError("the prompt is empty")
            return prompt, None
        if not isinstance(prompt, list):
            kind = "empty" if prompt is None else f"of the type {type(prompt).__name__}"
            raise ValueError(f"the prompt is {kind}; expected text or a list of chat messages")
        if not prompt:
            raise ValueError("the prompt is empty: a list without messages")
        messages = [plain_message(message, place) for place, message in enumerate(prompt, start=1)]
        last, asked = None, self.source.last_assistant
        if messages[-1]["role"] == "assistant":
            if asked == "refuse":
                raise ValueError(
                    "the last message of the prompt is the assistant's; end with the user's (the answer is reference), or set "
                    "last_assistant: reference or continue"
                )
            if asked == "reference":
                last = messages.pop()["content"]
        if not messages or not messages[-1]["content"].strip():
            raise ValueError("the prompt is empty: its last message has no text")
        return messages, last


def _has(values: Values, path: str) -> bool:
    try:
        value_at(values, path)
    except KeyError:
        return False
    return True


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # NaN, which Parquet files have for "none"
