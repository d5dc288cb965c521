"""One worker in the driver's own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpsearch.working import Done, Order, Worker


class Inline:
    """Does the tasks where the study is driven, one after the other."""

    inside = True
    workers = 1

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def begin(self, order: Order, here: Callable[[], Worker], lost: Callable[[str, str], Sequence[str]]) -> None:
        """Set up the worker."""
        self._worker = here()

    def turn(self) -> Sequence[Done]:
        """Do one task."""
        done = self._worker.step() if self._worker else None
        return () if done is None else (done,)

    def rest(self) -> None:
        """Give back what was claimed ahead."""
        if self._worker:
            self._worker.rest()

    def end(self, now: bool = False) -> None:
        """Give back what was claimed."""
        if self._worker:
            self._worker.stop()


class Nobody:
    """Starts no worker: those that have joined the database do the tasks (``mpsearch worker``)."""

    inside = False
    workers = 0

    def begin(self, order: Order, here: Callable[[], Worker], lost: Callable[[str, str], Sequence[str]]) -> None:
        """Nothing is started."""

    def turn(self) -> Sequence[Done]:
        """Nothing is done here."""
        return ()

    def rest(self) -> None:
        """Nothing rests."""

    def end(self, now: bool = False) -> None:
        """Nothing ends."""
