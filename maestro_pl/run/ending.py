"""How the ranks of a run end: together, saved, and none of them left behind.

Lightning's handler of SIGTERM waits inside the handler for all ranks, in the middle of whatever they exchange, and a rank
that is told alone leaves its loop alone: most runs of several ranks hang. Here a signal is noted, the ranks agree after
each training batch whether one of them was told, and then all leave the loop at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

from maestro_pl.run.ranks import count_of

PATIENCE_S = 30.0  # what a rank may take to save and end once others have ended
GRACE_S = 5.0  # what ranks that rank 0 started may take to say why they ended, before they are told to
ASKED_S = 15.0  # and to end after that: more than a call of others has (`others.GRACE_S`)
PARENT = "MAESTRO_STARTED_BY"  # the process that starts ranks of its own, in their environment


class Ending:
    """What a rank knows about the end of its run.

    Args:
        trainer: of the run, of several ranks.

    Attributes:
        asked: SIGTERM came to this rank, or all agreed that it came to one.
        lost: another rank, or the process that started this one, has ended.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.asked = self.lost = False
        self._forwarded = False
        started_here = os.environ.get(PARENT) == str(os.getppid()) or "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid() if started_here else None
        trainer._signal_connector._sigterm_notifier_fn = self._note
        for thread in threading.enumerate():
            if isinstance(thread, _ChildProcessObserver):
                thread._terminate_all = self._after(thread._terminate_all)  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread() and (ear := _ear()) is not None:
            threading.Thread(target=self._listen, args=[ear], name="sigterm", daemon=True).start()
        if self._parent is not None:
            threading.Thread(target=self._watch_parent, name="parent", daemon=True).start()

    def _note(self, number: int, frame: Any) -> None:
        """Lightning's place for what happens at SIGTERM."""
        self.asked = True
        self._tell_children()
        if self.trainer.state.fn != "fit":  # nothing to save, and no batch after which all could agree
            self.trainer._signal_connector.received_sigterm = True

    def _listen(self, ear: socket.socket) -> None:
        """Hear SIGTERM in a thread: a rank that waits for another runs no handler, and the other may wait for the word."""
        while data := ear.recv(64):
            if signal.SIGTERM in data:
                self.asked = True
                self._tell_children()

    def _tell_children(self) -> None:
        if not self._forwarded:
            self._forwarded = True
            for child in _children(self.trainer):
                child.send_signal(signal.SIGTERM)

    def _after(self, kill: Callable[[], None]) -> Callable[[], None]:
        """Where a rank that this one started has failed, end this one and the others only if they do not end themselves."""

        def patiently() -> None:
            self.lost = True
            time.sleep(PATIENCE_S)  # in a thread that ends with the process
            _say(
                f"another of the {self.trainer.world_size} ranks has ended, and this one does not answer: all are killed."
            )
            kill()

        return patiently

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(1.0)
        self.lost = True
        time.sleep(PATIENCE_S)
        _say(f"the process that started rank {self.trainer.global_rank} has ended, and so does the rank.")
        os._exit(1)


def end_together(trainer: Any) -> None:
    """Let the ranks of a run end together; call it on every rank before the first batch. Nothing for one rank."""
    if count_of() > 1 and not hasattr(trainer, "_ending"):
        trainer._ending = Ending(trainer)


def starts_ranks(trainer: Any) -> None:
    """Let the ranks that this process will start know it; call it before they are."""
    if trainer.world_size > 1 and "LOCAL_RANK" not in os.environ:
        os.environ[PARENT] = str(os.getpid())


def asked_to_end(trainer: Any) -> bool:
    """Whether SIGTERM came to this run, as far as this rank knows."""
    ending = getattr(trainer, "_ending", None)
    return bool(trainer.received_sigterm) or (ending is not None and ending.asked)


def must_end(trainer: Any) -> bool:
    """Whether this rank shall come to an end: by SIGTERM, or because another has ended."""
    ending = getattr(trainer, "_ending", None)
    return asked_to_end(trainer) or (ending is not None and ending.lost)


def agree_to_end(trainer: Any) -> None:
    """Where SIGTERM came to any rank, let all of them leave their loop here. Collective."""
    if (ending := getattr(trainer, "_ending", None)) is None:
        return
    told = torch.tensor([int(ending.asked)], device=trainer.strategy.root_device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    if told.item():
        ending.asked = trainer._signal_connector.received_sigterm = True


def end_children(trainer: Any) -> None:
    """Wait for the ranks that this process started; whichever does not end is told to, and then killed."""
    for seconds, number in ((GRACE_S, signal.SIGTERM), (ASKED_S, getattr(signal, "SIGKILL", signal.SIGTERM))):
        end = time.monotonic() + seconds
        while any(child.poll() is None for child in _children(trainer)):
            if time.monotonic() > end:
                for child in _children(trainer):
                    child.send_signal(number)
                break
            time.sleep(0.05)


def _children(trainer: Any) -> list[Any]:
    """The processes of the ranks that this one started."""
    return list(getattr(trainer.strategy.launcher, "procs", None) or [])


def _ear() -> socket.socket | None:
    """A socket that gets the number of every signal at once, or None where somebody else has it."""
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        return None
    mouth.detach()  # it stays open as long as the process
    return ear


def _say(sentence: str) -> None:
    with suppress(OSError):
        print(f"error: {sentence}", file=sys.stderr, flush=True)
