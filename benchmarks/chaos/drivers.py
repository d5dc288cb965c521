"""Kill the process that drives a study, at any moment, and let another one go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.chaos.lab import Lab

#: Makes a lab in a folder; its database is empty.
Maker = Callable[[Path], Lab]


def kill_drivers(
    make: Maker, folder: Path, calm: Mapping[str, str], *, kills: int, workers: int, window: float, seed: int = 0
) -> tuple[Counter[str], list[float]]:
    """Kill a study's driver again and again; each time it goes on, and starts anew when it came to its end.

    Args:
        make: makes a lab.
        folder: for the labs.
        calm: what an untroubled run leaves.
        kills: how many.
        workers: that compute.
        window: a kill comes within so many seconds of the start.
        seed: of the moments.

    Returns:
        Counts of what was seen, and seconds from each start to the first new result.
    """
    dice = random.Random(seed)
    found: Counter[str] = Counter()
    waits: list[float] = []
    while found["kills"] < kills:
        found["rounds"] += 1
        lab, here = make(folder / f"round-{found['rounds']}"), 0
        whole = False
        while found["kills"] < kills and not whole:
            begun = time.time()
            process = lab.start()
            try:
                code = process.wait(dice.uniform(0.3, window))
            except subprocess.TimeoutExpired:
                alone = found["kills"] % 2 == 0
                process.kill() if alone else os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                here += 1
                found["kills"] += 1
                found["lost"] += len(lab.lost())
            else:
                assert code == 0, f"ended with {code}: {lab.said()}"
                whole = True
            if (wait := lab.first_result(begun)) is not None and here:
                waits.append(wait)
        if not whole:
            begun = time.time()
            lab.finish()
            if (wait := lab.first_result(begun)) is not None:
                waits.append(wait)
        found["repeated"] += lab.repeated()
        found += lab.check(calm, kills=here, workers=workers)
    return found, waits


def quantiles(waits: list[float]) -> str:
    """Median and maximum of seconds."""
    return f"{np.median(waits):.1f} s, at most {max(waits):.1f} s" if waits else "none"
