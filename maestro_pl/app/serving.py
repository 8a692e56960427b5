"""Start a server: for a command until Ctrl-C, or beside the program that asks (tests, notebooks)."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from maestro_pl.app.safety import is_loopback
from maestro_pl.errors import UserError, escaped

HOST, PORT = "127.0.0.1", 8642
TRIED = 20  # ports after the default, before the command gives up


def token_for(host: str) -> str | None:
    """The token that a server on ``host`` needs: None where only this machine can reach it."""
    return None if is_loopback(host) else secrets.token_urlsafe(24)


def link(host: str, port: int, token: str | None, path: str = "/") -> str:
    """The address to open."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    bracketed = f"[{name}]" if ":" in name and not name.startswith("[") else name
    joined = "&" if "?" in path else "?"
    return f"http://{bracketed}:{port}{path}" + (f"{joined}token={token}" if token else "")


def bound(host: str, port: int | None) -> socket.socket:
    """A socket on the port, or without one on the first free port from 8642 on.

    Raises:
        UserError: the host or the port cannot be bound.
    """
    if port is not None and not 0 <= port < 65536:
        raise UserError(f"--port {port}: expected a number from 0 (any free one) to 65535.")
    ports = [port] if port is not None else [*range(PORT, PORT + TRIED), 0]
    for each in ports:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host.strip("[]"), each))
        except (OSError, TypeError, ValueError) as error:  # the latter two for what is no name of a host
            listening.close()
            if each == ports[-1]:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"--host {escaped(host)} --port {each}: {reason}; choose another.") from error
        else:
            return listening
    raise AssertionError("unreachable")


def serve(
    make: Callable[[str | None], FastAPI],
    host: str = HOST,
    port: int | None = None,
    links: Sequence[tuple[str, str]] = (("Open ", "/"),),
    token: str | None = None,
) -> None:
    """Serve until Ctrl-C, and print the links.

    Args:
        make: the application for a token, which is None where the host is this machine alone.
        host: what is bound; anything but this machine needs the token in the printed links.
        port: None: the first free one from 8642 on.
        links: what is printed before each, and its path.
        token: where one is needed, this one, so that links outlive the server; None: a new one.

    Raises:
        UserError: the host or the port cannot be bound.
    """
    new = token_for(host)
    needed = None if new is None else token or new
    app = make(needed)
    with bound(host, port) as listening:
        number = listening.getsockname()[1]
        for before, path in links:
            print(f"{before}{link(host, number, needed, path)}")
        print("Ctrl-C ends it.", flush=True)
        if needed is None:
            print(f"From another machine, first: ssh -L {number}:127.0.0.1:{number} THIS_MACHINE", flush=True)
        with suppress(KeyboardInterrupt):  # the usual way to end it
            _server(app).run(sockets=[listening])


@contextmanager
def running(app: FastAPI, host: str = HOST, port: int = 0) -> Iterator[str]:
    """The server in a thread of this process while the block lasts; yields its address, without a slash at the end."""
    stop, address = start(app, host, port)
    try:
        yield address
    finally:
        stop()


def start(app: FastAPI, host: str = HOST, port: int = 0) -> tuple[Callable[[], None], str]:
    """Start a server in a daemon thread: what stops it, and its address without a slash at the end."""
    listening = bound(host, port)
    server = _server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)

    def stop() -> None:
        server.should_exit = True
        thread.join(timeout=5)
        listening.close()

    return stop, link(host, listening.getsockname()[1], None, "")


def _server(app: FastAPI) -> uvicorn.Server:
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        server_header=False,
        ws="none",
    )
    return uvicorn.Server(settings)
