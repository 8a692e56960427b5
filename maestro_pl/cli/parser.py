"""The tools' options: argparse, with sentences for errors."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from maestro_pl.errors import UserError


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
