"""Many processes at one results database: how fast, and whether anything is lost, doubled or refused.

    python -m benchmarks.storage_load --storage results.db --writers 64 --commits 200
    python -m benchmarks.storage_load --storage postgresql://user@host/empty --only writers keys tasks

Each harness starts with an empty database. ``--only`` picks from: writers, keys, tasks, openers, kills, migrations,
optuna.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.errors import StorageError
from mpsearch.records import CellRow, LeasedTask, TaskRow, ValueRow
from mpsearch.storage.store import SqlStore

FORK = multiprocessing.get_context("fork")
#: A driver that needs no process: it is nowhere near, and its lease is long.
DRIVER = "elsewhere:boot:1:2"
Figures = dict[str, Any]


def together(count: int, work: Callable[[int], Any], timeout: float = 900.0) -> list[Any]:
    """Run ``work(0..count-1)`` in as many processes from one moment on; a result is what it returned, or its error."""
    barrier = FORK.Barrier(count)
    results: Any = FORK.SimpleQueue()

    def start(number: int) -> None:
        try:
            barrier.wait(timeout)
            results.put((number, work(number)))
        except BaseException as error:
            results.put((number, f"error: {''.join(traceback.format_exception_only(error))[:300]}"))
        os._exit(0)

    workers = [FORK.Process(target=start, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    found = dict(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return [found[number] for number in range(count)]


def errors(results: Sequence[Any]) -> list[str]:
    """The results that are errors."""
    return [result for result in results if isinstance(result, str)]


@contextmanager
def watched(count: Callable[[], int]) -> Iterator[list[int]]:
    """Sample a number in a process of its own while the body runs; the list then holds the greatest."""
    most = FORK.Value("i", 0)

    def look() -> None:
        while True:
            most.value = max(most.value, count())
            time.sleep(0.05)

    watcher = FORK.Process(target=look, daemon=True)
    watcher.start()
    found: list[int] = []
    try:
        yield found
    finally:
        watcher.kill()
        watcher.join()
        found.append(most.value)


def connections(url: str) -> int:
    """Connections to a server's database, this one not counted; 0 for SQLite."""
    if "postgresql" not in url:
        return 0
    import psycopg

    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
        ).fetchone()
    return int(row[0]) if row else 0


def figures_of(waits: Sequence[float], seconds: float) -> Figures:
    return {
        "commits": len(waits),
        "per_second": round(len(waits) / seconds),
        "p50_ms": round(1e3 * float(np.quantile(waits, 0.5)), 1),
        "p99_ms": round(1e3 * float(np.quantile(waits, 0.99)), 1),
        "most_s": round(max(waits), 2),
    }


def writers(url: str, count: int, commits: int) -> Figures:
    """Each process commits rows of its own: nothing may fail, be lost or be there twice."""
    SqlStore(url).close()

    def write(number: int) -> list[tuple[float, float, float]]:
        found = []
        with SqlStore(url) as store:
            for i in range(commits):
                start = time.time()
                store.put_cells("load", [CellRow(f"{number}", f"{i}", -1, "ok", i / 7, 0.1, 1)])
                found.append((start, time.time(), number))
        return found

    with watched(lambda: connections(url)) as most:
        results = together(count, write)
    failed = errors(results)
    times = [row for result in results if not isinstance(result, str) for row in result]
    with SqlStore(url) as store:
        stored = [(row.layer, row.format) for row in store.cells("load")]
    wanted = {(str(number), str(i)) for number in range(count) for i in range(commits)}
    seconds = max(end for _, end, _ in times) - min(start for start, _, _ in times)
    figures = figures_of([end - start for start, end, _ in times], seconds)
    lost, double = len(wanted - set(stored)), len(stored) - len(set(stored))
    return figures | {
        "errors": len(failed),
        "lost": lost,
        "double": double,
        "connections": most[0],
        "first": failed[:1],
    }


def keys(url: str, count: int, draws: int, different: int) -> Figures:
    """All processes put values under the same keys, some of them others: one stays, and each other one is reported."""
    SqlStore(url).close()

    def write(number: int) -> tuple[set[str], set[tuple[str, int]], int]:
        source = random.Random(number)
        seen, refused, silent = set(), set(), 0
        with SqlStore(url) as store:
            for _ in range(draws):
                key = f"{source.randrange(different)}"
                value = number + 1 if source.random() < 0.05 else 0
                seen.add(key)
                try:
                    store.put("measurement", key, {"value": value})
                    found = store.get("measurement", key)
                    silent += found != {"value": value}
                except StorageError as error:
                    if error.code != "E521":
                        raise
                    refused.add((key, value))
        return seen, refused, silent

    results = together(count, write)
    failed = errors(results)
    good = [result for result in results if not isinstance(result, str)]
    seen, refused = set().union(*(x[0] for x in good)), set().union(*(x[1] for x in good))
    with SqlStore(url) as store:
        rows = len(store.get_many("measurement", [str(i) for i in range(different)]))
        written = {(row.key, int(row.offered["value"])) for row in store.conflicts()}
    return {
        "draws": count * draws, "distinct": len(seen), "rows": rows, "conflicts": len(refused),
        "written_down": len(written), "unreported": len(refused ^ written) + sum(x[2] for x in good),
        "errors": len(failed), "first": failed[:1],
    }  # fmt: skip


def tasks(url: str, count: int, total: int, lease: float) -> Figures:
    """Workers die after a claim or sleep past their lease: each task ends once, late results are refused."""
    with SqlStore(url) as store:
        store.create_study("load", {})
        store.control.drive("load", DRIVER, 1e6)
        store.queue.offer("load", [TaskRow(f"t{i}", "s", "score", {"i": i}, i) for i in range(total)])

    def value(lease: LeasedTask) -> ValueRow:
        return ValueRow("measurement", lease.key, {"value": lease.body["i"] / 7}, {"worker": lease.worker})

    def work(number: int) -> tuple[int, int, int]:
        # A process that dies is one that goes on under another name; what it had stays leased.
        source, name, ended = random.Random(number), f"w{number}", 0
        late = 0
        zombies: list[LeasedTask] = []
        with SqlStore(url) as store:
            died, last = 0, time.monotonic()
            while time.monotonic() - last < 3 * lease + 2:
                leased = store.queue.claim(name, lease=lease)
                if leased is None:
                    if store.queue.counts("load").get("done", 0) == total:
                        break
                    time.sleep(0.05)
                    continue
                last = time.monotonic()
                chance = source.random()
                if leased.deaths == 0 and chance < 0.02:
                    died += 1
                    name = f"w{number}.{died}"
                elif leased.deaths == 0 and chance < 0.03:
                    zombies.append(leased)
                else:
                    try:
                        store.queue.finish(leased, values=[value(leased)], seconds=0.01)
                        ended += 1
                    except StorageError as error:
                        # On a machine that is busy a worker may oversleep without being asked to.
                        if error.code != "E523":
                            raise
                        late += 1
            refused = late
            for zombie in zombies:
                try:
                    store.queue.finish(zombie, values=[value(zombie)])
                except StorageError as error:
                    refused += error.code == "E523"
        return ended, len(zombies) + late, refused

    started = time.monotonic()
    results = together(count, work)
    seconds = time.monotonic() - started
    failed = errors(results)
    good = [result for result in results if not isinstance(result, str)]
    with SqlStore(url) as store:
        rows = store.get_many("measurement", [f"t{i}" for i in range(total)])
        counts, lines = store.queue.counts("load"), len(store.control.lines("load", limit=10_000))
    return {
        "tasks": total, "results": len(rows), "ended": sum(x[0] for x in good), "states": counts,
        "zombies": sum(x[1] for x in good), "refused": sum(x[2] for x in good), "logged": lines,
        "seconds": round(seconds, 1), "errors": len(failed), "first": failed[:1],
    }  # fmt: skip


def openers(fresh: Callable[[int], str], count: int, rounds: int) -> Figures:
    """Processes open an empty database at one moment: one schema, and no error."""
    failed, worst, rows = [], 0.0, set()
    for number in range(rounds):
        url = fresh(number)

        def use(i: int, url: str = url) -> float:
            start = time.monotonic()
            with SqlStore(url) as store:
                store.put("plan", str(i), {})
            return time.monotonic() - start

        results = together(count, use)
        failed += errors(results)
        worst = max([worst, *(x for x in results if not isinstance(x, str))])
        with SqlStore(url) as store:
            rows.add(len(store.get_many("plan", [str(i) for i in range(count)])))
    return {
        "rounds": rounds,
        "rows": sorted(rows),
        "worst_s": round(worst, 1),
        "errors": len(failed),
        "first": failed[:1],
    }


def kills(url: str, rounds: int, seed: int = 5) -> Figures:
    """A writer is killed again and again: what it was told is stored is stored, and each result is whole."""
    SqlStore(url).close()
    source = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        witness = Path(folder) / "witness"
        witness.touch()

        def write(number: int) -> None:
            log = os.open(witness, os.O_WRONLY | os.O_APPEND)
            with SqlStore(url) as store:
                for i in range(10**6):
                    store.put_cells("kills", [CellRow(f"{number} {i}", "f", j, "ok", i / 7, 0.1, 1) for j in range(5)])
                    os.write(log, f"{number} {i}\n".encode())
                    os.fsync(log)

        for number in range(rounds):
            before = witness.stat().st_size
            worker = FORK.Process(target=write, args=(number,))
            worker.start()
            # One in four is killed while it starts.
            while number % 4 and worker.is_alive() and witness.stat().st_size == before:
                time.sleep(0.001)
            time.sleep(source.uniform(0.0, 0.1))
            os.kill(worker.pid or 0, signal.SIGKILL)
            worker.join()
        told = witness.read_text().split("\n")[:-1]
    with SqlStore(url) as store:
        layers = [row.layer for row in store.cells("kills")]
    parts = {layer: layers.count(layer) for layer in dict.fromkeys(layers[-200:])}
    return {
        "kills": rounds, "acknowledged": len(told), "lost": len(set(told) - set(layers)),
        "halves": sum(n != 5 for n in parts.values()) + (len(layers) != 5 * len(set(layers))),
    }  # fmt: skip


def migrations(fresh: Callable[[], str], data: str, rounds: int) -> Figures:
    """An upgrade from schema 1 is killed after its n-th statement: the old schema or the new one, and the next ends."""
    from sqlalchemy import Engine, event

    old = new = 0
    failed: list[str] = []
    for number in range(1, rounds + 1):
        url = fresh()
        if "://" in url:
            import psycopg

            with psycopg.connect(url) as connection:
                connection.execute(Path(data, "schema-1.sql").read_text().encode())
        else:
            shutil.copy(Path(data, "schema-1.db"), url)

        def upgrade(url: str = url, number: int = number) -> None:
            left = [number]

            @event.listens_for(Engine, "after_cursor_execute")
            def after(*_: object) -> None:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

            SqlStore(url).close()

        worker = FORK.Process(target=upgrade)
        worker.start()
        worker.join()
        old, new = old + (worker.exitcode != 0), new + (worker.exitcode == 0)
        try:
            with SqlStore(url) as store:
                if store.control.status("frozen").state != "complete" or len(store.links("frozen", "plan")) != 6:
                    failed.append(f"round {number}: rows are missing")
        except StorageError as error:
            failed.append(f"round {number}: {error}")
    return {"rounds": rounds, "killed": old, "ended": new, "errors": len(failed), "first": failed[:1]}


def optuna_load(url: str, count: int, trials: int) -> Figures:
    """The same load on Optuna's own storage: each process asks for trials of one study and tells their values."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    address = url if "://" in url else f"sqlite:///{url}"
    address = address.replace("postgresql://", "postgresql+psycopg://")
    optuna.create_study(storage=address, study_name="load", sampler=optuna.samplers.RandomSampler(seed=0))

    def work(number: int) -> int:
        sampler = optuna.samplers.RandomSampler(seed=number)
        study = optuna.load_study(storage=address, study_name="load", sampler=sampler)
        for _ in range(trials):
            trial = study.ask()
            study.tell(trial, trial.suggest_float("x", 0.0, 1.0))
        return trials

    started = time.monotonic()
    results = together(count, work)
    seconds = time.monotonic() - started
    study = optuna.load_study(storage=address, study_name="load")
    done = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.get_trials(deepcopy=False))
    failed = errors(results)
    figures = {"workers": count, "dead": len(failed), "trials": done, "wanted": count * trials}
    return figures | {"seconds": round(seconds, 1), "first": [text[:120] for text in failed[:1]]}


@contextmanager
def places(storage: str) -> Iterator[Callable[[], str]]:
    """Fresh databases: files in a folder that is removed, or databases of a server that are dropped."""
    if "://" not in storage or storage.startswith("sqlite"):
        with tempfile.TemporaryDirectory(dir=storage or None) as folder:
            numbers = iter(range(10**6))
            yield lambda: str(Path(folder) / f"{next(numbers)}.db")
        return
    import psycopg

    made: list[str] = []
    base = storage.rpartition("/")[0]

    def fresh() -> str:
        made.append(f"load_{os.getpid()}_{len(made)}")
        with psycopg.connect(storage, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {made[-1]}".encode())
        return f"{base}/{made[-1]}"

    yield fresh
    with psycopg.connect(storage, autocommit=True) as connection:
        for name in made:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="", help="a folder, or a server's address that may make databases")
    parser.add_argument("--writers", type=int, default=64)
    parser.add_argument("--commits", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=3000)
    parser.add_argument("--lease", type=float, default=3.0, help="seconds")
    parser.add_argument("--openers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--optuna-trials", type=int, default=20)
    parser.add_argument("--data", default="tests/data", help="where the databases of schema 1 are")
    parser.add_argument("--only", nargs="*", default=[])
    asked = parser.parse_args()
    with places(asked.storage) as fresh:
        harnesses: dict[str, Callable[[], Figures]] = {
            "writers": lambda: writers(fresh(), asked.writers, asked.commits),
            "keys": lambda: keys(fresh(), asked.writers, asked.commits, 3000),
            "tasks": lambda: tasks(fresh(), 16, asked.tasks, asked.lease),
            "openers": lambda: openers(lambda number: fresh(), asked.openers, asked.rounds),
            "kills": lambda: kills(fresh(), asked.rounds),
            "migrations": lambda: migrations(fresh, asked.data, asked.rounds),
            "optuna": lambda: optuna_load(fresh(), asked.writers, asked.optuna_trials),
        }
        for name, harness in harnesses.items():
            if not asked.only or name in asked.only:
                sys.stdout.write(f"{name:<11}{harness()}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
