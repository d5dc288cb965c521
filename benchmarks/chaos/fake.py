"""A model that costs milliseconds and whose numbers come from the names of its parts; all around it is real.

`MPSEARCH_CHAOS` names a JSON file with the settings (`Fake`). What is begun and what is acknowledged is appended to a
witness file, so that a harness knows it whatever becomes of the database.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from mpsearch import driving
from mpsearch.format import Format
from mpsearch.front import Measurement
from mpsearch.keys import content_key
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.storage import server
from mpsearch.tables import SensitivityTable
from mpsearch.tasks import MeasureTask, ScoreTask, Setup, Survey, Task

VARIABLE = "MPSEARCH_CHAOS"
#: The witness file of the study that runs.
_witness: list[str] = []


@dataclass(frozen=True)
class Fake:
    """What the model is like.

    Attributes:
        witness: file that says what was begun and acknowledged.
        layers: how many it has.
        least: seconds that a task takes at least; which, its key decides.
        most: seconds that a task takes at most.
        lease: seconds that a task or study stays claimed without a sign of life; the package's own when 0.
        poison: a layer and a format whose scoring kills the worker; none when empty.
        attest: write down what the database acknowledges, too.
        door: seconds that a single call waits for a server that is away; the package's own when 0.
    """

    witness: str
    layers: int = 250
    least: float = 0.002
    most: float = 0.020
    lease: float = 0.0
    poison: tuple[str, ...] = ()
    attest: bool = True
    door: float = 0.0

    def save(self, path: Path) -> None:
        """Write the file that the variable names, whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls) -> Fake:
        found = json.loads(Path(os.environ[VARIABLE]).read_text(encoding="utf-8"))
        return cls(**{**found, "poison": tuple(found["poison"])})


def share(*names: object) -> float:
    """A number in [0, 1) that depends on names alone.

    >>> share("a") == share("a") != share("b")
    True
    """
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:6], "big") / 2**48


def write_line(path: str, line: str, *, sync: bool) -> None:
    """Append a line to a witness file, where many processes write at once."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Chaos:
    """Names the estimator; `Cells` does its work."""

    by: ClassVar[Literal["cell", "batch"]] = "cell"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[str] = ""
    cost: ClassVar[str] = "milliseconds"
    needs: ClassVar[Sequence[str]] = ()

    def refuses(self, model: object) -> str:
        return ""


class Cells:
    """Does tasks, as `mpsearch.evaluate.workbench.Work` does those of a real model."""

    def __init__(self, setup: Setup) -> None:
        self._fake = Fake.load()
        if self._fake.lease:
            (driving.Driver.__init__.__kwdefaults__ or {})["lease"] = self._fake.lease
        if self._fake.door:
            server.PATIENCE = self._fake.door
        _witness[:] = [self._fake.witness]
        if self._fake.attest:
            _attest()

    def __call__(self, task: Task) -> Any:
        fake = self._fake
        if isinstance(task, ScoreTask):
            return self._score(task)
        if isinstance(task, MeasureTask):
            plan = BitPlan.from_json(task.plan)
            self._take_time("measure", plan.assignment)
            loss = share(plan.assignment)
            cost = {**plan.cost, "weights": float(plan.stored_bytes)}
            return Measurement(plan.assignment, task.label, loss, loss / 9, "nats/token", cost, samples=(loss, loss))
        layers = [
            Layer(f"layers.{i}.proj", "linear", (64, 64), dtype="bfloat16", macs=4096) for i in range(fake.layers)
        ]
        return Survey(Layers(tuple(layers)), 1, "ChaosForCausalLM")

    def _score(self, task: ScoreTask) -> SensitivityTable:
        layer, fmt = task.decisions[0], task.formats[0]
        self._take_time("score", task.decisions[0], task.formats[0])
        if (layer, fmt) == self._fake.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        value = (0.1 + share(layer, fmt)) * 4.0 ** -Format.parse(fmt).bits
        return SensitivityTable(
            (layer,), (fmt,), np.array([[value]]), np.array([[value / 7]]), "nats/token", source={"seconds": 0.01}
        )

    def _take_time(self, *names: str) -> None:
        write_line(self._fake.witness, f"begin {content_key(names)} {os.getpid()} {time.time()}", sync=False)
        time.sleep(self._fake.least + share("time", *names) * (self._fake.most - self._fake.least))


def _attest() -> None:
    """Have every result that the database has acknowledged written down, outside of it."""
    from mpsearch.storage.queue import Queue

    real = Queue.finish
    if hasattr(real, "witnessed"):
        return

    def finish(self: Queue, lease: Any, **given: Any) -> Any:
        following = real(self, lease, **given)
        for scope, rows in given.get("cells", ()):
            for row in rows:
                name = json.dumps(["cell", scope, row.layer, row.format, row.batch])
                write_line(_witness[0], f"end {time.time()} {name}", sync=True)
        for row in given.get("values", ()):
            name = json.dumps(["value", row.kind, row.key])
            write_line(_witness[0], f"end {time.time()} {name}", sync=True)
        return following

    finish.witnessed = True  # type: ignore[attr-defined]
    Queue.finish = finish  # type: ignore[method-assign]
