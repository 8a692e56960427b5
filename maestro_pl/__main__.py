"""``python -m maestro_pl`` is ``maestro-pl``."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def working_folder_last() -> None:
    """Look for modules in the working folder after all other places, where ``python -m`` looks in it first.

    A project's own ``callbacks.py`` would otherwise stand in the way of the package's.
    """
    here = os.getcwd()
    if sys.path and sys.path[0] in ("", here) and here != str(Path(__file__).resolve().parents[1]):
        sys.path.append(sys.path.pop(0))


if __name__ == "__main__":
    working_folder_last()
    from maestro_pl.cli import main

    main()
