"""How long a question costs besides the computing: the shell's solve and help, and the bookkeeping of a cell.

    python -m benchmarks.solving

1. `mpsearch solve` on a stored study with 43 layers and 8 formats, and `mpsearch --help`: wall seconds, 10 runs each.
2. Store and bookkeeping per scored cell: a study whose scoring takes no time, seconds over cells.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mpsearch as mp
from mpsearch import registry
from mpsearch.bundled import BUNDLED, bundled_model
from mpsearch.format import parse_formats
from mpsearch.machine import fingerprint
from mpsearch.scoring import Scoring
from mpsearch.tables import SensitivityTable
from mpsearch.tasks import ScoreTask


def wall(line: Sequence[str], repeat: int = 10) -> str:
    """Median and worst wall seconds of a command."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return f"median {statistics.median(times):.2f} s, worst {max(times):.2f} s"


def bookkeeping(folder: Path) -> str:
    """Median milliseconds from a finished cell to the next one, with nothing to compute."""
    layers = mp.layers(bundled_model())
    formats = parse_formats(["int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64"])
    scoring = Scoring("scope", "divergence", (), layers, formats, 1)
    stamps: list[float] = []

    def compute(tasks: Sequence[ScoreTask]) -> Iterator[tuple[int, SensitivityTable]]:
        for i, task in enumerate(tasks):
            stamps.append(time.perf_counter())
            yield i, SensitivityTable(task.decisions, task.formats, np.array([[0.1]]), np.array([[0.01]]), "nats/token")

    with registry.make("stores", "sql", url=str(folder / "cells.db")) as store:
        scoring.table(store, compute, lambda done, total: None)
    steps = np.diff(stamps) * 1e3
    return f"{len(stamps)} cells: median {np.median(steps):.2f} ms, 95 % {np.percentile(steps, 95):.2f} ms per cell"


def main() -> None:
    print(fingerprint())
    shell = [sys.executable, "-m", "mpsearch.cli.main"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings: dict[str, Any] = {"model": BUNDLED, "calibration": "stdlib:calibration", "tokens": 512}
        study = mp.study(
            "solving", budgets=["weights <= 3.5 bits"], estimator="weight_mse", points=0, validation_tokens=512,
            storage=str(folder / "study.db"), **settings,
        )  # fmt: skip
        study.run()
        study.store.close()
        line = [*shell, "solve", "solving", "--budget", "weights <= 3.3 bits", "--storage", str(folder / "study.db")]
        print(f"solve from the shell, 25 decisions x 8 formats: {wall(line)}")
        print(f"--help: {wall([*shell, '--help'])}")
        print(f"bookkeeping, SQLite with full sync: {bookkeeping(folder)}")


if __name__ == "__main__":
    main()
