"""Names of machines that a reader without rights must not see."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

from mpsearch.errors import MpsearchError

#: Seconds that the list is good for.
_FRESH = 10.0


class Machines:
    """This machine, and those that work on studies or have submitted them.

    Attributes:
        names: as they were when they were looked up last.
    """

    def __init__(self, store: Any) -> None:
        """Set up; the database is asked on first use."""
        self._store = store
        self._own = (socket.gethostname(), socket.getfqdn())
        self._until = 0.0
        self.names: tuple[str, ...] = self._own

    async def fresh(self) -> tuple[str, ...]:
        """Return the names, looked up again now and then."""
        if time.monotonic() >= self._until:
            await asyncio.to_thread(self.look)
        return self.names

    def look(self) -> None:
        """Ask the database; where it does not answer, the names stay as they were."""
        try:
            control = self._store.control
            found = {worker.host for worker in control.workers()} | {status.home for status in control.statuses()}
        except MpsearchError:
            return
        # Short or common words would tear holes into every text.
        self.names = tuple({*self._own, *(name for name in found if len(name) > 2)} - {"localhost"})
        self._until = time.monotonic() + _FRESH
