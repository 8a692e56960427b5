"""Labels of a file of another program into ours: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from maestro_pl.errors import UserError
from maestro_pl.labelling.exchange import format_of, user_id
from maestro_pl.labelling.reading import EXPECTED, READERS, Label, NoLabel
from maestro_pl.labelling.store import Click, LabelStore, Verdict, check_rater

NAMED = 3  # labels, or people, that a sentence names


@dataclass(frozen=True)
class Imported:
    """What became of the labels of a file.

    Attributes:
        new: how many were kept.
        known: how many say what stands already.
        contradicting: those that say something else than an answer of the same person that stands, place and person each.
    """

    new: int
    known: int
    contradicting: list[str]


def imported(store: LabelStore, labels: Sequence[Label]) -> Imported:
    """Keep labels; of a person's answers to one question the one that is there stands.

    A person is known by the pseudonym, and by the id that an export made of it.
    """
    people = {user_id(rater): rater for rater in sorted(store.raters(), key=lambda rater: user_id(rater) != rater)}
    clicks = [
        replace(click, rater=people.setdefault(user_id(click.rater), click.rater))
        for click in (label.click for label in labels)
    ]
    new = store.click(*clicks)
    standing = {(click.question.key, click.rater): _said(click) for click in store.clicks()}
    contradicting = [
        f"{label.place} ({click.rater})"
        for label, click in zip(labels, clicks, strict=True)
        if standing.get((click.question.key, click.rater)) != _said(click)
    ]
    return Imported(new, len(clicks) - new - len(contradicting), contradicting)


def _said(click: Click) -> tuple[Verdict, frozenset[int]]:
    return click.verdict, frozenset(click.bests)


def labels_in(path: Path, form: str | None = None, rater: str | None = None) -> list[Label]:
    """The labels of a file.

    Args:
        path: of the file.
        form: its format; None: by its ending.
        rater: whose labels they are where the file does not say.

    Returns:
        At least one.

    Raises:
        UserError: the file cannot be read, holds no label, or one that cannot be used; or ``rater`` is somebody else than
            the people that the file names for each of them.
    """
    kind = format_of(path, form)
    if rater is not None:
        check_rater(rater)
    text = _text(path)
    try:
        labels = list(READERS[kind](text, rater))
    except NoLabel as error:
        raise UserError(f"{path}, {str(error).rstrip('.')}. Nothing was imported.") from error
    if not labels:
        raise UserError(
            f"{path} holds no label: expected {EXPECTED[kind]}, and at least one choice. Nothing was imported."
        )
    people = sorted({label.click.rater for label in labels})
    if rater is not None and all(label.own for label in labels) and people != [rater]:
        raise UserError(
            f"--rater {rater}: {path} says of each label whose it is ({_few(people)}); leave --rater out to import them as "
            "theirs, or take these names out of the file. Nothing was imported."
        )
    return labels


def _few(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def outcome(done: Imported, labels: Sequence[Label], rater: str | None) -> str:
    """What is said after an import, without the name of the file."""
    said = f"; {done.known} were known"
    if done.contradicting:
        said += (
            f"; {len(done.contradicting)} were left out, because the same person's answer that stands is another one, and "
            f"an import never replaces it: {_few(done.contradicting)}"
        )
    own = sum(label.own for label in labels)
    if rater is not None and 0 < own < len(labels):
        said += f"; --rater {rater} counts for {len(labels) - own} of them, the file names the person of the others"
    return said


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        return raw.decode("utf-8-sig")  # a line's end inside an answer is one of its letters, and stays
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}, line {line}: the byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 (in a spreadsheet: "
            "'CSV UTF-8'). Nothing was imported."
        ) from error
