"""The tools' options: argparse, with sentences for errors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from maestro_pl.errors import UserError
from maestro_pl.run.paths import file_in_the_way


def folder_to_write(text: str) -> str:
    """The type of an option that names a folder, which is made where there is none.

    Raises:
        argparse.ArgumentTypeError: a file stands there, or in the place of a folder above it.
    """
    if (file := file_in_the_way(Path(text))) is not None:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a folder, because {str(file)!r} is a file: name another")
    return text


class ToolParser(argparse.ArgumentParser):
    """Takes whole names of options only, and raises a sentence where argparse would print and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; `{self.prog} --help` lists the options.")
