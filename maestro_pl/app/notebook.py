"""A page as a frame in a notebook."""

from __future__ import annotations

import html
from typing import Any

from fastapi import FastAPI

from maestro_pl.app.serving import start


class Frame:
    """What a notebook shows: the page of a server that lives as long as this program.

    Args:
        app: of the page.
        path: of the page.
        height: of the frame, in pixels.
        port: of the server; 0: any free one.

    Attributes:
        address: of the page, to be opened in a tab of its own.
        stop: ends the server.

    Raises:
        UserError: the port cannot be bound.
    """

    def __init__(self, app: FastAPI, path: str = "/", height: int = 720, port: int = 0) -> None:
        self.stop, base = start(app, port=port)
        self.address, self.height = base + path, height

    def _repr_html_(self) -> str:
        address = html.escape(self.address, quote=True)
        return (
            f'<iframe src="{address}" width="100%" height="{int(self.height)}" style="border:1px solid #888"></iframe>'
        )


def show(*runs: Any, height: int = 720, port: int = 0) -> Frame:
    """The page of ``maestro-pl view`` for these runs, in a notebook on this machine (or through its forwarded port).

    Args:
        runs: folders of runs.
        height: of the frame, in pixels.
        port: of the server, to be forwarded where the notebook runs on another machine (``ssh -L``); 0: any free one.

    Raises:
        UserError: a folder holds no run.
    """
    from maestro_pl.app.view import view_app

    return Frame(view_app([str(run) for run in runs]), height=height, port=port)


def label(*arguments: Any, height: int = 900, port: int = 0) -> Frame:
    """The page of ``maestro-pl label``, in a notebook on this machine (or through its forwarded port).

    Args:
        arguments: those of the command: ``"--config", "mine.yaml", "--questions", 20``, or ``RUN, "--live"``.
        height: of the frame, in pixels.
        port: of the server, to be forwarded where the notebook runs on another machine (``ssh -L``); 0: any free one.

    Raises:
        UserError: as for the command.
    """
    from maestro_pl.app.label import label_app
    from maestro_pl.cli.label import asking_of

    asking, _, _ = asking_of([str(argument) for argument in arguments])
    return Frame(label_app(asking), height=height, port=port)
