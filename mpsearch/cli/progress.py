"""One line of progress on a terminal, one line per ten seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpsearch.studying import Study


class Progress:
    """Reports phases as they go; use it as a study's ``report``."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._phase = ""
        self._start = 0.0
        self._first = 0
        self._shown = 0.0
        self._open = False

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of a phase are done."""
        now = time.monotonic()
        if phase != self._phase:
            self.end()
            self._phase, self._start, self._first, self._shown = phase, now, done, now
        if self._quiet or not total:
            return
        last = done >= total
        if not last and now - self._shown < (0.2 if self._terminal else 10.0):
            return
        self._shown = now
        self._write(self._line(done, total, now - self._start))
        if last:
            self.end()

    @contextmanager
    def around(self, study: Study, again: str) -> Iterator[None]:
        """Run the body; Ctrl-C ends the process at once, and says how to go on.

        Args:
            study: what the body works on.
            again: the command that goes on with it, once its name is stored.
        """
        try:
            yield
        except KeyboardInterrupt:
            self.end()
            noted = any(row.name == study.name for row in study.store.studies())
            sys.stderr.write(f"paused; go on with: {again if noted else 'the same command'}\n")
            sys.stderr.flush()
            study.store.close()
            # Python would wait for the threads of a pool that was ended in the middle, and that can take for ever.
            os._exit(130)
        finally:
            self.end()

    def _line(self, done: int, total: int, seconds: float) -> str:
        new = done - self._first
        text = f"{self._phase:<8} {done}/{total}  {100 * done // total:3d} %"
        if new <= 0:
            return text + ("  (known)" if done >= total else "")
        if done < total:
            return text + f"  left {(total - done) * seconds / new:.0f} s"
        return text + f"  {seconds:.1f} s"

    def _write(self, line: str) -> None:
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{line}")
            self._open = True
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._open:
            sys.stderr.write("\n")
            self._open = False
