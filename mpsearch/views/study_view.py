"""Everything that is drawn of a study, read from the store once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpsearch import registry
from mpsearch.budget import parse_budgets
from mpsearch.errors import MpsearchError
from mpsearch.format import Format
from mpsearch.front import Measurement
from mpsearch.layer import Layers
from mpsearch.menu import Menu
from mpsearch.plan import BitPlan, Predicted
from mpsearch.planning import Labelled
from mpsearch.stored_study import StoredStudy
from mpsearch.tables import CostTable, SensitivityTable
from mpsearch.verdict import verdict
from mpsearch.views.agreement import other_tables
from mpsearch.views.grid import Grid
from mpsearch.views.points import Group, PlanRow, Points
from mpsearch.views.readable import readable_body, readable_plans
from mpsearch.views.worth import Worth, worth

_NO_LAYERS = Layers(())


class Limit(NamedTuple):
    """A budget of a study.

    Attributes:
        text: as the user wrote it.
        resource: which cost it limits.
        limit: the most that it may be, in the unit of the cost; NaN while the cost is not known.
    """

    text: str
    resource: str
    limit: float


@dataclass(frozen=True, eq=False)
class StudyView:
    """What is drawn of a study: whatever is there of it so far.

    Attributes:
        study: name of the study.
        state: where it stands, such as ``complete`` (see `mpsearch.records.StudyStatus`).
        layers: what is decided; empty before the model was looked at.
        points: its plans.
        measured: all measurements, with the samples of each sequence.
        scores: predicted loss of each decision in each format; None before scoring.
        costs: what every format costs, one table per resource.
        budgets: its own.
        model: ``name`` and ``digest`` of the model.
        verdict: whether mixing pays, in sentences; the first one is the headline.
        notices: what to know of model and data.
        provenance: name -> value: question, versions, machine; values may be mappings or lists.
        pins: decision -> the format that the study pins it to.
        others: scores of the same decisions by other estimators.
    """

    study: str
    state: str
    layers: Layers
    points: Points
    measured: tuple[Measurement, ...] = ()
    scores: SensitivityTable | None = None
    costs: tuple[CostTable, ...] = ()
    budgets: tuple[Limit, ...] = ()
    model: Mapping[str, str] = field(default_factory=dict)
    verdict: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    pins: Mapping[str, str] = field(default_factory=dict)
    others: tuple[SensitivityTable, ...] = ()

    @classmethod
    def of(cls, study: StoredStudy) -> StudyView:
        """Read what is stored of a study; a study that has only begun gives a view with less in it.

        Raises:
            StorageError: no such study (E141).
        """
        store, name = study.store, study.name
        links = store.links(name, "plan")
        survey = or_none(lambda: study.survey)
        plans, spoiled = readable_plans(store, [link.key for link in links], survey.layers if survey else None)
        rows = [PlanRow.stored(link.label, plans[link.key]) for link in links if link.key in plans]
        # One plan is read with its layers: what its bytes come to, and of which model it is.
        first = next((link for link in links if link.key in plans), None)
        body = readable_body(store, first.key) if first is not None else None
        # Where the study's own plan is damaged no other one stands in for it.
        there = first is not None and first is links[0]
        chosen = Labelled(links[0].label, BitPlan.from_json(body)) if there and body is not None else None
        scores = or_none(lambda: study.scores) if study.scored else None
        costs = tuple(study.costs)
        measured = tuple(study.measured_at({row.assignment: row.predicted.get("cost", {}) for row in rows}))
        layers = survey.layers if survey is not None else _NO_LAYERS
        model = body["model"] if body is not None else {}
        points = Points.of(
            rows,
            measured,
            formats=_by_bits(scores.formats if scores is not None else ()),
            searchers=registry.names("searchers"),
            unit=scores.unit if scores is not None else "nats/token",
        )
        if rows and not there:
            groups: tuple[Group, ...] = tuple("mixed" if group == "chosen" else group for group in points.groups)
            points = replace(points, groups=groups)
        return cls(
            name,
            study.status.state,
            layers,
            points,
            measured,
            scores,
            costs,
            _limits(study.spec.budgets, costs),
            {key: str(model[key]) for key in ("name", "digest", "architecture") if key in model},
            tuple(verdict(chosen, measured, costs)) if chosen is not None else (),
            (*(str(notice) for notice in (survey.notices if survey is not None else ())), *spoiled),
            {"study": study.spec.question()},
            Menu(study.spec, layers, model, protected=study.protected).pins if survey is not None else {},
            other_tables(study, scores) if scores is not None else (),
        )

    @cached_property
    def worth(self) -> Worth:
        """Whether mixing is worth it, what limits it, and what to try next."""
        return worth(self)

    @property
    def chosen(self) -> int:
        """Number of the plan for the study's own budgets; the first one where there is none."""
        return self.points.groups.index("chosen") if "chosen" in self.points.groups else 0

    @cached_property
    def leads(self) -> tuple[int, ...]:
        """Of each decision: the number of its first layer."""
        return tuple(self.rows.index(i) for i in range(len(self.layers.decisions)))

    @property
    def weights(self) -> int:
        """Number of weights of the whole model; bits per weight refer to it."""
        return self.layers.weights

    @cached_property
    def grid(self) -> Grid:
        """Where each layer stands on the map."""
        return Grid.of(self.layers)

    @cached_property
    def bits(self) -> tuple[int, ...]:
        """Bits of one code of each format of ``points.formats``."""
        return tuple(Format.parse(name).bits for name in self.points.formats)

    @cached_property
    def sizes(self) -> NDArray[np.float64]:
        """(L, F) bytes of each layer in each format of ``points.formats``; NaN where the layer cannot take it."""
        formats = [Format.parse(name) for name in self.points.formats]
        rows = [[np.nan if fmt.refuses(layer) else float(fmt.bytes(layer)) for fmt in formats] for layer in self.layers]
        return np.array(rows, dtype=np.float64).reshape(len(self.layers), len(formats))

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Of each layer: the number of its decision, which is its row in scores and costs."""
        place = {layer.name: i for i, row in enumerate(self.layers.decisions) for layer in row.layers}
        return tuple(place[layer.name] for layer in self.layers)

    def plan(self, i: int) -> BitPlan:
        """Return a plan by its number among the points."""
        names = self.points.formats
        formats = {
            layer.name: Format.parse(names[j])
            for layer, j in zip(self.layers, self.points.choice[i].tolist(), strict=True)
        }
        cost = {name: float(values[i]) for name, values in self.points.cost.items() if np.isfinite(values[i])}
        loss, doubt, bound = (_number(x[i]) for x in (self.points.predicted, self.points.doubt, self.points.bound))
        predicted = Predicted(loss, doubt, self.points.unit, bound, cost=cost)
        source = self.points.sources[i] if self.points.sources else {}
        return BitPlan(self.layers, formats, self.model, predicted, source)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def or_none(read: Any) -> Any:
    """Return what is read of a study, None when the study has not come so far."""
    try:
        return read()
    except MpsearchError as error:
        if error.code != "E143":
            raise
        return None


def _by_bits(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: (Format.parse(name).bits, names.index(name)))


def _limits(texts: Sequence[str], costs: Sequence[CostTable]) -> tuple[Limit, ...]:
    tables = {table.resource: table for table in costs}
    found = []
    for budget in parse_budgets(texts):
        table = tables.get(budget.priced_by)
        found.append(Limit(str(budget), budget.priced_by, budget.limit(table) if table is not None else np.nan))
    return tuple(found)
