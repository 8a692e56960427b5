"""The tools' options: argparse, with sentences for errors."""

from __future__ import annotations

import argparse
from typing import NoReturn

from maestro_pl.errors import UserError


class ToolParser(argparse.ArgumentParser):
    """Raises a sentence where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        """Raise.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; `{self.prog} --help` lists the options.")
