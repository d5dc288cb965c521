"""Running work in this process or in a pool of processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from types import TracebackType
from typing import TypeVar

from mpsearch.errors import ResourceError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Local:
    """Runs work here: one worker in this process, more in processes of their own.

    Each process loads what it needs once. Workers end when this process ends, however it ends.

    Attributes:
        workers: number of workers.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) as results arrive.

        Raises:
            ResourceError: a worker died (E522).
        """
        if self.workers == 1:
            for i, item in enumerate(items):
                yield i, work(item)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
            )
        waiting = iter(enumerate(items))
        running: dict[Future[Result], int] = {}
        try:
            while True:
                # What is never handed over need not be cancelled, which a pool that is ended at once takes badly.
                for i, item in islice(waiting, 2 * self.workers - len(running)):
                    running[self._pool.submit(work, item)] = i
                if not running:
                    return
                for future in wait_for(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ResourceError(
                "E522",
                "a worker died, most likely for lack of memory",
                because="what was finished is saved",
                advice="run again with fewer workers: --workers 1",
            ) from error

    def close(self) -> None:
        """End the workers when they have done what they are doing."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def abort(self) -> None:
        """End the workers at once.

        Does not wait: a pool whose workers were ended while work was on its way to them can wait for ever.
        """
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self.abort()
        else:
            self.close()


def _start_worker() -> None:
    # The driver answers Ctrl-C; a worker that did too would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the driver is gone: a pool's worker would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
