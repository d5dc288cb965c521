"""Studies under fire, with a model that costs milliseconds: nothing acknowledged may be lost, and the answer is equal.

    python -m benchmarks.chaos                       # all of it; hours
    python -m benchmarks.chaos --only drivers --kills 50
    python -m benchmarks.chaos --only workers zombies --on sqlite --executors local

``--only`` picks from: drivers, workers, zombies, servers, clusters, interrupts, faults.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks.chaos import faults
from benchmarks.chaos.drivers import Maker, kill_drivers, quantiles
from benchmarks.chaos.interrupts import interrupt
from benchmarks.chaos.lab import Lab
from benchmarks.chaos.places import Cluster, server
from benchmarks.chaos.workers import POISON, freeze_workers, kill_clusters, kill_servers, kill_workers
from tests.postgres import Postgres

#: What must never be seen.
WRONG = (
    "lost", "other state", "leased", "other results", "repeated too often", "conflicts", "accepted twice",
    "not given up", "slow", "other code", "not paused", "no command",
    "no single message", "traceback", "damaged", "did not resume",
)  # fmt: skip


#: Seconds that a worker may be silent, where workers are frozen.
_LEASE = 1.5


class Places:
    """Where the studies of one call live; servers and clusters start when they are asked for."""

    def __init__(self, folder: Path, stack: ExitStack, layers: int) -> None:
        self.folder, self._stack, self._layers = folder, stack, layers
        self._server: Postgres | None = None
        self._cluster: Cluster | None = None

    @property
    def server(self) -> Postgres:
        if self._server is None:
            self._server = self._stack.enter_context(server())
        return self._server

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            # Workers of the cluster read the settings of whatever study runs now.
            self._cluster = self._stack.enter_context(Cluster(self.folder / "fake.json"))
        return self._cluster

    def maker(self, where: str, executor: str, **given: object) -> Maker:
        """Return what makes labs on ``sqlite`` or ``postgres``, with workers ``local``, ``pool`` or ``ray``."""

        def make(folder: Path) -> Lab:
            options: tuple[str, ...] = ("--workers", "1" if executor == "local" else "2")
            if executor == "ray":
                options += ("--ray", self.cluster.address)
            storage = "" if where == "sqlite" else self.server.url(self.server.create())
            settings = {"layers": self._layers, **given}
            return Lab.make(folder, storage, settings=self.folder / "fake.json", executor=options, **settings)

        return make


def told(name: str, found: Counter[str], more: str, start: float) -> int:
    """Print the figures of one harness; return how much is wrong."""
    wrong = sum(found[key] for key in WRONG)
    counts = ", ".join(f"{count} {key}" for key, count in sorted(found.items()) if count)
    sys.stdout.write(f"{'WRONG ' if wrong else ''}{name}: {counts}; {more}{time.time() - start:.0f} s\n")
    sys.stdout.flush()
    return wrong


def harnesses(args: argparse.Namespace, places: Places) -> Iterator[int]:
    """Run what was asked for, and yield how much each finds wrong."""
    untroubled, start = places.maker("sqlite", "local")(places.folder / "calm"), time.time()
    untroubled.finish(timeout=1800)
    calm = untroubled.outcome()
    told("untroubled", Counter(results=len(untroubled.known())), "", start)
    for where in args.on:
        for executor in args.executors:
            for name in args.only:
                start = time.time()
                found = one(name, args, places, calm, where, executor)
                if found is not None:
                    yield told(f"{name} {where} {executor}", *found, start)


def one(
    name: str, args: argparse.Namespace, places: Places, calm: Mapping[str, str], where: str, executor: str
) -> tuple[Counter[str], str] | None:
    """Run one harness; None where it makes no sense."""
    make, folder = places.maker(where, executor), places.folder / f"{name}-{where}-{executor}"
    given = {"folder": folder, "seed": args.seed}
    workers = 1 if executor == "local" else 2
    if name == "drivers":
        window = args.window * (2 if executor == "ray" else 1)
        found, waits = kill_drivers(make, calm=calm, kills=args.kills, workers=workers, window=window, **given)
        return found, f"first result after {quantiles(waits)}; "
    if name == "workers" and executor != "local":
        return kill_workers(places.maker(where, executor, poison=POISON), kills=args.worker_kills, **given), ""
    if name == "zombies" and executor == "pool":
        quick = places.maker(where, executor, lease=_LEASE)
        return freeze_workers(quick, calm=calm, zombies=args.zombies, lease=_LEASE, **given), ""
    if name == "servers" and where == "postgres":
        return kill_servers(make, calm=calm, server=places.server, stops=args.stops, workers=workers, **given), ""
    if name == "clusters" and executor == "ray":
        found = Counter[str]()
        for part in ("raylet", "gcs_server"):
            given["folder"] = folder / part
            found += kill_clusters(make, calm=calm, cluster=places.cluster, part=part, kills=args.stops, **given)
        return found, ""
    if name == "interrupts" and executor != "ray":
        return interrupt(make, calm=calm, times=args.interrupts, window=args.window, **given), ""
    if name == "faults" and (where, executor) == ("sqlite", "local"):
        small = faults.untroubled(folder / "calm")
        found = faults.fill_disk(folder / "full", small)
        for error in faults.ERRORS:
            found += faults.fail_each(folder / str(error), error, small)
        return found, ""
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["drivers", "workers", "zombies", "servers", "clusters", "interrupts", "faults"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--on", nargs="+", choices=["sqlite", "postgres"], default=["sqlite", "postgres"])
    parser.add_argument(
        "--executors", nargs="+", choices=["local", "pool", "ray"], default=["local", "pool", "ray"]
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=250, help="of the model; eight results each")
    parser.add_argument("--kills", type=int, default=34, help="of the driver, on each database with each executor")
    parser.add_argument(
        "--window", type=float, default=6.0, help="a driver is killed within so many seconds; Ray: twice"
    )
    parser.add_argument("--worker-kills", type=int, default=75, help="on each database with each executor")
    parser.add_argument("--zombies", type=int, default=50, help="on each database")
    parser.add_argument("--stops", type=int, default=20, help="of PostgreSQL, of the raylet and of the GCS")
    parser.add_argument("--interrupts", type=int, default=13, help="on each database with each executor but Ray")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mpsearch-chaos-") as folder, ExitStack() as stack:
        wrong = sum(harnesses(args, Places(Path(folder), stack, args.layers)))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
