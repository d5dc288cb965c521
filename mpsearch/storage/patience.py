"""Waiting for a server that is away: one thread knocks at its door, the others wait for what it finds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpsearch.errors import MpsearchError, StorageError
from mpsearch.storage.failures import AwayError, locked
from mpsearch.storage.place import Place

#: Seconds between two looks at whether somebody who waits is to stop.
_ASK = 0.2
#: Seconds that those wait who are told not to.
HURRY = 2.0


@dataclass(frozen=True)
class Terms:
    """How long calls wait for a server that is away.

    Attributes:
        seconds: from the moment it was first found away; 0 for one look at it and no more; None for those that any call
            waits.
        told: called once with a line for people when waiting begins, and once when it is back.
        stop: asked while waiting; True ends it at once.
    """

    seconds: float | None = None
    told: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False


class Patience:
    """What the threads of one open database know of its server, and the one place at its connection.

    Args:
        place: the database.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self.terms = Terms()
        #: When a call found it away; None while it answers.
        self.since: float | None = None
        self._why = ""
        self._said = False
        self._back = -float("inf")
        self.forked()

    def forked(self) -> None:
        """Forget the threads of the parent process, which are not in this one."""
        self._changed = threading.Condition()
        self._holder: object = None
        self.connecting = False

    @contextmanager
    def turn(self, limit: float) -> Iterator[None]:
        """Have the connection while the body runs.

        Args:
            limit: seconds to wait for it, while the server answers.

        Raises:
            StorageError: others have it for longer (E601), the server is away (E609).
        """
        # Not the thread: a body may end in another one than it began in.
        holder = object()
        try:
            self._take(holder, limit)
            yield
        except MpsearchError as error:
            if error.code == "E609":
                self.refused(error.because)
            else:
                # An answer, though not the one that was hoped for.
                self.answered()
            raise
        else:
            self.answered()
        finally:
            with self._changed:
                # A signal may have come as soon as it was taken.
                if self._holder is holder:
                    self._holder = None
                    self._changed.notify()

    def _take(self, holder: object, limit: float) -> None:
        begun = time.monotonic()
        while True:
            with self._changed:
                if self._holder is None:
                    self._holder = holder
                    return
                self._changed.wait(_ASK)
                taken = self._holder is not None
            waited, since, terms = time.monotonic() - begun, self.since, self.terms
            away = since is not None or self.connecting
            if taken and away and (terms.stop() or waited > min(limit, self._most(since, limit))):
                raise self._away()
            if taken and not away and waited > limit:
                raise locked(self._place, waited)

    def _most(self, since: float | None, limit: float) -> float:
        """Seconds that a call waits for one that knocks."""
        seconds = self.terms.seconds
        if seconds is None:
            return limit
        return min(HURRY, limit) if not seconds or (since is not None and time.monotonic() - since > seconds) else limit

    def _away(self) -> AwayError:
        return AwayError(
            "E609",
            f"{self._place.shown} does not answer any more",
            because=self._why,
            advice="nothing that was stored is lost; see that the server runs, and run the same command again",
        )

    @property
    def hurried(self) -> bool:
        """Whether a call is to look once, and not to wait."""
        return self.terms.seconds == 0.0 or self.terms.stop()

    def pause(self, seconds: float) -> bool:
        """Wait between two knocks; False when there is to be no other."""
        until = time.monotonic() + seconds
        with self._changed:
            while not self.hurried and (left := until - time.monotonic()) > 0:
                self._changed.wait(min(left, _ASK))
        return not self.hurried

    def refused(self, why: str) -> None:
        """Note that the server was not there, and why."""
        with self._changed:
            self._why = why
            if self.since is None:
                self.since = time.monotonic()

    def answered(self) -> None:
        """Note that the server answers."""
        if self.since is None:
            return
        with self._changed:
            since, self.since = self.since, None
            said, self._said = self._said, False
            if since is not None:
                self._back = time.monotonic()
            told = self.terms.told
        if said and since is not None:
            told(f"the database is back after {time.monotonic() - since:.0f} s")

    def goes_on(self, error: StorageError) -> bool:
        """Whether a call that met this error is to be made anew."""
        terms = self.terms
        if not terms.seconds or terms.stop():
            return False
        with self._changed:
            since = self.since
            says = since is not None and not self._said
            self._said = self._said or says
        if says:
            terms.told(f"{error.code} {error.message}; waiting for up to {terms.seconds:.0f} s")
        # Another thread has found it back since.
        return since is None or time.monotonic() - since < terms.seconds

    def settled(self, seconds: float) -> bool:
        """Whether the server answers, and has for so long."""
        return self.since is None and time.monotonic() - self._back >= seconds

    def change(self, terms: Terms) -> Callable[[], None]:
        """Wait on other terms from now on, those too who wait already; returns what puts the former ones back."""
        with self._changed:
            former, self.terms = self.terms, terms
            self._changed.notify_all()

        def put_back() -> None:
            with self._changed:
                self.terms = former
                self._changed.notify_all()

        return put_back
