"""The seams of the house: one verb each. Built-ins and plug-ins pass the suites in `mpsearch.testing`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from mpsearch.format import Format
from mpsearch.front import Measurement
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan
from mpsearch.problem import Problem, Solution
from mpsearch.records import CellRow, LinkRow, StudyRow
from mpsearch.tables import CostTable, SensitivityTable
from mpsearch.trials import Seen, Trial

Item = TypeVar("Item")
Result = TypeVar("Result")
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
    """Runs work, possibly elsewhere."""

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        """Yield (index of the item, result) as results arrive; the results do not depend on the executor."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class Store(Protocol):
    """Keeps values under their content key, and which of them belong to a study."""

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
