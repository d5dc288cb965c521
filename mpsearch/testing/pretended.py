"""Made-up work for real drivers, workers, queues and databases: it takes a moment, and dies or fails when told to.

A worker in a process of its own learns of it by `pretend`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpsearch import registry
from mpsearch.driving import Driver
from mpsearch.errors import InputError
from mpsearch.front import Measurement
from mpsearch.machine import process_name
from mpsearch.ports import Executor, Store
from mpsearch.spec import StudySpec
from mpsearch.tasks import Failed, Job, MeasureTask, Setup, Task

_MODEL = "nowhere"
_IDENTITY = {"model": "m", "calibration": "c", "validation": "v"}
#: What Python runs when it starts, where this stands on its path.
_START = """from mpsearch import registry

registry.BUILT_IN = {**registry.BUILT_IN, "work": {"workbench": "mpsearch.testing.pretended:work"}}
"""


class Pretended:
    """Work that takes a moment: a task is a measurement whose plan says what is to happen."""

    def __call__(self, task: Task) -> Any:
        """Do it: note that it was begun, wait, then die, fail, or measure."""
        assert isinstance(task, MeasureTask)
        plan = task.plan
        with open(plan["witness"], "a", encoding="utf-8") as stream:
            stream.write(f"{plan['number']}\n")
        time.sleep(plan["seconds"])
        match plan["then"]:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "gap":
                return Failed("E511", "not finite under this plan")
            case "refuse":
                raise InputError("E503", "a tokenizer of another model", where="model.json", advice="take its own")
            case "break":
                raise RuntimeError("nobody foresaw this")
        loss = int(hashlib.sha256(f"{plan['number']}".encode()).hexdigest()[:8], 16) / 2**32
        return Measurement(f"plan {plan['number']}", "", loss, 0.0, "nats/token", {}, seconds=time.perf_counter())


def work(setup: Setup) -> Callable[[Task], Any]:
    """What does the tasks of a setup: made-up ones of a `Bench`, real ones of any other study."""
    if Path(setup.model).name == _MODEL:
        return Pretended()
    from mpsearch.evaluate.workbench import Work

    return Work(setup)


def pretend(folder: Path) -> str:
    """Write what makes every Python that is started do made-up work; put the result on ``PYTHONPATH``.

    Args:
        folder: where to write it; an empty one.
    """
    (folder / "sitecustomize.py").write_text(_START, encoding="utf-8")
    root = Path(__file__).resolve().parents[2]
    return os.pathsep.join(x for x in (str(folder), str(root), os.environ.get("PYTHONPATH", "")) if x)


class Bench:
    """A stored study, a driver of it, and jobs.

    Attributes:
        store: the database.
        witness: each task that is begun leaves a line there.
    """

    def __init__(self, storage: str, witness: Path, name: str = "study") -> None:
        self.store: Store = registry.make("stores", "sql", url=storage)
        self.witness, self._name = witness, name
        spec = StudySpec.of(name=name, model=_MODEL, calibration="c", validation="v", budgets=["4"])
        self.store.create_study(name, spec.question())

    def driver(self, executor: Executor, **changes: Any) -> Driver:
        """A driver of the study, not yet begun."""
        settings = {"storage": self.store.address, "work": Pretended(), "lease": 10.0, **changes}
        return Driver(self.store, self._name, executor, _IDENTITY, {}, **settings)

    def job(self, number: int, then: str = "measure", seconds: float = 0.0) -> Job:
        """A job; the same number is the same work."""
        plan = {"number": number, "then": then, "seconds": seconds, "witness": str(self.witness)}
        return Job(MeasureTask("kl", plan), f"{self._name} {number}")

    def jobs(self, count: int, seconds: float = 0.0) -> list[Job]:
        """Jobs that end well."""
        return [self.job(i, seconds=seconds) for i in range(count)]

    def begun(self) -> list[int]:
        """Numbers of the tasks that were begun, in order."""
        return [int(line) for line in self.witness.read_text().split()] if self.witness.exists() else []

    def losses(self, jobs: Sequence[Job]) -> list[float]:
        """What was measured; an error when something is missing."""
        found = self.store.get_many("measurement", [job.goes for job in jobs])
        return [found[job.goes]["loss"] for job in jobs]

    def counts(self) -> dict[str, int]:
        """State -> how many tasks of the study are in it."""
        return dict(self.store.queue.counts(self._name))

    def await_begun(self, count: int, patience: float = 60.0) -> None:
        """Return when so many tasks were begun."""
        until = time.monotonic() + patience
        while len(self.begun()) < count:
            assert time.monotonic() < until, "no worker begins anything"
            time.sleep(0.01)

    def take_over(self, driver: Driver, other: str) -> None:
        """Give the study of a driver to another process, as if it had given no sign of life."""
        self.store.control.leave(self._name, process_name(), driver._epoch, "running")
        self.store.control.drive(self._name, other, 60.0)

    @contextmanager
    def soon(self, wanted: str) -> Iterator[None]:
        """Ask for something when a task was begun while the body runs."""

        def ask() -> None:
            self.await_begun(1)
            self.store.control.want(self._name, wanted)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield
        finally:
            asking.join()
