"""How long work that is under way will still take, from when its steps ended."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Ends of steps that are kept; with more, every other one goes.
_KEPT = 512
#: What share of the steps so far counts as recent.
_RECENT = 0.5
#: How much of the estimate the recent steps make; the rest is of all of them.
_WEIGHT = 0.5


@dataclass(frozen=True)
class Detail:
    """What is worth knowing of work under way beside how far it is.

    Attributes:
        workers: processes that work on it now.
        retried: steps that had to be done again, for their worker died.
        gaps: steps that were given up.
        doing: what was begun last, such as a layer and a format.
        share: share of the whole work that is done, 0 to 1, where steps differ in size; None to go by their count.

    >>> Detail(2, retried=1, gaps=3).workers_text, Detail(2, retried=1, gaps=3).troubles
    (['2 workers'], ['retried 1', 'gaps 3'])
    """

    workers: int = 0
    retried: int = 0
    gaps: int = 0
    doing: str = ""
    share: float | None = None

    @property
    def workers_text(self) -> list[str]:
        return [f"{self.workers} worker{'' if self.workers == 1 else 's'}"] if self.workers else []

    @property
    def troubles(self) -> list[str]:
        return [f"{name} {count}" for name, count in (("retried", self.retried), ("gaps", self.gaps)) if count]


class Pace:
    """Estimates the time left from the time that each step took.

    Steps of a study take unlike times: layers differ in size, a worker may be started again, another program may take
    the processor. All steps so far say what is usual, the later half of them what holds now; the estimate is the mean
    of both. What comes before the first step ends is not counted, for workers load the model then.

    Work may be counted in steps or, better, in shares of a whole that is known, such as weights times formats.

    >>> pace = Pace()
    >>> for second in range(5):
    ...     pace.at(10.0 + 2 * second, done=second)
    >>> pace.rate, pace.left(18.0, total=10)
    (0.5, 12.0)
    """

    def __init__(self) -> None:
        self._ends: list[tuple[float, float]] = []
        self._stride = 1
        self._skipped = 0
        self._last = (0.0, 0.0)

    def at(self, now: float, done: float) -> None:
        """Note how much was done by a time.

        Args:
            now: seconds, of any clock that does not jump.
            done: steps, or other units of work, done so far.
        """
        if not self._ends:
            self._ends.append((now, done))
        elif done > self._last[1]:
            self._note(now, done)
        else:
            return
        self._last = (now, done)

    def _note(self, now: float, done: float) -> None:
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped = 0
        self._ends.append((now, done))
        if len(self._ends) > _KEPT:
            # The first two stay: the clock starts with them.
            self._ends = self._ends[:2] + self._ends[2::2]
            self._stride *= 2

    @property
    def rate(self) -> float:
        """Units of work per second, of late and altogether; NaN where too little has ended."""
        per = self._seconds_per_unit()
        return 1 / per if per > 0 else math.nan

    def left(self, now: float, total: float) -> float:
        """Seconds until all is done; NaN where too little has ended to say.

        Args:
            now: the time, of the same clock.
            total: units of work in all.
        """
        per = self._seconds_per_unit()
        if math.isnan(per):
            return math.nan
        then, done = self._last
        # A step that is overdue says nothing of those after it.
        return max(per * (total - done) - (now - then), per * max(total - done - 1, 0.0), 0.0)

    def _seconds_per_unit(self) -> float:
        ends = [*self._ends, self._last] if self._ends and self._last != self._ends[-1] else self._ends
        if len(ends) < 3:
            return math.nan
        now, done = ends[-1]
        start, first = ends[1]
        overall = (now - start) / (done - first)
        limit = done - _RECENT * (done - first)
        since, known = next(end for end in reversed(ends[1:-1]) if end[1] <= limit)
        return (1 - _WEIGHT) * overall + _WEIGHT * (now - since) / (done - known)


def span(seconds: float) -> str:
    """Write a time in two units at most; empty where it is not known.

    >>> span(45.2), span(190), span(7500), span(270_000), span(float("nan"))
    ('45s', '3m10s', '2h05m', '3d03h', '')
    """
    if not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    for size, unit, part, inner in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{inner}"
    return f"{whole}s"
