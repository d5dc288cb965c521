"""One study under fire: how it is started, what it left, and whether that is what an untroubled run leaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from benchmarks.chaos.fake import VARIABLE, Fake
from mpsearch.storage import schema
from mpsearch.storage.database import Database

SHIM = Path(__file__).parent / "shim"
ROOT = Path(__file__).parents[2]
NAME = "chaos"
FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int7-g64", "int8-g64", "int8-channel")


def environment(settings: Path) -> dict[str, str]:
    """The environment in which processes have the fake model."""
    return {
        **os.environ,
        VARIABLE: str(settings),
        "PYTHONPATH": os.pathsep.join([str(SHIM), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }


@dataclass
class Lab:
    """A study with the fake model.

    Attributes:
        folder: its own, for all files.
        storage: address of its database.
        fake: what its model is like.
        settings: file of the fake model; it may be shared by studies that run one after the other.
        executor: options of the command line that say where workers run.
        points: plans that are measured, beside those of one format.
    """

    folder: Path
    storage: str
    fake: Fake
    settings: Path
    executor: tuple[str, ...] = ()
    points: int = 4
    formats: Sequence[str] = FORMATS

    @classmethod
    def make(cls, folder: Path, storage: str = "", *, settings: Path | None = None, **given: Any) -> Lab:
        """Set up in a folder that need not be there; its database is a file when no storage is given."""
        folder.mkdir(parents=True, exist_ok=True)
        of_lab = {name: given.pop(name) for name in ("executor", "points", "formats") if name in given}
        fake = Fake(str(folder / "witness"), **given)
        found = cls(folder, storage or str(folder / "study.db"), fake, settings or folder / "fake.json", **of_lab)
        fake.save(found.settings)
        return found

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.settings)

    def command(self) -> list[str]:
        """Run the study, or go on with it when the database knows it."""
        shell = [sys.executable, "-m", "mpsearch.cli.main"]
        common = ["--storage", self.storage, "--out", str(self.folder / "out"), "--quiet", *self.executor]
        if self.state():
            return [*shell, "resume", NAME, *common]
        return [
            *shell, "run", "bundled:tiny-llama", "--name", NAME, "--calib", "stdlib:calibration", "--validation",
            "stdlib:validation", "--budget", "weights <= 4 bits", "--tokens", "512", "--validation-tokens", "512",
            "--points", str(self.points), "--random", "4", "--estimator", "chaos",
            *(f"--format={fmt}" for fmt in self.formats), *common,
        ]  # fmt: skip

    def start(self, command: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start it in a session of its own; what it says goes to a file."""
        with (self.folder / "said").open("ab") as said:
            return subprocess.Popen(
                command or self.command(), env=self.environment, start_new_session=True, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip

    def finish(self, code: int = 0, timeout: float = 300.0) -> None:
        """Let it run to its end.

        Raises:
            AssertionError: it ended otherwise.
        """
        process = self.start()
        try:
            found = process.wait(timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert found == code, f"ended with {found}: {self.said()}"

    def said(self) -> str:
        """The end of what its processes said."""
        return (self.folder / "said").read_text(errors="replace")[-1500:]

    def state(self) -> str:
        """The study's state in the database; empty when it is not there."""
        if "://" not in self.storage and not Path(self.storage).exists():
            return ""
        try:
            found = self.rows("study")
        except Exception as error:
            # Killed before the tables were made.
            if getattr(error, "code", "") != "E605":
                raise
            return ""
        return next((str(row["state"]) for row in found if row["name"] == NAME), "")

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All rows of a table."""
        return rows_of(self.storage, table)

    def known(self) -> dict[str, str]:
        """What the database holds of results: name of the row -> its content, floats to the last bit."""
        found = {}
        cells = self.rows("cell")
        scopes = {row["id"]: row["key"] for row in self.rows("scope")}
        for row in cells:
            name = json.dumps(["cell", scopes[row["scope"]], row["layer"], row["format"], row["batch"]])
            assert name not in found, f"there twice: {name}"
            numbers = [None if row[x] is None else float(row[x]).hex() for x in ("value", "spread")]
            found[name] = json.dumps([row["status"], *numbers, row["samples"]])
        for row in self.rows("value"):
            name = json.dumps(["value", row["kind"], row["key"]])
            assert name not in found, f"there twice: {name}"
            found[name] = str(row["body"])
        return found

    def outcome(self) -> dict[str, str]:
        """All results and the plan's file."""
        plan = self.folder / "out" / NAME / "plan.json"
        return self.known() | {"plan.json": plan.read_text() if plan.exists() else ""}

    def digest(self) -> str:
        """One digest of all results and of the plan's file."""
        return hashlib.sha256(json.dumps(sorted(self.outcome().items())).encode()).hexdigest()

    def _witness(self, kind: str, words: int) -> list[list[str]]:
        path = Path(self.fake.witness)
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split(" ", words)[1:] for line in lines if line.startswith(f"{kind} ")]

    @property
    def begun(self) -> list[tuple[str, int, float]]:
        """What was begun, in order: what, process, when."""
        return [(what, int(pid), float(when)) for what, pid, when in self._witness("begin", 3)]

    @property
    def ended(self) -> list[tuple[float, str]]:
        """What the database has acknowledged, in order: when, and name of the row."""
        return [(float(when), name) for when, name in self._witness("end", 2)]

    def lost(self) -> list[str]:
        """Results that were acknowledged and are not in the database."""
        ended = self.ended
        known = self.known() if ended else {}
        return [name for _, name in ended if name not in known]

    def repeated(self) -> int:
        """How often work was begun that had been begun before."""
        return len(self.begun) - len({what for what, _, _ in self.begun})

    def first_result(self, since: float) -> float | None:
        """Seconds from a moment to the first result that was acknowledged after it."""
        after = [when for when, _ in self.ended if when > since]
        return min(after) - since if after else None

    def working(self, driver: int = 0) -> list[int]:
        """Processes, other than the driver, that do a task which nobody did before them.

        A task that ended three workers is given up, whoever it was that killed them.
        """
        begun = self.begun
        times = Counter(what for what, _, _ in begun)
        last = {pid: what for what, pid, when in begun if pid != driver and when > time.time() - 3.0}
        return sorted(pid for pid, what in last.items() if times[what] == 1 and _alive(pid))

    def refused(self) -> int:
        """How many results of workers that had lost their lease were refused."""
        return sum(row["kind"] == "refused" for row in self.rows("event"))

    def check(self, calm: Mapping[str, str], *, kills: int, workers: int, state: str = "complete") -> Counter[str]:
        """Compare what is left with an untroubled run; return counts of what is wrong, all 0 if nothing is."""
        tasks, found = self.rows("task"), Counter[str]()
        found["lost"] = len(self.lost())
        found["other state"] = self.state() != state
        found["leased"] = sum(row["state"] == "leased" for row in tasks)
        here = self.outcome()
        others = sorted(name for name in here.keys() | calm.keys() if here.get(name) != calm.get(name))
        for name in others[:3]:
            sys.stderr.write(f"{name}: {here.get(name, '')[-300:]} instead of {calm.get(name, '')[-300:]}\n")
        found["other results"] = len(others)
        found["repeated too often"] = max(0, self.repeated() - kills * workers)
        found["conflicts"] = len(self.rows("conflict"))
        names = [name for _, name in self.ended if "score_unit" not in name]
        found["accepted twice"] = len(names) - len(set(names))
        return found


def rows_of(storage: str, table: str) -> list[dict[str, Any]]:
    """All rows of a table of a database."""
    database = Database(storage, create=False)
    try:
        with database.reading() as connection:
            return [dict(row) for row in connection.execute(select(schema.metadata.tables[table])).mappings()]
    finally:
        database.close()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> dict[int, str]:
    """Processes that a process has started, directly or not: number -> command line."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(entry.name)] = int(fields[1])
    found: set[int] = set()
    while True:
        more = {child for child, parent in parents.items() if parent in found | {pid}} - found
        if not more:
            return {child: commands[child] for child in sorted(found)}
        found |= more


def wait_until(condition: Any, seconds: float, what: str) -> None:
    """Wait for something.

    Raises:
        AssertionError: it did not come in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s not: {what}"
        time.sleep(0.02)
