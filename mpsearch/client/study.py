"""A study of a server: reads as a stored study does, and can be followed and steered."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from mpsearch.budget import Budget, parse_budgets
from mpsearch.client.wire import Wire
from mpsearch.errors import MpsearchError, Notice
from mpsearch.front import Measurement, ParetoFront
from mpsearch.plan import BitPlan
from mpsearch.planning import Labelled
from mpsearch.records import EventRow, StudyStatus
from mpsearch.spec import StudySpec
from mpsearch.tables import CostTable, SensitivityTable
from mpsearch.tasks import Survey
from mpsearch.web.server.refusals import error_of

#: Seconds between tries to go on following a study.
_AGAIN = 1.0
#: Errors that may have passed then: nobody answers, too many streams, a database that is locked or out of connections.
_PASSING = ("E912", "E909", "E601", "E607")


class RemoteStudy:
    """A question, and what a server has stored of its answer.

    Attributes:
        name: name of the study.
    """

    def __init__(self, wire: Wire, name: str) -> None:
        """Set up; nothing is asked yet.

        Args:
            wire: the server.
            name: name of the study.
        """
        self.name = name
        self._wire = wire

    def __repr__(self) -> str:
        return f"RemoteStudy({self.name!r} at {self._wire.url})"

    @cached_property
    def spec(self) -> StudySpec:
        """The question; with a token for reading, without the folders of paths.

        Raises:
            StorageError: no such study (E141).
        """
        return StudySpec.from_question(self._get("/study")["spec"], StudySpec.storage)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The study's own budgets."""
        return parse_budgets(self.spec.budgets)

    @property
    def status(self) -> StudyStatus:
        """What the study is doing (raises as `spec`)."""
        return _status(self._get("/study")["status"])

    @property
    def notices(self) -> list[Notice]:
        """What to know of the model and the data."""
        return [Notice(item["code"], item["message"]) for item in self._get("/study")["notices"]]

    @property
    def survey(self) -> Survey:
        """What was found in the model (raises E143 when the study has not come that far)."""
        return Survey.from_json(self._get("/layers"))

    @property
    def scores(self) -> SensitivityTable:
        """The stored scores (raises as `survey`)."""
        return SensitivityTable.from_json(self._get("/scores", whole=True))

    @property
    def scored(self) -> bool:
        """Whether there are scores to solve on."""
        try:
            self._get("/scores", limit=1)
        except MpsearchError as error:
            if error.code != "E143":
                raise
            return False
        return True

    @property
    def costs(self) -> list[CostTable]:
        """The stored cost tables, weights first."""
        return [CostTable.from_json(item) for item in self._get("/costs")["items"]]

    @property
    def plans(self) -> list[Labelled]:
        """The study's plans, the one for its own budgets first."""
        found = self._rows("/plans", whole=True, limit=1000)
        return [Labelled(item["label"], BitPlan.from_json(item["plan"])) for item in found]

    @property
    def measurements(self) -> list[Measurement]:
        """All measured plans of the study, each with its label; the plan for its own budgets first."""
        return [Measurement.from_json(item) for item in self._rows("/measurements", limit=1000)]

    @property
    def front(self) -> ParetoFront:
        """The measured front over the bytes of weights."""
        return ParetoFront.of(self.measurements)

    def plan(self, *budgets: str, goal: str = "loss", most_loss: float = math.inf) -> BitPlan:
        """Solve on the stored scores, in the server.

        Args:
            budgets: budgets to keep; the study's own when none is given and the goal is the loss.
            goal: as for `mpsearch.stored_study.StoredStudy.answer`.
            most_loss: of a goal that is a resource.

        Raises:
            InfeasibleError: no plan keeps them (E201, E203).
            InputError: not budgets (E111, E112), no such goal (E212), or no scores yet (E143).
            UnsafeError: the token is for reading only (E902).
        """
        asked = {"study": self.name, "budgets": list(budgets), "goal": goal}
        most = {} if math.isinf(most_loss) else {"most_loss": most_loss}
        return BitPlan.from_json(self._wire.post("/solve", {**asked, **most})["plan"])

    def export(self, to: str, *budgets: str, version: str = "", assume: str = "") -> dict[str, str]:
        """Write the plan for budgets in the language of another tool, in the server.

        Args:
            to: name of an exporter that needs nothing but a plan, such as ``llm-compressor``.
            budgets: as for `plan`.
            version: of the target; the tested one by default.
            assume: version whose facts count where none are known.

        Returns:
            The files, name -> text.

        Raises:
            InputError: no such exporter (E107), or layers that it cannot hold (E301).
        """
        body = {"to": to, "version": version, "assume": assume}
        files = self._wire.post(f"/plans/{self.plan(*budgets).key}/export", body)["files"]
        return {str(name): str(text) for name, text in files.items()}

    def lines(self, after: int = 0) -> list[EventRow]:
        """Return the log's lines after the number of one."""
        found: list[EventRow] = []
        while part := self._get("/log", after=after)["items"]:
            found += [EventRow(**item) for item in part]
            after = found[-1].id
        return found

    def watch(self, after: int = 0, *, tries: int = 10) -> Iterator[StudyStatus | EventRow]:
        """Follow the study until it is over: its status when it changes, and each new line of its log.

        A connection that breaks is made again, and goes on after the last line.

        Args:
            after: number of the last line that is known.
            tries: how often in a row a connection may fail.

        Raises:
            ResourceError: the server has not answered so often (E912).
            StorageError: no such study (E141), or its database has not answered so often.
        """
        failed = 0
        while True:
            try:
                for kind, number, values in self._wire.events("/events", after, study=self.name):
                    if kind == "error":
                        raise error_of(values)
                    failed = 0
                    if kind == "status":
                        yield _status(values)
                    elif kind == "log":
                        after = number or after
                        yield EventRow(**values)
                    elif kind == "end":
                        return
            except MpsearchError as error:
                failed += 1
                if error.code not in _PASSING or failed >= tries:
                    raise
            time.sleep(_AGAIN)

    def pause(self) -> StudyStatus:
        """Ask the study to pause; what is known stays."""
        return self._steer("pause")

    def resume(self) -> StudyStatus:
        """Ask the study to go on; ``submitted`` says that it waits for a worker of the database to take it on."""
        return self._steer("resume")

    def cancel(self) -> StudyStatus:
        """Ask the study to end; what is known stays."""
        return self._steer("cancel")

    def _steer(self, verb: str) -> StudyStatus:
        return _status(self._wire.post(f"/study/{verb}", {"study": self.name}))

    def _get(self, path: str, **asked: Any) -> Any:
        return self._wire.get(path, study=self.name, **asked)

    def _rows(self, path: str, **asked: Any) -> Sequence[Any]:
        return list(self._wire.rows(path, study=self.name, **asked))


def _status(values: dict[str, Any]) -> StudyStatus:
    # A token for reading is not told of machines.
    return StudyStatus(**{"home": "", "driver": "", **values})
