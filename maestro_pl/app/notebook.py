"""A page as a frame in a notebook."""

from __future__ import annotations

import html
from typing import Any

from fastapi import FastAPI

from maestro_pl.app.serving import start


class Frame:
    """What a notebook shows: the page of a server that lives as long as this program.

    Attributes:
        address: of the page, to be opened in a tab of its own.
    """

    def __init__(self, app: FastAPI, path: str = "/", height: int = 720) -> None:
        self.stop, base = start(app)
        self.address, self.height = base + path, height

    def _repr_html_(self) -> str:
        address = html.escape(self.address, quote=True)
        return (
            f'<iframe src="{address}" width="100%" height="{int(self.height)}" style="border:1px solid #888"></iframe>'
        )


def show(*runs: Any, height: int = 720) -> Frame:
    """The page of ``maestro-pl view`` for these runs, in a notebook on this machine (or through its forwarded port).

    Args:
        runs: folders of runs.
        height: of the frame, in pixels.

    Raises:
        UserError: a folder holds no run.
    """
    from maestro_pl.app.view import view_app

    return Frame(view_app([str(run) for run in runs]), height=height)
