"""A proper clock: warm-up, enough samples, a bootstrap interval, and what disturbed it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

#: Runs work and returns the seconds that it took.
Stopwatch = Callable[[Callable[[], object]], float]

#: A sample takes at least this many readings of the clock, so that reading it is under 1 % of what is timed.
_READINGS = 200
#: A sample of which the process had the processor for less than this share was disturbed.
_UNDISTURBED = 0.95
_RESAMPLES = 400
#: Seconds that no call is taken to have lasted on the word of one sample.
_HICCUP = 0.05


@dataclass(frozen=True)
class Timing:
    """How long one call takes.

    Attributes:
        seconds: median over the samples, in seconds per call.
        low: lower end of the 95 % bootstrap interval of the median.
        high: upper end.
        samples: samples that the median is of.
        calls: calls in each sample.
        disturbed: share of all samples in which something else had the processor; these are left out while enough
            others are there.
        drift: median of the last quarter of the samples over that of the first, less 1.
    """

    seconds: float
    low: float
    high: float
    samples: int
    calls: int
    disturbed: float
    drift: float

    @property
    def noise(self) -> str:
        """What makes the figure doubtful; empty when nothing does.

        >>> Timing(1.0, 0.99, 1.01, 30, 1, 0.6, 0.0).noise
        'something else had the processor in 60 % of the samples'
        """
        found = []
        if self.disturbed > 0.25:
            found.append(f"something else had the processor in {100 * self.disturbed:.0f} % of the samples")
        if abs(self.drift) > 0.1:
            found.append(f"the last samples were {100 * self.drift:+.0f} % off the first")
        if self.high - self.low > 0.2 * self.seconds:
            found.append(f"the interval is {100 * (self.high - self.low) / self.seconds:.0f} % wide")
        return "; ".join(found)


@dataclass(frozen=True)
class Clock:
    """Times a call until its interval is tight enough.

    Wall-clock time. A sample during which the process did not have the processor (its own CPU time is less than 95 %
    of the wall time) says nothing of the call and is left out, as long as there are enough others; how many there were
    is reported.

    Attributes:
        precision: stop when the interval is this share of the median wide.
        limit: stop after so many seconds, warm-up included.
        warmup: seconds of calls that are not counted, at least two calls.
        least: samples before it may stop; a call that alone takes the whole limit is timed twice.
        stopwatch: runs work and returns its seconds by the clock of a device that runs on behind; none for a processor.
        threads: threads that the call uses. With several, how much of the processors they can have is not known, and a
            sample is disturbed when it had clearly less than the best one.

    >>> timing = Clock(limit=0.2).time(lambda: sum(range(1000)))
    >>> 0 < timing.low <= timing.seconds <= timing.high
    True
    """

    precision: float = 0.02
    limit: float = 2.0
    warmup: float = 0.05
    least: int = 11
    stopwatch: Stopwatch | None = None
    threads: int = 1

    def time(self, call: Callable[[], object]) -> Timing:
        """Time a call."""
        watch = self.stopwatch or _wall
        start = time.perf_counter()
        count = 0
        while count < 2 or time.perf_counter() - start < min(self.warmup, self.limit / 4):
            watch(call)
            count += 1
            if time.perf_counter() - start > self.limit / 2:
                break
        return self._sample(call, watch, _calls(call, watch), start + self.limit)

    def _sample(self, call: Callable[[], object], watch: Stopwatch, calls: int, end: float) -> Timing:
        wall: list[float] = []
        share: list[float] = []
        check = self.least
        work = partial(_repeat, call, calls)
        while len(wall) < 2 or time.perf_counter() < end:
            cpu = time.process_time()
            taken = watch(work)
            wall.append(taken / calls)
            # A device's time is not the process's own.
            share.append(1.0 if self.stopwatch else (time.process_time() - cpu) / taken)
            if len(wall) >= check:
                kept = _undisturbed(wall, self._shares(share), self.least)
                low, high = bootstrap(kept)
                if high - low <= self.precision * float(np.median(kept)):
                    break
                check = max(check + 1, int(check * 1.3))
        kept = _undisturbed(wall, self._shares(share), self.least)
        low, high = bootstrap(kept)
        quarter = max(1, len(kept) // 4)
        drift = float(np.median(kept[-quarter:]) / np.median(kept[:quarter]) - 1) if len(kept) >= 8 else 0.0
        disturbed = float(np.mean(self._shares(share) < _UNDISTURBED))
        return Timing(float(np.median(kept)), low, high, len(kept), calls, disturbed, drift)

    def _shares(self, share: list[float]) -> NDArray[np.float64]:
        """How much of the processors each sample had, of what it can have."""
        return np.array(share) / (max(share) if self.threads > 1 else 1.0)


def _wall(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def _repeat(call: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        call()


def _calls(call: Callable[[], object], watch: Stopwatch) -> int:
    """Calls that together take long enough for the clock not to matter."""
    wanted = _READINGS * reading_seconds()
    calls = 1
    while True:
        work = partial(_repeat, call, calls)
        taken = watch(work)
        if wanted <= taken < _HICCUP:
            # Something else may have had the processor for that long.
            taken = min(taken, watch(work), watch(work))
        if taken >= wanted:
            return calls
        calls = max(2 * calls, int(calls * wanted / max(taken, 1e-9)))


def _undisturbed(wall: list[float], had: NDArray[np.float64], least: int) -> NDArray[np.float64]:
    """The samples in which the process had the processor, or all when these are too few."""
    every = np.array(wall)
    kept = every[had >= _UNDISTURBED]
    return kept if len(kept) >= min(least, len(every)) else every


def bootstrap(samples: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median, by the bootstrap (percentiles of the medians of samples drawn again).

    Two samples alone give the two themselves.

    >>> bootstrap(np.array([1.0, 1.0, 1.0]))
    (1.0, 1.0)
    """
    drawn = np.random.default_rng(seed).integers(0, len(samples), (_RESAMPLES, len(samples)))
    medians = np.median(samples[drawn], axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(min(low, np.median(samples))), float(max(high, np.median(samples)))


def reading_seconds() -> float:
    """Seconds that a sample spends on reading the clocks: two readings of each.

    >>> 0 < reading_seconds() < 1e-3
    True
    """
    best = np.inf
    for _ in range(5):
        before = time.perf_counter()
        for _ in range(20):
            time.perf_counter()
            time.process_time()
        best = min(best, (time.perf_counter() - before) / 20)
    return float(best)


def machine_load() -> dict[str, float]:
    """What else this machine does: processes that want to run, and the share of time its host took away.

    ``load`` is the mean of the last minute, this process included; ``steal`` the seconds stolen since the machine
    started. Empty where the system does not say.
    """
    found: dict[str, float] = {}
    try:
        found["load"] = os.getloadavg()[0]
        with open("/proc/stat", encoding="ascii") as stream:
            found["steal"] = float(stream.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        pass
    return found
