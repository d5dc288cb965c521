"""The plans of a study as points: what each costs, what was predicted and what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpsearch.budget import parse_budgets
from mpsearch.errors import MpsearchError
from mpsearch.front import Measurement
from mpsearch.keys import content_key
from mpsearch.records import StoredPlan
from mpsearch.verdict import rivals

Group = Literal["chosen", "mixed", "searched", "uniform", "imported", "random"]
Numbers = NDArray[np.float64]
#: Labels that a study gives to plans of its own; every other label came with a plan from elsewhere.
_OWN: Mapping[str, Group] = {"mixed": "mixed", "uniform": "uniform", "random": "random", "start": "searched"}


def group_of(label: str, searchers: Iterable[str] = ()) -> Group:
    """Say what a plan is to its study, from its label.

    Args:
        label: its label.
        searchers: names of the searchers, which label what they measured.

    >>> group_of("uniform int4-g64"), group_of("evolution 12", ["evolution"]), group_of("from the vendor")
    ('uniform', 'searched', 'imported')
    """
    first = label.split(maxsplit=1)[0] if label.strip() else ""
    if first == "mixed" and label != "mixed":
        return "searched"
    return _OWN.get(first, "searched" if first in searchers else "imported")


@dataclass(frozen=True)
class PlanRow:
    """What is drawn of one stored plan.

    Attributes:
        key: key of the plan's file.
        assignment: key of its formats.
        label: what it is to its study.
        formats: of each layer, in the model's order; with ``choice`` only those that it gives to some layer.
        predicted: what was predicted of it: ``loss``, ``spread``, ``bound``, ``cost``.
        source: how it was made: budgets, prices, solver.
        choice: (L,) number of each layer's format in ``formats``; None where these are of each layer already.
    """

    key: str
    assignment: str
    label: str
    formats: tuple[str, ...]
    predicted: Mapping[str, Any]
    source: Mapping[str, Any] = field(default_factory=dict)
    choice: NDArray[np.uint16] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, label: str, body: Mapping[str, Any]) -> PlanRow:
        """Read it off a stored plan; no layer is made of it."""
        formats = {str(tensor["layer"]): str(tensor["format"]) for tensor in body["tensors"]}
        assignment = content_key([body["model"].get("digest", ""), formats])
        return cls(str(body["digest"]), assignment, label, tuple(formats.values()), body["predicted"], body["source"])

    @classmethod
    def stored(cls, label: str, plan: StoredPlan) -> PlanRow:
        """Take it from what the store says of a plan."""
        return cls(plan.key, plan.assignment, label, plan.formats, plan.predicted, plan.source, plan.choice)

    def numbers(self, place: Mapping[str, int]) -> NDArray[np.uint16]:
        """(L,) number of each layer's format, by the numbers of the formats."""
        own = np.array([place[name] for name in self.formats], dtype=np.uint16)
        return own if self.choice is None else own[self.choice]


@dataclass(frozen=True, eq=False)
class Points:
    """P plans, in the order of the study: the plan for its own budgets first.

    Attributes:
        keys: keys of the plans' formats (`mpsearch.BitPlan.assignment`).
        plans: keys of the plans' files; empty where only a measurement is stored.
        labels: what each is to the study.
        groups: the same in one word.
        loss: (P,) measured loss; NaN where a plan was not measured.
        spread: (P,) its standard error.
        predicted: (P,) predicted loss; NaN where none was predicted.
        doubt: (P,) upper limit of the standard error of ``predicted``.
        bound: (P,) no plan within the plan's budgets is predicted to lose less; NaN for a plan that was not solved for.
        cost: resource -> (P,) total cost; NaN where unknown.
        choice: (P, L) number of each layer's format in ``formats``.
        formats: every format that some plan gives to some layer.
        unit: of the losses.
        sources: how each was made: budgets, prices, solver; empty where nothing is known of it.
    """

    keys: tuple[str, ...]
    plans: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[Group, ...]
    loss: Numbers
    spread: Numbers
    predicted: Numbers
    doubt: Numbers
    bound: Numbers
    cost: Mapping[str, Numbers]
    choice: NDArray[np.uint16]
    formats: tuple[str, ...]
    unit: str
    sources: tuple[Mapping[str, Any], ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def of(
        cls,
        rows: Sequence[PlanRow],
        measured: Sequence[Measurement],
        *,
        formats: Sequence[str] = (),
        searchers: Iterable[str] = (),
        unit: str = "nats/token",
    ) -> Points:
        """Join plans with what was measured of them; two rows of the same formats are one point.

        Args:
            rows: plans, the one for the study's own budgets first.
            measured: measurements; those of no plan in ``rows`` are left out.
            formats: names that get the first numbers, in this order.
            searchers: as for `group_of`.
            unit: of the losses, where nothing was measured.
        """
        first: dict[str, PlanRow] = {}
        for row in rows:
            known = first.setdefault(row.assignment, row)
            if known.predicted.get("loss") is None and row.predicted.get("loss") is not None:
                first[row.assignment] = replace(row, label=known.label)
        kept = list(first.values())
        found = {m.plan: m for m in reversed(measured)}
        names = list(dict.fromkeys([*formats, *(name for row in kept for name in dict.fromkeys(row.formats))]))
        place = {name: i for i, name in enumerate(names)}
        searching = frozenset(searchers)
        groups: list[Group] = [group_of(row.label, searching) for row in kept]
        if kept and groups[0] == "mixed":
            groups[0] = "chosen"
        resources = dict.fromkeys(name for row in kept for name in row.predicted.get("cost", {}))
        choice = np.stack([row.numbers(place) for row in kept]) if kept else np.zeros((0, 0), dtype=np.uint16)

        def column(values: Iterable[Any]) -> Numbers:
            return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

        def seen(name: str) -> Numbers:
            return column(getattr(found[row.assignment], name) if row.assignment in found else None for row in kept)

        return cls(
            tuple(row.assignment for row in kept),
            tuple(row.key for row in kept),
            tuple(row.label for row in kept),
            tuple(groups),
            seen("loss"),
            seen("spread"),
            column(row.predicted.get("loss") for row in kept),
            column(row.predicted.get("spread") for row in kept),
            column(row.predicted.get("bound") for row in kept),
            {name: column(row.predicted.get("cost", {}).get(name) for row in kept) for name in resources},
            choice,
            tuple(names),
            measured[0].unit if measured else unit,
            tuple(row.source for row in kept),
        )

    @property
    def measured(self) -> NDArray[np.bool_]:
        """(P,) which plans were measured."""
        return np.isfinite(self.loss)

    @property
    def rival(self) -> list[int | None]:
        """(P,) number of the uniform plan of least measured loss among those of at most 1.01 times a plan's bytes."""
        size = self.cost.get("weights", np.full(len(self), np.nan))
        uniform = (i for i, group in enumerate(self.groups) if group == "uniform")
        return rivals(uniform, self.loss.tolist(), size.tolist())

    def alone(self, resource: str) -> list[bool]:
        """(P,) whether a plan was solved for budgets of one resource and nothing else, so that its bound is of that.

        A plan of which it is not known what it was solved for has none.
        """
        found = []
        for source in self.sources or ({},) * len(self):
            try:
                budgets = parse_budgets([str(text) for text in source.get("budgets", ())])
            except MpsearchError:
                budgets = ()
            found.append(bool(budgets) and all(budget.priced_by == resource for budget in budgets))
        return found

    def front(self, resource: str = "weights", *, predicted: bool = False) -> NDArray[np.bool_]:
        """(P,) which plans no other one beats in both cost and loss.

        Args:
            resource: which cost.
            predicted: by predicted losses in place of measured ones.

        >>> def row(key, size, loss):
        ...     return PlanRow(key, key, key, ("int4-g64",), {"cost": {"weights": size}, "loss": loss})
        >>> points = Points.of([row("a", 10, 3.0), row("b", 20, 1.0), row("c", 20, 4.0)], [])
        >>> points.front(predicted=True).tolist()
        [True, True, False]
        """
        loss = self.predicted if predicted else self.loss
        cost = self.cost.get(resource, np.full(len(self), np.nan))
        there = np.flatnonzero(np.isfinite(loss) & np.isfinite(cost))
        on_front = np.zeros(len(self), dtype=np.bool_)
        least = math.inf
        for i in sorted(there.tolist(), key=lambda i: (cost[i], loss[i], self.keys[i])):
            if loss[i] < least:
                on_front[i], least = True, float(loss[i])
        return on_front
