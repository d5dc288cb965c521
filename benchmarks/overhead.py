"""What a result costs beside its measuring: claim, dispatch and commit; and how much faster two workers are than one.

    python -m benchmarks.overhead --cells 2000

Tasks sleep. The overhead of a task is the time from its begin to the begin of its worker's next one, less the sleep.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.chaos.lab import Lab
from benchmarks.chaos.places import server

#: Formats of the menu; each layer has a cell in each.
_FORMATS = ("int2-g64", "int4-g64", "int6-g64", "int8-g64")


def sleeping(folder: Path, storage: str, cells: int, seconds: float, workers: int) -> Lab:
    """Run a study whose tasks sleep."""
    lab = Lab.make(
        folder, storage, layers=max(1, cells // len(_FORMATS)), formats=_FORMATS, least=seconds, most=seconds,
        attest=False, points=0, executor=("--workers", str(workers)),
    )  # fmt: skip
    lab.finish(timeout=1800)
    return lab


def gaps(lab: Lab) -> list[float]:
    """Seconds from the begin of each task to the begin of its worker's next one."""
    last: dict[int, float] = {}
    found = []
    for _, pid, when in lab.begun:
        if pid in last:
            found.append(when - last[pid])
        last[pid] = when
    return found


def rate(lab: Lab, workers: int) -> float:
    """Tasks per second while all workers are there.

    Raises:
        AssertionError: they were never all there.
    """
    seen: set[int] = set()
    begun = lab.begun
    for place, (_, pid, when) in enumerate(begun):
        seen.add(pid)
        if len(seen) == workers:
            return (len(begun) - place - 1) / (begun[-1][2] - when)
    raise AssertionError(f"{len(seen)} workers began a task, and not {workers}")


def overhead(folder: Path, storage: str, cells: int, workers: int, seconds: float = 0.005) -> tuple[float, float]:
    """Median and 99 % quantile of the overhead, in seconds."""
    found = np.array(gaps(sleeping(folder, storage, cells, seconds, workers))) - seconds
    return float(np.median(found)), float(np.quantile(found, 0.99))


def speed_up(folder: Path, storages: Sequence[str], cells: int, seconds: float = 0.1) -> float:
    """How many times the rate of one worker two workers have.

    Args:
        folder: for the labs.
        storages: two empty databases; files in the folder when empty.
        cells: of each study.
        seconds: that a task sleeps.
    """
    one, two = (
        rate(sleeping(folder / f"workers-{workers}", storage, cells, seconds, workers), workers)
        for workers, storage in zip((1, 2), storages, strict=True)
    )
    return two / one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--speed-cells", type=int, default=200, help="of 100 ms, for one worker and two")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mpsearch-overhead-") as name, server() as postgres:
        for where in ("sqlite", "postgres"):
            storages = ["" if where == "sqlite" else postgres.url(postgres.create()) for _ in range(4)]
            for label, workers in (("in-process", 1), ("pool of 2", 2)):
                folder = Path(name) / f"{where}-{workers}"
                median, most = overhead(folder, storages[workers - 1], args.cells, workers)
                sys.stdout.write(f"{where:<9} {label:<11} {1e3 * median:6.1f} ms median, {1e3 * most:6.1f} ms p99\n")
                sys.stdout.flush()
            found = speed_up(Path(name) / f"{where}-speed", storages[2:], args.speed_cells)
            sys.stdout.write(f"{where:<9} two workers on 100 ms: {found:.2f} x one\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
