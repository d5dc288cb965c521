"""Do a study's numbers depend on where, by how many, in what order, or with how many interruptions they are computed?

    python -m benchmarks.determinism
    python -m benchmarks.determinism --workers 1 2 --executors local --on sqlite --orders 2

A small transformer is scored and measured for real, with every number of workers, on every executor and database, in
several orders of the tasks; half of the runs are killed on their way and go on. All must give one digest of the
scores, the measurements and the plans.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.chaos.places import server
from mpsearch.storage.queue import Queue

NAME = "same"


def shuffle(seed: int) -> None:
    """Have this process offer its tasks in another order; 0 leaves it."""
    real = Queue.offer

    def offer(self: Queue, study: str, rows: Sequence[Any], again: bool = False) -> None:
        places = list(range(len(rows)))
        random.Random(seed).shuffle(places)
        moved = [replace(row, position=place) for row, place in zip(rows, places, strict=True)]
        real(self, study, moved, again)

    if seed:
        Queue.offer = offer  # type: ignore[method-assign]


def work(model: str, storage: str, out: str, workers: int, executor: str) -> None:
    """Run the study in this process."""
    import mpsearch as mp

    study = mp.study(
        name=NAME, model=model, calibration="stdlib:calibration", validation="stdlib:validation",
        formats=["int2-g64", "int4-g64", "int8-channel"], budgets=["weights <= 4 bits"], tokens=512,
        validation_tokens=512, length=32, batch_size=4, points=2, storage=storage, out=out, workers=workers,
        executor=executor,
    )  # fmt: skip
    study.run()


def digest(storage: str) -> str:
    """One digest of all scores, measurements and plans, floats to the last bit."""
    from benchmarks.chaos.lab import rows_of

    def number(value: float | None) -> str | None:
        return None if value is None else float(value).hex()

    rows = rows_of(storage, "cell")
    scopes = {row["id"]: row["key"] for row in rows_of(storage, "scope")}
    found = [
        [scopes[row["scope"]], row["layer"], row["format"], row["batch"], row["status"], number(row["value"]),
         number(row["spread"]), row["samples"]]
        for row in rows
    ]  # fmt: skip
    kinds = ("measurement", "plan", "scores")
    found += [[row["kind"], row["key"], row["body"]] for row in rows_of(storage, "value") if row["kind"] in kinds]
    return hashlib.sha256(json.dumps(sorted(found, key=json.dumps)).encode()).hexdigest()


def one(folder: Path, model: Path, storage: str, workers: int, executor: str, order: int, kills: int) -> str:
    """Run the study once, killed so often on its way, and return its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    storage = storage or str(folder / "study.db")
    command = [
        sys.executable, "-m", "benchmarks.determinism", "--model", str(model), "--storage", storage, "--out",
        str(folder / "out"), "--workers", str(workers), "--executors", executor, "--order", str(order),
    ]  # fmt: skip
    dice, code = random.Random(f"{workers} {executor} {order}"), 1
    with (folder / "said").open("ab") as said:
        while code != 0:
            process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
            try:
                code = process.wait(dice.uniform(3.0, 12.0) if kills > 0 else 600.0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                assert kills > 0, f"a run took more than 600 s: {folder / 'said'}"
            else:
                assert code == 0, (folder / "said").read_text(errors="replace")[-1500:]
            kills -= 1
    return digest(storage)


def small_model(folder: Path) -> Path:
    """Write a small random transformer."""
    from tests.conftest import make_llama

    return make_llama(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--executors", nargs="+", choices=["local", "ray"], default=["local", "ray"])
    parser.add_argument("--on", nargs="+", choices=["sqlite", "postgres"], default=["sqlite", "postgres"])
    parser.add_argument("--orders", type=int, default=3)
    for name in ("model", "storage", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--order", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        shuffle(args.order)
        work(args.model, args.storage, args.out, args.workers[0], args.executors[0])
        return
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="mpsearch-same-") as name, ExitStack() as stack:
        model = small_model(Path(name) / "model")
        postgres = stack.enter_context(server()) if "postgres" in args.on else None
        kinds = itertools.product(args.on, args.executors, args.workers, range(args.orders))
        for number, (where, executor, workers, order) in enumerate(kinds):
            start, kills = time.time(), number % 2
            storage = postgres.url(postgres.create()) if postgres and where == "postgres" else ""
            label = f"{where} {executor} {workers} workers order {order} kills {kills}"
            key = one(Path(name) / f"{number}", model, storage, workers, executor, order, kills)
            found.setdefault(key, []).append(label)
            sys.stdout.write(f"{key[:16]}  {label}  {time.time() - start:.0f} s\n")
            sys.stdout.flush()
    sys.stdout.write(f"{sum(map(len, found.values()))} runs, {len(found)} digest{'s' * (len(found) != 1)}\n")
    sys.exit(len(found) != 1)


if __name__ == "__main__":
    main()
