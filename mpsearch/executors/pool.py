"""Workers in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from mpsearch.errors import MpsearchError, ResourceError
from mpsearch.machine import process_name

if TYPE_CHECKING:
    from mpsearch.working import Done, Order, Worker

#: Workers may die this often in a row without having claimed anything.
_PATIENCE = 3
#: Seconds after its start until which a worker that dies without a task has not done anything.
_YOUNG = 60.0
#: Seconds that a worker may take to leave when it has nothing to do.
_FAREWELL = 5.0


class Pool:
    """Keeps a number of worker processes alive; each loads what it needs once, and ends when the driver ends.

    Attributes:
        workers: how many.
    """

    inside = False

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self._running: dict[str, BaseProcess] = {}
        self._order: Order | None = None
        self._lost: Callable[[str, str], Sequence[str]] = lambda name, reason: ()
        self._early = 0
        self._since: dict[str, float] = {}

    def begin(self, order: Order, here: Callable[[], Worker], lost: Callable[[str, str], Sequence[str]]) -> None:
        """Start the workers."""
        self._order, self._lost = order, lost
        self.turn()

    def turn(self) -> Sequence[Done]:
        """Start workers for those that died.

        Raises:
            ResourceError: they die before they do anything (E522).
        """
        for name, process in list(self._running.items()):
            if process.exitcode is not None:
                del self._running[name]
                young = time.monotonic() - self._since.pop(name) < _YOUNG
                tasks = self._lost(name, _ending(process.exitcode))
                self._count(young and not tasks, process.exitcode)
        while len(self._running) < self.workers:
            process = multiprocessing.get_context("spawn").Process(target=_work, args=(self._order,), daemon=True)
            with _deaf():
                process.start()
            name = process_name(process.pid)
            self._running[name], self._since[name] = process, time.monotonic()
        return ()

    def _count(self, early: bool, code: int) -> None:
        self._early = self._early + 1 if early else 0
        if self._early >= _PATIENCE:
            raise ResourceError(
                "E522",
                f"workers die before they do anything ({_ending(code)})",
                because="most likely memory is short" if code < 0 else "why is printed above",
                advice="what was finished is saved; run again with fewer workers: --workers 1",
            )

    def rest(self) -> None:
        """Workers wait for tasks."""

    def end(self, now: bool = False) -> None:
        """End the workers."""
        for process in self._running.values():
            (process.kill if now else process.terminate)()
        until = time.monotonic() + _FAREWELL
        for name, process in self._running.items():
            process.join(max(0.0, until - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
            self._lost(name, "")
        self._running = {}


@contextmanager
def _deaf() -> Iterator[None]:
    """Start processes that do not hear Ctrl-C from their first moment on; this one hears it when the block ends.

    While it loads, a worker could not answer but with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Its first start, which the first process would cause, opens the door to Ctrl-C again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def _work(order: Order) -> None:
    from mpsearch.working import serve

    # The driver answers Ctrl-C; a worker that did too would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve(order, told.is_set)
    except MpsearchError as error:
        # The database cannot be opened, say: nobody needs to see where in the code.
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    """Leave when the driver is gone: its study must not go on without it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
