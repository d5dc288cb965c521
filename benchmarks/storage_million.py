"""A results database with 10^6 cells and 20,000 plans: how long it takes to fill, what a look costs, how large it is.

python -m benchmarks.storage_million --storage FOLDER
python -m benchmarks.storage_million --storage postgresql://user@host/database --studies 10
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.storage_load import places
from mpsearch.records import CellRow
from mpsearch.storage import values
from mpsearch.storage.portable import insert_new
from mpsearch.storage.schema import link_table, study_table
from mpsearch.storage.store import SqlStore

LAYERS, FORMATS, BATCHES, PLANS = 250, 8, 5, 200


def matrix(study: int) -> Iterator[CellRow]:
    """The scores of one study: 10,000 cells."""
    source = random.Random(study)
    for layer in range(LAYERS):
        for fmt in range(FORMATS):
            for batch in range(BATCHES):
                name = f"model.layers.{layer // 7}.mlp.{layer % 7}.down_proj"
                yield CellRow(name, f"int{fmt}-g64", batch, "ok", source.random(), source.random() / 9, 512, "", 0.01)


def fill(store: SqlStore, studies: int) -> None:
    """Studies with their scores, and plans with their measurements, by the calls that a study makes."""
    for study in range(studies):
        name, scope = f"study {study:03}", f"{study:064x}"
        store.create_study(name, {"model": f"model {study}", "budgets": ["weights <= 4 bits"]})
        store.put_cells(scope, matrix(study))
        rows = [
            values.row(kind, f"{study:03}{i:061x}", body, None)
            for i in range(PLANS)
            for kind, body in (("plan", {"formats": [i % 8] * 50}), ("measurement", {"loss": i / 7, "bytes": i}))
        ]
        with store.writing() as connection:
            number = connection.execute(study_table.select().where(study_table.c.name == name)).one().id
            values.put_many(connection, rows)
            links = [
                {"study": number, "kind": row["kind"], "key": row["key"], "label": "mixed", "position": i}
                for i, row in enumerate(rows)
            ]
            insert_new(connection, link_table, links)


def looks(store: SqlStore, studies: int) -> dict[str, Callable[[int], Any]]:
    """What a page or a command asks for."""

    def front(i: int) -> int:
        links = store.links(f"study {i % studies:03}", "measurement")
        return len(store.get_many("measurement", [row.key for row in links]))

    return {
        "study matrix": lambda i: store.cells(f"{i % studies:064x}"),
        "front": front,
        "study list": lambda i: (store.studies(), store.control.statuses()),
        "key look-up": lambda i: store.get("plan", f"{i % studies:03}{i % PLANS:061x}"),
    }


def timed(look: Callable[[int], Any], calls: int, source: random.Random) -> tuple[float, float, float]:
    """Median and 95th percentile of a look, and the median of its CPU time in this process, in ms."""
    seconds, busy = [], []
    for _ in range(calls):
        number = source.randrange(10**6)
        start, cpu = time.perf_counter(), time.process_time()
        look(number)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return round(1e3 * float(p50), 2), round(1e3 * float(p95), 2), round(1e3 * float(np.quantile(busy, 0.5)), 2)


def size(store: SqlStore) -> float:
    """Megabytes."""
    if store.place.path is not None:
        with store.writing() as connection:
            connection.exec_driver_sql("SELECT 1")
        return sum(Path(f"{store.place.path}{end}").stat().st_size for end in ("", "-wal")) / 1e6
    with store.reading() as connection:
        return float(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()) / 1e6


def one_scope(store: SqlStore, studies: int) -> str:
    """All cells of so many studies in one scope: how long it takes to store and to read them."""
    start = time.perf_counter()
    for study in range(studies):
        store.put_cells("one", (row._replace(layer=f"{study} {row.layer}") for row in matrix(study)))
    stored = time.perf_counter()
    wall, busy = [], []
    for _ in range(3):
        before, cpu = time.perf_counter(), time.process_time()
        found = len(store.cells("one"))
        wall.append(time.perf_counter() - before)
        busy.append(time.process_time() - cpu)
    read = f"read in {min(wall):.2f} s, {min(busy):.2f} s of CPU time"
    return f"{'one scope':<14}{found} cells stored in {stored - start:.1f} s, {read}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="", help="a folder, or a server's address that may make databases")
    parser.add_argument("--studies", type=int, default=100, help="10,000 cells and 200 plans each")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--one-scope", action="store_true", help="also read all cells out of a single scope")
    asked = parser.parse_args()
    with places(asked.storage) as fresh, SqlStore(fresh()) as store:
        start = time.perf_counter()
        fill(store, asked.studies)
        sys.stdout.write(f"{'load':<14}{time.perf_counter() - start:.1f} s, {size(store):.0f} MB\n")
        source = random.Random(0)
        for name, look in looks(store, asked.studies).items():
            p50, p95, cpu = timed(look, asked.calls, source)
            sys.stdout.write(f"{name:<14}p50 {p50} ms, p95 {p95} ms, CPU {cpu} ms\n")
            sys.stdout.flush()
        if asked.one_scope:
            sys.stdout.write(one_scope(store, asked.studies))


if __name__ == "__main__":
    main()
