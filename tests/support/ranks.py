"""Ranks as real processes, forked from one process that has the imports behind it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import maestro_pl


def start(target: Callable[..., Any], *arguments: Any, output: Path, **environment: str) -> BaseProcess:
    """Call a function of a module in a process of its own, which writes what it says into a file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.ranks", "tests.ranks.worker", "maestro_pl.cli.run"])
    process = context.Process(target=_child, args=(target, arguments, output, environment))
    process.start()
    return process


def start_ranks(target: Callable[..., Any], *arguments: Any, output: Path) -> list[BaseProcess]:
    """Two ranks on this machine, started from outside as Slurm or Kubernetes do; rank R writes into ``output.R``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    return [
        start(target, *arguments, output=Path(f"{output}.{rank}"), LOCAL_RANK=str(rank), RANK=str(rank), **here)
        for rank in range(2)
    ]


def fit(folder: Path, config: Path) -> None:
    """``python -m maestro_pl fit`` in a folder; where ranks are not started from outside, Lightning starts them."""
    from maestro_pl.cli import main

    os.chdir(folder)
    arguments = ["fit", "--config", str(config)]
    sys.argv = [str(Path(maestro_pl.__file__).with_name("__main__.py")), *arguments]
    main(arguments)


def wait_for(what: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until something is so; the limit is for what never comes."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def ended(processes: list[BaseProcess], seconds: float = 300.0) -> list[int | None]:
    """The statuses of processes once all have ended; whoever has not is killed and has none."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


def _child(target: Callable[..., Any], arguments: tuple[Any, ...], output: Path, environment: dict[str, str]) -> None:
    with open(output, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    target(*arguments)
