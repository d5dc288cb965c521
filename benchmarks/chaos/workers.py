"""Kill, poison and freeze what works for a study, and what it stands on, while its driver goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.chaos.drivers import Maker
from benchmarks.chaos.lab import Lab, wait_until
from benchmarks.chaos.places import Cluster
from mpsearch.machine import process_name
from tests.postgres import Postgres

#: Seconds that a driver has to see that its cluster is gone.
_PATIENCE = 20.0
#: Of the model; one of its results kills whoever computes it.
POISON = ("layers.3.proj", "int4-g64")


def rounds(make: Maker, folder: Path, found: Counter[str], many: int, what: str) -> Iterator[Lab]:
    """Make labs until so many things were seen."""
    while found[what] < many:
        found["rounds"] += 1
        yield make(folder / f"round-{found['rounds']}")


def _ended(lab: Lab, process: subprocess.Popen[bytes], timeout: float = 600.0) -> int:
    """Wait for a driver; one that takes too long is killed."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def kill_workers(make: Maker, folder: Path, *, kills: int, seed: int = 0) -> Counter[str]:
    """Kill workers at work; one task kills each of its workers by itself, and is given up.

    Args:
        make: makes a lab whose model has a result that is `POISON`.
        folder: for the labs.
        kills: how many.
        seed: of the moments.
    """
    dice = random.Random(seed)
    found: Counter[str] = Counter()
    untroubled = make(folder / "calm")
    untroubled.finish(5)
    calm = untroubled.outcome()
    for lab in rounds(make, folder, found, kills, "kills"):
        process, here = lab.start(), 0
        while process.poll() is None and found["kills"] < kills:
            time.sleep(dice.uniform(0.05, 0.4))
            if pids := lab.working(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(dice.choice(pids), signal.SIGKILL)
                    here += 1
                    found["kills"] += 1
        found["other code"] += _ended(lab, process) != 5
        found["repeated"] += lab.repeated()
        found["not given up"] += not any(POISON[0] in why for why in _gaps(lab))
        # The one task is begun three times.
        found += lab.check(calm, kills=here + 2, workers=1, state="gaps")
    return found


def _gaps(lab: Lab) -> list[str]:
    return [row["body"] for row in lab.rows("value") if row["kind"] == "scores" and "given up after it" in row["body"]]


def freeze_workers(
    make: Maker, folder: Path, calm: Mapping[str, str], *, zombies: int, lease: float, seed: int = 0
) -> Counter[str]:
    """Freeze workers until their task was given to another one, and let them go on.

    Args:
        make: makes a lab whose leases are short.
        folder: for the labs.
        calm: what an untroubled run leaves.
        zombies: how many.
        lease: seconds that a worker may be silent.
        seed: of the moments.
    """
    dice = random.Random(seed)
    found: Counter[str] = Counter()
    for lab in rounds(make, folder, found, zombies, "zombies"):
        process, here = lab.start(), 0
        while process.poll() is None and found["zombies"] < zombies:
            time.sleep(dice.uniform(0.05, 0.2))
            if pids := lab.working(process.pid):
                with suppress(ProcessLookupError):
                    _freeze(lab, dice.choice(pids), lease, found)
                    here += 1
        found["other code"] += _ended(lab, process) != 0
        # What was claimed ahead lapses with what is being done.
        found += lab.check(calm, kills=2 * here, workers=1)
    return found


def _freeze(lab: Lab, pid: int, lease: float, found: Counter[str]) -> None:
    """Freeze a worker for longer than its lease, and count what became of the task that it was at."""
    os.kill(pid, signal.SIGSTOP)
    name = process_name(pid)
    # A statement that was on its way when it was frozen ends all the same.
    time.sleep(0.2)
    held = {row["key"]: row["epoch"] for row in lab.rows("task") if _is_held(row, name)}
    if not held:
        os.kill(pid, signal.SIGCONT)
        found["held nothing"] += 1
        return
    found["zombies"] += 1
    time.sleep(lease + 3.0)
    kept = {row["key"]: row["epoch"] for row in lab.rows("task") if _is_held(row, name)}
    before = lab.refused()
    os.kill(pid, signal.SIGCONT)
    if kept == held:
        # Inside a transaction: until it goes on nobody else can write to the file, or to the row.
        found["frozen while it wrote"] += 1
        return
    with suppress(AssertionError):
        wait_until(lambda: lab.refused() > before, lease + 5.0, "a refused result")
    found["refused" if lab.refused() > before else "said nothing more"] += 1


def _is_held(row: Mapping[str, Any], worker: str) -> bool:
    return row["state"] == "leased" and row["worker"] == worker


def kill_servers(
    make: Maker, folder: Path, calm: Mapping[str, str], server: Postgres, *, stops: int, workers: int, seed: int = 0
) -> Counter[str]:
    """Stop PostgreSQL as a power cut would, and start it again."""

    def fault(dice: random.Random) -> None:
        server.stop("immediate")
        time.sleep(dice.uniform(0.0, 2.0))
        server.start()

    return _under(make, folder, calm, fault, "stops", stops, workers, seed)


def kill_clusters(
    make: Maker, folder: Path, calm: Mapping[str, str], cluster: Cluster, *, part: str, kills: int, seed: int = 0
) -> Counter[str]:
    """Kill the raylet or the GCS of a Ray cluster; another cluster takes its place."""
    return _under(
        make,
        folder,
        calm,
        lambda dice: cluster.kill(part),
        f"{part} kills",
        kills,
        2,
        seed,
        patience=60.0,
        after=cluster.restart,
    )


def _under(
    make: Maker,
    folder: Path,
    calm: Mapping[str, str],
    fault: Callable[[random.Random], None],
    what: str,
    many: int,
    workers: int,
    seed: int,
    *,
    patience: float = 300.0,
    after: Callable[[], None] | None = None,
) -> Counter[str]:
    """Run studies while something fails below them; a driver that ends is followed by another one.

    Args:
        make: makes a lab.
        folder: for the labs.
        calm: what an untroubled run leaves.
        fault: makes it fail, and mends it where it can be mended under a driver.
        what: name of the fault.
        many: how often.
        workers: that compute.
        seed: of the moments.
        patience: seconds that a driver may take to end by itself, where it cannot go on.
        after: mends what cannot be mended under a driver.
    """
    dice = random.Random(seed)
    found: Counter[str] = Counter()
    for lab in rounds(make, folder, found, many, what):
        here, code = 0, 1
        while code != 0:
            process, before = lab.start(), here
            _until_at_work(lab, process)
            while process.poll() is None and found[what] < many:
                time.sleep(dice.uniform(0.1, 1.5))
                if process.poll() is None:
                    fault(dice)
                    here += 1
                    found[what] += 1
                    if after is not None:
                        break
            if after is not None and here > before:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
                found["drivers that waited"] += process.poll() is None
                after()
            code = _ended(lab, process, patience)
            found["drivers that ended"] += code != 0
        found += lab.check(calm, kills=here, workers=workers)
    return found


def _until_at_work(lab: Lab, process: subprocess.Popen[bytes]) -> None:
    """Wait until tasks are being done."""
    begun = time.time()
    while process.poll() is None and lab.first_result(begun) is None:
        time.sleep(0.05)
