"""The seams of the house: one verb each. Built-ins and plug-ins pass the suites in `mpsearch.testing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mpsearch.format import Format
from mpsearch.front import Measurement
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan
from mpsearch.problem import Problem, Solution
from mpsearch.records import (
    CellRow,
    ClaimArgs,
    EventRow,
    LeasedTask,
    LinkRow,
    StoredPlan,
    StudyRow,
    StudyStatus,
    TaskRow,
    TaskState,
    ValueRow,
    WorkerRow,
)
from mpsearch.tables import CostTable, SensitivityTable
from mpsearch.trials import Seen, Trial

if TYPE_CHECKING:
    from mpsearch.working import Done, Order, Worker

# Models and batches hold torch values, which this file must not know.
Model = Any
Batches = Sequence[Any]


class Estimator(Protocol):
    """Predicts what each format would hurt.

    A frozen dataclass of its settings. ``by`` says how its work divides without changing the answer:
    ``cell`` (each decision and format on its own) or ``batch`` (tables of single batches, averaged by
    `SensitivityTable.mean`). ``covers`` says whose rounding it sees: ``weights``, ``activations``, ``caches``; formats
    of anything else are refused. ``version`` is raised with every change of the numbers: it is part of their key.
    ``parts`` says whether it is right for parts of layers (`mpsearch.parts.split`); one without it scores whole layers.
    ``cost`` says what it takes beside one rounding per cell, ``needs`` what it must be given: ``data``, ``loss``,
    ``logits``.
    """

    by: Literal["cell", "batch"]
    covers: Sequence[str]
    version: int
    cost: str
    needs: Sequence[str]

    def refuses(self, model: Model) -> str:
        """Say why this model cannot be scored; empty when it can."""
        ...

    def score(
        self, model: Model, batches: Batches, layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        """Score every decision of ``layers`` in every format; the model is left as it was."""
        ...


class Target(Protocol):
    """Says what each format costs."""

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        """Cost of every decision in every format."""
        ...


class Solver(Protocol):
    """Chooses one format per row under all budgets.

    ``takes`` says what problems it is for, ``proves`` what its answer comes with, ``cost`` what it takes to run.
    """

    takes: str
    proves: str
    cost: str

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be solved here; empty when it can."""
        ...

    def solve(self, problem: Problem) -> Solution:
        """Solve; a problem without an answer gives the status ``infeasible``."""
        ...


class Searcher(Protocol):
    """Looks for the plan of least measured loss within all budgets.

    A frozen dataclass of its settings. What it asks for is a function of the problem and of what was seen alone, so
    that a search which was cut off goes on where it was, and the same search asks the same again. ``takes``, ``proves``
    and ``cost`` are as those of a solver.
    """

    takes: str
    proves: str
    cost: str

    def refuses(self, problem: Problem) -> str:
        """Say why this problem cannot be searched here; empty when it can."""
        ...

    def ask(self, problem: Problem, seen: Sequence[Seen]) -> Sequence[Trial]:
        """Name the plans to measure next, all of them within the budgets; none when the search is over.

        Args:
            problem: losses predicted of single rows, costs and budgets.
            seen: everything measured so far, in the order in which it was asked for.
        """
        ...


class Evaluator(Protocol):
    """Runs a plan for real. ``version`` is raised with every change of the numbers: it is part of their key."""

    version: int

    def measure(self, model: Model, plan: BitPlan, batches: Batches, label: str = "") -> Measurement:
        """Measure a plan's loss; the weights are left bit for bit as they were."""
        ...


class Exporter(Protocol):
    """Writes a plan in the language of another tool.

    An exporter may have ``reads``: ``folder`` when it reads the model's folder, of which its setting ``source`` is the
    path, and ``model`` when it must be given the model; ``notes(plan)``, what a user should know; and
    ``bound(plan)``, how far logits of the loaded export may be from our simulation's, as a share of the largest.
    """

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that the target cannot hold, with the reason; empty when it can hold all."""
        ...

    def write(self, plan: BitPlan, folder: Path, model: Model | None = None) -> Sequence[Path]:
        """Write the plan into a folder and return the files."""
        ...


class Executor(Protocol):
    """Starts workers somewhere, and sees that they live. What they compute does not depend on where they are.

    ``inside`` says that `turn` itself does tasks, in the driver's process; ``workers`` how many there are.
    """

    inside: bool
    workers: int

    def begin(self, order: Order, here: Callable[[], Worker], lost: Callable[[str, str], Sequence[str]]) -> None:
        """Start the workers: elsewhere by an order, or ``here()`` for one in this process.

        ``lost(name, reason)`` is to be called for a worker that has died; without a reason it was ended on purpose. It
        returns the keys of the tasks that the worker had claimed.
        """
        ...

    def turn(self) -> Sequence[Done]:
        """Do one task, or look after the workers: start new ones for those that died.

        Raises:
            ResourceError: workers cannot be started (E522, E621).
        """
        ...

    def rest(self) -> None:
        """Nothing is to be done for a while."""
        ...

    def end(self, now: bool = False) -> None:
        """End the workers, at once if asked; what they had claimed is free again."""
        ...


class Queue(Protocol):
    """Tasks with leases, by the database's clock. A result that comes with an older epoch is refused."""

    def offer(self, study: str, rows: Sequence[TaskRow], again: bool = False) -> None:
        """Put tasks up for work; those that nobody ended, of a study that nobody drives, go over to this one.

        ``again`` offers anew what failed or was given up.
        """
        ...

    def claim(
        self,
        worker: str,
        *,
        lease: float,
        setups: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        any_study: bool = True,
        study: str = "",
    ) -> LeasedTask | None:
        """Take the first task that is ready, of a study that is driven and wanted to run; None when there is none."""
        ...

    def renew(self, lease: LeasedTask, seconds: float) -> bool:
        """Make a lease last from now on; False when it is lost."""
        ...

    def finish(
        self,
        lease: LeasedTask,
        *,
        values: Sequence[ValueRow] = (),
        cells: Sequence[tuple[str, Sequence[CellRow]]] = (),
        seconds: float = 0.0,
        claim: ClaimArgs | Mapping[str, Any] | None = None,
    ) -> LeasedTask | None:
        """Keep what a task gave and end it, all or nothing, and take the next one; E523 when the lease is lost.

        ``claim`` says what to take next: `ClaimArgs`, or some of the arguments of `claim`.
        """
        ...

    def fail(self, lease: LeasedTask, code: str, message: str, data: Mapping[str, Any] | None = None) -> None:
        """End a task without a result; E523 when the lease is lost."""
        ...

    def release(self, lease: LeasedTask) -> None:
        """Give a task back unharmed."""
        ...

    def lost(self, worker: str, reason: str) -> list[str]:
        """Free what a worker had that died, or, without a reason, was ended on purpose; return the keys."""
        ...

    def sweep(self) -> None:
        """Free the tasks whose lease has lapsed, or give them up."""
        ...

    def states(self, keys: Sequence[str]) -> dict[str, TaskState]:
        """Return where tasks stand; keys that are not there are absent."""
        ...

    def counts(self, study: str) -> dict[str, int]:
        """Return how many tasks of a study are in each state."""
        ...

    def orphans(self, study: str, keys: Sequence[str]) -> list[str]:
        """Return the tasks that nobody will end: absent ones, and unfinished ones of others whom nobody drives now."""
        ...

    def withdraw(self, study: str, epoch: int | None = None) -> None:
        """Remove the tasks of a study that nobody has begun; with an epoch, only if it is still the driver's."""
        ...

    def discard(self, keys: Sequence[str]) -> None:
        """Remove tasks that are done."""
        ...

    def forget(self, study: str, older: float = 0.0, epoch: int | None = None) -> None:
        """Remove the tasks of a study that were done so many seconds ago or more; for the epoch see `withdraw`."""
        ...


class Control(Protocol):
    """Who drives which study, what is wanted of it, what it says, and who works."""

    def submit(self, name: str, home: str) -> None:
        """Leave a study to whoever drives it first."""
        ...

    def drive(self, name: str, owner: str, lease: float, adopt: bool = False) -> int:
        """Take a study to drive it, and return the epoch that proves it; E144 when another process drives it.

        It is wanted to run from then on; with ``adopt`` only one that waits is taken, else E145.
        """
        ...

    def beat(self, name: str, owner: str, epoch: int, lease: float, phase: str, done: int, total: int) -> str:
        """Go on driving; return what is wanted: ``run``, ``pause`` or ``cancel``. E523 when it was taken over."""
        ...

    def leave(self, name: str, owner: str, epoch: int, state: str, reason: str = "") -> None:
        """End driving, in some state; E523 when it was taken over."""
        ...

    def drop(self, name: str, owner: str = "", epoch: int = 0) -> None:
        """Remove a study with its links, tasks and log; the values stay. With an owner, only one that it drives."""
        ...

    def unlink(self, name: str) -> None:
        """Forget which values belong to a study; the values stay."""
        ...

    def want(self, name: str, wanted: str) -> None:
        """Ask that a study runs, pauses or is cancelled: ``run``, ``pause``, ``cancel``."""
        ...

    def status(self, name: str) -> StudyStatus:
        """Return what a study is doing, or raise E141."""
        ...

    def statuses(self) -> list[StudyStatus]:
        """Return what all studies are doing, newest study first."""
        ...

    def waiting(self) -> list[str]:
        """Return the studies that somebody may drive: submitted, or left by their driver."""
        ...

    def log(self, name: str, kind: str, text: str) -> None:
        """Write a line into a study's log."""
        ...

    def lines(self, name: str, after: int = 0, limit: int = 1000) -> list[EventRow]:
        """Return the lines of a study's log after one, oldest first."""
        ...

    def hello(self, worker: WorkerRow) -> None:
        """Say that a worker is there, and what it does."""
        ...

    def bye(self, name: str) -> None:
        """Say that a worker has ended."""
        ...

    def workers(self) -> list[WorkerRow]:
        """Return the workers that said hello and not bye."""
        ...

    def clock(self) -> float:
        """The time of the database, in seconds since 1970."""
        ...


class Store(Protocol):
    """Keeps values under their content key, and which of them belong to a study.

    ``address`` opens it in another process, if it is ``shared``.
    """

    @property
    def queue(self) -> Queue:
        """Tasks and their leases."""
        ...

    @property
    def control(self) -> Control:
        """Who drives which study."""
        ...

    @property
    def address(self) -> str:
        """Opens the same database in another process; it may hold a password."""
        ...

    @property
    def shared(self) -> bool:
        """Whether another process can open it."""
        ...

    def wait_for_server(
        self,
        seconds: float,
        told: Callable[[str], None] = ...,
        stop: Callable[[], bool] = ...,
    ) -> Callable[[], None]:
        """Have calls wait so long for a server that is away, and tell people of it; ``stop`` ends the waiting.

        With 0 seconds a call looks once. Returns what puts back how it was before.
        """
        ...

    def settled(self, seconds: float) -> bool:
        """Whether the server answers, and has for so long since it was last away."""
        ...

    @property
    def away(self) -> bool:
        """Whether calls wait for a server that is away."""
        ...

    def put(self, kind: str, key: str, body: Mapping[str, Any], volatile: Mapping[str, Any] | None = None) -> None:
        """Keep a value; the same again is fine, another one for the same key is an error (E521).

        ``volatile`` fields may differ from run to run and are not compared.
        """
        ...

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the value of a key, or None."""
        ...

    def get_many(self, kind: str, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the values of the keys that are there."""
        ...

    def plan_rows(self, keys: Sequence[str]) -> dict[str, StoredPlan]:
        """Return what is drawn of the plans of the keys that are there, without reading their layers."""
        ...

    def put_cells(self, scope: str, cells: Sequence[CellRow]) -> None:
        """Keep scored cells, all or none."""
        ...

    def cells(self, scope: str) -> list[CellRow]:
        """Return all cells of a scope."""
        ...

    def create_study(self, name: str, spec: Mapping[str, Any]) -> None:
        """Note a study; one of the same name with another question is an error (E140)."""
        ...

    def study(self, name: str) -> StudyRow:
        """Return a study, or raise E141."""
        ...

    def studies(self) -> list[StudyRow]:
        """Return all studies, newest first."""
        ...

    def set_state(self, name: str, state: str) -> None:
        """Note what a study is doing."""
        ...

    def link(self, study: str, kind: str, key: str, label: str = "", position: int = 0) -> None:
        """Note that a value belongs to a study; again is fine."""
        ...

    def links(self, study: str, kind: str) -> list[LinkRow]:
        """Return what belongs to a study, in order."""
        ...

    def close(self) -> None:
        """Let go of the database."""
        ...
