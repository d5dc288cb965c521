"""One line of progress on a terminal; elsewhere a line now and then."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpsearch.logs import plain
from mpsearch.pace import Detail, Pace, span

if TYPE_CHECKING:
    from mpsearch.studying import Study

#: Seconds between two lines: on a terminal, where each writes over the one before, and elsewhere.
_EVERY, _EVERY_LINE = 0.2, 10.0
#: Elsewhere a line also waits until this share of the phase is done, so that a long study stays short to read; but it
#: waits no longer than these seconds, so that nobody takes it for dead.
_STEP, _LONGEST = 0.03, 600.0
_COLUMNS = 120


class Progress:
    """Reports phases as they go; use it as a study's ``report``.

    A line has the form ``measure 412/1000  41%  2 workers  3.1/s  left 3m10s  retried 2  gaps 3  LAYER FORMAT``; what
    is not known, or none, is left out.
    """

    def __init__(self, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Set up.

        Args:
            quiet: write nothing.
            clock: gives seconds.
        """
        self._quiet = quiet
        self._clock = clock
        self._terminal = sys.stderr.isatty()
        self._phase = ""
        self._start = 0.0
        self._first = 0
        self._pace = Pace()
        self._shown = (0.0, 0)
        self._open = False

    def __call__(self, phase: str, done: int, total: int, detail: Detail | None = None) -> None:
        """Report that ``done`` of ``total`` steps of a phase are done.

        Args:
            phase: what is done, in a word.
            done: steps done, those that were known before included.
            total: steps in all.
            detail: workers, retries and gaps, and what is being done.
        """
        now = self._clock()
        if phase != self._phase:
            self.end()
            self._phase, self._start, self._first, self._shown = phase, now, done, (now, done)
            self._pace = Pace()
        # A weighted share tells more than a count of steps, some of which are small.
        share = total * detail.share if detail is not None and detail.share is not None else done
        self._pace.at(now, share)
        if self._quiet or not total or not self._due(now, done, total):
            return
        self._shown = (now, done)
        self._write(self._line(now, done, total, share, detail or Detail()))
        if done >= total:
            self.end()

    def _due(self, now: float, done: int, total: int) -> bool:
        then, before = self._shown
        if done >= total:
            # What is done stays done, however often that is said.
            return before < total or self._first >= total
        if self._terminal:
            return now - then >= _EVERY
        return now - then >= _EVERY_LINE and (done - before >= _STEP * total or now - then >= _LONGEST)

    @contextmanager
    def around(self, study: Study, again: str) -> Iterator[None]:
        """Run the body; Ctrl-C ends the process at once, and says how to go on.

        Args:
            study: what the body works on.
            again: the command that goes on with it, once its name is stored.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            self.end()
            stopped = "cancelled" if getattr(stop, "wanted", "") == "cancel" else "paused"
            noted = study.store.away or any(row.name == study.name for row in study.store.studies())
            sys.stderr.write(f"{stopped}; go on with: {again if noted else 'the same command'}\n")
            sys.stderr.flush()
            study.store.close()
            # Python would wait for the threads of a pool that was ended in the middle, and that can take for ever.
            os._exit(130)
        finally:
            self.end()

    def _line(self, now: float, done: int, total: int, share: float, detail: Detail) -> str:
        parts = [f"{self._phase:<7} {done}/{total}", f"{100 * done // total}%"]
        if done >= total:
            parts.append("known" if self._first >= total else span(now - self._start) or "0s")
        else:
            parts += detail.workers_text
            # Of steps, whatever the time left is judged by.
            if done - self._first >= 3 and now > self._start:
                parts.append(f"{_figures((done - self._first) / (now - self._start))}/s")
            if left := span(self._pace.left(now, total)):
                parts.append(f"left {left}")
        parts += detail.troubles
        if done < total and detail.doing:
            parts.append(plain(detail.doing))
        return "  ".join(parts)

    def _write(self, line: str) -> None:
        if self._terminal:
            # A line that is broken in two could not be written over.
            sys.stderr.write(f"\r\x1b[K{line[: shutil.get_terminal_size((_COLUMNS, 24)).columns - 1]}")
            self._open = True
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._open:
            sys.stderr.write("\n")
            self._open = False


def _figures(rate: float) -> str:
    """A rate with two figures, never as a power of ten.

    >>> _figures(3.14159), _figures(0.0123), _figures(120.4)
    ('3.1', '0.012', '120')
    """
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
