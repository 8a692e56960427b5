"""Who is shown what, on which side and when: drawn once, kept in ``study.json``, and never changed."""

from __future__ import annotations

import itertools
import json
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeAlias

from maestro_pl.errors import UserError
from maestro_pl.evaluation.records import write_whole
from maestro_pl.study.answers import System

FILE = "study.json"
VERSION = 1
PER_CHECK = 12  # questions to one attention check, where --checks does not say
FEWEST_CHECKS = 2
CHECK = "This sentence only checks that answers are read: please choose this answer, whatever you think of it."

Side: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True)
class Prompt:
    """A prompt with the answer of each of the S systems.

    Attributes:
        prompt: the text, or the chat messages.
        answers_S: texts.
        rewards_S: raw values by name.
    """

    task: str
    prompt: Any
    reference: Any
    answers_S: list[str]
    rewards_S: list[dict[str, float]]


@dataclass(frozen=True)
class Item:
    """What a rater sees at one place.

    Attributes:
        prompt: its number.
        left, right: numbers of the systems whose answers are shown there.
        check: the side that has to be chosen, in whose answer :data:`CHECK` stands; None: a question.
    """

    prompt: int
    left: int
    right: int
    check: Side | None = None

    @property
    def pair(self) -> tuple[int, int]:
        """The two systems, the lower number first."""
        return (min(self.left, self.right), max(self.left, self.right))


@dataclass(frozen=True)
class Rater:
    """A rater: a pseudonym, the secret in the link, and what is shown, in this order."""

    name: str
    token: str
    items: list[Item]


@dataclass(frozen=True)
class Study:
    """The plan of a study.

    Attributes:
        systems: names; ``sources`` where their answers were read.
        prompts: first those of questions, then those that only checks show.
        equal: (prompt, system, system) with the same answer: a tie that nobody is asked about.
        votes: raters a question.
        token: what a server for other machines asks for besides a rater's own.
    """

    systems: list[str]
    sources: list[str]
    prompts: list[Prompt]
    equal: list[tuple[int, int, int]]
    votes: int
    raters: list[Rater]
    seed: int
    created: str
    token: str

    @property
    def tasks(self) -> list[str]:
        """In the order of the prompts."""
        return list(dict.fromkeys(prompt.task for prompt in self.prompts))


def new_study(
    systems: Sequence[System], per_task: int, raters: int, votes: int | None, checks: int | None, seed: int
) -> Study:
    """Draw a study.

    Every pair of systems is a question for each drawn prompt. Of each pair and task a rater sees either system on the left
    equally often (up to one), and each question has it there for half of its raters. The questions are cut into blocks of
    like mixture, which raters see in the orders of a cyclic Latin square, each block shuffled for each rater.

    Args:
        systems: with answers to the same prompts.
        per_task: prompts of each task; all of a task that has fewer.
        raters: how many links.
        votes: raters a question; None: all.
        checks: attention checks a rater; None: one in twelve questions, at least two.
        seed: of the draws (the tokens in the links are not drawn from it).

    Raises:
        UserError: a number is out of range, or all answers are equal.
    """
    votes = raters if votes is None else votes
    if per_task < 1 or raters < 1 or not 1 <= votes <= raters or (checks is not None and checks < 0) or seed < 0:
        raise UserError(
            f"--per-task {per_task}, --raters {raters}, --votes {votes}, --checks {checks}, --seed {seed}: expected at least "
            "1, at least 1, between 1 and the raters, at least 0, and at least 0."
        )
    draw = random.Random(seed)
    chosen, spare = _draw_prompts(systems, per_task, draw)
    asked, equal = _questions(chosen, len(systems))
    if not asked:
        raise UserError(
            "All answers of the drawn prompts are equal, so there is nothing to ask: were the same runs given?"
        )
    order = _spread_out(chosen, asked, draw)
    seen = _who_sees_what(len(order), raters, votes, draw)
    sides = _sides(chosen, order, seen, draw)
    shown = []
    for rater, numbers in enumerate(seen):
        blocks = _blocks(numbers, len(order), raters)
        items = []
        for each in range(raters):
            block = blocks[(rater + each) % raters]
            draw.shuffle(block)
            items += [_item(order[number], sides[rater, number]) for number in block]
        shown.append(items)
    prompts = chosen + spare
    counts = [checks if checks is not None else max(FEWEST_CHECKS, len(items) // PER_CHECK) for items in shown]
    tests = _Tests(prompts, len(chosen), len(systems), draw)
    people = [
        Rater(f"R{number}", secrets.token_urlsafe(12), tests.among(items, count))
        for number, (items, count) in enumerate(zip(shown, counts, strict=True), 1)
    ]
    return Study(
        [system.name for system in systems],
        [system.source for system in systems],
        prompts,
        equal,
        votes,
        people,
        seed,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        secrets.token_urlsafe(18),
    )


def _draw_prompts(systems: Sequence[System], per_task: int, draw: random.Random) -> tuple[list[Prompt], list[Prompt]]:
    """Those that are asked about, and of each task a few more for checks."""
    by_task: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in sorted(systems[0].answers):
        by_task[key[0]].append(key)
    chosen: list[Prompt] = []
    spare: list[Prompt] = []
    for task, keys in by_task.items():
        draw.shuffle(keys)
        for place, key in enumerate(keys[: per_task + FEWEST_CHECKS]):
            answers = [system.answers[key] for system in systems]
            reference = next((a.reference for a in answers if a.reference is not None), None)
            texts, rewards = [a.response.strip() for a in answers], [dict(a.rewards) for a in answers]
            (chosen if place < per_task else spare).append(Prompt(task, answers[0].prompt, reference, texts, rewards))
    return chosen, spare


Question: TypeAlias = tuple[int, int, int]  # prompt, system, system


def _questions(prompts: Sequence[Prompt], systems: int) -> tuple[list[Question], list[Question]]:
    asked: list[Question] = []
    equal: list[Question] = []
    for number, prompt in enumerate(prompts):
        for one, other in itertools.combinations(range(systems), 2):
            same = prompt.answers_S[one] == prompt.answers_S[other]
            (equal if same else asked).append((number, one, other))
    return asked, equal


def _spread_out(prompts: Sequence[Prompt], asked: Sequence[Question], draw: random.Random) -> list[Question]:
    """Task by task, prompt by prompt: neighbours of this order go to different blocks (and to different raters)."""
    pairs: dict[int, list[Question]] = defaultdict(list)
    for question in asked:
        pairs[question[0]].append(question)
    order = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        numbers = [number for number in pairs if prompts[number].task == task]
        draw.shuffle(numbers)
        for number in numbers:
            draw.shuffle(pairs[number])
            order += pairs[number]
    return order


def _who_sees_what(questions: int, raters: int, votes: int, draw: random.Random) -> list[list[int]]:
    """For every rater the places of questions in their order; each goes to the ``votes`` raters who have the fewest so far."""
    seen: list[list[int]] = [[] for _ in range(raters)]
    for number in range(questions):
        for rater in sorted(range(raters), key=lambda each: (len(seen[each]), draw.random()))[:votes]:
            seen[rater].append(number)
    return seen


def _blocks(numbers: Sequence[int], questions: int, raters: int) -> list[list[int]]:
    """The rater's questions in as many blocks as there are raters; a question is in the same block for everybody.

    A block takes every ``raters``-th question of the order, and the next one in the next round, so that tasks and pairs
    are mixed alike in each.
    """
    blocks: list[list[int]] = [[] for _ in range(raters)]
    place = {number: (number + number // raters) % raters for number in range(questions)}
    for number in numbers:
        blocks[place[number]].append(number)
    return blocks


def _sides(
    prompts: Sequence[Prompt], order: Sequence[Question], seen: Sequence[Sequence[int]], draw: random.Random
) -> dict[tuple[int, int], bool]:
    """(rater, question) to whether the first system of the pair is on the left.

    Of each task and pair, a rater gets it there in half of the questions: those where fewer raters before had it there.
    """
    excess: Counter[int] = Counter()  # of a question: left minus right so far
    odd: Counter[tuple[str, int, int]] = Counter()  # of a task and pair: the same, over all raters
    sides: dict[tuple[int, int], bool] = {}
    for rater, numbers in enumerate(seen):
        groups: dict[tuple[str, int, int], list[int]] = defaultdict(list)
        for number in numbers:
            prompt, one, other = order[number]
            groups[prompts[prompt].task, one, other].append(number)
        for group, members in groups.items():
            members = sorted(members, key=lambda number: (excess[number], draw.random()))
            more = len(members) % 2 and (odd[group] < 0 or (odd[group] == 0 and draw.random() < 0.5))
            left = len(members) // 2 + int(more)
            for place, number in enumerate(members):
                sides[rater, number] = place < left
                excess[number] += 1 if place < left else -1
            odd[group] += 2 * left - len(members)
    return sides


def _item(question: Question, first_left: bool) -> Item:
    prompt, one, other = question
    return Item(prompt, one, other) if first_left else Item(prompt, other, one)


class _Tests:
    """Puts attention checks among a rater's questions."""

    def __init__(self, prompts: Sequence[Prompt], asked: int, systems: int, draw: random.Random) -> None:
        spare = list(range(asked, len(prompts)))
        draw.shuffle(spare)
        self._numbers = spare or list(range(asked))  # a prompt that no question shows, where there is one
        self._systems, self._draw = systems, draw

    def among(self, items: Sequence[Item], count: int) -> list[Item]:
        """The items with ``count`` checks at even distances, never first; either side is right equally often."""
        sides: list[Side] = ["left" if place % 2 else "right" for place in range(count)]
        self._draw.shuffle(sides)
        out = list(items)
        for place in reversed(range(count)):
            first, last = (round((place + part) * len(items) / count) for part in (0.25, 0.75))
            left, right = self._draw.sample(range(self._systems), 2)
            item = Item(self._numbers[place % len(self._numbers)], left, right, sides[place])
            out.insert(max(1, self._draw.randint(first, max(first, last))), item)
        return out


def shown_answers(study: Study, item: Item) -> tuple[str, str]:
    """The texts on the left and on the right; in a check, one has the sentence that asks for it in its middle."""
    answers = study.prompts[item.prompt].answers_S
    left, right = answers[item.left], answers[item.right]
    return (
        with_check(left) if item.check == "left" else left,
        with_check(right) if item.check == "right" else right,
    )


def with_check(text: str) -> str:
    """The text with :data:`CHECK` as a paragraph of its own, at the break that is nearest to its middle."""
    places = [i for i, letter in enumerate(text) if letter == "\n"] or [
        i for i, letter in enumerate(text) if letter == " "
    ]
    place = min(places, key=lambda i: abs(i - len(text) / 2), default=len(text))
    return f"{text[:place].rstrip()}\n\n{CHECK}\n\n{text[place:].lstrip()}".strip()


def write_study(study: Study, folder: Path) -> None:
    """Write ``study.json`` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, json.dumps({"version": VERSION, **asdict(study)}, indent=1, ensure_ascii=False) + "\n")


def read_study(folder: Path) -> Study:
    """Read what :func:`write_study` wrote.

    Raises:
        UserError: there is none, or it is of another form.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no study: `maestro-pl study new A B --out {folder}` makes one.")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read.pop("version") != VERSION:
            raise UserError(f"{path} is of another version of maestro-pl: make the study again.")
        raters = [
            Rater(**{**rater, "items": [Item(**item) for item in rater["items"]]}) for rater in read.pop("raters")
        ]
        prompts = [Prompt(**prompt) for prompt in read.pop("prompts")]
        equal = [(int(a), int(b), int(c)) for a, b, c in read.pop("equal")]
        study = Study(prompts=prompts, raters=raters, equal=equal, **read)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not what `maestro-pl study new` wrote ({error}).") from error
    return study
